import numpy as np
import pytest

from recrl_lib.data import folder_of, load, load_for, ml100k
from recrl_lib.params import Params
from recrl_lib.runs import sha256_file

ITEMS = [
    "10\tUsual Suspects, The\t1995\tCrime Thriller",
    "2\tunkonwn\tunkonwn\tunknown",
    '7\tSay "Hi"\u2028<|im_end|>\t\tChildren\'s Film-Noir Sci-Fi',
    "9\tLand Before Time III (1995)\tV\tAnimation",
]
USERS = ["30\t24\tM\ttechnician\t85711", "4\t\t\t\t"]
RATINGS = [
    "30\t10\t3\t881250949",
    "4\t2\t5\t881250948",
    "30\t2\t1\t881250949",
    "4\t10\t4\t5",
    "30\t7\t2.5\t881250948",
    "4\t7\t1\t881250947",
]


def write(folder, ratings=RATINGS, items=ITEMS, users=USERS, end="\n"):
    for name, rows in (
        ("ml-100k.inter", ratings),
        ("ml-100k.item", items),
        ("ml-100k.user", users),
    ):
        lines = [ml100k.HEADERS[name].replace(" ", "\t"), *rows]
        (folder / name).write_bytes(("\n".join(lines) + end).encode())
    return folder


def test_item_texts_in_capitals_and_nothing_else(tmp_path):
    plain, upper = (
        load("ml-100k", write(tmp_path), item_case=case).items for case in ("plain", "upper")
    )
    assert upper["text"].tolist()[3] == "THE USUAL SUSPECTS (1995). GENRES: CRIME, THRILLER."
    assert (
        upper["text"].tolist() == [text.upper() for text in plain["text"]] != plain["text"].tolist()
    )
    assert upper.drop(columns="text").equals(plain.drop(columns="text"))


def many(n):
    """n good ratings by n / 3 users who exist."""
    users = [f"{u}\t1\tF\t\t" for u in range(n)]
    return [f"{r // 3}\t{(10, 2, 7)[r % 3]}\t4\t{1000 + r}" for r in range(n)], users


def test_tables_by_hand(tmp_path):
    data = load("ml-100k", write(tmp_path))
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
    assert [str(data.interactions[c].dtype) for c in ("user", "item", "time")] == ["int64"] * 3
    assert data.info["skipped"] == {} and data.info["skipped_first"] == {}
    assert (data.info["n_users"], data.info["n_items"], data.info["n_interactions"]) == (2, 4, 6)
    assert (
        data.info["sha256"] == sha256_file(tmp_path / "ml-100k.inter")
        and len(data.info["sha256"]) == 64
    )


def test_times_do_not_pass_through_float32(tmp_path):
    ratings = [
        "30\t10\t3\t881250950",
        "30\t2\t3\t881250949",
        "30\t7\t3\t881250900",
    ]  # the first two equal as float32
    assert np.float32(881250950) == np.float32(881250949)
    data = load("ml-100k", write(tmp_path, ratings))
    assert data.interactions["time"].tolist() == [881250900, 881250949, 881250950]


def test_ties_in_time_keep_the_order_of_the_file(tmp_path):
    order = np.random.default_rng(0).permutation(500)
    ratings = [
        f"{u}\t{item}\t4\t{7 - u % 2}" for item in (10, 2, 7) for u in order
    ]  # odd users first, all at once
    users = [f"{u}\t1\tF\t\t" for u in range(500)]
    data = load("ml-100k", write(tmp_path, ratings, users=users))
    assert (
        data.interactions["user"].tolist()
        == [*order[order % 2 == 1]] * 3 + [*order[order % 2 == 0]] * 3
    )


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
        ("30\t99\t3\t5", "item without metadata"),
        ("4\t10\t1\t7", "duplicate"),
    ],
)
def test_bad_rows_are_counted_and_skipped(tmp_path, row, kind):
    ratings, users = many(120)
    ratings.insert(50, row)
    data = load("ml-100k", write(tmp_path, ratings, users=users))
    assert data.info["skipped"] == {kind: 1} and data.info["skipped_bad"] == [kind]
    assert data.info["skipped_first"] == {kind: "ml-100k.inter line 52"}
    assert data.info["n_interactions"] == 120


def test_the_first_of_a_duplicate_is_kept(tmp_path):
    ratings, users = many(120)
    data = load("ml-100k", write(tmp_path, [*ratings, "4\t10\t1\t7"], users=users))
    assert data.info["skipped_first"] == {"duplicate": "ml-100k.inter line 122"}
    first = data.interactions.query("user == 4 and item == 4")  # raw item 10 is the fourth
    assert first[["time", "rating"]].to_numpy().tolist() == [[1012, 4]]


def test_a_last_line_without_newline_is_not_trusted(tmp_path):
    ratings, users = many(120)
    write(tmp_path, ratings, users=users)
    path = tmp_path / "ml-100k.inter"
    path.write_bytes(path.read_bytes()[:-3])  # the time lost two digits, and would still parse
    data = load("ml-100k", tmp_path)
    assert data.info["skipped"] == {
        "cut last line": 1,
        "user with fewer than 3 events": 1,
    }  # who lost the third
    assert data.info["skipped_bad"] == ["cut last line"] and data.interactions["time"].min() == 1000


def test_too_many_bad_rows_stop_the_run(tmp_path):
    ratings, users = many(98)
    counted = r"ml-100k.inter: 2 of 100 .*bad_row_limit=0.01.* 2 x unparsable field \(first: ml-100k.inter line 100\)"
    with pytest.raises(ValueError, match=counted):
        load("ml-100k", write(tmp_path, [*ratings, *["1\t10\t?\t1"] * 2], users=users))
    data = load("ml-100k", tmp_path, bad_row_limit=0.02)
    assert data.info["skipped"] == {
        "unparsable field": 2,
        "user with fewer than 3 events": 1,
    }  # 98 ratings: the last user has two
    assert data.info["skipped_bad"] == ["unparsable field"]


def test_windows_line_ends_are_read(tmp_path):
    write(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load("ml-100k", tmp_path).info["n_interactions"] == 6


# The same three films, two people and six ratings as their origin writes them.
ORIGIN = {
    "u.data": "30\t10\t3\t881250949\n4\t2\t5\t881250948\n30\t2\t1\t881250949\n4\t10\t4\t5\n30\t7\t2\t881250948\n4\t7\t1\t881250947\n",
    "u.item": (
        "2|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "7|L\u00e9on: Der Profi (V)|01-Jan-1995||http://us.imdb.com/M/title-exact?x%20(1995)|0|1|0|0|1|0|0|0|0|0|1|0|0|0|0|0|0|0|0\n"
        "10|Usual Suspects, The (1995)|14-Aug-1995||http://us.imdb.com/M/title-exact?Usual%20Suspects,%20The%20(1995)"
        "|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|1|0|0\n"
    ),
    "u.user": "30|24|M|technician|85711\n4|53|F|other|94043\n",
}


def write_origin(folder, **changed):
    for name, text in (ORIGIN | changed).items():
        (folder / name).write_bytes(text.encode("latin-1"))
    return folder


def test_the_form_of_the_origin(tmp_path):
    data = load("ml-100k", write_origin(tmp_path))
    assert data.items["title"].tolist() == [
        "Unknown",
        "L\u00e9on: Der Profi (V)",
        "The Usual Suspects",
    ]
    assert data.items["year"].tolist() == [0, 0, 1995]
    assert data.items["genres"].tolist() == ["", "Action|Children's|Film-Noir", "Crime|Thriller"]
    assert data.users.to_dict("list") == {"user": [0, 1], "gender": ["F", "M"], "age": [53, 24]}
    assert data.interactions.to_dict("list") == {
        "user": [0, 0, 0, 1, 1, 1],
        "item": [3, 2, 1, 2, 3, 1],
        "time": [5, 881250947, 881250948, 881250948, 881250949, 881250949],
        "rating": [4.0, 1.0, 5.0, 2.0, 3.0, 1.0],
    }
    assert data.info["source"] == "MovieLens 100K, GroupLens" and data.info["skipped"] == {}


def test_bad_rows_of_the_origin_are_counted(tmp_path):
    folder = write_origin(
        tmp_path, **{"u.item": ORIGIN["u.item"].replace("Usual Suspects, The", "Usual|Suspects")}
    )
    with pytest.raises(
        ValueError,
        match=r"u.item: 1 of 3 rows .* 1 x wrong number of fields \(first: u.item line 3\)",
    ):
        load("ml-100k", folder)
    folder = write_origin(tmp_path, **{"u.data": ORIGIN["u.data"][:-2]})
    with pytest.raises(
        ValueError, match=r"u.data: 1 of 6 .* cut last line \(first: u.data line 6\)"
    ):
        load("ml-100k", folder)
    with pytest.raises(ValueError, match="u.data: no rows; the file is empty"):
        load("ml-100k", write_origin(tmp_path, **{"u.data": ""}))


@pytest.mark.parametrize(
    "text, title, year",
    [
        (
            "Land Before Time III: The Time of the Great Giving (1995) (V)",
            "Land Before Time III: The Time of the Great Giving",
            1995,
        ),
        ("Misérables, Les (1995)", "Les Misérables", 1995),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968),
        ("Brazil", "Brazil", 0),
        ("1984 (Nineteen Eighty-Four) (1984)", "1984 (Nineteen Eighty-Four)", 1984),
    ],
)
def test_title_and_year(text, title, year):
    assert ml100k.title_and_year(text) == (title, year)


def test_where_the_files_are_looked_for(tmp_path):
    assert folder_of("csv", str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="data_dir='nowhere/at/all'.* is no folder"):
        folder_of("ml-25m", "nowhere/at/all")
    with pytest.raises(
        ValueError, match="steam-200k.csv, for example make all DATASET=steam-200k DATA_DIR=path"
    ):
        folder_of("steam-200k")


def test_the_parameters_reach_the_loader(tmp_path):
    params = Params(data_dir=str(write(tmp_path)), min_core=4)
    with pytest.raises(
        ValueError, match=r"no interaction is left after the filters \(min_core=4\)"
    ):
        load_for(params)
    assert load_for(Params(data_dir=str(tmp_path), min_core=2)).info["min_core"] == 2
    assert (
        load_for(Params(data_dir=str(tmp_path), item_case="upper"))
        .items["text"]
        .str.isupper()
        .all()
    )


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="user_id 4 has no row in ml-100k.user"):
        load("ml-100k", write(tmp_path, users=USERS[:1]))
    write(tmp_path)
    path = tmp_path / "ml-100k.item"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"release_year:token", b"year:token"))
    with pytest.raises(
        ValueError, match="item line 1: column 3 must be 'release_year:token', got 'year:token'"
    ):
        load("ml-100k", tmp_path)
    path.write_bytes(good.replace(b"Usual", b"Us\xffal"))
    with pytest.raises(ValueError, match=r"1 x not UTF-8 \(first: ml-100k.item line 2\)"):
        load("ml-100k", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="ml-100k.item line 1"):
        load("ml-100k", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="ml-100k.item"):
        load("ml-100k", tmp_path)
    with pytest.raises(ValueError, match="choose one of ml-100k, ml-25m"):
        load("ml-1m", tmp_path)
