"""A small ranker, its item texts, and users whose next item follows from the last."""

import numpy as np
import torch

from recrl_lib.data.splits import Split
from recrl_lib.ranker.sasrec import SASRec

N_ITEMS, TEXT_DIM = 12, 5


def small(text_dim: int = 0, **changes) -> SASRec:
    arguments = {"dim": 8, "layers": 2, "heads": 2, "max_len": 6, "dropout": 0.2} | changes
    return SASRec(N_ITEMS, text_dim=text_dim, **arguments)


def some_text(seed: int = 0) -> torch.Tensor:
    text = torch.randn(N_ITEMS + 1, TEXT_DIM, generator=torch.Generator().manual_seed(seed)) * 3 + 2
    text[0] = 0
    return text


def cycles(n_users: int = 40, seed: int = 0) -> Split:
    """Users who walk round the items in order."""
    rng = np.random.default_rng(seed)
    walks = [
        (rng.integers(N_ITEMS) + np.arange(rng.integers(4, 10))) % N_ITEMS + 1
        for _ in range(n_users)
    ]
    valid, test = (np.array([w[end] for w in walks]) for end in (-2, -1))
    return Split([w[:-2] for w in walks], valid, test)
