import numpy as np
import pytest
from scipy.stats import norm

from recrl_lib.evaluation import stats
from recrl_lib.tests.evaluation.toy import rng


def test_a_value_is_written_with_its_interval():
    assert stats.interval(-0.004, -1.0, 2.346, "+.2f") == "-0.00 [-1.00, +2.35]"
    assert stats.interval(0.5) == "0.500" and stats.interval(np.nan) == ""


def test_the_bootstrap_is_that_of_a_plain_loop():
    """Close to it: the two draw different resamples."""
    num, den = rng(1).exponential(size=40), rng(2).random(40) + 0.5
    picks = rng(3).integers(0, 40, (20_000, 40))
    wanted = np.quantile(num[picks].mean(1) / den[picks].mean(1), [0.025, 0.975])
    value, low, high = stats.bootstrap(num, den, 20_000, rng())
    assert value == pytest.approx(num.mean() / den.mean())
    np.testing.assert_allclose((low, high), wanted, rtol=0.01)


def test_all_measures_at_once_are_each_on_its_own():
    x, known = rng(1).normal(size=(3, 25)), rng(2).random((3, 25)) < 0.8
    together = stats.bootstrap(x * known, known, 300, rng())
    for i in range(3):
        alone = stats.bootstrap(x[i] * known[i], known[i], 300, rng())
        np.testing.assert_allclose([part[i] for part in together], alone, rtol=1e-12)
        assert together.value[i] == pytest.approx(x[i][known[i]].mean())


def test_one_user_no_spread_a_denominator_that_may_vanish_and_bad_input():
    for x in ([3.0], [3.0] * 9):
        assert stats.bootstrap(x, 1, 50, rng()) == (3, 3, 3)
    for den in ([1.0, -1, 1, -1], [0.0, 0, 0, 1]):
        assert np.isnan(stats.bootstrap(np.ones(4), np.array(den), 100, rng()).low)
    for num, den in (([1.0, np.nan], 1.0), (np.ones(3), np.ones(2)), ([], 1.0)):
        with pytest.raises(ValueError, match="give one finite number a user"):
            stats.bootstrap(num, den, 10, rng())


def test_coverage_of_the_interval_and_level_of_the_test():
    x, y = rng(7).exponential(size=(2, 400, 60))  # skewed, true mean 1, true difference 0
    _, low, high = stats.bootstrap(x, 1, 400, rng())
    assert 0.90 <= ((low <= 1) & (high >= 1)).mean() <= 0.97
    rejected = [stats.paired_p(row, 200, rng()) < 0.05 for row in (x - y)[:200]]
    assert 0.01 <= np.mean(rejected) <= 0.1


def test_p_of_paired_differences():
    """Exact for few users: of the 8 signs of three equal differences, two are as extreme."""
    assert stats.paired_p(np.array([[1.0, 1, 1], [1, -1, 0]]), 500, rng()).tolist() == [0.25, 1]
    assert stats.paired_p(np.array([2.0]), 500, rng()).tolist() == 1
    assert stats.paired_p(0.1 + rng(2).normal(0, 0.05, size=200), 1000, rng()) < 0.01


def test_seeds_and_users_are_resampled_together():
    seeds, users = np.repeat(np.arange(10), 30), np.tile(np.arange(30), 10)
    covered, generator = {"crossed": 0, "pooled": 0}, rng()
    for _ in range(100):  # both have effects of their own, so that pooling is too sure
        x = generator.normal(0, 0.3, 10)[seeds] + generator.normal(0, 1, 30)[users]
        x += generator.normal(0, 0.3, 300)
        intervals = {
            "crossed": stats.crossed_mean(x, seeds, users, 300, generator),
            "pooled": stats.bootstrap(x, 1, 300, generator),
        }
        for name, (_, low, high) in intervals.items():
            covered[name] += low <= 0 <= high
    assert covered["crossed"] > 90 and covered["pooled"] < 60
    # of one seed it is the plain bootstrap
    x = rng(1).normal(0, 1, 200)
    crossed = stats.crossed_mean(x, ["a"] * 200, np.arange(200), 4000, rng())
    np.testing.assert_allclose(crossed, stats.bootstrap(x, 1, 4000, rng()), atol=0.012)


def test_holm_by_hand_and_by_its_rule():
    by_hand = stats.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(by_hand, [0.03, 0.06, 0.06, 0.02])
    p = rng(3).random(9) ** 3
    for alpha in (0.01, 0.05, 0.2):  # the smallest against a/m, the next against a/(m-1), ...
        rejected, left = set(), sorted(range(9), key=lambda i: p[i])
        while left and p[left[0]] <= alpha / len(left):
            rejected.add(left.pop(0))
        assert rejected == set(np.flatnonzero(stats.holm(p) <= alpha))


def test_the_minimum_detectable_effect_is_detected_as_often_as_promised():
    effect = stats.minimum_detectable(2.0, 60)
    means = rng(0).normal(effect, 2.0, (20_000, 60)).mean(1)
    shown = np.abs(means) > norm.ppf(0.975) * 2 / np.sqrt(60)
    assert shown.mean() == pytest.approx(0.8, abs=0.01)
