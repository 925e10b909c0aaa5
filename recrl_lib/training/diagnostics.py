"""Health of a training: warnings, the summary of a curve, precision and memory.

What each statistic of a step means, and its healthy range, is said in notebook 05.
"""

from contextlib import AbstractContextManager, nullcontext

import pandas as pd
import torch

from recrl_lib.memory import peak_rss
from recrl_lib.params import Params


def autocasts(params: Params, device: torch.device) -> bool:
    """Whether ``params.dtype`` means bfloat16 forward passes on ``device``."""
    return params.dtype == "bfloat16" or (params.dtype == "auto" and device.type == "cuda")


def precision(params: Params, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass: bfloat16 autocast where ``autocasts``, else nothing."""
    return (
        torch.autocast(device.type, torch.bfloat16) if autocasts(params, device) else nullcontext()
    )


def ratio_tolerance(params: Params, device: torch.device) -> float:
    """How far rounding may take the first minibatch's ratios off 1; in bfloat16 it varies by batch."""
    return 0.1 if autocasts(params, device) else 1e-3


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: of this process on a CPU, of its tensors on a GPU."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    return held / 2**30


def warnings(rows: pd.DataFrame) -> list[str]:
    """What in one arm's table of steps left its healthy range, a sentence each.

    Trends compare the last third of the steps with the first. TRL's trainers lack some columns.
    """
    third = max(len(rows) // 3, 1)
    early, late = rows.head(third).mean(numeric_only=True), rows.tail(third).mean(numeric_only=True)
    worst, nothing = rows.loc[rows["kl"].idxmax()], float("nan")  # no comparison with NaN is true
    fall = early["eos_rate"] - late["eos_rate"]
    kept = late.get("entropy", nothing) / max(early.get("entropy", nothing), 1e-8)
    known, clipped = late.get("explained_variance", nothing), late.get("clip_fraction", nothing)
    pull = late.get("replay_norm", nothing) / max(late.get("gradient_norm", nothing), 1e-12)
    found = [
        (
            worst["kl"] > 10,
            f"KL reached {worst['kl']:.1f} nats per text at step {worst['step']:.0f}: the policy "
            "breaks away; raise kl_coef or lower learning_rate",
        ),
        (
            fall > 0.15,
            f"the share of finished texts fell by {fall:.2f}: the policy forgets to stop; "
            "raise missing_eos_penalty",
        ),
        (
            late["eos_rate"] < 0.7,
            f"{1 - late['eos_rate']:.0%} of the latest texts are cut off: raise missing_eos_penalty",
        ),
        (
            kept < 0.25,
            f"entropy collapsed to {kept:.0%} of its start: the policy has one thing to say; "
            "raise kl_coef",
        ),
        (
            known < -1,
            f"the values explain {known:.1f} of the returns' variance, less than a constant would: "
            "lower value_lr",
        ),
        (
            pull > 1,
            f"the replay's gradient is {pull:.1f} times the reward's: lower shield_penalty to learn more",
        ),
        (clipped > 0.2, f"{clipped:.0%} of the ratios are clipped: lower learning_rate"),
    ]
    return [text for bad, text in found if bad]


def summary(rows: pd.DataFrame) -> dict[str, float]:
    """One arm's measures of stage ``shielded_ppo`` from its table of steps."""
    first, last = rows.iloc[0], rows.iloc[-1]
    # TRL's trainers report neither: their first ratio is 1 by construction, their sampling is part of the step.
    texts = last["episodes"] / last["step"]
    tokens_per_second = rows["length"] * texts / rows["step_seconds"]
    found = {
        "steps": last["step"],
        "episodes": last["episodes"],
        "reward_first": first["reward"],
        "reward_last": last["reward"],
        "kl_last": last["kl"],
        "kl_max": rows["kl"].max(),
        "eos_rate_last": last["eos_rate"],
        "clip_fraction_last": last["clip_fraction"],
        "ratio_first_minibatch_max_dev": rows.get(
            "ratio_first_minibatch_max_dev", rows["kl"] * 0
        ).max(),
        "shield_seconds": rows["shield_seconds"].mean(),
        "step_seconds": rows["step_seconds"].mean(),
        "episodes_per_second": texts / rows["step_seconds"].mean(),
        "generated_tokens_per_second": rows.get(
            "generated_tokens_per_second", tokens_per_second
        ).mean(),
    }
    return {name: float(value) for name, value in found.items()}
