import math

import numpy as np
import pytest

from recrl_lib.evaluation.clicks import (
    FACTORS,
    ClickModel,
    Noise,
    clicks,
    ctr_lift,
    paper_ceiling,
    paper_lift,
    paper_quality,
    sensitivity,
    sigmoid,
    standardised_score,
)

QUIET = Noise(np.zeros(2), np.array([0.3, 0.9]))


def test_probability_by_hand():
    model = ClickModel(alpha=0.5, beta=2.0, bias=-1.0, user_std=0.0, position_weight=0.4)
    p = model.probabilities(np.array([1.0, -2.0]), np.array([0.25, 1.0]), np.array([1, 3]), QUIET)
    assert p == pytest.approx(
        [1 / (1 + math.exp(-(-1 + 0.5 + 0.5 + 0.4))), 1 / (1 + math.exp(-(-1 - 1 + 2 + 0.4 / 2)))]
    )
    biased = model.probabilities(
        np.zeros(2), np.zeros(2), np.ones(2), Noise(np.array([0.7, 0.0]), QUIET.uniform)
    )
    assert np.log(biased[0] / (1 - biased[0])) == pytest.approx(-1 + 0.7 + 0.4)


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise"):
        assert sigmoid(np.array([-1000.0, 0.0, 1000.0])) == pytest.approx([0, 0.5, 1])


def test_without_score_and_quality_every_arm_is_the_same():
    rng = np.random.default_rng(0)
    model = ClickModel(alpha=0.0, beta=0.0)
    noise = model.draw(50, rng)
    a, b = (
        model.probabilities(rng.normal(size=50), rng.random(50), np.ones(50), noise)
        for _ in range(2)
    )
    assert ctr_lift(a, b, 200, rng) == (1.0, 1.0, 1.0)


def test_better_quality_lifts_every_user_and_never_loses_a_click():
    rng = np.random.default_rng(1)
    model = ClickModel()
    noise = model.draw(300, rng)
    score, position = rng.normal(size=300), rng.integers(1, 11, 300)
    low, high = (model.probabilities(score, np.full(300, q), position, noise) for q in (0.3, 0.6))
    lift, lo, hi = ctr_lift(high, low, 2000, rng)
    assert (
        (high > low).all()
        and lift == pytest.approx(high.mean() / low.mean())
        and 1 < lo < lift < hi
    )
    assert not (clicks(low, noise) & ~clicks(high, noise)).any()
    assert np.array_equal(clicks(np.array([0.5, 0.5]), QUIET), [True, False])


def test_draw_has_the_stated_spread_and_is_repeatable():
    model = ClickModel(user_std=0.5)
    a, b = (model.draw(20_000, np.random.default_rng(2)) for _ in range(2))
    assert np.array_equal(a.user_bias, b.user_bias) and np.array_equal(a.uniform, b.uniform)
    assert a.user_bias.std() == pytest.approx(0.5, rel=0.05) and abs(a.user_bias.mean()) < 0.02
    assert a.uniform.mean() == pytest.approx(0.5, abs=0.02)


def test_standardised_score_against_its_naive_twin():
    rng = np.random.default_rng(3)
    scores = rng.normal(5, 3, (6, 9))
    scores[:, 0] = -np.inf
    scores[1, 4:7] = -np.inf
    items = np.array([1, 2, 3, 4, 5, 8])
    twin = []
    for row, item in zip(scores, items, strict=True):
        kept = [s for s in row if np.isfinite(s)]
        mean = sum(kept) / len(kept)
        twin.append((row[item] - mean) / math.sqrt(sum((s - mean) ** 2 for s in kept) / len(kept)))
    assert standardised_score(scores, items) == pytest.approx(twin)
    assert standardised_score(2 * scores + 7, items) == pytest.approx(twin)
    assert standardised_score(np.full((1, 4), 3.0), np.array([1])) == pytest.approx([0])
    with pytest.raises(ValueError, match="masked"):
        standardised_score(scores, np.zeros(6, int))


def test_sensitivity_against_its_naive_twin():
    rng = np.random.default_rng(4)
    model, n = ClickModel(), 20
    noise = model.draw(n, rng)
    score, position, base, arm = (
        rng.normal(size=n),
        rng.integers(1, 11, n),
        rng.random(n),
        rng.random(n),
    )
    got = sensitivity(model, score, arm, base, position, noise)
    assert got.shape == (3, len(FACTORS), len(FACTORS))
    for i, f in enumerate(FACTORS):
        for j, g in enumerate(FACTORS):
            for panel, (a, b, u) in enumerate([(f, g, 1), (f, 1, g), (1, f, g)]):
                other = ClickModel(
                    model.alpha * a,
                    model.beta * b,
                    model.bias,
                    model.user_std * u,
                    model.position_weight,
                )
                heard = Noise(noise.user_bias * u, noise.uniform)
                p = [other.probabilities(score, q, position, heard).mean() for q in (arm, base)]
                assert got[panel, i, j] == pytest.approx(p[0] / p[1])
    assert (sensitivity(model, score, base, base, position, noise) == 1).all()


def test_paper_variant():
    assert [paper_quality(t) for t in ("", "word " * 10, "word " * 40, "word " * 90)] == [
        0,
        0.25,
        1,
        1,
    ]
    assert paper_ceiling() == pytest.approx(1.2449, abs=1e-4)
    model = ClickModel(alpha=0.0, beta=0.5, bias=0.0, user_std=0.0, position_weight=0.0)
    ends = [
        model.probabilities(np.zeros(2), np.full(2, q), np.ones(2), QUIET).mean()
        for q in (paper_quality(""), paper_quality("word " * 40))
    ]
    assert ends[1] / ends[0] == pytest.approx(paper_ceiling())
    # the published 1.225 is a quality of .92, that is 37 words
    assert sigmoid(0.5 * paper_quality("word " * 37)) / 0.5 == pytest.approx(1.225, abs=0.003)
    assert paper_ceiling(0.2, 0.0) == pytest.approx(1)
    assert (
        paper_lift(["word " * 40] * 3, [""] * 3) == pytest.approx(paper_ceiling())
        and paper_lift(["a b"], ["c d"]) == 1
    )
    assert paper_lift(["word " * 40, ""], [""]) == pytest.approx((paper_ceiling() + 1) / 2)


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


def test_model_and_ceiling_reject_nonsense():
    with pytest.raises(ValueError, match="user_std"):
        ClickModel(user_std=-1.0)
    with pytest.raises(ValueError, match="base_click"):
        paper_ceiling(1.0)
