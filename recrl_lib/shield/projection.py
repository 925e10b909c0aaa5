r"""The projection: an optimizer whose updates cannot touch what the protected texts' inputs span.

An adapted linear layer computes ``y = W x + s B A x`` with A (r, d) and B (d_out, r). Let

    G = sum of x x^T over every token of the protected texts, under the base model (float64),
    Q = the top k eigenvectors of G, (d, k), with Q^T Q = I.

*Theorem.* If A Q = 0 in every adapted layer and every input x of every adapted layer lies in
span(Q) for some text, then tuning does not change what the model computes for that text. Notebook
04 has the proof. With k < d a share 1 - energy of the input energy lies outside span(Q) and does
reach the adapters; what it does is measured, not assumed away.

A starts at a random value that overlaps Q: it is projected when the shield attaches. Adam rescales
element by element, so a projected *gradient* still gives a leaking *step*: mode ``update`` projects
the gradient and, after the step, the parameter, as Adam-NSCL (Wang et al. 2021, CVPR) and NSPO
(arXiv 2512.11391) do. Whatever the optimizer did, A Q is 0 again.

======== ===========================================================================================
mode     what it does
======== ===========================================================================================
gradient the gradient of A is projected, and nothing else: the published description; it leaks
update   the default, above
frozen_a A stays fixed in the null space and only B learns, after InfLoRA (Liang & Li 2024, CVPR)
penalty  no projection: a replay gradient pulls the item vectors back at every step (``Replay``)
======== ===========================================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from recrl_lib.shield.replay import Replay
from recrl_lib.shield.subspaces import Subspace, adapted_layers

Spaces = Mapping[str, Subspace]  # by the key of the layer input
MODES = ("gradient", "update", "frozen_a", "penalty")
PROJECTING = ("gradient", "update", "frozen_a")  # keep A in the null space from the first step on
REPLAY_LR = 7e-4  # Adam's first rate in ``run_replay``: a quarter of the warm start's


@dataclass
class _Layer:
    name: str
    a: nn.Parameter  # (r, d)
    b: nn.Parameter  # (d_out, r)
    basis: Tensor  # Q (d, k) float64 on the parameter's device
    free: Tensor  # of the complement, where that is smaller

    def off(self, matrix: Tensor) -> Tensor:
        """``matrix`` (r, d) projected off Q in float64, by the cheaper of two equal products."""
        wide = matrix.double()
        if self.free.shape[1]:
            return (wide @ self.free) @ self.free.T
        return wide - (wide @ self.basis) @ self.basis.T


class Shield:
    """Keeps a model's LoRA updates off ``protected`` subspaces, through any torch optimizer.

    Its hooks fire on real steps, after clipping and accumulation of gradients. ``replay`` adds its
    gradient, unclipped, in any mode (``penalty`` has nothing else); the projection comes after it.
    """

    def __init__(
        self, model: Any, protected: Spaces, mode: str = "update", replay: Replay | None = None
    ):
        if mode not in MODES:
            raise ValueError(f"shield_mode={mode!r}: choose one of {', '.join(MODES)}")
        if mode == "penalty" and replay is None:
            raise ValueError("shield_mode='penalty' needs a replay: set shield_penalty above 0")
        self.mode, self.replay = mode, replay
        self.seconds = 0.0  # spent in hooks so far
        self._layers, self._handles = _layers(model, protected), []

    def attach(self, optimizer: Any) -> "Shield":
        """Project A now and hook ``optimizer``, or the one that it wraps (accelerate, TRL).

        ``ValueError``: it does not hold the adapters.
        """
        if self._handles:
            raise RuntimeError("this shield is attached already; detach() it first")
        optimizer = getattr(optimizer, "optimizer", optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        frozen = self.mode == "frozen_a"
        needed = {x.name: {id(x.b)} if frozen else {id(x.a), id(x.b)} for x in self._layers}
        if missing := sorted(name for name, adapters in needed.items() if adapters - held):
            count = f"{len(missing)} shielded adapters"
            raise ValueError(f"the optimizer lacks {count}, the first is {missing[0]}")
        if self.mode in PROJECTING:
            self.project_parameters()
        self._train_a(not frozen)
        before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        self._handles = [before(self._before), after(self._after)]
        return self

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._train_a(True)

    def callback(self):
        """A callback for a trainer of transformers or TRL: attached while it trains."""
        from transformers import TrainerCallback

        class ShieldCallback(TrainerCallback):
            def on_train_begin(callback, args, state, control, optimizer=None, **kwargs):
                self.attach(optimizer)

            def on_train_end(callback, args, state, control, **kwargs):
                self.detach()

        return ShieldCallback()

    def run_replay(self, steps: int) -> None:
        """After the training: ``steps`` of the replay alone, at a rate that falls to 0.

        ``settle.csv`` and ``ppo_search.csv`` in ``runs/reference`` show what it gives and costs.
        """
        from recrl_lib.progress import track

        if self.replay is None:
            raise ValueError("no replay to run after training: set shield_penalty above 0")
        optimizer = torch.optim.Adam([p for x in self._layers for p in (x.a, x.b)], lr=REPLAY_LR)
        self.attach(optimizer)
        for step in track(range(steps), "replay after training"):
            optimizer.param_groups[0]["lr"] = REPLAY_LR * (1 - step / steps)
            optimizer.zero_grad(set_to_none=True)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.detach()

    @torch.no_grad()
    def project_parameters(self) -> None:
        """``A <- A - (A Q) Q^T`` in float64, rounded once to the parameter's type."""
        for layer in self._layers:
            layer.a.copy_(layer.off(layer.a))

    def _train_a(self, trained: bool) -> None:
        for layer in self._layers if self.mode == "frozen_a" else ():
            layer.a.requires_grad_(trained)
            layer.a.grad = None

    def _before(self, *_) -> None:
        start = perf_counter()
        if self.replay:
            self.replay.add_to([p for x in self._layers for p in (x.a, x.b) if p.requires_grad])
        for layer in self._layers if self.mode in PROJECTING else ():
            if self.mode == "frozen_a":
                layer.a.grad = None
            elif layer.a.grad is not None:
                layer.a.grad.copy_(layer.off(layer.a.grad))
        self.seconds += perf_counter() - start

    def _after(self, *_) -> None:
        start = perf_counter()
        if self.mode == "update":
            self.project_parameters()
        self.seconds += perf_counter() - start


def _layers(model: Any, protected: Spaces) -> list[_Layer]:
    """The adapted layers with their subspaces; ``ValueError`` unless they belong together."""
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError("the model has no LoRA layers; call get_peft_model or add_lora first")
    other = "the subspaces belong to another LoRA setting"
    if strangers := sorted(set(protected) - {key for _, key, _ in adapted}):
        raise ValueError(f"protected subspace {strangers[0]!r} matches no adapter; {other}")
    found = []
    for name, key, module in adapted:
        if key not in protected:
            raise ValueError(f"no protected subspace for {name} (key {key!r}); {other}")
        adapter, space = module.active_adapters[0], protected[key]
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        if space.width != a.shape[1]:
            raise ValueError(f"{name}: input of width {a.shape[1]}, basis of width {space.width}")
        basis, free = (x.to(a.device, torch.float64) for x in (space.basis, space.free))
        found.append(_Layer(name, a, b, basis, free))
    return found


@torch.no_grad()
def leak(model: Any, protected: Spaces) -> float:
    """``||dW Q|| / ||dW||`` (Frobenius, all layers pooled): what protected inputs feel of dW."""
    inside = total = 0.0
    for layer in _layers(model, protected):
        update = layer.b.double() @ layer.a.double()
        inside += float((update @ layer.basis).square().sum())
        total += float(update.square().sum())
    return (inside / total) ** 0.5 if total else 0.0
