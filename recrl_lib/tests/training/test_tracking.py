"""Trackers with the real packages, offline: files in the folder given, no prompt, nothing printed."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from recrl_lib import params
from recrl_lib.training import tracking

ROWS = [
    {"step": 1, "reward": 0.5, "arm": "shielded"},
    {"step": 2, "reward": np.float32(0.75), "arm": "shielded"},
]


def write(kind, folder, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("RECRL_BATCH", "ablations")
    monkeypatch.setenv("RECRL_ARM", "kl0")
    tracker = tracking.open(
        kind, folder, job_type="shielded", name="r-kl0", config={"kl_coef": 0.0}
    )
    for row in ROWS:
        tracker.log(row, row["step"])
    tracker.finish()


def test_kinds_are_those_of_the_parameter():
    assert params.choices("tracker") == tracking.KINDS


def test_none_writes_nothing(tmp_path, monkeypatch):
    write("none", tmp_path / "logs", monkeypatch)
    assert not (tmp_path / "logs").exists()
    with pytest.raises(ValueError, match="choose one of 'none', 'wandb'"):
        tracking.open("mlflow", tmp_path, "a", "b", {})


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="tracker='wandb': .*wandb.*environment.yml"):
        tracking.open("wandb", tmp_path, "a", "b", {})


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    write("tensorboard", tmp_path, monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "kl0-shielded"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 0.75)]
    assert "arm" not in events.Tags()["scalars"]


# W&B starts a service process of its own: in a process of its own, it ends with it. Its standard input is closed, so
# that a login prompt would be an error.
SCRIPT = """
import sys
from pathlib import Path
from recrl_lib import tracking
tracking.ONLINE_TIMEOUT = 2.0
for arm in ("unshielded", "shielded"):
    tracker = tracking.open("wandb", Path(sys.argv[1]), job_type=arm, name="r-kl0", config={"kl_coef": 0.0})
    assert (tracker._run.group, tracker._run.job_type, tracker._run.offline) == ("ablations", f"kl0-{arm}", True)
    for row in ({"step": 1, "reward": .5, "arm": arm}, {"step": 2, "reward": .75, "arm": arm}):
        tracker.log(row, row["step"])
    tracker.finish()
"""


def wandb_arms(tmp_path, **environment) -> str:
    """What two arms print on stderr: nothing is asked, nothing else is printed, and both leave an offline run."""
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment = (
        clean | {"RECRL_BATCH": "ablations", "RECRL_ARM": "kl0", "HOME": str(home)} | environment
    )
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "logs")]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    files = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(b"reward" in file.read_bytes() for file in files)
    assert not (home / ".netrc").exists()
    return done.stderr


def test_wandb_offline(tmp_path):
    assert wandb_arms(tmp_path) == ""


# The second key has the right form, and nobody answers at port 9.
@pytest.mark.parametrize(
    "key, reason", [("malformed", "AuthenticationError: .*API key"), ("0" * 40, "CommError: ")]
)
def test_wandb_goes_on_offline_where_it_does_not_start_online(tmp_path, key, reason):
    warned = [
        line
        for line in wandb_arms(
            tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9"
        ).splitlines()
        if "Warning" in line
    ]
    assert warned and all(
        re.search(f"tracker='wandb' goes on offline, .*: {reason}", line) for line in warned
    )
