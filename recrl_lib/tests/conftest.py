"""A private house for tests of runs and runner: a temporary notebooks/ and runs/, and toy notebooks to put there."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from recrl_lib import config, paths
from recrl_lib.config import Params


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("RECRL_HOME", str(tmp_path / "home"))


def parameters_source(stage: str) -> str:
    """The parameters cell of ``stage`` as its notebook must have it."""
    meta = {f.name: f for f in fields(Params)}
    smoke = Params().as_dict()
    lines = (
        f"{n} = {smoke[n]!r}  # type: {meta[n].type.__name__} {meta[n].metadata['help']}"
        for n in config.owned_by(stage)
    )
    return "\n".join(lines)


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "id": "0", "metadata": {}, "source": text}


def code(text: str, *tags: str, output: str = "", count: int | None = None) -> dict:
    stream = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
    metadata = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code",
        "id": "0",
        "metadata": metadata,
        "source": text,
        "outputs": stream,
        "execution_count": count,
    }


def notebook(*cells: dict) -> dict:
    """The cells as a notebook, with ids 0, 1, ... (cells built by ``markdown`` and ``code``)."""
    numbered = [{**cell, "id": str(i)} for i, cell in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": numbered,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


class House:
    """``paths.NOTEBOOKS`` and ``paths.RUNS`` moved below ``root``."""

    def __init__(self, root: Path):
        self.root = root
        self.notebooks, self.runs = root / "notebooks", root / "runs"

    def write(self, stage: str, *bodies: str) -> Path:
        """A notebook for ``stage`` that moves its own kernel into this house and then runs ``bodies``, one a cell."""
        move = (
            "from pathlib import Path\nfrom recrl_lib import paths\n"
            f"paths.NOTEBOOKS, paths.RUNS = Path({str(self.notebooks)!r}), Path({str(self.runs)!r})"
        )
        cells = [code(parameters_source(stage), "parameters"), code(move), *map(code, bodies)]
        path = self.notebooks / config.stage_named(stage).notebook
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook(markdown(f"# {stage}"), *cells)), encoding="utf-8")
        return path


@pytest.fixture
def house(tmp_path, monkeypatch) -> Iterator[House]:
    import torch

    built = House(tmp_path)
    monkeypatch.setattr(paths, "NOTEBOOKS", built.notebooks)
    monkeypatch.setattr(paths, "RUNS", built.runs)
    yield built
    torch.use_deterministic_algorithms(False)  # runs.start switches it on, and other tests share this process
