"""Bring your own data: ``interactions`` and ``items``, each ``.csv``, ``.csv.gz`` or ``.parquet``.

The parameters ``user_column`` to ``genres_column`` name the columns. Needed are user and item in
the interactions, item and title in the items. A time is a Unix time in any unit, an ISO 8601 date
or "01 7, 2015"; without one file order counts. A rating may be blank. Genres are separated by
``|``, ``;`` or commas, or are a list of names. CSV is separated by commas, tabs or semicolons (then
with decimal commas), in UTF-8 or UTF-16; a Parquet table may be a folder of part files.
"""
# pyarrow.compute makes its functions at import, so pyright does not know them.
# pyright: reportAttributeAccessIssue=false

import ast
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recrl_lib.data import tables
from recrl_lib.data.reading import Rows, find, usable
from recrl_lib.data.tables import Raw, Skipped, sanitise_text

SUFFIXES = (".csv", ".csv.gz", ".parquet")
WHOLE = r"(?:0|[1-9]\d{0,17})(?:\.0+)?"


def _ratings(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, NaN where blank."""
    blank = pc.equal(texts, "")
    rating, good = tables.parse_numbers(pc.if_else(blank, "0", texts))
    return np.where(blank, np.nan, rating), good


def _ids(texts: pa.Array) -> tuple[list[str], bool]:
    return texts.to_pylist(), True


INTERACTIONS = {"user": _ids, "item": _ids, "time": tables.parse_times, "rating": _ratings}
ITEMS = ("item", "title", "year", "genres")
NEEDS = (*INTERACTIONS, *ITEMS[1:])


def read(folder: Path, skipped: Skipped, names: dict[str, str]) -> Raw:
    """The rows of the two tables; ``names`` maps each of ``NEEDS`` to a column's name, "" for none.

    Raises ``ValueError`` naming a column that is not there, or for too many bad rows;
    ``FileNotFoundError`` naming the files looked for.
    """
    path, items_path = (
        find(folder, [name + suffix for suffix in SUFFIXES], only=True)
        for name in ("interactions", "items")
    )
    optional = {"rating"} if names["time"] else {"rating", "time"}
    parts = []
    for lines, fields in _chunks(path, skipped, {n: names[n] for n in INTERACTIONS}, optional):
        columns = {need: (texts, INTERACTIONS[need]) for need, texts in fields.items()}
        parts.append(usable(columns, lines, path, skipped))
    table, order = pd.concat(parts, ignore_index=True), Raw.order
    if "time" not in table:
        table.insert(2, "time", table["line"] * 1000)
        order = "file order: no time column was named"
    items = tables.catalogue(_items(items_path, skipped, names), items_path, skipped)
    items["raw"], table["item"] = _numbers([items["raw"], table["item"]])
    (table["user"],) = _numbers([table["user"]])
    return Raw(path, table, items, f"own data, {path.name}", "item", order=order)


def _items(path: Path, skipped: Skipped, names: dict[str, str]) -> Iterator[tuple]:
    wanted = {need: names[need] for need in ITEMS}
    for lines, fields in _chunks(path, skipped, wanted, {"year", "genres"}):
        columns = (fields[n].to_pylist() if n in fields else [""] * len(lines) for n in ITEMS)
        for line, raw, title, year, genres in zip(lines.tolist(), *columns):
            try:
                genres = filter(None, map(sanitise_text, _genres(genres)))
                year = int(found[0]) if (found := re.match(r"\d{4}(?!\d)", year)) else 0
                yield line, raw, sanitise_text(title), year, "|".join(genres)
            except (ValueError, SyntaxError, TypeError, KeyError):
                skipped.add("unparsable field", path, line)


def _genres(text: str) -> list[str]:
    """The names in "A|B", "A; B" or "A, B", or in the text of a list of names or named dicts."""
    if not re.match(r"\[\s*[{'\"]", text):
        return re.split(r"[|;,]", text)
    return [name if isinstance(name, str) else name["name"] for name in ast.literal_eval(text)]


def _numbers(columns: list[Any]) -> list[Any]:
    """Columns of ids as int64 if all are whole numbers in plainest form, else as they are.

    So they are ordered as numbers. "50.0" is 50, unless the first has both; "007" is a text.
    """
    if not all(column.str.fullmatch(WHOLE).all() for column in columns):
        return columns
    plain = [column.str.replace(r"\.0+$", "", regex=True) for column in columns]
    same = plain[0].nunique() == columns[0].nunique()
    return [column.astype(np.int64) for column in plain] if same else columns


def _chunks(
    path: Path, skipped: Skipped, wanted: dict[str, str], optional: set[str]
) -> Iterator[tuple[np.ndarray, dict[str, pa.Array]]]:
    """Yield (line or row numbers (n,), {need: n texts}); ``wanted``: {need: name of its column}."""
    if path.suffix == ".parquet":
        fields = _parquet(path, wanted, optional)
        lines = np.arange(1, len(fields["item"]) + 1)
        skipped.rows[path] += len(lines)
        yield lines, fields
        skipped.check(path)
        return
    # RFC 4180: the last line may end without a newline, so one that has all its fields counts.
    rows = Rows(path, skipped, separator="", terminated=False)
    found = _columns(path, rows.names, wanted, optional)
    for lines, columns in rows:
        fields = {n: pc.utf8_trim_whitespace(columns[place]) for n, place in found.items()}
        if "rating" in fields and rows.separator == ";":
            fields["rating"] = pc.replace_substring(fields["rating"], ",", ".")
        yield lines, fields


def _parquet(path: Path, wanted: dict[str, str], optional: set[str]) -> dict[str, pa.Array]:
    try:
        names = pq.ParquetDataset(path).schema.names
        found = _columns(path, names, wanted, optional)
        table = pq.read_table(path, columns=[names[place] for place in found.values()])
        return {need: _texts(table[names[place]]) for need, place in found.items()}
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        lack = f"{path}: no parquet file, or a damaged one ({reason})"
        raise ValueError(f"{lack}; write or fetch it again") from None


def _texts(column: pa.ChunkedArray) -> pa.Array:
    """A column as texts: integers exactly, "" for no value, whole floats without ".0"."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type) or pa.types.is_nested(column.type):
        return pa.array(map(_text, column.to_pylist()), pa.string())
    return pc.utf8_trim_whitespace(pc.fill_null(column.cast(pa.string()), "").combine_chunks())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(v["name"] if isinstance(v, dict) else str(v) for v in value)
    if value is None or value != value:
        return ""
    return str(int(value)) if value.is_integer() else str(value)


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
            hint = f"set {need}_column to one of these"
            if near:
                hint = f"did you mean {lower[near[0]]!r}? Set {need}_column={lower[near[0]]}"
            without = f", or leave {need}_column empty to do without" * (need in optional)
            lack = f"{path}: no column {name!r} for {need}_column"
            there = ", ".join(map(repr, names))
            raise ValueError(f"{lack}; the columns are {there}; {hint}{without}")
    return found
