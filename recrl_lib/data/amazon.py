"""Amazon Books reviews of 2014, 2018 and 2023 (McAuley lab): JSON lines, plain or gzip, of fantasy and romance books.

Two files, each read once and never held whole: the metadata says which books are fantasy or romance, and of the reviews only those
of such books are kept. What differs between the years is what fields are called:

====================  ==============================  ==============================  ========================================
..                    2014                            2018                            2023
====================  ==============================  ==============================  ========================================
files                 reviews_Books, meta_Books       Books, meta_Books (.json)       Books, meta_Books (.jsonl)
user, item            reviewerID, asin                reviewerID, asin                user_id, parent_asin
rating                overall                         overall                         rating
time                  unixReviewTime (seconds)        unixReviewTime, reviewTime      timestamp (milliseconds)
metadata              Python literals; categories is  category; author in brand       author (a dictionary), store, categories
                      a list of paths
====================  ==============================  ==============================  ========================================

A block of lines that is clean goes through Arrow's JSON reader; a block with anything odd in it is read again line by line, which
finds the odd lines, names them, and keeps the others.
"""

import ast
import html
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from recrl_lib.data.reading import blocks
from recrl_lib.data.tables import Raw, Skipped, item_text, milliseconds, parse_time, sanitise_text

REVIEWS = (
    "Books.jsonl",
    "Books.json",
    "Books_5.json",
    "reviews_Books.json",
    "reviews_Books_5.json",
)
METADATA = ("meta_Books.jsonl", "meta_Books.json")
GENRES = frozenset(
    ("fantasy", "romance")
)  # names of categories, in lower case; "Science Fiction & Fantasy" is another
# In the nature of the data: people review a book twice, and metadata lack books, titles and categories.
NORMAL = frozenset(("duplicate", "item without metadata", "metadata without a title"))
_FIELDS = {
    "reviewerID": pa.string(),
    "user_id": pa.string(),
    "asin": pa.string(),
    "parent_asin": pa.string(),
    "overall": pa.float64(),
    "rating": pa.float64(),
    "unixReviewTime": pa.int64(),
    "timestamp": pa.int64(),
}
_PARSE = pj.ParseOptions(explicit_schema=pa.schema(_FIELDS), unexpected_field_behavior="ignore")
_AUTHOR = re.compile(
    r"^Visit Amazon's (.*) Page$|\s*\((?:Author|Editor|Illustrator)\).*$", re.DOTALL
)


class _Skip(Exception):
    """The line is unusable; the argument is the kind."""


def read(folder: Path, skipped: Skipped) -> Raw:
    """The fantasy and romance reviews. Raises ``ValueError`` for too many bad rows or none of use; ``FileNotFoundError``."""
    path = find(folder, REVIEWS)
    items, known = metadata(find(folder, METADATA), skipped)
    if items.empty:
        wanted = " or ".join(sorted(GENRES))
        raise ValueError(
            f"{folder}: no book of the metadata is in a category called {wanted}; is this the metadata of Books?"
        )
    table, seen = reviews(path, items["raw"].to_numpy(), known, skipped)
    info = {
        "n_reviews": seen,
        "n_books": len(known),
        "filter": "books in a category " + " or ".join(sorted(GENRES)),
    }
    return Raw(path, seen, table, items, f"Amazon Books reviews, {path.name}", "book", info=info)


def find(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of ``names`` in ``folder``, as it is or with .gz."""
    paths = [folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
    if not (found := [path for path in paths if path.is_file()]):
        looked_for = ", ".join(path.name for path in paths)
        raise FileNotFoundError(
            f"{folder} must hold one of {looked_for}; put it there, or name another folder with data_dir"
        )
    return found[0]


# --- reviews -----------------------------------------------------------------------------------------


def reviews(
    path: Path, wanted: np.ndarray, known: np.ndarray, skipped: Skipped
) -> tuple[pd.DataFrame, int]:
    """(rows of the reviews of the ``wanted`` items: user, item, time, rating, line; how many reviews there were in all).

    ``wanted``: raw ids as texts. ``known``: sorted ids (fixed-width bytes) of all books with metadata.
    """
    place = {raw: n for n, raw in enumerate(wanted)}
    parts, seen = [], 0
    for number, block in blocks(path, skipped):
        lines, user, item, rating, time = clean_reviews(block, number) or dirty_reviews(
            block, number, path, skipped
        )
        seen += block.count(b"\n") + (not block.endswith(b"\n"))
        encoded = item.dictionary_encode()  # each id of the block once
        ids, index = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        code = np.array([place.get(raw, -1) for raw in ids], np.int64)
        skipped.add_rows("item without metadata", path, lines[~contained(known, ids)[index]])
        keep = np.flatnonzero(code[index] >= 0)
        kept = (
            user.take(pa.array(keep)),
            code[index[keep]].astype(np.int32),
            time[keep],
            rating[keep].astype(np.float32),
            lines[keep],
        )
        parts.append(kept)
    skipped.check(path, seen)
    if not parts or not any(len(part[1]) for part in parts):
        raise ValueError(
            f"{path}: no review of a fantasy or romance book; do the reviews and the metadata belong together?"
        )
    users, codes, times, ratings, lines = zip(*parts)
    return pd.DataFrame(
        {
            "user": pa.chunked_array(users).to_pandas(),
            "item": pd.Series(wanted).take(np.concatenate(codes)).to_numpy(),
            "time": np.concatenate(times),
            "rating": np.concatenate(ratings).astype(np.float64),
            "line": np.concatenate(lines),
        }
    ), seen


Columns = tuple[
    np.ndarray, pa.Array, pa.Array, np.ndarray, np.ndarray
]  # line, user, item, rating, time (milliseconds)


def clean_reviews(block: bytes, number: int) -> Columns | None:
    """The reviews of a block in which nothing is odd, by Arrow; None if anything is. ``number``: its first line."""
    rows = block.count(b"\n") + (not block.endswith(b"\n"))
    try:
        block.isascii() or block.decode("utf-8")
        options = pj.ReadOptions(use_threads=False, block_size=len(block) + 1)
        table = pj.read_json(
            pa.BufferReader(block), read_options=options, parse_options=_PARSE
        ).combine_chunks()
    except (UnicodeDecodeError, pa.ArrowInvalid):
        return None
    user, item, rating, time = (
        pc.coalesce(table[old], table[new]).combine_chunks()
        for old, new in (
            ("reviewerID", "user_id"),
            ("parent_asin", "asin"),
            ("overall", "rating"),
            ("unixReviewTime", "timestamp"),
        )
    )
    if len(table) != rows or any(column.null_count for column in (user, item, rating, time)):
        return None
    if (
        any(pc.min(pc.binary_length(ids)).as_py() == 0 for ids in (user, item))
        or not np.isfinite(rating.to_numpy()).all()
    ):
        return None
    return (
        np.arange(number, number + rows),
        user,
        item,
        rating.to_numpy(),
        milliseconds(time.to_numpy()),
    )


def dirty_reviews(block: bytes, number: int, path: Path, skipped: Skipped) -> Columns:
    """The usable reviews of any block, line by line; the others are counted."""
    found = list(_records(block, number, path, skipped, json.loads, _review))
    lines, users, items, ratings, times = zip(*found) if found else ((), (), (), (), ())
    return (
        np.array(lines, np.int64),
        pa.array(users, pa.string()),
        pa.array(items, pa.string()),
        np.array(ratings, np.float64),
        np.array(times, np.int64),
    )


def _review(record: dict[str, Any]) -> tuple[str, str, float, int]:
    user, item, rating = (
        _first(record, *names)
        for names in (("reviewerID", "user_id"), ("parent_asin", "asin"), ("overall", "rating"))
    )
    time = _first(record, "unixReviewTime", "timestamp", "reviewTime")
    if not isinstance(user, str) or not isinstance(item, str):
        raise ValueError
    rating = float(rating)
    if not np.isfinite(rating):
        raise ValueError
    return user, item, rating, parse_time(time)


def _first(record: dict[str, Any], *names: str) -> Any:
    for name in names:
        if record.get(name) not in (None, ""):
            return record[name]
    raise _Skip("missing field")


def _records(
    block: bytes,
    number: int,
    path: Path,
    skipped: Skipped,
    load: Callable[[str], Any],
    parse: Callable[[dict], tuple],
) -> Iterator[tuple]:
    """(line number, *``parse``(record)) of each usable line of a block."""
    for n, line in enumerate(io.BytesIO(block), number):
        try:
            record = load(line.decode("utf-8"))
            if not isinstance(record, dict):
                raise _Skip("bad JSON")
            yield n, *parse(record)
        except _Skip as reason:
            skipped.add(str(reason), path, n)
        except UnicodeDecodeError:
            skipped.add("not UTF-8", path, n)
        except (json.JSONDecodeError, SyntaxError, RecursionError):
            skipped.add("bad JSON" if line.endswith(b"\n") else "cut last line", path, n)
        except (ValueError, TypeError, OverflowError):
            skipped.add("unparsable field", path, n)


# --- metadata ----------------------------------------------------------------------------------------


def metadata(path: Path, skipped: Skipped) -> tuple[pd.DataFrame, np.ndarray]:
    """(fantasy and romance books: raw, title, year, genres, text; sorted ids, as fixed-width bytes, of all books that there are)."""
    out, ids, rows = {}, [], 0
    for number, block in blocks(path, skipped):
        rows += block.count(b"\n") + (not block.endswith(b"\n"))
        found = list(_records(block, number, path, skipped, _load_literal, _book))
        ids.append(np.array([raw.encode() for _, raw, *_ in found], bytes))
        for line, raw, genres, record in found:
            if GENRES.isdisjoint(genre.lower() for genre in genres):
                continue
            title, by = _plain(record.get("title")), _author(record)
            if raw in out:
                skipped.add("duplicate", path, line)
            elif (
                not title or "getTime" in title
            ):  # in 2018 some have a script of the shop's page in its place
                skipped.add("metadata without a title", path, line)
            else:
                text = "|".join(dict.fromkeys(_plain(genre).replace("|", "/") for genre in genres))
                out[raw] = raw, title, 0, text, item_text(title, 0, text, by)
    skipped.check(path, rows)
    return pd.DataFrame(
        out.values(), columns=["raw", "title", "year", "genres", "text"]
    ), np.unique(np.concatenate(ids))


def contained(known: np.ndarray, ids: list[str]) -> np.ndarray:
    """(n,) bool: which of ``ids`` the sorted bytes ``known`` hold."""
    keys = np.array([raw.encode() for raw in ids], bytes)
    return known[np.searchsorted(known, keys).clip(max=len(known) - 1)] == keys


def _load_literal(line: str) -> Any:
    """A line of JSON, or, as in 2014, a Python literal (read, never evaluated)."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return ast.literal_eval(line.strip())


def _book(record: dict[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """(raw id, category names as they are, without "Books"; the record)."""
    raw = _first(record, "parent_asin", "asin")
    if not isinstance(raw, str):
        raise ValueError
    paths = record.get("category") or record.get("categories") or []
    names = (name for path in paths for name in (path if isinstance(path, list) else [path]))
    return (
        raw,
        [name for name in names if isinstance(name, str) and name.strip() not in ("", "Books")],
        record,
    )


def _author(record: dict[str, Any]) -> str:
    author = record.get("author")
    by = (
        (author.get("name") if isinstance(author, dict) else author)
        or record.get("brand")
        or record.get("store")
    )
    return _AUTHOR.sub(lambda found: found[1] or "", _plain(by))


def _plain(text: Any) -> str:
    return sanitise_text(html.unescape(text)) if isinstance(text, str) else ""
