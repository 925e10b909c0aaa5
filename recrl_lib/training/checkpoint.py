"""Checkpoints of one arm: safetensors files named by step, all but tensors as JSON in their header.

A file is written whole or not at all: a process killed at any moment leaves the one before it.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recrl_lib.runs import write_atomic

Content = tuple[dict[str, Tensor], dict]  # (tensors, JSON object)


class Store:
    """The checkpoints below ``folder`` of the run that ``key`` stands for (``runs.stage_key``).

    Files with another key are removed.
    """

    def __init__(self, folder: Path, key: str, keep: int = 2):
        self.folder, self.key, self.keep = folder, key, keep

    def save(self, name: str, tensors: dict[str, Tensor], plain: dict) -> None:
        header = {"json": json.dumps({"key": self.key, **plain})}
        content = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_atomic(self.folder / f"{name}.safetensors", save(content, header))

    def load(self, name: str) -> Content | None:
        """``None`` if this run has no such checkpoint. ``RuntimeError`` names a damaged file."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                plain = json.loads(file.metadata()["json"])
                if plain.pop("key") == self.key:
                    return file.get_tensors(), plain
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            said = f"checkpoint {path.name} cannot be read ({error}): delete {path}"
            raise RuntimeError(said) from None
        path.unlink()
        return None

    def save_step(self, step: int, tensors: dict[str, Tensor], plain: dict) -> None:
        """Save, then drop all but the newest ``keep``."""
        self.save(f"step-{step:06d}", tensors, plain)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            old.unlink()

    def latest(self) -> Content | None:
        """The newest step of this run, if any."""
        for torn in self.folder.glob(".*.tmp"):  # of a process that was killed while writing
            torn.unlink()
        newest = sorted(self.folder.glob("step-*"), reverse=True)
        return next((found for path in newest if (found := self.load(path.stem))), None)
