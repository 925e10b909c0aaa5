"""What moved the ranker: the weight of each history film in one recommendation.

The weight of history film j for user u and recommended film i is

    w_j = log p(i | h) - log p(i | h without j)

where h is the user's history and p the softmax of the frozen ranker's scores over all items. It is
positive where the film made the recommendation likelier (attribution by leave-one-out; Li, Monroe &
Jurafsky 2016, arXiv 1612.08220). Weights need not add up: ``log_probabilities`` of a history
without several films says what these did together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recrl_lib.ranker.ranking import score_chunks
from recrl_lib.ranker.sasrec import SASRec

CITED = 2  # films that an explanation names, at best


def log_probabilities(
    ranker: SASRec, histories: Sequence[np.ndarray], items: Sequence[int], text: Tensor | None
) -> np.ndarray:
    """log p(item | history), natural, float64 (n,), under the softmax over all items 1..I."""
    found = [np.zeros(0)]
    for start, scores in score_chunks(ranker, histories, text):
        logp = torch.log_softmax(scores.cpu().double(), -1)
        own = items[start : start + len(scores)]
        found.append(logp[range(len(own)), own].numpy())
    return np.concatenate(found)


def faithfulness(weights: Sequence[float], cited: Sequence[int]) -> float:
    """Share of what moved the ranker that the films ``cited`` (places in ``weights``) hold.

    Their mean weight over the mean of as many best films, at most ``CITED``: a film that did not
    move the ranker lowers it, and so does citing more than ``CITED``. 0 without a cited film, or
    where no film has a positive weight; at most 1.
    """
    best = np.sort(np.maximum(weights, 0.0))[::-1][: min(len(cited), CITED)]
    if not best.sum():
        return 0.0
    return float(np.clip(np.mean([weights[j] for j in cited]) / best.mean(), 0.0, 1.0))


def weights(
    ranker: SASRec,
    histories: Sequence[np.ndarray],
    items: Sequence[int],
    shown: int,
    text: Tensor | None,
) -> list[np.ndarray]:
    """delta of the last ``shown`` items of each history, in their order: float64 arrays.

    A film that the ranker no longer reads (``max_len`` items) has 0. A history of one item has no
    rest to read, so its film's weight is 0 too.
    """
    asked, about = [], []
    for history, item in zip(histories, items, strict=True):
        left = [np.delete(history, j) for j in range(max(len(history) - shown, 0), len(history))]
        asked += [history, *(rest if len(rest) else history for rest in left)]
        about += [item] * (len(left) + 1)
    logp, found, start = log_probabilities(ranker, asked, about, text), [], 0
    for history in histories:
        n = min(shown, len(history))
        found.append(logp[start] - logp[start + 1 : start + 1 + n])
        start += n + 1
    return found
