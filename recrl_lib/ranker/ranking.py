"""Scoring all items for all users in bounded memory: ranks, top-k lists, hashes of scores."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from recrl_lib.ranker.sasrec import SASRec

Sequences = Sequence[np.ndarray]
Chunks = Iterable[tuple[int, Tensor]]  # (first user, scores (b, I+1) float32, column 0 = -inf)
USERS, ITEMS = 256, 2**12  # scored at a time: 4 MiB of scores, whatever the size of the data


def pad_sequences(sequences: Sequences, max_len: int) -> Tensor:
    """The last ``max_len`` items of each sequence, left-padded with 0: int64 (B, max_len)."""
    out = np.zeros((len(sequences), max_len), dtype=np.int64)
    for row, items in zip(out, sequences):
        if tail := len(items[-max_len:]):
            row[-tail:] = items[-max_len:]
    return torch.from_numpy(out)


@torch.no_grad()
def _last_states(model: SASRec, sequences: Sequences, table: Tensor) -> Chunks:
    """(first user, states (b, dim) after each user's last item), ``USERS`` at a time."""
    model.eval()
    for start in range(0, len(sequences), USERS):
        histories = pad_sequences(sequences[start : start + USERS], model.max_len)
        yield start, model(histories.to(model.device), table)[:, -1]


@torch.no_grad()
def score_chunks(
    model: SASRec, sequences: Sequences, text: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Scores of all items, ``USERS`` users at a time: (first user, float32 (b, I+1) on the CPU).

    Column 0, padding, is -inf; items already seen are not masked (``mask_seen`` does it).
    """
    table = model.frozen_table(text)
    for start, states in _last_states(model, sequences, table):
        scores = (states @ table.T).float().cpu()
        scores[:, 0] = -torch.inf
        yield start, scores


def scores_sha256(model: SASRec, sequences: Sequences, text: Tensor | None) -> str:
    """Hex sha256 of the bytes of all scores: equal hashes mean a bit-identical ranking."""
    digest = hashlib.sha256()
    for _, scores in score_chunks(model, sequences, text):
        digest.update(scores.numpy().tobytes())
    return digest.hexdigest()


def mask_seen(scores: Tensor, sequences: Sequences) -> Tensor:
    """``scores`` (b, I+1), in place, with each row's already seen items at -inf."""
    rows = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(sequences))] = -torch.inf
    return scores


def _item_blocks(states: Tensor, table: Tensor, sequences: Sequences) -> Chunks:
    """(first item, scores (b, w)) of ``ITEMS`` items at a time, padding and seen items at -inf."""
    items = np.concatenate(sequences)
    users = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    for first in range(0, len(table), ITEMS):
        scores = (states @ table[first : first + ITEMS].T).float()
        seen = (items >= first) & (items < first + ITEMS)
        scores[torch.from_numpy(users[seen]), torch.from_numpy(items[seen] - first)] = -torch.inf
        if first == 0:
            scores[:, 0] = -torch.inf
        yield first, scores


def ranks_of(chunks: Chunks, sequences: Sequences, targets: np.ndarray) -> np.ndarray:
    """1-based rank (U,) of each user's target among all items not in the user's sequence.

    Ties count against us: rank = 1 + number of other items that score at least as much. Raises
    ``RuntimeError`` if a score is NaN, which would read as rank 1, and ``ValueError`` if a target
    is in the sequence.
    """
    ranks = []
    for start, scores in chunks:
        part = slice(start, start + len(scores))
        blocks = [(0, mask_seen(scores, sequences[part]))]
        ranks.append(_ranks_in(lambda blocks=blocks: blocks, targets[part], start))
    return np.concatenate(ranks)


def target_ranks(
    model: SASRec, sequences: Sequences, targets: np.ndarray, text: Tensor | None
) -> np.ndarray:
    """``ranks_of`` the model's scores. For the test item ``sequences`` is ``split.with_valid``.

    At most ``USERS`` x ``ITEMS`` scores exist at a time, whatever the size of the catalogue.
    """
    table, ranks = model.frozen_table(text), []
    for start, states in _last_states(model, sequences, table):
        part = slice(start, start + len(states))
        blocks = partial(_item_blocks, states, table, sequences[part])
        ranks.append(_ranks_in(blocks, targets[part], start))
    return np.concatenate(ranks)


def _ranks_in(blocks: Callable[[], Chunks], targets: np.ndarray, first_user: int) -> np.ndarray:
    """Ranks (b,) of ``targets`` in the scores of ``blocks()``, which is gone through twice.

    The target's own score comes from the same products as the scores it is compared with: another
    order of summation could break a tie.
    """
    own = torch.full((len(targets),), -torch.inf)
    for first, scores in blocks():
        if scores.isnan().any():
            users = f"users {first_user}..{first_user + len(targets) - 1}"
            raise RuntimeError(f"ranker: NaN scores for {users}; lower ranker_lr")
        here = np.flatnonzero((targets >= first) & (targets < first + scores.shape[1]))
        own[here] = scores[torch.from_numpy(here), torch.from_numpy(targets[here] - first)].cpu()
    if own.isneginf().any():
        row = int(own.isneginf().int().argmax())
        target = f"target item {targets[row]} of user {first_user + row}"
        raise ValueError(f"ranker: {target} is padding, unknown or in the user's history")
    # The target itself gives the 1.
    at_least = [(s >= own.to(s.device)[:, None]).sum(1).cpu() for _, s in blocks()]
    return torch.stack(at_least).sum(0).numpy()


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
            wanted = f"at least one item, all of them in 1..{last}"
            raise ValueError(f"rank: history {row} must hold {wanted}")
        if last - len(np.unique(items)) < k:
            raise ValueError(f"rank: history {row} leaves fewer than k={k} unseen items; lower k")
    table = model.frozen_table(text)
    found = [(torch.empty(0, k, dtype=torch.long), torch.empty(0, k))]
    for start, states in _last_states(model, sequences, table):
        blocks = _item_blocks(states, table, sequences[start : start + len(states)])
        parts = [_top(scores, min(k, scores.shape[1]), first) for first, scores in blocks]
        values, items = (torch.cat(column, 1) for column in zip(*parts))
        values, order = values.sort(dim=1, descending=True, stable=True)
        found.append((items.gather(1, order)[:, :k].cpu(), values[:, :k].cpu()))
    items, scores = (torch.cat(column).numpy() for column in zip(*found))
    return items, scores


def _top(scores: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """(scores, items) (b, k) of the best of each row, ties by lower item; column 0 is ``first``."""
    values, columns = scores.topk(k)
    # topk may have kept any of the items that tie for the last place
    tied = (scores >= values[:, -1:]).sum(1) > k
    if tied.any():
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order) + first


def top_k(model: SASRec, sequences: Sequences, text: Tensor | None, k: int) -> np.ndarray:
    """The items of ``rank`` alone: int64 (U, k)."""
    return rank(model, sequences, k, text)[0]
