"""A stated click model: p = sigmoid(bias + alpha score + beta quality + u_user + position_weight / log2(1 + position)).

``score`` is the ranker's, standardised over the user's candidates; ``quality`` the judge's, never the
reward's. Arms share their random numbers (one ``Noise`` for all), and the lift is a ratio of *expected*
clicks, so that nothing but score and quality differs between them. A synthetic model says how a gain in
quality would show in clicks under stated assumptions; it is no evidence about people.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recrl_lib.evaluation.stats import bootstrap_ratio
from recrl_lib.scoring.claims import words

FACTORS = np.geomspace(0.5, 2.0, 5)  # of a weight, in the sensitivity table
ASSUMPTIONS = (("alpha", "beta"), ("alpha", "user_std"), ("beta", "user_std"))  # its three panels


@dataclass(frozen=True)
class Noise:
    """What the arms share: each user's own bias (n,), and the uniform (n,) that turns a probability into a click."""

    user_bias: np.ndarray
    uniform: np.ndarray


@dataclass(frozen=True)
class ClickModel:
    """Weights in logits: score, quality, intercept, spread of the users' own bias, position."""

    alpha: float = 0.5
    beta: float = 2.0
    bias: float = -2.0
    user_std: float = 0.5
    position_weight: float = 0.5

    def __post_init__(self):
        if (
            not np.isfinite(
                [self.alpha, self.beta, self.bias, self.user_std, self.position_weight]
            ).all()
            or self.user_std < 0
        ):
            raise ValueError(f"{self}: weights must be finite and user_std not negative")

    def draw(self, n_users: int, rng: np.random.Generator) -> Noise:
        """One draw for all arms: entry i belongs to the same user in each of them."""
        return Noise(rng.normal(0.0, self.user_std, n_users), rng.random(n_users))

    def probabilities(
        self, score: np.ndarray, quality: np.ndarray, position: np.ndarray, noise: Noise
    ) -> np.ndarray:
        """Click probability (n,) of each user: standardised score, quality in [0, 1], 1-based position, (n,) each."""
        score, quality, position = (np.asarray(a, np.float64) for a in (score, quality, position))
        for name, array in (("score", score), ("quality", quality), ("position", position)):
            if array.shape != noise.user_bias.shape or not np.isfinite(array).all():
                raise ValueError(
                    f"click model: {name} must be finite, one a user ({len(noise.user_bias)}), "
                    f"not of shape {array.shape}"
                )
        if (quality < 0).any() or (quality > 1).any():
            raise ValueError("click model: quality must lie in [0, 1]")
        if (position < 1).any():
            raise ValueError("click model: position counts from 1")
        logit = (
            self.bias
            + self.alpha * score
            + self.beta * quality
            + noise.user_bias
            + self.position_weight / np.log2(1 + position)
        )
        return sigmoid(logit)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function without overflow at either end."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def clicks(probability: np.ndarray, noise: Noise) -> np.ndarray:
    """bool (n,): the clicks of one draw. Under common noise a higher probability never loses a click."""
    return noise.uniform < probability


def standardised_score(scores: np.ndarray, items: np.ndarray) -> np.ndarray:
    """z-score (n,) of ``scores[i, items[i]]`` within row i; entries that are not finite (padding, seen) are skipped."""
    scores = np.asarray(scores, np.float64)
    candidates = np.isfinite(scores)
    chosen = scores[np.arange(len(scores)), items]
    if not np.isfinite(chosen).all():
        raise ValueError("standardised_score: an item is masked in its user's own scores")
    count = candidates.sum(1)
    kept = np.where(candidates, scores, 0.0)
    mean = kept.sum(1) / count
    std = np.sqrt((np.where(candidates, kept - mean[:, None], 0.0) ** 2).sum(1) / count)
    return np.divide(chosen - mean, std, out=np.zeros(len(scores)), where=std > 0)


def ctr_lift(
    p_arm: np.ndarray, p_base: np.ndarray, n_boot: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """(lift, lo, hi): ratio of the arms' mean click probabilities, 95 % percentile interval, paired by user.

    Probabilities, not sampled clicks: the expectation over the click's own coin has the same mean and less variance.
    """
    return bootstrap_ratio(p_arm, p_base, n_boot, rng)


def sensitivity(
    model: ClickModel,
    score: np.ndarray,
    arm: np.ndarray,
    base: np.ndarray,
    position: np.ndarray,
    noise: Noise,
    factors: np.ndarray = FACTORS,
) -> np.ndarray:
    """Lift (3, F, F) over multiples of two of the model's assumptions at a time, the third as stated.

    Entry [0, i, j]: alpha times ``factors[i]``, beta times ``factors[j]``; [1]: alpha and the users' spread;
    [2]: beta and the spread. ``arm`` and ``base`` are qualities (n,); all else as in ``ClickModel.probabilities``.
    """
    fixed = model.bias + model.position_weight / np.log2(1 + np.asarray(position, np.float64))
    f = np.asarray(factors, np.float64)
    one = np.ones_like(f)
    grids = [
        (f[:, None], f[None], one[None]),
        (f[:, None], one[None], f[None]),
        (one[None], f[:, None], f[None]),
    ]

    def clicked(quality: np.ndarray, a, b, u) -> np.ndarray:
        logit = (
            fixed
            + (model.alpha * a)[..., None] * np.asarray(score)
            + (model.beta * b)[..., None] * np.asarray(quality)
            + u[..., None] * noise.user_bias
        )
        return sigmoid(logit).mean(-1)

    return np.stack([clicked(arm, *grid) / clicked(base, *grid) for grid in grids])


# --- the published account's variant ------------------------------------------------------------------


def paper_quality(text: str) -> float:
    """min(words / 40, 1): the quality of the published account's simulated click is length alone."""
    return min(len(words(text)) / 40, 1.0)


def paper_lift(
    texts: Sequence[str], before: Sequence[str], base_click: float = 0.5, beta: float = 0.5
) -> float:
    """Lift of ``texts`` over ``before`` in the published account's click model, where quality is length alone.

    mean sigmoid(logit(``base_click``) + beta q) of the one over that of the other, ``base_click`` being the click without a word.
    """
    bias = np.log(base_click / (1 - base_click))
    clicked = [
        sigmoid(bias + beta * np.array([paper_quality(t) for t in side])).mean()
        for side in (texts, before)
    ]
    return float(clicked[0] / clicked[1])


def paper_ceiling(base_click: float = 0.5, beta: float = 0.5) -> float:
    """Largest lift that quality can give when it goes from 0 to 1 at ``base_click``: sigmoid(logit(p) + beta) / p.

    At the published settings sigmoid(.5) / .5 = 1.245, so a lift of 1.225 needs length alone.
    """
    if not 0 < base_click < 1:
        raise ValueError(f"base_click={base_click}: must lie between 0 and 1")
    return float(sigmoid(np.log(base_click / (1 - base_click)) + beta) / base_click)
