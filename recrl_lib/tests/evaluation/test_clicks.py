import math

import numpy as np
import pandas as pd
import pytest

from recrl_lib.evaluation.clicks import (
    ASSUMPTIONS,
    FACTORS,
    ClickModel,
    paper_ceiling,
    paper_lift,
    paper_quality,
    sensitivity,
    sigmoid,
    standardised_score,
)
from recrl_lib.params import resolve

QUIET = np.zeros(2)


def test_probability_by_hand():
    model = ClickModel(alpha=0.5, beta=2.0, bias=-1.0, user_std=0.7, position_weight=0.4)
    p = model.probabilities([1.0, -2.0], [0.25, 1.0], [1, 3], np.array([0.0, 1.0]))
    logits = [-1 + 0.5 + 0.5 + 0.4, -1 - 1 + 2 + 0.7 + 0.4 / 2]
    assert p == pytest.approx([1 / (1 + math.exp(-logit)) for logit in logits])
    with np.errstate(all="raise"):
        assert sigmoid([-1000.0, 0.0, 1000.0]) == pytest.approx([0, 0.5, 1])


def test_the_model_is_the_one_that_the_parameters_state():
    params = resolve("smoke", sim_beta=3.0, sim_position=0.1)
    model = ClickModel.of(params)
    assert (model.beta, model.position_weight, model.alpha) == (3.0, 0.1, params.sim_alpha)


def test_better_quality_is_clicked_more_by_every_user():
    rng = np.random.default_rng(1)
    score, position, noise = rng.normal(size=300), rng.integers(1, 11, 300), rng.normal(size=300)
    low, high = (
        ClickModel().probabilities(score, np.full(300, q), position, noise) for q in (0.3, 0.6)
    )
    assert (high > low).all()
    deaf = ClickModel(alpha=0.0, beta=0.0)  # to score and text
    same = [deaf.probabilities(score * k, np.full(300, k), position, noise) for k in (0.1, 0.9)]
    assert np.array_equal(*same)


def test_standardised_score_against_a_plain_loop():
    rng = np.random.default_rng(3)
    scores = rng.normal(5, 3, (6, 9))
    scores[:, 0] = scores[1, 4:7] = -np.inf  # padding, and what user 1 has seen
    items, wanted = np.array([1, 2, 3, 4, 5, 8]), []
    for row, item in zip(scores, items, strict=True):
        kept = [s for s in row if np.isfinite(s)]
        mean = sum(kept) / len(kept)
        std = math.sqrt(sum((s - mean) ** 2 for s in kept) / len(kept))
        wanted.append((row[item] - mean) / std)
    assert standardised_score(scores, items) == pytest.approx(wanted)
    assert standardised_score(2 * scores + 7, items) == pytest.approx(wanted)
    assert standardised_score(np.full((1, 4), 3.0), np.array([1])) == pytest.approx([0])
    with pytest.raises(ValueError, match="masked"):
        standardised_score(scores, np.zeros(6, int))


def test_sensitivity_multiplies_two_assumptions_at_a_time():
    rng, n = np.random.default_rng(4), 20
    model, score, noise = ClickModel(), rng.normal(size=n), rng.normal(size=n)
    base = pd.DataFrame(
        {"arm": "base", "quality": rng.random(n), "position": rng.integers(1, 11, n)}
    )
    arm = base.assign(arm="shielded", quality=rng.random(n))
    table = pd.concat([base, arm])
    found = sensitivity(model, score, noise, table, "shielded")
    assert len(found) == 3 * len(FACTORS) ** 2
    assert set(zip(found["first"], found["second"])) == set(ASSUMPTIONS)
    row = found[(found["first"] == "beta") & (found["first_factor"] == 2)].iloc[0]
    other = ClickModel(beta=2 * model.beta, user_std=row["second_factor"] * model.user_std)
    p = [other.probabilities(score, t["quality"], t["position"], noise).mean() for t in (arm, base)]
    assert row["second"] == "user_std" and row["lift"] == pytest.approx(p[0] / p[1])
    assert (sensitivity(model, score, noise, table, "base")["lift"] == 1).all()


def test_the_published_click_model():
    lengths = {"": 0, "word " * 10: 0.25, "word " * 40: 1, "word " * 90: 1}
    assert [paper_quality(text) for text in lengths] == list(lengths.values())
    assert paper_ceiling() == pytest.approx(1.2449, abs=1e-4)
    assert paper_ceiling(0.2, 0.0) == pytest.approx(1)
    # the published 1.225 is a quality of .92, that is 37 words
    assert sigmoid(0.5 * paper_quality("word " * 37)) / 0.5 == pytest.approx(1.225, abs=0.003)
    assert paper_lift(["word " * 40] * 3, [""] * 3) == pytest.approx(paper_ceiling())
    assert paper_lift(["word " * 40, ""], [""]) == pytest.approx((paper_ceiling() + 1) / 2)
    assert paper_lift(["a b"], ["c d"]) == 1
    with pytest.raises(ValueError, match="base_click"):
        paper_ceiling(1.0)


@pytest.mark.parametrize(
    "score, quality, position, message",
    [
        ([0, np.nan], [0, 0], [1, 1], "score"),
        ([0, 0], [0, 1.2], [1, 1], "quality must lie"),
        ([0, 0], [0, 0], [0, 1], "counts from 1"),
        ([0, 0, 0], [0, 0], [1, 1], "score"),
    ],
)
def test_errors_name_the_argument(score, quality, position, message):
    with pytest.raises(ValueError, match=message):
        ClickModel().probabilities(score, quality, position, QUIET)
    with pytest.raises(ValueError, match="user_std"):
        ClickModel(user_std=-1.0)
