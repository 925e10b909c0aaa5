"""A run derived from a finished one: what does not change is shared, not computed again.

``derive("laptop", "laptop-ablations-kl0-seed0", kl_coef=0.0)`` makes a run folder whose data, ranker, first
explanations and subspaces *are* those of ``laptop`` (hard links, or copies across file systems), with their manifest
entries and keys, so that only the stages that the change reaches are left to run. Links are safe because every file
of a run is replaced as a whole and never written into (``files.write_atomic``).

What is shared is decided stage by stage: a stage is, if its parameters and those of all that it needs are equal,
with those of ``REUSED`` not counted before the training: they are read there, but the subspaces do not depend on them. The
Gram matrices of item texts belong to the base model: a LoRA of another rank starts at B = 0 and changes none of
them, and a basis (d, k) fits an A (r, d) of any r up to the d - k free directions, which is checked. Likewise for
how long and how hot explanations are sampled and what they are paid, how the basis is enforced, and the seed, which then moves what the
derived run draws itself (adapters, prompts, samples, judged users) and not the split or the ranker. The price: shared
*metrics* describe the base, e.g. ``explainer.json`` counts the base's trainable parameters.

A change that reaches the training but not its warm start (``AFTER_WARM_START``) shares that too: the base's warm
adapters are laid down as the checkpoints that a training killed after its warm start would have left.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from recrl_lib import runs
from recrl_lib.params import PIPELINE, STAGES, Params, check_names, owned_by, stage_named
from recrl_lib.runs import sha256_file, write_atomic

PREPARING = (
    "environment",
    "data",
    "ranker",
    "explainer",
    "shield",
)  # the stages before the training
REUSED = (
    "seed", "device", "lora_rank", "lora_alpha", "max_new_tokens", "temperature",
    "reward", "weight_length", "weight_relevance", "weight_coherence", "shield_mode", "shield_penalty", "shield_replay_steps",
)  # fmt: skip
# What only the reinforcement learning reads, of the stage that trains and of those before it.
AFTER_WARM_START = {name for name in owned_by("shielded_ppo") if not name.startswith("warm_")} - {"seed", "device", "dtype"} | {
    "max_new_tokens", "temperature", "reward", "weight_length", "weight_relevance", "weight_coherence", "shield_replay_steps",
}  # fmt: skip
# The report draws outside its run folder, and the ablations compare the runs over their own.
SHAREABLE = tuple(stage for stage in PIPELINE if stage.name not in ("ablations", "report"))


def derive(base: str, run: str, **changes: Any) -> Params:
    """Make or refresh ``runs/<run>`` from the finished run ``base``; return its parameters.

    Doing it again changes nothing, unless the base has been run again: what it shares is then replaced, and what
    was computed from it is no longer up to date. Raises ``ValueError`` for parameters that are not valid, a base that
    is missing or out of date, or a folder ``run`` that holds something else.
    """
    source, ready = base_run(base)
    params = changed(source, run, changes)
    shared = shareable(source, params, ready)
    stages = runs.read_manifest(base)["stages"]
    _check_basis(source, params, shared)
    present = runs.read_manifest(run)
    origin = {
        "run": base,
        "stages": shared,
        "changed": {
            name: value
            for name, value in source.as_dict().items()
            if name != "run" and value != getattr(params, name)
        },
    }
    if present["stages"] and present.get("derived_from", {}).get("run") != base:
        raise ValueError(
            f"runs/{run} is not derived from {base!r}: delete it, or choose another name"
        )
    for name in shared:
        for file, sha in stages[name]["outputs"].items():
            _share(runs.run_folder(base) / file, runs.run_folder(run) / file, sha)
    entries = {
        name: entry for name, entry in present["stages"].items() if name not in PREPARING
    } | {n: stages[n] for n in shared}
    order = [stage.name for stage in STAGES]
    made_by = runs.read_manifest(base) if not present["stages"] else present
    manifest = {
        **{key: value for key, value in made_by.items() if key not in ("stages", "derived_from")},
        "run": run, "seed": params.seed, "derived_from": origin,
        "stages": dict(sorted(entries.items(), key=lambda item: order.index(item[0]))),
    }  # fmt: skip
    if (
        manifest != present or runs.read_params(run) != params
    ):  # a job that runs already writes there too
        runs.write_params(params)
        write_atomic(runs.run_folder(run) / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    reaching = set(origin["changed"]) & {
        name for need in with_needs("shielded_ppo") for name in owned_by(need)
    }
    if (
        "shielded_ppo" in ready
        and reaching <= AFTER_WARM_START
        and not runs.up_to_date("shielded_ppo", params)
    ):
        _share_warm_start(source, params)
    return params


def base_run(base: str) -> tuple[Params, list[str]]:
    """(parameters of a base run, its stages that are up to date). ``ValueError`` unless those before the training are."""
    source = runs.read_params(base)
    if source is None:
        raise ValueError(
            f"base run {base!r}: runs/{base} does not exist; make all RUN={base}, with its profile"
        )
    ready = [stage.name for stage in SHAREABLE if runs.up_to_date(stage.name, source)]
    if stale := [name for name in PREPARING if name not in ready]:
        raise ValueError(
            f"base run {base!r}: stages {', '.join(stale)} are missing or out of date; make all RUN={base}, with its profile"
        )
    return source, ready


def changed(source: Params, run: str, changes: dict[str, Any]) -> Params:
    """``source`` under another name with ``changes``. ``ValueError`` for an unknown name or a value out of range."""
    check_names(changes, f"run {run}")
    return source.replace(**{**changes, "run": run})


def shareable(source: Params, params: Params, ready: list[str]) -> list[str]:
    """Those of the ``ready`` stages of run ``source.run`` whose results hold for ``params`` too, in the order of the pipeline."""
    different = {
        name
        for name, value in source.as_dict().items()
        if name != "run" and value != getattr(params, name)
    }
    shared: list[str] = []
    for stage in SHAREABLE:
        # A stage may read what the stages that it needs own: PPO reads lora_rank.
        read = {name for need in with_needs(stage.name) for name in owned_by(need)}
        if read & different - set(REUSED if stage.name in PREPARING else ()):
            continue
        if set(stage.needs) <= set(shared) and stage.name in ready:
            shared.append(stage.name)
    return shared


def with_needs(*targets: str) -> list[str]:
    """``targets`` and all that they need, in the order of the pipeline."""
    wanted: set[str] = set()
    todo = list(targets)
    while todo:
        if (name := todo.pop()) not in wanted:
            wanted.add(name)
            todo += stage_named(name).needs
    return [stage.name for stage in PIPELINE if stage.name in wanted]


def _check_basis(source: Params, params: Params, shared: list[str]) -> None:
    """A shared basis must leave at least ``lora_rank`` free directions at every layer input."""
    from safetensors import safe_open

    path = runs.run_folder(source.run) / "artifacts" / "subspaces.safetensors"
    if "shield" not in shared or params.lora_rank == source.lora_rank:
        return
    with safe_open(path, framework="numpy") as file:
        shapes = {
            key.rpartition("/")[0]: file.get_slice(key).get_shape()
            for key in file.keys()
            if key.endswith("/basis")
        }
    for name, (width, rank) in shapes.items():
        if params.lora_rank > width - rank:
            raise ValueError(
                f"lora_rank={params.lora_rank}: layer input {name} of run {source.run!r} has {width} directions, {rank} of them "
                f"protected; use at most {width - rank}, or a base run that protects fewer"
            )


def _share_warm_start(source: Params, params: Params) -> None:
    """Leave the base's warm-started adapters as the derived run's checkpoints, unless it has its own already."""
    from safetensors.torch import load_file

    from recrl_lib.training import (
        arms,
        warm_start,  # torch is for this alone: a batch that is only planned never loads it
    )

    base = runs.run_folder(source.run)
    if not source.warm_start:
        return
    curve = pd.read_csv(base / "curves" / "warm_start.csv")
    for arm in arms.TRAINED:
        store = arms.checkpoints(params, arm)
        if store.load("warm") is None:
            rows = curve.loc[curve["arm"] == arm, ["step", "loss"]].to_dict("records")
            adapter, _ = warm_start.unstack(
                load_file(base / "artifacts" / f"adapter_{arm}_warm.safetensors")
            )
            store.save(
                "warm", adapter, {"curve": rows, "intact": True}
            )  # the base's training has checked it


def _share(source: Path, target: Path, sha: str) -> None:
    """Make ``target`` the same file as ``source``, or a copy where the file systems differ. An equal file is left alone."""
    if target.is_file() and (target.samefile(source) or sha256_file(target) == sha):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
