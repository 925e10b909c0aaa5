"""Scoring all items for all users in bounded memory: ranks, top-k lists, hashes of scores."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recrl_lib.ranker.sasrec import SASRec

Chunks = Iterable[
    tuple[int, Tensor]
]  # (index of the first user, scores (b, I+1) float32, column 0 = -inf)
USERS, ITEMS = (
    256,
    2**12,
)  # scored at a time in a ranking: 4 MiB of scores, whatever the numbers of users and items


def pad_sequences(sequences: Sequence[np.ndarray], max_len: int) -> Tensor:
    """The last ``max_len`` items of each sequence, left-padded with 0: int64 (B, max_len)."""
    out = np.zeros((len(sequences), max_len), dtype=np.int64)
    for row, items in zip(out, sequences):
        if tail := len(items[-max_len:]):
            row[-tail:] = items[-max_len:]
    return torch.from_numpy(out)


@torch.no_grad()
def _last_states(
    model: SASRec, sequences: Sequence[np.ndarray], table: Tensor, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    """(first user, states (b, dim) after each user's last item), ``chunk`` users at a time, in eval mode."""
    model.eval()
    for start in range(0, len(sequences), chunk):
        histories = pad_sequences(sequences[start : start + chunk], model.max_len).to(model.device)
        yield start, model(histories, table)[:, -1]


@torch.no_grad()
def score_chunks(
    model: SASRec, sequences: Sequence[np.ndarray], text: Tensor | None, chunk: int = USERS
) -> Iterator[tuple[int, Tensor]]:
    """Scores of all items, ``chunk`` users at a time: yields (first user, float32 (b, I+1) on the CPU).

    Column 0, padding, is -inf. Items already seen are NOT masked, so that score changes can be taken; for a
    ranking apply ``mask_seen``. Switches the model to eval mode.
    """
    table = model.frozen_table(text)
    for start, states in _last_states(model, sequences, table, chunk):
        scores = (states @ table.T).float().cpu()
        scores[:, 0] = -torch.inf
        yield start, scores


def mask_seen(scores: Tensor, sequences: Sequence[np.ndarray]) -> Tensor:
    """``scores`` (b, I+1), in place, with each row's already seen items at -inf."""
    rows = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(sequences))] = -torch.inf
    return scores


def _item_blocks(
    states: Tensor, table: Tensor, sequences: Sequence[np.ndarray]
) -> Iterator[tuple[int, Tensor]]:
    """(first item, scores (b, w) float32) of ``ITEMS`` items at a time, with padding and seen items at -inf."""
    items, users = (
        np.concatenate(sequences),
        np.repeat(np.arange(len(sequences)), [len(s) for s in sequences]),
    )
    order = np.argsort(items)
    items, users = items[order], users[order]
    for first in range(0, len(table), ITEMS):
        scores = (states @ table[first : first + ITEMS].T).float()
        seen = slice(*np.searchsorted(items, [first, first + ITEMS]))
        scores[torch.from_numpy(users[seen]), torch.from_numpy(items[seen] - first)] = -torch.inf
        if first == 0:
            scores[:, 0] = -torch.inf
        yield first, scores


def ranks_of(chunks: Chunks, sequences: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """1-based rank (U,) of each user's target among all items not in the user's sequence.

    Ties count against us: rank = 1 + number of other items that score at least as much. A NaN score raises
    ``RuntimeError``: every comparison with it is false, which would read as rank 1. A target that is in the
    sequence has no rank and raises ``ValueError``.
    """
    ranks = np.empty(len(sequences), dtype=np.int64)
    for start, scores in chunks:
        stop = start + len(scores)
        blocks = [(0, mask_seen(scores, sequences[start:stop]))]
        ranks[start:stop] = _ranks_in(lambda: blocks, targets[start:stop], start)
    return ranks


def target_ranks(
    model: SASRec, sequences: Sequence[np.ndarray], targets: np.ndarray, text: Tensor | None
) -> np.ndarray:
    """``ranks_of`` the model's scores. For the test item ``sequences`` is ``split.with_valid``.

    At most ``USERS`` x ``ITEMS`` scores exist at a time, whatever the size of the catalogue.
    """
    table = model.frozen_table(text)
    ranks = np.empty(len(sequences), dtype=np.int64)
    for start, states in _last_states(model, sequences, table, USERS):
        part = slice(start, start + len(states))
        ranks[part] = _ranks_in(
            lambda: _item_blocks(states, table, sequences[part]), targets[part], start
        )
    return ranks


def _ranks_in(blocks: Callable[[], Chunks], targets: np.ndarray, first_user: int) -> np.ndarray:
    """Ranks (b,) of ``targets`` in the scores of ``blocks()``, which is gone through twice.

    The target's own score comes from the same products as the scores it is compared with: another order of
    summation could break a tie.
    """
    own = torch.full((len(targets),), -torch.inf)
    for first, scores in blocks():
        if scores.isnan().any():
            users = f"{first_user}..{first_user + len(targets) - 1}"
            raise RuntimeError(
                f"ranker: NaN scores for users {users}; training diverged, lower ranker_lr"
            )
        here = np.flatnonzero((targets >= first) & (targets < first + scores.shape[1]))
        own[here] = scores[torch.from_numpy(here), torch.from_numpy(targets[here] - first)].cpu()
    if own.isneginf().any():
        row = int(own.isneginf().int().argmax())
        user = first_user + row
        raise ValueError(
            f"ranker: target item {targets[row]} of user {user} is padding, unknown or in the user's history"
        )
    # The target itself gives the 1.
    return sum(
        (scores >= own.to(scores.device)[:, None]).sum(1).cpu() for _, scores in blocks()
    ).numpy()


def rank(
    model: SASRec, histories: Sequence[Sequence[int]], k: int, text: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """(items, scores), int64 and float32 (U, k): the ``k`` best unseen items of each history, best first.

    The histories may be of users that training never saw. Ties go to the lower item id. Raises ``ValueError`` for an
    empty history, an item that is not in the catalogue, or a history that leaves fewer than ``k`` items.
    """
    last = model.n_items
    sequences = [np.asarray(history, dtype=np.int64) for history in histories]
    for row, items in enumerate(sequences):
        if items.size == 0 or items.min() < 1 or items.max() > last:
            raise ValueError(
                f"rank: history {row} must hold at least one item, all of them in 1..{last}"
            )
        if last - len(np.unique(items)) < k:
            raise ValueError(
                f"rank: history {row} leaves fewer than k={k} unseen items; choose a smaller k"
            )
    table = model.frozen_table(text)
    best_items, best_scores = (
        np.empty((len(sequences), k), dtype=np.int64),
        np.empty((len(sequences), k), dtype=np.float32),
    )
    for start, states in _last_states(model, sequences, table, USERS):
        top = None
        for first, scores in _item_blocks(states, table, sequences[start : start + len(states)]):
            block = _top(scores, min(k, scores.shape[1]), first)
            top = block if top is None else _merge(top, block, k)
        best_scores[start : start + len(states)], best_items[start : start + len(states)] = (
            top[0].cpu(),
            top[1].cpu(),
        )
    return best_items, best_scores


def _top(scores: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """(scores, items) (b, k) of the best of each row, ties by lower item; column 0 is item ``first``."""
    values, columns = scores.topk(k)
    tied = (scores >= values[:, -1:]).sum(
        1
    ) > k  # topk may have kept any of the items that tie for the last place
    if tied.any():
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order) + first


def _merge(
    best: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of two results of ``_top``; items of ``best`` have the lower ids and win ties."""
    values, items = (torch.cat(pair, 1) for pair in zip(best, block))
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], items.gather(1, order[:, :k])


def top_k(
    model: SASRec, sequences: Sequence[np.ndarray], text: Tensor | None, k: int
) -> np.ndarray:
    """The items of ``rank`` alone: int64 (U, k)."""
    return rank(model, sequences, k, text)[0]


def scores_sha256(model: SASRec, sequences: Sequence[np.ndarray], text: Tensor | None) -> str:
    """Hex sha256 of the bytes of all scores, users x items: equal hashes mean a bit-identical ranking."""
    digest = hashlib.sha256()
    for _, scores in score_chunks(model, sequences, text):
        digest.update(scores.numpy().tobytes())
    return digest.hexdigest()
