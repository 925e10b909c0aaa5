"""Verification: an intact run passes, and every number changed by one per cent is named."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy.stats import kendalltau

from recrl_lib import measures, paths, runs, study
from recrl_lib.evaluation import ranking_change, results
from recrl_lib.evaluation.clicks import ClickModel
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.params import Params, stage_named
from recrl_lib.pipeline import verify
from recrl_lib.ranker import sasrec
from recrl_lib.ranker.ranking import score_chunks
from recrl_lib.runs import write_atomic
from recrl_lib.scoring import reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.evaluation.toy import ITEMS, rng, toy_study
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


def plain_ranking(made: study.Study, ranks: np.ndarray, top: np.ndarray) -> pd.DataFrame:
    """One arm's measures of the ranking, user by user, in plain loops."""
    rows = []
    for rank, base, new in zip(ranks, made.top.tolist(), top.tolist(), strict=True):
        shared = [len({*base[:d]} & {*new[:d]}) / d for d in range(1, 11)]
        places = [[x.index(i) if i in x else 10 for i in {*base, *new}] for x in (base, new)]
        rows.append({
            "ndcg@10": 1 / math.log2(1 + rank) if rank <= 10 else 0, "hr@10": rank <= 10,
            "top10_overlap": shared[-1], "top10_set_same": {*base} == {*new},
            "top10_exact": base == new, "top1_same": base[0] == new[0],
            "kendall_tau": kendalltau(*places).statistic,
            "rbo": shared[-1] * 0.9**10 + 0.1 * sum(s * 0.9**d for d, s in enumerate(shared)),
        })  # fmt: skip
    return pd.DataFrame(rows).astype(float)


def check_columns(made: study.Study, said: pd.DataFrame, stage: runs.StageRun) -> None:
    """Clicks, rewards and faithfulness of stored texts, each from its formula."""
    noise, p = stage.rng("clicks").normal(size=12), PARAMS
    places, counted = said.groupby("arm", sort=False).cumcount(), 0
    for place, row in zip(places, said.itertuples(), strict=True):
        (record,) = made.records([row.user], [row.position])
        history = made.split.with_valid[row.user]
        ((_, scores),) = score_chunks(made.ranker, [history], made.text)
        unseen = [float(scores[0, i]) for i in range(1, ITEMS + 1) if i not in history]
        z = (float(scores[0, row.item]) - np.mean(unseen)) / np.std(unseen)
        logit = p.sim_bias + p.sim_alpha * z + p.sim_beta * row.quality
        logit += p.sim_user_std * noise[place] + p.sim_position / math.log2(1 + row.position)
        assert row.ctr == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-4)
        parts = p.weight_form * row.reward_form + p.weight_faithfulness * row.reward_faithfulness
        total = parts / (p.weight_form + p.weight_faithfulness)
        assert row.reward == pytest.approx(total, abs=1e-6)
        if row.arm.startswith(results.RULE):
            weights = record["history_weights"]
            cited = [w for w, t in zip(weights, record["history_titles"]) if t in row.text]
            best = sorted((max(w, 0) for w in weights), reverse=True)[: len(cited)]
            wanted = min(max(sum(cited) / sum(best), 0), 1) if sum(best) else 0
            assert row.faithfulness == pytest.approx(wanted, abs=1e-6)
            counted += wanted > 0
    assert counted > 20


@pytest.fixture
def stored(run):
    """(results, texts by arm, users' ranking by arm, the groups' users) of the evaluation."""
    stage = runs.StageRun(stage_named("report"), PARAMS, torch.device("cpu"), key="")
    made, load = study.load(stage), stage.load_table
    said = pd.concat([load("explanations"), load("other_texts")], ignore_index=True)
    check_columns(made, said, stage)
    lists = load("top10")
    ranking = {
        arm: plain_ranking(made, part["rank"].to_numpy(), study.top_array(lists, arm))
        for arm, part in load("ranking").groupby("arm")
    }
    texts = dict(list(said.groupby("arm")))
    new, held = texts["base"]["new_item"].to_numpy(), np.isin(made.split.test, [3, 7, 8, 20])
    groups = {"all": None, "new_items": new, "seen_items": ~new, "control_users": np.arange(12) < 4}
    groups |= {"held_out_items": held, "subspace_items": ~held}
    return runs.read_results("r", "evaluation"), texts, ranking, groups


def values(stored, arm: str, measure: str, group: str = "all") -> np.ndarray:
    """What ``measure`` is the mean of, a number a user."""
    _, texts, ranking, groups = stored
    if measure not in ranking["base"]:
        ranking = texts
        if arm == "separate":
            arm, measure = "unshielded", measure.replace("faithfulness_served", "faithfulness")
    found = ranking[arm][measure.replace("ctr_lift", "ctr")].to_numpy(float)
    return found if groups[group] is None else found[groups[group][: len(found)]]


def test_means_and_differences_have_twins_in_plain_numpy(stored):
    """What has none here is named at the end."""
    table, texts, ranking, groups = stored
    without, known = set(), {*texts["base"], *ranking["base"], "ctr_lift"}
    for row in table.itertuples():
        if row.group not in groups or row.measure not in known or math.isnan(row.n):
            without.add((row.measure, row.group.partition(":")[0]))
            continue
        x = values(stored, row.arm, row.measure, row.group)
        if row.against:
            other = values(stored, row.against, row.measure, row.group)[: len(x)]
            x = x[: len(other)]
            x = x / other.mean() if row.measure == "ctr_lift" else x - other
        assert row.value == pytest.approx(np.nanmean(x), rel=1e-5, abs=1e-7), row
        assert row.n == (~np.isnan(x)).sum()
        assert not row.low > row.value + 1e-9 and not row.high < row.value - 1e-9, row
    of_texts = {"claiming_share", "unique_texts", "distinct_1", "distinct_2"}
    for arm in results.TEXT_ARMS:
        tokens = [text.lower().split() for text in texts[arm]["text"]]
        pairs = [pair for said in tokens for pair in zip(said, said[1:])]
        found = {m: runs.value(table, m, arm) for m in of_texts}
        assert found["unique_texts"] == len(set(map(tuple, tokens))) / 12
        assert found["distinct_1"] == len({*sum(tokens, [])}) / len(sum(tokens, []))
        assert found["distinct_2"] == len({*pairs}) / len(pairs)
        claims = texts[arm]["grounding_precision"].notna().mean()
        assert found["claiming_share"] == pytest.approx(claims)
    by_hand = {"feature_coverage", "feature_diversity", "leak"}  # in tests of judge and shield
    filled = {"grounding_precision", "max_abs_score_delta"}  # of nobody: by ``finish``
    tested = {name for name, _ in without if name.endswith(("_p", "_p_holm", "_detectable"))}
    left = {name for name, group in without if group != "shuffled"}
    assert left == of_texts | by_hand | filled | tested


def test_p_values_and_detectable_effects_have_twins_in_plain_numpy(stored):
    table = stored[0]
    p, signs = table[table["measure"].str.endswith("_p")], rng().choice([-1, 1], (20, 5000))
    for row in p.itertuples():
        pair = [values(stored, a, row.measure.removesuffix("_p")) for a in (row.arm, row.against)]
        x = pair[0] - pair[1]
        wanted = (np.abs(x @ signs[: len(x)]) >= abs(x.sum()) - 1e-9).mean()
        error = (wanted * (1 - wanted) / PARAMS.bootstrap) ** 0.5
        assert row.value == pytest.approx(wanted, abs=0.01 + 4 * error)
    ordered = sorted(p["value"])
    highest = np.maximum.accumulate([x * (len(p) - k) for k, x in enumerate(ordered)])
    holm = sorted(table.loc[table["measure"].str.endswith("_p_holm"), "value"])
    assert holm == pytest.approx(np.minimum(highest, 1).tolist())
    for row in table[table["measure"].str.endswith("_detectable")].itertuples():
        name = row.measure.removesuffix("_detectable")
        mine, base = (values(stored, arm, name) for arm in ("shielded", "base"))
        lift = mine.mean() / base.mean()
        x = (mine - lift * base) / base.mean() if name == "ctr_lift" else mine - base
        wanted = (1.959964 + 0.841621) * np.std(x, ddof=1) / row.n**0.5
        assert row.value == pytest.approx(wanted, rel=1e-5)


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
