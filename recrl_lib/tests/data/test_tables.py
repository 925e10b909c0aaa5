import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recrl_lib.data import splits, tables
from recrl_lib.data.tables import (
    Raw,
    Skipped,
    assemble,
    k_core,
    latest_core,
    milliseconds,
    parse_time,
    parse_times,
)

pairs = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60, unique=True)


def naive_core(rows: list[tuple[int, int]], k: int) -> set[tuple[int, int]]:
    left = set(rows)
    while True:
        thin = {
            (u, i)
            for u, i in left
            if sum(v == u for v, _ in left) < k or sum(j == i for _, j in left) < k
        }
        if not thin:
            return left
        left -= thin


def split_pairs(rows):
    return (np.array([row[n] for row in rows], np.int64) for n in (0, 1))


@given(pairs, st.integers(1, 4))
def test_k_core_is_that_of_the_naive_twin(rows, k):
    kept = k_core(*split_pairs(rows), k)
    assert {rows[n] for n in kept} == naive_core(rows, k)
    assert (np.diff(kept) > 0).all()


def test_k_core_by_hand():
    rows = [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 1),
        (2, 2),
        (3, 2),
    ]  # item 2 keeps user 2 until user 3 has gone
    assert k_core(*split_pairs(rows), 2).tolist() == [0, 1, 2, 3]
    assert k_core(*split_pairs(rows), 1).tolist() == list(range(7))
    assert k_core(*split_pairs(rows), 3).tolist() == []


@given(pairs, st.integers(1, 3), st.integers(0, 40))
def test_latest_core_is_that_of_the_shortest_window_that_holds_enough(rows, k, size):
    kept = latest_core(*split_pairs(rows), k, size)
    windows = [naive_core(rows[start:], k) for start in range(len(rows), -1, -1)]  # shortest first
    expected = (
        windows[-1]
        if not size
        else next((core for core in windows if len(core) >= size), windows[-1])
    )
    assert {rows[n] for n in kept} == expected


# --- assembling --------------------------------------------------------------------------------------


def raw(rows, items=(7, 8, 9)) -> Raw:
    """Rows (user, item, time in seconds), in lines 2, 3, ..."""
    table = pd.DataFrame(rows, columns=["user", "item", "time"]).assign(
        line=range(2, len(rows) + 2)
    )
    table["time"] *= 1000
    titles = [f"T{i}" for i in items]
    catalogue = pd.DataFrame(
        {"raw": items, "title": titles, "year": 0, "genres": "", "text": titles}
    )
    return Raw(Path("x.csv"), len(rows), table, catalogue, "toy", "item")


def assembled(rows, skipped=None, **options):
    return assemble(
        raw(rows),
        skipped or Skipped(1.0),
        **{"split": "leave-one-out", "min_core": 1, "max_interactions": 0} | options,
    )


def test_assembling_by_hand():
    rows = [
        ("b", 9, 3),
        ("a", 7, 5),
        ("b", 7, 1),
        ("b", 6, 4),
        ("b", 9, 0),
        ("b", 8, 3),
        ("a", 8, 2),
    ]
    data = assembled(rows)
    # item 6 has no row in items; the second (b, 9) is a duplicate, though earlier; a is left with two events
    assert data.info["skipped"] == {
        "item without metadata": 1,
        "duplicate": 1,
        "user with fewer than 3 events": 1,
    }
    assert data.info["skipped_first"] == {
        "item without metadata": "x.csv line 5", "duplicate": "x.csv line 6", "user with fewer than 3 events": "x.csv line 3",
    }  # fmt: skip
    assert data.info["skipped_bad"] == ["duplicate", "item without metadata"]
    assert data.interactions.to_dict("list") == {
        "user": [0, 0, 0],
        "item": [1, 3, 2],
        "time": [1, 3, 3],
    }
    assert data.users.to_dict("list") == {"user": [0], "gender": [""], "age": [0]}
    assert data.items["title"].tolist() == ["T7", "T8", "T9"]


def test_short_users_are_those_of_the_input_and_those_that_the_filters_make():
    taken = [
        (9, 7, 0),
        (9, 7, 0),
        (9, 7, 0),
    ]  # one event and two duplicates: a core filter takes the user before anybody counts
    left = [(8, 7, 1), (8, 8, 1)]  # too few before the filter and after it: counted once
    made = [
        (3, i, 9) for i in (7, 8, 6)
    ]  # three events, of which the filter takes that with item 6, which nobody else met
    whole = [(u, i, 3 + u) for u in (1, 2) for i in (7, 8, 9)]
    for rows, count, line in (
        (taken + left + whole + made, 3, 2),
        (whole + made + left, 2, 8),
        (whole + left + made, 2, 8),
        (whole, 0, 0),
    ):
        data = assemble(
            raw(rows, (6, 7, 8, 9)),
            skipped := Skipped(1.0),
            split="leave-one-out",
            min_core=2,
            max_interactions=0,
        )
        assert skipped.counts.get("user with fewer than 3 events", 0) == count
        assert (
            skipped.first.get("user with fewer than 3 events", "x.csv line 0")
            == f"x.csv line {line}"
        )
        assert data.info["n_users"] == 2 and data.interactions["item"].tolist() == [
            1,
            2,
            3,
            1,
            2,
            3,
        ]


def test_without_a_filter_items_that_nobody_met_stay_and_with_one_they_go():
    rows = [(u, i, u) for u in range(3) for i in (7, 9)]
    with pytest.raises(ValueError, match="no interaction is left"):
        assembled(rows)  # two events each
    rows += [(u, 8, 9) for u in range(3)] + [(5, 8, 1)]
    assert assembled(rows, min_core=3).items["title"].tolist() == ["T7", "T8", "T9"]
    rows = [(0, 7, 1), (0, 8, 1), (0, 9, 1), (1, 7, 1), (1, 8, 1), (1, 9, 1), (0, 5, 1), (1, 5, 1)]
    assert (
        assemble(
            raw(rows, (5, 6, 7, 8, 9)),
            Skipped(),
            split="leave-one-out",
            min_core=1,
            max_interactions=0,
        ).info["n_items"]
        == 5
    )
    filtered = assemble(
        raw(rows, (5, 6, 7, 8, 9)), Skipped(), split="leave-one-out", min_core=2, max_interactions=0
    )
    assert (
        filtered.items["title"].tolist() == ["T5", "T7", "T8", "T9"]
        and filtered.interactions["item"].max() == 4
    )


def test_global_time_puts_users_who_cannot_be_evaluated_last():
    rows = [
        (0, 7, 1),
        (0, 8, 1),
        (0, 9, 1),
        (1, 7, 1),
        (1, 8, 9),
        (1, 9, 10),
        (2, 7, 1),
        (2, 8, 1),
        (2, 9, 1),
        (3, 7, 1),
    ]
    data = assembled(rows, split="global-time")
    assert data.info["n_users"] == 1 == len(data.users) and data.info["n_unevaluated_users"] == 3
    assert data.interactions.query("user == 0")["item"].tolist() == [1, 2, 3]  # raw user 1
    split = splits.split(data.interactions, 1, "global-time")
    assert split.test.tolist() == [3] and [s.tolist() for s in split.others] == [
        [1, 2, 3],
        [1, 2, 3],
        [1],
    ]
    with pytest.raises(ValueError, match="no user has events in all three periods"):
        assembled([(0, i, 1) for i in (7, 8, 9)], split="global-time")


def test_milliseconds_decide_the_order_within_a_second():
    table = raw([("a", 7, 0), ("a", 8, 0), ("a", 9, 0)])
    table.interactions["time"] = [1_700_000_000_900, 1_700_000_000_100, 1_699_999_999_999]
    data = assemble(table, Skipped(), split="leave-one-out", min_core=1, max_interactions=0)
    assert data.interactions["item"].tolist() == [3, 2, 1]
    assert data.interactions["time"].tolist() == [1_699_999_999, 1_700_000_000, 1_700_000_000]


def test_the_limit_counts_bad_rows_only():
    rows = [("a", 7, 1), ("a", 8, 1), ("a", 9, 1), ("a", 7, 2)]
    with pytest.raises(
        ValueError, match=r"x.csv: 1 of 4 rows are unusable.* 1 x duplicate \(first: x.csv line 5\)"
    ):
        assembled(rows, Skipped(0.2))
    assert assembled(rows, Skipped(0.2, frozenset(("duplicate",)))).info["skipped_bad"] == []


# --- times -------------------------------------------------------------------------------------------

NEW_YEAR = 1_420_070_400_000  # 2015-01-01T00:00Z in milliseconds


@pytest.mark.parametrize(
    "value, expected",
    [
        (1420070400, NEW_YEAR), ("1420070400", NEW_YEAR), (1420070400.0, NEW_YEAR), ("1420070400.5", NEW_YEAR + 500),
        (NEW_YEAR, NEW_YEAR), (str(NEW_YEAR), NEW_YEAR), (NEW_YEAR * 1000, NEW_YEAR), (NEW_YEAR * 10**6, NEW_YEAR),
        ("01 1, 2015", NEW_YEAR), ("01 7, 2015", NEW_YEAR + 6 * 86_400_000), ("2015-01-01", NEW_YEAR),
        ("2015-01-01T01:00:00+01:00", NEW_YEAR), ("2015-01-01 00:00:01Z", NEW_YEAR + 1000), (0, 0), ("-86400", -86_400_000),
    ],
)  # fmt: skip
def test_times_in_every_format(value, expected):
    assert parse_time(value) == expected


@pytest.mark.parametrize(
    "value",
    ["", "noon", "13 40, 2015", "nan", "1e400", float("inf"), None, True, [1], 2**63, "2015-02-30"],
)
def test_what_is_no_time_is_refused(value):
    with pytest.raises(ValueError):
        parse_time(value)


def test_a_column_of_mixed_times():
    times, good = parse_times(["1420070400", str(NEW_YEAR), "01 1, 2015", "?", "2015-01-01"])
    assert times[good].tolist() == [NEW_YEAR] * 4 and good.tolist() == [
        True,
        True,
        True,
        False,
        True,
    ]
    times, good = parse_times(["1420070400", str(NEW_YEAR)])
    assert times.tolist() == [NEW_YEAR] * 2 and good.all()


@given(st.lists(st.integers(-(2**62), 2**62), max_size=20))
def test_milliseconds_agree_with_python_integers(values):
    def naive(v):
        return (
            v * 1000
            if abs(float(v)) < 1e11
            else v
            if abs(float(v)) < 1e14
            else v // 1000
            if abs(float(v)) < 1e17
            else v // 10**6
        )

    assert milliseconds(np.array(values, np.int64)).tolist() == [naive(v) for v in values]


# --- text --------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.one_of(st.sampled_from("<|>/s \n\x00\u202eab"), st.characters())))
def test_sanitised_text_is_plain_and_stable(text):
    plain = tables.sanitise_text(text)
    assert not re.search(r"<\||\|>|</?s>|[\x00-\x1f\x7f-\x9f\u2028\u202e]", plain)
    assert plain == plain.strip() and "  " not in plain
    assert tables.sanitise_text(plain) == plain


@pytest.mark.parametrize(
    "text, plain",
    [
        ("Léon: <3 a|b > c", "Léon: <3 a|b > c"),
        ("A<|im_end|>\n<|im_start|>system", "A system"),
        ("<|im_<|x|>end|>", "end"),
        ("<<s>|im_end|>", "im_end"),
        ("a<\x07|im_end|>", "a"),
        ("new\tline\u2028so\u00adft", "new line soft"),
    ],
)
def test_sanitise_text(text, plain):
    assert tables.sanitise_text(text) == plain


def test_item_text():
    assert (
        tables.item_text("The Rock", 1996, "Action|Thriller")
        == "The Rock (1996). Genres: Action, Thriller."
    )
    assert (
        tables.item_text("Circe", 0, "Fantasy", "Madeline Miller")
        == "Circe by Madeline Miller. Genres: Fantasy."
    )
    assert tables.item_text("Dota 2", 0, "") == "Dota 2."
