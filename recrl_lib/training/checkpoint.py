"""Checkpoints of one arm.

A file is written whole or not at all: a process killed at any moment leaves the one before it.
"""

import io
from pathlib import Path

import torch

from recrl_lib.runs import write_atomic


class Store:
    """The checkpoints below ``folder`` of the run that ``key`` stands for (``runs.stage_key``).

    Each is a dict of tensors, numbers, texts, and lists and dicts of them. Files with another key
    are removed.
    """

    def __init__(self, folder: Path, key: str, keep: int = 2):
        self.folder, self.key, self.keep = folder, key, keep

    def save(self, name: str, content: dict) -> None:
        buffer = io.BytesIO()
        torch.save({"key": self.key, "content": content}, buffer)
        write_atomic(self.folder / f"{name}.pt", buffer.getvalue())

    def load(self, name: str) -> dict | None:
        """``None`` if this run has no such checkpoint. ``RuntimeError`` names a damaged file."""
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            return None
        try:
            found = torch.load(path, "cpu", weights_only=True)  # no code that a file may hold
        except Exception as error:  # of a kind that depends on where the damage is
            said = f"checkpoint {path.name} cannot be read ({type(error).__name__})"
            raise RuntimeError(f"{said}: delete {path}") from None
        if found["key"] == self.key:
            return found["content"]
        path.unlink(missing_ok=True)  # another process may have been faster
        return None

    def save_step(self, step: int, content: dict) -> None:
        """Save, then drop all but the newest ``keep``."""
        self.save(f"step-{step:06d}", content)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            old.unlink()

    def latest(self) -> dict | None:
        """The newest step of this run, if any."""
        for torn in self.folder.glob(".*.tmp"):  # of a process that was killed while writing
            torn.unlink(missing_ok=True)
        newest = sorted(self.folder.glob("step-*"), reverse=True)
        return next((found for path in newest if (found := self.load(path.stem))), None)
