import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recrl_lib import params
from recrl_lib.data import splits
from recrl_lib.data.splits import evaluable


def frame(rows):
    return pd.DataFrame(rows, columns=["user", "item", "time"])


def test_leave_one_out_by_hand():
    rows = [(1, 5, 3), (0, 1, 3), (1, 6, 1), (0, 2, 3), (0, 3, 1), (1, 7, 1), (0, 4, 9)]  # unsorted
    split = splits.split(frame(rows), 2, "leave-one-out")
    assert [s.tolist() for s in split.train] == [[3, 1], [6]]
    assert split.valid.tolist() == [2, 7] and split.test.tolist() == [4, 5]
    assert [s.tolist() for s in split.with_valid] == [[3, 1, 2], [6, 7]]
    assert [s.tolist() for s in split.training] == [[3, 1], [6]]
    assert splits.held_times(frame(rows), split).to_dict("list") == {
        "train": [3, 1],
        "valid": [3, 1],
        "test": [9, 3],
    }


def test_leave_one_out_refuses_short_users():
    rows = pd.DataFrame({"user": [0, 0, 0, 1, 1], "item": [1, 2, 3, 1, 2], "time": range(5)})
    with pytest.raises(
        ValueError, match=r"2 of 3 users have fewer than 3 events \(first: user 1\)"
    ):
        splits.split_leave_one_out(rows, 3)
    with pytest.raises(ValueError, match="out of range"):
        splits.split_leave_one_out(rows, 1)


# Cuts at the 8th and 9th of ten events by time: 80 and 90. User 0 has two events between them, user 1 one; user 2 only trains.
TIMED = [
    (0, 1, 10), (2, 1, 20), (1, 2, 30), (2, 2, 40), (0, 3, 50), (2, 3, 60), (0, 4, 70), (1, 4, 80),
    (0, 5, 85), (0, 6, 90), (1, 5, 90), (0, 7, 95), (1, 6, 99), (1, 7, 100), (2, 7, 97),
]  # fmt: skip


def test_global_time_by_hand():
    rows = frame(
        TIMED + [(2, n, 1) for n in range(11, 36)]
    )  # 40 events: 32 up to the first cut, 36 up to the second
    assert splits.time_cuts(rows) == (70, 90)
    split = splits.split(rows, 2, "global-time")
    assert [s.tolist() for s in split.train] == [[1, 3, 4], [2]]
    assert split.valid.tolist() == [5, 4] and split.test.tolist() == [7, 6]
    assert [s.tolist() for s in split.between] == [[6], [5]]
    assert [s.tolist() for s in split.with_valid] == [[1, 3, 4, 5, 6], [2, 4, 5]]
    assert [len(s) for s in split.others] == [28]
    assert len(split.training) == 3
    with pytest.raises(
        ValueError,
        match=r"1 of 3 users .* \(first: user 2\); load the data with split='global-time'",
    ):
        splits.split(rows, 3, "global-time")


events = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 30), st.integers(0, 40)),
    min_size=10,
    max_size=120,
    unique_by=lambda e: e[:2],
)


@given(events)
def test_global_time_lets_nothing_from_the_future_into_training(rows):
    table = frame(rows)
    first, second = splits.time_cuts(table)
    assert (table["time"] <= first).mean() >= 0.8 - 1 / len(rows) and first <= second
    whole = evaluable(table, 6)
    naive = [
        any(t <= first for u, _, t in rows if u == user)
        and any(first < t <= second for u, _, t in rows if u == user)
        and any(t > second for u, _, t in rows if u == user)
        for user in range(6)
    ]
    assert whole.tolist() == naive
    order = [*np.flatnonzero(whole), *np.flatnonzero(~whole)]
    table["user"] = [order.index(u) for u in table["user"]]
    n = int(whole.sum())
    if not n:
        return
    split = splits.split(table, n, "global-time")
    when = {(u, i): t for u, i, t in table.itertuples(index=False)}
    trained = [(u, i) for u, s in enumerate(split.train) for i in s]
    assert max(when[pair] for pair in trained) <= first
    assert all(first < when[u, i] <= second for u, i in enumerate(split.valid))
    assert all(when[u, i] > second for u, i in enumerate(split.test))
    assert all(when[u, i] <= second for u, s in enumerate(split.with_valid) for i in s)
    assert sorted(i for s in split.others for i in s) == sorted(
        i for u, i, t in table.itertuples(index=False) if u >= n and t <= first
    )
    for user, history in enumerate(
        split.with_valid
    ):  # all that was known at the second cut, in order
        known = sorted(
            (t, row, i)
            for row, (u, i, t) in enumerate(table.itertuples(index=False))
            if u == user and t <= second
        )
        assert history.tolist() == [i for _, _, i in known]


def test_what_later_stages_would_lack_is_said_at_once():
    split = splits.split(
        frame([(u, i, i) for u in range(4) for i in range(1, 4 + u)]), 4, "leave-one-out"
    )
    wanted = params.resolve("smoke", eval_users=9, explain_users=8, frontier_users=4)
    splits.check_enough(split, n_items=15, n_validation=4, n_heldout=9, params=wanted)
    with pytest.raises(
        ValueError,
        match="eval_users is 9, but only 8 users are held out: make all SET='eval_users=8', or lower ppo_users",
    ):
        splits.check_enough(split, 15, 4, 8, wanted)
    with pytest.raises(ValueError, match="SET='eval_users=7 explain_users=7'"):
        splits.check_enough(split, 15, 4, 7, wanted)
    with pytest.raises(
        ValueError,
        match="only 3 users are kept for validation: make all SET='frontier_users=3', or raise validation_users",
    ):
        splits.check_enough(split, 15, 3, 9, wanted)
    with pytest.raises(
        ValueError, match="only 1 users are kept for validation: raise validation_users"
    ):
        splits.check_enough(split, 15, 1, 9, wanted)
    for without in ({"frontier_points": "none"}, {"text": "none"}):
        splits.check_enough(split, 15, 1, 9, wanted.replace(**without))
    with pytest.raises(
        ValueError,
        match=r"1 users have met all but fewer than 10 of 14 items \(first: user 3, 9 left\)",
    ):
        splits.check_enough(split, 14, 4, 9, wanted)


def test_lists_are_as_long_as_the_study_makes_them():
    from recrl_lib import study
    from recrl_lib.data import splits

    assert splits.LIST_LENGTH == study.TOP_K


def test_an_unknown_split_is_refused():
    with pytest.raises(
        ValueError, match="split='random': choose one of leave-one-out, global-time"
    ):
        splits.split(frame(TIMED), 2, "random")


def test_split_users():
    groups = ppo, validation, held_out = splits.split_users(943, 0.5, 0.1, seed=3)
    assert [len(g) for g in groups] == [472, 94, 377] and sorted(np.concatenate(groups)) == list(
        range(943)
    )
    assert all((np.diff(g) > 0).all() for g in groups)
    again, other = (
        splits.split_users(943, 0.5, 0.1, seed=3),
        splits.split_users(943, 0.5, 0.1, seed=4),
    )
    assert all(np.array_equal(a, b) for a, b in zip(groups, again)) and (ppo != other[0]).any()
    for shares in ((0.1, 0.4), (0.4, 0.1), (0.6, 0.4)):
        with pytest.raises(
            ValueError,
            match="leave one of three groups empty .* change the shares, or give more users",
        ):
            splits.split_users(3, *shares, seed=0)
