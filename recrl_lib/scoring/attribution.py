"""What moved the ranker: the weight of each history film in one recommendation.

The weight of film j of a history h for the recommended film i is

    w_j = log p(i | h) - log p(i | h without j)

with p the softmax of the frozen ranker's scores over all items: positive where the film made the
recommendation likelier (Li, Monroe & Jurafsky 2016, arXiv 1612.08220). They need not add up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recrl_lib.ranker.ranking import score_chunks
from recrl_lib.ranker.sasrec import SASRec

CITED = 2  # films that an explanation names, at best


def log_probabilities(
    ranker: SASRec, histories: Sequence[np.ndarray], items: Sequence[Any], text: Tensor | None
) -> list[np.ndarray]:
    """log p(item | history), natural, under the softmax over all items 1..I: for each history of
    the one item, or of the several, in ``items``."""
    found = []
    for start, scores in score_chunks(ranker, histories, text):
        logp = torch.log_softmax(scores.cpu().double(), -1).numpy()
        found += [row[own] for row, own in zip(logp, items[start : start + len(logp)])]
    return found


def faithfulness(weights: Sequence[float], cited: Sequence[int]) -> float:
    """How near the films ``cited`` (places in ``weights``) come to the best choice, in [0, 1].

    Their mean weight over the mean of as many best films, at most ``CITED``: a film that did not
    move the ranker lowers it, and so does citing more than ``CITED``. 0 without a cited film, or
    where no film has a positive weight.
    """
    best = np.sort(np.maximum(weights, 0.0))[::-1][: min(len(cited), CITED)]
    if not best.sum():
        return 0.0
    return float(np.clip(np.mean([weights[j] for j in cited]) / best.mean(), 0.0, 1.0))


def weights(
    ranker: SASRec,
    histories: Sequence[np.ndarray],
    items: Sequence[Any],
    shown: int,
    text: Tensor | None,
) -> list[np.ndarray]:
    """w of the last ``shown`` items of each history, in their order, for the one item or each of
    the m items in ``items``: float64 (shown,) or (m, shown), fewer for a shorter history.

    A film that the ranker no longer reads has 0, and so has the only film of a history.
    """
    asked, about, sizes = [], [], []
    for history, own in zip(histories, items, strict=True):
        places = range(max(len(history) - shown, 0), len(history))
        rests = (np.delete(history, j) for j in places)
        asked += [history, *(rest if len(rest) else history for rest in rests)]
        about += [own] * (len(places) + 1)
        sizes.append(len(places))
    logp, found = iter(log_probabilities(ranker, asked, about, text)), []
    for n in sizes:
        whole = next(logp)
        found.append(np.stack([whole - next(logp) for _ in range(n)], -1))
    return found
