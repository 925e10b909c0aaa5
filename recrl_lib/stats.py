"""Bootstrap intervals over users (Efron & Tibshirani 1993): percentile intervals, paired where arms share users.

Resamples are drawn in blocks, so that memory stays at a few times ``BLOCK`` numbers whatever their number.
"""

import numpy as np

BLOCK = 1_000_000  # user indices drawn at a time


def bootstrap_mean(x: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of ``x`` (U,) and its percentile interval from ``n`` resamples of users: (mean, lo, hi)."""
    (x,) = _checked(n, level, x=x)
    means = _resampled_means(x, n, rng)
    return float(x.mean()), *_interval(means, level)


def bootstrap_ratio(
    num: np.ndarray, den: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95
) -> tuple[float, float, float]:
    """mean(``num``) / mean(``den``), resampled jointly by user, as both are (U,) of the same users: (ratio, lo, hi).

    Raises ``ValueError`` where the mean of ``den`` is 0 or changes sign among resamples: the ratio then has no
    percentile interval.
    """
    num, den = _checked(n, level, num=num, den=den)
    means = _resampled_means(np.stack([num, den]), n, rng)
    if den.mean() == 0 or (np.sign(means[1]) != np.sign(den.mean())).any():
        raise ValueError("bootstrap_ratio: the mean of den is 0 or changes sign among resamples; use a difference")
    return float(num.mean() / den.mean()), *_interval(means[0] / means[1], level)


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


def _resampled_means(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Means over the last axis, users, of ``n`` resamples of ``x`` (..., U); the same users in every row: (..., n)."""
    users = x.shape[-1]
    rows = max(1, BLOCK // users)
    blocks = (rng.integers(0, users, (min(rows, n - start), users)) for start in range(0, n, rows))
    return np.concatenate([x[..., block].mean(-1) for block in blocks], axis=-1)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    lo, hi = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def _checked(n: int, level: float, **arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays as float64 (U,), equally long and finite."""
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap: n={n} must be at least 1, and level={level} between 0 and 1")
    out = [np.asarray(array, dtype=np.float64) for array in arrays.values()]
    for name, array in zip(arrays, out):
        if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
            raise ValueError(f"bootstrap: {name} must be a non-empty 1-D array of finite numbers, one a user")
        if array.shape != out[0].shape:
            first = next(iter(arrays))
            raise ValueError(f"bootstrap: {name} has {array.size} users, {first} has {out[0].size}; pair them")
    return out
