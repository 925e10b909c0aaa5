"""Processes, precision, memory, measures and trackers of a training (see notebook 05)."""

import os
import warnings

import pandas as pd
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from recrl_lib.environment import peak_rss
from recrl_lib.params import Params
from recrl_lib.runs import StageRun

ONLINE_TIMEOUT = 30.0  # seconds that W&B may take to come up; its own default is 90, for each arm


def processes() -> tuple[int, int]:
    """(rank of this process, number of processes) of a data-parallel training."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def autocasts(params: Params, device: torch.device) -> bool:
    """Whether ``params.dtype`` means bfloat16 forward passes on ``device``."""
    return params.dtype == "bfloat16" or (params.dtype == "auto" and device.type == "cuda")


def precision(params: Params, device: torch.device) -> torch.autocast:
    """The context of a forward pass: bfloat16 where ``autocasts``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocasts(params, device))


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: of this process on a CPU, of its tensors on a GPU."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    return held / 2**30


def summary(rows: pd.DataFrame) -> dict[str, float]:
    """One arm's measures of stage ``shielded_ppo`` from its table of steps."""
    last, means = rows.iloc[-1], rows.mean(numeric_only=True)
    texts, seconds = last["episodes"] / last["step"], means["step_seconds"]
    tokens, ratio = "generated_tokens_per_second", "ratio_first_minibatch_max_dev"
    lasts = ("reward", "kl", "eos_rate", "clip_fraction")
    found = {
        "steps": last["step"],
        "episodes": last["episodes"],
        "reward_first": rows["reward"].iloc[0],
        **{f"{name}_last": last[name] for name in lasts},
        "kl_max": rows["kl"].max(),
        ratio: rows[ratio].max() if ratio in rows else 0.0,  # TRL's is 0 by construction
        "shield_seconds": means["shield_seconds"],
        "step_seconds": seconds,
        "episodes_per_second": texts / seconds,
        tokens: means.get(tokens, means["length"] * texts / seconds),
    }
    if "best_reward" in rows:  # how far a prompt's best text is above its mean: what to learn from
        found["headroom"] = (rows["best_reward"] - rows["reward"]).iloc[0]
    return {name: float(value) for name, value in found.items()}


def start_tracker(stage: StageRun, arm: str) -> GeneralTracker:
    """accelerate's tracker of ``params.tracker``, with its files in the run's ``logs/``.

    ``wandb`` works offline (``wandb sync`` uploads later), ``wandb-online`` where it can; the
    user's ``WANDB_MODE`` wins. ``ValueError``: the package is not installed.
    """
    params, folder, (rank, count) = stage.params, stage.folder / "logs", processes()
    if params.tracker == "none" or rank > 0 or count < params.processes:
        return GeneralTracker(_blank=True)  # logs nothing: the first process that trains does
    kind, _, online = params.tracker.partition("-")
    label = "-".join(filter(None, (os.environ.get("RECRL_ARM"), arm)))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_NOTEBOOK_NAME", arm)  # else W&B looks for a notebook server
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    name = os.environ.get("WANDB_PROJECT") or "shielded-recrl"
    options = {"name": f"{params.run}-{label}", "config": params.as_dict()}
    if kind == "tensorboard":
        name, options = label, {"logging_dir": folder / "tensorboard"}
    elif kind == "wandb":
        settings = {"console": "off", "x_disable_stats": True, "init_timeout": ONLINE_TIMEOUT}
        options |= {"dir": folder, "job_type": label, "reinit": "create_new", "settings": settings}
        options["mode"] = os.environ.get("WANDB_MODE") or online or "offline"
        options["group"] = os.environ.get("RECRL_BATCH") or params.run
    try:
        return _started(kind, name, options)
    except ImportError as error:
        remedy = "install it as environment.yml says ('optional'), or use 'none'"
        raise ValueError(f"parameter tracker={params.tracker!r}: {error}; {remedy}") from None
    except Exception as error:  # a wrong key, no network: a training does not end for that
        if options.get("mode") != "online":
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        warnings.warn(f"tracker='wandb' goes on offline: {reason}", stacklevel=3)
        return _started(kind, name, options | {"mode": "offline"})


def _started(kind: str, name: str, options: dict) -> GeneralTracker:
    PartialState()  # accelerate's trackers and loggers ask for it
    tracker = LOGGER_TYPE_TO_CLASS[kind](name, **options)
    tracker.start()
    return tracker
