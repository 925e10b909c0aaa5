"""MovieLens 100K (Harper & Konstan 2015) as RecBole atomic files: tab-separated, with a typed header.

``ml-100k.inter`` holds the ratings, ``ml-100k.item`` the films, ``ml-100k.user`` the people. Nothing is quoted:
a ``"`` in a title is part of the title.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recrl_lib.datasets import Dataset, Skipped, sanitise_text
from recrl_lib.files import sha256_file

SOURCE = "MovieLens 100K, RecBole atomic files"
HEADERS = {
    "ml-100k.inter": "user_id:token item_id:token rating:float timestamp:float",
    "ml-100k.item": "item_id:token movie_title:token_seq release_year:token class:token_seq",
    "ml-100k.user": "user_id:token age:token gender:token occupation:token zip_code:token",
}
MISSING = ("", "unknown", "unkonwn")  # the last as the files spell it

# "Blue Angel, The (Blaue Engel, Der)": both the title and a translated title in brackets are inverted.
_INVERTED = re.compile(r"([^()\s][^()]*), (The|An?|Les?|La|L'|Il|El|Das|Der|Die|Det|O)(?=\)|$| \()")
_YEAR_AT_END = re.compile(r"\s*\((\d{4})\)$")


def load(folder: Path) -> Dataset:
    """The data set from ``folder``'s three files; see ``Dataset``.

    Items are numbered 1..I and users 0..U-1 in the order of their raw integer ids; films without a rating stay.
    Raises ``ValueError`` for a wrong header, a rating by a user without a row, or too many bad rows;
    ``FileNotFoundError`` for a missing file.
    """
    skipped = Skipped()
    items = _items(folder / "ml-100k.item", skipped)
    users = _users(folder / "ml-100k.user", skipped)
    interactions = _interactions(folder / "ml-100k.inter", users.pop("raw"), items.pop("raw"), skipped)
    info = dict(
        source=SOURCE, sha256=sha256_file(folder / "ml-100k.inter"),
        n_users=len(users), n_items=len(items), n_interactions=len(interactions),
        skipped=skipped.counts, skipped_first=skipped.first,
    )
    return Dataset(interactions, items, users, info)


def display_title(title: str) -> str:
    """``title`` as people say it: "Usual Suspects, The" -> "The Usual Suspects"."""
    return _INVERTED.sub(lambda m: m[2] + ("" if m[2].endswith("'") else " ") + m[1], title)


def item_text(title: str, year: int, genres: str) -> str:
    """What the LLM reads for one item: "Title (year). Genres: A, B." without the parts that are unknown."""
    year_part = f" ({year})" if year else ""
    genre_part = f" Genres: {genres.replace('|', ', ')}." if genres else ""
    return f"{title}{year_part}.{genre_part}"


def _items(path: Path, skipped: Skipped) -> pd.DataFrame:
    def parse(raw, title, year, genres):
        title = sanitise_text(title)
        in_title = _YEAR_AT_END.search(title)  # one row has its year there and "V", for video, in the year's place
        if in_title:
            title = title[: in_title.start()]
        year = int(year) if year.isdecimal() else int(in_title[1]) if in_title else 0
        title = "Unknown" if title in MISSING else display_title(title)
        genres = "|".join(g for g in sanitise_text(genres).split() if g not in MISSING)
        return _int64(raw), title, year, genres, item_text(title, year, genres)

    table = _table(path, parse, ["raw", "title", "year", "genres", "text"], skipped, key="raw")
    table = table.sort_values("raw", ignore_index=True)
    table.insert(0, "item", np.arange(1, len(table) + 1))
    return table


def _users(path: Path, skipped: Skipped) -> pd.DataFrame:
    def parse(raw, age, gender, *_):
        return _int64(raw), gender, int(age) if age.isdecimal() else 0

    table = _table(path, parse, ["raw", "gender", "age"], skipped, key="raw").sort_values("raw", ignore_index=True)
    table.insert(0, "user", np.arange(len(table)))
    return table


def _interactions(path: Path, raw_users: pd.Series, raw_items: pd.Series, skipped: Skipped) -> pd.DataFrame:
    user_of = {raw: user for user, raw in enumerate(raw_users)}
    item_of = {raw: item for item, raw in enumerate(raw_items, 1)}

    def parse(user, item, rating, time):
        user, item, rating, time = _int64(user), _int64(item), float(rating), _int64(time)
        if not math.isfinite(rating):
            raise ValueError
        if user not in user_of:
            raise _Fatal(f"user_id {user} has no row in ml-100k.user; fetch both files again, from one source")
        if item not in item_of:
            raise _Skip("item without a row")
        return user_of[user], item_of[item], time, rating

    table = _table(path, parse, ["user", "item", "time", "rating"], skipped, key=("user", "item"))
    # Times stay int64: as float32 (the header's "float") neighbouring seconds collapse and the order is lost.
    return table.sort_values("time", kind="stable", ignore_index=True)


class _Skip(Exception):
    """The row is unusable; the argument is the kind."""


class _Fatal(Exception):
    """The file as a whole is unusable; the argument is reason and remedy."""


def _table(
    path: Path, parse: Callable[..., tuple], columns: list[str], skipped: Skipped, key: str | tuple[str, ...]
) -> pd.DataFrame:
    """Rows of ``path`` through ``parse`` (fields -> values); bad rows are counted, and too many stop the run.

    Of rows with equal ``key`` the first in the file is kept.
    """
    lines = _lines(path)
    where = [columns.index(name) for name in ([key] if isinstance(key, str) else key)]
    width = len(HEADERS[path.name].split())
    rows: dict[Any, tuple] = {}
    for number, line in enumerate(lines[1:-1], 2):
        try:
            fields = line.split("\t")
            if len(fields) != width:
                raise _Skip("wrong number of fields")
            row = parse(*fields)
            if (id := tuple(row[i] for i in where)) in rows:
                raise _Skip("duplicate")
            rows[id] = row
        except _Skip as reason:
            skipped.add(str(reason), path, number)
        except ValueError:
            skipped.add("unparsable field", path, number)
        except _Fatal as reason:
            raise ValueError(f"{path} line {number}: {reason}") from None
    total = len(lines) - 2
    if lines[-1]:  # without its newline the last field may be cut short and still parse
        skipped.add("cut last line", path, len(lines))
        total += 1
    skipped.check(path, total - len(rows), total)
    if not rows:
        raise ValueError(f"{path}: no rows after the header; fetch the file again")
    return pd.DataFrame(rows.values(), columns=columns)


def _lines(path: Path) -> list[str]:
    """Lines of ``path``, header checked; the last entry is what follows the last newline (nothing, in a whole file)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the folder must hold {', '.join(HEADERS)}")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} line {line}: not UTF-8 ({error.reason}); fetch the file again") from None
    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines(): titles may hold U+2028 and the like
    expected, found = HEADERS[path.name].split(), lines[0].split("\t")
    for position, name in enumerate(expected):
        if found[position : position + 1] != [name]:
            got = repr(found[position]) if position < len(found) else "nothing"
            reason = f"column {position + 1} must be {name!r}, got {got}"
            raise ValueError(f"{path} line 1: {reason}; use RecBole's atomic file")
    if len(found) > len(expected):
        raise ValueError(f"{path} line 1: unexpected column {found[len(expected)]!r}; use RecBole's atomic file")
    return lines


def _int64(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError
    return value
