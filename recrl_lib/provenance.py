"""Where a result comes from: code, parameters, files, commit, versions, machine."""

import ast
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
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
FRONTIER = "frontier"  # the batch of shields whose price notebook 07 shows beside its own batch
_VERSIONED = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors",
    "numpy", "scipy", "pandas", "pyarrow", "scikit-learn",
)  # fmt: skip
# Files of the library, other than code, that decide what a stage writes.
LIBRARY_FILES = {
    "data": ("assets.yaml",), "evaluation": ("profiles.yaml",),
    "audit": ("policy.yaml",), "report": ("policy.yaml", "profiles.yaml"),
}  # fmt: skip


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def display(path: Path) -> str:
    """``path`` as messages show it: relative to the repository where possible."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook as plain JSON. ``ValueError`` if it is missing or not a notebook."""
    if not path.is_file():
        raise ValueError(f"notebook {display(path)} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"notebook {display(path)} cannot be read: {error!r}") from None


def tags(cell: dict) -> list[str]:
    """The tags of a notebook's cell."""
    return cell.get("metadata", {}).get("tags", [])


def source(cell: dict) -> str:
    """The text of a notebook's cell, which may be stored as a list of lines."""
    return "".join(cell["source"])


def stage_key(stage: str, params: Params, known: dict[str, str] | None = None) -> str:
    """Sha256 over all that decides a stage's result: while it is the same, no run is needed.

    It covers the code of the notebook (not prose, outputs or the parameters cell), the library
    modules it imports, the parameters that the stage owns except the run's name, the contents of
    files that no stage wrote, and the keys of the stages it needs, some of which may be ``known``.
    """
    known = {} if known is None else known
    if stage in known:
        return known[stage]
    spec, skip = stage_named(stage), {"parameters", "injected-parameters"}
    cells = read_notebook(paths.NOTEBOOKS / spec.notebook)["cells"]
    code = [source(c) for c in cells if c["cell_type"] == "code" and not skip & set(tags(c))]
    try:
        modules = library_closure(code)
    except (SyntaxError, SourceSyntaxError) as error:
        what = f"notebooks/{spec.notebook} or a module it imports"
        raise ValueError(f"{what} is not valid Python: {error}") from None
    content = {
        "cells": code,
        "modules": modules,
        "files": _files_read(stage, params),
        "versions": versions() if stage == "environment" else {},
        "parameters": {name: getattr(params, name) for name in owned_by(stage) if name != "run"},
        "needs": {need: stage_key(need, params, known) for need in spec.needs},
    }
    known[stage] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return known[stage]


def _files_read(stage: str, params: Params) -> dict[str, str]:
    """Name and sha256 of what a stage reads beside the artifacts of earlier stages."""
    if stage == "ablations":
        return batch_files(params)
    files = [paths.LIBRARY / name for name in LIBRARY_FILES.get(stage, ())]
    if stage == "data" and params.data_dir:
        files = sorted((paths.ROOT / Path(params.data_dir).expanduser()).glob("*"))
    return {path.name: sha256_file(path) for path in files if path.is_file()}


def batch_files(params: Params) -> dict[str, str]:
    """Path and sha256 of the evaluations of all runs of ``params.batch``, and of the batch
    ``frontier``, over this run."""
    names = {f"{params.run}-{batch}-*/metrics/evaluation.csv" for batch in (params.batch, FRONTIER)}
    found = sorted(path for name in names for path in paths.RUNS.glob(name))
    return {path.relative_to(paths.RUNS).as_posix(): sha256_file(path) for path in found}


def library_closure(cells: list[str]) -> dict[str, str]:
    """Digest of every module of the library that code cells import, also indirectly.

    Imports inside functions count; comments, layout and docstrings do not enter a digest. The cells
    may hold IPython magics. Raises a syntax error if a cell or a module is not valid Python.
    """
    files = {}
    for file in sorted(paths.LIBRARY.rglob("*.py")):
        parts = (PACKAGE, *file.relative_to(paths.LIBRARY).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = file
    graph = _graph(PACKAGE, tuple((file, file.stat().st_mtime_ns) for file in files.values()))
    found: dict[str, str] = {}
    todo = {name for cell in cells for name in _imported(cell)}
    while todo := todo & files.keys() - found.keys():
        module = todo.pop()
        found[module] = _digest(files[module].read_text(encoding="utf-8"))
        # Importing a.b runs a/__init__.py too.
        todo |= {module.rpartition(".")[0], *graph.find_modules_directly_imported_by(module)}
    return found


@cache
def _graph(package: str, files: tuple[tuple[Path, int], ...]) -> Any:
    """The import graph; ``files`` (names, times of change) make it new after an edit."""
    return grimp.build_graph(package, cache_dir=None)


@cache
def _digest(text: str) -> str:
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _imported(cell: str) -> set[str]:
    """Dotted names that a cell may import: modules, or attributes of modules."""
    if re.match(r"%%(?!time|capture)", cell):
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
    found = importlib.metadata.distributions(name=name)
    return next((package.version for package in found), None)


def versions() -> dict[str, str | None]:
    """Versions of the packages that numbers may depend on."""
    return {name: package_version(name) for name in _VERSIONED}


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the repository and whether files differ from it; ``(None, None)`` outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != paths.ROOT.resolve():
            return None, None  # perhaps unpacked inside somebody else's repository
        return git("rev-parse", "--verify", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def machine(device: "torch.device") -> dict[str, Any]:
    """Versions, device, processor and threads, for the manifest."""
    import torch

    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    model = re.search(r"model name\s*: (.*)", text)
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "device": device.type + gpu,
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
