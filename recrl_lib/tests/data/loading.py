"""Writes the files of a data set, and loads them as a run with these parameters would."""

import gzip
from pathlib import Path

from recrl_lib.data import load_for
from recrl_lib.data.tables import Dataset
from recrl_lib.params import Params


def write(folder: Path, files: dict[str, str | bytes], encoding: str = "utf-8") -> Path:
    """Make ``files`` in ``folder``, packed where their names end so."""
    for name, text in files.items():
        content = text if isinstance(text, bytes) else text.encode(encoding)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def load(name: str, folder: Path, **options) -> Dataset:
    """Without a core filter, if ``options``, parameters of a run, name none."""
    return load_for(Params(dataset=name, data_dir=str(folder), **{"min_core": 1} | options))
