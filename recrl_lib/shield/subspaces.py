"""Gram matrices of layer inputs, and the directions to protect that are chosen from them.

``model`` is a PEFT model with LoRA layers, or an object with a method ``adapted_modules()`` that
lists (name, key, module), where layers that read the same input share a key (this project's
``Explainer``: ``"<layer>.attention"`` for query, key and value, ``"<layer>.output"``). Gram
matrices and subspaces are mappings by that key; d is the width of the input.

Bases, the directions that ``protect`` can take first:

* ``activation``: the top eigenvectors of the protected texts' Gram matrix.
* ``contrastive``: what stays free is where explanations have energy and item texts have little.
* ``sensitivity``: ``activation`` with tokens weighted by how strongly the ranking's scores react to
  the layer's output there; every layer may do equal damage by this measure.
* ``readout``: the ranker's own basis carried to the layer inputs.
* ``random``: a control.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # not imported at run time: the shield can be used without the explainer
    from recrl_lib.explainer.item_texts import ItemTexts
    from recrl_lib.explainer.model import Explainer

BASES = ("activation", "sensitivity", "contrastive", "readout", "random")
SOURCES = {"contrastive": "prompts", "sensitivity": "sensitivity", "readout": "readout"}
WEIGHTED = ("sensitivity",)  # k from equal damage in every layer input, not from its energy


# --- Gram matrices --------------------------------------------------------------------------------


def adapted_layers(model: Any) -> list[tuple[str, str, nn.Module]]:
    """(name, key of its input, module) of every linear LoRA layer of ``model``."""
    if hasattr(model, "adapted_modules"):
        return list(model.adapted_modules())
    return [(n, n, m) for n, m in model.named_modules() if len(getattr(m, "lora_A", ())) > 0]


class GramCollector(ExitStack):
    """Sums x x^T over every adapted layer's inputs until it is closed: ``grams`` (d, d) float64."""

    def __init__(self, model: Any):
        super().__init__()
        self.grams: dict[str, Tensor] = {}
        self.tokens = 0
        self._mask = torch.empty(0, dtype=torch.bool)
        one_a_key = {key: module for _, key, module in adapted_layers(model)}
        for key, module in one_a_key.items():
            self.enter_context(module.register_forward_pre_hook(partial(self._add, key)))

    def masked(self, mask: Tensor) -> None:
        """The next batch's (B, T) mask: padded tokens are excluded from the Gram matrix."""
        self._mask = mask.bool()
        self.tokens += int(self._mask.sum())

    def _add(self, key: str, module: nn.Module, args: tuple) -> None:
        x = args[0].detach()[self._mask].double()
        gram = self.grams.get(key)
        self.grams[key] = x.T @ x if gram is None else gram.addmm_(x.T, x)


@torch.no_grad()
def collect_grams(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Gram matrices of a PEFT model's layer inputs over ``model(**batch)``, adapters off."""
    training = model.training
    model.eval()  # no dropout
    with model.disable_adapter(), GramCollector(model) as collector:
        for batch in batches:
            mask = batch.get("attention_mask")
            collector.masked(torch.ones_like(batch["input_ids"]) if mask is None else mask)
            model(**batch)
    model.train(training)
    return collector.grams


@torch.no_grad()
def state_grams(
    explainer: Explainer, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], int]:
    """(Gram matrices, tokens) under the base model over (trunk states (B, T, d), mask (B, T))."""
    with explainer.reference(), GramCollector(explainer) as collector:
        for states, mask in batches:
            mask = mask.to(explainer.device)
            collector.masked(mask)
            explainer.top(states.to(explainer.device), mask)
    return collector.grams, collector.tokens


def item_grams(
    explainer: Explainer, items: ItemTexts, only: set[int] | None = None
) -> tuple[dict[str, Tensor], int]:
    """The same over the item texts. ``only``: item numbers to use, None for all."""
    from recrl_lib.progress import track

    def batches():
        for (numbers, ids), states in zip(track(items.batches, "item Grams"), items.states()):
            keep = torch.tensor([only is None or int(n) in only for n in numbers])
            if keep.any():
                yield states[keep], torch.ones_like(ids[keep])

    return state_grams(explainer, batches())


def sensitivity_grams(
    explainer: Explainer, items: ItemTexts, readout: Tensor, probes: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """Gram matrices of the ``probes``' item texts, every token weighted by |d score / d y|^2.

    y are the outputs of the layers that read the input. The score is ``u . R t`` with R =
    ``readout`` (d_rank, d) and u = ``probes[item number]`` (d_rank,), the state of one user. The
    trace outside a subspace is then, up to a factor common to all layers, the squared score change
    that an isotropic update of the free directions would cause if what the tokens contribute did
    not interfere (products of two tokens are left out): a measure that compares layers.
    """
    from recrl_lib.progress import track

    grams: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[tuple[str, str], Tensor] = {}

    def keep(key: str, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        inputs[key], outputs[key, name] = args[0], output

    with explainer.reference(), ExitStack() as hooks:
        for name, key, module in explainer.adapted_modules():
            hooks.enter_context(module.register_forward_hook(partial(keep, key, name)))
        for (numbers, _), states in zip(track(items.batches, "sensitivities"), items.states()):
            probed = torch.tensor([int(i) in probes for i in numbers])
            if not probed.any():
                continue
            states = states[probed].to(explainer.device).requires_grad_(True)
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=explainer.device)
            vectors = explainer.top(states, mask).mean(1)
            users = torch.stack([probes[int(i)] for i in numbers[probed]]).to(vectors)
            scores = users * (vectors @ readout.to(vectors).T)
            slopes = torch.autograd.grad(scores.sum(), list(outputs.values()))
            weights: dict[str, Tensor] = {}
            for (key, _), slope in zip(outputs, slopes):
                weights[key] = weights.get(key, 0.0) + slope.square().sum(-1)
            for key, weight in weights.items():
                x, w = inputs[key].detach().flatten(0, 1).double(), weight.flatten().double()
                grams[key] = grams.get(key, 0.0) + (x * w[:, None]).T @ x
    return grams


# --- protected subspaces --------------------------------------------------------------------------


@dataclass
class Subspace:
    """A protected input subspace of one layer.

    ``basis`` starts an orthonormal frame of the whole input space, the direction to protect first
    in column 0; ``spectrum`` is the protected texts' energy ``q^T G q`` along each direction of
    that frame (basis ``activation``: the eigenvalues of G, largest first).
    """

    basis: Tensor  # Q (d, k), orthonormal columns, float64
    spectrum: Tensor  # (d,)

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


@dataclass
class GramMatrices:
    """What the bases are made of; only ``items`` is needed by all."""

    items: Mapping[str, Tensor]  # of the texts to protect
    prompts: Mapping[str, Tensor] | None = None  # of prompts with explanations: contrastive
    sensitivity: Mapping[str, Tensor] | None = None  # ``sensitivity_grams``: sensitivity
    readout: Mapping[str, Tensor] | None = None  # (d_rank, d) ``readout_rows``: readout
    seed: int = 0  # random

    def behind(self, basis: str) -> Mapping[str, Tensor]:
        """What ``basis`` is made of; ``ValueError`` if it is unknown or lacks its matrices."""
        if basis not in BASES:
            raise ValueError(f"shield_basis={basis!r}: choose one of {', '.join(BASES)}")
        source = SOURCES.get(basis, "items")
        if getattr(self, source) is None:
            raise ValueError(f"shield_basis={basis!r} needs GramMatrices.{source}")
        return getattr(self, source)


def protect(
    grams: GramMatrices | Mapping[str, Tensor],
    basis: str = "activation",
    energy: float = 0.99,
    rank: int = 0,
) -> dict[str, Subspace]:
    """The subspace of every layer input: the fewest directions that hold ``energy``, or ``rank``.

    The energy is that of the protected texts. For basis ``sensitivity`` every layer input may
    instead leave the same absolute (1 - energy) of the mean weighted trace outside. Raises
    ``ValueError`` for an unknown basis, missing Gram matrices, one that is not finite, or if
    nothing is left to learn (k = d).
    """
    if not isinstance(grams, GramMatrices):
        grams = GramMatrices(grams)
    source = grams.behind(basis)
    measured = source if basis in WEIGHTED else grams.items
    allowed = (1 - energy) * sum(float(g.trace()) for g in measured.values()) / len(measured)
    found = {}
    for number, (name, gram) in enumerate(grams.items.items()):
        if not torch.isfinite(gram).all():
            raise ValueError(f"Gram matrix of {name} is not finite: a text gives inf or nan")
        gram = gram.cpu()  # float64 eigh differs between GPU libraries
        frame = _frame(basis, gram, source[name].cpu(), grams.seed * 1000 + number)
        along = _energy_along(frame, measured[name].cpu())
        needed = 1 - allowed / float(along.sum()) if basis in WEIGHTED else energy
        k = rank or (int((along.cumsum(0) / along.sum() < needed).sum()) + 1 if needed > 0 else 0)
        if k >= len(gram):
            raise ValueError(
                f"layer input {name}: protecting {k} of {len(gram)} directions leaves nothing to "
                "learn; lower shield_energy or shield_rank"
            )
        found[name] = Subspace(frame[:, :k].contiguous(), _energy_along(frame, gram))
    return found


def subspaces(grams: Mapping[str, Tensor], energy: float, rank: int = 0) -> dict[str, Subspace]:
    """``protect`` with basis ``activation``."""
    return protect(grams, "activation", energy, rank)


def _energy_along(frame: Tensor, gram: Tensor) -> Tensor:
    return (frame * (gram @ frame)).sum(0).clamp(min=0)


def _frame(basis: str, gram: Tensor, source: Tensor, seed: int) -> Tensor:
    """An orthonormal frame (d, d) of one layer input, column 0 to be protected first."""
    if basis in ("activation", "sensitivity"):
        return torch.linalg.eigh(source)[1].flip(1)
    if basis == "contrastive":
        return contrastive_frame(gram, source)
    if basis == "readout":
        rows = source.double().T
        return torch.linalg.qr(torch.cat([rows, torch.eye(len(gram)).double()], dim=1))[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(gram.shape, generator=generator, dtype=torch.float64))[0]


def contrastive_frame(items: Tensor, prompts: Tensor, ridge: float = 1e-3) -> Tensor:
    """A frame whose last m columns have the most explanation energy per item-text energy.

    These solve ``P v = l (G + ridge tr(G)/d I) v`` for the largest l, with P = ``prompts`` and G =
    ``items``, both (d, d). The QR makes them orthonormal, so that no direction is amplified: in the
    free space the adapter learns at its usual speed.
    """
    d = len(items)
    values, vectors = torch.linalg.eigh(items * (d / items.trace()))
    whiten = (vectors * (values.clamp(min=0) + ridge).rsqrt()) @ vectors.T
    _, directions = torch.linalg.eigh(whiten @ prompts @ whiten)
    return torch.linalg.qr(whiten @ directions.flip(1))[0].flip(1)


def readout_of(ranker) -> Tensor:
    """R (d_rank, d): how a ranker's item vectors react to text vectors, ``W diag(1 / scale)``."""
    return (ranker.text.weight / ranker.text_scale).detach()


def readout_rows(explainer: Explainer, readout: Tensor) -> dict[str, Tensor]:
    """``readout`` carried to every layer input; through the output projection if it reads that."""
    rows = {}
    for _, key, module in explainer.adapted_modules():
        rows[key] = readout.double()
        if key.endswith(".output"):
            weight = module.base_layer.weight.detach().double()
            rows[key] = readout.to(weight) @ weight
    return rows


# --- what they cost, and how they are stored ------------------------------------------------------


def megabytes(protected: Mapping[str, Subspace]) -> float:
    """Memory of the bases, and of the complements where the shield projects on these, in MB."""
    parts = [part for s in protected.values() for part in (s.basis, s.free)]
    return sum(part.numel() * part.element_size() for part in parts) / 2**20


def price(protected: Mapping[str, Subspace], prompts: Mapping[str, Tensor]) -> float:
    """Free item energy per free energy of ``prompts`` (Gram matrices), a mean over the layers.

    It needs no training and foresees what learning costs the ranking. 1: the directions cannot tell
    item texts and prompts apart.
    """
    ratios = [(1 - s.energy) / (1 - s.holds(prompts[name])) for name, s in protected.items()]
    return sum(ratios) / len(ratios)


def to_tensors(protected: Mapping[str, Subspace]) -> dict[str, Tensor]:
    """For safetensors: ``<key>/basis`` and ``<key>/spectrum``."""
    parts = ("basis", "spectrum")
    return {f"{name}/{part}": getattr(s, part) for name, s in protected.items() for part in parts}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Subspace]:
    """The subspaces that ``to_tensors`` wrote, in the order of the layers."""
    names = {key.rsplit("/", 1)[0] for key in tensors}
    ordered = sorted(names, key=lambda name: [(len(p) * p.isdigit(), p) for p in name.split(".")])
    return {n: Subspace(tensors[f"{n}/basis"], tensors[f"{n}/spectrum"]) for n in ordered}
