"""Training of SASRec: batches, loss, early stopping, averaged weights."""

from copy import deepcopy
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from recrl_lib.data.splits import Split
from recrl_lib.params import TOP_K, Params
from recrl_lib.progress import track
from recrl_lib.ranker.metrics import ndcg_at
from recrl_lib.ranker.ranking import pad_sequences, target_ranks
from recrl_lib.ranker.sasrec import SASRec, freeze

FULL_SOFTMAX_ITEMS = 100_000  # larger catalogues train on a sample of items
NEGATIVES = 4096  # sampled items a step


def fit(
    params: Params,
    split: Split,
    n_items: int,
    text: Tensor | None,
    seed: int,
    device: str | torch.device = "cpu",
) -> tuple[SASRec, list[dict[str, float]]]:
    """Train the ranker that ``params.ranker_*`` describe, on ``split`` of I = ``n_items`` items.

    ``text`` (I+1, d): vectors of the base LLM; None trains plain SASRec. ``seed`` decides weights,
    batches and dropout; the global random state is left as it was. Returns the frozen ranker on the
    CPU, and one row an epoch: epoch, loss, valid_ndcg@10.
    """
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(cuda):  # layers and dropout draw from the global generator
        names = ("dim", "layers", "heads", "max_len", "dropout", "item_dropout")
        chosen = {name: getattr(params, f"ranker_{name}") for name in names}
        model = SASRec(n_items, text_dim=0 if text is None else text.shape[1], seed=seed, **chosen)
        if text is not None:
            model.fit_text(text)
            text = text.to(device)
        torch.manual_seed(seed)
        curve = _train(model.to(device), split, text, params, seed)
    return freeze(model.cpu()), curve


def _train(
    model: SASRec, split: Split, text: Tensor | None, params: Params, seed: int
) -> list[dict[str, float]]:
    """Fit ``model`` to ``split.training``; leave it with the weights of the best epoch.

    Each epoch cuts every history into windows of ``max_len + 1`` items at a random offset. What is
    validated and kept is the moving average of the weights (Polyak & Juditsky 1992). Training stops
    after ``ranker_patience`` epochs without a better NDCG@10.
    """
    noise = None
    if model.n_items > FULL_SOFTMAX_ITEMS:
        noise = negative_probabilities(split.training, model.n_items).to(model.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=params.ranker_lr, fused=True)
    average, rng = averaged(model, params.ranker_average), np.random.default_rng(seed)
    kept = cast(SASRec, average.module)
    best, best_epoch, best_state, curve = -1.0, 0, {}, []
    for epoch in track(range(1, params.ranker_epochs + 1), "ranker"):
        total, count = 0.0, 0
        windows = windows_of(split.training, model.max_len + 1, rng)
        windows = windows[torch.from_numpy(rng.permutation(len(windows)))]
        for rows in windows.split(params.ranker_batch):
            loss, positions = _loss(model.train(), rows.to(model.device), text, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            total, count = total + loss.item() * positions, count + positions
        ranks = target_ranks(kept, split.train, split.valid, text)
        ndcg = float(ndcg_at(ranks, TOP_K).mean())
        curve.append({"epoch": epoch, "loss": total / count, "valid_ndcg@10": ndcg})
        if ndcg > best:
            best, best_epoch = ndcg, epoch
            best_state = deepcopy(kept.state_dict())
        if epoch - best_epoch >= params.ranker_patience:
            break
    model.load_state_dict(best_state)
    return curve


def averaged(model: SASRec, decay: float) -> AveragedModel:
    """The moving average of ``model``'s weights; its first steps are forgotten sooner."""

    def update(kept: Tensor, current: Tensor, step: Tensor | int) -> Tensor:
        return kept.lerp(current, 1.0 - min(decay, float(step) / (float(step) + 9)))

    average = AveragedModel(model, avg_fn=update)
    average.n_averaged.fill_(1)  # else the first update replaces the start instead of averaging
    return average


def _loss(
    model: SASRec, windows: Tensor, text: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, int]:
    """(mean cross-entropy a position, number of positions) of ``windows`` (b, width), over all
    items, or over a sample from ``noise``: then only the item vectors in use are computed."""
    if noise is None:
        table = model.item_table(text)
    else:
        drawn = torch.multinomial(noise, NEGATIVES, replacement=True)
        read = torch.cat([drawn.new_zeros(1), windows.flatten(), drawn])
        used, places = read.unique(return_inverse=True)
        table = model.item_table(text, used)  # a small catalogue, with 0 as padding still
        windows, negatives = places[1 : 1 + windows.numel()].view_as(windows), places[-NEGATIVES:]
    inputs, targets = windows[:, :-1], windows[:, 1:]
    real = inputs > 0
    states, targets = model(inputs, table)[real], targets[real]
    if noise is None:
        return F.cross_entropy(states @ table[1:].T, targets - 1), len(targets)
    log_expected = (NEGATIVES * noise[drawn]).log()
    return sampled_softmax(states, table, targets, negatives, log_expected), len(targets)


def negative_probabilities(sequences: list[np.ndarray], n_items: int) -> Tensor:
    """Probabilities (I+1,) of the negatives: popularity, plus one so that each has a chance."""
    counts = np.bincount(np.concatenate(sequences), minlength=n_items + 1) + 1.0
    counts[0] = 0.0
    return torch.from_numpy(counts / counts.sum()).float()


def windows_of(sequences: list[np.ndarray], width: int, rng: np.random.Generator) -> Tensor:
    """All sequences cut into windows of at most ``width`` items, left-padded: int64 (W, width).

    Neighbouring windows share one item, so that every transition is in exactly one window. A
    sequence longer than one window is cut at a random offset.
    """
    step, rows = width - 1, []  # transitions in a full window
    for items, shift in zip(sequences, rng.integers(0, step, len(sequences))):
        transitions = len(items) - 1
        start = -int(shift) if transitions > step else 0
        rows += [items[max(i, 0) : i + width] for i in range(start, transitions, step)]
    return pad_sequences(rows, width)


def sampled_softmax(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, log_expected: Tensor
) -> Tensor:
    """Mean cross-entropy with the sum over all items estimated from ``negatives``, int64 (n,),
    shared by all rows.

    ``log_expected`` (n,): log(n q_j), how often item j was expected in the draw; subtracting it
    from the logits (the logQ correction, Bengio & Senecal 2008) makes the estimate of the sum
    unbiased, E[exp(s_y) + sum_{j != y} exp(s_j) / (n q_j)] = sum_i exp(s_i), for any q > 0. The
    target is always in the sum and is not corrected; its accidental draws are left out.
    """
    own = (states * table[targets]).sum(1, keepdim=True)
    logits = states @ table[negatives].T - log_expected
    logits = logits.masked_fill(targets[:, None] == negatives, -torch.inf)
    return (torch.cat([own, logits], 1).logsumexp(1, keepdim=True) - own).mean()
