"""Verification: an intact run passes, and every number changed by one per cent is named."""

import json
import shutil

import pandas as pd
import pytest
import yaml

from recrl_lib import runs
from recrl_lib.pipeline import verify
from recrl_lib.runs import write_atomic
from recrl_lib.tests.tiny import BagOfWords


def edit(run, stage: str, measure: str, step: float) -> None:
    """Add ``step`` to what is stored of this measure of the shielded arm."""
    path = run / "metrics" / f"{stage}.csv"
    table = pd.read_csv(path, keep_default_na=False)
    here = table["arm"].eq("shielded") & table["measure"].eq(measure) & table["against"].eq("")
    changed = table.assign(value=table["value"].mask(here, table["value"] + step))
    write_atomic(path, changed.to_csv(index=False))


def test_an_intact_run_passes(run):
    checks = verify.recompute("r", BagOfWords())
    assert checks[~checks["holds"]].empty and len(checks) > 1000
    assert set(checks["stage"]) == set(verify.RECOMPUTED)
    assert verify.changed_files("r") == [] and verify.against_reference("r") is None
    leak = checks[checks["measure"] == "leak"].set_index(["stage", "arm"])["expected"]
    assert leak["shielded_ppo", "shielded"] < 1e-6 < 0.1 < leak["shielded_ppo", "unshielded"]


def test_every_number_changed_by_one_per_cent_is_named(run):
    """All at once: zeros by a tenth, ends by half of the interval, verdicts turned round."""
    checks = verify.recompute("r", BagOfWords())
    for stage in verify.RECOMPUTED:
        stored = runs.read_results("r", stage)
        wide = (stored["high"] - stored["low"]).clip(lower=0.01) / 2
        p_value = stored["measure"].str.contains("_p$|_p_holm$")
        step = (0.01 * stored["value"].abs()).mask(stored["value"] == 0, 0.1).mask(p_value, 0.1)
        changed = stored.assign(
            value=stored["value"] + step, low=stored["low"] + wide, high=stored["high"] + wide
        )
        if "passed" in changed:
            changed["passed"] = 1 - changed["passed"]
        write_atomic(run / "metrics" / f"{stage}.csv", changed.to_csv(index=False))
    again = verify.recompute("r", BagOfWords())
    assert len(again) == len(checks)
    missed = again[again["holds"]]
    assert set(zip(missed["arm"], missed["measure"])) == {("shielded", "leak")}  # 1 % of rounding


def test_a_missing_row_and_a_missing_stage_are_named(run):
    path = run / "metrics" / "data.csv"
    lines = path.read_text().splitlines(keepends=True)
    write_atomic(path, "".join(line for line in lines if "n_ppo_users" not in line))
    checks = verify.recompute("r", BagOfWords())
    assert checks.loc[~checks["holds"], "measure"].tolist() == ["n_ppo_users"]
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"].pop("audit")  # a run of a batch has none
    write_atomic(run / "manifest.json", json.dumps(manifest))
    assert "audit" not in set(verify.recompute("r", BagOfWords())["stage"])
    manifest["stages"].pop("evaluation")
    write_atomic(run / "manifest.json", json.dumps(manifest))
    with pytest.raises(RuntimeError, match="not finished evaluation: make all RUN=r"):
        verify.recompute("r", BagOfWords())


def test_the_command_names_what_changed_and_fails(run, monkeypatch, capsys):
    monkeypatch.setattr(verify.judge, "SentenceEncoder", lambda folder: BagOfWords())
    monkeypatch.setattr(verify.assets, "minilm_folder", lambda: None)
    assert verify.main(["--run", "r"]) == 0
    assert "0 differ, 0 files changed" in capsys.readouterr().out.splitlines()[-1]
    path = run / "metrics" / "evaluation.csv"
    write_atomic(path, path.read_text() + "\n")  # another file that says the same
    assert verify.main(["--run", "r"]) == 1
    assert "0 differ, 1 files changed" in capsys.readouterr().out.splitlines()[-1]
    edit(run, "evaluation", "hr@10", 0.01)
    assert verify.main(["--run", "r"]) == 1
    out = capsys.readouterr().out
    assert "CHANGED runs/r/metrics/evaluation.csv" in out and "1 differ, 1 files changed" in out
    assert "DIFFERS evaluation: hr@10 (arm=shielded" in out
    write_atomic(run / "artifacts" / "explanations.parquet", b"x")
    assert verify.main(["--run", "r"]) == 1
    assert "has changed since 'evaluation' finished" in capsys.readouterr().err
    assert verify.main(["--run", "none"]) == 1 and "make all RUN=none" in capsys.readouterr().err


def test_a_published_run_with_equal_parameters_is_compared(run):
    published = run.parent / "reference" / "r"
    shutil.copytree(run, published)
    assert verify.against_reference("r")["holds"].all()
    edit(published, "evaluation", "reward", 0.04)
    found = verify.against_reference("r")
    assert found.loc[~found["holds"], ["arm", "measure"]].to_numpy().tolist() == [
        ["shielded", "reward"]
    ]
    other = yaml.safe_load((published / "params.yaml").read_text()) | {"ppo_steps": 99}
    write_atomic(published / "params.yaml", yaml.safe_dump(other))
    assert verify.against_reference("r") is None
