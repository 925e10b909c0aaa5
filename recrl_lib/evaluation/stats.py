"""Intervals and tests over users, and over seeds and users: paired where arms share users.

Bootstrap intervals (Efron & Tibshirani 1993), ``percentile`` or ``bca``; seeds and users resampled together for
several seeds; Holm's correction for several questions; the smallest effect that so many users can show. Resamples are
drawn in blocks, so that memory stays at a few times ``BLOCK`` numbers whatever their number.
"""

from collections.abc import Mapping

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import spearmanr

BLOCK = 1_000_000  # user indices drawn at a time
METHODS = ("percentile", "bca")


def bracketed(values: Mapping[str, float], key: str, spec: str) -> str:
    """ "0.25 [0.10, 0.40]": ``values[key]`` with its interval ``<key>_lo`` to ``<key>_hi``, each written by the format ``spec``."""
    mean, lo, hi = (f"{values[f'{key}{end}']:{spec}}" for end in ("", "_lo", "_hi"))
    return f"{mean} [{lo}, {hi}]"


def bootstrap_mean(
    x: np.ndarray, n: int, rng: np.random.Generator, level: float = 0.95, method: str = "percentile"
) -> tuple[float, float, float]:
    """Mean of ``x`` (U,) and its interval from ``n`` resamples of users: (mean, lo, hi)."""
    (x,) = _checked(n, level, method, x=x)
    means = _resampled_means(x, n, rng)
    return float(x.mean()), *_interval(means, level, method, x.mean(), _left_out_means(x))


def bootstrap_ratio(
    num: np.ndarray,
    den: np.ndarray,
    n: int,
    rng: np.random.Generator,
    level: float = 0.95,
    method: str = "percentile",
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


def crossed_mean(
    x: np.ndarray,
    seeds: np.ndarray,
    users: np.ndarray,
    n: int,
    rng: np.random.Generator,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of ``x`` (N,), one value a seed and user, and its interval for new seeds as well as new users: (mean, lo, hi).

    ``seeds`` and ``users`` (N,) are labels; a user that several seeds share is one user. Both are resampled, and a
    value counts as often as its seed times as often as its user (the pigeonhole bootstrap, Owen 2007,
    doi 10.1214/07-AOAS122). Drawing users anew for each seed would count their spread once for each seed that shares
    them. Of one seed this is ``bootstrap_mean``. Where seeds differ and are few the interval is too narrow (three have only
    10 different resamples): say how many there were. Where neither seeds nor users have an effect of their own it is too
    wide, by up to the root of 3.
    """
    (x,) = _checked(n, level, x=x)
    if len(seeds) != len(x) or len(users) != len(x):
        raise ValueError(
            f"crossed_mean: {len(x)} values, {len(seeds)} seeds, {len(users)} users: give a label of each a value"
        )
    labels = [np.unique(of, return_inverse=True)[1] for of in (seeds, users)]
    rows, means = max(1, BLOCK // len(x)), []
    for start in range(0, n, rows):
        weights = 1.0
        for label in labels:
            count = label.max() + 1
            drawn = rng.integers(0, count, (min(rows, n - start), count))
            times = np.zeros((len(drawn), count))
            np.add.at(times, (np.arange(len(drawn))[:, None], drawn), 1)
            weights = weights * times[:, label]
        total = weights.sum(
            -1
        )  # 0 where no drawn seed has a drawn user: such a resample says nothing
        means.append((weights @ x)[total > 0] / total[total > 0])
    return float(x.mean()), *_interval(np.concatenate(means), level)


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
        raise ValueError(
            f"minimum_detectable: std={std}, n={n}, level={level}, power={power} make no sense"
        )
    return float((ndtri((1 + level) / 2) + ndtri(power)) * std / np.sqrt(n))


def rank_correlation(
    a: np.ndarray, b: np.ndarray, level: float = 0.95
) -> tuple[float, float, float]:
    """Spearman's rank correlation of ``a`` and ``b`` (n,), and its interval: (rho, lo, hi).

    The interval is Bonett and Wright's (2000, doi 10.1007/BF02294183): normal in atanh(rho), with the variance
    (1 + rho^2 / 2) / (n - 3). With few pairs and rho near 1 it is somewhat narrow (14 pairs, .95: it covers 93 % at level .95).
    It has no width where the orders are equal or opposite.
    """
    a, b = _checked(1, level, a=a, b=b)
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError(
            f"rank_correlation: needs four pairs or more, not all equal on either side; there are {len(a)}"
        )
    rho = float(np.clip(spearmanr(a, b).statistic, -1, 1))
    if abs(rho) > 1 - 1e-12:
        return rho, rho, rho
    reach = ndtri((1 + level) / 2) * np.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    return rho, float(np.tanh(np.arctanh(rho) - reach)), float(np.tanh(np.arctanh(rho) + reach))


def ratio_influence(num: np.ndarray, den: np.ndarray) -> np.ndarray:
    """(U,): mean-zero values whose spread / sqrt(U) is the ratio of means' standard error (delta method)."""
    num, den = np.asarray(num, np.float64), np.asarray(den, np.float64)
    return (num - num.mean() / den.mean() * den) / den.mean()


def _ratio(num: float, den: float, resampled_den: np.ndarray) -> float:
    if den == 0 or (np.sign(resampled_den) != np.sign(den)).any():
        raise ValueError(
            "bootstrap ratio: the mean of den is 0 or changes sign among resamples; use a difference"
        )
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


def _interval(
    values: np.ndarray,
    level: float,
    method: str = "percentile",
    observed: float = 0.0,
    left_out: np.ndarray | None = None,
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


def _checked(
    n: int, level: float, method: str = "percentile", **arrays: np.ndarray
) -> list[np.ndarray]:
    """The arrays as float64 (U,), equally long and finite."""
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap: n={n} must be at least 1, and level={level} between 0 and 1")
    if method not in METHODS:
        raise ValueError(f"bootstrap: method={method!r}: choose one of {', '.join(METHODS)}")
    out = [np.asarray(array, dtype=np.float64) for array in arrays.values()]
    for name, array in zip(arrays, out):
        if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
            raise ValueError(
                f"bootstrap: {name} must be a non-empty 1-D array of finite numbers, one a user"
            )
        if array.shape != out[0].shape:
            first = next(iter(arrays))
            raise ValueError(
                f"bootstrap: {name} has {array.size} users, {first} has {out[0].size}; pair them"
            )
    return out
