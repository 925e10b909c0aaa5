"""Ablations: which runs are compared, pairing by user and seed, and verdicts from the numbers."""

import numpy as np
import pandas as pd
import pytest

from recrl_lib import paths, runs
from recrl_lib.evaluation import ablations
from recrl_lib.evaluation.findings import rows_of
from recrl_lib.params import Params

VALUES = {name: 0.5 for name, _ in ablations.OF_RUN}


def policy(arm, seed=0, shift=0.0, kl=2.0, overlap=0.9, items=0) -> ablations.Policy:
    luck = np.random.default_rng(seed).random(40)  # users of one seed have the same in every arm
    texts = {"user": np.arange(40), "item": np.arange(40) + items}
    texts |= {"reward": luck + shift, "quality": luck, "kl": kl + luck}
    values = VALUES | {"top10_overlap": overlap}
    return ablations.Policy(f"r-{arm}", arm, seed, pd.DataFrame(texts), values)


def compare(*found: ablations.Policy) -> pd.DataFrame:
    return ablations.compare(found, 500, np.random.default_rng(0))


def ends(table, measure, arm, against=""):
    return rows_of(table, measure, arm, against).iloc[0][["value", "low", "high"]].tolist()


def test_the_difference_is_paired_by_user():
    """Users differ by far more than arms do: unpaired, a shift of .01 would drown."""
    table = compare(policy("main"), policy("a", shift=0.01))
    assert ends(table, "reward", "a", "main") == pytest.approx([0.01] * 3)
    _, low, high = ends(table, "reward", "a")
    assert high - low > 0.1
    assert all(ends(table, measure, "main", "main") == [0, 0, 0] for measure in ablations.PAIRED)


def test_seeds_are_averaged_and_their_spread_is_told():
    table = compare(
        *(policy("main", seed) for seed in (0, 1)),
        *(policy("a", seed, shift=0.1 + 0.2 * seed) for seed in (0, 1)),
    )
    assert ends(table, "reward", "a", "main")[0] == pytest.approx(0.2)
    row = rows_of(table, "reward", "a").iloc[0]
    assert (row["n"], row["seeds"]) == (80, 2)
    means = sorted(policy("a", s, shift=0.1 + 0.2 * s).texts["reward"].mean() for s in (0, 1))
    spread = [
        runs.value(table, "reward", "a", group=f"{end}_seed") for end in ("lowest", "highest")
    ]
    assert spread == pytest.approx(means)


def test_what_does_not_pair_has_no_difference():
    table = compare(policy("main"), policy("other_seed", 1), policy("other_items", items=5))
    for arm in ("other_seed", "other_items"):
        assert rows_of(table, "reward", arm, "main").empty and ends(table, "reward", arm)[0] > 0
    with pytest.raises(ValueError, match="no run of the arm 'main' is finished: run make batch"):
        compare(policy("a"))


def test_rows_are_results_in_the_order_of_the_arms():
    table = compare(policy("b"), policy("no_projection", overlap=0.5), policy("main"))
    assert table["arm"].unique().tolist() == ["main", "no_projection", "b"]
    assert runs.value(table, "top10_overlap", "no_projection") == 0.5
    assert runs.value(table, "ctr_lift", "b", "base") == 0.5
    assert not table.duplicated(["arm", "against", "group", "measure"]).any()


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """The base run ``r`` and two runs of its batch, one of them ``main`` at another seed."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    monkeypatch.setattr(runs, "up_to_date", lambda stage, params: params.run != "r-b-stale-seed0")
    for run, seed in (
        ("r", 0),
        ("r-b-kl0-seed0", 0),
        ("r-b-main-seed1", 1),
        ("r-b-stale-seed0", 0),
    ):
        runs.write_params(Params(run=run, seed=seed))
        texts = pd.DataFrame(
            {"arm": ["shielded", "unshielded"], "user": 1, "item": 1, "reward": 9.0}
        )
        texts = texts.assign(quality=0.1, kl=1.0, reward_length=1.0, reward_relevance=0.5)
        folder = tmp_path / run
        (folder / "artifacts").mkdir()
        (folder / "metrics").mkdir()
        texts.assign(reward_coherence=0.0).to_parquet(folder / "artifacts" / "explanations.parquet")
        rows = [
            {"arm": arm, "against": against, "group": "all", "measure": measure, "value": 0.5}
            for arm in ("shielded", "unshielded")
            for measure, against in ablations.OF_RUN
        ]
        empty = dict.fromkeys(("low", "high", "n", "seeds"))
        pd.DataFrame(rows).assign(**empty).to_csv(
            folder / "metrics" / "evaluation.csv", index=False
        )
    return Params(run="r", batch="b")


def test_finished_runs_are_collected_and_the_base_run_stands_in_for_main(batch):
    found, left_out = ablations.collect(batch)
    assert [(p.run, p.arm, p.seed) for p in found] == [
        ("r", "main", 0),
        ("r", "no_projection", 0),
        ("r-b-kl0-seed0", "kl0", 0),
        ("r-b-main-seed1", "main", 1),
        ("r-b-main-seed1", "no_projection", 1),
    ]
    assert left_out == ["r-b-stale-seed0"]
    # whatever it was tuned for, an arm is judged by the reward with the study's weights
    assert found[2].texts["reward"].tolist() == pytest.approx([0.5 * 1 + 0.3 * 0.5 + 0.2 * 0])


def main_results(lift=(1.1, 1.05, 1.15), ndcg=(0.0, -0.01, 0.01)) -> pd.DataFrame:
    rows = [("ctr_lift", *lift), ("ndcg@10", *ndcg)]
    frame = pd.DataFrame(rows, columns=["measure", "value", "low", "high"])
    return frame.assign(arm="shielded", against="base", group="all")


def claims(*arms: ablations.Policy, mains=None, overlap=0.97):
    everything = (policy("main", overlap=overlap), policy("no_projection", overlap=0.6), *arms)
    found = ablations.claims(compare(*everything), mains or [main_results()])
    return {one.question: one.answer for one in found}


LIFT, RANKING = "simulated clicks rise 1.225-fold", "the ranking is virtually unchanged"
KL, STEPS = "without the KL penalty the policy drifts further", "more steps drift less"


@pytest.mark.parametrize(
    "given, claim, answer",
    [
        ({}, LIFT, "no"),
        ({"mains": [main_results(lift=(1.2, 1.1, 1.3))]}, LIFT, "yes"),
        ({"mains": [main_results(lift=(1.2, 1.1, 1.3)), main_results()]}, LIFT, "no"),
        ({}, RANKING, "yes"),
        ({"overlap": 0.9}, RANKING, "no"),
        ({"mains": [main_results(ndcg=(-0.02, -0.03, -0.01))]}, RANKING, "no"),
        ({}, "it is the projection that keeps it", "yes"),
        ({"overlap": 0.5}, "it is the projection that keeps it", "no"),
    ],
)
def test_published_claims(given, claim, answer):
    assert claims(**given)[claim] == answer


def test_claims_about_drift_need_their_arm():
    assert claims()[KL] == "not tested"
    found = claims(policy("kl0", kl=3.0), policy("more_steps", kl=3.0))
    assert (found[KL], found[STEPS]) == ("yes", "no")
    assert claims(policy("more_steps", kl=1.0))[STEPS] == "yes"
    assert claims(policy("kl0"))[KL] == "not shown"
