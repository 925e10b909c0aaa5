"""Rankers without gradient training, on the same split: popularity, first-order Markov chain, EASE^R.

Each yields scores in the form of ``ranker.score_chunks``, so that ``ranker.ranks_of`` ranks them all alike.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

EASE_ITEMS = 20_000  # the largest catalogue whose item-to-item matrices (3.2 GB each) fit an ordinary machine


def popularity_chunks(
    train: Sequence[np.ndarray], n_items: int, n_users: int, chunk: int = 256
) -> Iterator[tuple[int, Tensor]]:
    """How often an item occurs in ``train``, for every user."""
    row = _popularity(train, n_items)
    for start in range(0, n_users, chunk):
        yield start, row.repeat(min(chunk, n_users - start), 1)


def markov_chunks(
    train: Sequence[np.ndarray], n_items: int, sequences: Sequence[np.ndarray], chunk: int = 256
) -> Iterator[tuple[int, Tensor]]:
    """How often an item followed, in ``train``, the last item of the user's sequence.

    Popularity, scaled below 1, breaks ties.
    """
    popularity = _popularity(train, n_items)
    previous = np.concatenate([s[:-1] for s in train])
    following = np.concatenate([s[1:] for s in train])
    order = np.argsort(previous, kind="stable")
    followers = np.split(following[order], np.cumsum(np.bincount(previous, minlength=n_items + 1))[:-1])
    for start in range(0, len(sequences), chunk):
        last = [s[-1] for s in sequences[start : start + chunk]]
        counts = np.stack([np.bincount(followers[item], minlength=n_items + 1) for item in last])
        yield start, torch.from_numpy(counts).float() + popularity / (popularity.max() + 1)


def ease_weights(train: Sequence[np.ndarray], n_items: int, regularisation: float, chunk: int = 1024) -> np.ndarray:
    """Item-to-item weights B (I, I) of EASE^R (Steck 2019, eq. 8): float64, diagonal 0.

    B minimises ||X - XB||^2 + ``regularisation`` ||B||^2 under diag(B) = 0, for the binary matrix X of users x items:
    with P = (X'X + regularisation I)^-1, B_ij = -P_ij / P_jj. Memory is a few I x I matrices, so this is for
    catalogues of up to some 10,000 items.
    """
    gram = np.diag(np.full(n_items, float(regularisation)))
    for start in range(0, len(train), chunk):
        seen = _binary(train[start : start + chunk], n_items)
        gram += seen.T @ seen
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    weights[np.diag_indices(n_items)] = 0.0
    return weights


def ease_chunks(
    train: Sequence[np.ndarray], n_items: int, sequences: Sequence[np.ndarray],
    regularisation: float = 1000.0, window: int = 10, chunk: int = 256,
) -> Iterator[tuple[int, Tensor]]:
    """EASE^R with the last ``window`` items of a user as the query.

    The published model takes all items as the query and knows no order; recent items tell more about the next one.
    """
    weights = ease_weights(train, n_items, regularisation)
    for start in range(0, len(sequences), chunk):
        part = [s[-window:] for s in sequences[start : start + chunk]]
        scores = np.full((len(part), n_items + 1), -np.inf, dtype=np.float32)
        scores[:, 1:] = _binary(part, n_items) @ weights
        yield start, torch.from_numpy(scores)


def _binary(sequences: Sequence[np.ndarray], n_items: int) -> np.ndarray:
    """Which items are in each sequence: float64 (len(sequences), I), column i - 1 for item i."""
    out = np.zeros((len(sequences), n_items))
    rows = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    out[rows, np.concatenate(sequences) - 1] = 1.0
    return out


def _popularity(train: Sequence[np.ndarray], n_items: int) -> Tensor:
    counts = torch.from_numpy(np.bincount(np.concatenate(train), minlength=n_items + 1)).float()
    counts[0] = -torch.inf
    return counts
