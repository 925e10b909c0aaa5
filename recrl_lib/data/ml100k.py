"""MovieLens 100K (Harper & Konstan 2015), in either of two forms; nothing is quoted: a ``"`` in a title is part of the title.

* its origin's: ``u.data`` (the ratings), ``u.item`` (the films, in Latin-1), ``u.user`` (the people), without headers;
* RecBole's atomic files: ``ml-100k.inter``, ``ml-100k.item``, ``ml-100k.user``, tab-separated, with a typed header.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from recrl_lib.data.tables import Raw, Skipped, item_text, sanitise_text

HEADERS = {
    "ml-100k.inter": "user_id:token item_id:token rating:float timestamp:float",
    "ml-100k.item": "item_id:token movie_title:token_seq release_year:token class:token_seq",
    "ml-100k.user": "user_id:token age:token gender:token occupation:token zip_code:token",
}
GENRES = (  # u.item's last 19 columns, in their order
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
MISSING = ("", "unknown", "unkonwn")  # the last as RecBole's files spell it

# "Blue Angel, The (Blaue Engel, Der)": both the title and a translated title in brackets are inverted.
_INVERTED = re.compile(r"([^()\s][^()]*), (The|An?|Les?|La|L'|Il|El|Das|Der|Die|Det|O)(?=\)|$| \()")
_YEAR_AT_END = re.compile(r"\s*\((\d{4})\)(?:\s*\(V\))?$")  # (V): for video


@dataclass(frozen=True)
class _Form:
    """One of the two forms: file names, separator of films and people, encoding, widths, whether line 1 is a header."""

    source: str
    ratings: str
    films: str
    people: str
    separator: str
    encoding: str
    widths: dict[str, int]
    header: bool


ATOMIC = _Form(
    "MovieLens 100K, RecBole atomic files",
    *HEADERS,
    "\t",
    "utf-8",
    {name: len(columns.split()) for name, columns in HEADERS.items()},
    True,
)
ORIGIN = _Form(
    "MovieLens 100K, GroupLens",
    "u.data",
    "u.item",
    "u.user",
    "|",
    "latin-1",
    {"u.data": 4, "u.item": 5 + len(GENRES), "u.user": 5},
    False,
)


def read(folder: Path, skipped: Skipped) -> Raw:
    """The rows of ``folder``'s three files: the origin's if ``u.data`` is there, else RecBole's.

    Raises ``ValueError`` for a wrong header, a rating by a user without a row, or too many bad rows; ``FileNotFoundError``
    for a missing file.
    """
    form = ORIGIN if (folder / ORIGIN.ratings).is_file() else ATOMIC
    items, users = _items(folder, form, skipped), _users(folder, form, skipped)
    interactions, total = _interactions(folder, form, set(users["raw"]), skipped)
    return Raw(folder / form.ratings, total, interactions, items, form.source, "film", users)


def display_title(title: str) -> str:
    """``title`` as people say it: "Usual Suspects, The" -> "The Usual Suspects"."""
    return _INVERTED.sub(lambda m: m[2] + ("" if m[2].endswith("'") else " ") + m[1], title)


def title_and_year(text: str) -> tuple[str, int]:
    """ "Usual Suspects, The (1995)" -> ("The Usual Suspects", 1995); year 0 if there is none."""
    found = _YEAR_AT_END.search(text)
    return display_title(text[: found.start()] if found else text), int(found[1]) if found else 0


def _items(folder: Path, form: _Form, skipped: Skipped) -> pd.DataFrame:
    def parse_atomic(raw, title, year, genres):
        title, in_title = title_and_year(
            sanitise_text(title)
        )  # one row has its year there and "V", for video, in the year's place
        return (
            raw,
            title,
            int(year) if year.isdecimal() else in_title,
            sanitise_text(genres).split(),
        )

    def parse_origin(raw, title, released, video, address, *flags):
        if set(flags) - {"0", "1"}:
            raise ValueError
        return (
            raw,
            *title_and_year(sanitise_text(title)),
            [genre for genre, flag in zip(GENRES, flags) if flag == "1"],
        )

    def parse(*fields):
        raw, title, year, genres = (parse_origin if form is ORIGIN else parse_atomic)(*fields)
        title = "Unknown" if title in MISSING else title
        genres = "|".join(g for g in genres if g not in MISSING)
        return _int64(raw), title, year, genres, item_text(title, year, genres)

    return _table(
        folder / form.films,
        form,
        parse,
        ["raw", "title", "year", "genres", "text"],
        skipped,
        key="raw",
    )[0].drop(columns="line")


def _users(folder: Path, form: _Form, skipped: Skipped) -> pd.DataFrame:
    def parse(raw, age, gender, *_):
        return _int64(raw), gender, int(age) if age.isdecimal() else 0

    return _table(folder / form.people, form, parse, ["raw", "gender", "age"], skipped, key="raw")[
        0
    ].drop(columns="line")


def _interactions(
    folder: Path, form: _Form, users: set[int], skipped: Skipped
) -> tuple[pd.DataFrame, int]:
    def parse(user, item, rating, time):
        user, item, rating, time = (
            _int64(user),
            _int64(item),
            float(rating),
            _int64(1000 * int(time)),
        )
        if not math.isfinite(rating):
            raise ValueError
        if user not in users:
            raise _Fatal(
                f"user_id {user} has no row in {form.people}; fetch both files again, from one source"
            )
        return user, item, time, rating

    # Times stay int64: as float32 (the header's "float") neighbouring seconds collapse and the order is lost.
    return _table(folder / form.ratings, form, parse, ["user", "item", "time", "rating"], skipped)


class _Fatal(Exception):
    """The file as a whole is unusable; the argument is reason and remedy."""


def _table(
    path: Path,
    form: _Form,
    parse: Callable[..., tuple],
    columns: list[str],
    skipped: Skipped,
    key: str | None = None,
) -> tuple[pd.DataFrame, int]:
    """(rows of ``path`` through ``parse``, with their ``line``; how many there were); bad rows are counted, and too many stop the run.

    Of rows with equal ``key`` the first in the file is kept.
    """
    lines = _lines(path, form)
    separator = "\t" if path.name == form.ratings else form.separator
    rows: dict[Any, tuple] = {}
    for number, line in enumerate(lines[:-1], 1 + form.header):
        try:
            fields = line.decode(form.encoding).split(separator)
            if len(fields) != form.widths[path.name]:
                skipped.add("wrong number of fields", path, number)
                continue
            row = *parse(*fields), number
            if (id := row[columns.index(key)] if key else number) in rows:
                skipped.add("duplicate", path, number)
            else:
                rows[id] = row
        except UnicodeDecodeError:
            skipped.add("not UTF-8", path, number)
        except ValueError:
            skipped.add("unparsable field", path, number)
        except _Fatal as reason:
            raise ValueError(f"{path} line {number}: {reason}") from None
    if lines[-1]:  # without its newline the last field may be cut short and still parse
        skipped.add("cut last line", path, len(lines) + form.header)
    total = len(lines) - (not lines[-1])
    skipped.check(path, total)
    return pd.DataFrame(rows.values(), columns=[*columns, "line"]), total


def _lines(path: Path, form: _Form) -> list[bytes]:
    """Rows of ``path``, header checked; the last entry is what follows the last newline (nothing, in a whole file)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the folder must hold {', '.join(form.widths)}")
    lines = (
        path.read_bytes().replace(b"\r\n", b"\n").split(b"\n")
    )  # not splitlines(): titles may hold U+2028 and the like
    if not form.header:
        return lines
    expected, found = HEADERS[path.name].split(), lines[0].decode("utf-8", "replace").split("\t")
    for position, name in enumerate(expected):
        if found[position : position + 1] != [name]:
            got = repr(found[position]) if position < len(found) else "nothing"
            reason = f"column {position + 1} must be {name!r}, got {got}"
            raise ValueError(f"{path} line 1: {reason}; use RecBole's atomic file")
    if len(found) > len(expected):
        raise ValueError(
            f"{path} line 1: unexpected column {found[len(expected)]!r}; use RecBole's atomic file"
        )
    return lines[1:]


def _int64(text: str | int) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError
    return value
