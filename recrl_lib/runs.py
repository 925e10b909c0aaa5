"""Files: written whole or not at all, and hashed."""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

if TYPE_CHECKING:  # imported where used: the runner decides what to skip without waiting for torch
    import pandas as pd
    import torch
from recrl_lib import paths
from recrl_lib.params import PIPELINE, STAGES, Params, Stage, check_names, owned_by, stage_named


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must survive a power cut
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ARMS = ("base", "separate", "unshielded", "shielded")
_ARM_METRICS = (
    "reward ctr ctr_lift ctr_lift_lo ctr_lift_hi kl ndcg@10 hr@10 top10_overlap top10_set_same top10_exact kendall_tau "
    "max_abs_score_delta rbo grounding_precision grounding_recall own_item_retrieval@10 distinct_2 usr mean_tokens"
).split()
AUDITED = "toxicity_mean toxicity_p95 gini_base gini_after parity_gap privacy_leak_rate".split()

# The keys that other tools may rely on, by name of the metrics file; a stage may write more.
REQUIRED_METRICS: dict[str, tuple[str, ...]] = {
    "data": tuple("n_users n_items n_interactions source sha256".split()),
    "ranker": tuple(
        "ndcg@10 hr@10 mrr@10 valid_ndcg@10 epochs train_seconds text_free_ndcg@10".split()
    ),
    "explainer": tuple("trainable_params total_params trainable_fraction".split()),
    "shield": tuple(
        "energy rank_mean rank_max capacity_left_mean leak_before leak_after overlap_mean".split()
    ),
    "ppo": tuple(
        "steps episodes reward_first reward_last kl_last kl_max clip_fraction_last ratio_first_minibatch_max_dev "
        "shield_seconds step_seconds generated_tokens_per_second peak_memory_gb".split()
    ),
    "evaluation": tuple(f"{arm}/{name}" for arm in ARMS for name in _ARM_METRICS)
    + ("separate/scores_sha256_equal",),
    "audit": tuple(AUDITED) + tuple(f"{name}_ok" for name in AUDITED),
}
# The measures that each stage's table of results must hold, for any arm; a stage may write more.
REQUIRED_MEASURES: dict[str, tuple[str, ...]] = {
    "data": ("n_users", "n_items", "n_interactions"),
    "ranker": tuple("ndcg@10 hr@10 mrr@10 valid_ndcg@10 train_seconds text_free_ndcg@10".split()),
    "explainer": ("trainable_parameters", "total_parameters"),
    "shield": tuple("rank_mean energy overlap leak_before leak_after".split()),
    "shielded_ppo": tuple(
        "steps episodes reward_first reward_last kl_last ratio_first_minibatch_max_dev "
        "shield_seconds step_seconds peak_memory_gb".split()
    ),
    "evaluation": tuple(
        "reward grounding_precision grounding_recall ctr ctr_lift kl ndcg@10 hr@10 top10_overlap "
        "top10_set_same top10_exact kendall_tau rbo max_abs_score_delta distinct_2 tokens "
        "finished".split()
    ),
    "audit": tuple(AUDITED),
}
# Those of them that every one of these arms must have.
REQUIRED_ARMS = {"shielded_ppo": ("unshielded", "shielded"), "evaluation": ARMS}
RESULT_KEY = ("arm", "against", "group", "measure")  # what tells one result from another
RESULT_NUMBERS = ("value", "low", "high", "n", "seeds")
_VERSIONED = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors",
    "numpy", "scipy", "pandas", "pyarrow", "scikit-learn",
)  # fmt: skip
_PACKAGE = "recrl_lib"


def metrics_name(stage: str) -> str:
    """Name of ``stage``'s JSON file in ``metrics/``."""
    return "ppo" if stage == "shielded_ppo" else stage


# ---------------------------------------------------------------------------------------------- files


def run_folder(run: str) -> Path:
    return paths.RUNS / run


def display(path: Path) -> str:
    """``path`` as messages show it: relative to the repository where possible."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeError(
            f"{display(path)}: not valid JSON ({error}); delete it and run the stage that writes it again"
        ) from None
    if not isinstance(content, dict):
        raise RuntimeError(
            f"{display(path)}: not a JSON object; delete it and run the stage that writes it again"
        )
    return content


def read_metrics(run: str, name: str) -> dict[str, float | str | bool]:
    """``runs/<run>/metrics/<name>.json``, e.g. ``read_metrics("smoke", "ppo")``. ``RuntimeError`` if missing."""
    path = run_folder(run) / "metrics" / f"{name}.json"
    if not path.is_file():
        raise RuntimeError(
            f"{display(path)} is missing: run the stage that writes it, or check the run's name"
        )
    return _read_json(path)


def read_results(run: str, stage: str) -> pd.DataFrame:
    """The results of a stage: one row a number, see ``StageRun.result``.

    Args:
        run: Name of the run, or of a published one: ``"reference/laptop"``.
        stage: Name of the stage, such as ``"evaluation"``.

    Returns:
        Columns ``arm against group measure`` (text, ``""`` where empty) and ``value low high n
        seeds`` (floats, NaN where empty); ``passed`` as well for ``audit``.

    Raises:
        RuntimeError: The file is missing or lacks a column.
    """
    import pandas as pd

    path = run_folder(run) / "metrics" / f"{stage}.csv"
    if not path.is_file():
        raise RuntimeError(
            f"{display(path)} is missing: run notebooks/{stage_named(stage).notebook}, or check the run's name"
        )
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if lacking := [name for name in (*RESULT_KEY, *RESULT_NUMBERS) if name not in table]:
        raise RuntimeError(
            f"{display(path)} lacks the columns {', '.join(lacking)}: run notebooks/{stage_named(stage).notebook} again"
        )
    numbers = [name for name in table if name not in RESULT_KEY]
    return table.assign(
        **{name: [float(text) if text else math.nan for text in table[name]] for name in numbers}
    )


def value(
    table: pd.DataFrame, measure: str, arm: str = "", against: str = "", group: str = "all"
) -> float:
    """The one value of ``table`` (from ``read_results``) with this key. ``ValueError`` unless there is exactly one."""
    key = {"arm": arm, "against": against, "group": group, "measure": measure}
    rows = table
    for name, wanted in key.items():
        rows = rows[rows[name] == wanted]
    if len(rows) != 1:
        raise ValueError(f"{_key_text(key)}: {len(rows)} results have this key, one is needed")
    return float(rows["value"].iloc[0])


def _key_text(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={row[name]!r}" for name in RESULT_KEY)


def _number(row: Mapping[str, Any], name: str) -> float | int | None:
    """A cell of a result as a plain finite number; ``None`` for an empty one (None or NaN)."""
    given = row.get(name)
    if hasattr(given, "item") and getattr(given, "ndim", None) == 0:  # NumPy and torch scalars
        given = given.item()
    if given is None or (isinstance(given, float) and math.isnan(given) and name != "value"):
        return None
    if isinstance(given, (bool, int)):
        return int(given)
    if isinstance(given, float) and math.isfinite(given):
        return int(given) if name in ("n", "seeds") and given.is_integer() else given
    raise ValueError(f"result {_key_text(row)}: {name}={given!r} must be a finite number")


def read_manifest(run: str) -> dict[str, Any]:
    """``runs/<run>/manifest.json``; for a run in which no stage has finished, a manifest without stages."""
    path = run_folder(run) / "manifest.json"
    return _read_json(path) if path.is_file() else {"run": run, "stages": {}}


def read_params(run: str) -> Params | None:
    """Parameters stored in the run folder, ``None`` for a new run. ``ValueError`` names a file that is not valid."""
    path = run_folder(run) / "params.yaml"
    if not path.is_file():
        return None
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("not a mapping of names to values")
        check_names(stored, "stored parameters")
        return Params(**{**stored, "run": run})
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{display(path)}: {' '.join(str(error).split())}; correct or delete the file"
        ) from None


def write_params(params: Params) -> None:
    """Write all parameters to the run's ``params.yaml``."""
    write_atomic(
        run_folder(params.run) / "params.yaml", yaml.safe_dump(params.as_dict(), sort_keys=False)
    )


# ------------------------------------------------------------------------------- what a stage depends on


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook as plain JSON. ``ValueError`` if it is missing or not a notebook."""
    if not path.is_file():
        raise ValueError(f"notebook {display(path)} is missing")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"notebook {display(path)} cannot be read: {error!r}") from None
    return notebook


def tags(cell: dict) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def source(cell: dict) -> str:
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def code_cells(notebook: dict) -> list[str]:
    """Sources of the code cells in order, without the parameters and without what papermill injects."""
    skip = {"parameters", "injected-parameters"}
    return [
        source(c) for c in notebook["cells"] if c["cell_type"] == "code" and not skip & set(tags(c))
    ]


def library_closure(*cells: str) -> dict[str, str]:
    """``{module: digest}`` of every module of the library that the code ``cells`` import, directly or through others.

    Found by reading the sources, not by running them; imports inside functions count. Comments and
    layout do not enter a digest. The cells may hold IPython magics. ``SyntaxError`` names the module.
    """
    from IPython.core.inputtransformer2 import TransformerManager

    transform = TransformerManager().transform_cell
    todo: set[str] = set()
    for cell in cells:  # under %%time and %%capture the rest of the cell is Python
        body = cell.partition("\n")[2] if cell.startswith(("%%time", "%%capture")) else cell
        todo |= set(_scan(transform(body), "notebook", False)[1])
    found: dict[str, str] = {}
    while todo:
        module = todo.pop()
        file = _module_file(module)
        if module in found or file is None:
            continue
        found[module], imported = _scan(
            file.read_text(encoding="utf-8"), module, file.name == "__init__.py"
        )
        todo |= set(imported)
        if "." in module:  # importing a.b runs a/__init__.py too
            todo.add(module.rpartition(".")[0])
    return dict(sorted(found.items()))


def _module_file(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != _PACKAGE:
        return None
    base = paths.LIBRARY.joinpath(*parts[1:])
    return next(
        (f for f in (base / "__init__.py", base.with_name(base.name + ".py")) if f.is_file()), None
    )


@cache
def _scan(text: str, module: str, is_package: bool) -> tuple[str, tuple[str, ...]]:
    """Digest of a module's syntax tree, and the dotted names that it may import (modules or their attributes)."""
    tree = ast.parse(text, filename=module)
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = module.split(".") if is_package else module.split(".")[:-1]
                up = home[: len(home) - (node.level - 1)]
                base = ".".join(up + ([node.module] if node.module else []))
            names += [base] + [f"{base}.{alias.name}" for alias in node.names]
    for node in ast.walk(tree):  # prose does not decide a result
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        ) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(
        n for n in names if n.split(".")[0] == _PACKAGE
    )


def stage_key(stage: str, params: Params, anew: bool = False) -> str:
    """Sha256 over all that decides a stage's result: if it is unchanged, the stage need not run again.

    It covers the notebook's code (not its prose, outputs or parameters cell), the library modules that
    it imports, the values of the parameters it owns (the run's name excepted), for the stages that read
    them the data files shipped in the library, those in ``data_dir`` or the results of a batch, and the keys of the stages it needs.
    A stage that a derived run shares with its base has the base's key, unless it is executed ``anew``.
    """
    origin = read_manifest(params.run).get("derived_from", {})
    if anew:
        origin = origin | {"stages": [name for name in origin.get("stages", ()) if name != stage]}
    return _stage_key(stage, params, origin, {})


def _stage_key(stage: str, params: Params, origin: dict[str, Any], known: dict[str, str]) -> str:
    if stage not in known:
        spec = stage_named(stage)
        # What a derived run took over from its base was made with the base's values (see derive).
        values = (
            params.replace(**origin["changed"]) if stage in origin.get("stages", ()) else params
        )
        cells = code_cells(read_notebook(paths.NOTEBOOKS / spec.notebook))
        try:
            modules = library_closure(*cells)
        except SyntaxError as error:
            raise ValueError(
                f"notebooks/{spec.notebook} or a module that it imports is not valid Python: {error}"
            ) from None
        content = {
            "cells": cells,
            "modules": modules,
            "files": _files_read(stage, params),
            "versions": {name: package_version(name) for name in _VERSIONED}
            if stage == "environment"
            else {},
            "parameters": {
                name: getattr(values, name) for name in owned_by(stage) if name != "run"
            },
            "needs": {need: _stage_key(need, params, origin, known) for need in spec.needs},
        }
        known[stage] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return known[stage]


def _files_read(stage: str, params: Params) -> dict[str, Any]:
    """What ``stage`` reads beside the artifacts of earlier stages."""
    if stage in ("audit", "report"):
        return _data_files()
    if stage == "ablations":
        return batch_files(params)
    return _given_files(params.data_dir) if stage == "data" else {}


def _data_files() -> dict[str, str]:
    files = (
        p
        for p in sorted(paths.LIBRARY.rglob("*"))
        if p.is_file() and p.suffix not in (".py", ".pyc")
    )
    relative = {p.relative_to(paths.LIBRARY).as_posix(): p for p in files}
    return {
        name: sha256_file(p)
        for name, p in relative.items()
        if not name.startswith(("tests/", "batches/", "."))
    }


def batch_files(params: Params) -> dict[str, str]:
    """sha256 of the evaluations of all runs of ``params.batch`` over this run, by path below ``runs/``."""
    found = sorted(paths.RUNS.glob(f"{params.run}-{params.batch}-*/metrics/evaluation.*"))
    return {p.relative_to(paths.RUNS).as_posix(): sha256_file(p) for p in found}


def _given_files(data_dir: str) -> dict[str, list[int]]:
    """Size and time of the last change of each file in the user's ``data_dir``: hashing gigabytes at each call would take too long."""
    folder = paths.ROOT / Path(data_dir).expanduser()
    files = (
        sorted(p for p in folder.iterdir() if p.is_file()) if data_dir and folder.is_dir() else []
    )
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}


def up_to_date(stage: str, params: Params) -> bool:
    """Whether ``stage`` has finished with its present key, and every file that it read or wrote is as recorded."""
    folder = run_folder(params.run)
    entry = read_manifest(params.run)["stages"].get(stage)
    if entry is None or entry["status"] != "finished" or entry["key"] != stage_key(stage, params):
        return False
    if stage == "report" and not any((paths.FIGURES / params.run).glob("*.svg")):
        return False  # its figures lie outside the run folder
    recorded = entry["inputs"] | entry["outputs"]
    if not {f"metrics/{metrics_name(stage)}.json", f"metrics/{stage}.csv"} & recorded.keys():
        return False
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == sha
        for name, sha in recorded.items()
    )


# ----------------------------------------------------------------------------------------- a running stage


def start(stage: str, namespace: dict[str, Any]) -> StageRun:
    """Begin ``stage`` with the parameters found in ``namespace`` (a notebook's ``globals()``).

    Merges them into ``params.yaml``, checks that the stages it needs have finished, seeds Python, NumPy
    and torch, and starts the clock. Nothing is written if a check fails: ``ValueError`` for parameters,
    ``RuntimeError`` for an earlier stage or a device that is not there.
    """
    spec = stage_named(stage)
    owned = owned_by(stage)
    if missing := [name for name in owned if name not in namespace]:
        raise ValueError(
            f"notebooks/{spec.notebook}: the parameters cell lacks {', '.join(missing)}"
        )
    given = {name: namespace[name] for name in owned}
    run = Params(
        **{name: given[name] for name in ("run", "seed", "device")}
    ).run  # validated before it becomes a path
    stored = read_params(run)
    reader = spec not in PIPELINE  # only looks at a run: takes its seed, changes nothing
    if reader and stored:
        given["seed"] = stored.seed
    elif stored and stored.seed != given["seed"] and read_manifest(run)["stages"]:
        raise ValueError(
            f"run {run!r} has seed {stored.seed}, not {given['seed']}: give the new seed a run of its own"
        )
    params = (stored or Params(run=run)).replace(**given)
    _check_needs(spec, params)
    device = resolve_device(params.device)
    key = stage_key(stage, params, anew=True)
    if not reader:
        write_params(params)
    _seed_everything(params.seed, device)
    return StageRun(spec, params, device, key)


def _check_needs(spec: Stage, params: Params) -> None:
    finished = read_manifest(params.run)["stages"]
    for need in spec.needs:
        first = f"run notebooks/{stage_named(need).notebook} with run={params.run!r} first"
        if finished.get(need, {}).get("status") != "finished":
            raise RuntimeError(
                f"stage {spec.name!r} needs {need!r}, which run {params.run!r} has not finished: {first}"
            )
        for name in finished[need]["outputs"]:
            if not (run_folder(params.run) / name).is_file():
                raise RuntimeError(
                    f"stage {spec.name!r} needs {display(run_folder(params.run) / name)}, which is missing: {first}"
                )


def resolve_device(name: str) -> torch.device:
    """The device that ``"auto"``, ``"cpu"`` or ``"cuda"`` stands for. ``RuntimeError`` for CUDA that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "parameter device='cuda': torch finds no CUDA device; use 'auto' or 'cpu', or check the driver"
        )
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )


def _seed_everything(seed: int, device: torch.device) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if (
        device.type == "cpu"
    ):  # bit-for-bit repeatable here; on CUDA the flag costs speed and still only warns
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


class StageRun:
    """A stage in progress. ``params`` all parameters, ``device`` where models run, ``folder`` the run folder."""

    def __init__(self, spec: Stage, params: Params, device: torch.device, key: str):
        self.name = spec.name
        self.params = params
        self.device = device
        self.folder = run_folder(params.run)
        self._key = key
        self._started = time.monotonic()
        self._metrics: dict[str, float | str | bool] = {}
        self._results: dict[tuple[str, ...], dict[str, float | int | None]] = {}
        self._inputs: dict[str, str] = {}
        self._outputs: set[str] = set()

    # Randomness: every consumer has its own stream, so adding one does not shift the others.

    def torch_seed(self, name: str) -> int:
        """A seed in [0, 2^63) that depends on the run's seed and ``name`` only, in every process."""
        return (
            int.from_bytes(
                hashlib.sha256(f"{self.params.seed}/{name}".encode()).digest()[:8], "big"
            )
            >> 1
        )

    def rng(self, name: str) -> np.random.Generator:
        """A NumPy generator seeded with ``torch_seed(name)``."""
        return np.random.default_rng(self.torch_seed(name))

    # Artifacts

    def output(self, name: str, folder: str = "artifacts") -> Path:
        """Path of a file to write below ``folder`` of the run; it must exist when the stage finishes."""
        relative = _relative(name, folder)
        owner = self._owner(relative)
        if owner not in (None, self.name):
            raise ValueError(
                f"stage {self.name!r} must not write {relative}: stage {owner!r} does; choose another name"
            )
        self._outputs.add(relative)
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def input(self, name: str, folder: str = "artifacts") -> Path:
        """Path of a file of the run to read. ``RuntimeError`` if it is missing or not what its stage recorded."""
        relative = _relative(name, folder)
        path = self.folder / relative
        if relative in self._outputs:  # reading back what this stage has written itself
            return path
        owner = self._owner(relative)
        rerun = (
            f"run notebooks/{stage_named(owner).notebook}"
            if owner
            else "no finished stage of this run wrote it"
        )
        if not path.is_file():
            raise RuntimeError(f"{display(path)} is missing: {rerun}")
        sha = sha256_file(path)
        if owner and sha != read_manifest(self.params.run)["stages"][owner]["outputs"][relative]:
            raise RuntimeError(
                f"{display(path)} has changed since stage {owner!r} finished: {rerun} again"
            )
        self._inputs[relative] = sha
        return path

    def _owner(self, relative: str) -> str | None:
        stages = read_manifest(self.params.run)["stages"]
        return next(
            (stage for stage, entry in stages.items() if relative in entry["outputs"]), None
        )

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write ``table`` to ``artifacts/<name>.parquet``."""
        write_atomic(self.output(_with_suffix(name, ".parquet")), table.to_parquet())

    def load_table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        return pd.read_parquet(self.input(_with_suffix(name, ".parquet")))

    def save_tensors(self, name: str, tensors: dict[str, Any]) -> None:
        """Write tensors or arrays to ``artifacts/<name>.safetensors``."""
        import torch
        from safetensors.torch import save

        content = {
            key: torch.as_tensor(value).detach().cpu().contiguous()
            for key, value in tensors.items()
        }
        write_atomic(self.output(_with_suffix(name, ".safetensors")), save(content))

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of ``artifacts/<name>.safetensors``, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.input(_with_suffix(name, ".safetensors")))

    def save_json(self, name: str, content: Any) -> None:
        """Write ``content`` to ``artifacts/<name>.json``; NaN and infinity are refused."""
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(self.output(_with_suffix(name, ".json")), text + "\n")

    def load_json(self, name: str) -> Any:
        return json.loads(self.input(_with_suffix(name, ".json")).read_text(encoding="utf-8"))

    # Results

    def metrics(self, values: dict[str, Any]) -> None:
        """Collect metrics for ``finish``. ``ValueError`` names what is not a finite number, string or bool."""
        self._metrics |= {key: _scalar(key, value) for key, value in values.items()}

    def result(
        self,
        measure: str,
        value: float,
        *,
        arm: str = "",
        against: str = "",
        group: str = "all",
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
        seeds: int | None = None,
    ) -> None:
        """Add one row to the stage's table of results, ``metrics/<stage>.csv``.

        Args:
            measure: What was measured, such as ``"ndcg@10"``.
            value: A finite number; yes and no are 1 and 0.
            arm: The arm, method or setting it was measured on; empty for the whole stage.
            against: The arm that the value is a paired difference to.
            group: Users or items it covers, such as ``"new_items"``.
            low, high: Bounds of the 95 % interval.
            n: Users (or texts) behind the value.
            seeds: Trainings behind the value.

        Raises:
            ValueError: A number is not finite, or the key (arm, against, group, measure) is taken.
        """
        given = dict(measure=measure, value=value, arm=arm, against=against, group=group)
        self.results([given | dict(low=low, high=high, n=n, seeds=seeds)])

    def results(self, rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> None:
        """Add rows to the table of results: mappings, or a table, with the names of ``result``."""
        if hasattr(rows, "to_dict"):
            rows = rows.to_dict("records")
        columns = {*RESULT_KEY, *RESULT_NUMBERS} | ({"passed"} if self.name == "audit" else set())
        for given in rows:
            row = {"arm": "", "against": "", "group": "all"} | dict(given)
            if unknown := sorted(set(row) - columns):
                raise ValueError(f"result {dict(given)}: unknown columns {', '.join(unknown)}")
            if bad := [name for name in RESULT_KEY if not isinstance(row.get(name), str)]:
                raise ValueError(f"result {dict(given)}: {', '.join(bad)} must be text")
            if row.get("value") is None:
                raise ValueError(f"result {_key_text(row)}: has no value")
            key = tuple(row[name] for name in RESULT_KEY)
            if key in self._results:
                raise ValueError(
                    f"result {_key_text(row)}: given twice; to change it, run the cell with runs.start again"
                )
            self._results[key] = {
                name: _number(row, name) for name in (*RESULT_NUMBERS, "passed") if name in columns
            }

    def curve(self, rows: list[dict[str, Any]], name: str | None = None) -> None:
        """Write ``rows``, one per step, to ``curves/<name>.csv`` (default: the stage's name)."""
        import pandas as pd

        relative = f"curves/{name or self.name}.csv"
        write_atomic(
            self.folder / relative, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
        )
        self._outputs.add(relative)

    def finish(self) -> None:
        """Write ``metrics/<name>.json`` and the manifest entry. ``ValueError`` names missing metrics or outputs."""
        self._check_results()
        if missing := sorted(path for path in self._outputs if not (self.folder / path).is_file()):
            raise ValueError(
                f"stage {self.name!r} cannot finish: not written: {', '.join(missing)}"
            )
        self._write_results()
        entry = {
            "key": self._key,
            "status": "finished",
            "seconds": round(time.monotonic() - self._started, 3),
            **dict(zip(("git_commit", "git_dirty"), git_state())),
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "inputs": dict(sorted(self._inputs.items())),
            "outputs": {path: sha256_file(self.folder / path) for path in sorted(self._outputs)},
        }
        before = read_manifest(self.params.run)
        stages = before["stages"] | {self.name: entry}
        origin = before.get("derived_from", {})
        kept = [
            name for name in origin.get("stages", ()) if name != self.name
        ]  # executed here: no longer the base's
        order = [spec.name for spec in STAGES]
        manifest = {
            "run": self.params.run,
            **_provenance(self.device),
            "seed": self.params.seed,
            **({"derived_from": origin | {"stages": kept}} if origin else {}),
            "stages": dict(sorted(stages.items(), key=lambda item: order.index(item[0]))),
        }
        write_atomic(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def _check_results(self) -> None:
        missing = []
        if self._metrics or not self._results:  # until every notebook writes its results as a table
            needed = REQUIRED_METRICS.get(metrics_name(self.name), ())
            missing = [key for key in needed if key not in self._metrics]
        if self._results:
            held = {(arm, measure) for arm, _, _, measure in self._results}
            measures = {measure for _, measure in held}
            arms = REQUIRED_ARMS.get(self.name, ())
            for needed in REQUIRED_MEASURES.get(self.name, ()):
                shared = needed not in measures or ("", needed) in held
                lacking = [f"{needed} of {arm}" for arm in arms if (arm, needed) not in held]
                missing += ([] if needed in measures else [needed]) if shared else lacking
        if missing:
            raise ValueError(f"stage {self.name!r} cannot finish: no result {', '.join(missing)}")

    def _write_results(self) -> None:
        if self._metrics or not self._results:
            relative = f"metrics/{metrics_name(self.name)}.json"
            text = json.dumps(self._metrics, indent=1, ensure_ascii=False) + "\n"
            write_atomic(self.folder / relative, text)
            self._outputs.add(relative)
        if self._results:
            relative = f"metrics/{self.name}.csv"
            rows = [(*key, *numbers.values()) for key, numbers in self._results.items()]
            header = (*RESULT_KEY, *next(iter(self._results.values())))
            write_atomic(self.folder / relative, _csv([header, *rows]))
            self._outputs.add(relative)


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV text; floats by ``repr``, so that reading them gives the same bits."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _relative(name: str, folder: str) -> str:
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(
            f"file name {name!r}: must be relative and stay inside {folder or 'the run'}/"
        )
    return (Path(folder) / name).as_posix()


def _with_suffix(name: str, suffix: str) -> str:
    return name if name.endswith(suffix) else name + suffix


def _scalar(key: str, value: Any) -> float | str | bool:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # NumPy and torch scalars
        value = value.item()
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    raise ValueError(f"metric {key!r} = {value!r}: must be a finite number, a string or a bool")


def _provenance(device: torch.device) -> dict[str, Any]:
    import torch

    commit, dirty = git_state()
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in _VERSIONED},
        "device": device.type + gpu,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the repository and whether its tree differs from it; ``(None, None)`` outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(paths.ROOT), *arguments],
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if (
        top is None or Path(top).resolve() != paths.ROOT.resolve()
    ):  # unpacked inside somebody else's repository
        return None, None
    commit, status = git("rev-parse", "--verify", "HEAD"), git("status", "--porcelain")
    return (None, None) if commit is None else (commit, None if status is None else bool(status))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
