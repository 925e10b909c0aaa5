"""The evaluation's numbers, computed another way from what a run of the toy study has stored."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib import runs, study
from recrl_lib.evaluation import conversations, results
from recrl_lib.params import stage_named
from recrl_lib.ranker.ranking import score_chunks
from recrl_lib.tests.evaluation.built import PARAMS
from recrl_lib.tests.evaluation.toy import ITEMS, rng
from recrl_lib.tests.ranker.test_metrics import rbo_twin, tau_twin


def plain_ranking(made: study.Study, ranks: np.ndarray, top: np.ndarray) -> pd.DataFrame:
    """One arm's measures of the ranking, user by user, in plain loops."""
    rows = []
    for rank, base, new in zip(ranks, made.top.tolist(), top.tolist(), strict=True):
        rows.append({
            "ndcg@10": 1 / math.log2(1 + rank) if rank <= 10 else 0, "hr@10": rank <= 10,
            "top10_overlap": len({*base} & {*new}) / 10, "top10_set_same": {*base} == {*new},
            "top10_exact": base == new, "top1_same": base[0] == new[0],
            "kendall_tau": tau_twin(base, new), "rbo": rbo_twin(base, new, 0.9),
        })  # fmt: skip
    return pd.DataFrame(rows).astype(float)


@pytest.fixture
def stage(run) -> runs.StageRun:
    return runs.StageRun(stage_named("report"), PARAMS, torch.device("cpu"), key="")


@pytest.fixture
def stored(stage):
    """(results, texts by arm, users' ranking by arm, the groups' users) of the evaluation."""
    made, load = study.load(stage), stage.load_table
    said = pd.concat([load("explanations"), load("other_texts")], ignore_index=True)
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


def test_clicks_rewards_and_faithfulness_of_stored_texts_are_those_of_their_formulas(stage):
    made, noise, p = study.load(stage), stage.rng("clicks").normal(size=12), PARAMS
    tables = map(stage.load_table, ("explanations", "other_texts"))
    said = pd.concat(tables, ignore_index=True)
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
    for row in table[table["measure"] == "ceiling_closed"].itertuples():
        arms = row.arm, f"{row.arm}_warm", row.against
        mine, start, end = (values(stored, arm, "faithfulness")[:5].mean() for arm in arms)
        assert row.value == pytest.approx((mine - start) / (end - start))
    by_hand = {"feature_coverage", "feature_diversity", "leak"}  # in tests of judge and shield
    filled = {"grounding_precision", "max_abs_score_delta"}  # of nobody: by ``finish``
    tested = {name for name, _ in without if name.endswith(("_p", "_p_holm", "_detectable"))}
    talked = {*conversations.MEASURES}  # in the conversations' own tests
    left = {name for name, group in without if group != "shuffled"}
    assert left == talked | of_texts | by_hand | filled | tested | {"ceiling_closed"}


def test_p_values_and_detectable_effects_have_twins_in_plain_numpy(stored):
    table = stored[0]
    p, signs = table[table["measure"].str.endswith("_p")], rng().choice([-1, 1], (20, 5000))
    for row in p.itertuples():
        pair = [values(stored, a, row.measure.removesuffix("_p")) for a in (row.arm, row.against)]
        n = min(map(len, pair))
        x = pair[0][:n] - pair[1][:n]
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
        x = mine - base
        if name == "ctr_lift":
            x = (mine - mine.mean() / base.mean() * base) / base.mean()
        wanted = (1.959964 + 0.841621) * np.std(x, ddof=1) / row.n**0.5
        assert row.value == pytest.approx(wanted, rel=1e-5)
