"""Training of SASRec: batches, loss, early stopping, averaged weights."""

import copy

import numpy as np
import torch
from torch import Tensor

from recrl_lib.data.splits import Split
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.ranker.metrics import ndcg_at
from recrl_lib.ranker.ranking import target_ranks
from recrl_lib.ranker.sasrec import SASRec, freeze
from recrl_lib.ranker.softmax import full_softmax, sampled_softmax

FULL_SOFTMAX_ITEMS, NEGATIVES = (
    100_000,
    4096,
)  # larger catalogues train on a sample of this many items a step


def fit(
    params: Params,
    split: Split,
    n_items: int,
    text: Tensor | None,
    seed: int,
    device: str | torch.device = "cpu",
) -> tuple[SASRec, list[dict[str, float]]]:
    """(the ranker of a run's parameters, trained and frozen, on the CPU; its curve). ``text`` None: plain SASRec."""
    model = SASRec(
        n_items,
        params.ranker_dim,
        params.ranker_layers,
        params.ranker_heads,
        params.ranker_max_len,
        params.ranker_dropout,
        text_dim=0 if text is None else text.shape[1],
        seed=seed,
        item_dropout=params.ranker_item_dropout,
    )
    if text is not None:
        model.fit_text(text)
    curve = train(
        model,
        split,
        text,
        lr=params.ranker_lr,
        batch=params.ranker_batch,
        epochs=params.ranker_epochs,
        patience=params.ranker_patience,
        seed=seed,
        device=device,
        average=params.ranker_average,
    )
    return freeze(model.cpu()), curve


def train(
    model: SASRec,
    split: Split,
    text: Tensor | None,
    *,
    lr: float,
    batch: int,
    epochs: int,
    patience: int,
    seed: int,
    device: str | torch.device = "cpu",
    average: float = 0.0,
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
    noise = (
        _noise(split.training, model.n_items).to(device)
        if model.n_items > FULL_SOFTMAX_ITEMS
        else None
    )
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


def _batches(
    sequences: list[np.ndarray], width: int, batch: int, rng: np.random.Generator
) -> tuple[Tensor, ...]:
    """All windows of the sequences in random order, ``batch`` at a time."""
    windows = _windows(sequences, width, rng)
    return windows[torch.from_numpy(rng.permutation(len(windows)))].split(batch)


def _loss(
    model: SASRec, windows: Tensor, text: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, int]:
    """(mean cross-entropy a position, number of positions) of ``windows`` (b, width).

    ``noise`` None: over all items. Else over a sample from ``noise``, and no more item vectors than those of the
    windows and the sample are computed.
    """
    if noise is None:
        table = model.item_table(text)
    else:
        drawn = torch.multinomial(noise, NEGATIVES, replacement=True)
        used, places = torch.cat([drawn.new_zeros(1), windows.flatten(), drawn]).unique(
            return_inverse=True
        )
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
