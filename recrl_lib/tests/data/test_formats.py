"""MovieLens CSV, Steam and own tables: the exact formats, in lines as the real files have them."""

import gzip

import numpy as np
import pandas as pd
import pytest

from recrl_lib.data import load, load_for, splits
from recrl_lib.explainer import prompts
from recrl_lib.params import Params
from recrl_lib.scoring.composed import reference_line

# --- MovieLens 25M, 32M, latest-small: CRLF, titles quoted where they hold a comma or a quote -------------

RATINGS = """userId,movieId,rating,timestamp
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
150000,Cosmos,(no genres listed)
"""


def movielens(folder, ratings=RATINGS, movies=MOVIES, encoding="utf-8"):
    (folder / "ratings.csv").write_bytes(ratings.replace("\n", "\r\n").encode(encoding))
    (folder / "movies.csv").write_bytes(movies.replace("\n", "\r\n").encode(encoding))
    return folder


@pytest.mark.parametrize("name", ["ml-25m", "ml-32m", "ml-latest-small"])
def test_movielens(tmp_path, name):
    data = load(name, movielens(tmp_path), min_core=1)
    assert data.items.to_dict("list") == {
        "item": [1, 2, 3, 4],
        "title": [
            "Pulp Fiction",
            "Three Colors: Red (Trois couleurs: Rouge)",
            'The Fantastic "Four"',
            "Cosmos",
        ],
        "year": [1994, 1994, 2005, 0],
        "genres": ["Comedy|Crime|Drama|Thriller", "Drama", "Action|Adventure|Sci-Fi", ""],
        "text": [
            "Pulp Fiction (1994). Genres: Comedy, Crime, Drama, Thriller.",
            "Three Colors: Red (Trois couleurs: Rouge) (1994). Genres: Drama.",
            'The Fantastic "Four" (2005). Genres: Action, Adventure, Sci-Fi.',
            "Cosmos.",
        ],
    }
    assert data.interactions.to_dict("list") == {
        "user": [1, 1, 1, 1, 0, 0, 0],
        "item": [3, 2, 1, 4, 2, 3, 1],
        "time": [
            1141415790,
            1141415820,
            1141415820,
            1141415830,
            1147868817,
            1147868828,
            1147880044,
        ],
        "rating": [4.5, 4.0, 3.0, 0.5, 3.5, 5.0, 5.0],
    }
    assert data.interactions.dtypes.astype(str).to_dict() == {
        "user": "int64",
        "item": "int64",
        "time": "int64",
        "rating": "float64",
    }
    assert data.info["skipped"] == {} and data.info["noun"] == "film" and data.info["name"] == name
    assert (
        load(name, tmp_path, min_core=2).info["n_items"] == 3
    )  # the default of 5 would leave nothing
    with pytest.raises(
        ValueError, match=r"no interaction is left after the filters \(min_core=5\)"
    ):
        load(name, tmp_path)


def test_movielens_with_bad_rows(tmp_path):
    bad = "3,296,five,1141415820\n3,999,4.0,1141415820\n1,296,4.0,1141415820\n3,306\n3,\ufffd,4.0,1\n3,307,nan,1141415820\n3,296,4.0,11414158"
    data = load("ml-25m", movielens(tmp_path, RATINGS + bad), min_core=1, bad_row_limit=0.6)
    assert data.info["skipped"] == {
        "unparsable field": 3, "wrong number of fields": 1, "cut last line": 1, "item without metadata": 1, "duplicate": 1,
    }  # fmt: skip
    assert data.info["skipped_first"]["cut last line"] == "ratings.csv line 15"
    assert data.info["skipped_first"]["duplicate"] == "ratings.csv line 11"
    assert data.info["n_interactions"] == 7 and set(data.info["skipped_bad"]) == set(
        data.info["skipped"]
    )
    with pytest.raises(
        ValueError,
        match=r"ratings.csv: 5 of 14 rows are unusable.*unparsable field \(first: ratings.csv line 9\)",
    ):
        load("ml-25m", tmp_path, min_core=1)


def test_movielens_in_another_encoding_or_another_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"movies.csv: 1 of 5 .* 1 x not UTF-8 \(first: movies.csv line 6\)"
    ):
        load(
            "ml-25m",
            movielens(tmp_path, movies=MOVIES + "9,Amélie (2001),Drama\n", encoding="latin-1"),
            min_core=1,
        )
    with pytest.raises(
        ValueError,
        match="movies.csv line 1: the columns must be movieId,title,genres, got movieId,tag",
    ):
        load("ml-25m", movielens(tmp_path, movies="movieId,tag\n1,x\n"))
    with pytest.raises(ValueError, match="ratings.csv: no rows; the file is empty"):
        load("ml-25m", movielens(tmp_path, ratings="userId,movieId,rating,timestamp\n"))
    (tmp_path / "ratings.csv").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="ratings.csv is missing; put it there, or name another folder with data_dir",
    ):
        load("ml-25m", tmp_path)


def test_a_title_over_two_lines_is_one_line_of_text(tmp_path):
    data = load(
        "ml-25m",
        movielens(tmp_path, movies=MOVIES.replace("Cosmos", '"Cos\nmos<|im_end|>, ""again"""')),
        min_core=1,
    )
    assert data.items["title"].tolist()[3] == 'Cos mos, "again"' and data.info["skipped"] == {}


# --- Steam -----------------------------------------------------------------------------------------------

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
    (tmp_path / "steam-200k.csv").write_text(STEAM)
    data = load("steam-200k", tmp_path, min_core=1)
    assert data.items["title"].tolist() == [
        "Fallout 4",
        "Spore",
        "The Elder Scrolls V Skyrim",
        "Warhammer 40,000 Dawn of War II",
    ]
    assert data.interactions.to_dict("list") == {
        "user": [1, 1, 1, 0, 0, 0], "item": [3, 1, 2, 4, 2, 1], "time": [0, 1, 2, 3, 4, 5], "rating": [273.0, 87.0, 0.0, 0.0, 0.0, 0.4],
    }  # fmt: skip
    assert data.info["skipped"] == {"duplicate": 1} and data.info["skipped_bad"] == []
    assert data.info["skipped_first"] == {"duplicate": "steam-200k.csv line 10"}
    assert (
        data.info["order"] == "file order: the data set has no times"
        and data.info["noun"] == "game"
    )
    split = splits.split(data.interactions, 2, "leave-one-out")
    assert split.test.tolist() == [1, 2]


def test_steam_with_bad_rows(tmp_path):
    bad = '5250,"Spore",rent,1.0,0\n5250,"Spore",purchase\n5250,,purchase,1.0,0\nx,"Spore",play,1.0,0\n'
    (tmp_path / "steam-200k.csv").write_text(STEAM * 1 + bad)
    with pytest.raises(
        ValueError,
        match=r"steam-200k.csv: 4 of 14 rows .* 2 x unparsable field \(first: steam-200k.csv line 11\)",
    ):
        load("steam-200k", tmp_path, min_core=1)
    data = load("steam-200k", tmp_path, min_core=1, bad_row_limit=0.3)
    assert data.info["skipped"] == {
        "wrong number of fields": 1,
        "unparsable field": 2,
        "missing field": 1,
        "duplicate": 1,
    }


# --- own tables --------------------------------------------------------------------------------------------

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
NAMES = {
    "user": "who",
    "item": "what",
    "time": "when",
    "title": "name",
    "genres": "kind",
    "year": "since",
    "rating": "",
}


def own(folder, log=LOG, shop=SHOP):
    (folder / "interactions.csv").write_text(log)
    (folder / "items.csv").write_text(shop)
    return folder


def test_own_tables(tmp_path):
    data = load("csv", own(tmp_path), min_core=1, columns=NAMES)
    assert data.items.to_dict("list") == {
        "item": [1, 2, 3],
        "title": ["Blue mug", "Earl Grey", 'Sencha "first" flush'],
        "year": [1999, 1830, 0],
        "genres": ["", "Tea|Black", "Tea|Green"],
        "text": [
            "Blue mug (1999).",
            "Earl Grey (1830). Genres: Tea, Black.",
            'Sencha "first" flush. Genres: Tea, Green.',
        ],
    }
    assert data.interactions.to_dict("list") == {
        "user": [0, 0, 1, 0, 1, 1],
        "item": [2, 3, 2, 1, 1, 3],
        "time": [1709251200, 1709287200, 1709287200, 1709294400, 1709294500, 1709294600],
    }
    assert (
        data.info["skipped"] == {}
        and data.info["noun"] == "item"
        and data.info["order"] == "time, ties by file order"
    )
    assert data.users.to_dict("list") == {"user": [0, 1], "gender": ["", ""], "age": [0, 0]}


def test_own_tables_as_parquet_and_gzip_are_the_same(tmp_path):
    expected = load("csv", own(tmp_path), min_core=1, columns=NAMES)
    for name in ("interactions", "items"):
        path = tmp_path / f"{name}.csv"
        (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load("csv", tmp_path, min_core=1, columns=NAMES)
    log = pd.read_csv(tmp_path / "interactions.csv.gz")
    log["when"] = pd.to_datetime(
        [1709287200, 1709287200, 1709251200, 1709294400, 1709294500, 1709294600], unit="s"
    )
    log.to_parquet(tmp_path / "interactions.parquet")
    shop = pd.read_csv(tmp_path / "items.csv.gz")
    shop["kind"] = [["Tea", "Black"], ["Tea", "Green"], None]
    shop.to_parquet(tmp_path / "items.parquet")
    for name in ("interactions", "items"):
        (tmp_path / f"{name}.csv.gz").unlink()
    for data in (packed, load("csv", tmp_path, min_core=1, columns=NAMES)):
        pd.testing.assert_frame_equal(data.interactions, expected.interactions)
        pd.testing.assert_frame_equal(data.items, expected.items)


def test_own_ids_that_are_numbers_are_ordered_as_numbers(tmp_path):
    log = "user,item,time,rating\n" + "".join(
        f"{u},{i},{u + i},{i % 5}\n" for u in (2, 10) for i in (9, 10, 100)
    )
    shop = "item,title\n" + "".join(f"{i},Title {i}\n" for i in (100, 9, 10))
    data = load("csv", own(tmp_path, log, shop), min_core=1)
    assert (
        data.items["title"].tolist() == ["Title 9", "Title 10", "Title 100"]
        and data.items["year"].tolist() == [0] * 3
    )
    assert (
        data.interactions["user"].tolist() == [0, 0, 1, 1, 0, 1] and "rating" in data.interactions
    )
    data = load(
        "csv", own(tmp_path, log.replace("2,9,", "x,9,").replace("2,1", "x,1"), shop), min_core=1
    )
    assert data.interactions["user"].tolist() == [1, 1, 0, 0, 1, 0]  # as texts: "10" before "x"


def test_own_tables_without_times_are_in_file_order(tmp_path):
    log = "user,item\n" + "".join(f"{u},{i}\n" for i in (3, 1, 2) for u in (1, 2))
    data = load(
        "csv", own(tmp_path, log, "item,title\n1,A\n2,B\n3,C\n"), min_core=1, columns={"time": ""}
    )
    assert data.interactions["item"].tolist() == [3, 3, 1, 1, 2, 2]
    assert data.info["order"] == "file order: no time column was named"


def test_a_wrong_column_is_named(tmp_path):
    own(tmp_path)
    for changed, message in (
        (
            {"user": "whoo"},
            r"interactions.csv: no column 'whoo' for user_column; the columns are 'when', 'who', 'what'; did you mean 'who'\?",
        ),
        (
            {"time": "timestamp"},
            r"no column 'timestamp' for time_column; the columns are 'when', 'who', 'what'; set time_column to one of these",
        ),
        (
            {"title": "Name"},
            r"items.csv: no column 'Name' for title_column; the columns are 'what', 'name', 'kind', 'since'; did you mean 'name'\?",
        ),
        (
            {"genres": "kinds"},
            r"did you mean 'kind'\? Set genres_column=kind, or leave genres_column empty to do without",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load("csv", tmp_path, min_core=1, columns=NAMES | changed)
    assert (
        load("csv", tmp_path, min_core=1, columns=NAMES | {"genres": "genre", "year": ""}).items[
            "genres"
        ]
        == ""
    ).all()


def test_the_columns_are_those_of_the_parameters(tmp_path):
    params = Params(
        dataset="csv",
        data_dir=str(own(tmp_path)),
        min_core=1,
        **{f"{need}_column": name for need, name in NAMES.items()},
    )
    assert load_for(params).info["n_interactions"] == 6
    message = r"interactions.csv: no column 'wo' for user_column; .* did you mean 'who'\? Set user_column=who"
    with pytest.raises(ValueError, match=message):
        load_for(params.replace(user_column="wo"))


def test_own_tables_with_bad_rows(tmp_path):
    log = (
        LOG
        + ",bob,tea-01\n1709294700,bob,tea-09\n1709294800,bob,mug\n1709294900,,mug\n1709295000,carl,mug\nnoon,bob,mug\n1709,b"
    )
    data = load(
        "csv",
        own(tmp_path, log, SHOP + "mug,Other mug,,\n,Nothing,,\n"),
        min_core=1,
        columns=NAMES,
        bad_row_limit=0.5,
    )
    assert data.info["skipped"] == {
        "unparsable field": 2, "missing field": 2, "cut last line": 1, "duplicate": 2, "item without metadata": 1,
        "user with fewer than 3 events": 1,
    }  # fmt: skip
    assert data.info["skipped_first"]["missing field"] == "interactions.csv line 11"
    assert set(data.info["skipped_bad"]) == {
        "unparsable field",
        "missing field",
        "cut last line",
        "item without metadata",
    }
    with pytest.raises(ValueError, match="interactions.csv: 4 of 13 rows are unusable"):
        load("csv", tmp_path, min_core=1, columns=NAMES)


def test_missing_or_ambiguous_tables_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="must hold one of interactions.csv, interactions.csv.gz, interactions.parquet: none is there",
    ):
        load("csv", tmp_path)
    own(tmp_path)
    (tmp_path / "items.parquet").touch()
    with pytest.raises(FileNotFoundError, match="one of items.csv.*several of them are there"):
        load("csv", tmp_path, columns=NAMES)
    (tmp_path / "interactions.csv").write_text("")
    with pytest.raises(ValueError, match="interactions.csv: no rows; the file is empty"):
        load("csv", tmp_path, columns=NAMES)


def test_parquet_with_missing_values_and_floats(tmp_path):
    log = pd.DataFrame(
        {"user": [1.0, 1.0, 1.0, np.nan], "item": ["a", "b", "c", "a"], "time": [3, 2, 1, 0]}
    )
    log.to_parquet(tmp_path / "interactions.parquet")
    pd.DataFrame({"item": ["a", "b", "c"], "title": ["A", "B", "C"]}).to_parquet(
        tmp_path / "items.parquet"
    )
    data = load("csv", tmp_path, min_core=1, bad_row_limit=0.3)
    assert data.info["skipped_first"] == {"missing field": "interactions.parquet line 4"}
    assert data.interactions["item"].tolist() == [3, 2, 1]


@pytest.mark.parametrize("name", ["interactions", "items"])
def test_a_damaged_parquet_is_named(tmp_path, name):
    log = pd.DataFrame(
        {"user": np.repeat(range(400), 5), "item": np.tile(list("abcde"), 400), "time": range(2000)}
    )
    log.to_parquet(tmp_path / "interactions.parquet")
    pd.DataFrame({"item": list("abcde"), "title": list("ABCDE")}).to_parquet(
        tmp_path / "items.parquet"
    )
    path = tmp_path / f"{name}.parquet"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[4:60] = b"\xff" * 56  # in the first column's pages: the file opens
    for content in (b"", b"user,item\n1,2\n", whole[:-20], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=rf"{name}.parquet: no parquet file, or a damaged one \(.*\); write or fetch it again",
        ):
            load("csv", tmp_path, min_core=1)


def test_a_rating_may_be_blank_but_not_a_word(tmp_path):
    log = "user,item,time,rating\n1,a,1,4.5\n1,b,2,\n1,c,3,  \n1,d,4,good\n1,e,5,nan\n"
    shop = "item,title\n" + "".join(f"{i},{i.upper()}\n" for i in "abcde")
    data = load("csv", own(tmp_path, log, shop), min_core=1, bad_row_limit=0.5)
    assert data.info["skipped"] == {"unparsable field": 2} and data.info["skipped_first"] == {
        "unparsable field": "interactions.csv line 5"
    }
    np.testing.assert_array_equal(data.interactions["rating"], [4.5, np.nan, np.nan])
    (tmp_path / "interactions.csv").unlink()
    pd.DataFrame(
        {"user": 1, "item": list("abc"), "time": range(3), "rating": [4.5, None, 2.0]}
    ).to_parquet(tmp_path / "interactions.parquet")
    data = load("csv", tmp_path, min_core=1)
    np.testing.assert_array_equal(data.interactions["rating"], [4.5, np.nan, 2.0])
    assert data.info["skipped"] == {}


def test_a_broken_gzip_of_own_tables_stops_the_run(tmp_path):
    own(tmp_path)
    for name in ("interactions", "items"):
        text = (tmp_path / f"{name}.csv").read_bytes()
        (tmp_path / f"{name}.csv").unlink()
        path = tmp_path / f"{name}.csv.gz"
        path.write_bytes(
            gzip.compress(text)[:-8]
        )  # only the checksum is lost, but nobody can know that
        with pytest.raises(
            ValueError,
            match=rf"{name}.csv.gz line \d: the gzip file breaks off here .* fetch it again, or set bad_row_limit=1",
        ):
            load("csv", tmp_path, min_core=1, columns=NAMES, bad_row_limit=0.9)
        assert load("csv", tmp_path, min_core=1, columns=NAMES, bad_row_limit=1.0).info[
            "skipped"
        ] == {"broken gzip": 1}
        path.write_bytes(gzip.compress(text))


# --- what the prompt calls an item ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noun, system, asked, reference",
    [
        ("film", "You recommend films. Explain each recommendation in one or two short sentences: name the film, and link it to films "
         "the viewer watched and to its genres.", "I watched: A; B.", "You watched B and A, so I think you will like C, a film in the same vein."),
        ("item", "You recommend items. Explain each recommendation in one or two short sentences: name the item, and link it to items "
         "the customer chose and to its genres.", "I chose: A; B.", "You chose B and A, so I think you will like C, an item in the same vein."),
    ],
)  # fmt: skip
def test_the_prompt_and_the_reference_speak_of_what_the_data_set_holds(
    noun, system, asked, reference
):
    items = pd.DataFrame({"item": [1, 2, 3], "title": ["A", "B", "C"], "year": 0, "genres": ""})
    (record,) = prompts.build_records(items, [np.array([1, 2])], np.array([[3]]), [(0, 1)], 5, noun)
    chat = prompts.messages(record)
    assert chat[0]["content"] == system and chat[1]["content"].startswith(asked)
    assert reference_line(record | {"user": 2}) == reference
