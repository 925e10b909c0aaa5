"""SASRec (Kang & McAuley 2018), its training, and ranking of all items.

A causal transformer reads a user's history; the score of item i is the dot product of the last state with
the item's vector, which is also the input embedding (tied). With item texts::

    v_i = e_i + W norm(t_i)

``t_i`` is the text vector of item i from the LLM. ``norm`` standardises each feature by mean and standard
deviation over items 1..I of the *base* LLM's vectors, and divides by the root of the number of features: |norm(t)| is
about 1, so that W and e start alike and learn at one rate. Those constants are stored in the model, so vectors of a
tuned LLM are standardised by the same constants: a drift of the text vectors reaches the ranking unhidden.
The ranker holds no text vectors: text is an argument, so one frozen ranker can be asked with either.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from recrl_lib.config import Params
from recrl_lib.datasets import Split
from recrl_lib.files import write_atomic
from recrl_lib.metrics import ndcg_at
from recrl_lib.progress import track
from recrl_lib.softmax import full_softmax, sampled_softmax

Chunks = Iterable[tuple[int, Tensor]]  # (index of the first user, scores (b, I+1) float32, column 0 = -inf)

FULL_SOFTMAX_ITEMS, NEGATIVES = 100_000, 4096  # larger catalogues train on a sample of this many items a step
USERS, ITEMS = 256, 2**12  # scored at a time in a ranking: 4 MiB of scores, whatever the numbers of users and items


class SASRec(nn.Module):
    """``layers`` pre-norm causal blocks of width ``dim`` over the last ``max_len`` items.

    Order enters through distances, not places: attention to the item d places back has the bias ``distances[d, head]``
    added (Shaw et al. 2018; the scalar form of Raffel et al. 2020, §2.1). It is learned from all positions alike. A vector
    per place, as in the paper, leaves the last place, the only one that is ranked from, with one training target a window.
    In training a share ``item_dropout`` of the items read is blanked. All weights are drawn from ``seed``. With
    ``text_dim`` > 0 call ``fit_text`` before the first use.
    """

    def __init__(
        self, n_items: int, dim: int = 64, layers: int = 2, heads: int = 2, max_len: int = 50,
        dropout: float = 0.3, text_dim: int = 0, seed: int = 0, item_dropout: float = 0.0,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"SASRec: dim={dim} must be a multiple of heads={heads}")
        self.arguments = dict(
            n_items=n_items, dim=dim, layers=layers, heads=heads, max_len=max_len,
            dropout=dropout, text_dim=text_dim, seed=seed, item_dropout=item_dropout,
        )
        self.n_items, self.max_len, self.item_dropout = n_items, max_len, item_dropout
        self.items = nn.Embedding(n_items + 1, dim, padding_idx=0)
        self.distances = nn.Parameter(torch.empty(max_len, heads))
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.text = nn.Linear(text_dim, dim, bias=False) if text_dim else None
        if text_dim:
            self.register_buffer("text_mean", torch.full((text_dim,), math.nan))
            self.register_buffer("text_scale", torch.full((text_dim,), math.nan))
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.weight.normal_(0.0, 0.02, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            self.items.weight[0] = 0.0
            max_len, heads = self.distances.shape
            # As ALiBi (Press et al. 2022), from near to far sight; its exponent of 8, made for text, is too far here.
            slopes = 2.0 ** (-6.0 / heads * torch.arange(1, heads + 1))
            self.distances.copy_(-torch.arange(max_len)[:, None] * slopes)

    def fit_text(self, text: Tensor) -> None:
        """Take the constants of ``norm`` from the base LLM's ``text``, (I+1, text_dim) with row 0 = padding."""
        self._check_text(text)
        rows = text[1:].double()
        self.text_mean.copy_(rows.mean(0))
        std = rows.std(0, correction=0).clamp_min(1e-6)  # a constant feature stays 0, not 0/0
        self.text_scale.copy_(std * text.shape[1] ** 0.5)

    def item_table(self, text: Tensor | None, items: Tensor | None = None) -> Tensor:
        """Item vectors (I+1, dim), row 0 zero. ``text=None`` leaves W norm(t) out: the ranking without the LLM.

        With ``items``, int64 (n,) whose first is 0, only their rows: (n, dim).
        """
        table = self.items.weight if items is None else self.items(items)
        if text is not None:
            self._check_text(text)
            if self.text_mean.isnan().any():
                raise RuntimeError("SASRec.item_table: call fit_text with the base LLM's vectors first")
            text = text if items is None else text[items]
            table = table + self.text((text - self.text_mean) / self.text_scale)
        return torch.cat([torch.zeros_like(table[:1]), table[1:]])

    @torch.no_grad()
    def frozen_table(self, text: Tensor | None) -> Tensor:
        """``item_table`` without a gradient, on the model's device."""
        return self.item_table(None if text is None else text.to(self.device))

    def _check_text(self, text: Tensor) -> None:
        if self.text is None:
            raise ValueError("SASRec: text vectors given to a ranker built with text_dim=0; pass text=None")
        expected = (self.items.num_embeddings, self.text.in_features)
        if tuple(text.shape) != expected:
            raise ValueError(f"SASRec: text has shape {tuple(text.shape)}, expected (I+1, text_dim) = {expected}")

    def forward(self, histories: Tensor, table: Tensor) -> Tensor:
        """States (B, L, dim) after each item of ``histories``, int64 (B, L) left-padded with 0, L <= max_len.

        The state at position j has seen items 1..j only. Rows at padded positions are meaningless.
        """
        length = histories.shape[1]
        if length > self.max_len:
            raise ValueError(f"SASRec: histories of length {length} exceed max_len={self.max_len}; see pad_sequences")
        real = histories > 0
        place = torch.arange(length, device=histories.device)
        back = place[:, None] - place  # how far before the query the key is
        itself = back == 0  # a padded row needs one key, or is NaN
        allowed = (back >= 0) & real[:, None, :] | itself
        # Looked up as an embedding: an index's gradient is summed in no fixed order by threads.
        bias = F.embedding(back.clamp_min(0), self.distances).permute(2, 0, 1)
        mask = torch.where(allowed[:, None], bias, -torch.inf)  # (B, heads, L, L)
        x = F.embedding(histories, table) * table.shape[1] ** 0.5  # vectors start near 0 (Vaswani et al. 2017, §3.4)
        if self.training and self.item_dropout:
            x = x * (torch.rand(histories.shape, device=x.device) >= self.item_dropout)[..., None]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    @property
    def device(self) -> torch.device:
        return self.items.weight.device


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward (of width ``dim``, as in the paper), each with a residual."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed_in, self.feed_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.feed_out(F.gelu(self.feed_in(self.norm_feed(x)))))


def pad_sequences(sequences: Sequence[np.ndarray], max_len: int) -> Tensor:
    """The last ``max_len`` items of each sequence, left-padded with 0: int64 (B, max_len)."""
    out = np.zeros((len(sequences), max_len), dtype=np.int64)
    for row, items in zip(out, sequences):
        if tail := len(items[-max_len:]):
            row[-tail:] = items[-max_len:]
    return torch.from_numpy(out)


def fit(
    params: Params, split: Split, n_items: int, text: Tensor | None, seed: int, device: str | torch.device = "cpu"
) -> tuple[SASRec, list[dict[str, float]]]:
    """(the ranker of a run's parameters, trained and frozen, on the CPU; its curve). ``text`` None: plain SASRec."""
    model = SASRec(
        n_items, params.ranker_dim, params.ranker_layers, params.ranker_heads, params.ranker_max_len, params.ranker_dropout,
        text_dim=0 if text is None else text.shape[1], seed=seed, item_dropout=params.ranker_item_dropout,
    )
    if text is not None:
        model.fit_text(text)
    curve = train(
        model, split, text, lr=params.ranker_lr, batch=params.ranker_batch, epochs=params.ranker_epochs,
        patience=params.ranker_patience, seed=seed, device=device, average=params.ranker_average,
    )
    return freeze(model.cpu()), curve


def train(
    model: SASRec, split: Split, text: Tensor | None, *, lr: float, batch: int, epochs: int, patience: int,
    seed: int, device: str | torch.device = "cpu", average: float = 0.0,
) -> list[dict[str, float]]:
    """Fit ``model`` to ``split.training`` and leave it in eval mode with the weights of the best validation NDCG@10.

    Softmax cross-entropy at every position: over all items, or above ``FULL_SOFTMAX_ITEMS`` over a sample. Each epoch
    cuts every history into windows of ``max_len + 1`` items at a random offset, so that long histories are used whole
    and the cuts differ between epochs. What is validated and kept is the moving average of the weights (Polyak &
    Juditsky 1992) with decay ``average`` a step; 0 is no average. Stops after ``patience`` epochs without a better
    NDCG@10. Returns one row an epoch: epoch, loss, valid_ndcg@10. The result depends on the arguments only; the
    global random state is left as it was.
    """
    model.to(device)
    text = None if text is None else text.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    noise = _noise(split.training, model.n_items).to(device) if model.n_items > FULL_SOFTMAX_ITEMS else None
    kept = copy.deepcopy(model)  # the average
    rng = np.random.default_rng(seed)
    best, best_state, curve, steps = -1.0, {}, [], 0
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(cuda):  # dropout draws from the global generator
        torch.manual_seed(seed)
        for epoch in track(range(1, epochs + 1), "ranker"):
            total, count = 0.0, 0
            for rows in _batches(split.training, model.max_len + 1, batch, rng):
                loss, positions = _loss(model.train(), rows.to(device), text, noise)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
                # The first steps are forgotten sooner, or the random start would be most of the average.
                _average(kept, model, min(average, steps / (steps + 9)))
                total, count = total + loss.item() * positions, count + positions
            ndcg = float(ndcg_at(target_ranks(kept, split.train, split.valid, text), 10).mean())
            curve.append({"epoch": epoch, "loss": total / count, "valid_ndcg@10": ndcg})
            if ndcg > best:
                best, best_epoch = ndcg, epoch
                best_state = {name: value.clone() for name, value in kept.state_dict().items()}
            if epoch - best_epoch >= patience:
                break
    model.load_state_dict(best_state)
    model.eval()
    return curve


@torch.no_grad()
def _average(kept: SASRec, model: SASRec, decay: float) -> None:
    """``kept`` = ``decay`` x ``kept`` + (1 - ``decay``) x ``model``, in place."""
    torch._foreach_lerp_(list(kept.parameters()), list(model.parameters()), 1.0 - decay)


def _batches(sequences: list[np.ndarray], width: int, batch: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """All windows of the sequences in random order, ``batch`` at a time."""
    windows = _windows(sequences, width, rng)
    return windows[torch.from_numpy(rng.permutation(len(windows)))].split(batch)


def _loss(model: SASRec, windows: Tensor, text: Tensor | None, noise: Tensor | None) -> tuple[Tensor, int]:
    """(mean cross-entropy a position, number of positions) of ``windows`` (b, width).

    ``noise`` None: over all items. Else over a sample from ``noise``, and no more item vectors than those of the
    windows and the sample are computed.
    """
    if noise is None:
        table = model.item_table(text)
    else:
        drawn = torch.multinomial(noise, NEGATIVES, replacement=True)
        used, places = torch.cat([drawn.new_zeros(1), windows.flatten(), drawn]).unique(return_inverse=True)
        table = model.item_table(text, used)  # a small catalogue, with 0 as padding still
        windows, negatives = places[1 : 1 + windows.numel()].view_as(windows), places[-NEGATIVES:]
    inputs, targets = windows[:, :-1], windows[:, 1:]
    real = inputs > 0
    states, targets = model(inputs, table)[real], targets[real]
    if noise is None:
        return full_softmax(states, table, targets), len(targets)
    log_expected = (NEGATIVES * noise[drawn]).log()
    return sampled_softmax(states, table, targets, negatives, log_expected), len(targets)


def _noise(sequences: list[np.ndarray], n_items: int) -> Tensor:
    """Probabilities (I+1,) that negatives are drawn with: popularity, plus one so that every item has a chance."""
    counts = np.bincount(np.concatenate(sequences), minlength=n_items + 1) + 1.0
    counts[0] = 0.0
    return torch.from_numpy(counts / counts.sum()).float()


def _windows(sequences: list[np.ndarray], width: int, rng: np.random.Generator) -> Tensor:
    """All sequences cut into windows of at most ``width`` items, left-padded: int64 (W, width).

    Neighbouring windows share one item, so that every transition is in exactly one window. A sequence longer
    than one window is cut at a random offset.
    """
    step = width - 1  # transitions in a full window
    lengths = np.array([len(s) for s in sequences])
    transitions = lengths - 1
    shift = rng.integers(0, step, len(sequences)) * (transitions > step)
    per_sequence = -(-(transitions + shift) // step)
    owner = np.repeat(np.arange(len(sequences)), per_sequence)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)
    first = np.maximum(index * step - shift[owner], 0)
    last = np.minimum((index + 1) * step - shift[owner], transitions[owner])
    positions = last[:, None] + np.arange(width) - step
    starts = np.cumsum(lengths) - lengths
    flat = np.concatenate(sequences)
    items = flat[starts[owner][:, None] + np.maximum(positions, 0)]
    return torch.from_numpy(np.where(positions >= first[:, None], items, 0))


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


def _item_blocks(states: Tensor, table: Tensor, sequences: Sequence[np.ndarray]) -> Iterator[tuple[int, Tensor]]:
    """(first item, scores (b, w) float32) of ``ITEMS`` items at a time, with padding and seen items at -inf."""
    items, users = np.concatenate(sequences), np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
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
        ranks[part] = _ranks_in(lambda: _item_blocks(states, table, sequences[part]), targets[part], start)
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
            raise RuntimeError(f"ranker: NaN scores for users {users}; training diverged, lower ranker_lr")
        here = np.flatnonzero((targets >= first) & (targets < first + scores.shape[1]))
        own[here] = scores[torch.from_numpy(here), torch.from_numpy(targets[here] - first)].cpu()
    if own.isneginf().any():
        row = int(own.isneginf().int().argmax())
        user = first_user + row
        raise ValueError(f"ranker: target item {targets[row]} of user {user} is padding, unknown or in the user's history")
    # The target itself gives the 1.
    return sum((scores >= own.to(scores.device)[:, None]).sum(1).cpu() for _, scores in blocks()).numpy()


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
            raise ValueError(f"rank: history {row} must hold at least one item, all of them in 1..{last}")
        if last - len(np.unique(items)) < k:
            raise ValueError(f"rank: history {row} leaves fewer than k={k} unseen items; choose a smaller k")
    table = model.frozen_table(text)
    best_items, best_scores = np.empty((len(sequences), k), dtype=np.int64), np.empty((len(sequences), k), dtype=np.float32)
    for start, states in _last_states(model, sequences, table, USERS):
        top = None
        for first, scores in _item_blocks(states, table, sequences[start : start + len(states)]):
            block = _top(scores, min(k, scores.shape[1]), first)
            top = block if top is None else _merge(top, block, k)
        best_scores[start : start + len(states)], best_items[start : start + len(states)] = top[0].cpu(), top[1].cpu()
    return best_items, best_scores


def _top(scores: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """(scores, items) (b, k) of the best of each row, ties by lower item; column 0 is item ``first``."""
    values, columns = scores.topk(k)
    tied = (scores >= values[:, -1:]).sum(1) > k  # topk may have kept any of the items that tie for the last place
    if tied.any():
        columns[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order) + first


def _merge(best: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best of two results of ``_top``; items of ``best`` have the lower ids and win ties."""
    values, items = (torch.cat(pair, 1) for pair in zip(best, block))
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], items.gather(1, order[:, :k])


def top_k(model: SASRec, sequences: Sequence[np.ndarray], text: Tensor | None, k: int) -> np.ndarray:
    """The items of ``rank`` alone: int64 (U, k)."""
    return rank(model, sequences, k, text)[0]


def add_items(model: SASRec, text: Tensor, rows: Tensor) -> tuple[SASRec, Tensor]:
    """A frozen copy of ``model`` that also ranks len(``rows``) items it never saw, and ``text`` with ``rows`` below it.

    ``rows`` (n, text_dim) are the new items' text vectors from the base LLM; their ids follow on from I. With nothing
    learned from behaviour, e = 0: a new item stands where its text puts it.
    """
    model._check_text(text)
    if rows.ndim != 2 or rows.shape[1] != text.shape[1]:
        raise ValueError(f"add_items: rows have shape {tuple(rows.shape)}, expected (n, text_dim) = (n, {text.shape[1]})")
    larger = SASRec(**{**model.arguments, "n_items": model.n_items + len(rows)})
    state = model.state_dict()
    state["items.weight"] = F.pad(state["items.weight"], (0, 0, 0, len(rows)))
    larger.load_state_dict(state)
    return freeze(larger.to(model.device)), torch.cat([text, rows.to(text)])


def scores_sha256(model: SASRec, sequences: Sequence[np.ndarray], text: Tensor | None) -> str:
    """Hex sha256 of the bytes of all scores, users x items: equal hashes mean a bit-identical ranking."""
    digest = hashlib.sha256()
    for _, scores in score_chunks(model, sequences, text):
        digest.update(scores.numpy().tobytes())
    return digest.hexdigest()


def state_sha256(model: nn.Module) -> str:
    """Hex sha256 of names, types, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()


def freeze(model: SASRec) -> SASRec:
    """``model`` in eval mode with no parameter that takes a gradient."""
    return model.requires_grad_(False).eval()


def save(model: SASRec, path: Path) -> None:
    """Weights and constructor arguments as safetensors, written whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, safetensors_bytes(tensors, metadata={"sasrec": json.dumps(model.arguments)}))


def load(path: Path) -> SASRec:
    """The model that ``save`` wrote, on the CPU, frozen. Raises ``FileNotFoundError`` or ``ValueError``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the ranker notebook first")
    try:
        with safe_open(path, framework="pt") as file:
            arguments = (file.metadata() or {}).get("sasrec")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); run the ranker notebook again") from None
    if arguments is None:
        raise ValueError(f"{path}: no SASRec in this file (metadata field 'sasrec' is missing)")
    model = SASRec(**json.loads(arguments))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: weights do not fit the stored arguments ({error})") from None
    return freeze(model)
