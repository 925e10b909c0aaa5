"""Bring your own data: two tables in a folder, ``interactions`` and ``items``, each ``.csv`` (or ``.csv.gz``) or ``.parquet``.

Which column is what is said by the parameters ``user_column`` to ``genres_column``. Needed are user and item in the interactions, and
item and title in the items; a time may be a Unix time in any unit, an ISO 8601 date or "01 7, 2015", and without one file order
counts. A rating may be blank, and is then NaN. Genres are separated by ``|``, ``;`` or commas.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from recrl_lib.data.reading import Rows, columns
from recrl_lib.data.tables import Raw, Skipped, item_text, parse_numbers, parse_times, sanitise_text

NEEDS = (
    "user",
    "item",
    "time",
    "rating",
    "title",
    "year",
    "genres",
)  # of which the file of that name holds:
INTERACTIONS, ITEMS = ("user", "item", "time", "rating"), ("item", "title", "year", "genres")
SUFFIXES = (".csv", ".csv.gz", ".parquet")


def read(folder: Path, skipped: Skipped, names: dict[str, str]) -> Raw:
    """The rows of the two tables; ``names`` maps each of ``NEEDS`` to a column's name, "" for none.

    Raises ``ValueError`` naming a column that is not there, the columns present and the nearest match, or for too many bad rows;
    ``FileNotFoundError`` naming the files looked for.
    """
    path = _find(folder, "interactions")
    optional = ("rating",) if names["time"] else ("rating", "time")
    rows = _Table(path, skipped, {need: names[need] for need in INTERACTIONS}, optional)
    timed, rated, parts = "time" in rows.found, "rating" in rows.found, []
    for lines, fields in rows:
        missing = np.array(
            [
                not (user.strip() and item.strip())
                for user, item in zip(fields["user"], fields["item"])
            ]
        )
        time, time_good = parse_times(fields["time"]) if timed else (lines * 1000, ~missing)
        rating, rating_good = (
            _ratings(fields["rating"]) if rated else (np.zeros(len(lines)), ~missing)
        )
        good = ~missing & time_good & rating_good
        skipped.add_rows("missing field", path, lines[missing])
        skipped.add_rows("unparsable field", path, lines[~missing & ~good])
        part = {"user": fields["user"], "item": fields["item"], "time": time, "line": lines} | (
            {"rating": rating} if rated else {}
        )
        parts.append(pd.DataFrame(part)[good])
    skipped.check(path, rows.total)
    table = pd.concat(parts, ignore_index=True)
    items = _items(_find(folder, "items"), skipped, names)
    for column in ("user", "item"):
        table[column] = table[column].str.strip()
    if all(_whole(column) for column in (items["raw"], table["item"])):
        items["raw"], table["item"] = items["raw"].astype(np.int64), table["item"].astype(np.int64)
    if _whole(table["user"]):
        table["user"] = table["user"].astype(np.int64)
    order = "time, ties by file order" if timed else "file order: no time column was named"
    return Raw(path, rows.total, table, items, f"own data, {path.name}", "item", order=order)


def _ratings(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(float64, NaN where there is none; bool: blank or a number) of a column of ratings."""
    blank = np.array([not text.strip() for text in texts], bool)
    rating, good = parse_numbers(
        ["0" if none else text for text, none in zip(texts, blank)], np.float64
    )
    return np.where(blank, np.nan, rating), good


def _items(path: Path, skipped: Skipped, names: dict[str, str]) -> pd.DataFrame:
    rows, out = (
        _Table(path, skipped, {need: names[need] for need in ITEMS}, optional=("year", "genres")),
        {},
    )
    for lines, fields in rows:
        blank = [""] * len(lines)
        given = (fields.get(need, blank) for need in ITEMS)
        for line, raw, title, year, genres in zip(lines, *given):
            raw, title = raw.strip(), sanitise_text(title)
            if not raw or not title:
                skipped.add("missing field", path, line)
            elif raw in out:
                skipped.add("duplicate", path, line)
            else:
                year = int(y[0]) if (y := re.match(r"\d{4}(?!\d)", year.strip())) else 0
                genres = "|".join(filter(None, map(sanitise_text, re.split(r"[|;,]", genres))))
                out[raw] = raw, title, year, genres, item_text(title, year, genres)
    skipped.check(path, rows.total)
    return pd.DataFrame(out.values(), columns=["raw", "title", "year", "genres", "text"])


class _Table:
    """A table's rows in chunks: (line or row numbers (n,), {need: n texts}); ``total`` rows so far, ``found`` the columns' places."""

    def __init__(
        self, path: Path, skipped: Skipped, wanted: dict[str, str], optional: Sequence[str]
    ):
        self.path = path
        # A CSV file of one's own may end without a newline (RFC 4180), so a last line that has all its fields counts.
        self._rows = None if path.suffix == ".parquet" else Rows(path, skipped, terminated=False)
        with _readable(path):
            self._file = pq.ParquetFile(path) if self._rows is None else None
            self.names = self._rows.names if self._rows else self._file.schema_arrow.names
        self.found = columns(path, self.names, wanted, optional)
        self._parquet_total = 0

    @property
    def total(self) -> int:
        return self._rows.total if self._rows else self._parquet_total

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict[str, Sequence[str]]]]:
        if self._rows:
            for lines, fields in self._rows:
                yield lines, {need: fields[place] for need, place in self.found.items()}
            return
        batches = self._file.iter_batches(
            100_000, columns=[self.names[place] for place in self.found.values()]
        )
        while True:
            with _readable(self.path):
                batch = next(batches, None)
            if batch is None:
                return
            lines = np.arange(1, len(batch) + 1) + self._parquet_total
            self._parquet_total += len(batch)
            yield (
                lines,
                {
                    need: _texts(batch.column(self.names[place]).to_pandas())
                    for need, place in self.found.items()
                },
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """pyarrow's errors about a parquet file do not say which one it is."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: no parquet file, or a damaged one ({reason}); write or fetch it again"
        ) from None


def _texts(column: pd.Series) -> list[str]:
    """A parquet column as texts, "" where there is no value; whole floats lose their ".0", lists are joined by "|"."""
    if isinstance(column.dtype, pd.DatetimeTZDtype) or column.dtype.kind == "M":
        return ["" if pd.isna(t) else t.isoformat() for t in column]
    return [_text(value) for value in column]


def _text(value) -> str:
    if isinstance(value, np.ndarray | list | tuple):
        return "|".join(map(str, value))
    if value is None or value is pd.NA or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _find(folder: Path, name: str) -> Path:
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    found = [path for path in paths if path.is_file()]
    if len(found) != 1:
        given = "several of them are there" if found else "none is there"
        looked_for = ", ".join(path.name for path in paths)
        raise FileNotFoundError(
            f"{folder} must hold one of {looked_for}: {given}. Set data_dir to the folder with your two tables"
        )
    return found[0]


def _whole(column: pd.Series) -> bool:
    """Whether every text is a whole number in its plainest form, so that ids may be ordered as numbers ("007" may not)."""
    return bool(column.str.fullmatch(r"0|[1-9]\d{0,17}").all())
