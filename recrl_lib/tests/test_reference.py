"""Published runs: what is copied, what is refused, and that the README shows the reference run's numbers."""

import json
import re

import pytest

from recrl_lib import paths, reference, runs
from recrl_lib.config import Params
from recrl_lib.files import write_atomic

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run folder in which every stage claims to be finished."""
    for name in ("RUNS", "FIGURES", "REFERENCE"):
        monkeypatch.setattr(paths, name, {"RUNS": tmp_path / "runs", "FIGURES": tmp_path / "figures", "REFERENCE": tmp_path / "runs" / "reference"}[name])
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "up_to_date", lambda stage, params: True)
    monkeypatch.setattr(runs, "git_state", lambda: ("c" * 40, False))
    runs.write_params(Params(run="r"))
    metrics = {f"{arm}/{name}": 0.5 for arm in runs.ARMS for name in (*[n for n, _ in reference.COLUMNS.values()], "ctr_lift_lo", "ctr_lift_hi")}
    folder = tmp_path / "runs" / "r"
    write_atomic(folder / "metrics" / "evaluation.json", json.dumps(metrics | {"eval_users": 7}))
    write_atomic(folder / "curves" / "old.csv", "left over from another setting")
    stage = {"seconds": 60.0, "git_commit": "c" * 40, "git_dirty": False, "outputs": {"metrics/evaluation.json": "", "artifacts/big": ""}}
    manifest = {"run": "r", "seed": 0, "device": "cpu", "threads": 2, "git_commit": "c" * 40, "git_dirty": False, "stages": {"evaluation": stage}}
    write_atomic(folder / "manifest.json", json.dumps(manifest))
    write_atomic(tmp_path / "figures" / "r" / "a.svg", "<svg/>")
    write_atomic(tmp_path / "README.md", f"before\n{reference.BEGIN}\nold\n{reference.END}\nafter\n")
    return folder


def test_copies_the_small_files_of_this_run_and_refreshes_the_readme(finished):
    target = reference.sync("r")
    copied = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    assert copied == ["manifest.json", "metrics/evaluation.json", "params.yaml"]
    assert (paths.FIGURES / "reference" / "r" / "a.svg").exists()
    readme = (paths.ROOT / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert "| shielded | 0.500 | 0.500 (0.500 to 0.500)" in readme and "7 held-out users" in readme


def test_a_run_on_uncommitted_changes_is_refused(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["stages"]["evaluation"]["git_dirty"] = True
    write_atomic(finished / "manifest.json", json.dumps(manifest))
    with pytest.raises(RuntimeError, match="uncommitted changes"):
        reference.sync("r")
    assert not paths.REFERENCE.exists()


@pytest.mark.parametrize("state", [("c" * 40, True), ("c" * 40, None), (None, None)])
def test_uncommitted_changes_now_are_refused_too(finished, monkeypatch, state):
    monkeypatch.setattr(runs, "git_state", lambda: state)
    with pytest.raises(RuntimeError, match="uncommitted changes, or is none .*: commit or remove them, then make sync-reference RUN=r"):
        reference.sync("r")
    assert not paths.REFERENCE.exists() and "old" in (paths.ROOT / "README.md").read_text()


def test_an_unfinished_run_and_one_without_figures_are_refused(finished, monkeypatch):
    (paths.FIGURES / "r" / "a.svg").unlink()
    with pytest.raises(RuntimeError, match="no figure"):
        reference.sync("r")
    monkeypatch.setattr(runs, "up_to_date", lambda stage, params: stage != "audit")
    with pytest.raises(RuntimeError, match="stages audit are missing"):
        reference.sync("r")
    with pytest.raises(RuntimeError, match="does not exist"):
        reference.sync("unknown")


def named(readme: str) -> str:
    """The run that the README's table says it is of."""
    (run,) = re.findall(r"^Run `([^`]+)`: seed ", readme[readme.index(reference.BEGIN) : readme.index(reference.END)], re.MULTILINE)
    return run


def test_the_readme_shows_the_run_that_it_names():
    assert reference.with_table(README, reference.table(named(README))) == README


def test_another_run_may_be_published(finished):
    reference.sync("r")
    readme = (paths.ROOT / "README.md").read_text()
    assert named(readme) == "r" and reference.with_table(readme, reference.table("r")) == readme


def test_markers_must_be_there():
    with pytest.raises(RuntimeError, match="once each"):
        reference.with_table("no markers", "x")
