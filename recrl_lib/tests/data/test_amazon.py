"""Amazon Books of 2014, 2018 and 2023: lines in the form of each year, clean and dirty."""

import gzip
import json

import pytest

from recrl_lib import assets
from recrl_lib.data import reading
from recrl_lib.tests.data.loading import load, write

BOOKS = ("0001713353", "0001713360", "0001713361")


def review_2014(user="u1", book=BOOKS[0], rating=5.0, time=1355616000):
    text = {"reviewerID": user, "asin": book, "helpful": [0, 0], "reviewText": 'To "question".'}
    text |= {"overall": rating, "unixReviewTime": time, "reviewTime": "12 16, 2012"}
    return json.dumps(text)


def review_2018(user="u1", book=BOOKS[0], rating=5.0, time=1111363200):
    text = {"overall": rating, "verified": False, "reviewTime": "03 21, 2005", "reviewerID": user}
    text |= {"asin": book, "style": {"Format:": " Hardcover"}, "unixReviewTime": time}
    return json.dumps(text)


def review_2023(user="u1", book=BOOKS[0], rating=5.0, time=1588687728923):
    text = {"rating": rating, "title": "Lovely<br />Caf\u00e9", "images": [], "asin": f"X{book}"}
    text |= {"parent_asin": book, "user_id": user, "timestamp": time, "helpful_vote": 0}
    return json.dumps(text)


def book_2014(book=BOOKS[0], title="The Hobbit &amp; Smaug's Tale"):
    paths = [["Books", "Science Fiction & Fantasy", "Fantasy"], ["Books", "Literature"]]
    return repr({"asin": book, "salesRank": {"Books": 1}, "categories": paths, "title": title})


def book_2018(book=BOOKS[0], title="Outlander", category=("Books", "Romance", "Historical")):
    text = {"category": category, "tech1": "", "title": title, "asin": book}
    return json.dumps(text | {"brand": "Visit Amazon's Diana Gabaldon Page", "feature": []})


def book_2023(book=BOOKS[0], title="Circe|", author="Madeline Miller"):
    text = {"title": title, "parent_asin": book, "categories": ["Books", "Myth|Folk", "Fantasy"]}
    text |= {"author": {"avatar": "x", "name": author} if author else None}
    return json.dumps(text | {"store": "Jane Austen (Author), & 1 more", "details": {}})


YEARS = [
    ("amazon-books-2014", review_2014, book_2014, 1, "The Hobbit & Smaug's Tale. Genres: Science "
     "Fiction & Fantasy, Fantasy, Literature."),
    ("amazon-books-2018", review_2018, book_2018, 1,
     "Outlander by Diana Gabaldon. Genres: Romance, Historical."),
    ("amazon-books", review_2023, book_2023, 1000,
     "Circe| by Madeline Miller. Genres: Myth/Folk, Fantasy.")
]  # fmt: skip


def books(folder, reviews, meta, names=("Books.json", "meta_Books.json")):
    def text(lines):
        return b"".join(f"{line}\n".encode() if isinstance(line, str) else line for line in lines)

    return write(folder, dict(zip(names, map(text, (reviews, meta)))))


@pytest.mark.parametrize("name, review, book, unit, text", YEARS)
def test_each_year_is_read_from_the_files_that_are_fetched_for_it(
    tmp_path, name, review, book, unit, text
):
    meta, reviews = (url.rpartition("/")[2] for url in assets.ORIGINS[name])
    pairs = [(user, item) for item in BOOKS for user in ("u1", "u2", "u3")]
    times = [1355616000 + 86_400 * n for n in range(9)]
    lines = [review(*pair, time=time * unit) for pair, time in zip(pairs, times)]
    data = load(name, books(tmp_path, lines, map(book, BOOKS), (reviews, meta)), min_core=3)
    assert data.items["text"].tolist() == [text] * 3
    assert data.interactions.to_dict("list") == {
        "user": [0, 1, 2] * 3, "item": [1] * 3 + [2] * 3 + [3] * 3, "time": times,
        "rating": [5.0] * 9
    }  # fmt: skip
    info = {"noun": "book", "n_reviews": 9, "n_books": 3, "skipped": {}, "name": name}
    assert (info | {"source": f"Amazon Books reviews, {reviews}"}).items() <= data.info.items()
    for path in (tmp_path / reviews, tmp_path / meta):  # unpacked they are found too
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert load(name, tmp_path, min_core=3).interactions.equals(data.interactions)


def test_what_is_in_the_nature_of_the_data_is_no_bad_row(tmp_path):
    meta = [*map(book_2018, BOOKS), book_2018(title="Again"), book_2018("b", "")]
    meta += [book_2018("a", "function getTime() {}"), book_2018("c", "C", ["Books"])]
    lines = [review_2018("u1", book) for book in BOOKS]
    # Of a book of no category: left out without a word. Without metadata or a title: counted.
    lines += [review_2018("u2", "c"), review_2018("u2", "x"), review_2018("u2", "a"), lines[0]]
    data = load("amazon-books", books(tmp_path, lines, meta))
    assert data.info["skipped"] == {
        "duplicate": 2, "metadata without a title": 2, "item without metadata": 1
    }  # fmt: skip
    assert data.info["skipped_first"]["item without metadata"] == "Books.json line 5"
    assert data.info["skipped_bad"] == [] and data.info["n_reviews"] == 7
    assert data.items["title"].tolist() == ["Outlander"] * 3


def test_the_order_is_that_of_milliseconds_and_a_date_does_without_a_time(tmp_path):
    meta = [*map(book_2023, BOOKS[:2]), book_2023(BOOKS[2], "Emma", "")]
    lines = [review_2023(book=b, time=1588687728930 - n) for n, b in enumerate(BOOKS)]
    data = load("amazon-books", books(tmp_path, lines, meta))
    assert data.interactions["item"].tolist() == [3, 2, 1]
    assert data.interactions["time"].tolist() == [1588687728] * 3
    assert data.items["text"].tolist()[2] == "Emma by Jane Austen. Genres: Myth/Folk, Fantasy."
    lines = [review_2018(book=b).replace("unixReviewTime", "x") for b in BOOKS]
    data = load("amazon-books", books(tmp_path, lines, map(book_2018, BOOKS)))
    assert data.interactions["time"].tolist() == [1111363200] * 3


DIRTY = {
    "bad JSON": [b'{"overall": 5.0, "reviewerID"\n', b"\n", b"[1, 2]\n"],
    "missing field": [
        b'{"overall": 5.0, "asin": "0001713353", "unixReviewTime": 1}\n',
        b'{"reviewerID": "", "asin": "a", "overall": 1, "unixReviewTime": 1}\n',
        b'{"reviewerID": "u", "asin": "a", "overall": 1}\n',
    ],
    "unparsable field": [
        review_2018(time="noon"),
        review_2018(rating="five"),
        review_2018().replace('"u1"', "12"),
        review_2018().replace("03 21, 2005", "noon").replace("unixReviewTime", "x"),
    ],
    "not UTF-8": [review_2018("Am").replace("Am", "Am\u00e9").encode("latin-1") + b"\n"],
}


@pytest.mark.parametrize("kind, line", [(kind, x) for kind, lines in DIRTY.items() for x in lines])
def test_each_kind_of_bad_line_is_counted_and_costs_only_itself(tmp_path, monkeypatch, kind, line):
    monkeypatch.setattr(reading, "CHUNK", 50)  # many chunks: some clean, one dirty
    lines = [review_2018(f"u{n // 3}", BOOKS[n % 3], time=1111363200 + n) for n in range(198)]
    lines.insert(150, line)
    data = load("amazon-books", books(tmp_path, lines, map(book_2018, BOOKS)))
    assert data.info["skipped"] == {kind: 1} and data.info["skipped_bad"] == [kind]
    assert data.info["skipped_first"] == {kind: "Books.json line 151"}
    assert data.info["n_reviews"] == 199
    assert data.interactions["time"].tolist() == [1111363200 + n for n in range(198)]


@pytest.mark.parametrize("cut, counts", [(-1, {}), (-20, {"cut last line": 1})])
def test_a_whole_last_line_without_newline_and_a_cut_one(tmp_path, cut, counts):
    lines = [review_2018(u, b) for b in BOOKS for u in ("u1", "u2")] + [review_2018("u1", "c")]
    path = books(tmp_path, lines, map(book_2018, (*BOOKS, "c"))) / "Books.json"
    path.write_bytes(path.read_bytes()[:cut])
    data = load("amazon-books", tmp_path, bad_row_limit=0.5)
    assert data.info["skipped"] == counts and data.info["n_reviews"] == 7


@pytest.mark.parametrize(
    "reviews, meta, message",
    [
        ([review_2018()] * 98 + ["{"] * 2, [book_2018()], r"Books.json: 2 of 100 rows are unusable"
         r".*2 x bad JSON \(first: Books.json line 99\).*raise bad_row_limit"),
        ([review_2018()], [book_2018(), "{'asin': oh"], r"meta_Books.json: 1 of 2 rows .*bad JSON"),
        ([review_2018(book="0")], [book_2018()], "no review of a fantasy or romance book; do the"),
        ([review_2018()], [book_2018(category=["Books"])], "no book of the metadata is in a categ"),
        ([], [book_2018()], "Books.json: no rows; the file is empty"),
    ]
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path, reviews, meta, message):
    missing = "must hold one of Books.jsonl, Books.jsonl.gz, .*Books_5.json.gz: none is there"
    with pytest.raises(FileNotFoundError, match=missing):
        load("amazon-books", tmp_path)
    with pytest.raises(ValueError, match=message):
        load("amazon-books", books(tmp_path, reviews, meta))
