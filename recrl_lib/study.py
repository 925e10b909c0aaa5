"""What the notebooks after 02 share: one run's tables, split, frozen ranker and base ranking."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from recrl_lib.data import splits
from recrl_lib.explainer.prompts import build_records
from recrl_lib.params import TOP_K
from recrl_lib.ranker import sasrec
from recrl_lib.scoring.claims import Catalogue


@dataclass
class Study:
    """A run after notebook 02. ``top`` (U, 10): what the base ranker recommends; ``text`` None: plain SASRec."""

    items: pd.DataFrame
    users: pd.DataFrame
    split: splits.Split
    ppo_users: np.ndarray
    validation_users: np.ndarray
    heldout_users: np.ndarray
    heldout_items: np.ndarray
    ranker: sasrec.SASRec
    text: Tensor | None
    top: np.ndarray
    catalogue: Catalogue
    history_length: int
    noun: str = "film"

    def records(self, users: Iterable[int], positions: Iterable[int]) -> list[dict]:
        """One record a user, for the item at the given 1-based position of the user's base top 10."""
        return build_records(
            self.items,
            self.split.with_valid,
            self.top,
            users,
            positions,
            self.history_length,
            self.noun,
        )

    def training_records(self) -> list[dict]:
        """Every top-10 item of every PPO user, held-out items excepted."""
        everything = (
            r
            for p in range(1, TOP_K + 1)
            for r in self.records(self.ppo_users, [p] * len(self.ppo_users))
        )
        unseen = set(self.heldout_items.tolist())
        return [r for r in everything if r["item"] not in unseen]

    def heldout_records(self, n: int, rng: np.random.Generator) -> list[dict]:
        """``n`` held-out users, in random order, each with one random position of the base top 10; ``ValueError`` if there are fewer."""
        return self._drawn("held out", self.heldout_users, n, rng)

    def validation_records(self, n: int, rng: np.random.Generator) -> list[dict]:
        """The same of the users to choose settings on."""
        return self._drawn("kept for validation", self.validation_users, n, rng)

    def _drawn(self, group: str, users: np.ndarray, n: int, rng: np.random.Generator) -> list[dict]:
        if n > len(users):
            raise ValueError(
                f"{n} users asked for, but only {len(users)} are {group}: lower eval_users, explain_users or frontier_users"
            )
        return self.records(rng.permutation(users)[:n], rng.integers(1, TOP_K + 1, n))


def held_out(n_items: int, share: float, seed: int) -> np.ndarray:
    """Sorted items that no explanation of the training is about: ``share`` of 1..``n_items``, drawn by ``seed``.

    They may occur in a prompt's history, since the users watched them; what PPO never does is recommend them.
    """
    drawn = np.random.default_rng([seed, n_items]).permutation(np.arange(1, n_items + 1))
    return np.sort(drawn[: round(share * n_items)])


def catalogue_of(items: pd.DataFrame) -> Catalogue:
    return Catalogue(
        items["title"], sorted({g for row in items["genres"] for g in row.split("|") if g})
    )


def load(stage) -> Study:
    """Everything above from the artifacts of stages ``data`` and ``ranker``; ``stage`` is a ``runs.StageRun``."""
    interactions, items, users = (
        stage.load_table(name) for name in ("interactions", "items", "users")
    )
    groups = stage.load_json("user_groups")
    if "validation" not in groups:
        raise RuntimeError(
            "user_groups.json has no validation users: an earlier version made it; run notebook 01 again"
        )
    stored = stage.load_tensors("base")
    model = sasrec.load(stage.input("ranker.safetensors"))
    if sasrec.state_sha256(model) != stage.load_json("ranker_hashes")["weights"]:
        raise RuntimeError(
            "ranker.safetensors: its weights are not those that notebook 02 froze; run notebook 02 again"
        )
    return Study(
        items=items,
        users=users,
        split=splits.split(interactions, len(users), stage.params.split),
        ppo_users=np.array(groups["ppo"]),
        validation_users=np.array(groups["validation"]),
        heldout_users=np.array(groups["heldout"]),
        heldout_items=held_out(len(items), stage.params.heldout_items, stage.params.seed),
        ranker=model,
        text=stored.get("text"),
        top=stored["top"].numpy(),
        catalogue=catalogue_of(items),
        history_length=stage.params.history_length,
        noun=stage.load_json("dataset")["noun"],
    )


def explanation_frame(
    records: list[dict], texts: list[str], reward: np.ndarray, parts: dict[str, np.ndarray]
) -> pd.DataFrame:
    """One row an explanation: user, item, position, title, text, reward and its parts."""
    return pd.DataFrame(
        {
            **{key: [r[key] for r in records] for key in ("user", "item", "position", "title")},
            "text": texts,
            "reward": reward,
            **{f"reward_{name}": values for name, values in parts.items()},
        }
    )


def top_array(frame: pd.DataFrame, arm: str) -> np.ndarray:
    """One arm's rows of the ``top10`` table as an array (U, 10) of items, best first."""
    rows = frame[frame["arm"] == arm].sort_values(["user", "position"])
    return rows["item"].to_numpy().reshape(-1, TOP_K)
