"""What a training step logs: unit, meaning and healthy range of each statistic, and warnings when a run leaves it."""

from typing import NamedTuple

import pandas as pd
import torch

from recrl_lib.environment import peak_rss


class Statistic(NamedTuple):
    unit: str
    meaning: str
    healthy: str


STATISTICS = {
    "reward": Statistic(
        "0 to 1", "mean reward of the sampled texts", "rises, noisily: every step has new prompts"
    ),
    "score": Statistic(
        "reward",
        "the reward less missing_eos_penalty: what is optimised",
        "rises towards the reward",
    ),
    "reward_<part>": Statistic(
        "0 to 1", "one part of the reward, unweighted", "none falls while another rises"
    ),
    "kl": Statistic(
        "nats per text",
        "KL from the reference policy, estimator k3",
        "0 at first, then slow growth; below 10",
    ),
    "kl_coef": Statistic(
        "reward per nat", "weight of the KL penalty", "fixed, or moving slowly under kl_target"
    ),
    "entropy": Statistic(
        "nats per token",
        "entropy of the policy over the vocabulary",
        "falls slowly; above a quarter of its start",
    ),
    "surprisal": Statistic(
        "nats per token", "minus log-probability of what was sampled", "near the entropy"
    ),
    "length": Statistic(
        "tokens per text",
        "length with the end token",
        "steady; drifting means the length part is gamed",
    ),
    "eos_rate": Statistic(
        "share of texts",
        "texts that reached their end token; the rest is cut off",
        "rises to 1; above .7",
    ),
    "advantage_std": Statistic(
        "reward", "spread of the advantages before whitening", "near the score's own spread"
    ),
    "explained_variance": Statistic(
        "share", "of the returns' variance, by the values", "above -1, later above 0 (a constant)"
    ),
    "policy_loss": Statistic(
        "none", "clipped surrogate, mean over tokens", "near 0; says little by itself"
    ),
    "value_loss": Statistic(
        "reward squared", "half the clipped squared error of the values", "falls"
    ),
    "clip_fraction": Statistic(
        "share of tokens",
        "ratios outside the trust region, held back",
        "below .2; more means too big steps",
    ),
    "approx_kl": Statistic(
        "nats per token", "KL from the sampling policy during the update", "below .02"
    ),
    "epochs_skipped": Statistic("count", "passes that stop_kl cut short", "mostly 0"),
    "gradient_norm": Statistic(
        "none", "of the adapters' gradient before clipping", "steady, finite"
    ),
    "replay_norm": Statistic(
        "none",
        "of the replay's gradient, which joins the clipped one",
        "below gradient_norm; 0: no replay",
    ),
    "learning_rate": Statistic(
        "none", "of the adapters, at the step's last update", "as scheduled"
    ),
    "ratio_first_minibatch_max_dev": Statistic(
        "none", "largest |ratio - 1| before the first update", "below 1e-3 (.1 in bfloat16)"
    ),
    "generated_tokens_per_second": Statistic("tokens/s", "speed of sampling", "steady"),
    "shield_seconds": Statistic(
        "seconds", "spent in the shield's hooks", "a hundredth of the step; with a replay a tenth"
    ),
    "step_seconds": Statistic("seconds", "wall time of the step", "steady"),
}
TIMES = (
    "generated_tokens_per_second",
    "shield_seconds",
    "step_seconds",
)  # differ between equal runs


def ratio_tolerance(params, device: torch.device) -> float:
    """How far the first minibatch's ratios may be off 1: by rounding, which in bfloat16 differs with the batch."""
    return 0.1 if autocasts(params, device) else 1e-3


def autocasts(params, device: torch.device) -> bool:
    """Whether ``params.dtype`` means bfloat16 forward passes on ``device``."""
    return params.dtype == "bfloat16" or (params.dtype == "auto" and device.type == "cuda")


def warnings(rows: pd.DataFrame) -> list[str]:
    """What in one arm's table of steps left the healthy range of ``STATISTICS``, a sentence each; empty if nothing did.

    Trends compare the last third of the steps with the first.
    """
    third = max(len(rows) // 3, 1)
    early, late = rows.head(third).mean(numeric_only=True), rows.tail(third).mean(numeric_only=True)
    worst = rows.loc[rows["kl"].idxmax()]
    fall = early["eos_rate"] - late["eos_rate"]
    peak = f"{worst['kl']:.1f} nats per text at step {worst['step']:.0f}"
    found = [
        (
            worst["kl"] > 10,
            f"KL reached {peak}: the policy breaks away; raise kl_coef or lower learning_rate",
        ),
        (
            fall > 0.15,
            f"the share of finished texts fell by {fall:.2f}: the policy forgets to stop; raise missing_eos_penalty",
        ),
        (
            late["eos_rate"] < 0.7,
            f"{1 - late['eos_rate']:.0%} of the latest texts are cut off: raise missing_eos_penalty",
        ),
    ]
    if "entropy" in rows:
        kept = late["entropy"] / max(early["entropy"], 1e-8)
        found.append(
            (
                kept < 0.25,
                f"entropy collapsed to {kept:.0%} of its start: the policy has one thing to say; raise kl_coef",
            )
        )
    if "explained_variance" in rows:
        known = late["explained_variance"]
        found.append(
            (
                known < -1,
                f"the values explain {known:.1f} of the returns' variance, less than a constant would: lower value_lr",
            )
        )
    if "replay_norm" in rows and (pull := late["replay_norm"]) > late["gradient_norm"]:
        found.append(
            (
                True,
                f"the replay's gradient is {pull / late['gradient_norm']:.1f} times the reward's: lower shield_penalty to learn more",
            )
        )
    if "clip_fraction" in rows:
        clipped = late["clip_fraction"]
        found.append(
            (clipped > 0.2, f"{clipped:.0%} of the ratios are clipped: lower learning_rate")
        )
    return [text for bad, text in found if bad]


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: of this process on a CPU, of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_rss() / 2**30


def summary(rows: pd.DataFrame) -> dict[str, float]:
    """The figures of ``metrics/ppo.json`` from one arm's table of steps."""
    first, last = rows.iloc[0], rows.iloc[-1]
    # TRL's trainers report neither: their first ratio is 1 by construction, their sampling is part of the step.
    deviation = (
        rows["ratio_first_minibatch_max_dev"].max()
        if "ratio_first_minibatch_max_dev" in rows
        else 0.0
    )
    tokens = rows["length"] * last["episodes"] / last["step"]
    speed = rows.get("generated_tokens_per_second", tokens / rows["step_seconds"])
    return {
        "steps": int(last["step"]),
        "episodes": int(last["episodes"]),
        "reward_first": float(first["reward"]),
        "reward_last": float(last["reward"]),
        "kl_last": float(last["kl"]),
        "kl_max": float(rows["kl"].max()),
        "eos_rate_last": float(last["eos_rate"]),
        "clip_fraction_last": float(last["clip_fraction"]),
        "ratio_first_minibatch_max_dev": float(deviation),
        "shield_seconds": float(rows["shield_seconds"].mean()),
        "step_seconds": float(rows["step_seconds"].mean()),
        "generated_tokens_per_second": float(speed.mean()),
    }
