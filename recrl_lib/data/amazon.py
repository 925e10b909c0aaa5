"""Amazon Books reviews of 2014, 2018 and 2023 (McAuley lab): fantasy and romance books.

Two files of JSON lines, plain or gzip. The metadata say which books are fantasy or romance; of the
reviews only those of such books are kept. ``categories`` of 2014 are lists in a list, and its lines
of metadata are Python literals.
"""
# pyarrow.compute makes its functions at import, so pyright does not know them.
# pyright: reportAttributeAccessIssue=false

import ast
import html
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from recrl_lib.data.reading import blocks, find
from recrl_lib.data.tables import Raw, Skipped, catalogue, milliseconds, parse_times, sanitise_text

_NAMES = ("Books.jsonl", "Books.json", "Books_5.json", "reviews_Books.json", "reviews_Books_5.json")
REVIEWS = [name + suffix for name in _NAMES for suffix in ("", ".gz")]
METADATA = [f"meta_Books.{kind}{suffix}" for kind in ("jsonl", "json") for suffix in ("", ".gz")]
GENRES = {"fantasy", "romance"}  # "Science Fiction & Fantasy" is another category
# In the nature of the data: people review a book twice; metadata lack books, titles, categories.
NORMAL = frozenset(("duplicate", "item without metadata", "metadata without a title"))
FIELDS = {  # what they are called in one year or another
    "user": ("reviewerID", "user_id", pa.string()),
    "item": ("parent_asin", "asin", pa.string()),
    "time": ("unixReviewTime", "timestamp", pa.int64()),  # seconds, milliseconds
    "rating": ("overall", "rating", pa.float64()),
    "date": ("reviewTime", "reviewTime", pa.string()),  # "01 7, 2015", where there is no time
}
_SCHEMA = pa.schema({name: kind for *names, kind in FIELDS.values() for name in names})
_PARSE = pj.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")
_AUTHOR = re.compile(r"(?s)^Visit Amazon's (.*) Page$|\s*\((?:Author|Editor|Illustrator)\).*$")


def read(folder: Path, skipped: Skipped) -> Raw:
    """The fantasy and romance reviews. Raises ``ValueError`` also if there is none."""
    path = find(folder, REVIEWS)
    items, known = metadata(find(folder, METADATA), skipped)
    parts = []
    reviews = (_reviews(text, number, path, skipped) for number, text in blocks(path, skipped))
    for table in chain.from_iterable(reviews):
        index, names = pd.factorize(table["item"])  # each id once
        keys = np.array([raw.encode() for raw in names], bytes)
        found = known[np.searchsorted(known, keys).clip(max=len(known) - 1)] == keys
        skipped.add("item without metadata", path, table["line"].to_numpy()[~found[index]])
        parts.append(table.loc[pd.Index(names).isin(items["raw"].to_list())[index]])
    skipped.check(path)
    if not sum(map(len, parts)):
        lack = f"{path}: no review of a fantasy or romance book"
        raise ValueError(f"{lack}; do the reviews and the metadata belong together?")
    table = pd.concat(parts, ignore_index=True)
    counts = {"n_reviews": skipped.rows[path], "n_books": len(known)}
    info = counts | {"filter": "books in a category fantasy or romance"}
    return Raw(path, table, items, f"Amazon Books reviews, {path.name}", "book", info=info)


def _reviews(text: bytes, number: int, path: Path, skipped: Skipped) -> Iterator[pd.DataFrame]:
    """Yield the usable reviews of ``text``, whose first line is ``number``.

    Arrow reads a text whole or not at all, so one that it refuses is halved until the odd line is
    alone and can be counted.
    """
    n_lines = text.count(b"\n") + (not text.endswith(b"\n"))
    table = _arrow(text, n_lines)
    if table is None and n_lines > 1:
        half = (text.rfind(b"\n", 0, len(text) // 2) + 1) or text.find(b"\n") + 1
        yield from _reviews(text[:half], number, path, skipped)
        yield from _reviews(text[half:], number + text.count(b"\n", 0, half), path, skipped)
        return
    skipped.rows[path] += n_lines
    if table is None:
        skipped.add(_kind(text), path, number)
        return
    columns = {
        name: pc.coalesce(table[a], table[b]).combine_chunks() for name, (a, b, _) in FIELDS.items()
    }
    stamp, date = columns["time"], columns.pop("date")
    time, good = milliseconds(pc.fill_null(stamp, 0)), np.array(stamp.is_valid())
    missing = ~good
    if missing.any():
        dates = pc.fill_null(date.filter(missing), "")
        time[missing], good[missing] = parse_times(dates)
        missing[missing] = pc.equal(dates, "")
    frame = pd.DataFrame(columns | {"time": time})
    missing |= (frame.isna() | (frame == "")).any(axis=1).to_numpy()
    frame["line"] = number + frame.index
    skipped.add("missing field", path, frame["line"][missing])
    skipped.add("unparsable field", path, frame["line"][~missing & ~good])
    yield frame.loc[~missing & good]


def _arrow(text: bytes, n_lines: int) -> pa.Table | None:
    """The table of a text in which every line is a review, else None."""
    try:
        text.isascii() or text.decode("utf-8")
        options = pj.ReadOptions(use_threads=False, block_size=len(text) + 1)
        table = pj.read_json(pa.BufferReader(text), options, _PARSE)
    except (UnicodeDecodeError, pa.ArrowInvalid):
        return None
    return table if len(table) == n_lines else None


def _kind(line: bytes) -> str:
    """What is wrong with a line that Arrow cannot read."""
    try:
        return "unparsable field" if isinstance(json.loads(line.decode()), dict) else "bad JSON"
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "bad JSON" if line.endswith(b"\n") else "cut last line"


def metadata(path: Path, skipped: Skipped) -> tuple[pd.DataFrame, np.ndarray]:
    """(the fantasy and romance books, see ``catalogue``; sorted ids, as bytes, of all books)."""
    ids: list[bytes] = []

    def books() -> Iterator[tuple]:
        for line, record in _records(path, skipped):
            raw = record.get("parent_asin") or record.get("asin")
            if not isinstance(raw, str):
                skipped.add("missing field", path, line)
                continue
            ids.append(raw.encode())
            names = _categories(record)
            if GENRES.isdisjoint(name.lower() for name in names):
                continue
            title = _plain(record.get("title"))
            # In 2018 some have a script of the shop's page in the title's place.
            if not title or "getTime" in title:
                skipped.add("metadata without a title", path, line)
            else:
                genres = dict.fromkeys(_plain(name).replace("|", "/") for name in names)
                yield line, raw, title, 0, "|".join(genres), _author(record)

    items = catalogue(books(), path, skipped)
    if items.empty:
        lack = f"{path}: no book of the metadata is in a category called fantasy or romance"
        raise ValueError(f"{lack}; is this the metadata of Books?")
    return items, np.unique(np.array(ids))


def _records(path: Path, skipped: Skipped) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, block in blocks(path, skipped):
        lines = block.splitlines()
        skipped.rows[path] += len(lines)
        for n, line in enumerate(lines, number):
            try:
                text = line.decode("utf-8")
                try:
                    record = json.loads(text)
                except json.JSONDecodeError:
                    record = ast.literal_eval(text.strip())  # as in 2014; never evaluated
                yield n, dict(record.items())
            except UnicodeDecodeError:
                skipped.add("not UTF-8", path, n)
            except (ValueError, SyntaxError, RecursionError, AttributeError):
                skipped.add("bad JSON", path, n)


def _categories(record: dict[str, Any]) -> list[str]:
    """The names as they are, without "Books"."""
    paths = record.get("category") or record.get("categories") or []
    names = (name for path in paths for name in (path if isinstance(path, list) else [path]))
    return [name for name in names if isinstance(name, str) and name.strip() not in ("", "Books")]


def _author(record: dict[str, Any]) -> str:
    author = record.get("author")
    name = author.get("name") if isinstance(author, dict) else author
    name = _plain(name or record.get("brand") or record.get("store"))
    return _AUTHOR.sub(lambda found: found[1] or "", name)


def _plain(text: Any) -> str:
    return sanitise_text(html.unescape(text)) if isinstance(text, str) else ""
