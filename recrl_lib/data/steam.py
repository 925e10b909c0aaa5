"""Steam 200K: who bought and played which game, one CSV file without a header and without times.

The order of rows stands in for time. A user's games are listed together, so a global-time split
fails. A game bought and played has two rows, and counts once; its rating is the hours played.
"""

from pathlib import Path

from recrl_lib.data.reading import Rows, parsed
from recrl_lib.data.tables import (
    Raw,
    Skipped,
    catalogue,
    parse_integers,
    parse_numbers,
    sanitise_text,
)

FILE = "steam-200k.csv"
PARSERS = {
    "user": parse_integers,
    "item": lambda texts: (texts.map(sanitise_text), True),
    "what": lambda texts: (texts, texts.isin(["purchase", "play"])),
    "rating": parse_numbers,  # hours
}


def read(folder: Path, skipped: Skipped) -> Raw:
    """The rows of ``steam-200k.csv``."""
    rows = Rows(folder / FILE, skipped, [*PARSERS, "0"], has_header=False)
    table = parsed((row[:-1] for row in rows), PARSERS, rows.path, skipped)
    twice = table.duplicated(["user", "item", "what"])
    skipped.add("duplicate", rows.path, table.loc[twice, "line"])
    table = table.loc[~twice]
    hours = table["rating"].where(table["what"] == "play", 0.0)
    table = table.assign(rating=hours.groupby([table["user"], table["item"]]).transform("sum"))
    table = table.drop_duplicates(["user", "item"]).drop(columns="what").reset_index(drop=True)
    table.insert(2, "time", table.index * 1000)
    titles = sorted(table["item"].unique())
    items = catalogue(((0, title, title, 0, "") for title in titles), rows.path, skipped)
    order = "file order: the data set has no times"
    return Raw(rows.path, table, items, "Steam 200K", "game", order=order)
