"""``make bench``, the data: speed and memory of reading Amazon Books, on generated files in the exact form of 2018."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from recrl_lib.data import amazon
from recrl_lib.data.tables import Raw, Skipped, assemble
from recrl_lib.memory import peak_rss
from recrl_lib.paths import ROOT

REVIEWS, BOOKS = 5_000_000, 200_000
CATEGORIES = (
    "Romance",
    "Fantasy",
    *("Mystery", "History", "Cookbooks", "Travel", "Science") * 4,
)  # 2 of 22 are wanted
WORDS = "the a of and book story reader author love war magic time life world character plot page end begin never always".split()


def generate(folder: Path, reviews: int = REVIEWS, books: int = BOOKS, seed: int = 0) -> None:
    """Write ``Books.json.gz`` and ``meta_Books.json.gz``; some books and users are far more frequent than others, as in the real files."""
    rng = np.random.default_rng(seed)
    texts = [json.dumps(" ".join(rng.choice(WORDS, n))) for n in rng.integers(5, 100, 2000)]
    with gzip.open(folder / "meta_Books.json.gz", "wt", compresslevel=1, encoding="utf-8") as out:
        for book in range(books):
            out.write(
                f'{{"category": ["Books", "{CATEGORIES[book % len(CATEGORIES)]}"], "tech1": "", '
                f'"description": [{texts[book % 2000]}], "fit": "", "title": "Title {book}", '
                f'"also_buy": ["000047715X"], "tech2": "", "brand": "Author {book % 999}", "feature": [], "rank": '
                f'"4,558,505 in Books (", "main_cat": "Books", "similar_item": "", "date": "", "price": "$0.95", "asin": "{book:010d}"}}\n'
            )
    with gzip.open(folder / "Books.json.gz", "wt", compresslevel=1, encoding="utf-8") as out:
        for start in range(0, reviews, 100_000):
            n = min(100_000, reviews - start)
            user, book = (size * rng.random(n) ** 3 // 1 for size in (reviews // 5, books))
            rating, t, text = (
                rng.integers(1, 6, n),
                rng.integers(900_000_000, 1_540_000_000, n),
                rng.integers(0, 2000, n),
            )
            out.writelines(
                f'{{"overall": {r}.0, "verified": false, "reviewTime": "03 21, 2005", "reviewerID": "A{u:013d}", "asin": "{b:010d}", '
                f'"style": {{"Format:": " Hardcover"}}, "reviewerName": "Reader {u}", "reviewText": {texts[k]}, "summary": "Good", '
                f'"unixReviewTime": {s}}}\n'
                for u, b, r, s, k in zip(
                    *(column.astype(int).tolist() for column in (user, book, rating, t, text))
                )
            )


def main(reviews: int = REVIEWS, books: int = BOOKS) -> None:
    """Generate, read in a process of its own, and print lines a second and the peak memory of that process."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), reviews, books)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        command = [sys.executable, "-m", "recrl_lib.pipeline.bench_data", folder]
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RECRL_PROGRESS": "off"},
            check=True,
        )
    found = json.loads(done.stdout)
    counts = f"{found['books']:,} books and {found['reviews']:,} reviews, {size / 2**20:,.0f} MiB of gzip"
    print(f"\nAmazon Books, {counts}, generated in the form of 2018; seconds are CPU-seconds")
    for what, seconds in (("books", found["books_seconds"]), ("reviews", found["reviews_seconds"])):
        print(f"{what + ', one pass':<28}{seconds:>8.1f} s{found[what] / seconds:>13,.0f} lines/s")
    print(
        f"{'filters and numbering':<28}{found['rest_seconds']:>8.1f} s{found['kept']:>13,} interactions kept"
    )
    print(f"{'peak memory':<28}{found['peak_bytes'] / 2**30:>8.2f} GiB")


def read(folder: Path) -> dict[str, float]:
    """Read the files in ``folder`` as ``datasets.load`` does, with the clock (CPU-seconds) on each part."""
    clock, skipped = [time.process_time()], Skipped(normal=amazon.NORMAL)
    items, known = amazon.metadata(amazon.find(folder, amazon.METADATA), skipped)
    clock.append(time.process_time())
    path = amazon.find(folder, amazon.REVIEWS)
    table, reviews = amazon.reviews(path, items["raw"].to_numpy(), known, skipped)
    clock.append(time.process_time())
    raw = Raw(path, reviews, table, items, "generated", "book")
    data = assemble(raw, skipped, split="leave-one-out", min_core=5, max_interactions=50_000)
    clock.append(time.process_time())
    seconds = dict(
        zip(("books_seconds", "reviews_seconds", "rest_seconds"), np.diff(clock).tolist())
    )
    return seconds | {
        "books": len(known),
        "reviews": reviews,
        "kept": len(data.interactions),
        "peak_bytes": peak_rss(),
    }


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))
