"""Gram matrices of layer inputs, and the directions to protect that are chosen from them.

``model`` is a PEFT model with LoRA layers, or an object with a method ``adapted_modules()`` that
lists (name, key, module); layers that read the same input share a key (``Explainer``:
``"<layer>.attention"`` for query, key and value, ``"<layer>.output"``). Gram matrices and subspaces
are mappings by that key; d is the width of the input.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

Explainer = Any  # neither is imported: the shield can be used without the explainer
ItemTexts = Any
Grams = Mapping[str, Tensor]  # layer input -> Gram matrix (d, d), float64
Counted = tuple[dict[str, Tensor], int]  # Gram matrices and the tokens in them


def adapted_layers(model: Any) -> list[tuple[str, str, nn.Module]]:
    """(name, key of its input, module) of every linear LoRA layer of ``model``."""
    if hasattr(model, "adapted_modules"):
        return model.adapted_modules()
    return [(n, n, m) for n, m in model.named_modules() if len(getattr(m, "lora_A", ())) > 0]


@torch.no_grad()
def _sum_inputs(model: Any, passes: Iterable[tuple[Tensor, Callable]]) -> Counted:
    """Sums of x x^T over every layer input; a pass: mask (B, T), call of the model."""
    grams: dict[str, Tensor] = {}
    tokens, mask = 0, torch.empty(0)

    def add(key: str, module: nn.Module, args: tuple) -> None:
        x = args[0][mask].double()  # no padding
        grams[key] = grams[key].addmm_(x.T, x) if key in grams else x.T @ x

    with ExitStack() as hooks:
        for key, module in {key: module for _, key, module in adapted_layers(model)}.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(add, key)))
        for mask, forward in passes:
            tokens += int(mask.sum())
            forward()
    return grams, tokens


def collect_grams(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Gram matrices of a PEFT model's layer inputs over ``model(**batch)``, adapters off."""
    masks = ((b.get("attention_mask", torch.ones_like(b["input_ids"])), b) for b in batches)
    training = model.training
    model.eval()  # no dropout
    with model.disable_adapter():
        grams, _ = _sum_inputs(model, ((m.bool(), partial(model, **b)) for m, b in masks))
    model.train(training)
    return grams


def state_grams(explainer: Explainer, batches: Iterable[tuple[Tensor, Tensor]]) -> Counted:
    """Gram matrices over trunk states (B, T, d) with masks (B, T), adapters off."""
    device = explainer.device
    placed = ((states.to(device), mask.to(device).bool()) for states, mask in batches)
    with explainer.reference():
        return _sum_inputs(explainer, ((m, partial(explainer.top, s, m)) for s, m in placed))


def item_grams(explainer: Explainer, items: ItemTexts, only: set[int] | None = None) -> Counted:
    """The same over the item texts, of the item numbers ``only`` if given."""
    parts = items_of(items, only, "item Grams")
    return state_grams(explainer, ((s, torch.ones(s.shape[:2])) for _, s in parts))


def items_of(
    items: ItemTexts, only: Container[int] | None = None, desc: str = "item texts"
) -> Iterator[tuple[Tensor, Tensor]]:
    """(item numbers (b,), trunk states (b, T, d)) of every batch of texts of one length."""
    from recrl_lib.progress import track

    for (numbers, _), states in zip(track(items.batches, desc), items.states()):
        keep = torch.tensor([only is None or n in only for n in numbers.tolist()])
        if keep.any():
            yield numbers[keep], states[keep]


@dataclass
class Subspace:
    """A protected input subspace of one layer: the first columns of an orthonormal frame."""

    basis: Tensor  # Q (d, k), float64
    spectrum: Tensor  # (d,) the protected texts' energy q^T G q along the whole frame's directions

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def width(self) -> int:
        return self.basis.shape[0]

    @cached_property
    def free(self) -> Tensor:
        """An orthonormal basis (d, d - k) of the complement if smaller than Q, else (d, 0)."""
        if 2 * self.rank <= self.width:
            return self.basis[:, :0]
        return torch.linalg.qr(self.basis, mode="complete")[0][:, self.rank :].contiguous()

    @property
    def energy(self) -> float:
        """Share of the protected texts' energy (trace of their Gram matrix) inside the subspace."""
        return float(self.spectrum[: self.rank].sum() / self.spectrum.sum())

    def holds(self, gram: Tensor) -> float:
        """Share of another Gram matrix's trace inside the subspace: tr(Q^T G Q) / tr(G)."""
        gram = gram.to(self.basis)
        return float((self.basis * (gram @ self.basis)).sum() / gram.trace())


def protect(
    grams: Grams, energy: float = 0.99, rank: int = 0, prompts: Grams | None = None
) -> dict[str, Subspace]:
    """The subspace of every layer input: the fewest directions that hold ``energy``, or ``rank``.

    ``grams`` are of the texts to protect, whose top eigenvectors come first (shield_basis
    "activation"); with those of ``prompts`` and their explanations, the columns of
    ``contrastive_frame``. ``ValueError``: infinite Gram matrices, or nothing left to learn (k = d).
    """
    found = {}
    for name, gram in grams.items():
        if not torch.isfinite(gram).all():
            raise ValueError(f"Gram matrix of {name} is not finite: a text gives inf or nan")
        gram = gram.cpu()  # float64 eigh differs between GPU libraries
        if prompts is None:
            frame = torch.linalg.eigh(gram)[1].flip(1)
        else:
            frame = contrastive_frame(prompts[name].cpu(), gram)
        along = (frame * (gram @ frame)).sum(0).clamp(min=0)
        needed = int((along.cumsum(0) / along.sum() < energy).sum()) + 1 if energy > 0 else 0
        k = rank or needed
        if k >= len(gram):
            left = f"layer input {name}: protecting {k} of {len(gram)} leaves nothing to learn"
            raise ValueError(f"{left}; lower shield_energy or shield_rank")
        found[name] = Subspace(frame[:, :k].contiguous(), along)
    return found


def contrastive_frame(prompts: Tensor, items: Tensor, ridge: float = 1e-3) -> Tensor:
    """A frame whose last m columns have the most explanation energy per item-text energy.

    They span the solutions of ``P v = l (G + ridge tr(G)/d I) v`` with the largest l, for P =
    ``prompts`` and G = ``items``, both (d, d).
    """
    values, vectors = torch.linalg.eigh(items * (len(items) / items.trace()))
    whiten = (vectors * (values.clamp(min=0) + ridge).rsqrt()) @ vectors.T
    _, directions = torch.linalg.eigh(whiten @ prompts @ whiten)
    return torch.linalg.qr(whiten @ directions.flip(1))[0].flip(1)


def readout_of(ranker) -> Tensor:
    """R (d_rank, d): how a ranker's item vectors react to text vectors, ``W diag(1 / scale)``."""
    return (ranker.text.weight / ranker.text_scale).detach()


def to_tensors(protected: Mapping[str, Subspace]) -> dict[str, Tensor]:
    """For safetensors: ``<key>/basis`` and ``<key>/spectrum``."""
    bases = {f"{name}/basis": space.basis for name, space in protected.items()}
    return bases | {f"{name}/spectrum": space.spectrum for name, space in protected.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Subspace]:
    """The subspaces that ``to_tensors`` wrote."""
    names = dict.fromkeys(key.rsplit("/", 1)[0] for key in tensors)
    return {n: Subspace(tensors[f"{n}/basis"], tensors[f"{n}/spectrum"]) for n in names}
