"""Large and dirty text files: lines, plain or gzip; rows of CSV; columns parsed from texts."""

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd

from recrl_lib.data.tables import BROKEN, Skipped
from recrl_lib.progress import track

PIECE = 2**18  # bytes read from disk at once
CHUNK = 2**17  # rows parsed at once
SEPARATORS = ",;\t"
NOT_UTF8, CUT, BLANK = "not UTF-8", "cut last line", "blank"
_ESCAPED = re.compile("[\udc80-\udcff]")  # what Python's surrogateescape makes of stray bytes

# Of a column of texts: (the values, bool: which are usable).
Parser = Callable[[pd.Series], tuple[Any, Any]]


def find(folder: Path, names: Sequence[str], only: bool = False) -> Path:
    """The first of ``names`` that is in ``folder``; ``only``: there may be no second one."""
    found = [folder / name for name in names if (folder / name).exists()]
    if not found or only and len(found) > 1:
        there = "several are" if found else "none is"
        wanted = f"{folder} must hold one of {', '.join(names)}"
        raise FileNotFoundError(f"{wanted}: {there} there; name another folder with data_dir")
    return found[0]


def parsed(
    rows: Iterable[tuple], parsers: dict[str, Parser | None], path: Path, skipped: Skipped
) -> pd.DataFrame:
    """``line`` and a column for each of ``parsers`` (None: texts) from rows (line, text, ...).

    Rows that lack a text or cannot be parsed are counted and left out. ``ValueError`` if they are
    too many.
    """
    rows, parts = iter(rows), []
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])  # texts take much memory
    for chunk in chain([[]], chunks):  # the empty one: there may be no rows
        table = pd.DataFrame(chunk, columns=["line", *parsers])
        table = table.astype(dict.fromkeys(parsers, "str") | {"line": "int64"})
        good = pd.Series(True, table.index)
        for name, parse in parsers.items():
            if parse:
                table[name], usable = parse(table[name])
                good &= usable
        missing = (table == "").any(axis=1)
        skipped.add("missing field", path, table["line"][missing])
        skipped.add("unparsable field", path, table["line"][~missing & ~good])
        parts.append(table[good & ~missing])
    skipped.check(path)
    return pd.concat(parts, ignore_index=True)


def lines(path: Path, skipped: Skipped, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the lines of a file, plain or gzip; with a byte order mark it may be UTF-16.

    Where a gzip file breaks off, the lines before the break are yielded and the break is counted.
    Bytes that cannot be decoded are kept so that ``is_damaged`` finds them. Raises
    ``FileNotFoundError``.
    """
    if not path.is_file():
        where = "put it there, or name another folder with data_dir"
        raise FileNotFoundError(f"{path} is missing; {where}")
    number = 1
    with io.BufferedReader(_Shown(path), PIECE) as file:
        try:
            content = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
            if content.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                encoding = "utf-16"
            for line in io.TextIOWrapper(content, encoding, "surrogateescape", newline="\n"):
                yield line
                number += 1
        except (EOFError, zlib.error, gzip.BadGzipFile):
            skipped.add(BROKEN, path, number)


def is_damaged(text: str) -> bool:
    """Whether ``text`` has bytes that could not be decoded."""
    return not text.isascii() and _ESCAPED.search(text) is not None


class _Shown(io.FileIO):
    """A file that shows how much of it has been read."""

    def __init__(self, path: Path):
        super().__init__(path)
        n_pieces = -(-path.stat().st_size // PIECE)
        self._pieces = track(range(1, n_pieces + 1), f"reading {path.name}", n_pieces)
        self._shown = 0

    def readinto(self, buffer: Any) -> int:
        while self.tell() > self._shown * PIECE:
            self._shown = next(self._pieces, self._shown + 1)
        return super().readinto(buffer)


@dataclass
class Rows:
    """Iterates over (line number, \\*fields) of the rows of a CSV file; bad ones are counted."""

    path: Path
    skipped: Skipped
    names: Sequence[str] = ()  # of the columns, as line 1 must have them; empty: read from line 1
    has_header: bool = True  # else ``names`` says how many columns there are
    separator: str = ","  # "": the one of ``SEPARATORS`` that divides line 1 most
    quoted: bool = True  # whether quotes have a meaning
    encoding: str = "utf-8"
    terminated: bool = True  # the format ends every line, so a last one without newline was cut

    def __post_init__(self):
        self._lines = lines(self.path, self.skipped, self.encoding)
        if not self.has_header:
            return
        text = next(self._lines, "").removeprefix("\ufeff").strip("\r\n")
        if not text:
            self.skipped.check(self.path)
        self.separator = self.separator or max(SEPARATORS, key=text.count)
        found = [name.strip() for name in next(self._reader([text]), [])]
        if self.names and found != list(self.names):
            wanted = f"{self.path} line 1: the columns must be {', '.join(self.names)}"
            there = ", ".join(found)
            raise ValueError(f"{wanted}; they are {there}: this is another file, or a damaged one")
        self.names = found

    def __iter__(self) -> Iterator[tuple]:
        taken: list[str] = []  # the lines of the present row

        def texts() -> Iterator[str]:
            for text in self._lines:
                taken.append(text)
                yield text

        reader, number, n_rows = self._reader(texts(), strict=True), 1 + self.has_header, 0
        while True:
            taken.clear()
            try:
                fields = next(reader)
                kind = self._flaw(fields, taken)
            except csv.Error:
                kind = "bad quoting"
            except StopIteration:
                break
            if not kind:
                n_rows += 1
                yield number, *fields
            elif kind != BLANK:
                n_rows += len(taken)
                self.skipped.add(kind, self.path, number, len(taken))
            number += len(taken)
        self.skipped.rows[self.path] += n_rows

    def _reader(self, texts: Iterable[str], strict: bool = False) -> Iterator[list[str]]:
        quoting = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        return csv.reader(texts, delimiter=self.separator, quoting=quoting, strict=strict)

    def _flaw(self, fields: list[str], taken: list[str]) -> str:
        """What is bad about the row in these lines; empty for nothing."""
        kind = ""
        if fields and len(fields) != len(self.names):
            kind = "wrong number of fields"
        elif not any(fields):
            kind = BLANK
        elif any(map(is_damaged, taken)):
            kind = NOT_UTF8
        return CUT if taken[-1][-1] != "\n" and (kind or self.terminated) else kind
