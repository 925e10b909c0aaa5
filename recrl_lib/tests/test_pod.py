"""The scripts for a rented machine: what they refuse, what they write, and a target that outlives its caller."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from recrl_lib import paths

pytestmark = pytest.mark.skipif(shutil.which("setsid") is None or shutil.which("make") is None, reason="needs make and setsid (Linux)")


@pytest.fixture
def repo(tmp_path):
    """A repository on a volume: the scripts, and a Makefile whose environment costs nothing."""
    folder = tmp_path / "volume" / "repo"
    shutil.copytree(paths.ROOT / ".devcontainer", folder / ".devcontainer")
    env = "env:\n\t@echo torch $(RECRL_TORCH) >> made; touch .venv/.installed\n"
    (folder / "Makefile").write_text(f"-include .venv/pod.env\n{env}slow:\n\t@sleep 1; exit 3\n")
    return folder


def script(repo, name, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RUNPOD", "VOLUME", "PYTHONPATH", "MAKE"))}
    command = ["bash", str(repo / ".devcontainer" / name)]
    return subprocess.run(command, env=clean | {"PYTHON": sys.executable} | environment, capture_output=True, text=True, timeout=120)


def test_a_repository_off_the_volume_is_refused(repo, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for volume, words in ((elsewhere, "is not below"), (tmp_path / "none", "not a folder that can be written to")):
        done = script(repo, "pod-setup.sh", VOLUME=str(volume))
        assert done.returncode == 1 and words in done.stderr
    assert not (repo / ".venv").exists() and list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("torch, kept", [("2.12.1+cu130", True), ("2.9.1+cu128", False), (None, False)])
def test_the_images_torch_is_kept_if_the_code_runs_on_it(repo, tmp_path, torch, kept):
    image = tmp_path / "image" / "torch"
    image.mkdir(parents=True)
    (image / "__init__.py").write_text(f"__version__ = {torch!r}" if torch else "raise ImportError")
    (repo / ".venv" / "bin").mkdir(parents=True)
    (repo / ".venv" / "bin" / "python").symlink_to(sys.executable)  # as on a second call: no new one is made
    for _ in range(2):
        done = script(repo, "pod-setup.sh", VOLUME=str(repo.parent), PYTHONPATH=str(image.parent))
        assert done.returncode == 0, done.stderr
    settings = (repo / ".venv" / "pod.env").read_text()
    assert (f"export RECRL_TORCH={torch}" in settings) is kept
    assert (repo / "made").read_text().split("\n")[0] == (f"torch {torch}" if kept else "torch")
    assert f"export HF_HOME={repo.parent}/.shielded-recrl/huggingface" in settings and "make pod-run" in done.stdout
    assert (repo / ".venv" / ".installed").exists()


def test_a_target_goes_on_without_its_caller_and_is_not_started_twice(repo):
    first, second = (script(repo, "pod-run.sh", TARGET="slow") for _ in range(2))
    assert "started make slow" in first.stdout and "at work already" in second.stdout
    limit = time.monotonic() + 20
    while not (repo / "runs" / "pod.exit").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    assert (repo / "runs" / "pod.exit").read_text() == "2\n"  # make's own code for a failed recipe
    assert "Error 3" in (repo / "runs" / "pod.log").read_text()
