"""Reading large and dirty text files: blocks of whole lines, plain or gzip; CSV rows with their line numbers."""

import csv
import io
import zlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from recrl_lib.data.tables import BROKEN, Skipped
from recrl_lib.progress import track

BLOCK = 2**22  # bytes of text handled at once
_PIECE = (
    2**18
)  # bytes read from disk at once; in a broken gzip file, at most this much before the break is lost too


def blocks(path: Path, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, text) of successive blocks of whole lines of ``path``, plain or gzip.

    Only the last block can end without a newline. Where a gzip file breaks off or is damaged, the lines before that come, and
    ``skipped`` is told: its ``check`` stops the run for such a file. Raises ``FileNotFoundError``.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; put it there, or name another folder with data_dir"
        )
    rest, number = b"", 1
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        pieces = track(
            iter(lambda: file.read(_PIECE), b""),
            f"reading {path.name}",
            -(-path.stat().st_size // _PIECE),
        )
        try:
            for data in _inflate(pieces) if packed else pieces:
                rest += data
                if len(rest) >= BLOCK and (end := rest.rfind(b"\n") + 1):
                    yield number, rest[:end]
                    number += rest.count(b"\n", 0, end)
                    rest = rest[end:]
        except (zlib.error, EOFError):
            end = rest.rfind(b"\n") + 1
            skipped.add(BROKEN, path, number + rest.count(b"\n", 0, end))
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

    A block of lines without a quote, in which nothing is odd, is parsed at once; any other row by row, with an eye on the line numbers.

    Args:
        header: the exact column names of line 1; None: the names are read from line 1, into ``names``.
        has_header: False if line 1 is data already.
        terminated: the format ends every line, so a last line without its newline was cut, even if it still parses.
    """

    def __init__(
        self,
        path: Path,
        skipped: Skipped,
        header: Sequence[str] | None = None,
        has_header: bool = True,
        terminated: bool = True,
    ):
        self.path, self.skipped, self.terminated, self.total = path, skipped, terminated, 0
        self.names = list(header or ())
        self._texts = self._balanced()
        if has_header:
            number, text = next(self._texts, (1, b""))
            first, _, rest = text.partition(b"\n")
            found = [
                name.strip()
                for name in next(
                    csv.reader([first.decode("utf-8", "replace").removeprefix("\ufeff")]), []
                )
            ]
            if not found:
                skipped.check(path, 0)
            if header and found != self.names:
                expected, got = ",".join(header), ",".join(found)
                raise ValueError(
                    f"{path} line 1: the columns must be {expected}, got {got}; this is another file, or a damaged one"
                )
            self.names = found
            self._texts = chain([(number + 1, rest)] if rest else [], self._texts)

    def _balanced(self) -> Iterator[tuple[int, bytes]]:
        """Blocks, joined where a quoted field goes on in the next one; a quote that is never closed joins a few only."""
        start, held = 1, b""
        for number, block in blocks(self.path, self.skipped):
            start = start if held else number
            held += block
            if held.count(b'"') % 2 == 0 or len(held) > 4 * BLOCK:
                yield start, held
                held = b""
        if held:
            yield start, held

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[Sequence[str]]]]:
        """(line numbers (n,), the n texts of each column) of successive chunks of good rows."""
        for number, text in self._texts:
            if (fields := self._clean(text)) is not None:
                self.total += len(fields[0])
                yield np.arange(number, number + len(fields[0])), fields
            elif found := list(self._dirty(number, text)):
                lines, rows = zip(*found)
                yield np.array(lines), list(zip(*rows))

    def _clean(self, text: bytes) -> list[list[str]] | None:
        """The columns of a text without quotes in which every line is whole and has the right number of fields, by Arrow; else None."""
        if b'"' in text or not text.endswith(b"\n"):
            return None
        names = [str(n) for n in range(len(self.names))]
        try:
            table = pacsv.read_csv(
                pa.BufferReader(text),
                pacsv.ReadOptions(use_threads=False, block_size=len(text) + 1, column_names=names),
                pacsv.ParseOptions(quote_char=False),
                pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
            )
        except pa.ArrowInvalid:
            return None
        return (
            [column.to_pylist() for column in table.columns]
            if len(table) == text.count(b"\n")
            else None
        )

    def _dirty(self, number: int, text: bytes) -> Iterator[tuple[int, list[str]]]:
        """(line number, fields) of the good rows of any text; the others are counted. ``number``: its first line."""
        undecodable: set[int] = set()
        last = b""

        def decoded() -> Iterator[str]:
            nonlocal last
            for n, last in enumerate(io.BytesIO(text), number):
                try:
                    yield last.decode("utf-8")
                except UnicodeDecodeError:
                    undecodable.add(n)
                    yield last.decode("utf-8", "replace")

        width, reader, line = len(self.names), csv.reader(decoded(), strict=True), number
        while True:
            quoting = False
            try:
                row = next(reader, None)
            except (
                csv.Error
            ):  # a quote never closed swallows what follows, up to the longest field there may be
                row, quoting = [""], True
            if row is None:
                return
            first, line = line, number + reader.line_num
            if not row:  # an empty line
                continue
            span = line - first if quoting or len(row) != width else 1
            self.total += span
            if undecodable and not undecodable.isdisjoint(range(first, line)):
                self.skipped.add("not UTF-8", self.path, first, span)
            elif not last.endswith(b"\n") and (self.terminated or len(row) != width):
                self.skipped.add("cut last line", self.path, first, span)
            elif quoting:
                self.skipped.add("bad quoting", self.path, first, span)
            elif len(row) != width:
                self.skipped.add("wrong number of fields", self.path, first, span)
            else:
                yield first, row


def columns(
    path: Path, names: Sequence[str], wanted: dict[str, str], optional: Sequence[str]
) -> dict[str, int]:
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
        hint = (
            f"; did you mean {lower[near[0]]!r}? Set {need}_column={lower[near[0]]}"
            if near
            else f"; set {need}_column to one of these"
        )
        without = f", or leave {need}_column empty to do without" if need in optional else ""
        raise ValueError(
            f"{path}: no column {name!r} for {need}_column; the columns are {', '.join(map(repr, names))}{hint}{without}."
        )
    return found
