"""Cold start: how well a ranker places items that it knows by their text alone.

Some items are taken out of training altogether: out of the histories, the targets, the softmax and
the constants of the text norm. The trained ranker then takes them in with ``sasrec.add_items``.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from recrl_lib.data.splits import Split
from recrl_lib.ranker import ranking, sasrec


def cold_ranks(
    split: Split, text: Tensor, cold: np.ndarray, fit: Callable[[Split, Tensor], sasrec.SASRec]
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of cold test items among all items, by their own text and by a wrong one.

    ``cold``: ids (C,) of the items to hold out, C >= 2, in random order: as the wrong text each has
    that of the one before it. Asked are the users whose test item is cold; none: ``ValueError``.
    ``fit`` trains a ranker on the other items, renumbered from 1, and their text vectors.
    """
    asked = np.flatnonzero(np.isin(split.test, cold))
    if len(cold) < 2 or len(asked) == 0:
        held = f"{len(cold)} items held out, {len(asked)} of them in the test"
        raise ValueError(f"cold_ranks: {held}; hold out more")
    warm = np.setdiff1d(np.arange(1, len(text)), cold)
    order = np.concatenate([[0], warm, cold])  # old ids in the new order, as add_items has them
    new = np.argsort(order)
    known = text[order[: len(warm) + 1]]
    model = fit(warm_split(split, new, len(warm)), known)
    histories, targets = [new[split.with_valid[user]] for user in asked], new[split.test[asked]]
    larger = (sasrec.add_items(model, known, text[which]) for which in (cold, np.roll(cold, 1)))
    right, wrong = (ranking.target_ranks(m, histories, targets, rows) for m, rows in larger)
    return right, wrong


def warm_split(split: Split, new: np.ndarray, n_warm: int) -> Split:
    """The items before the test item without the cold ones, in new ids; the last one validates.

    Users with fewer than two are left out. Training reads no test item, so that field repeats the
    validation item.
    """

    def kept(part: Sequence[np.ndarray]) -> list[np.ndarray]:
        warm = (ids[ids <= n_warm] for ids in (new[items] for items in part))
        return [ids for ids in warm if len(ids) >= 2]

    known = kept(split.with_valid)
    last = np.array([ids[-1] for ids in known])
    return Split([ids[:-1] for ids in known], last, last, others=tuple(kept(split.others)))
