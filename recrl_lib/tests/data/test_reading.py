"""Blocks of lines and rows of CSV: borders, gzip, line numbers and every kind of bad row."""

import csv
import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib.data import reading
from recrl_lib.data.reading import Rows, blocks
from recrl_lib.data.tables import Skipped

LINES = [f"line {n} é".encode() for n in range(1, 60)]
TEXT = b"".join(line + b"\n" for line in LINES)
THIRD = len(TEXT) // 3


@pytest.fixture
def small(monkeypatch):
    """Blocks and pieces of a few bytes, so that every border is met."""
    monkeypatch.setattr(reading, "BLOCK", 64)
    monkeypatch.setattr(reading, "PIECE", 16)


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        gzip.compress(TEXT),
        b"".join(map(gzip.compress, (TEXT[:THIRD], TEXT[THIRD:], b""))) + b"\0" * 20,
        TEXT.decode().encode("utf-16"),
    ],
    ids=["plain", "gzip", "members and padding", "utf-16"],
)
def test_blocks_are_whole_lines(tmp_path, small, content):
    path, skipped = tmp_path / "a", Skipped()
    path.write_bytes(content)
    found = list(blocks(path, skipped))
    number = 1
    for first, block in found:
        assert first == number and block.endswith(b"\n")
        number += block.count(b"\n")
    assert b"".join(block for _, block in found) == TEXT and len(found) > 5 and not skipped.counts


@pytest.mark.parametrize("cut", [12, 40, 100, -1, -9, "crc"])
def test_of_a_broken_gzip_the_lines_before_the_break_count(tmp_path, small, cut):
    path, skipped = tmp_path / "a.gz", Skipped(0.99)
    packed = bytearray(gzip.compress(TEXT, compresslevel=1))
    if cut == "crc":
        packed[-8] ^= 1
    path.write_bytes(packed if cut == "crc" else packed[:cut])
    read = b"".join(block for _, block in blocks(path, skipped))
    whole = read.count(b"\n")
    assert TEXT.startswith(read) and read.endswith(b"\n") is bool(read)
    assert skipped.counts == {"broken gzip": 1}
    assert skipped.first == {"broken gzip": f"a.gz line {whole + 1}"}
    if cut in (-1, -9):  # only the checksum is lost
        assert whole == len(LINES)
    message = rf"a.gz line {whole + 1}: the gzip file breaks off here .*set bad_row_limit=1 "
    skipped.rows[path] += whole + 1
    with pytest.raises(ValueError, match=message):
        skipped.check(path)
    skipped.limit = 1.0
    skipped.check(path)


def read_all(path, skipped, **options):
    return list(Rows(path, skipped, **options).records())


def test_rows_know_their_lines(tmp_path):
    path, skipped = tmp_path / "a.csv", Skipped()
    text = '\ufeffid,title\r\n1,"Say ""Hi"", he said"\r\n2,"two\nlines"\r\n\r\n3,plain\r\n'
    path.write_bytes(text.encode())
    found = read_all(path, skipped)
    assert found == [(2, "1", 'Say "Hi", he said'), (3, "2", "two\nlines"), (6, "3", "plain")]
    assert skipped.rows[path] == 3 and not skipped.counts


@pytest.mark.parametrize(
    "bad, kind, n",
    [
        (b"4\n", "wrong number of fields", 1),
        (b"4,5,6\n", "wrong number of fields", 1),
        (b"4,\xff\n", "not UTF-8", 1),
        (b"4,5,\xff\n", "wrong number of fields", 1),
        (b'4,"a\nb\nc",5\n', "wrong number of fields", 3),
    ],
)
def test_bad_rows_are_counted(tmp_path, bad, kind, n):
    path, skipped = tmp_path / "a.csv", Skipped(1.0)
    path.write_bytes(b"id,title\n1,a\n" + bad + b"2,b\n")
    found = read_all(path, skipped)
    assert found == [(2, "1", "a"), (3 + n, "2", "b")]
    assert skipped.counts == {kind: n} and skipped.first == {kind: "a.csv line 3"}
    assert skipped.rows[path] == 2 + n


def test_a_quote_never_closed_counts_all_that_it_swallows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,title\n1,a\n2,"b\n' + b"3,c\n" * 1000)
    with pytest.raises(ValueError, match=r"1001 of 1002 .* bad quoting \(first: a.csv line 3\)"):
        read_all(path, Skipped())


@pytest.mark.parametrize(
    "end, terminated, found, counts",
    [
        (b"2,b", True, 1, {"cut last line": 1}),
        (b"2,b", False, 2, {}),
        (b"2", False, 1, {"cut last line": 1}),
    ],
)
def test_the_last_line(tmp_path, end, terminated, found, counts):
    path, skipped = tmp_path / "a.csv", Skipped(1.0)
    path.write_bytes(b"id,title\n1,a\n" + end)
    assert len(read_all(path, skipped, terminated=terminated)) == found
    assert skipped.counts == counts


@pytest.mark.parametrize(
    "content, error, message",
    [
        (None, FileNotFoundError, "a.csv is missing; put it there, or name another folder"),
        (b"", ValueError, "a.csv: no rows; the file is empty"),
        (b"id,name\n", ValueError, "line 1: the columns must be id, title; they are id, name"),
        (gzip.compress(b"id,title\n1,a\n")[:12], ValueError, "line 1: the gzip file breaks off"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(error, match=message):
        Rows(tmp_path / "a.csv", Skipped(), ["id", "title"])


texts = st.text(alphabet="ab,;\"\n\t é\u2028'0", max_size=8)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(texts, texts).filter(any), min_size=1, max_size=12),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from([10, 2**22]),
)
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, rows, separator, block):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([("x", "y"), *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        found = read_all(path, Skipped(), separator="")
    assert [tuple(fields) for _, *fields in found] == rows
    lines = [n for n, *_ in found]
    breaks = ["".join(row).count("\n") for row in rows]
    assert lines == [2 + n + sum(breaks[:n]) for n in range(len(rows))]
