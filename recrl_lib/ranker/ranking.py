"""Scoring all items for all users in bounded memory: ranks, top-k lists, hashes of scores."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recrl_lib.ranker.sasrec import SASRec

Sequences = Sequence[np.ndarray]
USERS, CELLS = 256, 2**22  # most users and most scores (16 MiB) at a time


def chunks(n_users: int, n_items: int) -> Iterator[slice]:
    """The users in order, as many at a time as ``USERS`` and ``CELLS`` allow (at least one)."""
    step = min(USERS, max(1, CELLS // (n_items + 1)))
    return (slice(start, start + step) for start in range(0, n_users, step))


def pad_sequences(sequences: Sequences, max_len: int) -> Tensor:
    """The last ``max_len`` items of each sequence, left-padded with 0: int64 (B, max_len)."""
    out = np.zeros((len(sequences), max_len), dtype=np.int64)
    for row, items in zip(out, sequences):
        if tail := len(items[-max_len:]):
            row[-tail:] = items[-max_len:]
    return torch.from_numpy(out)


@torch.no_grad()
def score_chunks(
    model: SASRec, sequences: Sequences, text: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Scores of all items, some users at a time: (first user, float32 (b, I+1) on model's device).

    Column 0, padding, is -inf; items already seen are not masked (``mask_seen`` does it).
    """
    model.eval()
    table = model.item_table(None if text is None else text.to(model.device))
    for part in chunks(len(sequences), model.n_items):
        histories = pad_sequences(sequences[part], model.max_len).to(model.device)
        scores = model(histories, table)[:, -1] @ table.T
        scores[:, 0] = -torch.inf
        yield part.start, scores


def scores_sha256(model: SASRec, sequences: Sequences, text: Tensor | None) -> str:
    """Hex sha256 of the bytes of all scores: equal hashes mean a bit-identical ranking."""
    digest = hashlib.sha256()
    for _, scores in score_chunks(model, sequences, text):
        digest.update(scores.cpu().numpy().tobytes())
    return digest.hexdigest()


def mask_seen(scores: Tensor, sequences: Sequences) -> Tensor:
    """``scores`` (b, I+1), in place, with each row's already seen items at -inf."""
    rows = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(sequences))] = -torch.inf
    return scores


def ranks_of(
    scored: Iterable[tuple[int, Tensor]], sequences: Sequences, targets: np.ndarray
) -> np.ndarray:
    """1-based rank (U,) of each user's target among all items not in the user's sequence.

    Ties count against us: rank = 1 + number of other items that score at least as much. ``scored``
    is as from ``score_chunks``, and is masked in place. Raises ``RuntimeError`` if a score is NaN,
    which would read as rank 1, and ``ValueError`` if a target is padding or in the sequence.
    """
    ranks = []
    for first, scores in scored:
        part = slice(first, first + len(scores))
        if mask_seen(scores, sequences[part]).isnan().any():
            users = f"users {first}..{part.stop - 1}"
            raise RuntimeError(f"ranker: NaN scores for {users}; lower ranker_lr")
        own = scores.gather(1, torch.from_numpy(targets[part, None]).to(scores.device))
        if own.isneginf().any():
            row = first + int(own.isneginf().int().argmax())
            target = f"target item {targets[row]} of user {row}"
            raise ValueError(f"ranker: {target} is padding or in the user's history")
        ranks.append((scores >= own).sum(1).cpu().numpy())  # the target itself gives the 1
    return np.concatenate(ranks)


def target_ranks(
    model: SASRec, sequences: Sequences, targets: np.ndarray, text: Tensor | None
) -> np.ndarray:
    """``ranks_of`` the model's scores. For the test item ``sequences`` is ``split.with_valid``."""
    return ranks_of(score_chunks(model, sequences, text), sequences, targets)


def rank(
    model: SASRec, histories: Sequence[Sequence[int] | np.ndarray], k: int, text: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` best unseen items, int64 (U, k), of each history and their scores, float32 (U, k);
    ties go to the lower item id. The users may be unknown to training.

    Raises ``ValueError`` if a history is empty, holds an unknown item or leaves fewer than ``k``.
    """
    last = model.n_items
    sequences = [np.asarray(history, dtype=np.int64) for history in histories]
    for row, items in enumerate(sequences):
        if items.size == 0 or items.min() < 1 or items.max() > last:
            raise ValueError(f"rank: history {row} must hold at least one item, all in 1..{last}")
        if last - len(np.unique(items)) < k:
            raise ValueError(f"rank: history {row} leaves fewer than k={k} unseen items; lower k")
    items, best = np.empty((len(sequences), k), np.int64), np.empty((len(sequences), k), np.float32)
    for first, scores in score_chunks(model, sequences, text):
        part = slice(first, first + len(scores))
        found = _top(mask_seen(scores, sequences[part]), k)
        items[part], best[part] = found.cpu(), scores.gather(1, found).cpu()
    return items, best


def _top(scores: Tensor, k: int) -> Tensor:
    """Columns (b, k) of the best of each row, ties by the lower column."""
    values, columns = scores.topk(k)
    # topk may have kept any of the items that tie for the last place
    tied = (scores >= values[:, -1:]).sum(1) > k
    columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)


def top_k(model: SASRec, sequences: Sequences, text: Tensor | None, k: int) -> np.ndarray:
    """The items of ``rank`` alone: int64 (U, k)."""
    return rank(model, sequences, k, text)[0]
