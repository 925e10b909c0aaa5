"""Intervals and tests over users, and over seeds and users: paired where arms share users.

Bootstrap intervals (Efron & Tibshirani 1993), ``percentile`` or ``bca``; the hierarchical bootstrap for several
seeds; Holm's correction for several questions; the smallest effect that so many users can show. Resamples are
drawn in blocks, so that memory stays at a few times ``BLOCK`` numbers whatever their number.
"""

import numpy as np
from scipy.special import ndtr, ndtri

BLOCK = 1_000_000  # user indices drawn at a time
METHODS = ("percentile", "bca")


def bootstrap_mean(
    x: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95, method: str = "percentile"
) -> tuple[float, float, float]:
    """Mean of ``x`` (U,) and its interval from ``n`` resamples of users: (mean, lo, hi)."""
    (x,) = _checked(n, level, method, x=x)
    means = _resampled_means(x, n, rng)
    return float(x.mean()), *_interval(means, level, method, x.mean(), _left_out_means(x))


def bootstrap_ratio(
    num: np.ndarray, den: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95, method: str = "percentile"
) -> tuple[float, float, float]:
    """mean(``num``) / mean(``den``), resampled jointly by user, as both are (U,) of the same users: (ratio, lo, hi).

    Raises ``ValueError`` where the mean of ``den`` is 0 or changes sign among resamples: the ratio then has no
    interval.
    """
    num, den = _checked(n, level, method, num=num, den=den)
    means = _resampled_means(np.stack([num, den]), n, rng)
    ratio = _ratio(num.mean(), den.mean(), means[1])
    left_out = _left_out_means(num) / _left_out_means(den) if method == "bca" else num
    return float(ratio), *_interval(means[0] / means[1], level, method, ratio, left_out)


def hierarchical_mean(
    x: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``x`` (S, U), S seeds of U users, resampling seeds and then each drawn seed's users: (mean, lo, hi).

    The interval is for a new seed as well as new users. With few seeds it is too narrow (S of 3 has only 10
    different resamples of seeds): say how many there were.
    """
    (x,) = _checked(n, level, x=x, ndim=2)
    return float(x.mean()), *_interval(_hierarchical_means(x, n, rng), level)


def hierarchical_ratio(
    num: np.ndarray, den: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95
) -> tuple[float, float, float]:
    """mean(``num``) / mean(``den``), both (S, U) of the same seeds and users, as ``hierarchical_mean``: (ratio, lo, hi)."""
    num, den = _checked(n, level, num=num, den=den, ndim=2)
    means = _hierarchical_means(np.stack([num, den]), n, rng)
    return float(_ratio(num.mean(), den.mean(), means[1])), *_interval(means[0] / means[1], level)


def paired_bootstrap_diff(
    a: np.ndarray, b: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95
) -> tuple[float, float, float, float]:
    """mean(``a``) - mean(``b``) of the same users (U,), with interval and two-sided p: (diff, lo, hi, p).

    p is for the hypothesis of no difference, from the resampled differences moved to mean 0 (Efron & Tibshirani
    1993, ch. 16), counting the sample itself, so p >= 1 / (n + 1).
    """
    a, b = _checked(n, level, a=a, b=b)
    x = a - b
    diffs = _resampled_means(x, n, rng)
    diff = float(x.mean())
    # Rounding must not turn a tie into "less extreme".
    extreme = np.abs(diffs - diff) >= abs(diff) - 1e-12 * max(np.abs(x).max(), 1e-300)
    return diff, *_interval(diffs, level), float((1 + extreme.sum()) / (1 + n))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's (1979) adjusted p-values (m,): rejecting those <= a keeps the chance of any false rejection at a."""
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("holm: p must be a 1-D array of numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def minimum_detectable(std: float, n: int, level: float = 0.95, power: float = 0.8) -> float:
    """Smallest true mean of paired differences of spread ``std`` that ``n`` users show with probability ``power``.

    (z_(1 - a/2) + z_power) std / sqrt(n), the two-sided normal approximation with a = 1 - ``level``.
    """
    if not std >= 0 or n < 1 or not (0 < level < 1 and 0 < power < 1):
        raise ValueError(f"minimum_detectable: std={std}, n={n}, level={level}, power={power} make no sense")
    return float((ndtri((1 + level) / 2) + ndtri(power)) * std / np.sqrt(n))


def ratio_influence(num: np.ndarray, den: np.ndarray) -> np.ndarray:
    """(U,): mean-zero values whose spread / sqrt(U) is the ratio of means' standard error (delta method)."""
    num, den = np.asarray(num, np.float64), np.asarray(den, np.float64)
    return (num - num.mean() / den.mean() * den) / den.mean()


def _ratio(num: float, den: float, resampled_den: np.ndarray) -> float:
    if den == 0 or (np.sign(resampled_den) != np.sign(den)).any():
        raise ValueError("bootstrap ratio: the mean of den is 0 or changes sign among resamples; use a difference")
    return num / den


def _left_out_means(x: np.ndarray) -> np.ndarray:
    """Mean (U,) without each user in turn; of one user, that user's own value."""
    return (x.sum() - x) / (len(x) - 1) if len(x) > 1 else x


def _resampled_means(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Means over the last axis, users, of ``n`` resamples of ``x`` (..., U); the same users in every row: (..., n)."""
    users = x.shape[-1]
    rows = max(1, BLOCK // users)
    blocks = (rng.integers(0, users, (min(rows, n - start), users)) for start in range(0, n, rows))
    return np.concatenate([x[..., block].mean(-1) for block in blocks], axis=-1)


def _hierarchical_means(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Means (..., n) of ``x`` (..., S, U): seeds drawn with replacement, then users of each drawn seed."""
    seeds, users = x.shape[-2:]
    rows, means = max(1, BLOCK // (seeds * users)), []
    for start in range(0, n, rows):
        size = min(rows, n - start)
        seed = rng.integers(0, seeds, (size, seeds, 1))
        means.append(x[..., seed, rng.integers(0, users, (size, seeds, users))].mean((-2, -1)))
    return np.concatenate(means, axis=-1)


def _interval(
    values: np.ndarray, level: float, method: str = "percentile", observed: float = 0.0, left_out: np.ndarray | None = None
) -> tuple[float, float]:
    """Ends of the interval from resampled ``values`` (n,). ``bca`` (Efron 1987) moves the two quantiles by the
    bias of the resamples against ``observed`` and by the skewness of the jackknife's values ``left_out`` (U,)."""
    ends = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca" and np.ptp(values) > 0:
        share = ((values < observed).mean() + (values <= observed).mean()) / 2
        bias = ndtri(np.clip(share, 0.5 / len(values), 1 - 0.5 / len(values)))
        away = left_out.mean() - left_out
        acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
        z = bias + ndtri(ends)
        ends = ndtr(bias + z / (1 - acceleration * z))
    lo, hi = np.quantile(values, ends)
    return float(lo), float(hi)


def _checked(n: int, level: float, method: str = "percentile", *, ndim: int = 1, **arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays as float64, equally long and finite: (U,), or (S, U) with ``ndim`` 2."""
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap: n={n} must be at least 1, and level={level} between 0 and 1")
    if method not in METHODS:
        raise ValueError(f"bootstrap: method={method!r}: choose one of {', '.join(METHODS)}")
    out = [np.asarray(array, dtype=np.float64) for array in arrays.values()]
    for name, array in zip(arrays, out):
        if array.ndim != ndim or array.size == 0 or not np.isfinite(array).all():
            raise ValueError(f"bootstrap: {name} must be a non-empty {ndim}-D array of finite numbers, one a user")
        if array.shape != out[0].shape:
            first = next(iter(arrays))
            raise ValueError(f"bootstrap: {name} has {array.size} users, {first} has {out[0].size}; pair them")
    return out
