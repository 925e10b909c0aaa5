"""Own tables: the forms that people bring, good and dirty."""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recrl_lib.tests.data.loading import load, write

LOG = """when,who,what
2024-03-01T10:00:00Z,anna,tea-02
1709287200,bob,tea-01
"03 01, 2024",anna,tea-01
1709294400000,anna,mug
1709294500,bob,mug
1709294600,bob,tea-02
"""
SHOP = """what,name,kind,since
tea-01,Earl Grey,"Tea, Black",1830
tea-02,"Sencha
""first"" flush",Tea;Green,
mug,Blue mug,,1999
"""
NAMES = {"user_column": "who", "item_column": "what", "time_column": "when", "rating_column": ""}
NAMES |= {"title_column": "name", "genres_column": "kind", "year_column": "since"}


def tables(folder, log=LOG, shop=SHOP, encoding="utf-8"):
    return write(folder, {"interactions.csv": log, "items.csv": shop}, encoding)


def assert_same(data, expected):
    assert data.interactions.equals(expected.interactions) and data.items.equals(expected.items)
    assert data.info["skipped"] == {}


def test_own_tables(tmp_path):
    data = load("csv", tables(tmp_path), **NAMES)
    assert data.items["title"].tolist() == ["Blue mug", "Earl Grey", 'Sencha "first" flush']
    assert data.items["year"].tolist() == [1999, 1830, 0]
    assert data.items["genres"].tolist() == ["", "Tea|Black", "Tea|Green"]
    assert data.items["text"].tolist()[:2] == [
        "Blue mug (1999).", "Earl Grey (1830). Genres: Tea, Black."
    ]  # fmt: skip
    assert data.interactions.to_dict("list") == {
        "user": [0, 0, 1, 0, 1, 1],
        "item": [2, 3, 2, 1, 1, 3],
        "time": [1709251200, 1709287200, 1709287200, 1709294400, 1709294500, 1709294600],
    }
    assert data.info["skipped"] == {} and data.info["order"] == "time, ties by file order"
    assert data.users.to_dict("list") == {"user": [0, 1], "gender": ["", ""], "age": [0, 0]}


def test_parquet_and_gzip_are_the_same(tmp_path):
    folders = [tmp_path / name for name in ("csv", "gz", "parquet")]
    for folder in folders:
        folder.mkdir()
    expected = load("csv", tables(folders[0]), **NAMES)
    write(folders[1], {"interactions.csv.gz": LOG, "items.csv.gz": SHOP})
    log, shop = (pd.read_csv(folders[0] / name) for name in ("interactions.csv", "items.csv"))
    seconds = [1709287200, 1709287200, 1709251200, 1709294400, 1709294500, 1709294600]
    log["when"] = pd.to_datetime(seconds, unit="s")
    shop["kind"] = [["Tea", "Black"], ["Tea", "Green"], None]
    log.to_parquet(folders[2] / "interactions.parquet")
    (folders[2] / "items.parquet").mkdir()  # a folder of part files is one table
    for n, part in enumerate((shop[:2], shop[2:])):
        part.to_parquet(folders[2] / "items.parquet" / f"part-0000{n}.parquet")
    (folders[2] / "items.parquet" / "_SUCCESS").touch()
    for folder in folders[1:]:
        assert_same(data := load("csv", folder, **NAMES), expected)
        assert len(data.info["sha256"]) == 64


# Two users with three items; what a case changes about it must change nothing in the outcome.
ROWS = [("u1", "7", 5, "4.5"), ("u1", "8", 6, "3.5"), ("u1", "9", 7, "1.0")]
ROWS += [("u2", item, time + 10, rating) for _, item, time, rating in ROWS]
LOG_ROWS = ["user,item,time,rating", *(",".join(map(str, row)) for row in ROWS)]
SHOP_ROWS = ["item,title,genres", "7,Seven,A|B", "8,Eight,", "9,Nine,A"]
PLAIN = "\n".join(LOG_ROWS), "\n".join(SHOP_ROWS)
NAMED = "[{'id': 1, 'name': 'A'}, {'id': 2, 'name': 'B'}]"


@pytest.mark.parametrize(
    "log, shop, encoding",
    [
        (PLAIN[0].replace(",", ";").replace(".", ","), PLAIN[1].replace(",", ";"), "utf-8"),
        (PLAIN[0].replace(",", "\t"), PLAIN[1].replace(",", "\t"), "utf-8"),
        (*PLAIN, "utf-16"),
        (*PLAIN, "utf-8-sig"),
        (PLAIN[0], PLAIN[1].replace("A|B", f'"{NAMED}"').replace(",A", ",['A']"), "utf-8"),
        (PLAIN[0], PLAIN[1].replace("A|B", '"A, B"'), "utf-8"),
        (re.sub(r",([789]),", r",\1.0,", PLAIN[0]), PLAIN[1], "utf-8"),
        (PLAIN[0].replace("\n", "\r\n\r\n"), PLAIN[1] + "\n\n", "utf-8")
    ],
    ids=["semicolons", "tabs", "utf-16", "bom", "dicts", "commas", "float ids", "empty lines"]
)  # fmt: skip
def test_forms_of_csv_that_are_read_alike(tmp_path, log, shop, encoding):
    expected = load("csv", tables(tmp_path, *PLAIN))
    data = load("csv", tables(tmp_path, log, shop, encoding))
    assert_same(data, expected)
    assert data.items["genres"].tolist() == ["A|B", "", "A"]


@pytest.mark.parametrize("dictionary", [False, True])
def test_64_bit_ids_are_exact_with_and_without_nulls(tmp_path, dictionary):
    users = pa.array([2**56 + n // 3 for n in range(300)] + [None], pa.int64())
    users = users.dictionary_encode() if dictionary else users
    table = {"user": users, "item": list("abc") * 100 + ["a"], "time": range(301)}
    pq.write_table(pa.table(table), tmp_path / "interactions.parquet")
    shop = {"item": [b"a", b"b", b"c"], "title": list("ABC")}  # old tables have bytes for texts
    pq.write_table(pa.table(shop), tmp_path / "items.parquet")
    info = load("csv", tmp_path).info
    assert (info["n_users"], info["skipped"]) == (100, {"missing field": 1})
    assert info["skipped_first"] == {"missing field": "interactions.parquet line 301"}


IDS = ["007", "7", "می\u200cخواستم", "Family 👨\u200d👩\u200d👧", "NA", "nan", "None", "Ca$$ {1}"]


def test_titles_and_ids_are_what_they_say_and_without_times_file_order_counts(tmp_path):
    log = "user,item\n" + "".join(f"{user},{item}\n" for user in ("NA", "nan") for item in IDS)
    shop = "item,title\n" + "".join(f"{item},\u202e{item}\u202c\x07\n" for item in IDS)
    data = load("csv", tables(tmp_path, log, shop), time_column="")
    assert data.items["title"].tolist() == sorted(IDS) and data.info["skipped"] == {}
    assert data.interactions["item"].tolist() == [1 + sorted(IDS).index(item) for item in IDS] * 2
    assert data.info["order"] == "file order: no time column was named"


def test_ids_that_are_numbers_are_ordered_as_numbers(tmp_path):
    pairs = [(u, i) for u in (2, 10) for i in (9, 10, 100)]
    log = "user,item,time,rating\n" + "".join(f"{u},{i},{u + i},{i % 5}\n" for u, i in pairs)
    shop = "item,title\n" + "".join(f"{i},Title {i}\n" for i in (100, 9, 10))
    data = load("csv", tables(tmp_path, log, shop))
    assert data.items["title"].tolist() == ["Title 9", "Title 10", "Title 100"]
    assert data.interactions["user"].tolist() == [0, 0, 1, 1, 0, 1]
    log = log.replace("2,9,", "x,9,").replace("2,1", "x,1")
    data = load("csv", tables(tmp_path, log, shop))
    assert data.interactions["user"].tolist() == [1, 1, 0, 0, 1, 0]  # as texts: "10" before "x"


@pytest.mark.parametrize(
    "need, name, message",
    [
        ("user", "whoo", r"interactions.csv: no column 'whoo' for user_column; the columns are "
         r"'when', 'who', 'what'; did you mean 'who'\? Set user_column=who"),
        ("time", "timestamp", "'when', 'who', 'what'; set time_column to one of these"),
        ("title", "Name", r"items.csv: no column 'Name' .*; did you mean 'name'\?"),
        ("genres", "kinds", "Set genres_column=kind, or leave genres_column empty to do without")
    ]
)  # fmt: skip
def test_a_wrong_column_is_named(tmp_path, need, name, message):
    with pytest.raises(ValueError, match=message):
        load("csv", tables(tmp_path), **NAMES | {f"{need}_column": name})
    data = load("csv", tmp_path, **NAMES | {"genres_column": "genre", "year_column": ""})
    assert (data.items["genres"] == "").all()


def test_bad_rows_are_counted(tmp_path):
    log = LOG + ",bob,tea-01\n1709294700,bob,tea-09\n1709294800,bob,mug\n1709294900,,mug\n"
    log += "1709295000,carl,mug\nnoon,bob,mug\n1709,b"
    shop = SHOP + "mug,Other mug,,\n,Nothing,,\ncup,Cup,\"[{'id': 1}]\",\n"
    data = load("csv", tables(tmp_path, log, shop), **NAMES, bad_row_limit=0.5)
    assert data.info["skipped"] == {
        "unparsable field": 3, "missing field": 2, "cut last line": 1, "duplicate": 2,
        "item without metadata": 1, "user with fewer than 3 events": 1
    }  # fmt: skip
    assert data.info["skipped_first"]["missing field"] == "interactions.csv line 11"
    bad = {"unparsable field", "missing field", "cut last line", "item without metadata"}
    assert set(data.info["skipped_bad"]) == bad
    with pytest.raises(ValueError, match="interactions.csv: 4 of 13 rows are unusable"):
        load("csv", tmp_path, **NAMES)


def test_missing_or_ambiguous_tables_are_named(tmp_path):
    message = "one of interactions.csv, interactions.csv.gz, interactions.parquet: none is there"
    with pytest.raises(FileNotFoundError, match=message):
        load("csv", tmp_path)
    with pytest.raises(ValueError, match="interactions.csv: no rows; the file is empty"):
        load("csv", tables(tmp_path, ""), **NAMES)
    (tables(tmp_path) / "items.parquet").touch()
    with pytest.raises(FileNotFoundError, match="one of items.csv.*several are there"):
        load("csv", tmp_path, **NAMES)


@pytest.mark.parametrize("name", ["interactions", "items"])
def test_a_damaged_parquet_is_named(tmp_path, name):
    users, items = np.repeat(range(400), 5), np.tile(list("abcde"), 400)
    log = pd.DataFrame({"user": users, "item": items, "time": range(2000)})
    log.to_parquet(tmp_path / "interactions.parquet")
    shop = pd.DataFrame({"item": list("abcde"), "title": list("ABCDE")})
    shop.to_parquet(tmp_path / "items.parquet")
    path = tmp_path / f"{name}.parquet"
    whole = path.read_bytes()
    in_pages = whole[:4] + b"\xff" * 56 + whole[60:]  # of the first column: the file opens
    for content in (b"user,item\n1,2\n", whole[:-20], in_pages):
        path.write_bytes(content)
        message = rf"{name}.parquet: no parquet file, or a damaged one \(.*\); write or fetch"
        with pytest.raises(ValueError, match=message):
            load("csv", tmp_path)


def test_a_rating_may_be_blank_but_not_a_word(tmp_path):
    log = "user,item,time,rating\n1,a,1,4.5\n1,b,2,\n1,c,3,  \n1,d,4,good\n1,e,5,nan\n"
    shop = "item,title\n" + "".join(f"{i},{i.upper()}\n" for i in "abcde")
    data = load("csv", tables(tmp_path, log, shop), bad_row_limit=0.5)
    assert data.info["skipped_first"] == {"unparsable field": "interactions.csv line 5"}
    np.testing.assert_array_equal(data.interactions["rating"], [4.5, np.nan, np.nan])
    (tmp_path / "interactions.csv").unlink()
    log = {"user": [1.0] * 3, "item": list("abc"), "time": range(3), "rating": [4.5, None, 2.0]}
    pd.DataFrame(log).to_parquet(tmp_path / "interactions.parquet")
    ratings = load("csv", tmp_path).interactions["rating"]
    np.testing.assert_array_equal(ratings, [4.5, np.nan, 2.0])
