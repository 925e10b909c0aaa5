"""MovieLens and Steam: the exact formats, in lines as the real files have them."""

from typing import get_args

import numpy as np
import pytest

from recrl_lib.data import FORMATS, assets, folder_of, movielens, splits
from recrl_lib.params import Dataset
from recrl_lib.runs import sha256_file
from recrl_lib.tests.data.loading import load, write

ITEMS = [
    "10\tUsual Suspects, The\t1995\tCrime Thriller",
    "2\tunkonwn\tunkonwn\tunknown",
    '7\tSay "Hi"\u2028<|im_end|>\t\tChildren\'s Film-Noir Sci-Fi',
    "9\tLand Before Time III (1995)\tV\tAnimation",
]
USERS = ["30\t24\tM\ttechnician\t85711", "4\t\t\t\t"]
RATINGS = [
    *("30\t10\t3\t881250949", "4\t2\t5\t881250948", "30\t2\t1\t881250949"),
    *("4\t10\t4\t5", "30\t7\t2.5\t881250948", "4\t7\t1\t881250947"),
]


def atomic(folder, ratings=RATINGS, users=USERS, end="\n"):
    """MovieLens 100K as RecBole writes it."""
    tables = zip(movielens.HEADERS.items(), (ratings, ITEMS, users))
    files = {name: [header.replace(" ", "\t"), *rows] for (name, header), rows in tables}
    return write(folder, {n: "".join(line + end for line in rows) for n, rows in files.items()})


def many(n=120):
    """n good ratings by n / 3 users who exist."""
    users = [f"{u}\t1\tF\t\t" for u in range(n)]
    return [f"{r // 3}\t{(10, 2, 7)[r % 3]}\t4\t{1000 + r}" for r in range(n)], users


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_ml_100k_by_hand(tmp_path, end):
    data = load("ml-100k", atomic(tmp_path, end=end), min_core=0)
    assert data.items.to_dict("list") == {
        "item": [1, 2, 3, 4],
        "title": ["Unknown", 'Say "Hi"', "Land Before Time III", "The Usual Suspects"],
        "year": [0, 0, 1995, 1995],
        "genres": ["", "Children's|Film-Noir|Sci-Fi", "Animation", "Crime|Thriller"],
        "text": [
            "Unknown.",
            'Say "Hi". Genres: Children\'s, Film-Noir, Sci-Fi.',
            "Land Before Time III (1995). Genres: Animation.",
            "The Usual Suspects (1995). Genres: Crime, Thriller.",
        ],
    }
    assert data.users.to_dict("list") == {"user": [0, 1], "gender": ["", "M"], "age": [0, 24]}
    # by time, ties by line: user and item are numbered by raw id
    assert data.interactions.to_dict("list") == {
        "user": [0, 0, 0, 1, 1, 1],
        "item": [4, 2, 1, 2, 4, 1],
        "time": [5, 881250947, 881250948, 881250948, 881250949, 881250949],
        "rating": [4.0, 1.0, 5.0, 2.5, 3.0, 1.0],
    }
    sizes = {"n_users": 2, "n_items": 4, "n_interactions": 6, "skipped": {}, "skipped_first": {}}
    assert sizes.items() <= data.info.items()
    assert data.info["sha256"] == sha256_file(tmp_path / "ml-100k.inter")


def test_times_do_not_pass_through_float32_and_ties_keep_the_order_of_the_file(tmp_path):
    times = {10: 881250950, 2: 881250949, 7: 881250900}  # the first two equal as float32
    ratings = [f"30\t{item}\t3\t{time}" for item, time in times.items()]
    data = load("ml-100k", atomic(tmp_path, ratings))
    assert data.interactions["time"].tolist() == sorted(times.values())
    order = np.random.default_rng(0).permutation(500)
    ratings = [f"{u}\t{item}\t4\t{7 - u % 2}" for item in (10, 2, 7) for u in order]
    data = load("ml-100k", atomic(tmp_path, ratings, many(500)[1]))
    odd, even = order[order % 2 == 1], order[order % 2 == 0]
    assert data.interactions["user"].tolist() == [*odd] * 3 + [*even] * 3


def test_bad_rows_are_counted_and_skipped(tmp_path):
    ratings, users = many()
    bad = ["30\t10\t3", "30\t10\tnan\t5", f"30\t10\t3\t{2**63}", "30\t99\t3\t5", "4\t10\t1\t7"]
    ratings[50:50] = bad
    ratings += ["4\t10\t1\t70"]  # cut, if its time lost digits
    path = atomic(tmp_path, ratings, users) / "ml-100k.inter"
    path.write_bytes(path.read_bytes()[:-2])
    with open(tmp_path / "ml-100k.item", "ab") as items:
        items.write(b"\tNo id\t\t\n")
    data = load("ml-100k", tmp_path, bad_row_limit=0.5)
    lines = {
        "wrong number of fields": 52, "unparsable field": 53, "item without metadata": 55,
        "duplicate": 56, "cut last line": 127,
    }  # fmt: skip
    first = {kind: f"ml-100k.inter line {n}" for kind, n in lines.items()}
    first |= {"missing field": "ml-100k.item line 6"}
    assert data.info["skipped"] == dict.fromkeys(first, 1) | {"unparsable field": 2}
    assert data.info["skipped_first"] == first and set(data.info["skipped_bad"]) == set(first)
    assert data.info["n_interactions"] == 120
    first = data.interactions.query("user == 4 and item == 4")  # raw item 10 is the fourth
    assert first[["time", "rating"]].to_numpy().tolist() == [[1012, 4]]  # not the duplicate


# The same films, people and ratings as their origin writes them.
ORIGIN = {
    "u.data": "".join(row.replace("2.5", "2") + "\n" for row in RATINGS),
    "u.item": "2|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "7|L\u00e9on: Der Profi (V)|01-Jan-1995||http://x/M?%20(1995)"
    "|0|1|0|0|1|0|0|0|0|0|1|0|0|0|0|0|0|0|0\n"
    "10|Usual Suspects, The (1995)|14-Aug-1995||http://x/M?The%20(1995)"
    "|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|1|0|0\n",
    "u.user": "30|24|M|technician|85711\n4|53|F|other|94043\n",
}


def test_ml_100k_of_its_origin(tmp_path):
    data = load("ml-100k", write(tmp_path, ORIGIN, "latin-1"))
    titles = ["Unknown", "L\u00e9on: Der Profi (V)", "The Usual Suspects"]
    assert data.items["title"].tolist() == titles and data.items["year"].tolist() == [0, 0, 1995]
    assert data.items["genres"].tolist() == ["", "Action|Children's|Film-Noir", "Crime|Thriller"]
    assert data.users.to_dict("list") == {"user": [0, 1], "gender": ["F", "M"], "age": [53, 24]}
    assert data.interactions["item"].tolist() == [3, 2, 1, 2, 3, 1]
    assert data.interactions["rating"].tolist() == [4.0, 1.0, 5.0, 2.0, 3.0, 1.0]
    assert data.info["source"] == "MovieLens 100K, GroupLens" and data.info["skipped"] == {}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("user", (b"4\t\t\t\t\n", b""), "line 3: user_id 4 has no row in ml-100k.user"),
        ("item", (b"release_year:", b"y:"), "item line 1: the columns must be item_id"),
        ("item", (b"Usual", b"Us\xffal"), r"1 x not UTF-8 \(first: ml-100k.item line 2\)"),
        ("user", (b"30\t24", b"30"), r"1 x wrong number of fields \(first: ml-100k.user line 2\)"),
    ],
)
def test_broken_files_are_named(tmp_path, name, change, message):
    path = atomic(tmp_path) / f"ml-100k.{name}"
    path.write_bytes(path.read_bytes().replace(*change))
    with pytest.raises(ValueError, match=message):
        load("ml-100k", tmp_path)


@pytest.mark.parametrize(
    "text, title, year",
    [
        ("Blue Angel, The (Blaue Engel, Der)", "The Blue Angel (Der Blaue Engel)", 0),
        ("Fille seule, La (A Single Girl) (1995)", "La Fille seule (A Single Girl)", 1995),
        ("Enfer, L'", "L'Enfer", 0),
        ("Affair to Remember, An", "An Affair to Remember", 0),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly", 0),
        ("Mrs. Brown (Her Majesty, Mrs. Brown)", "Mrs. Brown (Her Majesty, Mrs. Brown)", 0),
        ("Cook the Thief, Theodore", "Cook the Thief, Theodore", 0),
        ("Land Before Time III (1995) (V)", "Land Before Time III", 1995),
        ("1984 (Nineteen Eighty-Four) (1984)", "1984 (Nineteen Eighty-Four)", 1984),
    ],
)
def test_title_and_year(text, title, year):
    assert movielens.title_and_year(text) == (title, year)


# MovieLens 25M, 32M, latest-small: CRLF, titles quoted where they hold a comma or a quote.
ML_RATINGS = """userId,movieId,rating,timestamp
1,296,5.0,1147880044
1,306,3.5,1147868817
1,307,5.0,1147868828
2,306,4.0,1141415820
2,296,3.0,1141415820
2,150000,0.5,1141415830
2,307,4.5,1141415790
"""
MOVIES = """movieId,title,genres
296,Pulp Fiction (1994),Comedy|Crime|Drama|Thriller
306,"Three Colors: Red (Trois couleurs: Rouge) (1994)",Drama
307,"Fantastic ""Four"", The (2005)",Action|Adventure|Sci-Fi
150000,"Cos
mos<|im_end|>, ""again""\",(no genres listed)
"""


def test_movielens(tmp_path):
    files = {"ratings.csv": ML_RATINGS, "movies.csv": MOVIES}
    write(tmp_path, {name: text.replace("\n", "\r\n") for name, text in files.items()})
    data = load("ml-25m", tmp_path)
    assert data.items["text"].tolist() == [
        "Pulp Fiction (1994). Genres: Comedy, Crime, Drama, Thriller.",
        "Three Colors: Red (Trois couleurs: Rouge) (1994). Genres: Drama.",
        'The Fantastic "Four" (2005). Genres: Action, Adventure, Sci-Fi.',
        'Cos mos, "again".',
    ]
    assert data.interactions["item"].tolist() == [3, 2, 1, 4, 2, 3, 1]
    assert data.interactions["time"].tolist()[::6] == [1141415790, 1147880044]
    assert data.interactions["rating"].tolist() == [4.5, 4.0, 3.0, 0.5, 3.5, 5.0, 5.0]
    named = {"skipped": {}, "noun": "film", "name": "ml-25m", "n_items": 4}
    assert named.items() <= data.info.items()
    assert load("ml-25m", tmp_path, min_core=2).info["n_items"] == 3


STEAM = """151603712,"The Elder Scrolls V Skyrim",purchase,1.0,0
151603712,"The Elder Scrolls V Skyrim",play,273.0,0
151603712,"Fallout 4",purchase,1.0,0
151603712,"Fallout 4",play,87.0,0
151603712,"Spore",purchase,1.0,0
59945701,"Warhammer 40,000 Dawn of War II",purchase,1.0,0
59945701,"Spore",purchase,1.0,0
59945701,"Fallout 4",purchase,1.0,0
59945701,"Fallout 4",play,0.4,0
59945701,"Fallout 4",purchase,1.0,0
"""


def test_steam(tmp_path):
    data = load("steam-200k", write(tmp_path, {"steam-200k.csv": STEAM}))
    titles = "Fallout 4|Spore|The Elder Scrolls V Skyrim|Warhammer 40,000 Dawn of War II"
    assert "|".join(data.items["title"]) == titles
    assert data.interactions.to_dict("list") == {
        "user": [1, 1, 1, 0, 0, 0], "item": [3, 1, 2, 4, 2, 1], "time": [0, 1, 2, 3, 4, 5],
        "rating": [273.0, 87.0, 0.0, 0.0, 0.0, 0.4]
    }  # fmt: skip
    assert data.info["skipped"] == {"duplicate": 1} and data.info["skipped_bad"] == []
    assert data.info["skipped_first"] == {"duplicate": "steam-200k.csv line 10"}
    assert data.info["order"] == "file order: the data set has no times"
    assert splits.split(data.interactions, 2, "leave-one-out").test.tolist() == [1, 2]


def test_steam_with_bad_rows(tmp_path):
    bad = '9,"Spore",rent,1.0,0\n9,"Spore",purchase\n9,,purchase,1.0,0\nx,"Spore",play,1.0,0\n'
    write(tmp_path, {"steam-200k.csv": STEAM + bad})
    message = r"steam-200k.csv: 4 of 14 rows .* 2 x unparsable field \(first: .* line 11\)"
    with pytest.raises(ValueError, match=message):
        load("steam-200k", tmp_path)
    data = load("steam-200k", tmp_path, bad_row_limit=0.3)
    assert data.info["skipped"] == {
        "wrong number of fields": 1, "unparsable field": 2, "missing field": 1, "duplicate": 1
    }  # fmt: skip


def test_every_data_set_has_a_reader_and_a_place_where_its_files_are_looked_for(tmp_path):
    assert set(FORMATS) == set(get_args(Dataset)) and set(assets.ORIGINS) < set(FORMATS)
    assert folder_of("csv", str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="data_dir='nowhere/at/all'.* is no folder"):
        folder_of("ml-25m", "nowhere/at/all")
    message = "steam-200k.csv: make all DATASET=steam-200k DATA_DIR=path"
    with pytest.raises(ValueError, match=message):
        folder_of("steam-200k")
