"""Simulated clicks: a stated model, no evidence about people.

A user u who sees item i at position k of the list with an explanation of quality q clicks with
probability

    p = sigmoid(bias + alpha z(s_ui) + beta q + b_u + gamma / log2(1 + k)),   b_u ~ N(0, user_std^2)

where z(s_ui) is the *base* ranker's score, standardised over the items that u has not seen, and q
in [0, 1] the judge's quality (never the reward). All arms share the draw of b_u, so that nothing
but the text differs between them. The lift of an arm is the ratio of its mean p to the base arm's:
expected clicks, which have the mean of sampled clicks and less variance.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from recrl_lib.params import Params


@dataclass(frozen=True)
class ClickModel:
    """Weights in logits: score, quality, intercept, spread of the users' own bias, position."""

    alpha: float
    beta: float
    bias: float
    user_std: float
    position_weight: float

    @classmethod
    def of(cls, params: Params) -> Self:
        """The model that a run's ``sim_*`` parameters state."""
        weights = (params.sim_alpha, params.sim_beta, params.sim_bias)
        return cls(*weights, params.sim_user_std, params.sim_position)

    def probabilities(
        self, score: ArrayLike, quality: ArrayLike, position: ArrayLike, user_noise: np.ndarray
    ) -> np.ndarray:
        """Click probability (n,) of each user, from a standardised score, a quality in [0, 1], a
        position from 1, and standard normal noise, the same in every arm: (n,) each."""
        score, quality, position = (np.asarray(x, np.float64) for x in (score, quality, position))
        known = np.isfinite(score) & (quality >= 0) & (quality <= 1) & (position >= 1)
        if not known.all():
            raise ValueError("click model: scores finite, quality in [0, 1], positions from 1")
        weighted = self.alpha * score + self.beta * quality
        discount = self.position_weight / np.log2(1 + position)
        return expit(self.bias + weighted + self.user_std * user_noise + discount)


def standardised_score(scores: np.ndarray, items: np.ndarray) -> np.ndarray:
    """z-score (n,) of ``scores[i, items[i]]`` within row i; masked entries (-inf: padding, seen
    items) are left out."""
    kept = np.ma.masked_invalid(np.asarray(scores, np.float64))
    chosen = kept[np.arange(len(kept)), items]
    if np.ma.getmaskarray(chosen).any():
        raise ValueError("standardised_score: an item is masked in its user's own scores")
    std = kept.std(1).filled(0)
    return np.divide((chosen - kept.mean(1)).filled(0), std, out=np.zeros(len(kept)), where=std > 0)
