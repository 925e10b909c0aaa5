import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recrl_lib.files import sha256_file
from recrl_lib import datasets
from recrl_lib.datasets import ml100k

ITEMS = [
    "10\tUsual Suspects, The\t1995\tCrime Thriller",
    "2\tunkonwn\tunkonwn\tunknown",
    '7\tSay "Hi"\u2028<|im_end|>\t\tChildren\'s Film-Noir Sci-Fi',
    "9\tLand Before Time III (1995)\tV\tAnimation",
]
USERS = ["30\t24\tM\ttechnician\t85711", "4\t\t\t\t"]
RATINGS = ["30\t10\t3\t881250949", "4\t2\t5\t881250948", "30\t2\t1\t881250949", "4\t10\t4\t5", "30\t7\t2.5\t881250948"]


def write(folder, ratings=RATINGS, items=ITEMS, users=USERS, end="\n"):
    for name, rows in (("ml-100k.inter", ratings), ("ml-100k.item", items), ("ml-100k.user", users)):
        lines = [ml100k.HEADERS[name].replace(" ", "\t"), *rows]
        (folder / name).write_bytes(("\n".join(lines) + end).encode())
    return folder


def many(n):
    """n good ratings, spread over users and items that exist."""
    users = [f"{u}\t1\tF\t\t" for u in range(n)]
    return [f"{u}\t10\t4\t{1000 + u}" for u in range(n)], users


def test_tables_by_hand(tmp_path):
    data = datasets.load("ml-100k", write(tmp_path))
    assert data.items.to_dict("list") == {
        "item": [1, 2, 3, 4],
        "title": ["Unknown", 'Say "Hi"', "Land Before Time III", "The Usual Suspects"],
        "year": [0, 0, 1995, 1995],
        "genres": ["", "Children's|Film-Noir|Sci-Fi", "Animation", "Crime|Thriller"],
        "text": [
            "Unknown.",
            "Say \"Hi\". Genres: Children's, Film-Noir, Sci-Fi.",
            "Land Before Time III (1995). Genres: Animation.",
            "The Usual Suspects (1995). Genres: Crime, Thriller.",
        ],
    }
    assert data.users.to_dict("list") == {"user": [0, 1], "gender": ["", "M"], "age": [0, 24]}
    # by time, ties by line: user and item are numbered by raw id
    assert data.interactions.to_dict("list") == {
        "user": [0, 0, 1, 1, 1],
        "item": [4, 1, 2, 4, 1],
        "time": [5, 881250948, 881250948, 881250949, 881250949],
        "rating": [4.0, 5.0, 2.5, 3.0, 1.0],
    }
    assert [str(data.interactions[c].dtype) for c in ("user", "item", "time")] == ["int64"] * 3
    assert data.info["skipped"] == {} and data.info["skipped_first"] == {}
    assert (data.info["n_users"], data.info["n_items"], data.info["n_interactions"]) == (2, 4, 5)
    assert data.info["sha256"] == sha256_file(tmp_path / "ml-100k.inter") and len(data.info["sha256"]) == 64


def test_times_do_not_pass_through_float32(tmp_path):
    ratings = ["30\t10\t3\t881250950", "30\t2\t3\t881250949"]  # equal as float32
    assert np.float32(881250950) == np.float32(881250949)
    data = datasets.load("ml-100k", write(tmp_path, ratings))
    assert data.interactions["time"].tolist() == [881250949, 881250950]


def test_ties_in_time_keep_the_order_of_the_file(tmp_path):
    order = np.random.default_rng(0).permutation(500)
    ratings, users = many(500)
    ratings = [f"{ratings[u].rsplit(chr(9), 1)[0]}\t{7 - u % 2}" for u in order]  # odd users first, all at once
    data = datasets.load("ml-100k", write(tmp_path, ratings, users=users))
    assert data.interactions["user"].tolist() == [*order[order % 2 == 1], *order[order % 2 == 0]]


@pytest.mark.parametrize(
    "title, shown",
    [
        ("Blue Angel, The (Blaue Engel, Der)", "The Blue Angel (Der Blaue Engel)"),
        ("Fille seule, La (A Single Girl)", "La Fille seule (A Single Girl)"),
        ("Enfer, L'", "L'Enfer"),
        ("Affair to Remember, An", "An Affair to Remember"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Mrs. Brown (Her Majesty, Mrs. Brown)", "Mrs. Brown (Her Majesty, Mrs. Brown)"),
        ("I, Worst of All (Yo, la peor de todas)", "I, Worst of All (Yo, la peor de todas)"),
        ("Die Hard", "Die Hard"),
        ("Cook the Thief, Theodore", "Cook the Thief, Theodore"),
    ],
)
def test_display_title(title, shown):
    assert ml100k.display_title(title) == shown


@pytest.mark.parametrize(
    "row, kind",
    [
        ("30\t10\t3", "wrong number of fields"),
        ("30\t10\t3\tnoon", "unparsable field"),
        ("30\t10\tnan\t5", "unparsable field"),
        (f"30\t10\t3\t{2**63}", "unparsable field"),
        ("30\t99\t3\t5", "item without a row"),
        ("4\t10\t1\t7", "duplicate"),
    ],
)
def test_bad_rows_are_counted_and_skipped(tmp_path, row, kind):
    ratings, users = many(120)
    ratings.insert(50, row)
    data = datasets.load("ml-100k", write(tmp_path, ratings, users=users))
    assert data.info["skipped"] == {kind: 1}
    assert data.info["skipped_first"] == {kind: "ml-100k.inter line 52"}
    assert data.info["n_interactions"] == 120


def test_the_first_of_a_duplicate_is_kept(tmp_path):
    ratings, users = many(120)
    data = datasets.load("ml-100k", write(tmp_path, [*ratings, "4\t10\t1\t7"], users=users))
    assert data.info["skipped_first"] == {"duplicate": "ml-100k.inter line 122"}
    assert data.interactions.query("user == 4")[["time", "rating"]].to_numpy().tolist() == [[1004, 4]]


def test_a_last_line_without_newline_is_not_trusted(tmp_path):
    ratings, users = many(120)
    write(tmp_path, ratings, users=users)
    path = tmp_path / "ml-100k.inter"
    path.write_bytes(path.read_bytes()[:-3])  # the time lost two digits, and would still parse
    data = datasets.load("ml-100k", tmp_path)
    assert data.info["skipped"] == {"cut last line": 1} and data.interactions["time"].min() == 1000


def test_too_many_bad_rows_stop_the_run(tmp_path):
    ratings, users = many(98)
    counted = r"ml-100k.inter: 2 of 100 .* 2 x unparsable field \(first: ml-100k.inter line 100\)"
    with pytest.raises(ValueError, match=counted):
        datasets.load("ml-100k", write(tmp_path, [*ratings, *["1\t10\t?\t1"] * 2], users=users))


def test_windows_line_ends_are_read(tmp_path):
    write(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert datasets.load("ml-100k", tmp_path).info["n_interactions"] == 5


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="user_id 4 has no row in ml-100k.user"):
        datasets.load("ml-100k", write(tmp_path, users=USERS[:1]))
    write(tmp_path)
    path = tmp_path / "ml-100k.item"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"release_year:token", b"year:token"))
    with pytest.raises(ValueError, match="item line 1: column 3 must be 'release_year:token', got 'year:token'"):
        datasets.load("ml-100k", tmp_path)
    path.write_bytes(good.replace(b"Usual", b"Us\xffal"))
    with pytest.raises(ValueError, match="ml-100k.item line 2: not UTF-8"):
        datasets.load("ml-100k", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="ml-100k.item line 1"):
        datasets.load("ml-100k", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="ml-100k.item"):
        datasets.load("ml-100k", tmp_path)
    with pytest.raises(ValueError, match="choose one of ml-100k"):
        datasets.load("ml-1m", tmp_path)


@given(st.text(alphabet=st.one_of(st.sampled_from("<|>/s \n\x00\u202eab"), st.characters())))
def test_sanitised_text_is_plain_and_stable(text):
    plain = datasets.sanitise_text(text)
    assert not re.search(r"<\||\|>|</?s>|[\x00-\x1f\x7f-\x9f\u2028\u202e]", plain)
    assert plain == plain.strip() and "  " not in plain
    assert datasets.sanitise_text(plain) == plain


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
    assert datasets.sanitise_text(text) == plain


def test_split_by_hand():
    rows = [(1, 5, 3), (0, 1, 3), (1, 6, 1), (0, 2, 3), (0, 3, 1), (1, 7, 1), (0, 4, 9)]  # user, item, time; unsorted
    split = datasets.split_leave_one_out(pd.DataFrame(rows, columns=["user", "item", "time"]), 2)
    assert [s.tolist() for s in split.train] == [[3, 1], [6]]
    assert split.valid.tolist() == [2, 7] and split.test.tolist() == [4, 5]
    assert [s.tolist() for s in split.with_valid] == [[3, 1, 2], [6, 7]]


def test_split_refuses_short_users():
    rows = pd.DataFrame({"user": [0, 0, 0, 1, 1], "item": [1, 2, 3, 1, 2], "time": range(5)})
    with pytest.raises(ValueError, match=r"2 of 3 users have fewer than 3 events \(first: user 1\)"):
        datasets.split_leave_one_out(rows, 3)
    with pytest.raises(ValueError, match="out of range"):
        datasets.split_leave_one_out(rows, 1)


def test_split_users():
    ppo, held_out = datasets.split_users(943, 0.6, seed=3)
    assert len(ppo) == 566 and sorted([*ppo, *held_out]) == list(range(943))
    assert (np.diff(ppo) > 0).all() and (np.diff(held_out) > 0).all()
    again, _ = datasets.split_users(943, 0.6, seed=3)
    other, _ = datasets.split_users(943, 0.6, seed=4)
    assert (ppo == again).all() and (ppo != other).any()
    with pytest.raises(ValueError, match="leaves one side empty"):
        datasets.split_users(3, 0.1, seed=0)
