"""Warnings, measures, precision, and trackers with the real packages, offline."""

import json
import os
import re
import subprocess
import sys
import types

import pandas as pd
import pytest
import torch

from recrl_lib import paths
from recrl_lib.params import choices
from recrl_lib.tests.training.small import PARAMS, trainer
from recrl_lib.training import diagnostics

HEALTHY = {
    "reward": 0.8, "kl": 1.0, "eos_rate": 0.95, "entropy": 1.0, "explained_variance": 0.1,
    "clip_fraction": 0.03, "length": 30.0, "gradient_norm": 0.1, "replay_norm": 0.0,
    "shield_seconds": 0.01, "step_seconds": 4.0,
}  # fmt: skip


def rows(n: int = 6, **last) -> pd.DataFrame:
    """``n`` healthy steps, the last two with other values."""
    table = pd.DataFrame([{"step": k, "episodes": 32 * k, **HEALTHY} for k in range(1, n + 1)])
    for name, value in last.items():
        table.loc[n - 2 :, name] = value
    return table


def test_nothing_to_warn_of():
    optional = ["entropy", "explained_variance", "replay_norm"]
    for healthy in (rows(), rows(1), rows().drop(columns=optional)):
        assert diagnostics.warnings(healthy) == []


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("kl", 25.0, "KL reached 25.0 nats per text at step 5"),
        ("eos_rate", 0.75, "fell by 0.20"),
        ("eos_rate", 0.5, "50% of the latest texts are cut off"),
        ("entropy", 0.1, "collapsed to 10%"),
        ("explained_variance", -3.0, "value_lr"),
        ("clip_fraction", 0.4, "40% of the ratios"),
        ("replay_norm", 0.3, "3.0 times the reward's: lower shield_penalty"),
    ],
)
def test_each_warning_fires(name, value, words):
    assert any(words in text for text in diagnostics.warnings(rows(**{name: value})))


def test_notebook_05_explains_every_statistic_of_a_step():
    notebook = json.loads((paths.NOTEBOOKS / "05_shielded_ppo.ipynb").read_text(encoding="utf-8"))
    prose = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    (table,) = (text for text in prose if "| statistic |" in text)
    explained = set(re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE))
    logged = {re.sub("^reward_.*", "reward_<part>", name) for name in trainer().step()}
    assert explained == logged - {"step", "episodes"}


def test_summary_by_hand_with_and_without_what_trl_does_not_report():
    table = rows(reward=0.9)
    found = diagnostics.summary(table)
    assert (found["steps"], found["episodes"]) == (6, 192)
    assert (found["reward_first"], found["reward_last"]) == (0.8, 0.9)
    assert found["ratio_first_minibatch_max_dev"] == 0 and found["episodes_per_second"] == 8
    assert found["generated_tokens_per_second"] == pytest.approx(30 * 32 / 4)
    deviation = [0, 0, 3e-5, 0, 0, 0]
    table = table.assign(ratio_first_minibatch_max_dev=deviation, generated_tokens_per_second=100.0)
    found = diagnostics.summary(table)
    assert found["ratio_first_minibatch_max_dev"] == 3e-5
    assert found["generated_tokens_per_second"] == 100


@pytest.mark.parametrize(
    "dtype, on_cpu, on_cuda",
    [("auto", False, True), ("float32", False, False), ("bfloat16", True, True)],
)
def test_precision_is_bfloat16_where_asked_and_on_cuda(dtype, on_cpu, on_cuda):
    cpu, cuda, params = torch.device("cpu"), torch.device("cuda"), PARAMS.replace(dtype=dtype)
    assert diagnostics.autocasts(params, cpu) == on_cpu
    assert diagnostics.autocasts(params, cuda) == on_cuda
    assert diagnostics.ratio_tolerance(params, cpu) == (0.1 if on_cpu else 1e-3)


# --- trackers -----------------------------------------------------------------------------------

ROWS = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75}]


def write(folder, kind: str, arm: str = "shielded"):
    params = PARAMS.replace(tracker=kind, run="r")
    tracker = diagnostics.start_tracker(types.SimpleNamespace(params=params, folder=folder), arm)
    for row in ROWS:
        tracker.log(row, row["step"])
    tracker.finish()
    return tracker


def test_none_writes_nothing_and_a_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path, "none")
    assert not list(tmp_path.iterdir())
    for kind in set(choices("tracker")) - {"none"}:
        package = "torch.utils.tensorboard" if kind == "tensorboard" else kind.split("-")[0]
        for name in (package, "tensorboardX"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=f"tracker='{kind}': .*environment.yml"):
            write(tmp_path, kind)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard" / "shielded"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 0.75)]


# W&B and trackio start threads and services: in a process of its own, they end with it. Its
# standard input is closed, so that a login prompt would be an error.
SCRIPT = """
import sys
from pathlib import Path
from recrl_lib.tests.training import test_diagnostics as here
here.diagnostics.ONLINE_TIMEOUT = 2.0
for arm in ("unshielded", "shielded"):
    here.write(Path(sys.argv[1]), sys.argv[2], arm)
"""


def in_process(tmp_path, kind: str, **environment) -> str:
    """What two arms print on stderr."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO"))}
    (tmp_path / "home").mkdir()
    environment = {**clean, "HOME": str(tmp_path / "home"), **environment}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), kind]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    in_process(tmp_path, "trackio")
    assert list((tmp_path / "logs" / "trackio").glob("*.db"))


# The second key has the right form, and nobody answers at port 9.
@pytest.mark.parametrize(
    "kind, key, warned",
    [
        ("wandb", "", ""),
        ("wandb-online", "malformed", "AuthenticationError: .*API key"),
        ("wandb-online", "0" * 40, "CommError: "),
    ],
)
def test_wandb_is_offline_or_goes_on_offline(tmp_path, kind, key, warned):
    pytest.importorskip("wandb")
    given = {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"} if key else {}
    said = in_process(tmp_path, kind, **given)
    lines = [line for line in said.splitlines() if "Warning" in line]
    assert len(lines) == (2 if warned else 0)
    assert all(re.search(f"goes on offline: {warned}", line) for line in lines)
    files = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(b"reward" in file.read_bytes() for file in files)
    assert not (tmp_path / "home" / ".netrc").exists()
