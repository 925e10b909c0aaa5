"""Steam 200K: who bought and played which game, one CSV file without a header and without times.

The order of rows stands in for time. A user's games are listed together, so a global-time split
fails. A game bought and played has two rows, and counts once; its rating is the hours played.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from recrl_lib.data.reading import Rows
from recrl_lib.data.tables import Raw, Skipped, catalogue, parse_numbers, sanitise_text

FILE = "steam-200k.csv"
COLUMNS = ("user", "game", "purchase or play", "hours", "0")
ORDER = "file order: the data set has no times"


def read(folder: Path, skipped: Skipped) -> Raw:
    """The rows of ``steam-200k.csv``."""
    path = folder / FILE

    def parse(lines: np.ndarray, *columns: pa.Array) -> pd.DataFrame:
        game, what = (columns[place].to_pylist() for place in (1, 2))
        user, user_good = parse_numbers(columns[0], np.int64)
        hours, hours_good = parse_numbers(columns[3], np.float64)
        table = pd.DataFrame({"user": user, "item": map(sanitise_text, game), "rating": hours})
        table = table.assign(what=what, line=lines)
        good = user_good & hours_good & table["what"].isin(("purchase", "play"))
        skipped.add("unparsable field", path, lines[~good])
        skipped.add("missing field", path, lines[good & (table["item"] == "")])
        return table.loc[good & (table["item"] != "")]

    table = Rows(path, skipped, COLUMNS, has_header=False).frame(parse)
    twice = table.duplicated(["user", "item", "what"])
    skipped.add("duplicate", path, table.loc[twice, "line"])
    table = table.loc[~twice]
    hours = table["rating"].where(table["what"] == "play", 0.0)
    table = table.assign(rating=hours.groupby([table["user"], table["item"]]).transform("sum"))
    table = table.drop_duplicates(["user", "item"]).drop(columns="what").reset_index(drop=True)
    table.insert(2, "time", table.index * 1000)
    titles = sorted(table["item"].unique())
    items = catalogue(((0, title, title, 0, "") for title in titles), path, skipped)
    return Raw(path, table, items, "Steam 200K", "game", order=ORDER)
