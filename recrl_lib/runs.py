"""The run folder ``runs/<run>``: parameters, artifacts, results, manifest. Files are written whole.

A notebook calls ``stage = runs.start("ranker", globals())``, then ``stage.load_table``,
``stage.save_tensors``, ``stage.result`` and the like, and ``stage.finish()`` at its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from recrl_lib import measures, paths
from recrl_lib.measures import ARMS as ARMS
from recrl_lib.measures import read_results as read_results
from recrl_lib.measures import value as value
from recrl_lib.params import PIPELINE, STAGES, Params, Stage, owned_by, stage_named
from recrl_lib.provenance import FRONTIER as FRONTIER
from recrl_lib.provenance import batch_files as batch_files
from recrl_lib.provenance import display, git_state, machine, sha256_file, stage_key

if TYPE_CHECKING:  # imported where used: what can be skipped is decided without waiting for torch
    import pandas as pd
    import torch


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
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


def run_folder(run: str) -> Path:
    """Folder of a run; ``"reference/laptop"`` is a published one."""
    return paths.RUNS / run


def read_manifest(run: str) -> dict[str, Any]:
    """``runs/<run>/manifest.json``; one without stages where none has finished."""
    path = run_folder(run) / "manifest.json"
    if not path.is_file():
        return {"run": run, "stages": {}}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = "delete it and run the stages again"
        raise RuntimeError(f"{display(path)}: not valid JSON ({error}); {remedy}") from None


def read_params(run: str) -> Params | None:
    """Parameters stored in the run folder, ``None`` for a new run."""
    path = run_folder(run) / "params.yaml"
    if not path.is_file():
        return None
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Params(**{**stored, "run": Path(run).name})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{display(path)}: {text}; correct or delete the file") from None


def write_params(params: Params) -> None:
    """Write all parameters to the run's ``params.yaml``."""
    text = yaml.safe_dump(params.as_dict(), sort_keys=False)
    write_atomic(run_folder(params.run) / "params.yaml", text)


def up_to_date(stage: str, params: Params) -> bool:
    """Whether a stage has finished with its present key and all its files are as recorded."""
    entry = read_manifest(params.run)["stages"].get(stage)
    if entry is None or entry["key"] != stage_key(stage, params):
        return False
    if stage == "report" and not any((paths.FIGURES / params.run).glob("*.svg")):
        return False  # its figures lie outside the run folder
    return not changed_files(params.run, entry["inputs"] | entry["outputs"])


def changed_files(run: str, recorded: Mapping[str, str]) -> list[str]:
    """Files of the run that are missing or do not have the sha256 that was ``recorded``."""
    files = {name: run_folder(run) / name for name in recorded}
    return [n for n, f in files.items() if not f.is_file() or sha256_file(f) != recorded[n]]


def start(stage: str, namespace: dict[str, Any]) -> StageRun:
    """Begin ``stage`` with the parameters found in ``namespace``, a notebook's ``globals()``.

    Merges them into ``params.yaml``, checks that the stages it needs have finished, seeds Python,
    NumPy and torch, and starts the clock. Nothing is written if a check fails.

    Raises:
        ValueError: A parameter is missing or wrong.
        RuntimeError: An earlier stage has not finished, or the device is not there.
    """
    spec, owned = stage_named(stage), owned_by(stage)
    if missing := ", ".join(name for name in owned if name not in namespace):
        raise ValueError(f"notebooks/{spec.notebook}: the parameters cell lacks {missing}")
    given = {name: namespace[name] for name in owned}
    run = Params(run=given["run"]).run  # validated before it becomes a path
    stored = read_params(run)
    reader = spec not in PIPELINE  # only looks at a run: takes its seed, changes nothing
    if reader and stored:
        given["seed"] = stored.seed
    params, finished = (stored or Params()).replace(**given), read_manifest(run)["stages"]
    if stored and stored.seed != params.seed and finished:
        problem = f"run {run!r} has seed {stored.seed}, not {params.seed}"
        raise ValueError(f"{problem}: give that seed its own run")
    for need in spec.needs:
        if need not in finished:
            first = f"run notebooks/{stage_named(need).notebook} with run={run!r} first"
            raise RuntimeError(f"stage {stage!r} needs {need!r}, which has not finished: {first}")
    device, key = resolve_device(params.device), stage_key(stage, params)
    if not reader:
        write_params(params)
    _seed_everything(params.seed, device)
    return StageRun(spec, params, device, key)


def resolve_device(name: str) -> torch.device:
    """The device that ``"auto"``, ``"cpu"`` or ``"cuda"`` is; ``RuntimeError`` without CUDA."""
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise RuntimeError("parameter device='cuda': torch finds no CUDA device; use 'cpu'")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def _seed_everything(seed: int, device: torch.device) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cpu":  # repeatable bit for bit; on CUDA this costs speed and only warns
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
        choose_products()


def choose_products() -> None:
    """Let oneDNN compute matrix products on the CPU where it does so in float32.

    torch's choice is MKL, which has AVX2 code only for AMD's processors, half as fast as oneDNN's
    AVX-512. The setting allows bfloat16, too, which oneDNN prefers where a processor has AMX.
    """
    import torch

    a, products = torch.linspace(1, 2, 2**16).view(256, 256), torch.backends.mkldnn.matmul
    exact, products.fp32_precision = a.double() @ a.double(), "bf16"
    if ((a @ a) / exact - 1).abs().max() > 1e-5:
        products.fp32_precision = "none"


class StageRun:
    """A stage in progress: its name, the run's parameters and folder, where models run."""

    def __init__(self, spec: Stage, params: Params, device: torch.device, key: str):
        self.name, self.params, self.device = spec.name, params, device
        self.folder = run_folder(params.run)
        self._key, self._started = key, time.monotonic()
        self._results: dict[tuple[str, ...], measures.Result] = {}
        self._inputs: dict[str, str] = {}
        self._outputs: set[str] = set()

    # Randomness: every consumer has its own stream, so adding one does not shift the others.

    def torch_seed(self, name: str) -> int:
        """A seed in [0, 2^63) that depends on the run's seed and ``name`` only."""
        digest = hashlib.sha256(f"{self.params.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def rng(self, name: str) -> np.random.Generator:
        """A NumPy generator seeded with ``torch_seed(name)``."""
        return np.random.default_rng(self.torch_seed(name))

    # Artifacts

    def output(self, name: str, folder: str = "artifacts") -> Path:
        """Path of a file that this stage writes, below ``folder`` of the run."""
        relative = f"{folder}/{name}"
        path, owner = self.folder / relative, self._owner(relative)
        if owner not in (None, self.name):
            raise ValueError(f"stage {self.name!r} must not write {relative}: stage {owner!r} does")
        self._outputs.add(relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def input(self, name: str, folder: str = "artifacts") -> Path:
        """Path of a file to read. ``RuntimeError`` if it is not what a stage recorded."""
        relative = f"{folder}/{name}"
        path, owner = self.folder / relative, self._owner(relative)
        if relative in self._outputs:  # reading back what this stage has written itself
            return path
        remedy = "no finished stage of this run wrote it"
        if owner:
            remedy = f"run notebooks/{stage_named(owner).notebook} again"
        if not path.is_file():
            raise RuntimeError(f"{display(path)} is missing: {remedy}")
        sha = self._inputs[relative] = sha256_file(path)
        if owner and sha != read_manifest(self.params.run)["stages"][owner]["outputs"][relative]:
            raise RuntimeError(f"{display(path)} has changed since {owner!r} finished: {remedy}")
        return path

    def _owner(self, relative: str) -> str | None:
        stages = read_manifest(self.params.run)["stages"].items()
        return next((stage for stage, entry in stages if relative in entry["outputs"]), None)

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write ``table`` to ``artifacts/<name>.parquet``."""
        write_atomic(self.output(f"{name}.parquet"), table.to_parquet())

    def load_table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        return pd.read_parquet(self.input(f"{name}.parquet"))

    def save_tensors(self, name: str, tensors: dict[str, Any]) -> None:
        """Write tensors or arrays to ``artifacts/<name>.safetensors``."""
        import torch
        from safetensors.torch import save

        items = tensors.items()
        content = {key: torch.as_tensor(x).detach().cpu().contiguous() for key, x in items}
        write_atomic(self.output(f"{name}.safetensors"), save(content))

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of ``artifacts/<name>.safetensors``, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.input(f"{name}.safetensors"))

    def save_json(self, name: str, content: Any) -> None:
        """Write ``content`` to ``artifacts/<name>.json``; NaN and infinity are refused."""
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(self.output(f"{name}.json"), text + "\n")

    def load_json(self, name: str) -> Any:
        return json.loads(self.input(f"{name}.json").read_text(encoding="utf-8"))

    # Results

    def result(self, measure: str, value: float, **columns: Any) -> None:
        """Add one row to the stage's table of results; ``columns`` as in ``measures.Result``."""
        self.results([{"measure": measure, "value": value, **columns}])

    def results(self, rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> None:
        """Add rows with columns of ``Result``. ``ValueError`` if one is not valid, or repeated."""
        import pandas as pd

        for given in rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows:
            row = measures.parsed(given)
            if row.key in self._results:
                problem = f"result {given}: given twice"
                raise ValueError(f"{problem}; to change it, start the stage again")
            self._results[row.key] = row

    def curve(self, rows: list[dict[str, Any]], name: str | None = None) -> None:
        """Write ``rows``, one per step, to ``curves/<name>.csv`` (default: the stage's name)."""
        import pandas as pd

        text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
        write_atomic(self.output(f"{name or self.name}.csv", "curves"), text)

    def finish(self) -> None:
        """Write results and manifest. ``ValueError`` if what the stage must write is missing."""
        rows = self._results.values()
        lacking = [f"no result {name}" for name in measures.missing(self.name, rows)]
        lacking += [f"not written: {p}" for p in self._outputs if not (self.folder / p).is_file()]
        if lacking:
            raise ValueError(f"stage {self.name!r} cannot finish: {', '.join(sorted(lacking))}")
        text = measures.as_csv(rows, audit=self.name == "audit")
        write_atomic(self.output(f"{self.name}.csv", "metrics"), text)
        commit = dict(zip(("git_commit", "git_dirty"), git_state()))
        entry = {
            "key": self._key,
            "status": "finished",
            "seconds": round(time.monotonic() - self._started, 3),
            **commit,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "inputs": dict(sorted(self._inputs.items())),
            "outputs": {name: sha256_file(self.folder / name) for name in sorted(self._outputs)},
        }
        manifest = read_manifest(self.params.run)
        stages = manifest.pop("stages") | {self.name: entry}
        own = {"run": self.params.run, **commit, **machine(self.device), "seed": self.params.seed}
        in_order = {spec.name: stages[spec.name] for spec in STAGES if spec.name in stages}
        text = json.dumps(manifest | own | {"stages": in_order}, indent=1)
        write_atomic(self.folder / "manifest.json", text + "\n")
