"""Intervals and tests over users, and over seeds and users; paired where arms share users.

Intervals are scipy's bootstrap (Efron & Tibshirani 1993); arms that share users are resampled
together. All measures of a table go through it at once.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats
from scipy.special import ndtri

LEVEL = 0.95  # coverage of every interval
VALUES = 2_000_000  # resampled at a time: bounds the memory


class Interval(NamedTuple):
    """A mean or ratio with the ends of its 95 % interval: numbers, or arrays of several."""

    value: Any
    low: Any
    high: Any


def bootstrap(num: ArrayLike, den: ArrayLike, resamples: int, rng: np.random.Generator) -> Interval:
    """``mean(num) / mean(den)`` over users with a percentile interval.

    ``num``: values (..., U), one a user; all rows see the same resamples. ``den``, of the same
    shape: 1 for a mean, a 0/1 mask where some users have no value, the other arm's clicks for a
    lift. The ends are NaN where the mean of ``den`` is 0 or changes sign among the resamples: such
    a ratio has no interval. ``ValueError`` without users or with values that are not finite.
    """
    num, den = np.asarray(num, np.float64), np.asarray(den, np.float64)
    den = np.full_like(num, den) if den.ndim == 0 else den
    if num.size == 0 or num.shape != den.shape or not np.isfinite([num, den]).all():
        shapes = f"{num.shape} and {den.shape}"
        raise ValueError(f"bootstrap: give one finite number a user; the shapes are {shapes}")
    sign = np.sign(den.mean(-1))

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        a, b = a.mean(axis), b.mean(axis)
        kept = b * (sign if b.ndim == sign.ndim else sign[..., None]) > 0
        return np.divide(a, b, out=np.full(a.shape, np.nan), where=kept)

    value = ratio(num, den)[()]
    if num.shape[-1] == 1:  # scipy refuses a single user
        return Interval(value, value, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy_stats.DegenerateDataWarning)  # of NaN
        found = scipy_stats.bootstrap(
            (num, den), ratio, paired=True, vectorized=True, axis=-1, n_resamples=resamples,
            batch=max(1, VALUES // num.size), confidence_level=LEVEL, method="percentile", rng=rng,
        ).confidence_interval  # fmt: skip
    return Interval(value, found.low, found.high)


def paired_p(difference: np.ndarray, resamples: int, rng: np.random.Generator) -> Any:
    """Two-sided p (...,) of paired differences (..., U) under random signs, or under all signs if
    they are at most ``resamples``."""
    if difference.shape[-1] == 1:
        return np.ones(difference.shape[:-1])
    return scipy_stats.permutation_test(
        (difference,), lambda d, axis: d.mean(axis), permutation_type="samples", vectorized=True,
        n_resamples=resamples, rng=rng, axis=-1, batch=max(1, VALUES // difference.size),
    ).pvalue  # fmt: skip


def crossed_mean(
    x: ArrayLike, seeds: ArrayLike, users: ArrayLike, resamples: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Mean of ``x`` (N,), one value a seed and user, with an interval for new seeds and new users.

    Both are resampled, and a value counts as often as its seed times as often as its user (the
    pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122); scipy resamples one of them only.
    ``seeds`` and ``users`` (N,) are labels. Three seeds have only ten different resamples.
    """
    x = np.asarray(x, np.float64)
    weights = np.ones((resamples, len(x)))
    for labels in (seeds, users):
        names, index = np.unique(labels, return_inverse=True)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
        weights *= times[:, index]
    total = weights.sum(1)  # 0 where no drawn seed has a drawn user
    means = (weights @ x)[total > 0] / total[total > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's (1979) adjusted p-values (m,): rejecting those <= a keeps the chance of any false
    rejection at a."""
    p = np.asarray(p)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def minimum_detectable(std: float, n: int) -> float:
    """Smallest true mean of paired differences of spread ``std`` that ``n`` users show with power
    .8: (z_.975 + z_.8) std / sqrt(n), the two-sided normal approximation."""
    return float((ndtri((1 + LEVEL) / 2) + ndtri(0.8)) * std / np.sqrt(n))


def interval(value: float, low: float = np.nan, high: float = np.nan, spec: str = ".3f") -> str:
    """ "0.25 [0.10, 0.40]"; the value alone without an interval, "" without a value."""
    if np.isnan(value):
        return ""
    return f"{value:{spec}}" + ("" if np.isnan(low) else f" [{low:{spec}}, {high:{spec}}]")
