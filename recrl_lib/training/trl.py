"""Comparison arms: TRL's own RLOO and GRPO beside Shielded PPO.

All else is held equal to ``ppo.PPO`` at the same parameters and seed. What differs:

======  ===============================================  ================================  =========
        advantage                                        KL                                ratio of
======  ===============================================  ================================  =========
rloo    score less the mean of the prompt's other texts  k1 over the text, in the reward   sequences
grpo    score less the prompt's mean, over its spread    k3 per token, in the loss         tokens
======  ===============================================  ================================  =========

``kl`` is in nats a text by the algorithm's own estimator, before the iteration's first step. RLOO:
Ahmadian et al. 2024 (arXiv 2402.14740). GRPO: Shao et al. 2024 (arXiv 2402.03300), loss "dapo".
"""

import copy

import torch

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.params import Params
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield.projection import Shield
from recrl_lib.training.ppo import Log, draw_prompts
from recrl_lib.training.warm_start import Steps, run_trl


def train(
    explainer: Explainer,
    reward: Reward,
    records: list[dict],
    params: Params,
    seed: int,
    shield: Shield | None = None,
    log: Log | None = None,
) -> list[dict]:
    """Tune the adapters for ``ppo_steps`` iterations; a row of statistics each goes to ``log``."""
    generator, prompts, queue = torch.Generator().manual_seed(seed * 3), [], []
    for _ in range(params.ppo_steps):
        drawn, queue = draw_prompts(queue, params.prompts_per_step, len(records), generator)
        prompts += [{"prompt": messages(records[i]), **records[i]} for i in drawn]
    tokenizer = copy.deepcopy(explainer.tokenizer)  # TRL sets its padding, and PAD must not be EOS
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(explainer.pad_id)

    def cut_off(prompts, completions, completion_ids, **_) -> list[float]:
        return [float(ids[-1] != explainer.eos_id) for ids in completion_ids]

    texts = params.prompts_per_step * params.samples_per_prompt
    settings = {
        "seed": seed, "shuffle_dataset": False, "disable_dropout": True,
        "max_steps": params.ppo_steps * params.ppo_epochs * params.minibatches,
        "per_device_train_batch_size": texts // params.minibatches,
        "steps_per_generation": params.minibatches, "num_iterations": params.ppo_epochs,
        "num_generations": params.samples_per_prompt,
        "max_completion_length": params.max_new_tokens,
        "temperature": params.temperature, "top_p": 1.0, "top_k": 0,
        "learning_rate": params.learning_rate, "adam_epsilon": 1e-5,
        "max_grad_norm": params.max_grad_norm, "beta": params.kl_coef,
        "epsilon": params.clip_range,
        "reward_weights": [*reward.weights, -params.missing_eos_penalty],
    }  # fmt: skip
    rewards = {"reward_funcs": [*reward.as_trl(), cut_off], "processing_class": tokenizer}
    rows: list[dict] = []

    def done(logs: list[dict], seconds: float) -> None:
        shielding = shield.seconds - sum(row["shield_seconds"] for row in rows) if shield else 0.0
        spent = {"shield_seconds": shielding, "step_seconds": seconds}
        parts = {f"reward_{name}": logs[0][f"rewards/reward_{name}/mean"] for name in reward.names}
        rows.append(_row(logs, params, len(rows) + 1) | parts | spent)
        if log:
            log(rows[-1], len(rows))

    kind, each = params.algorithm, params.ppo_epochs * params.minibatches
    steps = Steps(done, shield, kind, params.ppo_steps, each)
    with torch.random.fork_rng():
        run_trl(kind.upper(), explainer, prompts, settings, steps, **rewards)
    return rows


def _row(logs: list[dict], params: Params, number: int) -> dict:
    """Statistics of iteration ``number`` from what TRL logged at each optimizer step."""
    first = logs[0]  # of the step that sampled
    cut_off, length = first["rewards/cut_off/mean"], first["completions/mean_length"]
    names = {"policy_loss": "loss", "clip_fraction": "clip_ratio/region_mean"}
    names |= {"gradient_norm": "grad_norm"}
    return {
        "step": number,
        "episodes": number * params.prompts_per_step * params.samples_per_prompt,
        "reward": first["reward"] + params.missing_eos_penalty * cut_off,
        "score": first["reward"],
        "kl": first.get("kl", 0.0) * length,
        "entropy": first["entropy"],
        "length": length,
        "eos_rate": 1 - cut_off,
        **{name: sum(log[key] for log in logs) / len(logs) for name, key in names.items()},
    }
