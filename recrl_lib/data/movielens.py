"""MovieLens since 2014 (25M, 32M, latest-small): ``ratings.csv`` and ``movies.csv``, with quoted titles."""

from pathlib import Path

import numpy as np
import pandas as pd

from recrl_lib.data.ml100k import title_and_year
from recrl_lib.data.reading import Rows
from recrl_lib.data.tables import (
    Raw,
    Skipped,
    item_text,
    milliseconds,
    parse_numbers,
    sanitise_text,
)

RATINGS, MOVIES = ("userId", "movieId", "rating", "timestamp"), ("movieId", "title", "genres")
NO_GENRES = "(no genres listed)"


def read(folder: Path, skipped: Skipped) -> Raw:
    """The rows of the two files. Raises ``ValueError`` for other columns or too many bad rows; ``FileNotFoundError``."""
    path = folder / "ratings.csv"
    rows, parts = Rows(path, skipped, RATINGS), []
    for lines, (user, item, rating, time) in rows:
        numbers = [
            *(parse_numbers(texts, np.int64) for texts in (user, item, time)),
            parse_numbers(rating, np.float64),
        ]
        good = np.logical_and.reduce([parsable for _, parsable in numbers])
        skipped.add_rows("unparsable field", path, lines[~good])
        user, item, time, rating = (values[good] for values, _ in numbers)
        parts.append(
            pd.DataFrame(
                {
                    "user": user,
                    "item": item,
                    "time": milliseconds(time),
                    "rating": rating,
                    "line": lines[good],
                }
            )
        )
    skipped.check(path, rows.total)
    items = _items(folder / "movies.csv", skipped)
    return Raw(
        path,
        rows.total,
        pd.concat(parts, ignore_index=True),
        items,
        f"MovieLens, {folder.name}",
        "film",
    )


def _items(path: Path, skipped: Skipped) -> pd.DataFrame:
    rows, out = Rows(path, skipped, MOVIES), {}
    for lines, fields in rows:
        for line, raw, text, genres in zip(lines, *fields):
            title, year = title_and_year(sanitise_text(text))
            genres = (
                ""
                if genres == NO_GENRES
                else "|".join(filter(None, map(sanitise_text, genres.split("|"))))
            )
            if not raw.isdecimal() or not title:
                skipped.add("missing field", path, line)
            elif int(raw) in out:
                skipped.add("duplicate", path, line)
            else:
                out[int(raw)] = int(raw), title, year, genres, item_text(title, year, genres)
    skipped.check(path, rows.total)
    return pd.DataFrame(out.values(), columns=["raw", "title", "year", "genres", "text"])
