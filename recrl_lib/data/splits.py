"""Splits of the interactions: leave-one-out and global-time."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from recrl_lib.params import TOP_K, Params

GLOBAL_TIME = "global-time"
MIN_EVENTS = 3  # of a user, for leave-one-out: one to train on, one for validation, one for test
SHARES = 0.8, 0.9  # of all events, up to the two cuts of the global-time split


@dataclass(frozen=True)
class Split:
    """What each user has for training, validation and test, in time order.

    ``train``: one int64 array a user; ``valid``, ``test``: int64 (U,). Only a global-time split has
    the other two: ``between``, one array a user, the events after the validation item and before
    the test period; ``others``, histories of users who are not evaluated, for training alone.
    """

    train: list[np.ndarray]
    valid: np.ndarray
    test: np.ndarray
    between: tuple[np.ndarray, ...] = ()
    others: tuple[np.ndarray, ...] = ()

    @property
    def with_valid(self) -> list[np.ndarray]:
        """Histories known when the test item is predicted."""
        known = [np.append(items, last) for items, last in zip(self.train, self.valid)]
        if not self.between:
            return known
        return [np.concatenate(parts) for parts in zip(known, self.between)]

    @property
    def training(self) -> list[np.ndarray]:
        """Every history that may be trained on: the U users' and the others'."""
        return [*self.train, *self.others]


def split(interactions: pd.DataFrame, n_users: int, kind: str) -> Split:
    """The split called ``kind`` of users 0..n_users-1; see the two below."""
    make = split_global_time if kind == GLOBAL_TIME else split_leave_one_out
    return make(interactions, n_users)


def split_leave_one_out(interactions: pd.DataFrame, n_users: int) -> Split:
    """Last item of each user = test, the one before = validation, the rest = training.

    Order is by time, ties by row. Raises ``ValueError`` when a user has fewer than three events.
    """
    sequences = _sequences(interactions, n_users)[0]
    short = np.array([len(s) < MIN_EVENTS for s in sequences])
    if short.any():
        raise ValueError(
            f"interactions: {short.sum()} of {n_users} users have fewer than 3 events (first: user "
            f"{short.argmax()}); drop those users first, for example with a 5-core filter"
        )
    last_two = np.array([s[-2:] for s in sequences])
    return Split([s[:-2] for s in sequences], last_two[:, 0], last_two[:, 1])


def split_global_time(interactions: pd.DataFrame, n_users: int) -> Split:
    """Two moments cut everybody's events: training up to the first, validation up to the second.

    A user's validation item is the first after the first cut, the test item the first after the
    second. So nothing that anybody did after a cut is known before it, which leave-one-out does not
    promise. Users from ``n_users`` on only train, with what they did up to the first cut. Raises
    ``ValueError`` when one of the ``n_users`` lacks an event in one of the three periods.
    """
    first, second = time_cuts(interactions)
    sequences, times = _sequences(interactions, n_users)
    cuts = [np.searchsorted(t, (first, second), "right") for t in times]
    lacking = [u for u in range(n_users) if not 0 < cuts[u][0] < cuts[u][1] < len(sequences[u])]
    if lacking:
        raise ValueError(
            f"interactions: {len(lacking)} of {n_users} users have no event in one of the three "
            f"periods (first: user {lacking[0]}); load the data with split='global-time', which "
            "puts such users last"
        )
    rows = [(s, a, b) for s, (a, b) in zip(sequences, cuts)]
    return Split(
        train=[s[:a] for s, a, _ in rows[:n_users]],
        valid=np.array([s[a] for s, a, _ in rows[:n_users]]),
        test=np.array([s[b] for s, _, b in rows[:n_users]]),
        between=tuple(s[a + 1 : b] for s, a, b in rows[:n_users]),
        others=tuple(s[:a] for s, a, _ in rows[n_users:] if a),
    )


def time_cuts(interactions: pd.DataFrame) -> tuple[int, int]:
    """When the first 80 % and 90 % of all events have happened; an event at a cut is before it."""
    times = np.sort(interactions["time"].to_numpy())
    first, second = (int(times[max(int(share * len(times)) - 1, 0)]) for share in SHARES)
    return first, second


def evaluable(interactions: pd.DataFrame, n_users: int) -> np.ndarray:
    """(n_users,) bool: users with an event in each period of the global-time split."""
    user, time = interactions["user"].to_numpy(), interactions["time"].to_numpy()
    first, second = time_cuts(interactions)
    periods = (time <= first, (first < time) & (time <= second), time > second)
    return np.all([np.bincount(user[period], minlength=n_users) > 0 for period in periods], axis=0)


def split_users(
    n_users: int, ppo_share: float, validation_share: float, seed: int
) -> tuple[np.ndarray, ...]:
    """(users whose prompts PPO trains on, users to choose settings on, the rest), each sorted."""
    n_ppo, n_validation = round(ppo_share * n_users), round(validation_share * n_users)
    n_heldout = n_users - n_ppo - n_validation
    if min(n_ppo, n_validation, n_heldout) < 1:
        raise ValueError(
            f"ppo_users={ppo_share} and validation_users={validation_share} of {n_users} users "
            f"leave one of three groups empty ({n_ppo}, {n_validation}, {max(n_heldout, 0)} held "
            "out): change the shares, or give more users"
        )
    shuffled = np.random.default_rng(seed).permutation(n_users)
    return tuple(np.sort(part) for part in np.split(shuffled, [n_ppo, n_ppo + n_validation]))


def check_enough(
    split: Split, n_items: int, n_validation: int, n_heldout: int, params: Params
) -> None:
    """Raise ``ValueError`` naming the remedy if later stages would lack users or new items."""
    has_frontier = params.frontier_points != "none" and params.text != "none"
    of_frontier = ("frontier_users",) if has_frontier else ()
    for group, there, change, wanted in (
        ("held out", n_heldout, "lower ppo_users", ("eval_users", "explain_users")),
        ("kept for validation", n_validation, "raise validation_users", of_frontier),
    ):
        if short := [name for name in wanted if getattr(params, name) > there]:
            lower = " ".join(f"{name}={there}" for name in short)
            remedy = f"make all SET='{lower}', or {change}" if there > 1 else change
            raise ValueError(
                f"{short[0]} is {getattr(params, short[0])}, but only {there} users are {group}: "
                f"{remedy}"
            )
    unseen = n_items - np.array([len(items) for items in split.with_valid])
    if (few := unseen < TOP_K).any():
        raise ValueError(
            f"{few.sum()} users have met all but fewer than {TOP_K} of {n_items} items (first: "
            f"user {few.argmax()}, {unseen[few.argmax()]} left), so there is no top ten to "
            "recommend: lower min_core, or give more items"
        )


def _sequences(
    interactions: pd.DataFrame, n_users: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(items, times) of every user in time order, ties by row; ``n_users`` of them or more."""
    user, time = interactions["user"].to_numpy(), interactions["time"].to_numpy()
    order = np.lexsort((time, user))  # stable: ties stay in file order
    ends = np.cumsum(np.bincount(user, minlength=n_users))[:-1]
    items = interactions["item"].to_numpy(dtype=np.int64)
    return np.split(items[order], ends), np.split(time[order], ends)


def held_times(interactions: pd.DataFrame, split: Split) -> pd.DataFrame:
    """Times of each user's last training event, validation and test event: train, valid, test.

    Looked up by user and item in the interactions, not taken from how the split was made.
    """
    users = np.arange(len(split.train))
    rows = {"valid": (users, split.valid), "test": (users, split.test)}
    rows["train"] = (np.repeat(users, list(map(len, split.train))), np.concatenate(split.train))
    held = pd.concat(
        [pd.DataFrame({"user": u, "item": i, "part": p}) for p, (u, i) in rows.items()]
    )
    held = held.merge(interactions[["user", "item", "time"]], on=["user", "item"])
    return held.pivot_table("time", "user", "part", aggfunc="max").loc[
        :, ["train", "valid", "test"]
    ]
