"""Simulated clicks: a stated model, no evidence about people.

A user u who sees item i at position k of the list with an explanation of quality q clicks with
probability

    p = sigmoid(bias + alpha z(s_ui) + beta q + b_u + gamma / log2(1 + k)),   b_u ~ N(0, user_std^2)

where z(s_ui) is the *base* ranker's score, standardised over the items that u has not seen, q in
[0, 1] the judge's quality (never the reward), and alpha, beta, gamma, bias and user_std are
parameters (``sim_*``). All arms share the draw of b_u, so that nothing but the text differs between
them. The lift of an arm is the ratio of its mean p to the base arm's: expected clicks, which have
the mean of sampled clicks and less variance.
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
            score: The ranker's, standardised (n,).
            quality: In [0, 1], (n,).
            position: In the list, from 1, (n,).
            user_noise: Standard normal (n,), the same in every arm; ``user_std`` scales it.

        Raises:
            ValueError: Names the argument that is out of range or of another length.
        """
        given = {"score": score, "quality": quality, "position": position}
        given = {name: np.asarray(values, np.float64) for name, values in given.items()}
        bounds = {"score": (-np.inf, np.inf), "quality": (0, 1), "position": (1, np.inf)}
        for name, values in given.items():
            low, high = bounds[name]
            inside = np.isfinite(values) & (values >= low) & (values <= high)
            if values.shape != user_noise.shape or not inside.all():
                wanted = f"one finite number in [{low}, {high}] for each of {len(user_noise)} users"
                raise ValueError(f"click model: {name} must be {wanted}")
        discount = self.position_weight / np.log2(1 + given["position"])
        weighted = self.alpha * given["score"] + self.beta * given["quality"]
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
