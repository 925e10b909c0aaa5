"""Amazon Books of 2014, 2018 and 2023: lines in the exact form of each year, clean and dirty."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recrl_lib import download
from recrl_lib.data import amazon, reading
from recrl_lib.data import load as load_data
from recrl_lib.data.tables import Skipped


def review_2014(user="A10000012B7CGYKOMPQ4L", book="000100039X", rating=5.0, time=1355616000):
    return (
        f'{{"reviewerID": "{user}", "asin": "{book}", "reviewerName": "Adam", "helpful": [0, 0], "reviewText": "Spiritually and '
        f'mentally inspiring! A book that allows you to \\"question\\" it.", "overall": {rating}, "summary": "Wonderful!", '
        f'"unixReviewTime": {time}, "reviewTime": "12 16, 2012"}}'
    )


def review_2018(user="A1REUF3A1YCPHM", book="0001713353", rating=5.0, time=1111363200, extra=""):
    return (
        f'{{"overall": {rating}, "verified": false, "reviewTime": "03 21, 2005", "reviewerID": "{user}", "asin": "{book}", '
        f'"style": {{"Format:": " Hardcover"}}, "reviewerName": "TW Ervin II", "reviewText": "The King, the Mice and the Cheese", '
        f'"summary": "A story children will love and learn from"{extra}, "unixReviewTime": {time}}}'
    )


def review_2023(
    user="AFKZENTNBQ7A7V7UXW5JJI6UGRYQ", book="0593235657", rating=5.0, time=1588687728923
):
    return (
        f'{{"rating": {rating}, "title": "Such a lovely book", "text": "I loved it.<br />Caf\\u00e9", "images": [], "asin": "X{book[1:]}", '
        f'"parent_asin": "{book}", "user_id": "{user}", "timestamp": {time}, "helpful_vote": 0, "verified_purchase": true}}'
    )


META_2014 = [
    "{'asin': '000100039X', 'salesRank': {'Books': 1234}, 'imUrl': 'http://x/y.jpg', 'categories': [['Books', 'Science Fiction & Fantasy', "
    "'Fantasy'], ['Books', 'Literature & Fiction']], 'title': \"The Hobbit &amp; Smaug's Tale\"}",
    "{'asin': '0001055178', 'categories': [['Books', 'Mystery']], 'title': 'Master Georgie'}",
    "{'asin': '0001055179', 'categories': [['Books', 'Romance']]}",
]
META_2018 = [
    '{"category": ["Books", "Romance", "Historical"], "tech1": "", "description": ["It is a bestseller."], "fit": "", "title": "Outlander", '
    '"also_buy": ["000047715X"], "image": [], "tech2": "", "brand": "Visit Amazon\'s Diana Gabaldon Page", "feature": [], "rank": '
    '"4,558,505 in Books (", "also_view": [], "details": {}, "main_cat": "Books", "similar_item": "", "date": "", "price": "$0.95", "asin": "0001713353"}',
    '{"category": ["Books", "Fantasy"], "title": "function getTime() { return 1 }", "brand": "", "asin": "0001713354"}',
    '{"category": [], "title": "Uncategorised", "brand": "", "asin": "0001713355"}',
]
META_2023 = [
    '{"main_category": "Books", "title": "Circe|", "subtitle": "Paperback", "author": {"avatar": "https://x", "name": "Madeline Miller", '
    '"about": ["She wrote"]}, "average_rating": 4.6, "rating_number": 10, "features": [], "description": [], "price": "9.99", "images": [], '
    '"videos": [], "store": "Madeline Miller (Author)", "categories": ["Books", "Literature & Fiction", "Mythology|Folk", "Fantasy"], '
    '"details": {"Publisher": "Back Bay (2020)"}, "parent_asin": "0593235657", "bought_together": null}',
    '{"main_category": "Books", "title": "Emma", "author": null, "store": "Jane Austen (Author), & 1 more", "categories": ["Books", "Romance"], '
    '"parent_asin": "0593235658"}',
    '{"main_category": "Books", "title": "Poems", "author": null, "store": null, "categories": [], "parent_asin": "0593235659"}',
]


def write(folder, reviews, meta, names=("Books.json", "meta_Books.json"), packed=False):
    for name, lines in zip(names, (reviews, meta)):
        text = "".join(f"{line}\n" for line in lines).encode()
        (folder / (name + ".gz" if packed else name)).write_bytes(
            gzip.compress(text) if packed else text
        )
    return folder


def load(folder, **options):
    return load_data("amazon-books", folder, **{"min_core": 1, "split": "global-time"} | options)


PEOPLE = ("u1", "u2", "u3")


def test_2014(tmp_path):
    books = [META_2014[0]] + [
        META_2014[0].replace("000100039X", f"000100039{n}").replace("Smaug's", f"no {n}")
        for n in range(3)
    ]
    lines = [
        review_2014(u, f"000100039{b}", time=1355616000 + 86400 * n)
        for n, (u, b) in enumerate((u, b) for b in "012X" for u in PEOPLE)
    ]
    data = load_data(
        "amazon-books",
        write(
            tmp_path,
            lines,
            books + META_2014[1:],
            ("reviews_Books.json", "meta_Books.json"),
            packed=True,
        ),
        min_core=3,
    )
    assert data.items["title"].tolist() == [f"The Hobbit & no {n} Tale" for n in range(3)] + [
        "The Hobbit & Smaug's Tale"
    ]
    assert (
        data.items["genres"].tolist()
        == ["Science Fiction & Fantasy|Fantasy|Literature & Fiction"] * 4
    )
    assert (
        data.items["text"][3]
        == "The Hobbit & Smaug's Tale. Genres: Science Fiction & Fantasy, Fantasy, Literature & Fiction."
    )
    assert (
        data.interactions["user"].tolist() == [0, 1, 2] * 4
        and data.interactions["item"].tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    )
    assert data.interactions["time"].tolist() == [1355616000 + 86400 * n for n in range(12)]
    assert (
        data.info["noun"] == "book" and data.info["n_reviews"] == 12 and data.info["n_books"] == 6
    )
    assert (
        data.info["skipped"] == {"metadata without a title": 1} and data.info["skipped_bad"] == []
    )
    assert data.info["source"] == "Amazon Books reviews, reviews_Books.json.gz"


@pytest.mark.parametrize(
    ("name", "review", "meta", "book"),
    [
        ("amazon-books-2014", review_2014, META_2014[0], "000100039X"),
        ("amazon-books-2018", review_2018, META_2018[0], "0001713353"),
        ("amazon-books", review_2023, META_2023[0], "0593235657"),
    ],
)
def test_each_year_is_read_from_the_files_that_are_fetched_for_it(
    name, review, meta, book, tmp_path
):
    metadata, reviews = (remote.name.removesuffix(".gz") for remote in download.ORIGINS[name].files)
    books = [f"{book[:-1]}{n}" for n in range(4)]
    unit = 1000 if name == "amazon-books" else 1  # milliseconds a unit of time
    lines = [
        review(f"u{u}", b, time=(1355616000 + 86400 * n) * unit)
        for u in range(3)
        for n, b in enumerate(books)
    ]
    write(tmp_path, lines, [meta.replace(book, b) for b in books], (reviews, metadata), packed=True)
    data = load_data(name, tmp_path, min_core=3)
    assert len(data.items) == 4 and len(data.interactions) == 12 and data.info["name"] == name


@pytest.mark.parametrize("packed", [False, True])
def test_2018(tmp_path, packed):
    meta = META_2018 + [META_2018[0].replace("0001713353", f"000171336{n}") for n in range(3)]
    lines = [
        review_2018("a", book, time=t)
        for t, book in enumerate(
            ("0001713353", "0001713360", "0001713361", "0001713362"), 1111363200
        )
    ]
    lines += [
        review_2018("b", "0001713355"),
        review_2018("b", "0001713399"),
        review_2018("b", "0001713354"),
        lines[0],
    ]
    data = load_data("amazon-books", write(tmp_path, lines, meta, packed=packed), min_core=1)
    assert (
        data.items["text"].tolist()
        == ["Outlander by Diana Gabaldon. Genres: Romance, Historical."] * 4
    )
    assert data.interactions["time"].tolist() == [1111363200, 1111363201, 1111363202, 1111363203]
    # the review of a book of no category is left out without a word, that of a book without metadata is counted
    assert data.info["skipped"] == {
        "metadata without a title": 1,
        "item without metadata": 1,
        "duplicate": 1,
    }
    assert data.info["skipped_first"]["item without metadata"].endswith(" line 6")
    assert data.info["skipped_bad"] == [] and data.info["n_reviews"] == 8


def test_2023(tmp_path):
    meta = META_2023 + [META_2023[1].replace("0593235658", "0593235660")]
    lines = [
        review_2023(book="0593235660", time=1588687728930),
        review_2023(),
        review_2023(book="0593235658", time=1588687728924),
        review_2023("B"),
    ]
    data = load_data(
        "amazon-books",
        write(tmp_path, lines, meta, ("Books.jsonl", "meta_Books.jsonl"), packed=True),
        min_core=1,
    )
    assert data.items["text"].tolist() == [
        "Circe| by Madeline Miller. Genres: Literature & Fiction, Mythology/Folk, Fantasy.",
        "Emma by Jane Austen. Genres: Romance.", "Emma by Jane Austen. Genres: Romance.",
    ]  # fmt: skip
    assert (
        data.interactions["item"].tolist() == [1, 2, 3]
        and data.interactions["time"].tolist() == [1588687728] * 3
    )  # by millisecond
    assert data.info["skipped"] == {"user with fewer than 3 events": 1}


DIRTY = {
    "bad JSON": [b'{"overall": 5.0, "reviewerID"', b"", b"[1, 2]"],
    "missing field": [b'{"overall": 5.0, "asin": "0001713353", "unixReviewTime": 1}', b'{"reviewerID": "", "asin": "a", "overall": 1, "unixReviewTime": 1}'],
    "unparsable field": [
        review_2018(time='"noon"').encode(), review_2018(time="1e999").encode(), review_2018(rating='"five"').encode(),
        review_2018().replace('"A1REUF3A1YCPHM"', "12").encode(),
    ],
    "not UTF-8": [review_2018("Am\u00e9lie").encode("latin-1")],
}  # fmt: skip


BOOKS = (
    np.array(["0001713353", "0001713360"], object),
    np.array([b"0001713353", b"0001713360"]),
)  # wanted, known


def clean_lines(n):
    return [
        review_2018(
            f"u{k % 40}", "0001713353" if k % 2 else "0001713360", time=1111363200 + k
        ).encode()
        for k in range(n)
    ]


@pytest.mark.parametrize(
    "kind, line", [(kind, line) for kind, lines in DIRTY.items() for line in lines]
)
def test_each_kind_of_bad_line_is_counted_and_costs_only_itself(tmp_path, monkeypatch, kind, line):
    monkeypatch.setattr(reading, "BLOCK", 2000)  # many blocks: some clean, one dirty
    lines = clean_lines(200)
    lines.insert(150, line)
    write(tmp_path, [], [META_2018[0], META_2018[0].replace("0001713353", "0001713360")])
    (tmp_path / "Books.json").write_bytes(b"\n".join(lines) + b"\n")
    skipped = Skipped()
    table, seen = amazon.reviews(tmp_path / "Books.json", *BOOKS, skipped)
    assert skipped.counts == {kind: 1} and skipped.first == {kind: "Books.json line 151"}
    assert (
        seen == 201
        and len(table) == 200
        and table["line"].tolist() == [*range(1, 151), *range(152, 202)]
    )


def test_mixed_times_are_one_time(tmp_path):
    lines = [
        review_2018(time=1420588800),
        review_2018(time=1420588800123),
        review_2018(time='"01 7, 2015"'),
    ]
    lines.append(
        review_2018()
        .replace('"unixReviewTime": 1111363200', '"x": 1')
        .replace("03 21, 2005", "01 7, 2015")
    )
    write(tmp_path, lines, META_2018)
    table, _ = amazon.reviews(tmp_path / "Books.json", *BOOKS, skipped := Skipped())
    assert (
        table["time"].tolist() == [1420588800000, 1420588800123, 1420588800000, 1420588800000]
        and not skipped.counts
    )


def test_a_cut_last_line_and_a_whole_one_without_newline(tmp_path):
    path = tmp_path / "Books.json"
    for cut, kinds, n in ((-20, {"cut last line": 1}, 199), (None, {}, 200)):
        path.write_bytes(b"\n".join(clean_lines(200))[:cut])
        table, seen = amazon.reviews(path, *BOOKS, skipped := Skipped())
        assert (skipped.counts, len(table), seen) == (kinds, n, 200)


def test_a_broken_gzip_keeps_what_came_before(tmp_path):
    packed = gzip.compress(b"".join(line + b"\n" for line in clean_lines(2000)), compresslevel=1)
    path = tmp_path / "Books.json.gz"
    path.write_bytes(packed[: -len(packed) // 3])
    with pytest.raises(
        ValueError,
        match=r"Books.json.gz line 1\d{3}: the gzip file breaks off here.*fetch it again, or set bad_row_limit=1",
    ):
        amazon.reviews(path, *BOOKS, Skipped(0.5))
    table, seen = amazon.reviews(path, *BOOKS, skipped := Skipped(1.0))
    assert 1000 < len(table) == seen < 2000 and skipped.first == {
        "broken gzip": f"Books.json.gz line {seen + 1}"
    }


def test_broken_metadata_stop_the_run_too(tmp_path):
    write(
        tmp_path,
        [review_2018()],
        [META_2018[0].replace("0001713353", f"{n:010d}") for n in range(400)],
        packed=True,
    )
    path = tmp_path / "meta_Books.json.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"meta_Books.json.gz line \d+: the gzip file breaks off here"
    ):
        load(tmp_path)
    items, _ = amazon.metadata(path, skipped := Skipped(1.0))
    assert len(items) > 300 and skipped.counts == {"broken gzip": 1}


def test_too_many_bad_lines_stop_the_run(tmp_path):
    write(tmp_path, [line.decode() for line in clean_lines(98)] + ["{", "{"], META_2018)
    with pytest.raises(
        ValueError,
        match=r"Books.json: 2 of 100 rows are unusable.*2 x bad JSON \(first: Books.json line 99\).*raise bad_row_limit",
    ):
        load(tmp_path)
    write(tmp_path, [line.decode() for line in clean_lines(98)], META_2018 + ["{'asin': oh"])
    with pytest.raises(
        ValueError,
        match=r"meta_Books.json: 1 of 4 rows .*1 x bad JSON \(first: meta_Books.json line 4\)",
    ):
        load(tmp_path)


def test_files_that_are_not_there_or_do_not_belong_together(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="must hold one of Books.jsonl, Books.jsonl.gz, Books.json, .*reviews_Books_5.json.gz; put it there",
    ):
        load(tmp_path)
    with pytest.raises(
        ValueError,
        match="no review of a fantasy or romance book; do the reviews and the metadata belong together",
    ):
        load(write(tmp_path, [review_2018(book="0000000000")], META_2018))
    with pytest.raises(
        ValueError, match="no book of the metadata is in a category called fantasy or romance"
    ):
        load(write(tmp_path, [review_2018()], META_2018[2:]))
    with pytest.raises(ValueError, match="Books.json: no rows; the file is empty"):
        load(write(tmp_path, [], META_2018))
    with pytest.raises(ValueError, match="meta_Books.json: no rows; the file is empty"):
        load(write(tmp_path, [review_2018()], []))


def test_about_as_many_of_the_latest_as_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    pairs = sorted(
        {(int(u), int(b)) for u, b in rng.integers(0, 30, (600, 2))}, key=lambda pair: hash(pair)
    )
    lines = [
        review_2018(f"u{u}", f"{b:010d}", time=1111363200 + n) for n, (u, b) in enumerate(pairs)
    ]
    meta = [META_2018[0].replace("0001713353", f"{b:010d}") for b in range(30)]
    data = load_data("amazon-books", write(tmp_path, lines, meta), max_interactions=200)
    counts = [data.interactions[column].value_counts() for column in ("user", "item")]
    assert 200 <= len(data.interactions) < 240 and min(c.min() for c in counts) >= 5
    assert data.info["min_core"] == 5
    whole = load_data("amazon-books", tmp_path)  # the default of 50,000 is more than there is
    assert (
        len(whole.interactions) > 240
        and whole.interactions["time"].max() == data.interactions["time"].max()
    )


# --- the fast reader against the slow one ------------------------------------------------------------------

values = st.one_of(
    st.integers(0, 2**40),
    st.floats(allow_nan=False, width=32),
    st.text(max_size=5),
    st.none(),
    st.booleans(),
    st.lists(st.integers(0, 3), max_size=2),
)
FIELDS = [
    "reviewerID",
    "user_id",
    "asin",
    "parent_asin",
    "overall",
    "rating",
    "unixReviewTime",
    "timestamp",
    "text",
]
records = st.one_of(
    st.builds(
        lambda u, b, r, t: {"reviewerID": u, "asin": b, "overall": r, "unixReviewTime": t},
        st.text(max_size=5),
        st.text(max_size=5),
        st.floats(0, 5),
        st.integers(0, 2**40),
    ),
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=9),
)


@given(st.lists(records, min_size=1, max_size=6), st.integers(1, 10**6))
def test_the_fast_reader_finds_what_the_slow_one_finds_or_nothing(rows, number):
    block = "".join(json.dumps(row) + "\n" for row in rows).encode()
    fast = amazon.clean_reviews(block, number)
    skipped = Skipped()
    slow = amazon.dirty_reviews(block, number, Path("x"), skipped)
    if fast is not None:
        assert not skipped.counts
        for a, b in zip(fast, slow):
            assert (a.to_pylist() if isinstance(a, pa.Array) else a.tolist()) == (
                b.to_pylist() if isinstance(b, pa.Array) else b.tolist()
            )
