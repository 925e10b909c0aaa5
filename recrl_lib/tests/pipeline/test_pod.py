"""The scripts for a rented machine: what they refuse and write; a target outlives its caller."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from recrl_lib import paths
from recrl_lib.tests.pipeline.test_tasks import until

pytestmark = pytest.mark.skipif(
    shutil.which("setsid") is None or shutil.which("make") is None,
    reason="needs make and setsid (Linux)",
)
NEWER, OLDER = "2.12.1+cu130", "2.9.1+cu128"  # torch that the code runs on, and does not


@pytest.fixture
def repo(tmp_path):
    """A repository on a volume: the scripts, and a Makefile with a free environment and toys."""
    folder = tmp_path / "volume" / "repo"
    shutil.copytree(paths.ROOT / ".devcontainer", folder / ".devcontainer")
    stubs = 'touch torch.py transformers.py && echo "$(PEFT)" > peft.py'
    made = "@echo torch $(RECRL_TORCH) >> made; touch .venv/.installed"
    env = f"env:\n\t{made}; cd .venv/lib/python3*/site-packages && {stubs}\n"
    slow = "slow:\n\t@for n in $$(seq 600); do [ -f go ] && break; sleep .05; done; exit 3\n"
    (folder / "Makefile").write_text(f"-include .venv/pod.env\n{env}{slow}")
    return folder


def script(repo, name, **environment):
    mine = ("RUNPOD", "VOLUME", "PYTHONPATH", "MAKE")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
    return subprocess.run(
        ["bash", str(repo / ".devcontainer" / name)],
        env=clean | {"PYTHON": sys.executable} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "volume, words", [("elsewhere", "is not below"), ("none", "not a folder that can be written")]
)
def test_a_repository_off_the_volume_is_refused(repo, tmp_path, volume, words):
    (tmp_path / "elsewhere").mkdir()
    done = script(repo, "pod-setup.sh", VOLUME=str(tmp_path / volume))
    assert done.returncode == 1 and words in done.stderr
    assert not (repo / ".venv").exists() and not list((tmp_path / "elsewhere").iterdir())


@pytest.fixture
def setup(repo, tmp_path):
    """``setup(torch)``: pod-setup on an image whose Python has that torch, or none."""
    image = tmp_path / "image"
    image.mkdir()
    python = image / "python"
    venv = f'echo "$@" >> {repo}/venvs; exec {sys.executable} -m venv --without-pip "$@"'
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = venv ]; then shift 2; {venv}; fi\n'
        f'PYTHONPATH={image} exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)

    def call(torch, **environment):
        text = f"__version__ = {torch!r}" if torch else "raise ImportError"
        (image / "torch.py").write_text(text)
        given = {"VOLUME": str(repo.parent), "PYTHON": str(python), "PYTHONDONTWRITEBYTECODE": "1"}
        return script(repo, "pod-setup.sh", **given, **environment)

    return call


def test_the_images_torch_is_kept_if_the_code_runs_on_it(repo, setup):
    """Another image gets another environment: its torchvision is built for its own torch."""
    images = ((NEWER, "true"), (NEWER, "true"), (OLDER, "false"), (NEWER, "true"), (None, "false"))
    for torch, kept in images:
        done = setup(torch)
        assert done.returncode == 0, done.stderr
        settings = (repo / ".venv" / "pod.env").read_text()
        assert (f"export RECRL_TORCH={torch}" in settings) is (kept == "true")
        packages = (repo / ".venv" / "pyvenv.cfg").read_text()
        assert f"include-system-site-packages = {kept}\n" in packages
    assert len((repo / "venvs").read_text().splitlines()) == 4  # the second is as the first
    assert (repo / "made").read_text().splitlines()[0] == f"torch {NEWER}"
    assert f"export HF_HOME={repo.parent}/.shielded-recrl/huggingface" in settings
    assert "make pod-run" in done.stdout and (repo / ".venv" / ".installed").exists()


@pytest.mark.parametrize(
    "torch, remedy",
    [(NEWER, f"do not fit its torch {NEWER}; take another image"), (None, "remove .venv")],
)
def test_an_environment_that_does_not_import_is_a_failure(repo, setup, torch, remedy):
    broken = "operator torchvision::nms does not exist"
    done = setup(torch, PEFT=f"raise RuntimeError('{broken}')")
    assert done.returncode == 1 and "ready" not in done.stdout
    start = f"FAILED torch, transformers and peft do not import together (RuntimeError: {broken}): "
    assert start in done.stderr and remedy in done.stderr


def ended(repo) -> str:
    """The exit code that the target leaves, once it is there."""
    path = repo / "runs" / "pod.exit"
    return until(lambda: path.exists() and path.read_text())


def test_a_target_goes_on_without_its_caller_and_is_not_started_twice(repo):
    first, second = (script(repo, "pod-run.sh", TARGET="slow") for _ in range(2))
    pid = (repo / "runs" / "pod.pid").read_text().strip()
    assert "started make slow" in first.stdout
    assert f"at work already: process {pid}" in second.stdout
    (repo / "go").touch()
    assert ended(repo) == "2\n"  # make's own code for a failed recipe
    assert "Error 3" in (repo / "runs" / "pod.log").read_text()
    # what has just ended is not at work
    assert "started make slow" in script(repo, "pod-run.sh", TARGET="slow").stdout
    ended(repo)


def test_after_a_stop_of_the_pod_another_process_of_that_number_is_not_the_job(repo):
    assert "started" in script(repo, "pod-run.sh", TARGET="slow").stdout
    pid = repo / "runs" / "pod.pid"
    job = int(pid.read_text())
    until(lambda: os.getpgid(job) == job)  # setsid is about to give it a group of its own
    os.killpg(job, signal.SIGKILL)
    pid.write_text(f"{os.getpid()}\n")
    assert "started" in script(repo, "pod-run.sh", TARGET="slow").stdout
    assert not (repo / "runs" / "pod.exit").exists()
    (repo / "go").touch()
    ended(repo)
