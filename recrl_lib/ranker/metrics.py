"""Ranking metrics from ranks, churn between top-k lists, and diversity of texts.

One array entry a user, so that intervals can be taken over users (``stats``). With one relevant item, as in
leave-one-out, NDCG and MRR are functions of its 1-based rank alone (Järvelin & Kekäläinen 2002).
"""

import re

import numpy as np


def ndcg_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """1 / log2(rank + 1) where rank <= k, else 0: float64 (U,). The ideal DCG of one relevant item is 1."""
    ranks = _checked(ranks)
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def hr_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Hit rate: 1 where rank <= k, else 0: float64 (U,)."""
    return (_checked(ranks) <= k).astype(np.float64)


def mrr_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Reciprocal rank where rank <= k, else 0: float64 (U,)."""
    ranks = _checked(ranks)
    return np.where(ranks <= k, 1.0 / ranks, 0.0)


def _checked(ranks: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks)
    if ranks.size == 0 or ranks.min() < 1:
        raise ValueError("ranks: must be a non-empty array of 1-based ranks")
    return ranks


def churn(base_top: np.ndarray, new_top: np.ndarray, p: float = 0.9) -> dict[str, np.ndarray]:
    """How much top-k lists moved from ``base_top`` to ``new_top``, both (U, k), best first.

    Returns one float64 (U,) array for each of

    - ``overlap``: |base ∩ new| / k;
    - ``set_same``, ``exact``, ``top1_same``: 1 if the lists agree as sets, item by item, in the first item;
    - ``rbo``: extrapolated rank-biased overlap with persistence ``p`` (Webber, Moffat & Zobel 2010);
    - ``kendall_tau``: see ``kendall_tau_top_k``.

    Identical lists give 1 everywhere. Raises ``ValueError`` for unequal shapes or an item twice in a list.
    """
    base_top, new_top = _lists(base_top, new_top)
    same = (
        base_top[:, :, None] == new_top[:, None, :]
    )  # (U, k, k): position i of base and j of new hold one item
    overlap = same.sum((1, 2)) / base_top.shape[1]
    equal = base_top == new_top
    return {
        "overlap": overlap,
        "set_same": (overlap == 1).astype(np.float64),
        "exact": equal.all(1).astype(np.float64),
        "top1_same": equal[:, 0].astype(np.float64),
        "rbo": _rbo(same, p),
        "kendall_tau": kendall_tau_top_k(base_top, new_top),
    }


def _rbo(same: np.ndarray, p: float) -> np.ndarray:
    """RBO_ext = A_k p^k + (1 - p)/p * sum_d A_d p^d, with A_d = |first d of one ∩ first d of the other| / d."""
    k = same.shape[1]
    depth = np.arange(1, k + 1)
    agreement = same.cumsum(1).cumsum(2)[:, depth - 1, depth - 1] / depth
    return agreement[:, -1] * p**k + (1 - p) / p * (agreement * p**depth).sum(1)


def kendall_tau_top_k(base_top: np.ndarray, new_top: np.ndarray) -> np.ndarray:
    """Kendall's tau-b between top-k lists over the union of their items: float64 (U,).

    Items missing from a list share rank k + 1 there, which is the reading of a top-k list of Fagin, Kumar &
    Sivakumar (2003) with penalty 0 for a pair tied in one list. Identical lists give 1, reversed ones -1.
    Disjoint lists give -2k / (3k - 1), not -1: how either list would order the other's items is unknown.
    """
    base_top, new_top = _lists(base_top, new_top)
    k = base_top.shape[1]
    same = base_top[:, :, None] == new_top[:, None, :]
    position = np.broadcast_to(np.arange(1, k + 1), base_top.shape)
    # One slot for each base item, then one for each new item; a new item that is also a base item is not counted again.
    base_rank = np.hstack([position, np.where(same.any(1), same.argmax(1), k) + 1])
    new_rank = np.hstack([np.where(same.any(2), same.argmax(2), k) + 1, position])
    counted = np.hstack([np.ones_like(same[:, 0]), ~same.any(1)])
    balance = np.zeros(len(base_top))  # concordant minus discordant pairs, each pair met twice
    for slot in range(2 * k):  # one slot against all: memory U x 2k, not U x 2k x 2k
        signs = np.sign(base_rank - base_rank[:, [slot]]) * np.sign(new_rank - new_rank[:, [slot]])
        balance += (signs * counted).sum(1) * counted[:, slot]
    n, missing = counted.sum(1), (~same.any(2)).sum(1)
    ordered = n * (n - 1) - missing * (
        missing - 1
    )  # pairs without ties, twice; as many in either list
    return np.where(
        ordered > 0, balance / np.maximum(ordered, 1), 1.0
    )  # no pair at all: one item, and it is the same


def _lists(base_top: np.ndarray, new_top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    base_top, new_top = np.asarray(base_top), np.asarray(new_top)
    if base_top.ndim != 2 or base_top.shape != new_top.shape or base_top.size == 0:
        raise ValueError(
            f"top-k lists: need two non-empty (U, k) arrays, got {base_top.shape} and {new_top.shape}"
        )
    for lists in (base_top, new_top):
        ordered = np.sort(lists, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("top-k lists: an item occurs twice in one user's list")
    return base_top, new_top


def lower_words(text: str) -> list[str]:
    """Lower-case words of ``text``; punctuation separates."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())
