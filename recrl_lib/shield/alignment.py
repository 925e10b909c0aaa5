"""A closed-form linear map from tuned item vectors back to the base vectors (mode ``align``)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Alignment:
    """``t -> old_mean + (t - new_mean) M``: takes tuned item vectors back to the base vectors."""

    matrix: Tensor  # M (d, d)
    old_mean: Tensor  # (d,)
    new_mean: Tensor  # (d,)
    ridge: float  # chosen on items kept out of the fit

    def __call__(self, vectors: Tensor) -> Tensor:
        """(I+1, d) -> (I+1, d); row 0, the padding, stays zero."""
        moved = self.old_mean + (vectors.double() - self.new_mean) @ self.matrix
        moved[0] = 0.0
        return moved.to(vectors)


def fit_alignment(
    new: Tensor,
    old: Tensor,
    items: np.ndarray,
    rng: np.random.Generator,
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
) -> Alignment:
    """Ridge regression towards the identity: least ``|X M - Y|^2 + ridge tr(X^T X)/d |M - I|^2``.

    X and Y are the centred vectors ``new`` and ``old`` (I+1, d) of ``items``. This is the aligner
    of bc-emb (Hu et al. 2022, arXiv 2206.03040) in closed form. The ridge with the least error on a
    fifth of the items is used for the fit on all of them.
    """

    def fit(rows: np.ndarray, ridge: float) -> Alignment:
        x, y = new[rows].double(), old[rows].double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        gram = x.T @ x
        loading = ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
        matrix = torch.linalg.solve(gram + loading, x.T @ y + loading)
        return Alignment(matrix, mean_y, mean_x, ridge)

    shuffled = rng.permutation(items)
    kept, fitted = shuffled[: len(items) // 5], shuffled[len(items) // 5 :]
    errors = {ridge: float((fit(fitted, ridge)(new)[kept] - old[kept]).norm()) for ridge in ridges}
    return fit(items, min(errors, key=lambda ridge: errors[ridge]))
