"""Checkpoints, and runs that are really killed: one process ends by SIGKILL, another goes on."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from recrl_lib import runs
from recrl_lib.tests.training import small
from recrl_lib.training import checkpoint, ppo

# A server that has imported the library forks the processes to kill: a start costs nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["recrl_lib.tests.training.small"])
PARAMS = small.PARAMS.replace(
    ppo_steps=4, checkpoint_every=2, checkpoint_keep=1,
    learning_rate=3e-2, kl_target=0.01, stop_kl=0.05, lr_schedule="linear",
)  # fmt: skip


def result(trained: ppo.PPO) -> str:
    """Everything that training left, but for the times; every digit of it."""
    state = trained.state()
    state["plain"]["rows"] = small.timeless(trained.rows)
    return json.dumps(state, default=torch.Tensor.tolist)


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(descriptor: int) -> None:
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def on_call(n: int, function, before):
    """``function``, with ``before`` run ahead of its ``n``-th call."""
    calls = iter(range(1, 10_000))

    def counted(*args):
        if next(calls) == n:
            before(*args)
        return function(*args)

    return counted


def run(folder: str, moment: str = "", n: int = 0) -> None:
    """The process: trains from what ``folder`` holds to the end, unless ``moment`` comes first."""
    torch.set_num_threads(1)
    os.environ["RECRL_HOME"], os.environ["RECRL_PROGRESS"] = folder, "off"
    reward = on_call(n, small.red, die) if moment == "reward" else small.red
    trained = small.trainer(reward, mode="update", params=PARAMS)
    if moment == "optimizer step":
        trained.optimizer.step = on_call(n, trained.optimizer.step, die)
    elif moment == "half a file":
        runs.os.fsync = on_call(n, os.fsync, half_written)
    elif moment == "rename":
        runs.os.replace = on_call(n, os.replace, die)
    store = checkpoint.Store(Path(folder) / "checkpoints", "key", PARAMS.checkpoint_keep)
    trained.train(PARAMS.ppo_steps, store=store)
    (Path(folder) / "result").write_text(result(trained))


def process(*args) -> int | None:
    child = PROCESSES.Process(target=run, args=args)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    assert process(str(folder)) == 0
    return (folder / "result").read_text()


@pytest.mark.parametrize(
    "moment, n, kept",
    [
        ("reward", 1, []),  # before anything was stored
        ("reward", 3, ["step-000002"]),
        ("optimizer step", 10, ["step-000002"]),  # in the middle of an update
        ("half a file", 1, []),
        ("half a file", 2, ["step-000002"]),
        ("rename", 2, ["step-000002"]),
    ],
)
def test_a_killed_run_ends_as_one_never_killed(tmp_path, never_killed, moment, n, kept):
    assert process(str(tmp_path), moment, n) == -signal.SIGKILL
    assert [p.stem for p in sorted((tmp_path / "checkpoints").glob("*.pt"))] == kept
    assert not (tmp_path / "result").exists()
    assert process(str(tmp_path)) == 0
    assert (tmp_path / "result").read_text() == never_killed
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000004.pt"]


def test_the_store_keeps_the_newest_and_gives_back_what_it_got(tmp_path):
    store = checkpoint.Store(tmp_path, "key", keep=2)
    x = torch.arange(6.0).reshape(2, 3).T
    for step in (8, 9, 10, 11):
        store.save_step(step, {"x": x, "rows": [{"kl": 0.1 + 0.2, "step": step}]})
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["step-000010", "step-000011"]
    found = store.latest()
    assert torch.equal(found.pop("x"), x) and found == {"rows": [{"kl": 0.1 + 0.2, "step": 11}]}
    assert store.load("warm") is None


def test_a_checkpoint_of_another_setting_is_removed_and_a_damaged_one_is_named(tmp_path):
    checkpoint.Store(tmp_path, "key").save_step(1, {})
    other = checkpoint.Store(tmp_path, "another key")
    assert other.latest() is None and not list(tmp_path.iterdir())
    other.save_step(1, {"x": torch.zeros(1000)})
    path = tmp_path / "step-000001.pt"
    for damaged in (b"not a checkpoint", path.read_bytes()[:900], b""):
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError, match="step-000001.pt.*delete"):
            other.latest()
