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


class Curve(TrainerCallback):
    """``rows``: one an iteration of ``each`` optimizer steps; each goes to ``log`` too."""

    def __init__(self, params: Params, names: list[str], shield: Shield | None, log: Log | None):
        self.params, self.names, self.shield, self.log = params, names, shield, log
        self.rows, self.logs = [], []
        kind = f"{params.algorithm}, {'shielded' if shield else 'unshielded'}"
        self.bar = track(range(params.ppo_steps), kind)

    def on_train_begin(self, args, state, control, **kwargs):
        next(self.bar)
        self.start = perf_counter()

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        if "loss" in logs:  # the last call is a summary
            self.logs.append(logs)
        if len(self.logs) == self.params.ppo_epochs * self.params.minibatches:
            next(self.bar, None)
            self.rows.append(self._row())
            if self.log:
                self.log(self.rows[-1], len(self.rows))
            self.logs, self.start = [], perf_counter()

    def _row(self) -> dict:
        """Statistics of an iteration from what TRL logged at each of its optimizer steps."""
        params, number, first = self.params, len(self.rows) + 1, self.logs[0]  # which sampled
        cut_off, length = first["rewards/cut_off/mean"], first["completions/mean_length"]
        names = {"policy_loss": "loss", "clip_fraction": "clip_ratio/region_mean"}
        names |= {"gradient_norm": "grad_norm"}
        before = sum(row["shield_seconds"] for row in self.rows)
        return {
            "step": number,
            "episodes": number * params.prompts_per_step * params.samples_per_prompt,
            "reward": first["reward"] + params.missing_eos_penalty * cut_off,
            "score": first["reward"],
            "kl": first.get("kl", 0.0) * length,
            "entropy": first["entropy"],
            "length": length,
            "eos_rate": 1 - cut_off,
            **{k: sum(log[v] for log in self.logs) / len(self.logs) for k, v in names.items()},
            **{f"reward_{name}": first[f"rewards/reward_{name}/mean"] for name in self.names},
            "shield_seconds": self.shield.seconds - before if self.shield else 0.0,
            "step_seconds": perf_counter() - self.start,
        }


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
    import datasets  # these two take seconds to import
    import trl

    datasets.disable_progress_bars()
    generator, prompts, queue = torch.Generator().manual_seed(seed * 3), [], []
    blank = {name: None for record in records for name in record}  # columns of follow-ups, too
    for _ in range(params.ppo_steps):
        drawn, queue = draw_prompts(queue, params.prompts_per_step, len(records), generator)
        prompts += [blank | {"prompt": messages(records[i]), **records[i]} for i in drawn]
    tokenizer = copy.deepcopy(explainer.tokenizer)  # TRL sets its padding, and PAD must not be EOS
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(explainer.pad_id)

    def cut_off(prompts, completions, completion_ids, **_) -> list[float]:
        return [float(ids[-1] != explainer.eos_id) for ids in completion_ids]

    curve = Curve(params, reward.names, shield, log)
    callbacks = [shield.callback(), curve] if shield else [curve]  # the shield's hooks come first
    kind, scratch = params.algorithm.upper(), tempfile.TemporaryDirectory()
    with torch.random.fork_rng(), scratch as folder, warnings.catch_warnings():
        # transformers 5.23 renames gradient_checkpointing; 5.17 lacks the new name.
        warnings.simplefilter("ignore", FutureWarning)
        settings = _settings(params, seed) | {"use_cpu": explainer.device.type == "cpu"}
        weights = [*reward.weights, -params.missing_eos_penalty]
        config = getattr(trl, f"{kind}Config")
        trainer = getattr(trl, f"{kind}Trainer")(
            model=explainer.peft,
            args=config(output_dir=folder, reward_weights=weights, **settings),
            train_dataset=datasets.Dataset.from_list(prompts),
            reward_funcs=[*reward.as_trl(), cut_off],
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        if "ref" in trainer.model.peft_config:  # without it, "adapter off" is the reference
            trainer.model.delete_adapter("ref")
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            explainer.lm.__dict__.pop("forward", None)  # TRL's own, with the head in the loss
            explainer.lm.eval()
    return curve.rows


def _settings(params: Params, seed: int) -> dict[str, Any]:
    """Of TRL's config: as ``ppo.PPO``, at a constant rate, in float32, without files and output."""
    texts = params.prompts_per_step * params.samples_per_prompt
    return {
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "gradient_checkpointing": False,
        "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "log_level": "error", "dataloader_pin_memory": False,
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
    }  # fmt: skip
