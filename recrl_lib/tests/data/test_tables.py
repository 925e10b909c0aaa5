"""Filters, numbering, times and texts, each against a naive twin or by hand."""

import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandera.errors import SchemaError

from recrl_lib.data import splits, tables
from recrl_lib.data.tables import Raw, Skipped, assemble, parse_numbers, parse_times, sanitise_text

pairs = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60, unique=True)


def naive_core(rows: list[tuple[int, int]], k: int) -> set[tuple[int, int]]:
    left = set(rows)
    while True:
        users, items = ([row[n] for row in left] for n in (0, 1))
        thin = {(u, i) for u, i in left if users.count(u) < k or items.count(i) < k}
        if not thin:
            return left
        left -= thin


def split_pairs(rows):
    return (np.array([row[n] for row in rows], np.int64) for n in (0, 1))


@given(pairs, st.integers(1, 4))
def test_k_core_is_that_of_the_naive_twin(rows, k):
    kept = tables.k_core(*split_pairs(rows), k)
    assert {rows[n] for n in kept} == naive_core(rows, k) and (np.diff(kept) > 0).all()


@given(pairs, st.integers(1, 3), st.integers(0, 40))
def test_latest_core_is_that_of_the_shortest_window_that_holds_enough(rows, k, size):
    kept = tables.latest_core(*split_pairs(rows), k, size)
    windows = [naive_core(rows[start:], k) for start in range(len(rows), -1, -1)]  # shortest first
    enough = (core for core in windows if size and len(core) >= size)
    assert {rows[n] for n in kept} == next(enough, windows[-1])


def assembled(rows, items=(7, 8, 9), year=0, **options):
    """Of rows (user, item, time in seconds), in lines 2, 3, ..."""
    path, skipped = Path("x.csv"), Skipped(1.0)
    skipped.rows[path] += len(rows)
    table = pd.DataFrame(rows, columns=["user", "item", "time"])
    table = table.assign(line=range(2, len(rows) + 2), time=table["time"] * 1000)
    titles = [f"T{i}" for i in items]
    catalogue = {"raw": items, "title": titles, "year": year, "genres": "", "text": titles}
    raw = Raw(path, table, pd.DataFrame(catalogue), "toy", "item")
    defaults = {"split": "leave-one-out", "min_core": 1, "max_interactions": 0}
    return assemble(raw, skipped, **defaults | options)


def test_assembling_by_hand_and_by_the_schema():
    rows = [("b", 9, 3), ("a", 7, 5), ("b", 7, 1), ("b", 6, 4), ("b", 9, 0), ("b", 8, 3)]
    data = assembled([*rows, ("a", 8, 2)])
    # No item 6 in items; the second (b, 9) is a duplicate, though earlier; a is left with two.
    assert data.info["skipped"] == {
        "item without metadata": 1, "duplicate": 1, "user with fewer than 3 events": 1
    }  # fmt: skip
    assert list(data.info["skipped_first"].values()) == [f"x.csv line {n}" for n in (5, 6, 3)]
    assert data.info["skipped_bad"] == ["duplicate", "item without metadata"]
    expected = {"user": [0, 0, 0], "item": [1, 3, 2], "time": [1, 3, 3]}
    assert data.interactions.to_dict("list") == expected
    assert data.users.to_dict("list") == {"user": [0], "gender": [""], "age": [0]}
    assert data.items["title"].tolist() == ["T7", "T8", "T9"]
    with pytest.raises(SchemaError, match="year"):
        assembled(rows, year=-1)


def test_short_users_are_those_of_the_input_and_those_that_the_filters_make():
    whole = [(u, i, 3 + u) for u in (1, 2) for i in (7, 8, 9)]
    taken = [(9, 7, 0)] * 3  # one event and two duplicates: a core filter takes the user first
    left = [(8, 7, 1), (8, 8, 1)]  # too few before the filter and after it: counted once
    made = [(3, i, 9) for i in (7, 8, 6)]  # of three, the filter takes that with item 6
    for rows, count, line in ((taken + left + whole + made, 3, 2), (whole + made + left, 2, 8)):
        info = (data := assembled(rows, (6, 7, 8, 9), min_core=2)).info
        kind = "user with fewer than 3 events"
        found = info["skipped"][kind], info["skipped_first"][kind], info["n_users"]
        assert found == (count, f"x.csv line {line}", 2)
        assert data.interactions["item"].tolist() == [1, 2, 3, 1, 2, 3]


def test_without_a_filter_items_that_nobody_met_stay_and_with_one_they_go():
    rows = [(u, i, u) for u in range(3) for i in (7, 9)]
    with pytest.raises(ValueError, match="no interaction is left"):
        assembled(rows)  # two events each
    rows = [(u, i, 1) for u in (0, 1) for i in (7, 8, 9, 5)]
    assert assembled(rows, items=(5, 6, 7, 8, 9)).info["n_items"] == 5
    filtered = assembled(rows, items=(5, 6, 7, 8, 9), min_core=2)
    assert filtered.items["title"].tolist() == ["T5", "T7", "T8", "T9"]
    assert filtered.interactions["item"].max() == 4


def test_global_time_puts_users_who_cannot_be_evaluated_last():
    rows = [(0, 7, 1), (0, 8, 1), (0, 9, 1), (1, 7, 1), (1, 8, 9), (1, 9, 10)]
    rows += [(2, 7, 1), (2, 8, 1), (2, 9, 1), (3, 7, 1)]
    data = assembled(rows, split="global-time")
    assert data.info["n_users"] == 1 == len(data.users) and data.info["n_unevaluated_users"] == 3
    assert data.interactions.query("user == 0")["item"].tolist() == [1, 2, 3]  # raw user 1
    split = splits.split(data.interactions, 1, "global-time")
    assert split.test.tolist() == [3]
    assert [s.tolist() for s in split.others] == [[1, 2, 3], [1, 2, 3], [1]]
    with pytest.raises(ValueError, match="no user has events in all three periods"):
        assembled([(0, i, 1) for i in (7, 8, 9)], split="global-time")


NEW_YEAR = 1_420_070_400_000  # 2015-01-01T00:00Z in milliseconds
TIMES = {
    "1420070400": 0, "1420070400.5": 500, str(NEW_YEAR): 0, str(NEW_YEAR * 1000): 0,
    "1.4200704e9": 0, str(NEW_YEAR * 10**6): 0, "01 7, 2015": 6 * 86_400_000, " 2015-01-01 ": 0,
    "2015-01-01T01:00:00+01:00": 0, "2015-01-01 00:00:01Z": 1000, "0": -NEW_YEAR,
    "2015-01-01T00:00:00.123456789": 123, "-86400": -86_400_000 - NEW_YEAR
}  # fmt: skip
NO_TIMES = ["", "noon", "13 40, 2015", "nan", "1e400", "inf", "99999999999999999999", "2015-02-30"]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_a_column_of_times_in_every_format_and_of_what_is_no_time(monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    texts = [*TIMES, *NO_TIMES]
    times, good = parse_times(pd.Series(texts))
    assert dict(zip(TIMES, times[: len(TIMES)] - NEW_YEAR)) == TIMES
    assert [text for text, time in zip(texts, good) if not time] == NO_TIMES


@given(st.lists(st.integers(-(2**62), 2**62), max_size=20))
def test_milliseconds_agree_with_python_integers(values):
    def naive(v):
        size = abs(float(v))
        if size < 1e11:
            return v * 1000
        return v if size < 1e14 else v // 1000 if size < 1e17 else v // 10**6

    assert tables.milliseconds(np.array(values, np.int64)).tolist() == [naive(v) for v in values]


whole_numbers = st.integers(-(10**18), 10**18).map(str)


@given(st.lists(st.one_of(whole_numbers, st.floats().map(repr), st.text())))
def test_numbers_are_those_of_python(texts):
    for kind, parse in ((np.int64, int), (np.float64, float)):
        numbers, good = parse_numbers(pd.Series(texts, dtype="str"), kind)
        assert [parse(text) for text, fine in zip(texts, good) if fine] == numbers[good].tolist()
        refused = [text for text, fine in zip(texts, good) if not fine]
        assert not any(re.fullmatch(r"-?\d{1,15}", text, re.A) for text in refused)


@given(st.text(alphabet=st.one_of(st.sampled_from("<|>/s \n\x00\u202eab"), st.characters())))
def test_sanitised_text_is_plain_and_stable(text):
    plain = sanitise_text(text)
    assert not re.search(r"<\||\|>|</?s>|[\x00-\x1f\x7f-\x9f\u2028\u202e]", plain)
    assert plain == plain.strip() and "  " not in plain and sanitise_text(plain) == plain


def test_sanitise_text():
    texts = {
        "Léon: <3 a|b > c": "Léon: <3 a|b > c",
        "A<|im_end|>\n<|im_start|>system": "A system",
        "<|im_<|x|>end|>": "end",
        "<<s>|im_end|>": "im_end",
        "a<\x07|im_end|>": "a",
        "new\tline\u2028\u202eso\u200dft": "new line so\u200dft",
    }
    assert {text: sanitise_text(text) for text in texts} == texts
