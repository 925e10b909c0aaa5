"""What the tests of training share: prompts, a reward, a shielded trainer of the tiny explainer."""

import numpy as np

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer
from recrl_lib.params import resolve
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.tiny import tiny_explainer
from recrl_lib.training import ppo

PARAMS = resolve("smoke", lora_layers=1, max_new_tokens=8, ppo_epochs=2, baseline="value")
TIMES = {"generated_tokens_per_second", "shield_seconds", "step_seconds"}  # differ in equal runs
PROTECTED_TEXTS = ["good film", "the red film and a blue film"]
RECORDS = [
    {
        "user": user, "item": 1, "position": 1, "title": "the red film", "year": 0,
        "genres": ["good"], "history_titles": ["blue", word], "history_genres": [["good"], ["bad"]],
    }
    for user, word in enumerate(["short", "long", "green", "bad", "a", "and"])
]  # fmt: skip


def red(records: list[dict], texts: list[str]):
    """A reward: 1 for each text that says "red"."""
    assert len(records) == len(texts)
    total = np.array(["red" in text.split() for text in texts], dtype=np.float32)
    return total, {"word": total}


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def protect(explainer: Explainer, energy: float = 0.9) -> dict[str, subspaces.Subspace]:
    """Subspaces of two item texts."""
    items = ItemTexts(explainer, PROTECTED_TEXTS)
    return subspaces.protect(subspaces.item_grams(explainer, items)[0], energy=energy)


def trainer(reward=red, seed=0, mode=None, params=PARAMS, explainer=None, **changes) -> ppo.PPO:
    """PPO on the tiny explainer, with a shield if ``mode`` is given."""
    explainer = explainer or tiny_explainer(lora_layers=1)
    shield = projection.Shield(explainer, protect(explainer), mode) if mode else None
    return ppo.PPO(explainer, reward, RECORDS, params.replace(**changes), seed, shield)


def leak(trained: ppo.PPO) -> float:
    return projection.leak(trained.explainer, protect(tiny_explainer(lora_layers=1)))
