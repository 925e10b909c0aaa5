"""From raw rows to the three tables: counts of bad rows, filters, numbering; texts and times.

A loader reads its files into ``Raw``; ``assemble`` does the rest, the same for every format.
"""
# pyarrow.compute makes its functions at import, so pyright does not know them.
# pyright: reportAttributeAccessIssue=false

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pandera.pandas import Check, Column, DataFrameSchema

from recrl_lib.data.splits import GLOBAL_TIME, MIN_EVENTS, evaluable

SHORT_USER = f"user with fewer than {MIN_EVENTS} events"
BROKEN = "broken gzip"

_TOKEN = re.compile(r"<\|.*?\|>|<\||\|>|</?(?:s|pad|unk|bos|eos)>")
# Control characters but white space, surrogates, and what overrides the direction of writing;
# joiners stay: Persian words and emoji need them.
_HIDDEN = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_NUMBER = {
    np.int64: r"^-?(\d{1,18}|[0-8]\d{18})$",
    np.float64: r"^-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$",
}

_COUNT, _ITEM, _TEXT = Column("int64", Check.ge(0)), Column("int64", Check.ge(1)), Column(str)
_COLUMNS = {"user": _COUNT, "item": _ITEM, "time": Column("int64"), "year": _COUNT, "age": _COUNT}
_COLUMNS["rating"] = Column("float64", nullable=True, required=False)
INTERACTIONS, ITEMS, USERS = (
    DataFrameSchema({name: _COLUMNS.get(name, _TEXT) for name in names}, unique=key, strict=True)
    for key, names in (
        (["user", "item"], ("user", "item", "time", "rating")),
        (["item"], ("item", "title", "year", "genres", "text")),
        (["user"], ("user", "gender", "age")),
    )
)


@dataclass(frozen=True)
class Dataset:
    """The three tables, and ``info`` for ``dataset.json``.

    ``interactions``: user, item, time (seconds), rating if there is one, in time order. ``items``:
    item, title, year (0: unknown), genres ("A|B"), text. ``users``: user, gender, age. Users are
    0..U-1, items 1..I. With a global-time split, users without an event in each of the three
    periods (``n_unevaluated_users``) follow the others in the interactions, and only train.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    info: dict[str, Any]


@dataclass
class Skipped:
    """Counts what was left out, by kind, with the first example of each.

    ``limit``: largest share of a file's rows that may be bad. ``normal``: kinds that are in the
    nature of the format (a second review of the same book); they do not count against the limit.
    """

    limit: float = 0.01
    normal: frozenset[str] = frozenset((SHORT_USER,))
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    bad: Counter[Path] = field(default_factory=Counter)
    rows: Counter[Path] = field(default_factory=Counter)  # good or bad

    def add(self, kind: str, path: Path, lines: Any, n: int = 0) -> None:
        """Count the rows in ``lines`` (a number or an array, 1-based); ``n``: if they are more."""
        lines = np.atleast_1d(lines)
        if n := n or len(lines):
            self.counts[kind] += n
            self.first.setdefault(kind, f"{path.name} line {lines.min()}")
            self.bad[path] += n * (kind not in self.normal)

    def check(self, path: Path) -> None:
        """Raise ``ValueError`` when a file is broken or empty, or too many of its rows are bad."""
        rows, bad = self.rows[path], self.bad[path]
        if BROKEN in self.counts and self.limit < 1:  # nobody can count what is lost
            raise ValueError(
                f"{path.parent / self.first[BROKEN]}: the gzip file breaks off here or is damaged, "
                "and all that follows is lost: fetch it again, or set bad_row_limit=1 to go on "
                "with the rows before the break"
            )
        if not rows:
            empty = f"{path}: no rows; the file is empty"
            raise ValueError(f"{empty}: fetch it again, or name another folder with data_dir")
        if bad > self.limit * rows:
            kinds = [kind for kind in self.counts if kind not in self.normal]
            listed = (f"{self.counts[kind]} x {kind} (first: {self.first[kind]})" for kind in kinds)
            raise ValueError(
                f"{path}: {bad} of {rows} rows are unusable, more than bad_row_limit="
                f"{self.limit:g} allows: {'; '.join(listed)}. Repair those lines, fetch the file "
                "again, or raise bad_row_limit if you can do without them"
            )


@dataclass
class Raw:
    """What a loader has read, rows in file order; raw ids are all integers or all strings.

    ``interactions``: user, item, time (int64, milliseconds), line, and rating if there is one, from
    the file ``path``. ``items``: see ``catalogue``. ``users``: raw, gender, age, or None.
    """

    path: Path
    interactions: pd.DataFrame
    items: pd.DataFrame
    source: str
    noun: str  # what one item is
    users: pd.DataFrame | None = None
    order: str = "time, ties by file order"
    info: dict[str, Any] = field(default_factory=dict)


def catalogue(rows: Iterable[tuple], path: Path, skipped: Skipped) -> pd.DataFrame:
    """The items of (line, raw id, title, year, genres, author) rows, with the text of each.

    Rows without id or title are counted; of rows with equal ids the first is kept.
    """
    found = {}
    for line, raw, title, year, genres, *author in rows:
        if raw == "" or not title:
            skipped.add("missing field", path, line)
        elif raw in found:
            skipped.add("duplicate", path, line)
        else:
            found[raw] = raw, title, year, genres, item_text(title, year, genres, *author)
    skipped.check(path)
    return pd.DataFrame(found.values(), columns=["raw", "title", "year", "genres", "text"])


def item_text(title: str, year: int, genres: str, author: str = "") -> str:
    """What the LLM reads for one item, for example "Title (year) by Author. Genres: A, B."."""
    year_part = f" ({year})" if year else ""
    author_part = f" by {author}" if author else ""
    genre_part = f" Genres: {genres.replace('|', ', ')}." if genres else ""
    return f"{title}{year_part}{author_part}.{genre_part}"


def assemble(
    raw: Raw, skipped: Skipped, *, split: str, min_core: int, max_interactions: int
) -> Dataset:
    """The data set from what a loader has read.

    In this order: rows of items without metadata go, and of equal user-item pairs all but the
    first; rows are ordered by time, ties by file order; the latest window whose ``min_core``-core
    has ``max_interactions`` rows is kept (0: all); users with too few events to be split go
    (leave-one-out) or move to the end (global-time). Users and items are numbered in the order of
    their raw ids. Items that nobody met stay if ``min_core`` is 1. Raises ``ValueError`` if nothing
    is left.
    """
    rows, items = raw.interactions, raw.items.sort_values("raw", ignore_index=True)
    item = pd.Index(items["raw"]).get_indexer(rows["item"].to_list())
    user, raw_users = pd.factorize(rows["user"], sort=True)
    usable = _usable(raw, user, item, skipped)
    kept = usable[latest_core(user[usable], item[usable], min_core, max_interactions)]
    if split != GLOBAL_TIME:
        kept = _splittable(raw, user, usable, kept, skipped)
    if not len(kept):
        raise ValueError(
            f"{raw.path}: no interaction is left after the filters (min_core={min_core}); "
            "lower min_core, or give more data"
        )
    used_users, user = np.unique(user[kept], return_inverse=True)
    used_items = np.unique(item[kept]) if min_core > 1 else np.arange(len(items))
    item = np.searchsorted(used_items, item[kept]) + 1
    seconds = rows["time"].to_numpy()[kept] // 1000
    table = rows.iloc[kept].drop(columns="line").assign(user=user, item=item, time=seconds)
    table = table.reset_index(drop=True)
    items = items.loc[used_items].drop(columns="raw").reset_index(drop=True)
    items.insert(0, "item", np.arange(1, len(items) + 1))
    unknown = pd.DataFrame({"raw": raw_users, "gender": "", "age": 0})
    known = (unknown if raw.users is None else raw.users).set_index("raw")
    users, extra = known.loc[raw_users[used_users]].reset_index(drop=True), {}
    if split == GLOBAL_TIME:
        whole = evaluable(table, len(users))  # these users first
        if not whole.any():
            lack = "split='global-time': no user has events in all three periods"
            raise ValueError(f"{lack}; use split='leave-one-out', or data with longer histories")
        table["user"] = np.argsort(np.argsort(~whole, kind="stable"))[table["user"]]
        users, extra = users.loc[whole], {"n_unevaluated_users": int((~whole).sum())}
    users.insert(0, "user", np.arange(len(users)))
    users = users.reset_index(drop=True)
    info = {"source": raw.source, "noun": raw.noun, "n_users": len(users), "n_items": len(items)}
    info |= {"n_interactions": len(table), "order": raw.order, "split": split, "min_core": min_core}
    info |= extra | raw.info | {"skipped": dict(skipped.counts), "skipped_first": skipped.first}
    info["skipped_bad"] = sorted(skipped.counts.keys() - skipped.normal)
    return Dataset(INTERACTIONS.validate(table), ITEMS.validate(items), USERS.validate(users), info)


def _usable(raw: Raw, user: np.ndarray, item: np.ndarray, skipped: Skipped) -> np.ndarray:
    """Positions, in time order, of rows whose item is known (not -1), of equal pairs the first."""
    lines, known = raw.interactions["line"].to_numpy(), item >= 0
    pairs = pd.Series(np.where(known, user * np.int64(len(raw.items)) + item, -1))
    repeated = known & pairs.duplicated().to_numpy()
    skipped.add("item without metadata", raw.path, lines[~known])
    skipped.add("duplicate", raw.path, lines[repeated])
    skipped.check(raw.path)
    kept = np.flatnonzero(known & ~repeated)
    return kept[np.argsort(raw.interactions["time"].to_numpy()[kept], kind="stable")]


def _splittable(
    raw: Raw, user: np.ndarray, usable: np.ndarray, kept: np.ndarray, skipped: Skipped
) -> np.ndarray:
    """Those of the ``kept`` rows whose user has enough events for leave-one-out.

    Counted are users with too few ``usable`` rows, and those to whom the filters left too few.
    """
    size = user.max(initial=0) + 1
    given, left = (np.bincount(user[rows], minlength=size) for rows in (usable, kept))
    short = ((given > 0) & (given < MIN_EVENTS)) | ((left > 0) & (left < MIN_EVENTS))
    if short.any():
        first = raw.interactions["line"].to_numpy()[usable[short[user[usable]]]].min()
        skipped.add(SHORT_USER, raw.path, first, int(short.sum()))
    return kept[left[user[kept]] >= MIN_EVENTS]


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Positions of the largest set of rows in which each user and each item has ``k`` or more."""
    kept = np.arange(len(user))
    while len(kept):
        counts = (np.bincount(ids[kept])[ids[kept]] for ids in (user, item))
        enough = np.minimum(*counts) >= k
        if enough.all():
            break
        kept = kept[enough]
    return kept


def latest_core(user: np.ndarray, item: np.ndarray, k: int, size: int) -> np.ndarray:
    """Positions of the k-core of the shortest window of last rows whose core has ``size`` rows.

    All rows' core if none has, or for size 0. A longer window's core contains a shorter one's, so
    the window is found by bisection.
    """
    whole = k_core(user, item, k)
    if not 0 < size < len(whole):
        return whole
    starts = range(len(user))
    start = bisect_right(starts, -size, key=lambda n: -len(k_core(user[n:], item[n:], k))) - 1
    return start + k_core(user[start:], item[start:], k)


def sanitise_text(text: str) -> str:
    """``text`` as one plain line without control characters and chat-template tokens.

    Repeated until nothing changes, since cutting a token out can join the halves of another.
    """
    while True:
        plain = " ".join(_TOKEN.sub("", _HIDDEN.sub("", text)).split())
        if plain == text:
            return text
        text = plain


def milliseconds(values: Any) -> np.ndarray:
    """Unix times as int64 milliseconds; the size of each tells its unit (s, ms, µs or ns).

    The borders are 1e11, 1e14 and 1e17: 1e11 s is the year 5138, 1e11 ms March 1973.
    """
    values = np.asarray(values, np.int64)
    size = np.abs(values.astype(np.float64))
    choices = [values * 1000, values, values // 1000]
    return np.select([size < 1e11, size < 1e14, size < 1e17], choices, values // 1_000_000)


def parse_times(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(int64 milliseconds since 1970 (UTC), bool: whether it is a time) of a column of texts.

    A time is a Unix time in any unit, an ISO 8601 date, or as in "01 7, 2015".
    """
    time, good = parse_integers(texts)
    time, rest = milliseconds(time), ~good
    if rest.any():
        texts = texts.filter(rest)
        number, finite = parse_numbers(texts)
        finite &= np.abs(number) < 2**63
        number[~finite] = 0
        days = texts.to_pandas().str.strip()
        moment, other = (
            pd.to_datetime(days, format=form, utc=True, errors="coerce").dt.as_unit("ms")
            for form in ("ISO8601", "%m %d, %Y")
        )
        moment = moment.fillna(other)
        # The unit first: a float holds seconds to the microsecond, but not as nanoseconds.
        number = np.where(np.abs(number) < 1e11, number * 1000, milliseconds(number))
        time[rest] = np.where(finite, number.astype(np.int64), moment.astype("int64"))
        good[rest] = finite | moment.notna()
    return time, good


def parse_numbers(texts: pa.Array, kind: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of ``kind``, bool: whether it is a finite number) of a column of texts."""
    texts = pc.utf8_trim_whitespace(texts)
    good = pc.match_substring_regex(texts, _NUMBER[kind])
    numbers = pc.if_else(good, texts, "0").cast(pa.from_numpy_dtype(kind)).to_numpy()
    return numbers.copy(), np.array(good) & np.isfinite(numbers)


parse_integers = partial(parse_numbers, kind=np.int64)
