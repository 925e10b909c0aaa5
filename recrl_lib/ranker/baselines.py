"""Rankers without gradient training, on the same split: popularity, first-order Markov chain, EASE^R, and the last two as one.

Each yields scores in the form of ``ranker.score_chunks``, so that ``ranker.ranks_of`` ranks them all alike.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recrl_lib.paths import REFERENCE

RIVALS = {
    "ease": "EASE^R",
    "ease_chain": "EASE^R + chain",
}  # those that a trained ranker is compared with, user by user
EASE_ITEMS = 20_000  # the largest catalogue whose item-to-item matrices (3.2 GB each) fit an ordinary machine


def closed_form(
    train: Sequence[np.ndarray], n_items: int, sequences: Sequence[np.ndarray]
) -> dict[str, Iterator[tuple[int, Tensor]]]:
    """Every ranker here, by name, learned from ``train`` and asked about ``sequences``; EASE^R for up to ``EASE_ITEMS`` items.

    Each computes when it is first read.
    """
    rankers = {
        "popularity": popularity_chunks(train, n_items, len(sequences)), "Markov chain": markov_chunks(train, n_items, sequences),
    }  # fmt: skip
    if n_items <= EASE_ITEMS:
        rankers |= {
            RIVALS["ease"]: ease_chunks(train, n_items, sequences),
            RIVALS["ease_chain"]: ease_chain_chunks(train, n_items, sequences),
        }
    return rankers


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
    followers = np.split(
        following[order], np.cumsum(np.bincount(previous, minlength=n_items + 1))[:-1]
    )
    for start in range(0, len(sequences), chunk):
        last = [s[-1] for s in sequences[start : start + chunk]]
        counts = np.stack([np.bincount(followers[item], minlength=n_items + 1) for item in last])
        yield start, torch.from_numpy(counts).float() + popularity / (popularity.max() + 1)


def ease_weights(
    train: Sequence[np.ndarray], n_items: int, regularisation: float, chunk: int = 1024
) -> np.ndarray:
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
    train: Sequence[np.ndarray],
    n_items: int,
    sequences: Sequence[np.ndarray],
    regularisation: float = 1000.0,
    window: int = 10,
    chunk: int = 256,
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


def chain_weights(
    train: Sequence[np.ndarray],
    n_items: int,
    window: int = 20,
    decay: float = 0.9,
    smoothing: float = 60.0,
) -> np.ndarray:
    """Item-to-item weights (I, I) of a Markov chain that looks ``window`` steps ahead: float64, row i of item i + 1.

    Row i sums ``decay``^(d - 1) over all places where the column's item came d steps after item i, over the
    occurrences of item i plus ``smoothing``, so that what followed a rare item once says little.
    """
    weights = np.zeros((n_items, n_items))
    for distance in range(1, window + 1):
        previous = np.concatenate([s[:-distance] for s in train]) - 1
        following = np.concatenate([s[distance:] for s in train]) - 1
        np.add.at(weights, (previous, following), decay ** (distance - 1))
    occurrences = np.bincount(np.concatenate(train) - 1, minlength=n_items)
    return weights / (occurrences + smoothing)[:, None]


def ease_chain_chunks(
    train: Sequence[np.ndarray],
    n_items: int,
    sequences: Sequence[np.ndarray],
    regularisation: float = 1000.0,
    chain: float = 0.15,
    recency: float = 0.85,
    chunk: int = 256,
) -> Iterator[tuple[int, Tensor]]:
    """EASE^R plus ``chain`` times the Markov chain, for a query of the whole history that fades by ``recency`` an item.

    What goes together and what follows, as one matrix: the strongest ranker here that no gradient has trained. The
    defaults are the best of a search on MovieLens-100K's validation events (``runs/reference/ranker_search.csv``).
    """
    weights = ease_weights(train, n_items, regularisation) + chain * chain_weights(train, n_items)
    for start in range(0, len(sequences), chunk):
        part = sequences[start : start + chunk]
        query = np.zeros((len(part), n_items))
        for row, items in zip(query, part):
            np.maximum.at(row, items - 1, recency ** np.arange(len(items) - 1.0, -1.0, -1.0))
        scores = np.full((len(part), n_items + 1), -np.inf, dtype=np.float32)
        scores[:, 1:] = query @ weights
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


def published_seeds() -> tuple[pd.DataFrame, pd.DataFrame]:
    """``runs/reference/ranker_seeds.csv``, which ``bench_ranker.seeds`` explains: (a row a seed, the means over seeds and the rivals).

    ``text`` is ``llm`` or ``none`` and, in the second table, its index; a rival's row is called by its key in ``RIVALS``.
    """
    table = pd.read_csv(REFERENCE / "ranker_seeds.csv", dtype={"seed": str})
    one_seed = table["seed"].fillna("none").str.isdigit()
    return table[one_seed].reset_index(drop=True), table[~one_seed].set_index("text")
