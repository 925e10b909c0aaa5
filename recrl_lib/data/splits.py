"""Splits of the interactions: leave-one-out and global-time."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from recrl_lib.params import TOP_K, Params

GLOBAL_TIME = "global-time"
MIN_EVENTS = 3  # of a user, for leave-one-out: one to train on, one for validation, one for test
SHARES = 0.8, 0.9  # of all events, up to the two cuts of the global-time split


@dataclass(frozen=True)
class Split:
    """Items (int64) of each user for training, validation and test, in time order."""

    train: list[np.ndarray]  # one array a user
    valid: np.ndarray  # (U,)
    test: np.ndarray  # (U,)
    # Only of a global-time split: what a user met after the validation item and before the test
    # period; and histories of users who are not evaluated, for training alone.
    between: tuple[np.ndarray, ...] = ()
    others: tuple[np.ndarray, ...] = ()

    @cached_property
    def with_valid(self) -> list[np.ndarray]:
        """Histories known when the test item is predicted."""
        known = [np.append(items, last) for items, last in zip(self.train, self.valid)]
        return list(map(np.append, known, self.between)) if self.between else known

    @property
    def training(self) -> list[np.ndarray]:
        """Every history that may be trained on: the U users' and the others'."""
        return [*self.train, *self.others]


def split(interactions: pd.DataFrame, n_users: int, kind: str) -> Split:
    """The split called ``kind`` of users 0..n_users-1; order is by time, ties by row.

    leave-one-out: the last item of each user is for test, the one before for validation.
    global-time: the validation item is a user's first after the first of ``time_cuts``, the test
    item the first after the second. Users from ``n_users`` on only train, on what they did up to
    the first cut. Raises ``ValueError`` when one of the ``n_users`` lacks one of the three parts.
    """
    user, time = interactions["user"].to_numpy(), interactions["time"].to_numpy()
    order = np.lexsort((time, user))  # stable: ties stay in file order
    ends = np.cumsum(np.bincount(user, minlength=n_users))[:-1]
    items = interactions["item"].to_numpy(dtype=np.int64)
    sequences, times = np.split(items[order], ends), np.split(time[order], ends)
    if kind == GLOBAL_TIME:
        moments = time_cuts(interactions)
        cuts = [np.searchsorted(t, moments, "right") for t in times]
        lack = "no event in one of the three periods"
        remedy = "load the data with split='global-time', which puts such users last"
    else:
        cuts = [(len(items) - 2, len(items) - 1) for items in sequences]
        lack = f"fewer than {MIN_EVENTS} events"
        remedy = "drop those users first, for example with a 5-core filter"
    parts = [(items, *cut) for items, cut in zip(sequences, cuts)]
    own, others = parts[:n_users], parts[n_users:]
    if wrong := [user for user, (s, a, b) in enumerate(own) if not 0 < a < b < len(s)]:
        where = f"{len(wrong)} of {n_users} users have {lack} (first: user {wrong[0]})"
        raise ValueError(f"interactions: {where}; {remedy}")
    return Split(
        train=[s[:a] for s, a, _ in own],
        valid=np.array([s[a] for s, a, _ in own]),
        test=np.array([s[b] for s, _, b in own]),
        between=tuple(s[a + 1 : b] for s, a, b in own),
        others=tuple(s[:a] for s, a, _ in others if a),
    )


def time_cuts(interactions: pd.DataFrame) -> tuple[int, int]:
    """When the first 80 % and 90 % of all events have happened; an event at a cut is before it."""
    times = np.sort(interactions["time"].to_numpy())
    first, second = (int(times[max(int(share * len(times)) - 1, 0)]) for share in SHARES)
    return first, second


def evaluable(interactions: pd.DataFrame, n_users: int) -> np.ndarray:
    """(n_users,) bool: who has an event in each period of a global-time split."""
    met = np.zeros((n_users, 3), bool)
    met[interactions["user"], np.searchsorted(time_cuts(interactions), interactions["time"])] = True
    return np.all(met, axis=1)


def split_users(
    n_users: int, ppo_share: float, validation_share: float, seed: int
) -> tuple[np.ndarray, ...]:
    """(users whose prompts PPO trains on, users to choose settings on, the rest), each sorted."""
    n_ppo, n_validation = round(ppo_share * n_users), round(validation_share * n_users)
    n_heldout = n_users - n_ppo - n_validation
    if min(n_ppo, n_validation, n_heldout) < 1:
        shares = f"ppo_users={ppo_share} and validation_users={validation_share} of {n_users} users"
        groups = f"({n_ppo}, {n_validation}, {max(n_heldout, 0)} held out)"
        remedy = "change the shares, or give more users"
        raise ValueError(f"{shares} leave one of three groups empty {groups}: {remedy}")
    shuffled = np.random.default_rng(seed).permutation(n_users)
    return tuple(np.sort(part) for part in np.split(shuffled, [n_ppo, n_ppo + n_validation]))


def check_enough(split: Split, n_items: int, n_heldout: int, params: Params) -> None:
    """Raise ``ValueError`` naming the remedy if later stages would lack users or new items."""
    names = ("eval_users", "explain_users")
    if short := [name for name in names if getattr(params, name) > n_heldout]:
        lack = f"{short[0]} is {getattr(params, short[0])}, but only {n_heldout} users are held out"
        fewer = " ".join(f"{name}={n_heldout}" for name in short)
        raise ValueError(f"{lack}: make all SET='{fewer}', or lower ppo_users")
    unseen = n_items - np.array([len(items) for items in split.with_valid])
    if (few := unseen < TOP_K).any():
        first = f"first: user {few.argmax()}, {unseen[few.argmax()]} left"
        lack = f"{few.sum()} users have met all but fewer than {TOP_K} of {n_items} items ({first})"
        raise ValueError(f"{lack}: lower min_core, or give more items")
