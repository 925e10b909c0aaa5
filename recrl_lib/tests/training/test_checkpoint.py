"""Checkpoints, and runs that are really killed: a process ends itself with SIGKILL at a chosen moment, another goes on."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from recrl_lib import runs
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.params import resolve
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.tiny import tiny_explainer
from recrl_lib.training import checkpoint, diagnostics, ppo

# A server that has imported the library forks the processes to kill: a start costs nothing, and no thread is forked.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["recrl_lib.training.ppo", "recrl_lib.tests.tiny"])
PARAMS = resolve(
    "smoke",
    lora_layers=1,
    max_new_tokens=8,
    temperature=1.0,
    learning_rate=3e-2,
    ppo_steps=4,
    checkpoint_every=2,
    checkpoint_keep=1,
    kl_target=0.01,
    stop_kl=0.05,
    lr_schedule="linear",
)
RECORDS = [
    dict(
        user=u,
        item=1,
        position=1,
        title="the red film",
        year=0,
        genres=["good"],
        history_titles=["blue", word],
        history_genres=[],
    )
    for u, word in enumerate(["short", "long", "green", "bad", "a", "and"])
]


def red(records, texts):
    total = np.array(["red" in t.split() for t in texts], dtype=np.float32)
    return total, {"word": total}


def build(reward=red, seed=0, **changes) -> ppo.PPO:
    explainer = tiny_explainer(lora_layers=1)
    protected = subspaces.subspaces(
        subspaces.item_grams(
            explainer, ItemTexts(explainer, ["good film", "the red film and a blue film"])
        )[0],
        0.9,
    )
    return ppo.PPO(
        explainer,
        reward,
        RECORDS,
        PARAMS.replace(**changes),
        seed,
        projection.Shield(explainer, protected),
    )


def result(trainer: ppo.PPO) -> bytes:
    """Everything that training left, but for the times."""
    tensors, plain = trainer.state()
    plain["rows"] = [
        {k: v for k, v in row.items() if k not in diagnostics.TIMES} for row in plain["rows"]
    ]
    return save(tensors) + json.dumps(plain).encode()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(n: int, function, before):
    """``function``, with ``before`` run ahead of its ``n``-th call."""
    calls = iter(range(1, 10_000))

    def counted(*args):
        if next(calls) == n:
            before(*args)
        return function(*args)

    return counted


def half_written(descriptor: int) -> None:
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def run(folder: str, moment: str = "", n: int = 0) -> None:
    """The process: trains from what ``folder`` holds to the end, unless ``moment`` comes first."""
    torch.set_num_threads(1)
    os.environ["RECRL_HOME"], os.environ["RECRL_PROGRESS"] = folder, "off"
    trainer = build(on_call(n, red, lambda *a: die()) if moment == "reward" else red)
    if moment == "optimizer step":
        trainer.optimizer.step = on_call(n, trainer.optimizer.step, die)
    elif moment == "half a file":
        runs.os.fsync = on_call(n, os.fsync, half_written)
    elif moment == "rename":
        runs.os.replace = on_call(n, os.replace, lambda *a: die())
    trainer.train(
        PARAMS.ppo_steps,
        store=checkpoint.Store(Path(folder) / "checkpoints", "key", PARAMS.checkpoint_keep),
    )
    (Path(folder) / "result").write_bytes(result(trainer))


def process(*args) -> int | None:
    child = PROCESSES.Process(target=run, args=args)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    assert process(str(folder)) == 0
    return (folder / "result").read_bytes()


@pytest.mark.parametrize(
    "moment, n, kept",
    [
        ("reward", 1, []),  # before anything was stored
        ("reward", 3, ["step-000002"]),
        ("optimizer step", 10, ["step-000002"]),  # in the middle of an update
        ("half a file", 1, []),
        ("half a file", 3, ["step-000002"]),  # every file is flushed twice: itself, its folder
        ("rename", 2, ["step-000002"]),
    ],
)
def test_a_killed_run_ends_as_one_never_killed(tmp_path, never_killed, moment, n, kept):
    assert process(str(tmp_path), moment, n) == -signal.SIGKILL
    assert [p.stem for p in sorted((tmp_path / "checkpoints").glob("*.safetensors"))] == kept
    assert not (tmp_path / "result").exists()
    assert process(str(tmp_path)) == 0
    assert (tmp_path / "result").read_bytes() == never_killed
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000004.safetensors"]


def test_a_run_killed_again_and_again_ends_as_one_never_killed(tmp_path, never_killed):
    for moment, n in (("reward", 4), ("half a file", 1), ("optimizer step", 3)):
        assert process(str(tmp_path), moment, n) == -signal.SIGKILL
    assert process(str(tmp_path)) == 0
    assert (tmp_path / "result").read_bytes() == never_killed


def test_resuming_a_finished_run_does_nothing(tmp_path):
    store = checkpoint.Store(tmp_path, "key")
    first = build()
    first.train(2, store=store)
    again = build(reward=None)  # would fail if it were asked
    rows = again.train(2, store=store)
    assert rows == json.loads(json.dumps(first.rows)) and result(again) == result(first)


def test_a_checkpoint_of_another_setting_is_not_used(tmp_path):
    build().train(1, store=checkpoint.Store(tmp_path / "c", "key"))
    other = checkpoint.Store(tmp_path / "c", "another key")
    assert other.latest() is None and not list((tmp_path / "c").iterdir())


def test_the_store_keeps_the_newest_and_gives_back_what_it_got(tmp_path):
    store = checkpoint.Store(tmp_path, "key", keep=2)
    content = {"x": torch.arange(6.0).reshape(2, 3).T, "s": torch.tensor(3)}
    for step in (8, 9, 10, 11):
        store.save_step(step, content, {"step": step, "rows": [{"kl": 0.1 + 0.2}]})
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["step-000010", "step-000011"]
    tensors, plain = store.latest()
    assert plain == {"step": 11, "rows": [{"kl": 0.1 + 0.2}]}
    assert tensors.keys() == content.keys() and all(
        torch.equal(tensors[k], v) for k, v in content.items()
    )
    assert store.load("warm") is None


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "step-000001.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(RuntimeError, match="step-000001.safetensors.*delete"):
        checkpoint.Store(tmp_path, "key").latest()
