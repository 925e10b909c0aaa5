"""Health of a training: warnings, measures, precision, memory, and trackers that mirror its curve.

What each statistic of a step means, and its healthy range, is said in notebook 05.
"""

import os
import warnings as python_warnings
from contextlib import AbstractContextManager, nullcontext

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from recrl_lib.environment import peak_rss
from recrl_lib.params import Params
from recrl_lib.runs import StageRun
from recrl_lib.training import masked

ONLINE_TIMEOUT = 30.0  # seconds that W&B may take to come up; its own default is 90, for each arm


def autocasts(params: Params, device: torch.device) -> bool:
    """Whether ``params.dtype`` means bfloat16 forward passes on ``device``."""
    return params.dtype == "bfloat16" or (params.dtype == "auto" and device.type == "cuda")


def precision(params: Params, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass: bfloat16 autocast where ``autocasts``, else nothing."""
    half = autocasts(params, device)
    return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()


def ratio_tolerance(params: Params, device: torch.device) -> float:
    """How far off 1 rounding takes the first ratios; in bfloat16 it depends on the batch."""
    return 0.1 if autocasts(params, device) else 1e-3


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: of this process on a CPU, of its tensors on a GPU."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    return held / 2**30


def warnings(rows: pd.DataFrame) -> list[str]:
    """What in one arm's table of steps left its healthy range, a sentence each.

    Trends compare the last third of the steps with the first. TRL's trainers lack some columns.
    """
    rows = rows.reindex(
        columns=rows.columns.union(["entropy", "explained_variance", "replay_norm"])
    )
    third = max(len(rows) // 3, 1)
    early, late = rows.head(third).mean(numeric_only=True), rows.tail(third).mean(numeric_only=True)
    worst, fall = rows.loc[rows["kl"].idxmax()], early["eos_rate"] - late["eos_rate"]
    entropy, values = late["entropy"] / early["entropy"], late["explained_variance"]
    pull, clipped = late["replay_norm"] / late["gradient_norm"], late["clip_fraction"]
    found = {  # no comparison with a missing column (NaN) is true
        f"KL reached {worst['kl']:.1f} nats per text at step {worst['step']:.0f}: the policy "
        "breaks away; raise kl_coef or lower learning_rate": worst["kl"] > 10,
        f"the share of finished texts fell by {fall:.2f}: the policy forgets to stop; raise "
        "missing_eos_penalty": fall > 0.15,
        f"{1 - late['eos_rate']:.0%} of the latest texts are cut off: raise "
        "missing_eos_penalty": late["eos_rate"] < 0.7,
        f"entropy collapsed to {entropy:.0%} of its start: the policy has one thing to say; raise "
        "kl_coef": entropy < 0.25,
        f"the values explain {values:.1f} of the returns' variance, less than a constant would: "
        "lower value_lr": values < -1,
        f"the replay's gradient is {pull:.1f} times the reward's: lower shield_penalty to learn "
        "more": pull > 1,
        f"{clipped:.0%} of the ratios are clipped: lower learning_rate": clipped > 0.2,
    }
    return [text for text, bad in found.items() if bad]


def summary(rows: pd.DataFrame) -> dict[str, float]:
    """One arm's measures of stage ``shielded_ppo`` from its table of steps."""
    first, last, means = rows.iloc[0], rows.iloc[-1], rows.mean(numeric_only=True)
    texts = last["episodes"] / last["step"]
    tokens = means["length"] * texts / means["step_seconds"]
    name = "ratio_first_minibatch_max_dev"
    deviation = rows[name].max() if name in rows else 0.0  # TRL's is 0 by construction
    found = {
        "steps": last["step"],
        "episodes": last["episodes"],
        "reward_first": first["reward"],
        "reward_last": last["reward"],
        "kl_last": last["kl"],
        "kl_max": rows["kl"].max(),
        "eos_rate_last": last["eos_rate"],
        "clip_fraction_last": last["clip_fraction"],
        name: deviation,
        "shield_seconds": means["shield_seconds"],
        "step_seconds": means["step_seconds"],
        "episodes_per_second": texts / means["step_seconds"],
        "generated_tokens_per_second": means.get("generated_tokens_per_second", tokens),
    }
    return {name: float(value) for name, value in found.items()}


def start_tracker(stage: StageRun, arm: str) -> GeneralTracker:
    """accelerate's tracker of ``params.tracker``, with its files in the run's ``logs/``.

    ``wandb`` works offline (``wandb sync`` uploads later), ``wandb-online`` where it can; the
    user's ``WANDB_MODE`` wins. In a batch (``RECRL_BATCH``) W&B's group is the batch. Raises
    ``ValueError`` if the package is not installed.
    """
    params, folder, (rank, count) = stage.params, stage.folder / "logs", masked.processes()
    if params.tracker == "none" or rank > 0 or count < params.processes:
        return GeneralTracker(_blank=True)  # logs nothing: the first process that trains does
    kind, _, online = params.tracker.partition("-")
    label = "-".join(filter(None, (os.environ.get("RECRL_ARM"), arm)))
    project = os.environ.get("WANDB_PROJECT") or "shielded-recrl"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_NOTEBOOK_NAME", arm)  # else W&B looks for a notebook server
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    options = {"name": f"{params.run}-{label}", "config": params.as_dict()}
    wandb = options | {
        "dir": folder,
        "mode": os.environ.get("WANDB_MODE") or online or "offline",
        "group": os.environ.get("RECRL_BATCH") or params.run,
        "job_type": label,
        "reinit": "create_new",
        "settings": {"console": "off", "x_disable_stats": True, "init_timeout": ONLINE_TIMEOUT},
    }
    where = {"logging_dir": folder / "tensorboard"}
    given = {
        "wandb": (project, wandb),
        "trackio": (project, options),
        "tensorboard": (label, where),
    }
    name, options = given[kind]
    try:
        return _started(kind, name, options)
    except ImportError as error:
        remedy = "install it as environment.yml says ('optional'), or use 'none'"
        raise ValueError(f"parameter tracker={params.tracker!r}: {error}; {remedy}") from None
    except Exception as error:  # a wrong key, no network: a training does not end for that
        if options.get("mode") != "online":
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        python_warnings.warn(f"tracker='wandb' goes on offline: {reason}", stacklevel=3)
        return _started(kind, name, options | {"mode": "offline"})


def _started(kind: str, name: str, options: dict) -> GeneralTracker:
    PartialState()  # accelerate's trackers and loggers ask for it
    tracker = LOGGER_TYPE_TO_CLASS[kind](name, **options)
    tracker.start()
    return tracker
