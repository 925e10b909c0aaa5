"""Large and dirty text files: blocks of whole lines, plain or gzip; CSV rows with line numbers."""
# pyarrow.compute makes its functions at import, so pyright does not know them.
# pyright: reportAttributeAccessIssue=false

import codecs
import csv
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from recrl_lib.data.tables import BROKEN, Skipped, sanitise_text
from recrl_lib.progress import track

BLOCK = 2**22  # bytes of text parsed at once
PIECE = 2**18  # bytes read from disk at once
SEPARATORS = (",", ";", "\t")

# Of a column of texts: (the values, bool: which are usable).
Parser = Callable[[pa.Array], tuple[Any, Any]]


def parse_titles(texts: pa.Array) -> tuple[list[str], bool]:
    """The texts, sanitised; all are usable."""
    return [sanitise_text(text) for text in texts.to_pylist()], True


def usable(
    columns: dict[str, tuple[pa.Array, Parser]], lines: np.ndarray, path: Path, skipped: Skipped
) -> pd.DataFrame:
    """The parsed columns and ``line``; rows that lack a text or cannot be parsed are counted."""
    parsed = {name: parse(texts) for name, (texts, parse) in columns.items()}
    table = pd.DataFrame({name: values for name, (values, _) in parsed.items()} | {"line": lines})
    missing, good = (table == "").any(axis=1).to_numpy(), np.ones(len(table), bool)
    for _, parsable in parsed.values():
        good &= np.asarray(parsable)
    skipped.add("missing field", path, lines[missing])
    skipped.add("unparsable field", path, lines[~missing & ~good])
    return table.loc[~missing & good]


def find(folder: Path, names: Sequence[str], only: bool = False) -> Path:
    """The first of ``names`` that is in ``folder``; ``only``: there may be no second one."""
    found = [folder / name for name in names if (folder / name).exists()]
    if not found or only and len(found) > 1:
        there = "several are" if found else "none is"
        wanted = f"{folder} must hold one of {', '.join(names)}"
        raise FileNotFoundError(f"{wanted}: {there} there; name another folder with data_dir")
    return found[0]


def blocks(path: Path, skipped: Skipped, quoted: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, text) of successive blocks of whole lines.

    With ``quoted`` no block ends inside a quoted field; a quote that is never closed joins a few
    blocks only. Only the last block can end without a newline. Where a gzip file breaks off, the
    lines before the break are yielded and the break is counted. Raises ``FileNotFoundError``.
    """
    if not path.is_file():
        where = "put it there, or name another folder with data_dir"
        raise FileNotFoundError(f"{path} is missing; {where}")
    rest, number = b"", 1
    try:
        for data in _content(path):
            rest += data
            end = rest.rfind(b"\n") + 1 if len(rest) >= BLOCK else 0
            is_open = quoted and rest.count(b'"', 0, end) % 2 and len(rest) <= 4 * BLOCK
            if end and not is_open:
                yield number, rest[:end]
                number += rest.count(b"\n", 0, end)
                rest = rest[end:]
    except (zlib.error, EOFError):
        rest = rest[: rest.rfind(b"\n") + 1]
        skipped.add(BROKEN, path, number + rest.count(b"\n"))
    if rest:
        yield number, rest


def _content(path: Path) -> Iterator[bytes]:
    """The bytes of a file, gzip unpacked, and UTF-16 with a byte order mark as UTF-8."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        n_pieces = -(-path.stat().st_size // PIECE)
        pieces = track(iter(partial(file.read, PIECE), b""), f"reading {path.name}", n_pieces)
        content = filter(None, _inflate(pieces) if packed else pieces)
        first = next(content, b"")
        content = chain([first], content)
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            content = (text.encode() for text in codecs.iterdecode(content, "utf-16"))
        yield from content


# Not Arrow's CompressedInputStream: it shows no progress, and loses the whole block before a break.
def _inflate(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The content of a gzip file of one or more members. Raises ``zlib.error`` or ``EOFError``."""
    engine = None
    for data in pieces:
        while data := data if engine else data.lstrip(b"\0"):  # members may be followed by padding
            engine = engine or zlib.decompressobj(wbits=31)
            yield engine.decompress(data)
            data, engine = engine.unused_data, None if engine.eof else engine
    if engine:
        raise EOFError


@dataclass
class Rows:
    """The rows of a CSV file in chunks of columns; bad rows are counted and left out."""

    path: Path
    skipped: Skipped
    names: Sequence[str] = ()  # of the columns, as line 1 must have them; empty: read from line 1
    has_header: bool = True  # else ``names`` says how many columns there are
    separator: str = ","  # "": the one of ``SEPARATORS`` that divides line 1 most
    quoted: bool = True  # whether quotes have a meaning
    encoding: str = "utf-8"
    terminated: bool = True  # the format ends every line, so a last one without newline was cut

    def __post_init__(self):
        self._blocks = blocks(self.path, self.skipped, self.quoted)
        if not self.has_header:
            return
        number, text = next(self._blocks, (1, b""))
        first, _, rest = text.partition(b"\n")
        self._blocks = chain([(number + 1, rest)] if rest else [], self._blocks)
        line = first.decode("utf-8", "replace").removeprefix("\ufeff").strip("\r")
        if not line:
            self.skipped.check(self.path)
        quoting = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        choices = self.separator or SEPARATORS
        rows = [next(csv.reader([line], delimiter=s, quoting=quoting), []) for s in choices]
        found, self.separator = max(zip(rows, choices), key=lambda pair: len(pair[0]))
        found = [name.strip() for name in found]
        if self.names and found != list(self.names):
            wanted = f"{self.path} line 1: the columns must be {', '.join(self.names)}"
            there = ", ".join(found)
            raise ValueError(f"{wanted}; they are {there}: this is another file, or a damaged one")
        self.names = found

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[pa.Array]]]:
        """Yield (line numbers (n,), columns of n texts) of the good rows; check the limit."""
        for number, text in self._blocks:
            yield self._parse(number, text)
        self.skipped.check(self.path)

    def frame(self, parsers: dict[str, Parser]) -> pd.DataFrame:
        """The first columns, named and parsed, and ``line``; see ``usable``."""
        parts = []
        for lines, columns in self:
            named = dict(zip(parsers, zip(columns, parsers.values())))
            parts.append(usable(named, lines, self.path, self.skipped))
        return pd.concat(parts, ignore_index=True)

    def records(self) -> Iterator[tuple]:
        """(line, *fields) of every good row."""
        for lines, columns in self:
            yield from zip(lines.tolist(), *(column.to_pylist() for column in columns))

    def _parse(self, number: int, text: bytes) -> tuple[np.ndarray, list[pa.Array]]:
        """The good rows of ``text``, whose first line is line ``number`` of the file."""
        cut = not text.endswith(b"\n")
        text += b"\n" * cut
        try:
            text, damaged = text if text.isascii() else text.decode(self.encoding).encode(), False
        except UnicodeDecodeError:
            text, damaged = text.decode(self.encoding, "replace").encode(), True
        columns, wrong = self._arrow(text)
        # All rows in file order: what is bad about each ("": nothing), and how many lines it has.
        kinds = np.full(len(columns[0]) + len(wrong), "", object)
        spans = np.ones(len(kinds), np.int64)
        kinds[list(wrong)], spans[list(wrong)] = "wrong number of fields", list(wrong.values())
        parsed = kinds == ""
        row = pc.binary_join_element_wise(*columns, "")
        spans[parsed] += pc.count_substring(row, "\n").to_numpy()
        undecodable = damaged & np.array(pc.match_substring(row, "\ufffd"))
        kinds[parsed] = np.select([pc.equal(row, ""), undecodable], ["blank", "not UTF-8"], "")
        if spans.sum() > text.count(b"\n"):  # a quote is open at the end of the text
            kinds[-1], spans[-1] = "bad quoting", spans[-1] - 1
        elif cut and (self.terminated or kinds[-1]):
            kinds[-1] = "cut last line"
        starts = number + np.cumsum(spans) - spans
        good = kinds == ""
        for kind in dict.fromkeys(kinds[~good & (kinds != "blank")]):  # an empty line is no row
            bad = kinds == kind
            self.skipped.add(kind, self.path, starts[bad], n := int(spans[bad].sum()))
            self.skipped.rows[self.path] += n
        self.skipped.rows[self.path] += int(good.sum())
        return starts[good], [column.filter(good[parsed]) for column in columns]

    def _arrow(self, text: bytes) -> tuple[list[pa.Array], dict[int, int]]:
        """(the columns, {place of a row with too few or many fields: its number of lines})."""
        wrong: dict[int, int] = {}

        def refuse(row: pacsv.InvalidRow) -> str:
            wrong[row.number - 1] = row.text.count("\n") + 1
            return "skip"

        names = [str(n) for n in range(len(self.names))]
        size, quote = len(text) + 1, '"' if self.quoted else False
        parsing = pacsv.ParseOptions(
            delimiter=self.separator, quote_char=quote, newlines_in_values=self.quoted
        )
        parsing.ignore_empty_lines, parsing.invalid_row_handler = False, refuse
        table = pacsv.read_csv(
            pa.BufferReader(text),
            pacsv.ReadOptions(use_threads=False, block_size=size, column_names=names),
            parsing,
            pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
        return [column.combine_chunks() for column in table.columns], wrong
