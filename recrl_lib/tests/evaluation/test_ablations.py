"""Ablations: which runs are compared, pairing by user and seed, and verdicts that follow the numbers."""

import json

import numpy as np
import pandas as pd
import pytest

from recrl_lib import paths, runs
from recrl_lib.evaluation import ablations
from recrl_lib.evaluation.ablations import Finished
from recrl_lib.pipeline import derive
from recrl_lib.runs import write_atomic

EVALUATION = {
    "shielded/ctr_lift": 1.1, "shielded/ctr_lift_lo": 1.05, "shielded/ctr_lift_hi": 1.15,
    "shielded/ndcg@10_change": 0.0, "shielded/ndcg@10_change_lo": -0.01, "shielded/ndcg@10_change_hi": 0.01,
}  # fmt: skip


def finished(arm, seed=0, shift=0.0, kl=2.0, overlap=0.9, n=40, items=None):
    rng = np.random.default_rng(seed)  # users of one seed have the same luck in every arm
    luck = rng.random(n)
    items = np.arange(n) if items is None else items
    texts = pd.DataFrame(
        {
            "user": np.arange(n),
            "item": items,
            "reward": luck + shift,
            "quality": luck,
            "kl": kl + luck,
        }
    )
    return Finished(
        f"r-{arm}",
        arm,
        seed,
        texts,
        {"ctr_lift": 1.1, "top10_overlap": overlap, "ndcg@10": 0.1, "max_abs_score_delta": 1.0},
    )


def table(*found):
    return ablations.compare(found, 500, np.random.default_rng(0)).set_index("arm")


def test_the_difference_is_paired_by_user():
    """Users differ by far more than arms do: unpaired, a shift of .01 would drown."""
    got = table(finished("main"), finished("a", shift=0.01))
    assert got.loc[
        "a", ["reward_diff", "reward_diff_lo", "reward_diff_hi"]
    ].tolist() == pytest.approx([0.01] * 3)
    assert got.loc["a", "reward_hi"] - got.loc["a", "reward_lo"] > 0.1
    assert (got.loc["main", [c for c in got if "_diff" in c]] == 0).all()
    assert got.loc["a", "reward"] == pytest.approx(finished("a", shift=0.01).texts["reward"].mean())


def test_seeds_are_averaged_and_their_spread_is_told():
    got = table(
        finished("main", 0),
        finished("main", 1),
        finished("a", 0, shift=0.1),
        finished("a", 1, shift=0.3),
    )
    a = got.loc["a"]
    assert (a["seeds"], a["texts"], a["paired"]) == (2, 80, 80) and a[
        "reward_diff"
    ] == pytest.approx(0.2)
    means = sorted(finished("a", s, shift=0.1 + 0.2 * s).texts["reward"].mean() for s in (0, 1))
    assert [a["reward_low_seed"], a["reward_high_seed"]] == pytest.approx(means)


def test_what_does_not_pair_has_no_difference():
    got = table(
        finished("main", 0),
        finished("other_seed", 1),
        finished("other_items", 0, items=np.arange(40) + 5),
    )
    assert got.loc["other_seed", "paired"] == got.loc["other_items", "paired"] == 0
    assert np.isnan(got.loc["other_seed", "reward_diff"]) and not np.isnan(
        got.loc["other_seed", "reward"]
    )
    with pytest.raises(ValueError, match="'main' is finished"):
        table(finished("a"))


def test_order_and_reading_table():
    found = [finished("b"), finished("no_projection"), finished("main"), finished("a", 1)]
    frame = ablations.compare(found, 200, np.random.default_rng(0))
    assert frame["arm"].tolist() == ["main", "no_projection", "a", "b"]
    shown = ablations.shown(frame)
    assert shown.loc["main", "reward - main"] == "" == shown.loc["a", "kl - main"]
    assert shown.loc["b", "kl - main"] == "+0.000 [+0.000, +0.000]"


def verdicts(*found, evaluation=EVALUATION):
    frame = ablations.compare(found, 500, np.random.default_rng(0))
    return {c.claim: c.held for c in ablations.claims(frame, [evaluation])}


def test_verdicts_follow_the_numbers():
    main, free = finished("main", overlap=0.96), finished("no_projection", overlap=0.1)
    got = verdicts(main, free, finished("kl0", kl=3.0), finished("more_steps", kl=3.0))
    assert got == {
        "simulated clicks rise 1.225-fold": "no", "the ranking is virtually unchanged": "yes", "it is the projection that keeps it": "yes",
        "without the KL penalty the policy drifts further": "yes", "more steps drift less": "no",
        "a lower learning rate drifts less": "not tested",
    }  # fmt: skip
    got = verdicts(
        finished("main", overlap=0.5), finished("no_projection", overlap=0.5), finished("kl0"), finished("low_lr", kl=1.0),
        evaluation=EVALUATION | {"shielded/ctr_lift_hi": 1.3},
    )  # fmt: skip
    assert list(got.values()) == ["yes", "no", "no", "not shown", "not tested", "yes"]


def test_clicks_and_ndcg_must_hold_at_every_seed():
    """Two seeds on either side of a value are not a range that includes it."""
    frame = ablations.compare(
        [finished("main", overlap=0.96), finished("no_projection", overlap=0.1)],
        100,
        np.random.default_rng(0),
    )

    def held(*changes):
        lift, ranking, *_ = ablations.claims(
            frame,
            [
                EVALUATION | {f"shielded/{key}": v for key, v in change.items()}
                for change in changes
            ],
        )
        return lift.held, ranking.held, lift.numbers

    both = {"ctr_lift_hi": 1.25}
    assert held(both, both)[:2] == ("yes", "yes") and held(both, {})[:2] == ("no", "yes")
    above, below = (
        {"ctr_lift_lo": 1.3, "ctr_lift_hi": 1.4, "ndcg@10_change_lo": 0.001},
        {"ndcg@10_change_hi": -0.001},
    )
    assert held(above, below) == (
        "no",
        "no",
        "1.100 [1.300, 1.400], 1.100 [1.050, 1.150] under this study's click model",
    )


# --------------------------------------------------------------------------------------------- which runs


def evaluated(params, reward=0.5):
    """The evaluation of a run, with texts in artifacts/ as notebook 06 leaves them."""
    stage = runs.start("evaluation", params.as_dict())
    one = pd.DataFrame({"user": [7, 8], "item": [1, 2], "quality": 0.5, "kl": 1.0, "reward": 9.0})
    parts = one.assign(reward_length=reward, reward_relevance=reward, reward_coherence=reward)
    stage.save_table(
        "explanations", pd.concat([parts.assign(arm=a) for a in ("base", "unshielded", "shielded")])
    )
    stage.metrics({key: 0.5 for key in runs.REQUIRED_METRICS["evaluation"]})
    stage.finish()


@pytest.fixture
def study(base):
    evaluated(base)
    return base


def test_without_a_batch_the_base_run_is_main_and_its_twin(study):
    found, left_out = ablations.collect(study)
    assert [(f.run, f.arm, f.seed) for f in found] == [
        ("base", "main", 4),
        ("base", "no_projection", 4),
    ] and left_out == []
    assert found[0].texts["reward"].tolist() == [
        0.5,
        0.5,
    ]  # from the parts, with the study's weights
    assert found[0].metrics["ctr_lift"] == 0.5


def test_finished_runs_of_the_batch_are_found_and_others_left_out(study):
    for arm, changes in (
        ("kl0", {"kl_coef": 0.0, "seed": 4}),
        ("beta", {"sim_beta": 1.0}),
        ("rank", {"lora_rank": 3}),
    ):
        derive.derive("base", f"base-smoke-{arm}-seed{changes.get('seed', 4)}", **changes)
    evaluated(runs.read_params("base-smoke-beta-seed4"), reward=0.75)
    derive.derive("base", "base-other-a-seed4", sim_beta=0.5)
    stale = runs.run_folder("base-smoke-rank-seed4") / "metrics" / "evaluation.json"
    write_atomic(stale, json.dumps({}))
    found, left_out = ablations.collect(study)
    assert [(f.run, f.arm) for f in found] == [
        ("base", "main"),
        ("base", "no_projection"),
        ("base-smoke-beta-seed4", "beta"),
    ]
    assert left_out == ["base-smoke-rank-seed4"] and found[-1].texts["reward"].tolist() == [
        0.75,
        0.75,
    ]


def test_a_new_run_of_the_batch_makes_the_notebook_run_again(study):
    before = runs.stage_key("ablations", study)
    derive.derive("base", "base-smoke-main-seed4")
    assert (paths.RUNS / "base-smoke-main-seed4" / "metrics" / "evaluation.json").is_file()
    assert runs.stage_key("ablations", study) != before
    found, _ = ablations.collect(study)
    assert [f.run for f in found] == ["base-smoke-main-seed4"] * 2  # it is main now
