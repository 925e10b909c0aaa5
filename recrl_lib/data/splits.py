"""Splits of the interactions: leave-one-out and global-time."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

LEAVE_ONE_OUT, GLOBAL_TIME = KINDS = ("leave-one-out", "global-time")
MIN_EVENTS = 3  # a user's fewest events for leave-one-out: one to train on, one for validation, one for the test
LIST_LENGTH = 10  # items recommended to each user, ``study.TOP_K``
SHARES = 0.8, 0.9  # of all events, up to the two cuts of the global-time split


@dataclass(frozen=True)
class Split:
    """What each user has for training, validation and test, in time order.

    ``train``: one int64 array a user; ``valid``, ``test``: int64 (U,). Only a global-time split has the other two: ``between``, one
    array a user, the events after the validation item and before the test period; ``others``, histories of users who are not
    evaluated, for training alone.
    """

    train: list[np.ndarray]
    valid: np.ndarray
    test: np.ndarray
    between: tuple[np.ndarray, ...] = ()
    others: tuple[np.ndarray, ...] = ()

    @property
    def with_valid(self) -> list[np.ndarray]:
        """Histories known when the test item is predicted: the training items, the validation item, and those between."""
        known = [np.append(items, last) for items, last in zip(self.train, self.valid)]
        return (
            [np.concatenate(parts) for parts in zip(known, self.between)] if self.between else known
        )

    @property
    def training(self) -> list[np.ndarray]:
        """Every history that may be trained on: the U users' and the others'."""
        return [*self.train, *self.others]


def split(interactions: pd.DataFrame, n_users: int, kind: str) -> Split:
    """The split called ``kind`` of users 0..n_users-1; see the two below."""
    if kind not in KINDS:
        raise ValueError(f"split={kind!r}: choose one of {', '.join(KINDS)}")
    return (split_leave_one_out if kind == LEAVE_ONE_OUT else split_global_time)(
        interactions, n_users
    )


def split_leave_one_out(interactions: pd.DataFrame, n_users: int) -> Split:
    """Last item of each user = test, the one before = validation, the rest = training.

    Order is by time, ties by row. Raises ``ValueError`` when a user has fewer than three interactions.
    """
    sequences = _sequences(interactions, n_users)[0]
    if len(sequences) > n_users:
        raise ValueError(
            f"interactions: user {len(sequences) - 1} is out of range; n_users is {n_users}"
        )
    short = np.array([len(s) < MIN_EVENTS for s in sequences])
    if short.any():
        raise ValueError(
            f"interactions: {short.sum()} of {n_users} users have fewer than 3 events (first: user {short.argmax()}); "
            "leave-one-out needs 3 for each: drop those users first, for example with a 5-core filter"
        )
    last_two = np.array([s[-2:] for s in sequences])
    return Split([s[:-2] for s in sequences], last_two[:, 0], last_two[:, 1])


def split_global_time(interactions: pd.DataFrame, n_users: int) -> Split:
    """Two moments cut everybody's events: training up to the first, validation up to the second, test after it.

    A user's validation item is the first after the first cut, the test item the first after the second: what came next, as known at
    that moment. So nothing that anybody did after a cut is known before it, which leave-one-out does not promise. Users from
    ``n_users`` on only train, with what they did up to the first cut. Raises ``ValueError`` when one of the ``n_users`` lacks an
    event in one of the three periods (``datasets.load`` numbers the users so that none does).
    """
    first, second = time_cuts(interactions)
    sequences, times = _sequences(interactions, n_users)
    ends = [
        (np.searchsorted(t, first, "right"), np.searchsorted(t, second, "right")) for t in times
    ]
    lacking = [u for u in range(n_users) if not 0 < ends[u][0] < ends[u][1] < len(sequences[u])]
    if lacking:
        raise ValueError(
            f"interactions: {len(lacking)} of {n_users} users have no event in one of the three periods (first: user {lacking[0]}); "
            "load the data with split='global-time', which puts such users last"
        )
    rows = list(zip(sequences, ends))
    return Split(
        train=[s[:a] for s, (a, b) in rows[:n_users]],
        valid=np.array([s[a] for s, (a, b) in rows[:n_users]]),
        test=np.array([s[b] for s, (a, b) in rows[:n_users]]),
        between=tuple(s[a + 1 : b] for s, (a, b) in rows[:n_users]),
        others=tuple(s[:a] for s, (a, b) in rows[n_users:] if a),
    )


def time_cuts(interactions: pd.DataFrame) -> tuple[int, int]:
    """The two cuts: the times of the last event of the first 80 % and 90 % of all events. An event at a cut is before it."""
    times = np.sort(interactions["time"].to_numpy())
    first, second = (int(times[max(int(share * len(times)) - 1, 0)]) for share in SHARES)
    return first, second


def evaluable(interactions: pd.DataFrame, n_users: int) -> np.ndarray:
    """(n_users,) bool: users with an event in each of the three periods of the global-time split."""
    user, time = interactions["user"].to_numpy(), interactions["time"].to_numpy()
    first, second = time_cuts(interactions)
    periods = (time <= first, (first < time) & (time <= second), time > second)
    return np.all([np.bincount(user[period], minlength=n_users) > 0 for period in periods], axis=0)


def split_users(
    n_users: int, ppo_share: float, validation_share: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(users whose prompts PPO trains on, users to choose settings on, the held-out rest): sorted, disjoint, seeded."""
    n_ppo, n_validation = round(ppo_share * n_users), round(validation_share * n_users)
    if not n_ppo or not n_validation or n_ppo + n_validation >= n_users:
        raise ValueError(
            f"ppo_users={ppo_share} and validation_users={validation_share} of {n_users} users leave one of three groups empty "
            f"({n_ppo}, {n_validation}, and {max(n_users - n_ppo - n_validation, 0)} held out): change the shares, or give more users"
        )
    shuffled = np.random.default_rng(seed).permutation(n_users)
    return tuple(np.sort(part) for part in np.split(shuffled, [n_ppo, n_ppo + n_validation]))


def check_enough(split: Split, n_items: int, n_validation: int, n_heldout: int, params) -> None:
    """Raise ``ValueError`` naming the remedy if later stages would lack users of a group, or a user items that are new to them.

    ``params`` is a ``config.Params``.
    """
    frontier = (
        ("frontier_users",) if params.frontier_points != "none" and params.text != "none" else ()
    )
    for group, there, change, wanted in (
        ("held out", n_heldout, "lower ppo_users", ("eval_users", "explain_users")),
        ("kept for validation", n_validation, "raise validation_users", frontier),
    ):
        if short := [name for name in wanted if getattr(params, name) > there]:
            lower = " ".join(f"{name}={there}" for name in short)
            remedy = (
                f"make all SET='{lower}', or {change}" if there > 1 else change
            )  # these three are at least 1 or 2
            raise ValueError(
                f"{short[0]} is {getattr(params, short[0])}, but only {there} users are {group}: {remedy}"
            )
    unseen = n_items - np.array(list(map(len, split.with_valid)))
    if (few := unseen < LIST_LENGTH).any():
        raise ValueError(
            f"{few.sum()} users have met all but fewer than {LIST_LENGTH} of {n_items} items "
            f"(first: user {few.argmax()}, {unseen[few.argmax()]} left), "
            "so there is no top ten to recommend: lower min_core, or give more items"
        )


def _sequences(
    interactions: pd.DataFrame, n_users: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(items, times) of every user in time order, ties by row; ``n_users`` of them or more."""
    user, time = interactions["user"].to_numpy(), interactions["time"].to_numpy()
    order = np.lexsort((time, user))  # stable: ties stay in file order
    ends = np.cumsum(np.bincount(user, minlength=n_users))[:-1]
    return np.split(interactions["item"].to_numpy(dtype=np.int64)[order], ends), np.split(
        time[order], ends
    )


def held_times(interactions: pd.DataFrame, split: Split) -> pd.DataFrame:
    """When each user's last training event, validation event and test event were: columns train, valid, test.

    Looked up by user and item in the interactions, not taken from how the split was made.
    """
    width = int(interactions["item"].max()) + 1
    key = interactions["user"].to_numpy() * np.int64(width) + interactions["item"].to_numpy()
    order = np.argsort(key)
    time = interactions["time"].to_numpy()[order]

    def when(user: np.ndarray, item: np.ndarray) -> np.ndarray:
        return time[np.searchsorted(key, user * np.int64(width) + item, sorter=order)]

    users, lengths = np.arange(len(split.train)), np.array(list(map(len, split.train)))
    trained = when(np.repeat(users, lengths), np.concatenate(split.train))
    last = np.maximum.reduceat(trained, np.cumsum(lengths) - lengths)
    return pd.DataFrame(
        {"train": last, "valid": when(users, split.valid), "test": when(users, split.test)}
    )
