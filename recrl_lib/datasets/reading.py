"""Reading large and dirty text files: blocks of whole lines, plain or gzip; CSV rows with their line numbers."""

import csv
import io
import zlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import numpy as np

from recrl_lib.datasets.tables import Skipped
from recrl_lib.progress import track

BLOCK = 2**22  # bytes of text handled at once
_PIECE = 2**18  # bytes read from disk at once; in a broken gzip file, at most this much before the break is lost
CHUNK = 100_000  # CSV rows handled at once


def blocks(path: Path, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, text) of successive blocks of whole lines of ``path``, plain or gzip.

    Only the last block can end without a newline. Where a gzip file breaks off or is damaged, the lines before that count; the break
    is one bad row. Raises ``FileNotFoundError``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; put it there, or name another folder with data_dir")
    rest, number = b"", 1
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        pieces = track(iter(lambda: file.read(_PIECE), b""), f"reading {path.name}", -(-path.stat().st_size // _PIECE))
        try:
            for data in _inflate(pieces) if packed else pieces:
                rest += data
                if len(rest) >= BLOCK and (end := rest.rfind(b"\n") + 1):
                    yield number, rest[:end]
                    number += rest.count(b"\n", 0, end)
                    rest = rest[end:]
        except (zlib.error, EOFError):
            end = rest.rfind(b"\n") + 1
            skipped.add("broken gzip", path, number + rest.count(b"\n", 0, end))
            rest = rest[:end]
    if rest:
        yield number, rest


def _inflate(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a gzip stream of one or more members. ``zlib.error`` if it is damaged, ``EOFError`` if it ends too early."""
    engine, inside = None, False
    for data in pieces:
        while data := data if inside else data.lstrip(b"\0"):  # members may be followed by padding
            if not inside:
                engine, inside = zlib.decompressobj(wbits=31), True
            yield engine.decompress(data)
            data, inside = engine.unused_data, not engine.eof
    if inside:
        raise EOFError


class Rows:
    """A CSV file's rows in chunks of columns, bad rows counted; ``total`` is the number of rows seen so far.

    Args:
        header: the exact column names of line 1; None: the names are read from line 1, into ``names``.
        has_header: False if line 1 is data already.
        terminated: the format ends every line, so a last line without its newline was cut, even if it still parses.
    """

    def __init__(self, path: Path, skipped: Skipped, header: Sequence[str] | None = None, has_header: bool = True, terminated: bool = True):
        self.path, self.skipped, self.terminated, self.total = path, skipped, terminated, 0
        self._undecodable: set[int] = set()
        self._last = b""
        self._reader = csv.reader(self._lines(), strict=True)
        self._line = 1
        self.names = list(header or ())
        if has_header:
            found = [name.strip() for name in next(self._reader, [])]
            if not found:
                skipped.check(path, 0)
            found[0] = found[0].removeprefix("\ufeff")
            if header and found != self.names:
                raise ValueError(f"{path} line 1: the columns must be {','.join(header)}, got {','.join(found)}; this is another file, or a damaged one")
            self.names, self._line = found, self._reader.line_num + 1

    def _lines(self) -> Iterator[str]:
        for number, block in blocks(self.path, self.skipped):
            for n, self._last in enumerate(io.BytesIO(block), number):
                try:
                    yield self._last.decode("utf-8")
                except UnicodeDecodeError:
                    self._undecodable.add(n)
                    yield self._last.decode("utf-8", "replace")

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[tuple[str, ...]]]]:
        """(line numbers (n,), one tuple of n texts a column) of successive chunks of good rows."""
        rows = self._rows()
        while chunk := list(islice(rows, CHUNK)):
            lines, fields = zip(*chunk)
            yield np.array(lines), list(zip(*fields))

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        width, reader = len(self.names), self._reader
        while True:
            quoting = False
            try:
                row = next(reader, None)
            except csv.Error:  # a quote never closed swallows what follows, up to the longest field there may be
                row, quoting = [""], True
            if row is None:
                return
            line, self._line = self._line, reader.line_num + 1
            if not row:  # an empty line
                continue
            span = self._line - line if quoting or len(row) != width else 1
            self.total += span
            if self._undecodable and not self._undecodable.isdisjoint(range(line, self._line)):
                self.skipped.add("not UTF-8", self.path, line, span)
            elif not self._last.endswith(b"\n") and (self.terminated or len(row) != width):
                self.skipped.add("cut last line", self.path, line, span)
            elif quoting:
                self.skipped.add("bad quoting", self.path, line, span)
            elif len(row) != width:
                self.skipped.add("wrong number of fields", self.path, line, span)
            else:
                yield line, row


def columns(path: Path, names: Sequence[str], wanted: dict[str, str], optional: Sequence[str]) -> dict[str, int]:
    """Where the columns are: ``wanted`` maps what is needed ("user") to its column's name, "" for none; parameters are ``<need>_column``.

    An ``optional`` column that is not there is left out, unless one is there that looks like it. Raises ``ValueError`` naming the
    columns present and the nearest match.
    """
    found = {}
    for need, name in wanted.items():
        if name in names:
            found[need] = list(names).index(name)
            continue
        lower = {n.lower(): n for n in names}
        near = get_close_matches(name.lower(), lower, n=1, cutoff=0.7) if name else []
        if need in optional and not near:
            continue
        hint = f"; did you mean {lower[near[0]]!r}? Set {need}_column={lower[near[0]]}" if near else f"; set {need}_column to one of these"
        without = f", or leave {need}_column empty to do without" if need in optional else ""
        raise ValueError(f"{path}: no column {name!r} for {need}_column; the columns are {', '.join(map(repr, names))}{hint}{without}.")
    return found
