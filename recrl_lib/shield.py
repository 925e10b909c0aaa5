r"""The gradient shield: tuning that cannot touch what the ranker reads.

An adapted linear layer computes ``y = W x + s B A x`` with A (r, d_in) and B (d_out, r). The ranker
meets this layer only through the inputs x that occur while the LLM reads item texts. Let

    G = sum of x x^T over every token of those texts, under the base model (float64),
    Q = the top k eigenvectors of G, (d_in, k), with Q^T Q = I.

*Theorem.* If A Q = 0 in every adapted layer and every input x of every adapted layer lies in
span(Q) for some text, then tuning does not change that text's vector.
*Proof.* The first adapted layer sees the base model's x; x = Q c, so B A x = B (A Q) c = 0 and its
output is the base model's. Layers that carry no adapter are fixed functions, so the next adapted
layer sees the base model's x too; induction over the layers.
*Where it ends.* With k < d_in a share 1 - energy of the input energy lies outside span(Q): that part
does reach the adapters, and what it does is measured, not assumed away.

Three details decide whether A Q = 0 really holds (each measured in ``tests/test_shield.py``):

* Q spans layer *inputs* (the right side of dW = s B A), not outputs and not the ranker's own table.
* A starts at a random value that already overlaps Q: it is projected when the shield attaches.
* Adam rescales element by element, so a projected *gradient* still gives a leaking *step*. Mode
  ``update`` projects the gradient, lets the optimizer step, then projects the parameter:
  ``A <- A - (A Q) Q^T``. Whatever the optimizer did (momentum, decay, stale state), A Q is 0 again.
  The second projection is Adam-NSCL's (Wang et al. 2021, CVPR) and NSPO's (arXiv 2512.11391) idea.

Modes (one flag, so that they can be compared):

========== =====================================================================================
none       hooks nothing; the unshielded arm through the same code
gradient   the gradient of A is projected, and nothing else: the published description; it leaks
update     the default, above
frozen_a   A stays fixed in the null space and only B learns, after InfLoRA (Liang & Li 2024, CVPR)
penalty    no projection: a replay gradient pulls the item vectors back at every step (``Replay``)
restart    trains freely and projects A once, when the shield is detached
align      trains freely; afterwards a linear map takes the new item vectors to the old (``fit_alignment``)
========== =====================================================================================

After any mode with a replay, ``Shield.settle`` may take more of what moved out again: steps of the replay alone, at a
falling rate.

Bases (what Q is; ``protect``): ``activation`` as above; ``sensitivity``, tokens weighted by how strongly the
ranking's scores react to the layer's answer, and k chosen so that every layer may do equal damage by this measure; ``boundary``, the
same over items where a change would show, those around the tenth place, each for a user whom it concerns;
``contrastive``, generalised eigenvectors of the explanations' Gram against the item texts', so that what stays
free is where explanations have energy and item texts have little; ``readout``, the ranker's own basis carried
to the layer inputs; ``random``, a control.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from recrl_lib.explainer import Explainer, ItemTexts, left_pad
from recrl_lib.progress import track

MODES = ("none", "gradient", "update", "frozen_a", "penalty", "restart", "align")
PROJECTING = ("gradient", "update", "frozen_a")  # keep A in the null space from the first step on
BASES = ("activation", "sensitivity", "boundary", "contrastive", "readout", "random")
WEIGHTED = ("sensitivity", "boundary")  # bases from weighted Grams, with equal damage (``sensitivity_grams``) for every layer input
SETTLE_LR = 7e-4  # Adam's rate at the first step of ``Shield.settle``, a quarter of the warm start's; no other was tried at length


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
        self._readers = {key: module for _, key, module in explainer.adapted_modules()}  # one of those that share an input

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
def prompt_grams(explainer: Explainer, prompts: list[list[int]], batch: int = 16) -> tuple[dict[str, Tensor], int]:
    """The same over token sequences (explanation prompts, or prompts with their explanations)."""
    with explainer.reference(), GramCollector(explainer) as collector:
        for start in track(range(0, len(prompts), batch), "prompt Grams"):
            ids, mask = left_pad(prompts[start:start + batch], explainer.pad_id, explainer.device)
            collector.masked(mask)
            explainer.top(explainer.trunk(ids, mask), mask)
    return collector.grams, collector.tokens


def sensitivity_grams(explainer: Explainer, items: ItemTexts, readout: Tensor, probes: Mapping[int, Tensor]) -> dict[str, Tensor]:
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

    handles = [module.register_forward_hook(hook(key, name)) for name, key, module in explainer.adapted_modules()]
    try:
        with explainer.reference():
            for (numbers, ids), states in zip(track(items.batches, "sensitivities"), items.states()):
                keep = torch.tensor([int(i) in probes for i in numbers])
                if not keep.any():
                    continue
                states = states[keep].to(explainer.device).requires_grad_(True)
                text = explainer.top(states, torch.ones(states.shape[:2], dtype=torch.long, device=explainer.device)).mean(1)
                probe = torch.stack([probes[int(i)] for i in numbers[keep]]).to(text)
                names = list(answers)
                gradients = torch.autograd.grad((probe * (text @ readout.to(text).T)).sum(), [answers[k] for k in names])
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

    basis: Tensor     # Q (d, k), orthonormal columns, float64
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
        full = torch.linalg.qr(self.basis, mode="complete")[0] if 2 * self.rank > self.width else self.basis[:, :0]
        return full[:, self.rank:].contiguous() if full.shape[1] else full

    @property
    def energy(self) -> float:
        """Share of the item texts' energy, the Gram's trace, inside the subspace."""
        return float(self.spectrum[: self.rank].sum() / self.spectrum.sum())

    def holds(self, gram: Tensor) -> float:
        """Share of another Gram's trace inside this subspace: tr(Q^T G Q) / tr(G)."""
        return float((self.basis * (gram.to(self.basis) @ self.basis)).sum() / gram.to(self.basis).trace())


@dataclass
class Evidence:
    """What the bases are made of; only ``items`` is needed by all."""

    items: Mapping[str, Tensor]                       # Grams of the item texts
    prompts: Mapping[str, Tensor] | None = None       # of explanation prompts with explanations: contrastive
    sensitivity: Mapping[str, Tensor] | None = None   # ``sensitivity_grams`` of any items and users: sensitivity
    boundary: Mapping[str, Tensor] | None = None      # of items around the tenth place and users they concern: boundary
    readout: Mapping[str, Tensor] | None = None       # (d_rank, d) ``readout_rows``: readout
    seed: int = 0                                     # random


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
    needs = {"contrastive": "prompts", "sensitivity": "sensitivity", "boundary": "boundary", "readout": "readout"}.get(basis)
    if needs and getattr(evidence, needs) is None:
        raise ValueError(f"shield_basis={basis!r} needs Evidence.{needs}")
    for name, gram in evidence.items.items():
        if not torch.isfinite(gram).all():
            raise ValueError(f"Gram of {name} is not finite: the model gives inf or nan on an item text")
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
        return torch.linalg.qr(torch.cat([rows.T, torch.eye(len(gram), dtype=torch.float64)], dim=1))[0]
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
    return sum(part.numel() * part.element_size() for s in protected.values() for part in (s.basis, s.free)) / 2**20


def price(protected: Mapping[str, Subspace], prompts: Mapping[str, Tensor]) -> float:
    """What learning will cost the ranking, before any training: the share of the item texts' energy that stays free over the share of
    the energy of ``prompts`` (Grams) that does, a mean over the layer inputs. 1 for directions that cannot tell the two apart."""
    return float(np.mean([(1 - s.energy) / (1 - s.holds(prompts[name])) for name, s in protected.items()]))


# --- the shield ---------------------------------------------------------------------------------

@dataclass
class _Target:
    name: str
    a: nn.Parameter
    b: nn.Parameter
    space: Subspace
    basis: Tensor  # Q (d, k) float64 on the parameter's device

    @cached_property
    def free(self) -> Tensor:
        return self.space.free.to(self.basis)

    def off(self, matrix: Tensor) -> Tensor:
        """The part of the rows of ``matrix`` (r, d) orthogonal to Q, in float64, by the cheaper of two equal products."""
        wide = matrix.double()
        return (wide @ self.free) @ self.free.T if self.free.shape[1] else wide - (wide @ self.basis) @ self.basis.T


class Replay:
    """The gradient of a replay penalty: what the item vectors lost, measured where the ranker reads them.

        weight * mean_i |R (t_i' - t_i)|^2 / mean_i |R (t_i - mean t)|^2

    over a random minibatch of item texts, with R = ``readout`` (d_rank, d) and t = ``text`` (I+1, d), the base
    vectors. The cached trunk states make it cost the adapted layers only. ``often`` (I+1,): how often to read an item,
    relative to the others; None: all alike.
    """

    def __init__(
        self, explainer: Explainer, items: ItemTexts, text: Tensor, readout: Tensor, weight: float, seed: int = 0,
        only: set[int] | None = None, batch: int = 32, often: np.ndarray | None = None,
    ):
        if weight <= 0:
            raise ValueError(f"shield_penalty={weight}: a replay penalty needs a positive weight")
        self.weight, self.batch, self.norm = weight, batch, 0.0
        self._explainer, self._readout = explainer, readout.to(explainer.device)
        self.generator = torch.Generator().manual_seed(seed)
        spread = (text[1:] - text[1:].mean(0)).to(explainer.device) @ self._readout.T
        self._scale = float(spread.square().sum(-1).mean())
        self._parts = []  # (trunk states (b, T, d), base vectors (b, d)) of texts of one length
        self._often = []  # (b,) how often to read each of the same texts
        for (numbers, _), states in zip(items.batches, items.states()):
            keep = torch.tensor([only is None or int(n) in only for n in numbers])
            if keep.any():
                self._parts.append((states[keep], text[numbers[keep]]))
                self._often.append(torch.ones(int(keep.sum())) if often is None else torch.from_numpy(often)[numbers[keep]].float())
        self._sizes = torch.stack([part.double().sum() for part in self._often])

    @property
    def megabytes(self) -> float:
        """Memory of the trunk states and base vectors that it keeps."""
        return sum(t.numel() * t.element_size() for part in self._parts for t in part) / 2**20

    def loss(self) -> Tensor:
        """The penalty of one minibatch: texts of one length, a length as often as it has texts."""
        part = int(torch.multinomial(self._sizes, 1, generator=self.generator))
        (states, base), often = self._parts[part], self._often[part]
        if bool((often == often[0]).all()):
            rows = torch.randperm(len(states), generator=self.generator)[: self.batch]
        else:
            rows = torch.multinomial(often, min(self.batch, int((often > 0).sum())), generator=self.generator)
        states, base = states[rows].to(self._explainer.device), base[rows].to(self._explainer.device)
        text = self._explainer.top(states, torch.ones(states.shape[:2], dtype=torch.long, device=states.device)).mean(1)
        return self.weight * ((text - base) @ self._readout.T).square().sum(-1).mean() / self._scale

    def add_to(self, parameters: list[nn.Parameter]) -> None:
        """Add the penalty's gradient to the parameters' ``.grad``; call with autograd on, between backward and step.

        Its norm is kept in ``norm``: it comes after the clipping of the training's gradient, and can be the larger of the two.
        """
        gradients = torch.autograd.grad(self.loss(), parameters)
        self.norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def replay_for(explainer: Explainer, world, params, held: set[int]) -> Replay | None:
    """The run's replay, or None at ``shield_penalty`` 0; ``held`` item numbers are not replayed. ``world``: a ``study.Study``.

    Make it once an arm, before a warm start is merged: the merge leaves the trunk states as they are.
    """
    if not params.shield_penalty:
        return None
    if world.text is None:
        raise ValueError("shield_penalty: a ranker without text (text='none') reads no item vectors that could be replayed; set it to 0")
    items = ItemTexts(explainer, world.items["text"].tolist())
    kept = set(range(1, items.n_items + 1)) - held
    return Replay(explainer, items, world.text, readout_of(world.ranker), params.shield_penalty, only=kept)


class Shield:
    """Protects the item texts from the adapters' updates, through any ``torch.optim.Optimizer``.

    >>> shield = Shield(explainer, subspaces(item_grams(explainer, items)[0], energy=0.99))
    >>> shield.attach(optimizer)   # projects A now; hooks do the rest at every step
    >>> ...
    >>> shield.detach()

    ``optimizer`` may be the wrapper of accelerate or TRL: the torch optimizer inside is used. Hooks
    fire on real steps only, so clipping comes before and gradient accumulation is no concern. ``replay`` adds its
    penalty's gradient, unclipped, in any mode (``penalty`` has nothing else); the projection, if any, comes after it.
    """

    def __init__(self, explainer: Explainer, protected: Mapping[str, Subspace], mode: str = "update", replay: Replay | None = None):
        if mode not in MODES:
            raise ValueError(f"shield_mode={mode!r}: choose one of {', '.join(MODES)}")
        if mode == "penalty" and replay is None:
            raise ValueError("shield_mode='penalty' needs a replay: set shield_penalty above 0")
        self.mode, self.replay = mode, replay
        self.seconds = 0.0  # spent in hooks so far
        self._explainer, self._handles = explainer, []
        self.renew(protected)

    def attach(self, optimizer) -> "Shield":
        """Project A now and hook the optimizer. Raises ``ValueError`` if it does not hold the adapters."""
        if self._handles:
            raise RuntimeError("this shield is attached already; detach() it first")
        optimizer = getattr(optimizer, "optimizer", optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        frozen = self.mode == "frozen_a"
        missing = [t.name for t in self._targets if id(t.b) not in held or (id(t.a) not in held and not frozen)]
        if missing:
            raise ValueError(f"the optimizer does not hold {len(missing)} shielded adapters, the first is {missing[0]}")
        if self.mode in PROJECTING:
            self.project_parameters()
        if frozen:
            for target in self._targets:
                target.a.requires_grad_(False)
                target.a.grad = None
        self._handles.append(optimizer.register_step_pre_hook(self._before))
        self._handles.append(optimizer.register_step_post_hook(self._after))
        return self

    def detach(self) -> None:
        """Take the hooks off; mode ``restart`` projects now."""
        attached = bool(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.mode == "frozen_a":
            for target in self._targets:
                target.a.requires_grad_(True)
        if self.mode == "restart" and attached:
            self.project_parameters()

    def settle(self, steps: int) -> None:
        """After the training: ``steps`` of the replay alone, under the shield's own mode, at a rate that falls to 0.

        While an explainer learns, the replay has a reward to pull against and large steps to do it in. Here nothing else
        moves the adapters, and the item vectors come nearer to where the ranker knew them; what that costs the
        explanations is measured in ``runs/reference/frontier/settle.csv`` (of an arm whose PPO had the replay too) and
        ``runs/reference/ppo_search.csv``. Raises ``ValueError`` without a replay.
        """
        if self.replay is None:
            raise ValueError("shield_settle: there is no replay to settle by; set shield_penalty above 0")
        optimizer = torch.optim.Adam([p for t in self._targets for p in (t.a, t.b)], lr=SETTLE_LR)
        self.attach(optimizer)
        for step in track(range(steps), "settling"):
            optimizer.param_groups[0]["lr"] = SETTLE_LR * (1 - step / steps)
            optimizer.zero_grad(set_to_none=True)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.detach()

    def renew(self, protected: Mapping[str, Subspace]) -> None:
        """Protect other subspaces from here on, say of item texts as the tuned layers read them; projects A if the mode does."""
        self.protected, self._targets = protected, list(_targets(self._explainer, protected))
        if self._handles and self.mode in PROJECTING:
            self.project_parameters()

    @torch.no_grad()
    def project_parameters(self) -> None:
        """``A <- A - (A Q) Q^T`` in float64, rounded once to the parameter's type."""
        for target in self._targets:
            target.a.copy_(target.off(target.a))

    def _before(self, optimizer, args, kwargs) -> None:
        start = perf_counter()
        if self.replay:
            self.replay.add_to([p for t in self._targets for p in (t.a, t.b) if p.requires_grad])
        with torch.no_grad():
            for target in self._targets:
                if self.mode == "frozen_a":
                    target.a.grad = None
                elif self.mode in PROJECTING and target.a.grad is not None:
                    target.a.grad.copy_(target.off(target.a.grad))
        self.seconds += perf_counter() - start

    def _after(self, optimizer, args, kwargs) -> None:
        start = perf_counter()
        if self.mode == "update":
            self.project_parameters()
        self.seconds += perf_counter() - start


def _targets(explainer: Explainer, protected: Mapping[str, Subspace]):
    if explainer.peft is None:
        raise ValueError("the explainer has no adapters to shield; call add_lora first")
    adapted = list(explainer.adapted_modules())
    if strangers := sorted(set(protected) - {key for _, key, _ in adapted}):
        raise ValueError(f"protected subspace {strangers[0]!r} matches no adapter; the subspaces belong to another LoRA setting")
    for name, key, module in adapted:
        if key not in protected:
            raise ValueError(f"no protected subspace for {name} (key {key!r}); the subspaces belong to another LoRA setting")
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        basis = protected[key].basis
        if basis.shape[0] != a.shape[1]:
            raise ValueError(f"{name}: its input has width {a.shape[1]}, its basis has width {basis.shape[0]}")
        yield _Target(name, a, b, protected[key], basis.to(a.device, torch.float64))


@torch.no_grad()
def leak(explainer: Explainer, protected: dict[str, Subspace]) -> float:
    """``||dW Q|| / ||dW||`` over all adapted layers (Frobenius, pooled): 0 sealed, 1 all of the update is in the way.

    0 for an untrained adapter (dW = 0). The scale s cancels.
    """
    inside = total = 0.0
    for target in _targets(explainer, protected):
        update = target.b.double() @ target.a.double()
        inside += float((update @ target.basis).square().sum())
        total += float(update.square().sum())
    return sqrt(inside / total) if total else 0.0


@torch.no_grad()
def initial_overlap(explainer: Explainer, protected: dict[str, Subspace]) -> float:
    """``||A Q|| / ||A||``, pooled: what a gradient-only shield would leak through B from the first step."""
    inside = sum(float((t.a.double() @ t.basis).square().sum()) for t in _targets(explainer, protected))
    total = sum(float(t.a.double().square().sum()) for t in _targets(explainer, protected))
    return sqrt(inside / total) if total else 0.0


# --- afterwards: the linear map of mode align -----------------------------------------------------

@dataclass
class Alignment:
    """``t -> mean + (t - mean) M``: takes new item vectors back to where the ranker expects them."""

    matrix: Tensor  # M (d, d)
    old_mean: Tensor
    new_mean: Tensor
    ridge: float    # chosen on items kept out of the fit

    def __call__(self, text: Tensor) -> Tensor:
        """(I+1, d) -> (I+1, d); row 0, the padding, stays zero."""
        moved = self.old_mean + (text.double() - self.new_mean) @ self.matrix
        moved[0] = 0.0
        return moved.to(text)


def fit_alignment(
    new: Tensor, old: Tensor, items: np.ndarray, rng: np.random.Generator, ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
) -> Alignment:
    """Ridge regression towards the identity: least ``|X M - Y|^2 + ridge tr(X^T X)/d |M - I|^2`` over ``items``.

    X, Y: centred new and old vectors (bc-emb's aligner, Hu et al. 2022, arXiv 2206.03040, in closed form). The
    ridge with the least error on a fifth of ``items`` is used for the fit on all of them.
    """
    def fit(rows: np.ndarray, ridge: float) -> Alignment:
        x, y = new[rows].double(), old[rows].double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        gram = x.T @ x
        loading = ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
        return Alignment(torch.linalg.solve(gram + loading, x.T @ y + loading), mean_y, mean_x, ridge)

    shuffled = rng.permutation(items)
    kept, fitted = shuffled[: len(items) // 5], shuffled[len(items) // 5:]
    errors = {ridge: float((fit(fitted, ridge)(new)[kept] - old[kept]).norm()) for ridge in ridges}
    return fit(items, min(errors, key=errors.get))


def to_tensors(protected: dict[str, Subspace]) -> dict[str, Tensor]:
    """For safetensors: ``<name>/basis`` and ``<name>/spectrum``."""
    return {f"{n}/{part}": getattr(s, part) for n, s in protected.items() for part in ("basis", "spectrum")}


def from_tensors(tensors: dict[str, Tensor]) -> dict[str, Subspace]:
    names = sorted({key.rsplit("/", 1)[0] for key in tensors}, key=lambda n: (int(n.split(".")[0]), n))
    return {n: Subspace(tensors[f"{n}/basis"], tensors[f"{n}/spectrum"]) for n in names}
