"""What the notebooks after 02 share: one run's tables, split, frozen ranker and base ranking."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recrl_lib.data import splits
from recrl_lib.explainer.prompts import Record, build_records
from recrl_lib.params import TOP_K
from recrl_lib.ranker import sasrec
from recrl_lib.runs import StageRun
from recrl_lib.scoring import attribution, intents
from recrl_lib.scoring.claims import Catalogue
from recrl_lib.scoring.composed import composed_line


@dataclass
class Study:
    """A run after notebook 02: U users, I items."""

    items: pd.DataFrame
    users: pd.DataFrame
    split: splits.Split
    ppo_users: np.ndarray  # whose prompts PPO trains on
    validation_users: np.ndarray  # on whom settings are chosen
    heldout_users: np.ndarray  # who are judged
    heldout_items: np.ndarray  # which PPO never explains
    ranker: sasrec.SASRec  # frozen
    text: Tensor | None  # (I + 1, d) item vectors of the base LLM; None for plain SASRec
    top: np.ndarray  # (U, 10) items that the ranker recommends, best first
    catalogue: Catalogue  # titles and genres that a text may claim
    history_length: int  # titles in a prompt
    noun: str = "film"  # what an item is called
    evidence: str = "none"  # of what moved the ranker, in a prompt: see ``prompts.messages``
    intents: Mapping[str, float] = field(default_factory=lambda: {"why": 1.0})  # of tuning

    def records(self, users: Iterable[int], positions: Iterable[int]) -> list[dict]:
        """One record a user, about the item at the given place (from 1) of the user's top 10.

        With the history films' weights and the cosines of their item vectors with the film's.
        """
        history, asked, shown = self.split.with_valid, zip(users, positions), self.history_length
        records = build_records(self.items, history, self.top, asked, shown, self.noun)
        vectors = torch.nn.functional.normalize(self.ranker.item_table(self.text).detach())
        for record, weights in zip(records, self.weights(records, self.text), strict=True):
            near = vectors[history[record["user"]][-shown:]] @ vectors[record["item"]]
            record["history_weights"], record["history_similarity"] = weights, near.tolist()
            record["evidence"] = self.evidence
        return records

    def weights(self, records: Sequence[Record], vectors: Tensor | None) -> list[list[float]]:
        """Of each record, what moved the ranker that reads item vectors (I+1, d)."""
        about: dict[int, list[int]] = {}  # a user's histories are read once for all items
        for record in records:
            about.setdefault(record["user"], []).append(record["item"])
        read, items = [self.split.with_valid[user] for user in about], list(about.values())
        found = attribution.weights(self.ranker, read, items, self.history_length, vectors)
        rows = dict(zip(about, map(iter, found)))
        return [next(rows[record["user"]]).tolist() for record in records]

    def film(self, item: int, user: int) -> dict:
        """What a chat with ``user`` is told of an item: title, year, three genres, seen."""
        row = self.items.iloc[item - 1]
        genres, seen = row["genres"].split("|")[:3], item in self.split.with_valid[user]
        return {"title": row["title"], "year": int(row["year"]), "genres": genres, "seen": seen}

    def heard(self, record: Record, answer: str) -> dict:
        """``record`` after its question was answered, with all that a follow-up needs."""
        listed = [self.film(int(item), record["user"]) for item in self.top[record["user"]]]
        chat = [*record.get("chat", ()), {"role": "assistant", "content": answer}]
        return {**record, "chat": chat, "listed": listed, "others": record.get("others", [])}

    def follow_up(
        self, record: Record, answer: str, intent: str, rng: np.random.Generator, held_out: bool
    ) -> dict:
        """A random follow-up to ``record``, answered by ``answer``: see ``intents.draw``."""
        user = record["user"]
        history = self.split.with_valid[user]
        known = [*history, *self.top[user]]
        free = np.setdiff1d(np.arange(1, len(self.items) + 1), known)
        seen = history[-1 - rng.integers(min(self.history_length, len(history)))]
        outside = [self.film(int(item), user) for item in (seen, rng.choice(free))]
        return intents.draw(self.heard(record, answer), outside, intent, rng, held_out)

    def asked(self, record: Record, question: str) -> dict | None:
        """The follow-up to ``record``, as ``heard`` gives it, in a viewer's own words.

        None: the question is none that the explainer can answer, see ``intents.understand``.
        """
        intent, about, asked = intents.understand(question, record, self.catalogue)
        listed = {film["title"] for film in record["listed"]}
        items = {title: item for item, title in zip(self.items["item"], self.items["title"])}
        others = [self.film(items[t], record["user"]) for t in about if t not in listed]
        return intents.ask(record, intent, question, about, others, asked) if intent else None

    def training_records(self) -> list[dict]:
        """Every top-10 item of every PPO user, held-out items excepted, each with one question.

        The questions' intents are drawn by ``intents``, the same ones for every seed.
        """
        unseen = set(self.heldout_items.tolist())
        records = [r for r in self.whole_lists(self.ppo_users) if r["item"] not in unseen]
        rng = np.random.default_rng(len(records))
        drawn = rng.choice([*self.intents], len(records), p=[*self.intents.values()])
        return [
            r if intent == "why" else self.follow_up(r, composed_line(r), str(intent), rng, False)
            for r, intent in zip(records, drawn)
        ]

    def whole_lists(self, users: Sequence[int] | np.ndarray) -> list[dict]:
        """Records of the first item of each user's top 10, then of the second, and so on."""
        return self.records(np.tile(users, TOP_K), np.arange(1, TOP_K + 1).repeat(len(users)))

    def heldout_records(self, n: int, rng: np.random.Generator) -> list[dict]:
        """Records of ``n`` random held-out users, each about a random place of the top 10."""
        return self._drawn(self.heldout_users, n, rng)

    def validation_records(self, n: int, rng: np.random.Generator) -> list[dict]:
        """The same of the users to choose settings on."""
        return self._drawn(self.validation_users, n, rng)

    def _drawn(self, users: np.ndarray, n: int, rng: np.random.Generator) -> list[dict]:
        if n > len(users):
            remedy = "lower eval_users or explain_users"
            raise ValueError(f"{n} users asked for, but the group has only {len(users)}: {remedy}")
        return self.records(rng.permutation(users)[:n], rng.integers(1, TOP_K + 1, n))


def held_out(n_items: int, share: float, seed: int) -> np.ndarray:
    """Sorted items that PPO never explains (but may find in a history): ``share`` of 1..n_items."""
    drawn = np.random.default_rng([seed, n_items]).permutation(np.arange(1, n_items + 1))
    return np.sort(drawn[: round(share * n_items)])


def catalogue_of(items: pd.DataFrame) -> Catalogue:
    """The titles and genres of the item table."""
    return Catalogue(items["title"], set("|".join(items["genres"]).split("|")))


def load(stage: StageRun) -> Study:
    """The study from the artifacts of ``data`` and ``ranker``; ``RuntimeError`` if one is bad."""
    params = stage.params
    items, users = stage.load_table("items"), stage.load_table("users")
    groups, stored = stage.load_json("user_groups"), stage.load_tensors("base")
    model = sasrec.load(stage.input("ranker.safetensors"))
    if sasrec.state_sha256(model) != stage.load_json("ranker_hashes")["weights"]:
        raise RuntimeError("ranker.safetensors: not as notebook 02 froze it; run notebook 02 again")
    return Study(
        items=items,
        users=users,
        split=splits.split(stage.load_table("interactions"), len(users), params.split),
        ppo_users=np.array(groups["ppo"]),
        validation_users=np.array(groups["validation"]),
        heldout_users=np.array(groups["heldout"]),
        heldout_items=held_out(len(items), params.heldout_items, params.seed),
        ranker=model,
        text=stored.get("text"),
        top=stored["top"].numpy(),
        catalogue=catalogue_of(items),
        history_length=params.history_length,
        noun=stage.load_json("dataset")["noun"],
        evidence=params.evidence,
        intents=params.shares,
    )


def top_array(frame: pd.DataFrame, arm: str) -> np.ndarray:
    """One arm's rows of the ``top10`` table as an array (U, 10) of items, best first."""
    rows = frame.loc[frame["arm"] == arm].sort_values(["user", "position"])
    return rows["item"].to_numpy().reshape(-1, TOP_K)
