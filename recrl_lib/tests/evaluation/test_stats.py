import numpy as np
import pytest

from recrl_lib.evaluation import stats


def rng(seed=0):
    return np.random.default_rng(seed)


def test_an_interval_is_written_around_its_mean():
    assert (
        stats.bracketed({"x": -0.004, "x_lo": -1.0, "x_hi": 2.346}, "x", "+.2f")
        == "-0.00 [-1.00, +2.35]"
    )
    with pytest.raises(KeyError, match="x_lo"):
        stats.bracketed({"x": 1.0}, "x", ".2f")


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
    num, den = (
        np.array(naive_means(a, 200)),
        np.array(naive_means(b, 200)),
    )  # one seed: the same users in both
    ratio = stats.bootstrap_ratio(a, b, 200, rng())
    np.testing.assert_allclose(
        ratio, [a.mean() / b.mean(), *np.quantile(num / den, [0.025, 0.975])], rtol=1e-12
    )
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
    assert (
        0.90 <= covered / 400 <= 0.97
    )  # nominal .95; percentile intervals of skewed data fall a little short
    assert 0.02 <= rejected / 400 <= 0.09  # nominal .05


def test_bca_against_its_naive_twin():
    from scipy.stats import norm

    x = rng(3).exponential(size=19)
    means = np.array(naive_means(x, 400))
    z0 = norm.ppf(np.mean(means < x.mean()))
    jack = np.array([np.delete(x, i).mean() for i in range(len(x))])
    a = sum((jack.mean() - j) ** 3 for j in jack) / (
        6 * sum((jack.mean() - j) ** 2 for j in jack) ** 1.5
    )
    ends = [norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in norm.ppf([0.025, 0.975])]
    _, lo, hi = stats.bootstrap_mean(x, 400, rng(), method="bca")
    np.testing.assert_allclose((lo, hi), np.quantile(means, ends), rtol=1e-10)
    _, plain_lo, plain_hi = stats.bootstrap_mean(x, 400, rng())
    assert lo > plain_lo and hi > plain_hi  # a long right tail moves both ends to the right


def test_bca_of_a_ratio_agrees_with_scipy():
    from scipy.stats import bootstrap

    num, den = rng(4).exponential(size=40), rng(5).random(40) + 0.5
    theirs = bootstrap(
        (num, den),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="BCa",
        random_state=rng(6),
    ).confidence_interval
    _, lo, hi = stats.bootstrap_ratio(num, den, 20_000, rng(7), method="bca")
    np.testing.assert_allclose((lo, hi), theirs, atol=0.015)  # the two draw different resamples


def test_bca_limits():
    assert stats.bootstrap_mean(np.full(9, 2.0), 50, rng(), method="bca") == (2, 2, 2)
    assert stats.bootstrap_mean(np.array([3.0]), 50, rng(), method="bca") == (3, 3, 3)
    with pytest.raises(ValueError, match="percentile, bca"):
        stats.bootstrap_mean(np.ones(3), 10, rng(), method="t")


def test_seeds_and_users_are_resampled_together_as_by_the_naive_twin():
    """Unbalanced on purpose: user 9 is known to one seed only."""
    seeds, users = np.array([5, 5, 5, 8, 8, 6]), np.array([1, 2, 9, 1, 2, 1])
    x = rng(1).random(6)
    generator, means = rng(), []
    drawn_seeds = np.array([5, 6, 8])[generator.integers(0, 3, (150, 3))]
    drawn_users = np.array([1, 2, 9])[generator.integers(0, 3, (150, 3))]
    for some_seeds, some_users in zip(drawn_seeds, drawn_users):
        picked = [
            x[i]
            for s in some_seeds
            for u in some_users
            for i in range(6)
            if (seeds[i], users[i]) == (s, u)
        ]
        means += [np.mean(picked)] if picked else []
    expected = [x.mean(), *np.quantile(means, [0.025, 0.975])]
    np.testing.assert_allclose(
        stats.crossed_mean(x, seeds, users, 150, rng()), expected, rtol=1e-12
    )
    with pytest.raises(ValueError, match="6 values, 6 seeds, 2 users"):
        stats.crossed_mean(x, seeds, users[:2], 10, rng())


def test_of_one_seed_it_is_the_plain_bootstrap():
    x = rng(1).normal(0, 1, 200)
    plain, crossed = (
        stats.bootstrap_mean(x, 4000, rng()),
        stats.crossed_mean(x, np.zeros(200), np.arange(200), 4000, rng()),
    )
    np.testing.assert_allclose(crossed, plain, atol=0.012)  # a tenth of the interval's width


def test_the_interval_over_seeds_that_share_users_covers_as_often_as_promised():
    """10 seeds of the same 30 users, both with effects of their own. Pooling the pairs as if each were a user of its own, or drawing
    users anew for each seed, makes the interval too narrow."""
    generator, seeds, users = rng(0), np.repeat(np.arange(10), 30), np.tile(np.arange(30), 10)
    covered = {"crossed": 0, "pooled": 0}
    for _ in range(200):
        x = (
            generator.normal(0, 0.3, 10)[seeds]
            + generator.normal(0, 1, 30)[users]
            + generator.normal(0, 0.3, 300)
        )
        for name, (_, lo, hi) in (
            ("crossed", stats.crossed_mean(x, seeds, users, 300, generator)),
            ("pooled", stats.bootstrap_mean(x, 300, generator)),
        ):
            covered[name] += lo <= 0 <= hi
    assert covered["crossed"] > 0.9 * 200 and covered["pooled"] < 0.6 * 200
    x = generator.normal(0, 1, 300)  # no effect of either: at most sqrt(3) times too wide
    (_, lo, hi), (_, plain_lo, plain_hi) = (
        stats.crossed_mean(x, seeds, users, 4000, generator),
        stats.bootstrap_mean(x, 4000, generator),
    )
    assert 1 < (hi - lo) / (plain_hi - plain_lo) < 1.9


def test_holm_by_hand_and_against_its_naive_twin():
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]).tolist() == [1.0, 1.0] and stats.holm([]).size == 0
    p = rng(3).random(9) ** 3
    for alpha in (
        0.01,
        0.05,
        0.2,
    ):  # step down: the smallest against a/m, the next against a/(m-1), stop at the first miss
        rejected, left = set(), sorted(range(9), key=lambda i: p[i])
        while left and p[left[0]] <= alpha / len(left):
            rejected.add(left.pop(0))
        assert rejected == set(np.flatnonzero(stats.holm(p) <= alpha))
    with pytest.raises(ValueError, match="holm"):
        stats.holm([1.2])


def test_the_minimum_detectable_effect_is_detected_as_often_as_promised():
    effect = stats.minimum_detectable(2.0, 60)
    assert effect == pytest.approx(2.8016 * 2 / np.sqrt(60), rel=1e-4)
    means = rng(0).normal(effect, 2.0, (20_000, 60)).mean(1)
    assert np.mean(np.abs(means) > 1.959964 * 2 / np.sqrt(60)) == pytest.approx(0.8, abs=0.01)
    assert stats.minimum_detectable(0.0, 5) == 0 and stats.minimum_detectable(
        2.0, 240
    ) == pytest.approx(effect / 2)
    with pytest.raises(ValueError, match="n=0"):
        stats.minimum_detectable(1.0, 0)


def test_rank_correlation_by_hand_and_its_limits():
    # squared differences of ranks 1 + 1 + 1 + 1 + 0: 1 - 6 * 4 / (5 * 24) = 0.8; atanh(0.8) = 1.0986, sqrt(1.32 / 2) * 1.96 = 1.5923
    assert stats.rank_correlation([1, 2, 3, 4, 9], [20, 10, 40, 30, 50]) == pytest.approx(
        (0.8, np.tanh(-0.4937), np.tanh(2.6909)), abs=1e-4
    )
    assert stats.rank_correlation([1, 2, 3, 4], [1, 10, 11, 12]) == (
        1,
        1,
        1,
    ) and stats.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == (-1, -1, -1)
    for a, b in (
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 3, 4], [5, 5, 5, 5]),
        ([1, 2, 3, 4], [1, 2, 3, 4, 5]),
    ):
        with pytest.raises(ValueError, match="four pairs|pair them"):
            stats.rank_correlation(a, b)


@pytest.mark.parametrize("r, least", [(0.8, 0.92), (0.95, 0.9)])
def test_the_interval_of_a_rank_correlation_covers_as_often_as_promised(r, least):
    """Of normal pairs with correlation r, whose Spearman correlation is 6 / pi * asin(r / 2)."""
    true, generator, covered = 6 / np.pi * np.arcsin(r / 2), rng(5), 0
    for _ in range(1000):
        a, noise = generator.normal(size=(2, 14))
        _, lo, hi = stats.rank_correlation(a, r * a + np.sqrt(1 - r**2) * noise)
        covered += lo <= true <= hi
    assert least < covered / 1000 < 0.98


def test_influence_gives_the_spread_of_a_ratio():
    num, den = rng(1).random(400), rng(2).random(400) + 1
    influence = stats.ratio_influence(num, den)
    _, lo, hi = stats.bootstrap_ratio(num, den, 4000, rng())
    assert abs(influence.mean()) < 1e-12
    assert influence.std() / 20 == pytest.approx((hi - lo) / (2 * 1.96), rel=0.05)


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
