"""The replay penalty: item vectors are held near their base values."""

import numpy as np
import torch
from torch import Tensor, nn

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer
from recrl_lib.shield.subspaces import readout_of


class Replay:
    """The gradient of a replay penalty: what the item vectors lost, measured where the ranker reads them.

        weight * mean_i |R (t_i' - t_i)|^2 / mean_i |R (t_i - mean t)|^2

    over a random minibatch of item texts, with R = ``readout`` (d_rank, d) and t = ``text`` (I+1, d), the base
    vectors. The cached trunk states make it cost the adapted layers only. ``often`` (I+1,): how often to read an item,
    relative to the others; None: all alike.
    """

    def __init__(
        self,
        explainer: Explainer,
        items: ItemTexts,
        text: Tensor,
        readout: Tensor,
        weight: float,
        seed: int = 0,
        only: set[int] | None = None,
        batch: int = 32,
        often: np.ndarray | None = None,
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
                self._often.append(
                    torch.ones(int(keep.sum()))
                    if often is None
                    else torch.from_numpy(often)[numbers[keep]].float()
                )
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
            rows = torch.multinomial(
                often, min(self.batch, int((often > 0).sum())), generator=self.generator
            )
        states, base = (
            states[rows].to(self._explainer.device),
            base[rows].to(self._explainer.device),
        )
        text = self._explainer.top(
            states, torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        ).mean(1)
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
        raise ValueError(
            "shield_penalty: a ranker without text (text='none') reads no item vectors that could be replayed; set it to 0"
        )
    items = ItemTexts(explainer, world.items["text"].tolist())
    kept = set(range(1, items.n_items + 1)) - held
    return Replay(
        explainer, items, world.text, readout_of(world.ranker), params.shield_penalty, only=kept
    )
