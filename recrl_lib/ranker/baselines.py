"""Rankers without gradient training: popularity, a Markov chain, EASE^R, the sum of the last two.

Each learns from sequences of items and gives a function from b sequences to scores (b, I), column
i - 1 for item i.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from recrl_lib.ranker.ranking import Sequences, chunks

RIVALS = {"ease": "EASE^R", "ease_chain": "EASE^R + chain"}  # key in metrics: name in tables
EASE_ITEMS = 20_000  # a larger catalogue's item-to-item matrices (3.2 GB each) do not fit
Score = Callable[[Sequences], np.ndarray]


def closed_form(
    train: Sequences, n_items: int, sequences: Sequences
) -> dict[str, Iterator[tuple[int, Tensor]]]:
    """Every ranker here by name, learned from ``train`` and asked about ``sequences``: scores as
    from ``ranking.score_chunks``, computed when they are read.

    EASE^R needs at most ``EASE_ITEMS`` items.
    """
    rankers = {"popularity": popularity, "Markov chain": markov}
    if n_items <= EASE_ITEMS:
        rankers |= {RIVALS["ease"]: ease, RIVALS["ease_chain"]: ease_chain}

    def scored(ranker: Callable[[Sequences, int], Score]) -> Iterator[tuple[int, Tensor]]:
        score = ranker(train, n_items)
        for part in chunks(len(sequences), n_items):
            scores = torch.from_numpy(score(sequences[part])).float()
            yield part.start, torch.nn.functional.pad(scores, (1, 0), value=-torch.inf)

    return {name: scored(ranker) for name, ranker in rankers.items()}


def popularity(train: Sequences, n_items: int) -> Score:
    """How often an item occurs in ``train``, for every user."""
    counts = np.bincount(np.concatenate(train), minlength=n_items + 1)[1:]
    return lambda part: np.tile(counts, (len(part), 1))


def markov(train: Sequences, n_items: int) -> Score:
    """How often an item followed the user's last one in ``train``; popularity, scaled below 1,
    breaks ties."""
    counts = np.bincount(np.concatenate(train), minlength=n_items + 1)[1:]
    pairs = [np.concatenate([s[part] for s in train]) for part in (slice(-1), slice(1, None))]
    ones = np.ones(len(pairs[0]))
    followed = csr_array((ones, tuple(pairs)), shape=(n_items + 1, n_items + 1))
    tie_break = counts / (counts.max() + 1)
    return lambda part: followed[[s[-1] for s in part]].toarray()[:, 1:] + tie_break


def ease(train: Sequences, n_items: int, regularisation: float = 1000.0, window: int = 10) -> Score:
    """EASE^R asked with a user's last ``window`` items, which tell more about the next one than
    all items do, as published."""
    weights = ease_weights(train, n_items, regularisation)
    return lambda part: _binary([s[-window:] for s in part], n_items) @ weights


def ease_chain(
    train: Sequences,
    n_items: int,
    regularisation: float = 1000.0,
    chain: float = 0.15,
    recency: float = 0.85,
) -> Score:
    """EASE^R plus ``chain`` times the Markov chain, for a query that fades by ``recency`` an item;
    the defaults are the best on MovieLens-100K's validation (``runs/reference/ranker_search.csv``).
    """
    weights = ease_weights(train, n_items, regularisation) + chain * chain_weights(train, n_items)

    def score(part: Sequences) -> np.ndarray:
        query = np.zeros((len(part), n_items))
        for row, items in zip(query, part):
            np.maximum.at(row, items - 1, recency ** np.arange(len(items) - 1.0, -1.0, -1.0))
        return query @ weights

    return score


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
    i, over i's occurrences plus ``smoothing``: what followed a rare item says little.
    """
    weights = np.zeros((n_items, n_items))
    for distance in range(1, window + 1):
        previous = np.concatenate([s[:-distance] for s in train]) - 1
        following = np.concatenate([s[distance:] for s in train]) - 1
        np.add.at(weights, (previous, following), decay ** (distance - 1))
    occurrences = np.bincount(np.concatenate(train) - 1, minlength=n_items)
    return weights / (occurrences + smoothing)[:, None]


def _binary(sequences: Sequences, n_items: int) -> np.ndarray:
    """Which items are in each sequence: float64 (len(sequences), I)."""
    out = np.zeros((len(sequences), n_items))
    for row, items in zip(out, sequences):
        row[items - 1] = 1.0
    return out
