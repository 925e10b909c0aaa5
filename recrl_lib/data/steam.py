"""Steam 200K: who bought and played which game. One CSV file without a header: user, game, purchase or play, value, 0.

The file gives no times. The order of its rows stands in for time (``info["order"]`` says so); a user's games are listed together, so a
global-time split of it means nothing and fails. A game that was bought and played has two rows, and counts once; its rating is the
hours played.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from recrl_lib.data.reading import Rows
from recrl_lib.data.tables import Raw, Skipped, item_text, parse_numbers, sanitise_text

FILE = "steam-200k.csv"
COLUMNS = ("user", "game", "behaviour", "value", "unused")
ORDER = "file order: the data set has no times"


def read(folder: Path, skipped: Skipped) -> Raw:
    """The rows of ``steam-200k.csv``. Raises ``ValueError`` for too many bad rows; ``FileNotFoundError``."""
    path = folder / FILE
    rows, parts = Rows(path, skipped, COLUMNS, has_header=False), []
    for lines, (user, game, behaviour, value, _) in rows:
        (user, user_good), (value, value_good) = (
            parse_numbers(user, np.int64),
            parse_numbers(value, np.float64),
        )
        behaviour, game = (
            np.array(behaviour, object),
            np.array([sanitise_text(g) for g in game], object),
        )
        good = user_good & value_good & np.isin(behaviour, ("purchase", "play"))
        skipped.add_rows("unparsable field", path, lines[~good])
        skipped.add_rows("missing field", path, lines[good & (game == "")])
        good &= game != ""
        part = pd.DataFrame(
            {"user": user, "item": game, "behaviour": behaviour, "rating": value, "line": lines}
        )
        parts.append(part[good])
    skipped.check(path, rows.total)
    table = pd.concat(parts, ignore_index=True)
    twice = table.duplicated(["user", "item", "behaviour"])
    skipped.add_rows("duplicate", path, table.loc[twice, "line"].to_numpy())
    table = table[~twice]
    hours = (
        table["rating"]
        .where(table["behaviour"] == "play", 0.0)
        .groupby([table["user"], table["item"]])
        .transform("sum")
    )
    table = table.assign(rating=hours).drop_duplicates(["user", "item"]).drop(columns="behaviour")
    table.insert(2, "time", np.arange(len(table), dtype=np.int64) * 1000)
    titles = sorted(table["item"].unique())
    items = pd.DataFrame(
        {
            "raw": titles,
            "title": titles,
            "year": 0,
            "genres": "",
            "text": [item_text(t, 0, "") for t in titles],
        }
    )
    return Raw(
        path, rows.total, table.reset_index(drop=True), items, "Steam 200K", "game", order=ORDER
    )
