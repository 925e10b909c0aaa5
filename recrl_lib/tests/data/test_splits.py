import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recrl_lib.data import splits
from recrl_lib.params import Params


def frame(rows):
    return pd.DataFrame(rows, columns=["user", "item", "time"])


def lists(arrays):
    return [array.tolist() for array in arrays]


def test_leave_one_out_by_hand():
    rows = [(1, 5, 3), (0, 1, 3), (1, 6, 1), (0, 2, 3), (0, 3, 1), (1, 7, 1), (0, 4, 9)]  # unsorted
    split = splits.split(frame(rows), 2, "leave-one-out")
    assert lists(split.train) == lists(split.training) == [[3, 1], [6]]
    assert split.valid.tolist() == [2, 7] and split.test.tolist() == [4, 5]
    assert lists(split.with_valid) == [[3, 1, 2], [6, 7]]
    rows = frame([(0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 1, 3), (1, 2, 4)])
    with pytest.raises(ValueError, match=r"2 of 3 users have fewer than 3 .* \(first: user 1\)"):
        splits.split(rows, 3, "leave-one-out")


# 40 events: 32 up to the first cut, 36 up to the second. User 2 only trains.
TIMED = [
    (0, 1, 10), (2, 1, 20), (1, 2, 30), (2, 2, 40), (0, 3, 50), (2, 3, 60), (0, 4, 70), (1, 4, 80),
    (0, 5, 85), (0, 6, 90), (1, 5, 90), (0, 7, 95), (1, 6, 99), (1, 7, 100), (2, 7, 97)
] + [(2, n, 1) for n in range(11, 36)]  # fmt: skip


def test_global_time_by_hand():
    rows = frame(TIMED)
    assert splits.time_cuts(rows) == (70, 90)
    split = splits.split(rows, 2, "global-time")
    assert lists(split.train) == [[1, 3, 4], [2]]
    assert split.valid.tolist() == [5, 4] and split.test.tolist() == [7, 6]
    assert lists(split.between) == [[6], [5]]
    assert lists(split.with_valid) == [[1, 3, 4, 5, 6], [2, 4, 5]]
    assert [len(s) for s in split.others] == [28] and len(split.training) == 3
    message = r"1 of 3 users .* \(first: user 2\); load the data with split='global-time'"
    with pytest.raises(ValueError, match=message):
        splits.split(rows, 3, "global-time")


event = st.tuples(st.integers(0, 5), st.integers(1, 30), st.integers(0, 40))
events = st.lists(event, min_size=10, max_size=120, unique_by=lambda e: e[:2])


@given(events)
def test_global_time_lets_nothing_from_the_future_into_training(rows):
    table = frame(rows)
    first, second = splits.time_cuts(table)
    assert (table["time"] <= first).mean() >= 0.8 - 1 / len(rows) and first <= second
    whole = splits.evaluable(table, 6)
    times = [[t for u, _, t in rows if u == user] for user in range(6)]
    assert whole.tolist() == [
        bool(t) and min(t) <= first and any(first < x <= second for x in t) and max(t) > second
        for t in times
    ]
    order = [*np.flatnonzero(whole), *np.flatnonzero(~whole)]
    table["user"] = [order.index(u) for u in table["user"]]
    if not (n := int(whole.sum())):
        return
    split = splits.split(table, n, "global-time")
    when = {(u, i): t for u, i, t in table.itertuples(index=False)}
    assert max(when[u, i] for u, s in enumerate(split.train) for i in s) <= first
    assert all(first < when[u, i] <= second for u, i in enumerate(split.valid))
    assert all(when[u, i] > second for u, i in enumerate(split.test))
    others = sorted(i for (u, i), t in when.items() if u >= n and t <= first)
    assert sorted(i for s in split.others for i in s) == others
    ordered = table[table["time"] <= second].sort_values("time", kind="stable")
    for user, history in enumerate(split.with_valid):  # all that was known at the second cut
        assert history.tolist() == ordered.loc[ordered["user"] == user, "item"].tolist()


@pytest.mark.parametrize(
    "short, message",
    [
        ((15, 8), "eval_users is 9, but only 8 users are held out: make all SET="
         "'eval_users=8', or lower ppo_users"),
        ((15, 7), "SET='eval_users=7 explain_users=7'"),
        ((14, 9), r"1 users have met all but fewer than 10 of 14 items \(first: user 3, 9")
    ]
)  # fmt: skip
def test_what_later_stages_would_lack_is_said_at_once(short, message):
    rows = frame([(u, i, i) for u in range(4) for i in range(1, 4 + u)])
    split, params = splits.split(rows, 4, "leave-one-out"), Params(eval_users=9, explain_users=8)
    splits.check_enough(split, 15, 9, params)
    with pytest.raises(ValueError, match=message):
        splits.check_enough(split, *short, params)


def test_split_users():
    groups = ppo, validation, held_out = splits.split_users(943, 0.5, 0.1, seed=3)
    assert [len(g) for g in groups] == [472, 94, 377]
    assert sorted(np.concatenate(groups)) == list(range(943))
    assert all((np.diff(g) > 0).all() for g in groups)
    again, other = (splits.split_users(943, 0.5, 0.1, seed=seed) for seed in (3, 4))
    assert all(map(np.array_equal, groups, again)) and (ppo != other[0]).any()
    for shares in ((0.1, 0.4), (0.4, 0.1), (0.6, 0.4)):
        with pytest.raises(ValueError, match="one of three groups empty .* or give more users"):
            splits.split_users(3, *shares, seed=0)
