"""The replay penalty: item vectors are held near their base values."""

from typing import Any

import torch
from torch import Tensor, nn

from recrl_lib.shield.subspaces import Explainer, ItemTexts, items_of, readout_of

BATCH = 32  # item texts a step


class Replay:
    """The gradient of a penalty on item vectors that moved, measured where the ranker reads them.

        weight * mean_i |R (t_i' - t_i)|^2 / mean_i |R (t_i - mean t)|^2

    over a random minibatch of item texts, with t' the tuned vectors, t = ``vectors`` (I+1, d) the
    base vectors and R = ``readout`` (d_rank, d). ``only``: item numbers to read, None for all.
    """

    def __init__(
        self,
        explainer: Explainer,
        items: ItemTexts,
        vectors: Tensor,
        readout: Tensor,
        weight: float,
        only: set[int] | None = None,
    ):
        if weight <= 0:
            raise ValueError(f"shield_penalty={weight}: a replay penalty needs a positive weight")
        self.weight, self.norm = weight, 0.0  # the norm of the last gradient added
        self.generator = torch.Generator().manual_seed(0)
        self._explainer, self._readout = explainer, readout.to(explainer.device)
        spread = (vectors[1:] - vectors[1:].mean(0)).to(explainer.device) @ self._readout.T
        self._scale = float(spread.square().sum(-1).mean())
        # (trunk states (b, T, d), base vectors (b, d)) of texts of one length
        self.parts = [(states, vectors[numbers]) for numbers, states in items_of(items, only)]
        self._sizes = torch.tensor([len(states) for states, _ in self.parts]).double()

    def loss(self) -> Tensor:
        """The penalty of one minibatch: texts of one length, a length as often as it has texts."""
        part = int(torch.multinomial(self._sizes, 1, generator=self.generator))
        states, base = self.parts[part]
        rows = torch.randperm(len(states), generator=self.generator)[:BATCH]
        states, base = (x[rows].to(self._explainer.device) for x in (states, base))
        mask = torch.ones_like(states[..., 0]).long()
        moved = (self._explainer.top(states, mask).mean(1) - base) @ self._readout.T
        return self.weight * moved.square().sum(-1).mean() / self._scale

    def add_to(self, parameters: list[nn.Parameter]) -> None:
        """Add the penalty's gradient, unclipped, to the ``.grad`` that the next step uses."""
        gradients = torch.autograd.grad(self.loss(), parameters)
        self.norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def replay_for(explainer: Explainer, study: Any, params: Any, held: set[int]) -> Replay | None:
    """The replay of a ``Study`` and ``Params`` without ``held`` items, None at shield_penalty 0.

    Make it before a warm start is merged: trunk states stay as they are.
    """
    from recrl_lib.explainer.item_texts import ItemTexts  # the shield can be used without explainer

    if not params.shield_penalty:
        return None
    if study.text is None:
        raise ValueError("shield_penalty: a ranker with text='none' reads no vectors; set it to 0")
    items = ItemTexts(explainer, study.items["text"].tolist())
    only = set(range(1, items.n_items + 1)) - held
    readout = readout_of(study.ranker)
    return Replay(explainer, items, study.text, readout, params.shield_penalty, only=only)
