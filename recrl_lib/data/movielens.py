"""MovieLens (Harper & Konstan 2015): 25M, 32M and latest-small, and 100K in either of two forms.

* since 2014: ``ratings.csv`` and ``movies.csv``, with quoted titles;
* 100K from its origin: ``u.data``, ``u.item``, ``u.user`` in Latin-1, without headers and quotes;
* 100K as RecBole's atomic files, tab-separated, with a typed header and without quotes.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from recrl_lib.data import tables
from recrl_lib.data.reading import Rows, parsed
from recrl_lib.data.tables import Raw, Skipped, parse_integers, sanitise_text

CSV = {"ratings.csv": "userId movieId rating timestamp", "movies.csv": "movieId title genres"}
HEADERS = {
    "ml-100k.inter": "user_id:token item_id:token rating:float timestamp:float",
    "ml-100k.item": "item_id:token movie_title:token_seq release_year:token class:token_seq",
    "ml-100k.user": "user_id:token age:token gender:token occupation:token zip_code:token",
}
# Name, names of as many columns, separator.
ORIGIN = [("u.data", [""] * 4, "\t"), ("u.item", [""] * 24, "|"), ("u.user", [""] * 5, "|")]
GENRES = (  # u.item's last 19 columns, in their order
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir"
    "|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")
# "unkonwn" is RecBole's spelling.
MISSING = ("", "unknown", "unkonwn", "(no genres listed)")

# "Blue Angel, The (Blaue Engel, Der)": the title and a translated one in brackets are inverted.
_INVERTED = re.compile(r"([^()\s][^()]*), (The|An?|Les?|La|L'|Il|El|Das|Der|Die|Det|O)(?=\)|$| \()")
_YEAR_AT_END = re.compile(r"\s*\((\d{4})\)(?:\s*\(V\))?$")  # (V): for video

# (title with its year, year, genres) of what follows the id in a row of films.
Film = Callable[..., tuple[str, str, list[str]]]


def read(folder: Path, skipped: Skipped) -> Raw:
    """The rows of ``ratings.csv`` and ``movies.csv``."""
    ratings, films = (Rows(folder / n, skipped, header.split()) for n, header in CSV.items())
    items = _films(films, lambda title, genres: (title, "", genres.split("|")))
    return Raw(ratings.path, _ratings(ratings), items, f"MovieLens, {folder.name}", "film")


def read_100k(folder: Path, skipped: Skipped) -> Raw:
    """The rows of three files: the origin's if ``u.data`` is there, else RecBole's.

    Raises ``ValueError`` also for a rating by a user without a row.
    """
    form: dict[str, Any] = {"quoted": False}
    files = [(name, header.split(), "\t") for name, header in HEADERS.items()]
    source, film = "RecBole atomic files", lambda title, year, genres: (title, year, genres.split())
    if (folder / "u.data").is_file():
        files, source, film = ORIGIN, "GroupLens", _origin_film
        form |= {"has_header": False, "encoding": "latin-1"}
    ratings, films, people = (
        Rows(folder / name, skipped, names, separator=separator, **form)
        for name, names, separator in files
    )
    items = _films(films, film, untitled="Unknown")
    rows = ((_int(raw), gender, _int(age)) for _, raw, age, gender, *_ in people)
    users = pd.DataFrame(rows, columns=["raw", "gender", "age"]).drop_duplicates("raw")
    skipped.check(people.path)
    table = _ratings(ratings)
    unknown = table.loc[~table["user"].isin(users["raw"]), ["user", "line"]]
    if len(unknown):
        user, line = unknown.iloc[0]
        raise ValueError(
            f"{ratings.path} line {line}: user_id {user} has no row in {people.path.name}; "
            "fetch both files again, from one source"
        )
    return Raw(ratings.path, table, items, f"MovieLens 100K, {source}", "film", users)


def _origin_film(title: str, *fields: str) -> tuple[str, str, list[str]]:
    return title, "", [name for name, flag in zip(GENRES, fields[3:]) if flag == "1"]


def _ratings(rows: Rows) -> pd.DataFrame:
    """The table of user, item, time, rating and line."""
    # Times stay int64: as float32 neighbouring seconds collapse and the order is lost.
    parsers = dict.fromkeys(("user", "item", "rating", "time"), parse_integers)
    table = parsed(rows, parsers | {"rating": tables.parse_numbers}, rows.path, rows.skipped)
    table["time"] = tables.milliseconds(table["time"])
    return table[["user", "item", "time", "rating", "line"]]


def _films(rows: Rows, film: Film, untitled: str = "") -> pd.DataFrame:
    def films():
        for line, raw, *fields in rows:
            text, year, genres = film(*fields)
            title, year_at_end = title_and_year(sanitise_text(text))
            title = untitled if untitled and title in MISSING else title
            names = [name for name in map(sanitise_text, genres) if name not in MISSING]
            # One row has its year in the title, and "V", for video, in the year's place.
            yield line, _int(raw) or "", title, _int(year) or year_at_end, "|".join(names)

    return tables.catalogue(films(), rows.path, rows.skipped)


def title_and_year(text: str) -> tuple[str, int]:
    """ "Usual Suspects, The (1995)" -> ("The Usual Suspects", 1995); year 0 if there is none."""
    found = _YEAR_AT_END.search(text)
    title = text[: found.start()] if found else text
    title = _INVERTED.sub(lambda m: m[2] + ("" if m[2].endswith("'") else " ") + m[1], title)
    return title, int(found[1]) if found else 0


def _int(text: str) -> int:
    return int(text) if text.isdecimal() else 0
