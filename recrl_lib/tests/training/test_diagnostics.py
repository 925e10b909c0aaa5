"""Measures, precision, and trackers with the real packages, offline."""

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


def test_notebook_05_explains_every_statistic_of_a_step():
    notebook = json.loads((paths.NOTEBOOKS / "05_shielded_ppo.ipynb").read_text(encoding="utf-8"))
    prose = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    (table,) = (text for text in prose if "| statistic |" in text)
    explained = set(re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE))
    logged = {re.sub("^reward_.*", "reward_<part>", name) for name in trainer().step()}
    assert explained == logged - {"step", "episodes"}


def test_summary_by_hand_with_and_without_what_trl_does_not_report():
    step = {"reward": 0.8, "kl": 1.0, "eos_rate": 0.9, "clip_fraction": 0.1, "length": 30.0}
    step |= {"shield_seconds": 0.01, "step_seconds": 4.0}
    table = pd.DataFrame([step | {"step": k, "episodes": 32 * k} for k in (1, 2, 3)])
    table.loc[2, "reward"] = 0.9
    ratio, tokens = "ratio_first_minibatch_max_dev", "generated_tokens_per_second"
    found = diagnostics.summary(table)
    expected = {"steps": 3, "episodes": 96, "reward_first": 0.8, "reward_last": 0.9, "kl_max": 1}
    expected |= {ratio: 0, "episodes_per_second": 8, tokens: 240}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    more = {ratio: [0, 3e-5, 0], tokens: 100.0, "best_reward": [1.0, 1.0, 0.9]}
    found = diagnostics.summary(table.assign(**more))
    assert (found[ratio], found[tokens]) == (3e-5, 100)
    assert found["headroom"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "dtype, on_cpu, on_cuda",
    [("auto", False, True), ("float32", False, False), ("bfloat16", True, True)],
)
def test_precision_is_bfloat16_where_asked_and_on_cuda(dtype, on_cpu, on_cuda):
    params, devices = PARAMS.replace(dtype=dtype), (torch.device("cpu"), torch.device("cuda"))
    assert [diagnostics.autocasts(params, device) for device in devices] == [on_cpu, on_cuda]


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
    for name in ("torch.utils.tensorboard", "tensorboardX", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    for kind in set(choices("tracker")) - {"none"}:
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
