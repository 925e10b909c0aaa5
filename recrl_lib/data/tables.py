"""From a format's raw rows to the three tables: duplicates, k-core, window, short users, numbering; text and times.

A loader reads its files into ``Raw``; ``assemble`` does the rest, the same for every format.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from recrl_lib.data.splits import GLOBAL_TIME, MIN_EVENTS, evaluable

SHORT_USER = f"user with fewer than {MIN_EVENTS} events"
BROKEN = "broken gzip"

_SPECIAL = re.compile(r"<\|.*?\|>|<\||\|>|</?(?:s|pad|unk|bos|eos)>")


@dataclass(frozen=True)
class Dataset:
    """The three tables (columns in ``recrl_lib.__doc__``) and ``info``, the content of ``dataset.json``.

    ``info``: name, source, noun (what one item is: film, book, game, item), sha256 (of the raw interactions file), n_users, n_items,
    n_interactions, order (what decides the order of events), split, min_core, skipped (kind -> count), skipped_first (kind -> where the
    first one is), skipped_bad (the kinds that count against the limit), n_unevaluated_users (global-time split only: users that have
    no event in one of the three periods; their rows follow those of the ``n_users`` in the interactions, and only train).
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    info: dict[str, Any]


@dataclass
class Skipped:
    """What was left out, counted by kind, with the first example of each.

    ``limit``: largest share of a file's rows that may be bad. ``normal``: kinds that are in the nature of the format (a second review
    of the same book); they are counted and shown, but do not count against the limit. Nor do short users. ``broken``: the line where a
    compressed file breaks.
    """

    limit: float = 0.01
    normal: frozenset[str] = frozenset((SHORT_USER,))
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    bad: dict[Path, int] = field(default_factory=dict)
    broken: dict[Path, int] = field(default_factory=dict)

    def add(self, kind: str, path: Path, line: int, n: int = 1) -> None:
        """``n`` more rows of ``kind``, the first of them in ``line`` of ``path`` (1-based)."""
        self.counts[kind] = self.counts.get(kind, 0) + n
        self.first.setdefault(kind, f"{path.name} line {line}")
        if kind not in self.normal:
            self.bad[path] = self.bad.get(path, 0) + n
        if kind == BROKEN:
            self.broken[path] = line

    def add_rows(self, kind: str, path: Path, lines: np.ndarray) -> None:
        """The rows in ``lines``, if any."""
        if len(lines):
            self.add(kind, path, int(np.min(lines)), len(lines))

    def check(self, path: Path, rows: int) -> None:
        """Raise ``ValueError`` when the file is broken, held no row, or more than ``limit`` of its ``rows`` are bad."""
        if (
            path in self.broken and self.limit < 1
        ):  # what is lost cannot be counted, so no share of it can be allowed
            raise ValueError(
                f"{path} line {self.broken[path]}: the gzip file breaks off here or is damaged, and all that follows is lost: "
                "fetch it again, or set bad_row_limit=1 to go on with the rows before the break."
            )
        if not rows:
            raise ValueError(
                f"{path}: no rows; the file is empty: fetch it again, or name another folder with data_dir"
            )
        bad = self.bad.get(path, 0)
        if bad > self.limit * rows:
            kinds = "; ".join(
                f"{n} x {kind} (first: {self.first[kind]})"
                for kind, n in self.counts.items()
                if kind not in self.normal
            )
            raise ValueError(
                f"{path}: {bad} of {rows} rows are unusable, more than bad_row_limit={self.limit:g} allows: {kinds}. "
                "Repair those lines, fetch the file again, or raise bad_row_limit if you can do without them."
            )


@dataclass
class Raw:
    """What a loader has read. Rows are in file order; raw ids are all integers or all strings.

    ``interactions``: user, item, time (int64, milliseconds), line (int64), and rating if there is one; ``total``: rows of the file
    ``path``, bad ones included. ``items``: raw, title, year, genres, text; one row an id. ``users``: raw, gender, age; None if nothing
    is known of them.
    """

    path: Path
    total: int
    interactions: pd.DataFrame
    items: pd.DataFrame
    source: str
    noun: str
    users: pd.DataFrame | None = None
    order: str = "time, ties by file order"
    info: dict[str, Any] = field(default_factory=dict)


def assemble(
    raw: Raw, skipped: Skipped, *, split: str, min_core: int, max_interactions: int
) -> Dataset:
    """The data set from what a loader has read.

    In this order: rows of items without metadata go, and of equal user-item pairs all but the first; rows are ordered by time, ties by
    file order; the latest window whose ``min_core``-core has ``max_interactions`` rows is kept (0: all; ``min_core`` 1: no core filter);
    users with too few events to be split go (leave-one-out) or move to the end (global-time). Users are numbered 0..U-1 and items 1..I
    in the order of their raw ids. Without a core filter, items that nobody met stay: they can be recommended by their text.
    Raises ``ValueError`` if nothing is left.
    """
    rows, items = raw.interactions, raw.items.sort_values("raw", ignore_index=True)
    item = pd.Index(items["raw"]).get_indexer(rows["item"])
    user, raw_users = pd.factorize(rows["user"], sort=True)
    usable = _usable(raw, user, item, skipped)
    kept = usable[latest_core(user[usable], item[usable], min_core, max_interactions)]
    if split != GLOBAL_TIME:
        kept = _splittable(raw, user, usable, kept, skipped)
    if not len(kept):
        raise ValueError(
            f"{raw.path}: no interaction is left after the filters (min_core={min_core}); lower min_core, or give more data"
        )

    used_users, user = np.unique(user[kept], return_inverse=True)
    used_items = np.unique(item[kept]) if min_core > 1 else np.arange(len(items))
    table = pd.DataFrame(
        {
            "user": user.astype(np.int64),
            "item": np.searchsorted(used_items, item[kept]) + 1,
            "time": rows["time"].to_numpy()[kept] // 1000,
        }
    )
    if "rating" in rows:
        table["rating"] = rows["rating"].to_numpy()[kept]
    items = items.loc[used_items].drop(columns="raw").reset_index(drop=True)
    items.insert(0, "item", np.arange(1, len(items) + 1))
    ids = raw_users[used_users]
    known = (
        pd.DataFrame({"gender": "", "age": 0}, index=ids)
        if raw.users is None
        else raw.users.set_index("raw").loc[ids]
    )
    users, extra = known.reset_index(drop=True), {}
    if split == GLOBAL_TIME:
        table, users, extra["n_unevaluated_users"] = _evaluable_first(table, users)
    users.insert(0, "user", np.arange(len(users)))
    info = dict(
        source=raw.source,
        noun=raw.noun,
        n_users=len(users),
        n_items=len(items),
        n_interactions=len(table),
        order=raw.order,
        split=split,
        min_core=min_core,
        **extra,
        **raw.info,
        skipped=skipped.counts,
        skipped_first=skipped.first,
        skipped_bad=sorted(kind for kind in skipped.counts if kind not in skipped.normal),
    )
    return Dataset(table, items, users, info)


def _usable(raw: Raw, user: np.ndarray, item: np.ndarray, skipped: Skipped) -> np.ndarray:
    """Positions, in time order, of the rows whose item is known (``item`` is not -1), of equal pairs the first in the file."""
    lines = raw.interactions["line"].to_numpy()
    known = item >= 0
    skipped.add_rows("item without metadata", raw.path, lines[~known])
    repeated = (
        known
        & pd.Series(np.where(known, user * np.int64(len(raw.items)) + item, -1))
        .duplicated()
        .to_numpy()
    )
    skipped.add_rows("duplicate", raw.path, lines[repeated])
    skipped.check(raw.path, raw.total)
    kept = np.flatnonzero(known & ~repeated)
    return kept[np.argsort(raw.interactions["time"].to_numpy()[kept], kind="stable")]


def _splittable(
    raw: Raw, user: np.ndarray, usable: np.ndarray, kept: np.ndarray, skipped: Skipped
) -> np.ndarray:
    """Those of the ``kept`` rows whose user has enough events for leave-one-out.

    Counted are the users with too few among the ``usable`` rows, whom a core filter would take without a word, and those to whom the
    filters have left too few; the example is the first usable row of any of them.
    """
    given, left = (
        np.bincount(user[rows], minlength=user.max(initial=0) + 1) for rows in (usable, kept)
    )
    short = ((given > 0) & (given < MIN_EVENTS)) | ((left > 0) & (left < MIN_EVENTS))
    if short.any():
        first = int(raw.interactions["line"].to_numpy()[usable[short[user[usable]]]].min())
        skipped.add(SHORT_USER, raw.path, first, int(short.sum()))
    return kept[left[user[kept]] >= MIN_EVENTS]


def _evaluable_first(
    table: pd.DataFrame, users: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Users renumbered so that those with events in all three periods come first; the rows of these; how many others there are."""
    whole = evaluable(table, len(users))
    order = np.concatenate([np.flatnonzero(whole), np.flatnonzero(~whole)])
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    if not whole.any():
        raise ValueError(
            "split='global-time': no user has events in all three periods; use split='leave-one-out', or data with longer histories"
        )
    return (
        table.assign(user=number[table["user"]]),
        users[whole].reset_index(drop=True),
        int((~whole).sum()),
    )


# --- filters -----------------------------------------------------------------------------------------


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Positions of the rows of the k-core: the largest set of rows in which each user and each item has ``k`` or more."""
    kept = np.arange(len(user))
    while len(kept):
        enough = (np.bincount(user[kept])[user[kept]] >= k) & (
            np.bincount(item[kept])[item[kept]] >= k
        )
        if enough.all():
            break
        kept = kept[enough]
    return kept


def latest_core(user: np.ndarray, item: np.ndarray, k: int, size: int) -> np.ndarray:
    """Positions of the k-core of the shortest window of last rows whose core has ``size`` rows or more; of all rows if none has, or for 0.

    A longer window's core contains a shorter one's, so the window is found by bisection.
    """
    whole = k_core(user, item, k)
    if not 0 < size < len(whole):
        return whole
    low, high = 0, len(user)  # the core from row low on is large enough, from high on it is not
    while high - low > 1:
        middle = (low + high) // 2
        if len(k_core(user[middle:], item[middle:], k)) >= size:
            low = middle
        else:
            high = middle
    return low + k_core(user[low:], item[low:], k)


# --- text --------------------------------------------------------------------------------------------


def sanitise_text(text: str) -> str:
    """``text`` as one plain line: no control or format characters, no chat-template tokens, single spaces.

    Repeated until nothing changes, since cutting a token out can join the halves of another.
    """
    if text.isascii() and text.isprintable() and not _SPECIAL.search(text):  # nearly all
        return " ".join(text.split())
    while True:
        visible = "".join(
            c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
        )
        plain = " ".join(_SPECIAL.sub("", visible).split())
        if plain == text:
            return text
        text = plain


def item_text(title: str, year: int, genres: str, by: str = "") -> str:
    """What the LLM reads for one item: "Title (year) by Author. Genres: A, B." without the parts that are unknown."""
    year_part = f" ({year})" if year else ""
    by_part = f" by {by}" if by else ""
    genre_part = f" Genres: {genres.replace('|', ', ')}." if genres else ""
    return f"{title}{year_part}{by_part}.{genre_part}"


# --- times -------------------------------------------------------------------------------------------


def milliseconds(values: np.ndarray) -> np.ndarray:
    """Unix times as int64 milliseconds; the size of each tells its unit (seconds, milliseconds, microseconds, nanoseconds).

    The borders are 1e11, 1e14 and 1e17: 1e11 seconds is the year 5138, 1e11 milliseconds March 1973.
    """
    values = np.asarray(values, np.int64)
    size = np.abs(values.astype(np.float64))
    return np.select(
        [size < 1e11, size < 1e14, size < 1e17],
        [values * 1000, values, values // 1000],
        values // 1_000_000,
    )


def parse_time(value: Any) -> int:
    """Milliseconds since 1970 (UTC) from a number or text: see ``milliseconds``; also "01 7, 2015" and ISO 8601. Raises ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no time")
    try:
        number = int(value) if not isinstance(value, float) else value
    except ValueError:
        return _parse_time_text(str(value).strip())
    if not math.isfinite(number) or not abs(number) < 2**63:
        raise ValueError(f"{value!r} is no time")
    if isinstance(
        number, float
    ):  # the unit first: a float holds seconds to the microsecond, but not as nanoseconds
        return int(number * 1000) if abs(number) < 1e11 else int(milliseconds(int(number)))
    return int(milliseconds(number))


def _parse_time_text(text: str) -> int:
    try:
        return parse_time(float(text))
    except ValueError:
        pass
    try:
        moment = datetime.strptime(text, "%m %d, %Y")
    except ValueError:
        moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return round(moment.timestamp() * 1000)


def parse_times(values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(int64 milliseconds, bool: parsable) of a column of texts; fast where all are whole numbers."""
    try:
        return milliseconds(pa.array(values, pa.string()).cast(pa.int64()).to_numpy()), np.ones(
            len(values), bool
        )
    except pa.ArrowInvalid:
        return parsed(values, parse_time, np.int64)


def parse_numbers(values: Sequence[str], kind: type) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of ``kind``, np.int64 or np.float64; bool: parsable and finite) of a column of texts."""
    try:
        numbers = pa.array(values, pa.string()).cast(pa.from_numpy_dtype(kind)).to_numpy()
        return numbers, np.isfinite(numbers)
    except pa.ArrowInvalid:
        return parsed(values, int if kind is np.int64 else _finite, kind)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def parsed(values: Sequence, parse, kind: type) -> tuple[np.ndarray, np.ndarray]:
    """(array, bool: parsable) of ``parse`` applied to each value; 0 where it raises ``ValueError`` or does not fit ``kind``."""
    out, good = np.zeros(len(values), kind), np.ones(len(values), bool)
    for n, value in enumerate(values):
        try:
            out[n] = parse(value)
        except (ValueError, OverflowError):
            good[n] = False
    return out, good
