"""Every path of the study, found from this file, whatever the working directory."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
RUNS = ROOT / "runs"
REFERENCE = RUNS / "reference"
FIGURES = ROOT / "figures"
LIBRARY = ROOT / "recrl_lib"


def cache_dir(*parts: str) -> Path:
    """Folder for downloaded and derived assets, created on first use and shared by all runs.

    ``$RECRL_HOME/cache`` if set (a persistent volume), else ``$XDG_CACHE_HOME/shielded-recrl``,
    else ``~/.cache/shielded-recrl``.
    """
    if home := os.environ.get("RECRL_HOME"):
        base = Path(home) / "cache"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shielded-recrl"
    path = base.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
