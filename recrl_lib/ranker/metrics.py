"""Ranking metrics from the 1-based rank of one relevant item (Järvelin & Kekäläinen 2002), and how
far top-k lists moved. One array entry a user, so that intervals can be taken over users."""

import numpy as np
from scipy.stats import kendalltau


def ndcg_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """1 / log2(rank + 1) where rank <= k, else 0: float64 (U,). The ideal DCG of one item is 1."""
    return hr_at(ranks, k) / np.log2(ranks + 1.0)


def hr_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Hit rate: 1 where rank <= k, else 0: float64 (U,)."""
    return (ranks <= k).astype(np.float64)


def mrr_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Reciprocal rank where rank <= k, else 0: float64 (U,)."""
    return hr_at(ranks, k) / ranks


def churn(base_top: np.ndarray, new_top: np.ndarray, p: float = 0.9) -> dict[str, np.ndarray]:
    """How much top-k lists (U, k), best first, moved, user by user: float64 (U,) each, 1 for
    identical lists.

    ``overlap`` |base ∩ new| / k; ``set_same``, ``exact`` and ``top1_same``: 1 where the lists agree
    as sets, item by item, in the first item; ``rbo``: extrapolated rank-biased overlap of
    persistence ``p`` (Webber, Moffat & Zobel 2010); ``kendall_tau``.
    """
    k = base_top.shape[1]
    # (U, k, k): position i of base and j of new hold one item
    same = base_top[:, :, None] == new_top[:, None, :]
    depth, equal = np.arange(1, k + 1), base_top == new_top
    agreement = same.cumsum(1).cumsum(2)[:, depth - 1, depth - 1] / depth  # of the first d items
    overlap = agreement[:, -1]
    return {
        "overlap": overlap,
        "set_same": (overlap == 1).astype(np.float64),
        "exact": equal.all(1).astype(np.float64),
        "top1_same": equal[:, 0].astype(np.float64),
        "rbo": overlap * p**k + (1 - p) / p * (agreement * p**depth).sum(1),
        "kendall_tau": kendall_tau_top_k(base_top, new_top),
    }


def kendall_tau_top_k(base_top: np.ndarray, new_top: np.ndarray) -> np.ndarray:
    """Kendall's tau-b between top-k lists over the union of their items: float64 (U,).

    Items missing from a list share rank k + 1 there, which is the reading of a top-k list of Fagin,
    Kumar & Sivakumar (2003) with penalty 0 for a pair tied in one list. Identical lists give 1,
    reversed ones -1, disjoint ones -2k / (3k - 1): how a list would order the other's items is
    unknown.
    """
    out = np.ones(len(base_top))
    for user in np.flatnonzero((base_top != new_top).any(1)):
        items = np.union1d(base_top[user], new_top[user])
        ranks = np.full((2, len(items)), base_top.shape[1])
        for row, top in zip(ranks, (base_top[user], new_top[user])):
            row[np.searchsorted(items, top)] = np.arange(len(top))
        out[user] = kendalltau(*ranks)[0]
    return out
