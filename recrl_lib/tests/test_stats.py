import numpy as np
import pytest

from recrl_lib import stats


def rng(seed=0):
    return np.random.default_rng(seed)


def naive_means(x, n, seed=0):
    generator = rng(seed)
    return [np.mean([x[i] for i in generator.integers(0, len(x), len(x))]) for _ in range(n)]


def test_mean_equals_naive_twin_in_any_block_size(monkeypatch):
    x = rng(1).exponential(size=23)
    expected = np.quantile(naive_means(x, 301), [0.05, 0.95])
    for block in (10**6, 100, 1):
        monkeypatch.setattr(stats, "BLOCK", block)
        mean, *interval = stats.bootstrap_mean(x, 301, rng(), level=0.9)
        assert mean == pytest.approx(x.mean())
        np.testing.assert_allclose(interval, expected, rtol=1e-12)


def test_ratio_and_diff_equal_naive_twins():
    a, b = rng(1).random(17), rng(2).random(17) + 0.2
    num, den = np.array(naive_means(a, 200)), np.array(naive_means(b, 200))  # one seed: the same users in both
    ratio = stats.bootstrap_ratio(a, b, 200, rng())
    np.testing.assert_allclose(ratio, [a.mean() / b.mean(), *np.quantile(num / den, [0.025, 0.975])], rtol=1e-12)
    diff, lo, hi, p = stats.paired_bootstrap_diff(a, b, 200, rng())
    expected = [a.mean() - b.mean(), *np.quantile(num - den, [0.025, 0.975])]
    np.testing.assert_allclose((diff, lo, hi), expected, rtol=1e-12)
    centred = np.abs(num - den - diff)
    assert p == pytest.approx((1 + (centred >= abs(diff)).sum()) / 201)


def test_pairing_is_used():
    user = rng(1).normal(5, 3, size=200)  # users differ far more than arms do
    lift = user + 0.1 + rng(2).normal(0, 0.05, size=200)
    diff, lo, hi, p = stats.paired_bootstrap_diff(lift, user, 2000, rng())
    assert 0.08 < lo < diff < hi < 0.12 and p == pytest.approx(1 / 2001)
    ratio, lo, hi = stats.bootstrap_ratio(lift, user, 2000, rng())
    assert 1.01 < lo < ratio < hi < 1.03


def test_identical_arms():
    x = rng(1).random(50)
    assert stats.bootstrap_ratio(x, x, 200, rng()) == (1, 1, 1)
    assert stats.paired_bootstrap_diff(x, x, 200, rng()) == (0, 0, 0, 1)


def test_one_user_and_constant():
    assert stats.bootstrap_mean(np.array([3.0]), 50, rng()) == (3, 3, 3)
    assert stats.bootstrap_mean(np.full(9, 2.0), 50, rng()) == (2, 2, 2)


def test_coverage_of_the_interval_and_level_of_the_test():
    generator = rng(7)
    covered = rejected = 0
    for _ in range(400):
        a, b = generator.exponential(size=(2, 60))  # skewed, true difference 0, true mean 1
        _, lo, hi = stats.bootstrap_mean(a, 400, generator)
        covered += lo <= 1 <= hi
        rejected += stats.paired_bootstrap_diff(a, b, 400, generator)[3] < 0.05
    assert 0.90 <= covered / 400 <= 0.97  # nominal .95; percentile intervals of skewed data fall a little short
    assert 0.02 <= rejected / 400 <= 0.09  # nominal .05


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="x must be"):
        stats.bootstrap_mean(np.array([1.0, np.nan]), 10, rng())
    with pytest.raises(ValueError, match="b has 2 users, a has 3"):
        stats.paired_bootstrap_diff(np.ones(3), np.ones(2), 10, rng())
    with pytest.raises(ValueError, match="level=95"):
        stats.bootstrap_mean(np.ones(3), 10, rng(), level=95)
    with pytest.raises(ValueError, match="mean of den"):
        stats.bootstrap_ratio(np.ones(4), np.array([1.0, -1, 1, -1]), 100, rng())
    with pytest.raises(ValueError, match="mean of den"):
        stats.bootstrap_ratio(np.ones(4), np.array([0.0, 0, 0, 1]), 100, rng())
