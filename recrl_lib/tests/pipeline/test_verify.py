"""Verification: an intact run passes, and every number changed by one per cent is named."""

import json
import shutil

import pandas as pd
import pytest
import torch
import yaml

from recrl_lib import measures, paths, runs, study
from recrl_lib.evaluation import ranking_change, results
from recrl_lib.evaluation.clicks import ClickModel
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.params import Params
from recrl_lib.pipeline import verify
from recrl_lib.ranker import sasrec
from recrl_lib.runs import write_atomic
from recrl_lib.scoring import reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.evaluation.toy import toy_study
from recrl_lib.tests.tiny import BagOfWords, tune_randomly

PARAMS = Params(run="r", seed=2, eval_users=12, bootstrap=200, max_new_tokens=8, temperature=1.0)


def start(name: str, params: Params = PARAMS) -> runs.StageRun:
    return runs.start(name, params.as_dict())


def finish(stage: runs.StageRun, made: study.Study | None = None) -> None:
    """Finish ``stage``: what is computed from its artifacts, and .5 for what else it must have."""
    rows = []
    if made:
        tables = verify.RECOMPUTED[stage.name](verify.Finished(stage, made, BagOfWords()))
        rows = [row.dropna().to_dict() for table in tables for _, row in table.iterrows()]
        stage.results(rows)
    for lacking in measures.missing(stage.name, map(measures.parsed, rows)):
        name, _, arm = lacking.partition(" of ")
        arms = [arm] if arm else measures.REQUIRED_ARMS.get(stage.name, [""])
        stage.results({"measure": name, "value": 0.5, "arm": arm} for arm in arms)
    stage.finish()


def prepare(made: study.Study, params: Params = PARAMS) -> None:
    """Stages data, ranker and explainer of the toy study."""
    seen = [[*history, last] for history, last in zip(made.split.with_valid, made.split.test)]
    rows = [(u, i, 100 * t) for u, items in enumerate(seen) for t, i in enumerate(items)]
    stage = start("data", params)
    stage.save_json("dataset", {"noun": "film"})
    stage.save_table("interactions", pd.DataFrame(rows, columns=["user", "item", "time"]))
    stage.save_table("items", made.items)
    stage.save_table("users", made.users)
    groups = {g: getattr(made, f"{g}_users") for g in ("ppo", "validation", "heldout")}
    stage.save_json("user_groups", {name: users.tolist() for name, users in groups.items()})
    finish(stage, made)
    stage = start("ranker", params)
    sasrec.save(made.ranker, stage.output("ranker.safetensors"))
    stage.save_tensors("base", {"top": torch.from_numpy(made.top), "text": made.text})
    stage.save_json("ranker_hashes", {"weights": sasrec.state_sha256(made.ranker), "scores": ""})
    stage.curve([{"epoch": 1, "valid_ndcg@10": 0.25}])
    finish(stage, made)
    finish(start("explainer", params))


def tune(explainer, reader: ItemTexts, made: study.Study) -> dict[str, dict]:
    """Stages shield and shielded_ppo; each arm's adapter."""
    protected = subspaces.protect(subspaces.item_grams(explainer, reader)[0], energy=0.9)
    stage = start("shield")
    stage.save_tensors("subspaces", subspaces.to_tensors(protected))
    stage.save_json("held_out_items", [3, 7, 8, 20])
    table = pd.DataFrame({"rank": [s.rank for s in protected.values()], "overlap": 0.5})
    stage.save_table("overlap", table)
    finish(stage, made)
    stage, adapters = start("shielded_ppo"), {}
    names = (
        "step episodes length reward kl eos_rate clip_fraction shield_seconds step_seconds "
        "ratio_first_minibatch_max_dev generated_tokens_per_second"
    ).split()
    steps = [dict.fromkeys(names, k + 1) for k in range(2)]
    stage.curve([{"arm": arm} | step for arm in measures.ARMS[2:] for step in steps])
    for seed, arm in enumerate(measures.ARMS[2:]):
        tune_randomly(explainer, 0.1, seed)
        if arm == "shielded":
            projection.Shield(explainer, protected).project_parameters()
        adapters[arm] = explainer.adapter_state()
        stage.save_tensors(f"adapter_{arm}", adapters[arm])
        leak = pytest.approx(projection.leak(explainer, protected), rel=1e-4, abs=1e-7)
        assert verify.adapter_leak(adapters[arm], protected) == leak
    finish(stage, made)
    return adapters


def evaluate(explainer, reader: ItemTexts, adapters: dict[str, dict]) -> None:
    """Stages evaluation and audit, with the artifacts that their notebooks write."""
    stage = start("evaluation")
    made = study.load(stage)
    records = made.heldout_records(12, stage.rng("evaluation records"))
    rewarder = reward.Reward.of(PARAMS, made.catalogue)
    scorer = results.Scorer(made, records, rewarder, BagOfWords(), stage.torch_seed("said"))
    with explainer.reference():
        said = [scorer.explain("base", explainer, PARAMS)]
    vectors = {"base": made.text, "separate": made.text}
    for arm, adapter in adapters.items():
        explainer.load_adapter(adapter)
        vectors[arm] = reader.vectors()
        said.append(scorer.explain(arm, explainer, PARAMS))
    said.append(scorer.controls(explainer, 1.0, 4))
    tables = {arm: ranking_change.ranking_table(made, text) for arm, text in vectors.items()}
    ranking = pd.concat([table.assign(arm=arm) for arm, (table, _) in tables.items()])
    tops = ranking_change.top_frame({arm: top for arm, (_, top) in tables.items()})
    texts = results.click_table(
        made, pd.concat(said, ignore_index=True), ClickModel.of(PARAMS), stage.rng("clicks")
    )[0]
    spoken = texts["arm"].isin(results.TEXT_ARMS)
    artifacts = {"explanations": texts[spoken], "other_texts": texts[~spoken]}
    for name, table in (artifacts | {"ranking": ranking, "top10": tops}).items():
        stage.save_table(name, table.reset_index(drop=True))
    finish(stage, made)
    finish(start("audit"), made)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a finished run ``r`` of a random study, its numbers made as notebooks do."""
    root = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", root)
        made, explainer = toy_study()
        prepare(made)
        reader = ItemTexts(explainer, made.items["text"].tolist())
        evaluate(explainer, reader, tune(explainer, reader, made))
    torch.use_deterministic_algorithms(False)
    return root


@pytest.fixture
def run(built, tmp_path, monkeypatch):
    shutil.copytree(built / "r", tmp_path / "r")
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    return tmp_path / "r"


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
