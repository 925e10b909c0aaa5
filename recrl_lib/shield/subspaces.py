"""Protected subspaces: Gram matrices of layer inputs, and the directions chosen from them."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer, left_pad
from recrl_lib.progress import track

BASES = ("activation", "sensitivity", "boundary", "contrastive", "readout", "random")
WEIGHTED = (
    "sensitivity",
    "boundary",
)  # bases from weighted Grams, with equal damage (``sensitivity_grams``) for every layer input


# --- what the ranker reads ----------------------------------------------------------------------


class GramCollector:
    """Sums x x^T over the inputs of every adapted layer while it is open.

    q, k and v of a layer read the same input, so there are two Grams a layer:
    ``"<layer>.attention"`` and ``"<layer>.output"``, each (d_in, d_in) float64.
    """

    def __init__(self, explainer: Explainer):
        self.grams: dict[str, Tensor] = {}
        self.tokens = 0
        self._mask: Tensor | None = None
        self._handles = []
        self._readers = {
            key: module for _, key, module in explainer.adapted_modules()
        }  # one of those that share an input

    def __enter__(self) -> "GramCollector":
        for key, module in self._readers.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(key)))
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def masked(self, mask: Tensor) -> None:
        """The (B, T) mask of the batch that is run next: padding has no say in the Gram."""
        self._mask = mask.bool()
        self.tokens += int(self._mask.sum())

    def _hook(self, name: str):
        def add(module, args):
            x = args[0].detach()[self._mask].double()
            gram = self.grams.get(name)
            self.grams[name] = x.T @ x if gram is None else gram.addmm_(x.T, x)

        return add


@torch.no_grad()
def item_grams(
    explainer: Explainer, items: ItemTexts, only: set[int] | None = None, tuned: bool = False
) -> tuple[dict[str, Tensor], int]:
    """(Grams of the adapted layers' inputs over the item texts under the base model, number of tokens).

    ``only``: item numbers to use; the rest is held out. ``tuned``: under the adapters as they are instead.
    """
    with nullcontext() if tuned else explainer.reference(), GramCollector(explainer) as collector:
        for (numbers, ids), states in zip(track(items.batches, "item Grams"), items.states()):
            keep = torch.tensor([only is None or int(n) in only for n in numbers])
            if keep.any():
                mask = torch.ones_like(ids[keep], device=explainer.device)
                collector.masked(mask)
                explainer.top(states[keep].to(explainer.device), mask)
    return collector.grams, collector.tokens


@torch.no_grad()
def prompt_grams(
    explainer: Explainer, prompts: list[list[int]], batch: int = 16
) -> tuple[dict[str, Tensor], int]:
    """The same over token sequences (explanation prompts, or prompts with their explanations)."""
    with explainer.reference(), GramCollector(explainer) as collector:
        for start in track(range(0, len(prompts), batch), "prompt Grams"):
            ids, mask = left_pad(prompts[start : start + batch], explainer.pad_id, explainer.device)
            collector.masked(mask)
            explainer.top(explainer.trunk(ids, mask), mask)
    return collector.grams, collector.tokens


def sensitivity_grams(
    explainer: Explainer, items: ItemTexts, readout: Tensor, probes: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """Grams of the ``probes``' item texts with every token weighted by ``sum |d score / d y|^2`` over the layer's answers y.

    The score is ``u . R t`` with R = ``readout`` (d_rank, d), how the ranker reads text, and u = ``probes[item number]``
    (d_rank,), the state of one user. The trace of ``G`` outside a subspace is then, up to a factor common to all
    layers, the squared score change that an isotropic update of the free directions would cause if what the tokens
    contribute did not interfere (products of two tokens are left out): a measure that compares layers.
    """
    grams: dict[str, Tensor] = {}
    inputs, answers = {}, {}

    def hook(key: str, name: str):
        def keep(module, args, output):
            inputs[key], answers[key, name] = args[0], output

        return keep

    handles = [
        module.register_forward_hook(hook(key, name))
        for name, key, module in explainer.adapted_modules()
    ]
    try:
        with explainer.reference():
            for (numbers, ids), states in zip(
                track(items.batches, "sensitivities"), items.states()
            ):
                keep = torch.tensor([int(i) in probes for i in numbers])
                if not keep.any():
                    continue
                states = states[keep].to(explainer.device).requires_grad_(True)
                text = explainer.top(
                    states, torch.ones(states.shape[:2], dtype=torch.long, device=explainer.device)
                ).mean(1)
                probe = torch.stack([probes[int(i)] for i in numbers[keep]]).to(text)
                names = list(answers)
                gradients = torch.autograd.grad(
                    (probe * (text @ readout.to(text).T)).sum(), [answers[k] for k in names]
                )
                weights: dict[str, Tensor] = {}
                for (key, _), gradient in zip(names, gradients):
                    weights[key] = weights.get(key, 0.0) + gradient.square().sum(-1)
                for key, weight in weights.items():
                    x, w = inputs[key].detach().flatten(0, 1).double(), weight.flatten().double()
                    gram = (x * w[:, None]).T @ x
                    grams[key] = grams[key] + gram if key in grams else gram
    finally:
        for handle in handles:
            handle.remove()
    return grams


# --- protected subspaces --------------------------------------------------------------------------


@dataclass
class Subspace:
    """A protected input subspace of one layer.

    ``basis`` starts an orthonormal frame of the whole input space, most protected direction first;
    ``spectrum`` is the item texts' energy ``q^T G q`` along each direction q of that frame. For basis
    ``activation`` these are the eigenvalues of G, largest first.
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
        """An orthonormal basis (d, d - k) of the complement if that is smaller than Q, and then cheaper to project on; else (d, 0)."""
        full = (
            torch.linalg.qr(self.basis, mode="complete")[0]
            if 2 * self.rank > self.width
            else self.basis[:, :0]
        )
        return full[:, self.rank :].contiguous() if full.shape[1] else full

    @property
    def energy(self) -> float:
        """Share of the item texts' energy, the Gram's trace, inside the subspace."""
        return float(self.spectrum[: self.rank].sum() / self.spectrum.sum())

    def holds(self, gram: Tensor) -> float:
        """Share of another Gram's trace inside this subspace: tr(Q^T G Q) / tr(G)."""
        return float(
            (self.basis * (gram.to(self.basis) @ self.basis)).sum() / gram.to(self.basis).trace()
        )


@dataclass
class Evidence:
    """What the bases are made of; only ``items`` is needed by all."""

    items: Mapping[str, Tensor]  # Grams of the item texts
    prompts: Mapping[str, Tensor] | None = (
        None  # of explanation prompts with explanations: contrastive
    )
    sensitivity: Mapping[str, Tensor] | None = (
        None  # ``sensitivity_grams`` of any items and users: sensitivity
    )
    boundary: Mapping[str, Tensor] | None = (
        None  # of items around the tenth place and users they concern: boundary
    )
    readout: Mapping[str, Tensor] | None = None  # (d_rank, d) ``readout_rows``: readout
    seed: int = 0  # random


def subspaces(grams: Mapping[str, Tensor], energy: float, rank: int = 0) -> dict[str, Subspace]:
    """Basis ``activation``: top eigenvectors of each Gram, see ``protect``."""
    return protect(Evidence(grams), "activation", energy, rank)


def protect(evidence: Evidence, basis: str, energy: float, rank: int = 0) -> dict[str, Subspace]:
    """The protected subspace of every layer input: the fewest directions of the basis that hold ``energy``, or exactly ``rank``.

    The energy is that of the item texts, except for ``sensitivity`` and ``boundary``: there every layer input may leave the same
    absolute (1 - energy) of the mean weighted trace outside: equal damage, by this measure.
    Raises ``ValueError`` for an unknown basis, missing evidence, a Gram that is not finite, or if nothing is left
    to learn (k = d).
    """
    if basis not in BASES:
        raise ValueError(f"shield_basis={basis!r}: choose one of {', '.join(BASES)}")
    needs = {
        "contrastive": "prompts",
        "sensitivity": "sensitivity",
        "boundary": "boundary",
        "readout": "readout",
    }.get(basis)
    if needs and getattr(evidence, needs) is None:
        raise ValueError(f"shield_basis={basis!r} needs Evidence.{needs}")
    for name, gram in evidence.items.items():
        if not torch.isfinite(gram).all():
            raise ValueError(
                f"Gram of {name} is not finite: the model gives inf or nan on an item text"
            )
    weighted = getattr(evidence, basis) if basis in WEIGHTED else evidence.items
    allowed = (1 - energy) * sum(float(g.trace()) for g in weighted.values()) / len(weighted)
    found = {}
    for number, (name, gram) in enumerate(evidence.items.items()):
        gram = gram.cpu()  # float64 eigh differs between GPU libraries
        frame = _frame(evidence, basis, name, gram, number)
        measured = weighted[name].cpu()
        along = (frame * (measured @ frame)).sum(0).clamp(min=0)
        needed = 1 - allowed / float(along.sum()) if basis in WEIGHTED else energy
        k = rank or (int((along.cumsum(0) / along.sum() < needed).sum()) + 1 if needed > 0 else 0)
        if k >= len(gram):
            raise ValueError(
                f"layer input {name}: protecting {k} of {len(gram)} directions leaves nothing to learn; "
                "lower shield_energy or shield_rank"
            )
        spectrum = along if measured is gram else (frame * (gram @ frame)).sum(0).clamp(min=0)
        found[name] = Subspace(frame[:, :k].contiguous(), spectrum)
    return found


def _frame(evidence: Evidence, basis: str, name: str, gram: Tensor, number: int) -> Tensor:
    """An orthonormal frame (d, d) of one layer input, the direction to protect first in column 0."""
    if basis == "activation":
        return torch.linalg.eigh(gram)[1].flip(1)
    if basis in WEIGHTED:
        return torch.linalg.eigh(getattr(evidence, basis)[name].cpu())[1].flip(1)
    if basis == "contrastive":
        return contrastive_frame(gram, evidence.prompts[name].cpu())
    if basis == "readout":
        rows = evidence.readout[name].cpu().double()
        return torch.linalg.qr(
            torch.cat([rows.T, torch.eye(len(gram), dtype=torch.float64)], dim=1)
        )[0]
    generator = torch.Generator().manual_seed(evidence.seed * 1000 + number)
    return torch.linalg.qr(torch.randn(gram.shape, generator=generator, dtype=torch.float64))[0]


def contrastive_frame(items: Tensor, prompts: Tensor, ridge: float = 1e-3) -> Tensor:
    """A frame whose last m columns span the m directions with most explanation energy per item-text energy.

    These solve ``P v = l (G + ridge tr(G)/d I) v`` for the largest l; the QR makes them orthonormal, so that no
    direction is amplified: in the free space the adapter learns at the speed it always has.
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
    """``readout`` carried to every layer input: as it is where the residual stream is read, through W_o for the attention's answer."""
    rows = {}
    for _, key, module in explainer.adapted_modules():
        if key.endswith(".output"):
            weight = module.base_layer.weight.detach().double()
            rows[key] = readout.to(weight) @ weight
        else:
            rows[key] = readout.double()
    return rows


def megabytes(protected: Mapping[str, Subspace]) -> float:
    """Memory of the bases while a shield is attached, and of the complements that it projects on where these are smaller."""
    return (
        sum(
            part.numel() * part.element_size()
            for s in protected.values()
            for part in (s.basis, s.free)
        )
        / 2**20
    )


def price(protected: Mapping[str, Subspace], prompts: Mapping[str, Tensor]) -> float:
    """What learning will cost the ranking, before any training: the share of the item texts' energy that stays free over the share of
    the energy of ``prompts`` (Grams) that does, a mean over the layer inputs. 1 for directions that cannot tell the two apart."""
    return float(
        np.mean([(1 - s.energy) / (1 - s.holds(prompts[name])) for name, s in protected.items()])
    )


def to_tensors(protected: dict[str, Subspace]) -> dict[str, Tensor]:
    """For safetensors: ``<name>/basis`` and ``<name>/spectrum``."""
    return {
        f"{n}/{part}": getattr(s, part)
        for n, s in protected.items()
        for part in ("basis", "spectrum")
    }


def from_tensors(tensors: dict[str, Tensor]) -> dict[str, Subspace]:
    names = sorted(
        {key.rsplit("/", 1)[0] for key in tensors}, key=lambda n: (int(n.split(".")[0]), n)
    )
    return {n: Subspace(tensors[f"{n}/basis"], tensors[f"{n}/spectrum"]) for n in names}
