"""Amazon Books reviews of 2014, 2018 and 2023 (McAuley lab): fantasy and romance books.

Two files of JSON lines, plain or gzip. The metadata say which books are fantasy or romance; only
their reviews are kept. Metadata of 2014 are Python literals, their categories lists in a list.
"""

import ast
import html
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from recrl_lib.data.reading import CUT, NOT_UTF8, find, is_damaged, lines, parsed
from recrl_lib.data.tables import Raw, Skipped, catalogue, parse_numbers, parse_times, sanitise_text

_NAMES = ("Books.jsonl", "Books.json", "Books_5.json", "reviews_Books.json", "reviews_Books_5.json")
REVIEWS = [name + suffix for name in _NAMES for suffix in ("", ".gz")]
METADATA = [f"meta_Books.{kind}{suffix}" for kind in ("jsonl", "json") for suffix in ("", ".gz")]
GENRES = {"fantasy", "romance"}  # "Science Fiction & Fantasy" is another category
# In the nature of the data: people review a book twice; metadata lack books, titles, categories.
NORMAL = frozenset(("duplicate", "item without metadata", "metadata without a title"))
# What each field is called in one year or another; the first that a review has counts.
FIELDS = {
    "user": ("reviewerID", "user_id"),
    "item": ("parent_asin", "asin"),
    "time": ("unixReviewTime", "timestamp", "reviewTime"),  # s, ms, "01 7, 2015"
    "rating": ("overall", "rating"),
}
PARSERS = {"user": None, "item": None, "time": parse_times, "rating": parse_numbers}
_AUTHOR = re.compile(r"(?s)^Visit Amazon's (.*) Page$|\s*\((?:Author|Editor|Illustrator)\).*$")


def read(folder: Path, skipped: Skipped) -> Raw:
    """The fantasy and romance reviews. Raises ``ValueError`` also if there is none."""
    path = find(folder, REVIEWS)
    items, known = metadata(find(folder, METADATA), skipped)
    table = parsed(_reviews(path, skipped, known, set(items["raw"])), PARSERS, path, skipped)
    if table.empty:
        lack = f"{path}: no review of a fantasy or romance book"
        raise ValueError(f"{lack}; do the reviews and the metadata belong together?")
    kept = "books in a category fantasy or romance"
    info = {"n_reviews": skipped.rows[path], "n_books": len(known), "filter": kept}
    return Raw(path, table, items, f"Amazon Books reviews, {path.name}", "book", info=info)


def _reviews(path: Path, skipped: Skipped, known: set, wanted: set) -> Iterator[tuple]:
    """Yield (line, user, item, time, rating), texts, of the reviews of the ``wanted`` books."""
    for line, record in _records(path, skipped):
        user, item, time, rating = row = [
            next((record[name] for name in names if record.get(name) is not None), "")
            for names in FIELDS.values()
        ]
        if "" in row:
            skipped.add("missing field", path, line)
        elif not isinstance(user, str) or not isinstance(item, str):
            skipped.add("unparsable field", path, line)
        elif item not in known:
            skipped.add("item without metadata", path, line)
        elif item in wanted:
            yield line, user, item, str(time), str(rating)


def metadata(path: Path, skipped: Skipped) -> tuple[pd.DataFrame, set[str]]:
    """(the fantasy and romance books, see ``catalogue``; the ids of all books)."""
    ids: set[str] = set()

    def books() -> Iterator[tuple]:
        for line, record in _records(path, skipped):
            raw = record.get("parent_asin") or record.get("asin")
            if not isinstance(raw, str):
                skipped.add("missing field", path, line)
                continue
            ids.add(raw)
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
    return items, ids


def _records(path: Path, skipped: Skipped) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(lines(path, skipped), 1):
        skipped.rows[path] += 1
        damaged = is_damaged(text)
        record = None if damaged else _parsed(text.strip())
        if isinstance(record, dict):
            yield number, record
        else:
            kind = "bad JSON" if text.endswith("\n") else CUT
            skipped.add(NOT_UTF8 if damaged else kind, path, number)


def _parsed(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):  # a literal is never evaluated
        with suppress(ValueError, SyntaxError, TypeError, RecursionError):
            return parse(text)
    return None


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
