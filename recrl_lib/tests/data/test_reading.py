"""Lines of files and rows of CSV: gzip, line numbers and every kind of bad row."""

import csv
import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib.data.reading import Rows, lines
from recrl_lib.data.tables import Skipped

LINES = [f"line {n} é\n" for n in range(1, 60)]
TEXT = "".join(LINES).encode()


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        gzip.compress(TEXT),
        b"".join(map(gzip.compress, (TEXT[:300], TEXT[300:], b""))) + b"\0" * 20,
        TEXT.decode().encode("utf-16"),
    ],
    ids=["plain", "gzip", "members and padding", "utf-16"],
)
def test_the_lines_of_a_file(tmp_path, content):
    path, skipped = tmp_path / "a", Skipped()
    path.write_bytes(content)
    assert list(lines(path, skipped)) == LINES and not skipped.counts


@pytest.mark.parametrize("cut", [12, 40, 100, -1, -9, "crc"])
def test_of_a_broken_gzip_the_lines_before_the_break_count(tmp_path, cut):
    path, skipped = tmp_path / "a.gz", Skipped(0.99)
    packed = bytearray(gzip.compress(TEXT, compresslevel=1))
    if cut == "crc":
        packed[-8] ^= 1
    path.write_bytes(packed if cut == "crc" else packed[:cut])
    whole = len(read := list(lines(path, skipped)))
    assert read == LINES[:whole]
    assert whole == len(LINES) or cut not in (-1, -9, "crc")  # there only the checksum is lost
    assert skipped.first == {"broken gzip": f"a.gz line {whole + 1}"}
    message = rf"a.gz line {whole + 1}: the gzip file breaks off here .*set bad_row_limit=1 "
    skipped.rows[path] += whole + 1
    with pytest.raises(ValueError, match=message):
        skipped.check(path)
    skipped.limit = 1.0
    skipped.check(path)


def read_all(path, content, limit=1.0, **options):
    path.write_bytes(content)
    skipped = Skipped(limit)
    found = list(Rows(path, skipped, **options))
    skipped.check(path)
    return found, skipped


def test_rows_know_their_lines(tmp_path):
    text = '\ufeffid,title\r\n1,"Say ""Hi"", he said"\r\n2,"two\nlines"\r\n\r\n3,plain\r\n'
    found, skipped = read_all(tmp_path / "a.csv", text.encode())
    assert found == [(2, "1", 'Say "Hi", he said'), (3, "2", "two\nlines"), (6, "3", "plain")]
    assert skipped.rows.total() == 3 and not skipped.counts


@pytest.mark.parametrize(
    "bad, kind, n",
    [
        (b"4\n", "wrong number of fields", 1),
        (b"4,5,6\n", "wrong number of fields", 1),
        (b"4,\xff\n", "not UTF-8", 1),
        (b"4,5,\xff\n", "wrong number of fields", 1),
        (b'4,"a\nb\nc",5\n', "wrong number of fields", 3),
        (b'4,"a"b\n', "bad quoting", 1),
    ],
)
def test_bad_rows_are_counted(tmp_path, bad, kind, n):
    found, skipped = read_all(tmp_path / "a.csv", b"id,title\n1,a\n" + bad + b"2,b\n")
    assert found == [(2, "1", "a"), (3 + n, "2", "b")]
    assert skipped.counts == {kind: n} and skipped.first == {kind: "a.csv line 3"}
    assert skipped.rows.total() == 2 + n


def test_a_quote_never_closed_counts_all_that_it_swallows(tmp_path):
    content = b'id,title\n1,a\n2,"b\n' + b"3,c\n" * 1000
    with pytest.raises(ValueError, match=r"1001 of 1002 .* bad quoting \(first: a.csv line 3\)"):
        read_all(tmp_path / "a.csv", content, 0.01)
    found, _ = read_all(tmp_path / "a.csv", content + b"3,c\n" * 100_000)  # but no whole file
    assert len(found) > 1000


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "a.csv: no rows; the file is empty"),
        (b"id,name\n", "line 1: the columns must be id, title; they are id, name"),
        (gzip.compress(b"id,title\n1,a\n")[:12], "line 1: the gzip file breaks off"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    with pytest.raises(FileNotFoundError, match="a.csv is missing; put it there, or name another"):
        Rows(tmp_path / "a.csv", Skipped())
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path / "a.csv", content, 0.01, names=["id", "title"])


texts = st.text(alphabet="ab,;\"\n\t é\u2028'0", max_size=8)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(texts, texts).filter(any), min_size=1, max_size=12),
    st.sampled_from([",", ";", "\t"]),
)
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, rows, separator):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([("x", "y"), *rows])
    found, _ = read_all(path, path.read_bytes(), separator="")
    assert [tuple(fields) for _, *fields in found] == rows
    breaks = ["".join(row).count("\n") for row in rows]
    assert [n for n, *_ in found] == [2 + n + sum(breaks[:n]) for n in range(len(rows))]
