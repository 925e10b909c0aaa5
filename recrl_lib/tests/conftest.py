"""Fixtures: notebooks/ and runs/ in a temporary folder, toy notebooks, a finished run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from recrl_lib import measures, paths, runs
from recrl_lib.params import PIPELINE, Params, parameters_cell, stage_named
from recrl_lib.pipeline.batch import Job
from recrl_lib.pipeline.tasks import with_needs
from recrl_lib.runs import write_atomic


@pytest.fixture(autouse=True)
def private_and_quiet(tmp_path, monkeypatch):
    """No test reads or writes the user's cache, or draws its progress."""
    monkeypatch.setenv("RECRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECRL_PROGRESS", "off")


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "id": "0", "metadata": {}, "source": text}


def code(text: str, *tags: str, output: str = "", count: int | None = None) -> dict:
    stream = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
    metadata = {"tags": list(tags)} if tags else {}
    cell = {"cell_type": "code", "id": "0", "metadata": metadata, "source": text}
    return cell | {"outputs": stream, "execution_count": count}


def notebook(*cells: dict) -> dict:
    """The cells as a notebook, with ids 0, 1, ... (cells built by ``markdown`` and ``code``)."""
    numbered = [{**cell, "id": str(i)} for i, cell in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": numbered, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


class House:
    """``paths.NOTEBOOKS`` and ``paths.RUNS`` moved below ``root``; ``move`` does it elsewhere."""

    def __init__(self, root: Path):
        self.root = root
        self.notebooks, self.runs = root / "notebooks", root / "runs"
        self.move = (
            "from pathlib import Path\nfrom recrl_lib import paths\n"
            f"paths.NOTEBOOKS, paths.RUNS = Path({str(self.notebooks)!r}), Path({str(self.runs)!r})"
        )

    def write(self, stage: str, *bodies: str) -> Path:
        """A notebook for ``stage`` that uses these folders and runs ``bodies``, one a cell."""
        cells = [code(parameters_cell(stage), "parameters"), code(self.move), *map(code, bodies)]
        path = self.notebooks / stage_named(stage).notebook
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
    torch.use_deterministic_algorithms(False)  # runs.start switches it on for the whole process


def required(stage: str, value: float = 0.5) -> list[dict]:
    """A result for every measure that ``stage`` must write."""
    return [{"measure": m, "value": value} for m in measures.REQUIRED_MEASURES.get(stage, ())]


BASE = Params(run="base", seed=4)
OWN = {
    "data": "interactions", "ranker": "ranker", "explainer": "first", "shield": "subspaces",
    "shielded_ppo": "adapter", "evaluation": "said",
}  # fmt: skip


def derived(run: str, **changes) -> Params:
    """Make the run folder of a batch's job that changes this of the run ``base``."""
    params = BASE.replace(run=run, **changes)
    Job(run, "", "base", changes, params, ("evaluation",)).prepare()
    return params


def finish(name: str, params: Params, value: float = 1.0) -> None:
    """Stage ``name`` of a run, finished without its notebook."""
    import torch

    stage = runs.start(name, params.as_dict())
    for need in stage_named(name).needs:
        if need in OWN:
            stage.load_tensors(OWN[need])
    if name in OWN:
        stage.save_tensors(OWN[name], {"x": torch.tensor([value])})
    stage.results([*required(name), {"measure": "n", "value": value}])
    stage.finish()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A house with the finished run ``base``, to be copied."""
    import torch

    house = House(tmp_path_factory.mktemp("base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "NOTEBOOKS", house.notebooks)
        patch.setattr(paths, "RUNS", house.runs)
        for stage in PIPELINE:
            cell = code("from recrl_lib import runs")
            write_atomic(house.notebooks / stage.notebook, json.dumps(notebook(cell)))
        for stage in with_needs("environment", "evaluation"):
            finish(stage.name, BASE)
    torch.use_deterministic_algorithms(False)
    return house


@pytest.fixture
def base(house, finished):
    shutil.copytree(finished.root, house.root, dirs_exist_ok=True)
    return BASE


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with the finished run ``r`` of the toy study."""
    import torch

    from recrl_lib.tests.evaluation.built import build

    root = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", root)
        patch.setenv("RECRL_HOME", str(root / "home"))
        build()
    torch.use_deterministic_algorithms(False)
    return root


@pytest.fixture
def run(built, tmp_path, monkeypatch):
    """A copy of it to change."""
    shutil.copytree(built / "r", tmp_path / "r")
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    return tmp_path / "r"
