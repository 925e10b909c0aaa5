"""Bring your own data: ``interactions`` and ``items``, each ``.csv``, ``.csv.gz`` or ``.parquet``.

The parameters ``user_column`` to ``genres_column`` name the columns. Needed are user and item in
the interactions, item and title in the items. A time is a Unix time in any unit, an ISO 8601 date
or "01 7, 2015"; without one file order counts. A rating may be blank, and have a decimal comma.
Genres are separated by ``|``, ``;`` or commas, or are a list of names. CSV is separated by commas,
tabs or semicolons, in UTF-8 or UTF-16; a Parquet table may be a folder of part files.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from recrl_lib.data import tables
from recrl_lib.data.reading import CHUNK, Rows, find, parsed
from recrl_lib.data.tables import Raw, Skipped, sanitise_text

SUFFIXES = (".csv", ".csv.gz", ".parquet")
WHOLE = r"(?:0|[1-9]\d{0,17})(?:\.0+)?"


def _ratings(texts: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, NaN where blank."""
    rating, good = tables.parse_numbers(texts.str.replace(",", "."))
    blank = (texts == "").to_numpy()
    return np.where(blank, np.nan, rating), good | blank


PARSERS = {"user": None, "item": None, "time": tables.parse_times, "rating": _ratings}
ITEMS = ("item", "title", "year", "genres")
NEEDS = (*PARSERS, *ITEMS[1:])


def read(folder: Path, skipped: Skipped, **names: str) -> Raw:
    """The rows of the two tables; ``names``: the column's name for each of ``NEEDS``, "" for none.

    Raises ``ValueError`` naming a column that is not there, or for too many bad rows;
    ``FileNotFoundError`` naming the files looked for.
    """
    path, items_path = (
        find(folder, [name + suffix for suffix in SUFFIXES], only=True)
        for name in ("interactions", "items")
    )
    optional = {"rating"} if names["time"] else {"rating", "time"}
    found, rows = _rows(path, skipped, {need: names[need] for need in PARSERS}, optional)
    table, order = parsed(rows, {n: PARSERS[n] for n in found}, path, skipped), Raw.order
    if "time" not in table:
        table.insert(2, "time", table["line"] * 1000)
        order = "file order: no time column was named"
    items = tables.catalogue(_items(items_path, skipped, names), items_path, skipped)
    items["raw"], table["item"] = _numbers(items["raw"], table["item"])
    (table["user"],) = _numbers(table["user"])
    return Raw(path, table, items, f"own data, {path.name}", "item", order=order)


def _items(path: Path, skipped: Skipped, names: dict[str, str]) -> Iterator[tuple]:
    found, rows = _rows(path, skipped, {need: names[need] for need in ITEMS}, {"year", "genres"})
    for line, *texts in rows:
        fields = {"year": "", "genres": ""} | dict(zip(found, texts))
        try:
            genres = filter(None, map(sanitise_text, _genres(fields["genres"])))
            year = re.match(r"\d{4}(?!\d)", fields["year"])
            title = sanitise_text(fields["title"])
            yield line, fields["item"], title, int(year[0]) if year else 0, "|".join(genres)
        except (ValueError, SyntaxError, TypeError, KeyError):
            skipped.add("unparsable field", path, line)


def _genres(text: str) -> list[str]:
    """The names in "A|B", "A; B" or "A, B", or in the text of a list of names or named dicts."""
    if not re.match(r"\[\s*[{'\"]", text):
        return re.split(r"[|;,]", text)
    return [name if isinstance(name, str) else name["name"] for name in ast.literal_eval(text)]


def _numbers(*columns: pd.Series) -> tuple[pd.Series, ...]:
    """Columns of ids as int64 if all are whole numbers in plainest form, else as they are.

    So they are ordered as numbers. "50.0" is 50, unless the first has both; "007" is a text.
    """
    if not all(column.str.fullmatch(WHOLE).all() for column in columns):
        return columns
    plain = tuple(column.str.replace(r"\.0+$", "", regex=True) for column in columns)
    same = plain[0].nunique() == columns[0].nunique()
    return tuple(column.astype(np.int64) for column in plain) if same else columns


def _rows(
    path: Path, skipped: Skipped, wanted: dict[str, str], optional: set[str]
) -> tuple[list[str], Iterator[tuple]]:
    """(the needs that have a column; line or row number, and their texts, of each row).

    ``wanted``: {need: name of its column}.
    """
    if path.suffix == ".parquet":
        table = _parquet(path, wanted, optional)
        found = {need: place for place, need in enumerate(table.column_names)}
        skipped.rows[path] += len(table)
        batches = (zip(*batch.to_pydict().values()) for batch in table.to_batches(CHUNK))
        rows = ((n, *row) for n, row in enumerate(chain.from_iterable(batches), 1))
    else:
        # RFC 4180: the last line may end without a newline, so one with all its fields counts.
        rows = Rows(path, skipped, separator="", terminated=False)
        found = _columns(path, rows.names, wanted, optional)
    places = found.values()
    return list(found), ((line, *(_text(row[p]) for p in places)) for line, *row in rows)


def _parquet(path: Path, wanted: dict[str, str], optional: set[str]) -> pa.Table:
    """The wanted columns, named as the needs."""
    try:
        names = pq.ParquetDataset(path).schema.names
        found = _columns(path, names, wanted, optional)
        table = pq.read_table(path, columns=[names[place] for place in found.values()])
        return pa.table({need: table[names[place]] for need, place in found.items()})
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        lack = f"{path}: no parquet file, or a damaged one ({reason})"
        raise ValueError(f"{lack}; write or fetch it again") from None


def _text(value: Any) -> str:
    """A value as text: integers exactly, "" for no value, whole floats without ".0"."""
    if value is None or value != value:
        return ""
    if isinstance(value, list):
        return "|".join(v["name"] if isinstance(v, dict) else str(v) for v in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).strip()


def _columns(
    path: Path, names: Sequence[str], wanted: dict[str, str], optional: set[str]
) -> dict[str, int]:
    """{need: place of its column}. An ``optional`` column may lack, unless one looks like it."""
    found, lower = {}, {name.lower(): name for name in names}
    for need, name in wanted.items():
        near = get_close_matches(name.lower(), lower, n=1, cutoff=0.7) if name else []
        if name in names:
            found[need] = list(names).index(name)
        elif near or need not in optional:
            remedy = f"set {need}_column to one of these"
            if near:
                remedy = f"did you mean {lower[near[0]]!r}? Set {need}_column={lower[near[0]]}"
            if need in optional:
                remedy += f", or leave {need}_column empty to do without"
            lack = f"{path}: no column {name!r} for {need}_column; the columns are"
            raise ValueError(f"{lack} {', '.join(map(repr, names))}; {remedy}")
    return found
