"""Data sets: one loader a format, all yielding the same three tables; splits.

A loader is a module of this package with ``load(folder) -> Dataset``. Titles
are untrusted text: they end up in prompts and HTML, so every loader passes them through ``sanitise_text``.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

NAMES = ("ml-100k",)
SKIP_LIMIT = 0.01  # a file with a larger share of bad rows is the wrong file or a broken one

_SPECIAL = re.compile(r"<\|.*?\|>|<\||\|>|</?(?:s|pad|unk|bos|eos)>")


@dataclass(frozen=True)
class Dataset:
    """The three tables (columns in ``recrl_lib.__doc__``) and ``info``, the content of ``dataset.json``.

    ``info``: source, sha256 (of the raw interactions file), n_users, n_items, n_interactions,
    skipped (kind of bad row -> count), skipped_first (kind -> "file line n", the first such row).
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    info: dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Leave-one-out split. ``train``: one int64 array a user, in time order; ``valid``, ``test``: int64 (U,)."""

    train: list[np.ndarray]
    valid: np.ndarray
    test: np.ndarray

    @property
    def with_valid(self) -> list[np.ndarray]:
        """Histories known when the test item is predicted: the training items, then the validation item."""
        return [np.append(items, last) for items, last in zip(self.train, self.valid)]


@dataclass
class Skipped:
    """Rows left out, counted by kind, with the first example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, path: Path, line: int) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, f"{path.name} line {line}")

    def check(self, path: Path, skipped: int, rows: int) -> None:
        """Raise ``ValueError`` when more than ``SKIP_LIMIT`` of the ``rows`` of ``path`` were skipped."""
        if skipped > SKIP_LIMIT * rows:
            kinds = "; ".join(f"{n} x {kind} (first: {self.first[kind]})" for kind, n in self.counts.items())
            raise ValueError(
                f"{path}: {skipped} of {rows} rows are unusable, more than {SKIP_LIMIT:.0%}: {kinds}. "
                "Repair those lines, or fetch the file again."
            )


def load(name: str, folder: Path) -> Dataset:
    """Data set ``name`` from its files in ``folder``. Raises ``ValueError`` naming file, field and remedy."""
    if name not in NAMES:
        raise ValueError(f"no data set is called {name!r}; choose one of {', '.join(NAMES)}")
    from recrl_lib.datasets import ml100k  # here, not above: the loaders import this module

    return {"ml-100k": ml100k}[name].load(Path(folder))


def split_leave_one_out(interactions: pd.DataFrame, n_users: int) -> Split:
    """Last item of each user = test, the one before = validation, the rest = training.

    Order is by time, ties by row. Raises ``ValueError`` when a user has fewer than three interactions.
    """
    user = interactions["user"].to_numpy()
    counts = np.bincount(user, minlength=n_users)
    if len(counts) > n_users:
        raise ValueError(f"interactions: user {user.max()} is out of range; n_users is {n_users}")
    if (short := counts < 3).any():
        raise ValueError(
            f"interactions: {short.sum()} of {n_users} users have fewer than 3 events (first: user {short.argmax()}); "
            "leave-one-out needs 3 for each: drop those users first, for example with a 5-core filter"
        )
    order = np.lexsort((interactions["time"].to_numpy(), user))  # stable: ties stay in file order
    items = interactions["item"].to_numpy(dtype=np.int64)[order]
    sequences = np.split(items, np.cumsum(counts)[:-1])
    last_two = np.array([s[-2:] for s in sequences])
    return Split([s[:-2] for s in sequences], last_two[:, 0], last_two[:, 1])


def split_users(n_users: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Users whose prompts PPO trains on (``share`` of them), and the held-out rest: sorted, disjoint, seeded."""
    n_ppo = round(share * n_users)
    if not 0 < n_ppo < n_users:
        raise ValueError(f"share={share} of {n_users} users leaves one side empty; choose a share nearer to 0.5")
    shuffled = np.random.default_rng(seed).permutation(n_users)
    return np.sort(shuffled[:n_ppo]), np.sort(shuffled[n_ppo:])


def sanitise_text(text: str) -> str:
    """``text`` as one plain line: no control or format characters, no chat-template tokens, single spaces.

    Repeated until nothing changes, since cutting a token out can join the halves of another.
    """
    while True:
        visible = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
        plain = " ".join(_SPECIAL.sub("", visible).split())
        if plain == text:
            return text
        text = plain
