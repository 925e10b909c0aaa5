"""Data sets: one loader a format, all yielding the same three tables; splits.

A loader is a module of this package with ``read(folder, skipped) -> Raw``; ``tables.assemble`` filters and numbers what it has read.
Titles are untrusted text: they end up in prompts and HTML, so every loader passes them through ``sanitise_text``. Bad rows are
counted by kind and left out, and too many of them stop the run; the kinds::

    cut last line           the file ends in the middle of a row
    broken gzip             the compressed stream ends too early or is damaged: stops the run, since nobody can count what is lost
                            behind it; with bad_row_limit=1 what comes before counts
    not UTF-8, bad JSON, bad quoting, wrong number of fields, missing field, unparsable field
    duplicate               a second row of the same user and item (the first counts), or of the same item in an items table
    item without metadata   an interaction with an item that has no row in the items table
    user with fewer than 3 events   counted in users, as given or as the filters leave them; leave-one-out cannot split them
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from recrl_lib import assets, download
from recrl_lib.data import amazon, custom, ml100k, movielens, steam
from recrl_lib.data.splits import split
from recrl_lib.data.tables import SHORT_USER, Dataset, Raw, Skipped, assemble
from recrl_lib.params import Params
from recrl_lib.paths import ROOT
from recrl_lib.runs import sha256_file

__all__ = [
    "Dataset",
    "NAMES",
    "SHORT_USER",
    "Split",
    "check_enough",
    "folder_of",
    "held_times",
    "item_text",
    "k_core",
    "load",
    "load_for",
    "sanitise_text",
    "split",
    "split_global_time",
    "split_leave_one_out",
    "split_users",
    "time_cuts",
]

AMAZON = (
    "amazon-books",
    "amazon-books-2018",
    "amazon-books-2014",
)  # one reader knows the three formats; where they are fetched from differs
READERS: dict[str, Callable[[Path, Skipped], Raw]] = {
    "ml-100k": ml100k.read,
    "ml-25m": movielens.read,
    "ml-32m": movielens.read,
    "ml-latest-small": movielens.read,
    **dict.fromkeys(AMAZON, amazon.read),
    "steam-200k": steam.read,
    "csv": custom.read,
}
NAMES = tuple(READERS)
NORMAL = {
    **dict.fromkeys(AMAZON, amazon.NORMAL),
    "steam-200k": frozenset(("duplicate",)),
    "csv": frozenset(("duplicate",)),
}
MIN_CORE = {"ml-100k": 1}  # figures compare with published ones; elsewhere 5
MAX_INTERACTIONS = dict.fromkeys(AMAZON, 50_000)  # the paper's; elsewhere all


def load(
    name: str,
    folder: Path,
    *,
    split: str = "leave-one-out",
    min_core: int = 0,
    max_interactions: int = 0,
    bad_row_limit: float = 0.01,
    item_case: str = "plain",
    columns: dict[str, str] | None = None,
) -> Dataset:
    """Data set ``name`` from its files in ``folder``.

    Args:
        split: the split to be made of it, which decides about users that cannot be split.
        min_core: smallest number of events of a user and of an item, by iterated filtering; 1: no filter; 0: the data set's default.
        max_interactions: keep about this many of the latest; 0: the data set's default.
        bad_row_limit: largest share of bad rows in a file.
        item_case: ``upper`` for item texts in capitals; titles stay as they are.
        columns: for ``csv``, the name of each column of ``own.NEEDS``; those of the same name by default.

    Raises ``ValueError`` naming file, field and remedy; ``FileNotFoundError`` naming what must be where.
    """
    if name not in READERS:
        raise ValueError(f"no data set is called {name!r}; choose one of {', '.join(NAMES)}")
    folder, skipped = (
        Path(folder),
        Skipped(bad_row_limit, NORMAL.get(name, frozenset()) | {SHORT_USER}),
    )
    read = (
        partial(custom.read, names={need: need for need in custom.NEEDS} | (columns or {}))
        if name == "csv"
        else READERS[name]
    )
    raw = read(folder, skipped)
    raw.info = {"name": name, "sha256": sha256_file(raw.path)} | raw.info
    if item_case == "upper":
        raw.items["text"] = raw.items["text"].str.upper()
    return assemble(
        raw,
        skipped,
        split=split,
        min_core=min_core or MIN_CORE.get(name, 5),
        max_interactions=max_interactions or MAX_INTERACTIONS.get(name, 0),
    )


def load_for(params: Params) -> Dataset:
    """The data set that a run's parameters name, from ``data_dir`` or else fetched."""
    columns = {need: getattr(params, f"{need}_column") for need in custom.NEEDS}
    return load(
        params.dataset,
        folder_of(params.dataset, params.data_dir),
        split=params.split,
        min_core=params.min_core,
        max_interactions=params.max_interactions,
        bad_row_limit=params.bad_row_limit,
        item_case=params.item_case,
        columns=columns,
    )


def folder_of(name: str, data_dir: str = "") -> Path:
    """The folder with a data set's files: ``data_dir`` (relative to the repository), or where they have been fetched to.

    Raises ``FileNotFoundError`` if ``data_dir`` is no folder, ``ValueError`` if a data set without an origin on the network needs one,
    ``RuntimeError`` if fetching fails.
    """
    if data_dir:
        folder = ROOT / Path(data_dir).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"data_dir={data_dir!r}: {folder} is no folder; relative paths start at the repository"
            )
        return folder
    if name == "ml-100k":
        return assets.ml100k_folder()
    if name not in download.ORIGINS:
        needed = (
            steam.FILE if name == "steam-200k" else "interactions.csv and items.csv (or .parquet)"
        )
        example = f"make all DATASET={name} DATA_DIR=path"
        raise ValueError(
            f"dataset={name!r} is not fetched: set data_dir to the folder with {needed}, for example {example}"
        )
    return download.folder(name)
