"""Where a result comes from: code, parameters, files, commit, versions, machine."""

import ast
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grimp
from grimp.exceptions import SourceSyntaxError

from recrl_lib import paths
from recrl_lib.params import Params, owned_by, stage_named

if TYPE_CHECKING:  # torch is imported where it is used: deciding what to skip must be quick
    import torch

PACKAGE = "recrl_lib"
_VERSIONED = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors",
    "numpy", "scipy", "pandas", "pyarrow", "scikit-learn",
)  # fmt: skip
# Files of the library, other than code, that decide what a stage writes.
LIBRARY_FILES = {
    "data": ("assets.yaml",),
    "shield": ("grids.yaml",),
    "evaluation": ("profiles.yaml",),
    "audit": ("policy.yaml",),
    "report": ("policy.yaml", "profiles.yaml"),
}


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def display(path: Path) -> str:
    """``path`` as messages show it: relative to the repository where possible."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook as plain JSON. ``ValueError`` if it is missing or not a notebook."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"]
    except FileNotFoundError:
        raise ValueError(f"notebook {display(path)} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"notebook {display(path)} cannot be read: {error!r}") from None
    return notebook


def tags(cell: dict) -> list[str]:
    """The tags of a notebook's cell."""
    return cell.get("metadata", {}).get("tags", [])


def source(cell: dict) -> str:
    """The text of a notebook's cell, which may be stored as a list of lines."""
    return "".join(cell["source"])


def stage_key(stage: str, params: Params) -> str:
    """Sha256 over all that decides a stage's result: while it is the same, no run is needed.

    It covers the code of the notebook (not prose, outputs or the parameters cell), the library
    modules it imports, the parameters that the stage owns except the run's name, the contents of
    files that no stage wrote, and the keys of the stages it needs. Two runs with equal keys of a
    stage can share what it wrote.
    """
    return _stage_key(stage, params, {})


def _stage_key(stage: str, params: Params, known: dict[str, str]) -> str:
    if stage in known:
        return known[stage]
    spec = stage_named(stage)
    notebook = read_notebook(paths.NOTEBOOKS / spec.notebook)
    skip = {"parameters", "injected-parameters"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    cells = [source(cell) for cell in code if not skip & set(tags(cell))]
    try:
        modules = library_closure(cells)
    except SyntaxError as error:
        raise ValueError(
            f"notebooks/{spec.notebook} or a module it imports is not valid Python: {error}"
        ) from None
    owned = {name: getattr(params, name) for name in owned_by(stage) if name != "run"}
    content = {
        "cells": cells,
        "modules": modules,
        "files": _files_read(stage, params),
        "versions": versions() if stage == "environment" else {},
        "parameters": owned,
        "needs": {need: _stage_key(need, params, known) for need in spec.needs},
    }
    known[stage] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return known[stage]


def _files_read(stage: str, params: Params) -> dict[str, str]:
    """Name and sha256 of what a stage reads beside the artifacts of earlier stages."""
    if stage == "ablations":
        return batch_files(params)
    files: Iterable[Path] = ()
    if stage in LIBRARY_FILES:
        files = [f for pattern in LIBRARY_FILES[stage] for f in paths.LIBRARY.glob(pattern)]
    elif stage == "data" and params.data_dir:
        folder = paths.ROOT / Path(params.data_dir).expanduser()
        files = folder.iterdir() if folder.is_dir() else ()
    return {path.name: sha256_file(path) for path in sorted(files) if path.is_file()}


def batch_files(params: Params) -> dict[str, str]:
    """Path and sha256 of the evaluations of all runs of ``params.batch`` over this run."""
    found = sorted(paths.RUNS.glob(f"{params.run}-{params.batch}-*/metrics/evaluation.csv"))
    return {path.relative_to(paths.RUNS).as_posix(): sha256_file(path) for path in found}


def library_closure(cells: list[str]) -> dict[str, str]:
    """Digest of every module of the library that code cells import, also indirectly.

    Imports inside functions count; comments, layout and docstrings do not enter a digest. The cells
    may hold IPython magics. ``SyntaxError`` if a cell or a module is not valid Python.
    """
    files = {_module_name(file): file for file in sorted(paths.LIBRARY.rglob("*.py"))}
    try:
        graph = _graph(PACKAGE, tuple((str(f), f.stat().st_mtime_ns) for f in files.values()))
    except SourceSyntaxError as error:
        raise SyntaxError(str(error)) from None
    found: set[str] = set()
    todo = {name for cell in cells for name in _imported(cell)} & files.keys()
    while todo:
        module = todo.pop()
        found.add(module)
        parent = module.rpartition(".")[0]  # importing a.b runs a/__init__.py too
        todo |= ({parent} & files.keys() | graph.find_modules_directly_imported_by(module)) - found
    return {name: _digest(files[name].read_text(encoding="utf-8")) for name in sorted(found)}


def _module_name(file: Path) -> str:
    parts = (PACKAGE, *file.relative_to(paths.LIBRARY).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _graph(package: str, files: tuple[tuple[str, int], ...]) -> Any:
    """The import graph; ``files`` (names, times of change) make it new after an edit."""
    return grimp.build_graph(package, cache_dir=None)


@cache
def _digest(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        if documented and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _imported(cell: str) -> set[str]:
    """Dotted names that a cell may import: modules, or attributes of modules."""
    if cell.startswith("%%") and not cell.startswith(("%%time", "%%capture")):
        return set()  # a cell in another language
    try:
        tree = ast.parse(cell)
    except SyntaxError:  # lines of IPython: %matplotlib inline, !ls
        tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell, flags=re.MULTILINE), "notebook")
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def package_version(name: str) -> str | None:
    """Version of an installed package, ``None`` if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of the packages that numbers may depend on."""
    return {name: package_version(name) for name in _VERSIONED}


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the repository and whether files differ from it; ``(None, None)`` outside one."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "--verify", "HEAD")
    if top is None or commit is None or Path(top).resolve() != paths.ROOT.resolve():
        return None, None  # perhaps unpacked inside somebody else's repository
    status = git("status", "--porcelain")
    return commit, None if status is None else bool(status)


def machine(device: "torch.device") -> dict[str, Any]:
    """Versions, device, processor and threads, for the manifest."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "device": device.type + gpu,
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
