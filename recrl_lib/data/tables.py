"""From raw rows to the three tables: counts of bad rows, filters, numbering; texts and times.

A loader reads its files into ``Raw``; ``assemble`` does the rest, the same for every format.
"""

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
    np.int64: r"-?([0-9]{1,18}|[0-8][0-9]{18})",
    np.float64: r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?",
}

_COUNT, _ITEM, _TIME = (Column("int64", Check.ge(low)) for low in (0, 1, -(2**63)))
_TEXT, _RATING = Column(str), Column("float64", nullable=True, required=False)
INTERACTIONS, ITEMS, USERS = (
    DataFrameSchema(columns, unique=key, strict=True)
    for key, columns in (
        (["user", "item"], {"user": _COUNT, "item": _ITEM, "time": _TIME, "rating": _RATING}),
        ("item", {"item": _ITEM, "year": _COUNT, "title": _TEXT, "genres": _TEXT, "text": _TEXT}),
        ("user", {"user": _COUNT, "gender": _TEXT, "age": _COUNT}),
    )
)


@dataclass(frozen=True)
class Dataset:
    """The three tables, described in ``recrl_lib``, and ``info`` for ``dataset.json``.

    With a global-time split, interactions of users without an event in each of the three periods
    (``n_unevaluated_users``) have numbers from U on: such users only train.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    info: dict[str, Any]


@dataclass
class Skipped:
    """Counts what was left out, by kind, with the first example of each."""

    limit: float = 0.01  # largest share of a file's rows that may be bad
    normal: frozenset[str] = frozenset((SHORT_USER,))  # kinds that do not count against it
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    bad: Counter[Path] = field(default_factory=Counter)
    rows: Counter[Path] = field(default_factory=Counter)  # good or bad

    def add(self, kind: str, path: Path, lines: Any, n: int | None = None) -> None:
        """Count ``n`` rows (None: as many as lines) in ``lines``, a number or an array, 1-based."""
        lines = np.atleast_1d(lines)
        if n := len(lines) if n is None else n:
            self.counts[kind] += n
            self.first.setdefault(kind, f"{path.name} line {lines.min()}")
            self.bad[path] += n * (kind not in self.normal)

    def check(self, path: Path) -> None:
        """Raise ``ValueError`` when a file is broken or empty, or too many of its rows are bad."""
        rows, bad = self.rows[path], self.bad[path]
        if BROKEN in self.counts and self.limit < 1:  # nobody can count what is lost
            raise ValueError(
                f"{path.parent / self.first[BROKEN]}: the gzip file breaks off here or is damaged: "
                "fetch it again, or set bad_row_limit=1 to go on with the rows before the break"
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
    """The data set from what a loader has read. Raises ``ValueError`` if nothing is left.

    Rows of unknown items and repeated pairs go; the others are ordered by time, ties by file order.
    The latest window whose ``min_core``-core has ``max_interactions`` rows is kept (0: all). Users
    with too few events to be split go (leave-one-out) or come last (global-time). Numbers follow
    the order of raw ids. Items that nobody met stay if ``min_core`` is 1.
    """
    items = raw.items.sort_values("raw", ignore_index=True)
    user, raw_users = pd.factorize(raw.interactions["user"], sort=True)
    item = pd.Index(items["raw"]).get_indexer(raw.interactions["item"].to_list())
    rows = _usable(raw.interactions.assign(user=user, item=item), raw.path, skipped)
    core = latest_core(rows["user"].to_numpy(), rows["item"].to_numpy(), min_core, max_interactions)
    table = rows.iloc[core]
    if split != GLOBAL_TIME:
        table = _splittable(table, rows, raw.path, skipped)
    if table.empty:
        raise ValueError(
            f"{raw.path}: no interaction is left after the filters (min_core={min_core}); "
            "lower min_core, or give more data"
        )
    used_users, user = np.unique(table["user"], return_inverse=True)
    used_items = np.unique(table["item"]) if min_core > 1 else np.arange(len(items))
    item = np.searchsorted(used_items, table["item"]) + 1
    table = table.drop(columns="line").assign(user=user, item=item, time=table["time"] // 1000)
    unknown = pd.DataFrame({"raw": raw_users, "gender": "", "age": 0})
    known = (unknown if raw.users is None else raw.users).set_index("raw")
    users, extra = known.loc[raw_users[used_users]], {}
    if split == GLOBAL_TIME:
        whole = evaluable(table, len(users))  # these users first
        if not whole.any():
            lack = "split='global-time': no user has events in all three periods"
            raise ValueError(f"{lack}; use split='leave-one-out', or data with longer histories")
        table["user"] = np.argsort(np.argsort(~whole, kind="stable"))[table["user"]]
        users, extra = users.loc[whole], {"n_unevaluated_users": int((~whole).sum())}
    items = items.loc[used_items].drop(columns="raw").reset_index(drop=True)
    items.insert(0, "item", items.index + 1)
    users = users.reset_index(drop=True)
    users.insert(0, "user", users.index)
    info = {"source": raw.source, "noun": raw.noun, "n_users": len(users), "n_items": len(items)}
    info |= {"n_interactions": len(table), "order": raw.order, "split": split, "min_core": min_core}
    info |= extra | raw.info | {"skipped": dict(skipped.counts), "skipped_first": skipped.first}
    info["skipped_bad"] = sorted(skipped.counts.keys() - skipped.normal)
    table = INTERACTIONS.validate(table.reset_index(drop=True))
    return Dataset(table, ITEMS.validate(items), USERS.validate(users), info)


def _usable(rows: pd.DataFrame, path: Path, skipped: Skipped) -> pd.DataFrame:
    """The rows whose item is known (not -1), of equal pairs the first, in time order."""
    known = rows["item"] >= 0
    repeated = known & rows.duplicated(["user", "item"])
    skipped.add("item without metadata", path, rows["line"][~known])
    skipped.add("duplicate", path, rows["line"][repeated])
    skipped.check(path)
    return rows[known & ~repeated].sort_values("time", kind="stable", ignore_index=True)


def _splittable(
    kept: pd.DataFrame, usable: pd.DataFrame, path: Path, skipped: Skipped
) -> pd.DataFrame:
    """The ``kept`` rows of users with enough events for leave-one-out; the others are counted.

    Those are users with too few ``usable`` rows, and those to whom the filters left too few.
    """
    counts = (rows["user"].value_counts() for rows in (usable, kept))
    short = set().union(*(n.index[n < MIN_EVENTS] for n in counts))
    skipped.add(SHORT_USER, path, usable.loc[usable["user"].isin(short), "line"], len(short))
    return kept[~kept["user"].isin(short)]


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Positions of the largest set of rows in which each user and each item has ``k`` or more."""
    kept, enough = np.arange(len(user)), np.array([False])
    while len(kept) and not enough.all():
        counts = (np.bincount(ids[kept])[ids[kept]] for ids in (user, item))
        enough = np.minimum(*counts) >= k
        kept = kept[enough]
    return kept


def latest_core(user: np.ndarray, item: np.ndarray, k: int, size: int) -> np.ndarray:
    """Positions of the k-core of the shortest window of last rows whose core has ``size`` rows.

    All rows' core if none has, or for size 0.
    """
    whole = k_core(user, item, k)
    if not 0 < size < len(whole):
        return whole
    starts = range(len(user))  # a longer window's core contains a shorter one's
    start = bisect_right(starts, -size, key=lambda n: -len(k_core(user[n:], item[n:], k))) - 1
    return start + k_core(user[start:], item[start:], k)


def sanitise_text(text: str) -> str:
    """``text`` as one plain line without control characters and chat-template tokens."""
    plain = ""
    while plain != text:  # cutting a token out can join the halves of another
        plain, text = text, " ".join(_TOKEN.sub("", _HIDDEN.sub("", text)).split())
    return text


def milliseconds(values: Any) -> np.ndarray:
    """Unix times as int64 milliseconds; the size of each tells its unit (s, ms, µs or ns)."""
    values = np.asarray(values, np.int64)
    size = np.abs(values.astype(np.float64))  # 1e11 s is the year 5138, 1e11 ms March 1973
    choices = [values * 1000, values, values // 1000]
    return np.select([size < 1e11, size < 1e14, size < 1e17], choices, values // 1_000_000)


def parse_times(texts: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """(int64 milliseconds since 1970 (UTC), bool: whether it is a time) of a column of texts.

    A time is a Unix time in any unit, an ISO 8601 date, or as in "01 7, 2015".
    """
    whole, good = parse_integers(texts)
    time, rest = milliseconds(whole), ~good
    if rest.any():
        texts = texts[rest].str.strip()
        number, finite = parse_numbers(texts)
        finite &= np.abs(number) < 2**63
        number[~finite] = 0
        moment, other = (
            pd.to_datetime(texts, format=form, utc=True, errors="coerce").dt.as_unit("ms")
            for form in ("ISO8601", "%m %d, %Y")
        )
        moment = moment.fillna(other)
        # The unit first: a float holds seconds to the microsecond, but not as nanoseconds.
        number = np.where(np.abs(number) < 1e11, number * 1000, milliseconds(number))
        time[rest] = np.where(finite, number.astype(np.int64), moment.astype("int64"))
        good[rest] = finite | moment.notna()
    return time, good


def parse_numbers(texts: pd.Series, kind: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of ``kind``, bool: whether it is a finite number) of a column of texts."""
    texts = texts.str.strip()
    good = texts.str.fullmatch(_NUMBER[kind]).to_numpy(bool)
    numbers = texts.where(good, "0").to_numpy(kind)
    return numbers, good & np.isfinite(numbers)


parse_integers = partial(parse_numbers, kind=np.int64)
