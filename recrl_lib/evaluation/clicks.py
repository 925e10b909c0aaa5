"""Simulated clicks: a stated model, no evidence about people.

A user u who sees item i at position k of the list with an explanation of quality q clicks with
probability

    p = sigmoid(bias + alpha z(s_ui) + beta q + b_u + gamma / log2(1 + k)),   b_u ~ Normal(0,
    user_std^2)

where z(s_ui) is the *base* ranker's score, standardised over the items that u has not seen, q in
[0, 1] the judge's quality (never the reward), and alpha, beta, gamma, bias and user_std are
parameters (``sim_*``). All arms share the draw of b_u, so that nothing but the text differs between
them. The lift of an arm is the ratio of its mean p to the base arm's: expected clicks, which have
the mean of sampled clicks and less variance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from recrl_lib.params import Params
from recrl_lib.scoring.claims import words

FACTORS = np.geomspace(0.5, 2.0, 5)  # by which the sensitivity table multiplies a weight
ASSUMPTIONS = (("alpha", "beta"), ("alpha", "user_std"), ("beta", "user_std"))


@dataclass(frozen=True)
class ClickModel:
    """Weights in logits: score, quality, intercept, spread of the users' own bias, position."""

    alpha: float = 0.5
    beta: float = 2.0
    bias: float = -2.0
    user_std: float = 0.5
    position_weight: float = 0.5

    def __post_init__(self):
        weights = [self.alpha, self.beta, self.bias, self.user_std, self.position_weight]
        if not np.isfinite(weights).all() or self.user_std < 0:
            raise ValueError(f"{self}: weights must be finite and user_std not negative")

    @classmethod
    def of(cls, params: Params) -> Self:
        """The model that a run's ``sim_*`` parameters state."""
        names = ("sim_alpha", "sim_beta", "sim_bias", "sim_user_std", "sim_position")
        return cls(*(getattr(params, name) for name in names))

    def probabilities(
        self, score: ArrayLike, quality: ArrayLike, position: ArrayLike, user_noise: np.ndarray
    ) -> np.ndarray:
        """Click probability (n,) of each user.

        Args:
            score: the ranker's, standardised (n,).
            quality: in [0, 1], (n,).
            position: in the list, from 1, (n,).
            user_noise: standard normal (n,), the same in every arm; ``user_std`` scales it.

        Raises:
            ValueError: naming the argument that is not finite, out of range or of another length.
        """
        given = {"score": score, "quality": quality, "position": position}
        for name, values in given.items():
            if np.shape(values) != user_noise.shape or not np.all(np.isfinite(values)):
                raise ValueError(
                    f"click model: {name} must be finite, one for each of {len(user_noise)} users"
                )
        if np.min(quality) < 0 or np.max(quality) > 1 or np.min(position) < 1:
            raise ValueError("click model: quality must lie in [0, 1], and position counts from 1")
        discount = self.position_weight / np.log2(1 + np.asarray(position))
        weighted = self.alpha * np.asarray(score) + self.beta * np.asarray(quality)
        return sigmoid(self.bias + weighted + self.user_std * user_noise + discount)


def sigmoid(x: ArrayLike) -> np.ndarray:
    """Logistic function without overflow at either end."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def standardised_score(scores: np.ndarray, items: np.ndarray) -> np.ndarray:
    """z-score (n,) of ``scores[i, items[i]]`` within row i; masked entries (-inf: padding, seen
    items) are left out."""
    kept = np.ma.masked_invalid(np.asarray(scores, np.float64))
    chosen = kept[np.arange(len(kept)), items]
    if np.ma.getmaskarray(chosen).any():
        raise ValueError("standardised_score: an item is masked in its user's own scores")
    std = kept.std(1).filled(0)
    return np.divide((chosen - kept.mean(1)).filled(0), std, out=np.zeros(len(kept)), where=std > 0)


def sensitivity(
    model: ClickModel, score: np.ndarray, user_noise: np.ndarray, table: pd.DataFrame, arm: str
) -> pd.DataFrame:
    """Lift of ``arm`` with two assumptions at a time multiplied by each of ``FACTORS``.

    ``table``: rows with arm, quality and position, in the base arm's order of users. Returns 75
    rows with columns arm, first, second, first_factor, second_factor, lift.
    """
    base, mine = (table[table["arm"] == name] for name in ("base", arm))
    rows = []
    for first, second in ASSUMPTIONS:
        for i, j in product(FACTORS, FACTORS):
            weights = {first: i * getattr(model, first), second: j * getattr(model, second)}
            changed, place = replace(model, **weights), base["position"]
            ctr = [
                changed.probabilities(score, part["quality"], place, user_noise).mean()
                for part in (mine, base)
            ]
            rows.append((arm, first, second, i, j, ctr[0] / ctr[1]))
    columns = ["arm", "first", "second", "first_factor", "second_factor", "lift"]
    return pd.DataFrame(rows, columns=columns)


# --- the published account's click model (arXiv 2601.03608), where quality is length alone


def paper_quality(text: str) -> float:
    """min(words / 40, 1)."""
    return min(len(words(text)) / 40, 1.0)


def paper_lift(texts: Sequence[str], before: Sequence[str], base_click=0.5, beta=0.5) -> float:
    """Ratio of mean sigmoid(logit(``base_click``) + beta q), ``base_click`` being the click without
    a text."""
    bias = np.log(base_click / (1 - base_click))
    after, first = (
        sigmoid(bias + beta * np.array([paper_quality(t) for t in side])).mean()
        for side in (texts, before)
    )
    return float(after / first)


def paper_ceiling(base_click: float = 0.5, beta: float = 0.5) -> float:
    """Largest lift that q from 0 to 1 can give: sigmoid(logit(p) + beta) / p, 1.245 at the
    published settings."""
    if not 0 < base_click < 1:
        raise ValueError(f"base_click={base_click}: must lie between 0 and 1")
    return float(sigmoid(np.log(base_click / (1 - base_click)) + beta) / base_click)
