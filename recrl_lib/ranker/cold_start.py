"""Cold start: how well a ranker places items that it knows by their text alone.

Some items are taken out of training altogether: out of the histories, the targets, the catalogue that the softmax
runs over, and the constants of the text norm. The trained ranker then takes them in with ``ranker.add_items``.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from recrl_lib.data.splits import Split
from recrl_lib.ranker import ranking, sasrec


def cold_ranks(
    split: Split, text: Tensor, cold: np.ndarray, fit: Callable[[Split, Tensor], sasrec.SASRec]
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks among all items of the test item, for every user whose test item is cold: (by its text, by a wrong text).

    ``text`` (I+1, d); ``cold`` (C,) the item ids to hold out, C >= 2, in random order: in the control each takes the
    text of the one before it. ``fit(split, text)`` trains a ranker on the other items, renumbered from 1, and their
    text vectors. Raises ``ValueError`` where no test item is cold.
    """
    asked = np.flatnonzero(np.isin(split.test, cold))
    if len(cold) < 2 or len(asked) == 0:
        raise ValueError(
            f"cold_ranks: {len(cold)} items held out, {len(asked)} of them in the test; hold out more"
        )
    warm = np.setdiff1d(np.arange(1, len(text)), cold)
    order = np.concatenate(
        [[0], warm, cold]
    )  # old ids in the new order: the cold last, where add_items puts them
    new = np.argsort(order)
    known = text[order[: len(warm) + 1]]
    model = fit(_warm_split(split, new, len(warm)), known)
    seen = split.with_valid
    histories, targets = [new[seen[user]] for user in asked], new[split.test[asked]]
    right, wrong = (sasrec.add_items(model, known, text[rows]) for rows in (cold, np.roll(cold, 1)))
    return tuple(
        ranking.target_ranks(larger, histories, targets, rows) for larger, rows in (right, wrong)
    )


def _warm_split(split: Split, new: np.ndarray, n_warm: int) -> Split:
    """The items before the test item without the cold ones, in new ids; the last of them for validation.

    Users with fewer than two are left out. Training reads no test item, so the field repeats the validation item.
    """
    kept = [
        [ids[ids <= n_warm] for ids in (new[items] for items in part)]
        for part in (split.with_valid, split.others)
    ]
    known, others = ([ids for ids in part if len(ids) >= 2] for part in kept)
    last = np.array([ids[-1] for ids in known])
    return Split([ids[:-1] for ids in known], last, last, others=tuple(others))
