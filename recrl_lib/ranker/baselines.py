"""Rankers without gradient training, on the same split.

Popularity, a first-order Markov chain, EASE^R (Steck 2019), and the sum of the last two ideas. Each
yields scores in the form of ``ranking.score_chunks``, so that ``ranking.ranks_of`` ranks them all.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recrl_lib.ranker.ranking import USERS

RIVALS = {"ease": "EASE^R", "ease_chain": "EASE^R + chain"}  # key in metrics: name in tables
EASE_ITEMS = 20_000  # a larger catalogue's item-to-item matrices (3.2 GB each) do not fit
Sequences = Sequence[np.ndarray]
Scores = Iterator[tuple[int, Tensor]]  # (first user, scores (b, I+1) float32, column 0 = -inf)


def closed_form(train: Sequences, n_items: int, sequences: Sequences) -> dict[str, Scores]:
    """Every ranker here by name, learned from ``train`` and asked about ``sequences``.

    Each computes when it is first read. EASE^R needs at most ``EASE_ITEMS`` items.
    """
    rankers = {
        "popularity": popularity_chunks(train, n_items, sequences),
        "Markov chain": markov_chunks(train, n_items, sequences),
    }
    if n_items <= EASE_ITEMS:
        rankers |= {
            RIVALS["ease"]: ease_chunks(train, n_items, sequences),
            RIVALS["ease_chain"]: ease_chain_chunks(train, n_items, sequences),
        }
    return rankers


def popularity_chunks(train: Sequences, n_items: int, sequences: Sequences) -> Scores:
    """How often an item occurs in ``train``, for every user."""
    counts = _popularity(train, n_items)
    return _chunks(sequences, lambda part: np.tile(counts, (len(part), 1)))


def markov_chunks(train: Sequences, n_items: int, sequences: Sequences) -> Scores:
    """How often an item followed, in ``train``, the last item of the user's sequence.

    Popularity, scaled below 1, breaks ties.
    """
    counts = _popularity(train, n_items)
    tie_break = counts / (counts.max() + 1)
    previous = np.concatenate([s[:-1] for s in train])
    following = np.concatenate([s[1:] for s in train])
    order = np.argsort(previous, kind="stable")
    ends = np.cumsum(np.bincount(previous, minlength=n_items + 1))[:-1]
    followers = np.split(following[order], ends)

    def score(part: Sequences) -> np.ndarray:
        seen = [np.bincount(followers[s[-1]], minlength=n_items + 1)[1:] for s in part]
        return np.stack(seen) + tie_break

    return _chunks(sequences, score)


def ease_chunks(
    train: Sequences,
    n_items: int,
    sequences: Sequences,
    regularisation: float = 1000.0,
    window: int = 10,
) -> Scores:
    """EASE^R with the last ``window`` items of a user as the query.

    The published model takes all items as the query and knows no order; recent items tell more
    about the next one.
    """
    weights = ease_weights(train, n_items, regularisation)
    recent = [s[-window:] for s in sequences]
    yield from _chunks(recent, lambda part: _binary(part, n_items) @ weights)


def ease_chain_chunks(
    train: Sequences,
    n_items: int,
    sequences: Sequences,
    regularisation: float = 1000.0,
    chain: float = 0.15,
    recency: float = 0.85,
) -> Scores:
    """EASE^R plus ``chain`` times the Markov chain, for a query that fades by ``recency`` an item.

    The defaults are the best of a search on MovieLens-100K's validation events
    (``runs/reference/ranker_search.csv``).
    """
    weights = ease_weights(train, n_items, regularisation) + chain * chain_weights(train, n_items)

    def score(part: Sequences) -> np.ndarray:
        query = np.zeros((len(part), n_items))
        for row, items in zip(query, part):
            np.maximum.at(row, items - 1, recency ** np.arange(len(items) - 1.0, -1.0, -1.0))
        return query @ weights

    yield from _chunks(sequences, score)


def ease_weights(train: Sequences, n_items: int, regularisation: float) -> np.ndarray:
    """Item-to-item weights B (I, I) of EASE^R (Steck 2019, eq. 8): float64, diagonal 0.

    B minimises ||X - XB||^2 + ``regularisation`` ||B||^2 under diag(B) = 0, for the binary matrix X
    of users x items: with P = (X'X + regularisation I)^-1, B_ij = -P_ij / P_jj.
    """
    gram = np.diag(np.full(n_items, float(regularisation)))
    for start in range(0, len(train), 1024):
        seen = _binary(train[start : start + 1024], n_items)
        gram += seen.T @ seen
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    weights[np.diag_indices(n_items)] = 0.0
    return weights


def chain_weights(
    train: Sequences, n_items: int, window: int = 20, decay: float = 0.9, smoothing: float = 60.0
) -> np.ndarray:
    """Item-to-item weights (I, I) of a Markov chain that looks ``window`` steps ahead: float64.

    Row i - 1 sums ``decay``^(d - 1) over all places where the column's item came d steps after item
    i, over the occurrences of item i plus ``smoothing``, so that what followed a rare item once
    says little.
    """
    weights = np.zeros((n_items, n_items))
    for distance in range(1, window + 1):
        previous = np.concatenate([s[:-distance] for s in train]) - 1
        following = np.concatenate([s[distance:] for s in train]) - 1
        np.add.at(weights, (previous, following), decay ** (distance - 1))
    occurrences = np.bincount(np.concatenate(train) - 1, minlength=n_items)
    return weights / (occurrences + smoothing)[:, None]


def _chunks(sequences: Sequences, score: Callable[[Sequences], np.ndarray]) -> Scores:
    """``score(part)`` (b, I) for ``USERS`` sequences at a time, behind a column for padding."""
    for start in range(0, len(sequences), USERS):
        scores = torch.from_numpy(score(sequences[start : start + USERS])).float()
        yield start, torch.nn.functional.pad(scores, (1, 0), value=-torch.inf)


def _binary(sequences: Sequences, n_items: int) -> np.ndarray:
    """Which items are in each sequence: float64 (len(sequences), I), column i - 1 for item i."""
    out = np.zeros((len(sequences), n_items))
    rows = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    out[rows, np.concatenate(sequences) - 1] = 1.0
    return out


def _popularity(train: Sequences, n_items: int) -> np.ndarray:
    """Occurrences (I,) of items 1..I."""
    return np.bincount(np.concatenate(train), minlength=n_items + 1)[1:]
