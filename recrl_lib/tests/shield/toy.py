"""A tiny explainer with six item texts, and a training that has nothing to do with them."""

import torch

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.shield import Replay, Shield
from recrl_lib.shield.subspaces import item_grams
from recrl_lib.tests.tiny import tiny_explainer

TEXTS = (
    "good film|the red film and a blue film|bad|good film of the long|a green film|short and long"
)


def make(layers: int = 2, seed: int = 0):
    explainer = tiny_explainer(seed, lora_layers=layers)
    items = ItemTexts(explainer, TEXTS.split("|"))
    return explainer, items, item_grams(explainer, items)[0]


def train(explainer, optimizer, steps: int, seed: int = 0) -> None:
    """Likelihood of random sequences."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(3, 20, (4, 10), generator=generator)
        mask = torch.ones_like(ids)
        logp = explainer.log_softmax(explainer.top(explainer.trunk(ids, mask), mask), 1.0)
        optimizer.zero_grad()
        (-logp[:, :-1].gather(-1, ids[:, 1:, None]).mean()).backward()
        optimizer.step()


def train_shielded(
    explainer, protected, steps: int = 3, mode: str = "update", replay=None
) -> Shield:
    optimizer = torch.optim.Adam(explainer.adapter_parameters(), lr=0.01)
    shield = Shield(explainer, protected, mode, replay).attach(optimizer)
    train(explainer, optimizer, steps)
    return shield


def replay_of(explainer, items, weight: float, **more) -> Replay:
    readout = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    return Replay(explainer, items, items.base_vectors(), readout, weight, **more)


def moved(items, base: torch.Tensor) -> float:
    return float((items.vectors() - base).norm() / base.norm())
