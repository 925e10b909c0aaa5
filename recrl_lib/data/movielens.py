"""MovieLens (Harper & Konstan 2015): 25M, 32M and latest-small, and 100K in either of two forms.

* since 2014: ``ratings.csv`` and ``movies.csv``, with quoted titles;
* 100K from its origin: ``u.data``, ``u.item``, ``u.user`` in Latin-1, without headers and quotes;
* 100K as RecBole's atomic files, tab-separated, with a typed header and without quotes.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from recrl_lib.data.reading import Rows
from recrl_lib.data.tables import (
    Raw,
    Skipped,
    catalogue,
    milliseconds,
    parse_numbers,
    sanitise_text,
)

RATINGS, MOVIES = ("userId", "movieId", "rating", "timestamp"), ("movieId", "title", "genres")
HEADERS = {
    "ml-100k.inter": "user_id:token item_id:token rating:float timestamp:float",
    "ml-100k.item": "item_id:token movie_title:token_seq release_year:token class:token_seq",
    "ml-100k.user": "user_id:token age:token gender:token occupation:token zip_code:token",
}
ORIGIN = (("u.data", 4, "\t"), ("u.item", 24, "|"), ("u.user", 5, "|"))  # name, width, separator
GENRES = (  # u.item's last 19 columns, in their order
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir"
    "|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
)
# "unkonwn" is RecBole's spelling.
MISSING = ("", "unknown", "unkonwn", "(no genres listed)")

# "Blue Angel, The (Blaue Engel, Der)": the title and a translated one in brackets are inverted.
_INVERTED = re.compile(r"([^()\s][^()]*), (The|An?|Les?|La|L'|Il|El|Das|Der|Die|Det|O)(?=\)|$| \()")
_YEAR_AT_END = re.compile(r"\s*\((\d{4})\)(?:\s*\(V\))?$")  # (V): for video


def read(folder: Path, skipped: Skipped) -> Raw:
    """The rows of ``ratings.csv`` and ``movies.csv``."""
    ratings = Rows(folder / "ratings.csv", skipped, RATINGS)
    table = _ratings(ratings)
    films = Rows(folder / "movies.csv", skipped, MOVIES)
    rows = ((line, raw, text, "", genres.split("|")) for line, raw, text, genres in films.records())
    items = catalogue(_films(rows), films.path, skipped)
    return Raw(ratings.path, table, items, f"MovieLens, {folder.name}", "film")


def read_100k(folder: Path, skipped: Skipped) -> Raw:
    """The rows of three files: the origin's if ``u.data`` is there, else RecBole's.

    Raises ``ValueError`` also for a rating by a user without a row.
    """
    if (folder / "u.data").is_file():
        files = [(name, [""] * width, separator) for name, width, separator in ORIGIN]
        source, rows_of = "GroupLens", _origin_films
        form = {"has_header": False, "encoding": "latin-1"}
    else:
        files = [(name, header.split(), "\t") for name, header in HEADERS.items()]
        source, rows_of, form = "RecBole atomic files", _atomic_films, {}
    ratings, films, people = (
        Rows(folder / name, skipped, header, separator=separator, quoted=False, **form)
        for name, header, separator in files
    )
    rows = _films(rows_of(films), untitled="Unknown")
    items = catalogue(rows, films.path, skipped)
    rows = ((_int(raw), gender, _int(age)) for _, raw, age, gender, *_ in people.records())
    users = pd.DataFrame(rows, columns=["raw", "gender", "age"]).drop_duplicates("raw")
    table = _ratings(ratings)
    unknown = np.flatnonzero(~table["user"].isin(users["raw"]))
    if len(unknown):
        user, line = table.loc[unknown[0], ["user", "line"]].astype(int)
        raise ValueError(
            f"{ratings.path} line {line}: user_id {user} has no row in {people.path.name}; "
            "fetch both files again, from one source"
        )
    return Raw(ratings.path, table, items, f"MovieLens 100K, {source}", "film", users)


def _ratings(rows: Rows) -> pd.DataFrame:
    """The table of user, item, time, rating and line."""

    def parse(lines: np.ndarray, *columns: pa.Array) -> pd.DataFrame:
        # Times stay int64: as float32 neighbouring seconds collapse and the order is lost.
        kinds = {"user": np.int64, "item": np.int64, "rating": np.float64, "time": np.int64}
        parsed = [parse_numbers(texts, kind) for texts, kind in zip(columns, kinds.values())]
        good = np.logical_and.reduce([parsable for _, parsable in parsed])
        rows.skipped.add("unparsable field", rows.path, lines[~good])
        user, item, rating, time = (values for values, _ in parsed)
        table = {"user": user, "item": item, "time": milliseconds(time), "rating": rating}
        return pd.DataFrame(table | {"line": lines}).loc[good]

    return rows.frame(parse)


def _films(rows: Iterable[tuple], untitled: str = "") -> Iterator[tuple]:
    """(line, id, title, year, genres) of (line, id, title with year, year, list of genres)."""
    for line, raw, text, year, genres in rows:
        title, year_at_end = title_and_year(sanitise_text(text))
        title = untitled if untitled and title in MISSING else title
        genres = [name for name in map(sanitise_text, genres) if name not in MISSING]
        yield (
            line,
            _int(raw) if raw.isdecimal() else "",
            title,
            _int(year) or year_at_end,
            "|".join(genres),
        )


def _atomic_films(films: Rows) -> Iterator[tuple]:
    # One row has its year in the title, and "V", for video, in the year's place.
    for line, raw, text, year, genres in films.records():
        yield line, raw, text, year, genres.split()


def _origin_films(films: Rows) -> Iterator[tuple]:
    for line, raw, text, _, _, _, *flags in films.records():
        yield (
            line,
            raw,
            text,
            "",
            [name for name, flag in zip(GENRES.split("|"), flags) if flag == "1"],
        )


def display_title(title: str) -> str:
    """``title`` as people say it: "Usual Suspects, The" -> "The Usual Suspects"."""
    return _INVERTED.sub(lambda m: m[2] + ("" if m[2].endswith("'") else " ") + m[1], title)


def title_and_year(text: str) -> tuple[str, int]:
    """ "Usual Suspects, The (1995)" -> ("The Usual Suspects", 1995); year 0 if there is none."""
    found = _YEAR_AT_END.search(text)
    return display_title(text[: found.start()] if found else text), int(found[1]) if found else 0


def _int(text: str) -> int:
    return int(text) if text.isdecimal() else 0
