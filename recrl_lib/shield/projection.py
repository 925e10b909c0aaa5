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
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from time import perf_counter

import torch
from torch import Tensor, nn

from recrl_lib.explainer.model import Explainer
from recrl_lib.progress import track
from recrl_lib.shield.replay import Replay
from recrl_lib.shield.subspaces import Subspace

MODES = ("none", "gradient", "update", "frozen_a", "penalty", "restart", "align")
PROJECTING = ("gradient", "update", "frozen_a")  # keep A in the null space from the first step on
SETTLE_LR = 7e-4  # Adam's rate at the first step of ``Shield.settle``, a quarter of the warm start's; no other was tried at length


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
        return (
            (wide @ self.free) @ self.free.T
            if self.free.shape[1]
            else wide - (wide @ self.basis) @ self.basis.T
        )


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

    def __init__(
        self,
        explainer: Explainer,
        protected: Mapping[str, Subspace],
        mode: str = "update",
        replay: Replay | None = None,
    ):
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
        missing = [
            t.name
            for t in self._targets
            if id(t.b) not in held or (id(t.a) not in held and not frozen)
        ]
        if missing:
            raise ValueError(
                f"the optimizer does not hold {len(missing)} shielded adapters, the first is {missing[0]}"
            )
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
            raise ValueError(
                "shield_replay_steps: there is no replay to settle by; set shield_penalty above 0"
            )
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
        raise ValueError(
            f"protected subspace {strangers[0]!r} matches no adapter; the subspaces belong to another LoRA setting"
        )
    for name, key, module in adapted:
        if key not in protected:
            raise ValueError(
                f"no protected subspace for {name} (key {key!r}); the subspaces belong to another LoRA setting"
            )
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        basis = protected[key].basis
        if basis.shape[0] != a.shape[1]:
            raise ValueError(
                f"{name}: its input has width {a.shape[1]}, its basis has width {basis.shape[0]}"
            )
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
    inside = sum(
        float((t.a.double() @ t.basis).square().sum()) for t in _targets(explainer, protected)
    )
    total = sum(float(t.a.double().square().sum()) for t in _targets(explainer, protected))
    return sqrt(inside / total) if total else 0.0
