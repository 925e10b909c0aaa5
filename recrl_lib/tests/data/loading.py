"""Loads a data set from a folder, as a run with these parameters would."""

from pathlib import Path

from recrl_lib.data import load_for
from recrl_lib.data.tables import Dataset
from recrl_lib.params import Params


def load(name: str, folder: Path, columns: dict[str, str] | None = None, **options) -> Dataset:
    """``columns``: for ``csv``, {need: name of its column}; ``options``: other parameters."""
    options |= {f"{need}_column": column for need, column in (columns or {}).items()}
    return load_for(Params(dataset=name, data_dir=str(folder), **options))
