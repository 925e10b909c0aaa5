"""Published runs: what is copied, what is refused, and that the README shows the reference run's numbers."""

import json
import re
from dataclasses import asdict

import pandas as pd
import pytest

from recrl_lib import paths, runs
from recrl_lib.evaluation import frontier
from recrl_lib.params import Params
from recrl_lib.pipeline import publish
from recrl_lib.runs import sha256_file, write_atomic

BEGIN, END = publish.markers("reference")
README = (paths.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run folder in which every stage claims to be finished."""
    for name in ("RUNS", "FIGURES", "REFERENCE"):
        monkeypatch.setattr(
            paths,
            name,
            {
                "RUNS": tmp_path / "runs",
                "FIGURES": tmp_path / "figures",
                "REFERENCE": tmp_path / "runs" / "reference",
            }[name],
        )
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "up_to_date", lambda stage, params: True)
    monkeypatch.setattr(runs, "git_state", lambda: ("c" * 40, False))
    runs.write_params(Params(run="r"))
    metrics = {
        f"{arm}/{name}": 0.5
        for arm in runs.ARMS
        for name in (*[n for n, _ in publish.COLUMNS.values()], "ctr_lift_lo", "ctr_lift_hi")
    }
    folder = tmp_path / "runs" / "r"
    write_atomic(folder / "metrics" / "evaluation.json", json.dumps(metrics | {"eval_users": 7}))
    write_atomic(folder / "curves" / "old.csv", "left over from another setting")
    stage = {
        "seconds": 60.0,
        "git_commit": "c" * 40,
        "git_dirty": False,
        "outputs": {"metrics/evaluation.json": "", "artifacts/big": ""},
    }
    manifest = {
        "run": "r",
        "seed": 0,
        "device": "cpu",
        "threads": 2,
        "git_commit": "c" * 40,
        "git_dirty": False,
        "stages": {"evaluation": stage},
    }
    write_atomic(folder / "manifest.json", json.dumps(manifest))
    write_atomic(tmp_path / "figures" / "r" / "a.svg", "<svg/>")
    write_atomic(tmp_path / "README.md", f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return folder


def test_copies_the_small_files_of_this_run_and_refreshes_the_readme(finished):
    target = publish.sync("r")
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
        publish.sync("r")
    assert not paths.REFERENCE.exists()


@pytest.mark.parametrize("state", [("c" * 40, True), ("c" * 40, None), (None, None)])
def test_uncommitted_changes_now_are_refused_too(finished, monkeypatch, state):
    monkeypatch.setattr(runs, "git_state", lambda: state)
    with pytest.raises(
        RuntimeError,
        match="uncommitted changes, or is none .*: commit or remove them, then make sync-reference RUN=r",
    ):
        publish.sync("r")
    assert not paths.REFERENCE.exists() and "old" in (paths.ROOT / "README.md").read_text()


def test_an_unfinished_run_and_one_without_figures_are_refused(finished, monkeypatch):
    (paths.FIGURES / "r" / "a.svg").unlink()
    with pytest.raises(RuntimeError, match="no figure"):
        publish.sync("r")
    monkeypatch.setattr(runs, "up_to_date", lambda stage, params: stage != "audit")
    with pytest.raises(RuntimeError, match="stages audit are missing"):
        publish.sync("r")
    with pytest.raises(RuntimeError, match="does not exist"):
        publish.sync("unknown")


def named(readme: str) -> str:
    """The run that the README's table says it is of."""
    (run,) = re.findall(
        r"^Run `([^`]+)`: seed ", readme[readme.index(BEGIN) : readme.index(END)], re.MULTILINE
    )
    return run


def test_the_readme_shows_the_run_that_it_names():
    assert publish.with_table(README, "reference", publish.table(named(README))) == README


def test_another_run_may_be_published(finished):
    publish.sync("r")
    readme = (paths.ROOT / "README.md").read_text()
    assert (
        named(readme) == "r"
        and publish.with_table(readme, "reference", publish.table("r")) == readme
    )


def test_markers_must_be_there():
    with pytest.raises(RuntimeError, match="once each"):
        publish.with_table("no markers", "reference", "x")


@pytest.fixture
def swept(finished):
    """The same run with a full frontier of two seeds in which a setting's seeds kept .9 and .8 of everything and learned half and all."""
    points = [
        frontier.Point(**setting, steps=16, seed=seed)
        for setting in publish.SETTINGS.values()
        for seed in (0, 1)
    ]
    kept = {"overlap": 0.9, "overlap_held": 0.9, "top1_same": 0.9, "loss": 1.0, "reward": 0.7}
    rows = [
        {
            **asdict(p),
            **{k: v - 0.1 * p.seed for k, v in kept.items()},
            "loss_base": 2.0,
            "reward_base": 0.5,
        }
        for p in points
    ]
    rows = [row | {"loss": 1.0 if row["mode"] == "none" or row["seed"] else 1.5} for row in rows]
    path = finished / "curves" / "frontier.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["stages"]["shield"] = {
        "status": "finished",
        "git_commit": "d" * 40,
        "git_dirty": False,
        "outputs": {"curves/frontier.csv": sha256_file(path)},
    }
    write_atomic(finished / "manifest.json", json.dumps(manifest))
    runs.write_params(Params(run="r", frontier_points="full"))
    begin, end = publish.markers("frontier")
    write_atomic(paths.ROOT / "README.md", f"before\n{begin}\nold\n{end}\nafter\n")
    return finished


def test_a_frontier_is_published_without_the_rest_of_its_run(swept):
    target = publish.sync_frontier("r")
    assert sorted(p.name for p in target.iterdir()) == [
        "frontier.csv",
        "manifest.json",
        "params.yaml",
    ]
    readme = (paths.ROOT / "README.md").read_text()
    assert (
        "| no shield | 85.0% (80.0% to 90.0%) | 85.0% (80.0% to 90.0%) | 85.0% (80.0% to 90.0%) | 100.0% |"
        in readme
    )
    assert (
        "| activated LoRA, never merged | 85.0% (80.0% to 90.0%) |" in readme
        and "| 75.0% (50.0% to 100.0%) |" in readme
    )
    assert (
        "16 steps each; means over 2 seeds" in readme
        and f"commit `{'c' * 10}`" in readme
        and readme.endswith("\nafter\n")
    )


def test_the_readmes_settings_are_of_the_full_set():
    full = frontier.named("full", 1, 16)
    assert all(frontier.Point(**setting, steps=16) in full for setting in publish.SETTINGS.values())


def test_the_readme_shows_the_published_frontier():
    table = publish.frontier_table(frontier.published(), runs.read_manifest("reference/frontier"))
    assert publish.with_table(README, "frontier", table) == README


def test_a_frontier_that_lacks_a_setting_leaves_everything_as_it_was(swept):
    path = swept / "curves" / "frontier.csv"
    rows = pd.read_csv(path)
    rows[rows["mode"] != "alora"].to_csv(path, index=False)
    manifest = json.loads((swept / "manifest.json").read_text())
    manifest["stages"]["shield"]["outputs"]["curves/frontier.csv"] = sha256_file(path)
    write_atomic(swept / "manifest.json", json.dumps(manifest))
    with pytest.raises(RuntimeError, match="no row for 'activated LoRA, never merged'"):
        publish.sync_frontier("r")
    assert not paths.REFERENCE.exists() and "old" in (paths.ROOT / "README.md").read_text()


@pytest.mark.parametrize("wrong, message", [
    ({"status": "failed"}, "has not finished a full frontier: make all RUN=r TO=shield"), ({"git_dirty": True}, "uncommitted changes"),
    ({"outputs": {"curves/frontier.csv": "another"}}, "has changed since notebook 04 wrote it"),
])  # fmt: skip
def test_a_frontier_without_a_source_is_refused(swept, wrong, message):
    manifest = json.loads((swept / "manifest.json").read_text())
    manifest["stages"]["shield"] |= wrong
    write_atomic(swept / "manifest.json", json.dumps(manifest))
    with pytest.raises(RuntimeError, match=message):
        publish.sync_frontier("r")
    runs.write_params(Params(run="r"))
    with pytest.raises(RuntimeError, match="full frontier"):
        publish.sync_frontier("r")
    with pytest.raises(RuntimeError, match="full frontier"):
        publish.sync_frontier("unknown")
    assert not paths.REFERENCE.exists() and "old" in (paths.ROOT / "README.md").read_text()
