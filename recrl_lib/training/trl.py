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
import tempfile
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield.projection import Shield
from recrl_lib.training.ppo import Log, draw_prompts

# TRL's trainers run at a constant rate, in float32, without files and output.
COMMON = {
    "lr_scheduler_type": "constant", "weight_decay": 0.0, "gradient_checkpointing": False,
    "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "disable_tqdm": True, "log_level": "error", "dataloader_pin_memory": False,
}  # fmt: skip


class Steps(TrainerCallback):
    """Calls ``done(logs, seconds)`` after every ``each`` optimizer steps, with a log of each."""

    def __init__(self, done: Callable, shield: Shield | None, name: str, count: int, each: int = 1):
        self.done, self.each, self.logs = done, each, []
        self.before = [shield.callback()] if shield else []  # the shield's hooks come first
        self.bar = track(range(count), f"{name}, {'shielded' if shield else 'unshielded'}")

    def on_train_begin(self, args, state, control, **kwargs):
        next(self.bar)
        self.start = perf_counter()

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        if "loss" in logs:  # the last call is a summary
            self.logs.append(logs)
        if len(self.logs) == self.each:
            next(self.bar, None)
            self.done(self.logs, perf_counter() - self.start)
            self.logs, self.start = [], perf_counter()


def run_trl(
    kind: str, explainer: Explainer, rows: list, settings: dict, steps: Steps, **options: Any
) -> None:
    """Tune the adapters with TRL's trainer ``kind`` ("SFT", ...), the shield of ``steps`` attached.

    ``settings`` go to the trainer's config, ``options`` to the trainer.
    """
    import datasets  # these two take seconds to import
    import trl

    datasets.disable_progress_bars()
    trainer_class, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    settings = COMMON | settings | {"use_cpu": explainer.device.type == "cpu"}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # transformers 5.23 renames gradient_checkpointing; 5.17 lacks the new name.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = trainer_class(
            model=explainer.peft,
            args=config(output_dir=scratch, **settings),
            train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[*steps.before, steps],
            **options,
        )
        if "ref" in trainer.model.peft_config:  # without it, "adapter off" is the reference
            trainer.model.delete_adapter("ref")
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            explainer.lm.__dict__.pop("forward", None)  # TRL's own, with the head in the loss
            explainer.lm.eval()


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
    blank = {name: None for record in records for name in record}  # columns of follow-ups, too
    for _ in range(params.ppo_steps):
        drawn, queue = draw_prompts(queue, params.prompts_per_step, len(records), generator)
        prompts += [blank | {"prompt": messages(records[i]), **records[i]} for i in drawn]
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
