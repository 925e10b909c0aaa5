import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib.data import reading
from recrl_lib.data.reading import Rows, blocks, columns
from recrl_lib.data.tables import Skipped


@pytest.fixture
def small(monkeypatch):
    """Blocks and pieces of a few bytes, so that every border is met."""
    monkeypatch.setattr(reading, "BLOCK", 64)
    monkeypatch.setattr(reading, "_PIECE", 16)


LINES = [f"line {n} é".encode() for n in range(1, 60)]


def check_blocks(found, lines):
    """Blocks of whole lines with the right numbers, which together are ``lines``."""
    number = 1
    for first, block in found:
        assert first == number
        number += block.count(b"\n")
    assert b"".join(block for _, block in found).split(b"\n") == lines


@pytest.mark.parametrize("members", [0, 1, 3])
def test_blocks_are_whole_lines(tmp_path, small, members):
    text, path = b"\n".join(LINES) + b"\n", tmp_path / "a"
    third = len(text) // 3
    parts = {
        0: [text],
        1: [gzip.compress(text)],
        3: [gzip.compress(p) for p in (text[:third], text[third:], b"")],
    }[members]
    path.write_bytes(b"".join(parts) + (b"\0" * 20 if members == 3 else b""))
    skipped = Skipped()
    found = list(blocks(path, skipped))
    check_blocks(found, [*LINES, b""])
    assert len(found) > 5 and not skipped.counts


@pytest.mark.parametrize("cut", [12, 40, 100, -1, -9])
def test_of_a_broken_gzip_the_lines_before_the_break_count(tmp_path, small, cut):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"\n".join(LINES) + b"\n", compresslevel=1)[:cut])
    skipped = Skipped()
    found = list(blocks(path, skipped))
    read = b"".join(block for _, block in found)
    whole = read.count(b"\n")
    assert read == b"".join(line + b"\n" for line in LINES[:whole])
    assert skipped.counts == {"broken gzip": 1}
    assert skipped.first == {"broken gzip": f"a.gz line {whole + 1}"}
    if cut < 0:  # only the checksum was cut off
        assert len(read.splitlines()) == len(LINES)


def test_a_damaged_gzip_is_noticed_by_its_checksum(tmp_path, small):
    path = tmp_path / "a.gz"
    packed = bytearray(gzip.compress(b"\n".join(LINES) + b"\n"))
    packed[-8] ^= 1  # in the CRC
    path.write_bytes(packed)
    skipped = Skipped()
    list(blocks(path, skipped))
    assert skipped.counts == {"broken gzip": 1}


@pytest.mark.parametrize("cut", [200, -5])
def test_a_broken_gzip_stops_the_run_whatever_its_share(tmp_path, small, cut):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(
        gzip.compress("".join(f"{n},{n * n % 997}\n" for n in range(9000)).encode())[:cut]
    )
    found, rows = read_all(path, skipped := Skipped(0.99), header=["x", "y"], has_header=False)
    line = len(found) + 1
    assert skipped.counts == {"broken gzip": 1} and (line < 9000) is (cut > 0)
    with pytest.raises(
        ValueError,
        match=rf"a.csv.gz line {line}: the gzip file breaks off here .*: fetch it again, or set bad_row_limit=1 ",
    ):
        skipped.check(path, rows.total)
    skipped.check(tmp_path / "another.csv", 10)
    skipped.limit = 1.0
    skipped.check(path, rows.total)


def test_a_gzip_broken_in_its_first_line_is_not_called_empty(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"id,title\n1,a\n")[:12])
    with pytest.raises(ValueError, match="a.csv.gz line 1: the gzip file breaks off here"):
        Rows(path, Skipped())


def read_all(path, skipped, **options):
    rows = Rows(path, skipped, **options)
    return [
        (int(n), fields) for lines, columns in rows for n, *fields in zip(lines, *columns)
    ], rows


def test_rows_know_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        '\ufeffid,title\r\n1,"Say ""Hi"", he said"\r\n2,"two\nlines"\r\n\r\n3,plain\r\n'.encode()
    )
    found, rows = read_all(path, skipped := Skipped())
    assert rows.names == ["id", "title"] and rows.total == 3 and not skipped.counts
    assert found == [(2, ["1", 'Say "Hi", he said']), (3, ["2", "two\nlines"]), (6, ["3", "plain"])]


@pytest.mark.parametrize(
    "bad, kind, line, n",
    [
        (b"4\n", "wrong number of fields", 3, 1),
        (b"4,5,6\n", "wrong number of fields", 3, 1),
        (b"4,\xff\n", "not UTF-8", 3, 1),
        (b'4,"a\nb\nc",5\n', "wrong number of fields", 3, 3),
        (b'4,"a"b\n', "bad quoting", 3, 1),
    ],
)
def test_bad_rows_are_counted(tmp_path, bad, kind, line, n):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,title\n1,a\n" + bad + b"2,b\n")
    found, rows = read_all(path, skipped := Skipped())
    assert [fields for _, fields in found] == [["1", "a"], ["2", "b"]]
    assert skipped.counts == {kind: n} and skipped.first == {kind: f"a.csv line {line}"}
    assert rows.total == 2 + n


def test_a_quote_never_closed_counts_all_that_it_swallows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,title\n1,a\n2,"b\n' + b"3,c\n" * 1000)
    found, rows = read_all(path, skipped := Skipped())
    assert found == [(2, ["1", "a"])] and rows.total == 1002
    with pytest.raises(ValueError, match=r"1001 of 1002 rows .*\(first: a.csv line 3\)"):
        skipped.check(path, rows.total)


def test_the_last_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,title\n1,a\n2,b")
    found, _ = read_all(path, skipped := Skipped())
    assert found == [(2, ["1", "a"])]
    assert skipped.first == {"cut last line": "a.csv line 3"}
    assert (
        len(read_all(path, skipped := Skipped(), terminated=False)[0]) == 2 and not skipped.counts
    )
    path.write_bytes(b"id,title\n1,a\n2")
    assert len(read_all(path, skipped := Skipped(), terminated=False)[0]) == 1
    assert skipped.counts == {"cut last line": 1}


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "a.csv"
    with pytest.raises(
        FileNotFoundError,
        match="a.csv is missing; put it there, or name another folder with data_dir",
    ):
        Rows(path, Skipped())
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="a.csv: no rows; the file is empty"):
        Rows(path, Skipped())
    path.write_bytes(b"id,name\n")
    with pytest.raises(ValueError, match="a.csv line 1: the columns must be id,title, got id,name"):
        Rows(path, Skipped(), ["id", "title"])


texts = st.text(alphabet='ab,"\n é', max_size=8)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=12))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, rows):
    import csv

    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("x", "y"), *rows])
    found, _ = read_all(path, Skipped())
    assert [tuple(fields) for _, fields in found] == rows


WANTED = {"user": "user", "time": "time", "rating": "rating"}


def test_columns_are_found_by_name(tmp_path):
    assert columns(tmp_path / "a", ["time", "user"], WANTED, ["rating"]) == {"user": 1, "time": 0}
    with pytest.raises(
        ValueError,
        match=r"a: no column 'user' for user_column; the columns are 'time', 'User'; did you mean 'User'\? Set user_column=User",
    ):
        columns(tmp_path / "a", ["time", "User"], WANTED, ["rating"])
    with pytest.raises(
        ValueError, match="no column 'time' .* 'user', 'x'; set time_column to one of these"
    ):
        columns(tmp_path / "a", ["user", "x"], WANTED, ["rating"])
    with pytest.raises(
        ValueError,
        match=r"did you mean 'ratings'\? Set rating_column=ratings, or leave rating_column empty to do without",
    ):
        columns(tmp_path / "a", ["user", "time", "ratings"], WANTED, ["rating"])
    assert columns(
        tmp_path / "a", ["user", "time", "ratings"], WANTED | {"rating": ""}, ["rating"]
    ) == {"user": 0, "time": 1}


cells = st.text(alphabet="ab,;\t é\u2028'0", max_size=6)
plain = st.lists(st.tuples(cells, cells), min_size=1, max_size=8)


@settings(max_examples=100)
@given(plain, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_clean_text_is_read_as_row_by_row(tmp_path_factory, rows, end, header):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes("".join(f"{a},{b}{end}" for a, b in [("x", "y"), *rows]).encode())
    options = {"has_header": header} | ({} if header else {"header": ["x", "y"]})
    fast, slow = Rows(path, a := Skipped(), **options), Rows(path, b := Skipped(), **options)
    slow._clean = lambda text: None
    found = [
        [(int(n), *fields) for lines, columns in r for n, *fields in zip(lines, *columns)]
        for r in (fast, slow)
    ]
    assert found[0] == found[1] and (fast.total, a.counts) == (slow.total, b.counts)
