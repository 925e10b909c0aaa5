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

Modes: ``update`` (default), ``gradient`` (the paper's: the gradient alone, and it leaks), ``frozen_a``
(A fixed in the null space and only B learns, after InfLoRA, Liang & Li 2024, CVPR).
"""

from dataclasses import dataclass
from math import sqrt
from time import perf_counter

import torch
from torch import Tensor, nn

from recrl_lib.explainer import Explainer, ItemTexts, left_pad
from recrl_lib.progress import track

MODES = ("update", "gradient", "frozen_a")
INPUT_OF = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "output"}


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
def item_grams(explainer: Explainer, items: ItemTexts, only: set[int] | None = None) -> tuple[dict[str, Tensor], int]:
    """(Grams of the adapted layers' inputs over the item texts under the base model, number of tokens).

    ``only``: item numbers to use; the rest is held out.
    """
    with explainer.reference(), GramCollector(explainer) as collector:
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


@dataclass
class Subspace:
    """A protected input subspace of one layer."""

    basis: Tensor     # Q (d, k), orthonormal columns, float64
    spectrum: Tensor  # (d,) eigenvalues of the Gram, largest first

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def width(self) -> int:
        return self.basis.shape[0]

    @property
    def energy(self) -> float:
        """Share of the Gram's trace inside the subspace."""
        return float(self.spectrum[: self.rank].sum() / self.spectrum.sum())

    def holds(self, gram: Tensor) -> float:
        """Share of another Gram's trace inside this subspace: tr(Q^T G Q) / tr(G)."""
        return float((self.basis * (gram.to(self.basis) @ self.basis)).sum() / gram.to(self.basis).trace())


def subspaces(grams: dict[str, Tensor], energy: float, rank: int = 0) -> dict[str, Subspace]:
    """Top eigenvectors of each Gram: the fewest that hold ``energy`` of its trace, or exactly ``rank``.

    Raises ``ValueError`` if nothing is left to learn (k = d) or the Gram is not finite.
    """
    found = {}
    for name, gram in grams.items():
        if not torch.isfinite(gram).all():
            raise ValueError(f"Gram of {name} is not finite: the model gives inf or nan on an item text")
        values, vectors = torch.linalg.eigh(gram.cpu())  # CPU: float64 eigh differs between GPU libraries
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        share = values.cumsum(0) / values.sum()
        k = rank or (int((share < energy).sum()) + 1 if energy > 0 else 0)
        if k >= len(values):
            raise ValueError(
                f"layer input {name}: protecting {k} of {len(values)} directions leaves nothing to learn; "
                "lower shield_energy or shield_rank"
            )
        found[name] = Subspace(vectors[:, :k].contiguous(), values)
    return found


# --- the shield ---------------------------------------------------------------------------------

@dataclass
class _Target:
    name: str
    a: nn.Parameter
    b: nn.Parameter
    basis: Tensor  # (d, k) float64 on the parameter's device


class Shield:
    """Keeps A Q = 0 for every adapter matrix A, through any ``torch.optim.Optimizer``.

    >>> shield = Shield(explainer, subspaces(item_grams(explainer, items)[0], energy=0.99))
    >>> shield.attach(optimizer)   # projects A now; hooks do the rest at every step
    >>> ...
    >>> shield.detach()

    ``optimizer`` may be the wrapper of accelerate or TRL: the torch optimizer inside is used. Hooks
    fire on real steps only, so clipping comes before and gradient accumulation is no concern.
    """

    def __init__(self, explainer: Explainer, protected: dict[str, Subspace], mode: str = "update"):
        if mode not in MODES:
            raise ValueError(f"shield_mode={mode!r}: choose one of {', '.join(MODES)}")
        self.mode = mode
        self.seconds = 0.0  # spent in hooks so far
        self._handles = []
        self._targets = list(_targets(explainer, protected))

    def attach(self, optimizer) -> "Shield":
        """Project A now and hook the optimizer. Raises ``ValueError`` if it does not hold the adapters."""
        if self._handles:
            raise RuntimeError("this shield is attached already; detach() it first")
        optimizer = getattr(optimizer, "optimizer", optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [t.name for t in self._targets if id(t.a) not in held]
        if missing and self.mode != "frozen_a":
            raise ValueError(f"the optimizer does not hold {len(missing)} shielded adapters, the first is {missing[0]}")
        self.project_parameters()
        if self.mode == "frozen_a":
            for target in self._targets:
                target.a.requires_grad_(False)
                target.a.grad = None
        self._handles.append(optimizer.register_step_pre_hook(self._before))
        self._handles.append(optimizer.register_step_post_hook(self._after))
        return self

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.mode == "frozen_a":
            for target in self._targets:
                target.a.requires_grad_(True)

    @torch.no_grad()
    def project_parameters(self) -> None:
        """``A <- A - (A Q) Q^T`` in float64, rounded once to the parameter's type."""
        for target in self._targets:
            target.a.copy_(_off(target.a, target.basis))

    @torch.no_grad()
    def _before(self, optimizer, args, kwargs) -> None:
        start = perf_counter()
        for target in self._targets:
            if self.mode == "frozen_a":
                target.a.grad = None
            elif target.a.grad is not None:
                target.a.grad.copy_(_off(target.a.grad, target.basis))
        self.seconds += perf_counter() - start

    def _after(self, optimizer, args, kwargs) -> None:
        start = perf_counter()
        if self.mode == "update":
            self.project_parameters()
        self.seconds += perf_counter() - start


def _off(matrix: Tensor, basis: Tensor) -> Tensor:
    """The part of the rows of ``matrix`` (r, d) that is orthogonal to ``basis`` (d, k), in float64."""
    wide = matrix.double()
    return wide - (wide @ basis) @ basis.T


def _targets(explainer: Explainer, protected: dict[str, Subspace]):
    if explainer.peft is None:
        raise ValueError("the explainer has no adapters to shield; call add_lora first")
    for name, key, module in explainer.adapted_modules():
        if key not in protected:
            raise ValueError(f"no protected subspace for {name} (key {key!r}); the subspaces belong to another LoRA setting")
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        basis = protected[key].basis
        if basis.shape[0] != a.shape[1]:
            raise ValueError(f"{name}: its input has width {a.shape[1]}, its basis has width {basis.shape[0]}")
        yield _Target(name, a, b, basis.to(a.device, torch.float64))


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


def to_tensors(protected: dict[str, Subspace]) -> dict[str, Tensor]:
    """For safetensors: ``<name>/basis`` and ``<name>/spectrum``."""
    return {f"{n}/{part}": getattr(s, part) for n, s in protected.items() for part in ("basis", "spectrum")}


def from_tensors(tensors: dict[str, Tensor]) -> dict[str, Subspace]:
    names = sorted({key.rsplit("/", 1)[0] for key in tensors}, key=lambda n: (int(n.split(".")[0]), n))
    return {n: Subspace(tensors[f"{n}/basis"], tensors[f"{n}/spectrum"]) for n in names}
