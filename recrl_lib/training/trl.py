"""Comparison arms: TRL's own RLOO and GRPO beside Shielded PPO.

Held equal to ``ppo.PPO`` at the same parameters and seed: prompts and their order, samples a
prompt, optimizer steps (``ppo_epochs`` passes of ``minibatches``), temperature and length, AdamW
(constant rate, eps 1e-5, no decay), norm clip before the shield, reward with
``missing_eos_penalty``, adapters, and "adapter off" as the reference. What differs:

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

import torch
from transformers.trainer_callback import PrinterCallback

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.scoring.reward import PARTS, Reward
from recrl_lib.shield.projection import Shield
from recrl_lib.training.ppo import Log
from recrl_lib.training.warm_start import Progress, peft_model, trainer_settings


def train(
    explainer: Explainer,
    reward: Reward,
    records: list[dict],
    params: Params,
    seed: int,
    shield: Shield | None = None,
    log: Log | None = None,
) -> list[dict]:
    """Tune the adapters for ``ppo_steps`` iterations; a row of statistics each, told to ``log``.

    The shield is on TRL's optimizer while it trains.
    """
    import datasets  # these two take seconds to import
    import trl

    datasets.disable_progress_bars()
    order = prompt_order(len(records), params.prompts_per_step, params.ppo_steps, seed)
    prompts = [{"prompt": messages(records[i]), **records[i]} for i in order]
    trainer_class = {"rloo": trl.RLOOTrainer, "grpo": trl.GRPOTrainer}[params.algorithm]
    config_class = {"rloo": trl.RLOOConfig, "grpo": trl.GRPOConfig}[params.algorithm]
    tokenizer = copy.deepcopy(explainer.tokenizer)  # TRL sets its padding, and PAD must not be EOS
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(explainer.pad_id)
    model, rows = peft_model(explainer), _Rows(params, shield, log)
    scratch, quiet = tempfile.TemporaryDirectory(), warnings.catch_warnings()
    with scratch as folder, quiet, torch.random.fork_rng():
        # transformers 5.23 renames gradient_checkpointing; 5.17 lacks the new name.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = trainer_class(
            model=model,
            reward_funcs=[*reward.as_trl(), _cut_off(explainer.eos_id)],
            args=config_class(**_settings(explainer, reward, params, seed), output_dir=folder),
            train_dataset=datasets.Dataset.from_list(prompts),
            processing_class=tokenizer,
            callbacks=[*([shield.callback()] if shield else []), rows],
        )
        # TRL's copy of a fresh adapter; without it the reference is "adapter off".
        model.delete_adapter("ref")
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            explainer.lm.__dict__.pop("forward", None)  # TRL's own, with the head in the loss
            explainer.lm.eval()
    return rows.rows


def _settings(explainer: Explainer, reward: Reward, params: Params, seed: int) -> dict:
    texts = params.prompts_per_step * params.samples_per_prompt
    updates = params.ppo_steps * params.ppo_epochs * params.minibatches
    return trainer_settings(explainer, seed, updates) | {
        "shuffle_dataset": False,
        "per_device_train_batch_size": texts // params.minibatches,
        "steps_per_generation": params.minibatches,
        "num_iterations": params.ppo_epochs,
        "num_generations": params.samples_per_prompt,
        "max_completion_length": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": params.learning_rate,
        "adam_epsilon": 1e-5,
        "max_grad_norm": params.max_grad_norm,
        "beta": params.kl_coef,
        "epsilon": params.clip_range,
        "disable_dropout": True,
        "reward_weights": [*reward.weights, -params.missing_eos_penalty],
    }


def prompt_order(n: int, per_step: int, steps: int, seed: int) -> list[int]:
    """Prompts of all iterations, as ``ppo.PPO`` draws them."""
    if n < per_step:
        raise ValueError(f"prompts_per_step={per_step}, but there are only {n} prompts")
    generator, chosen, queue = torch.Generator().manual_seed(seed * 3), [], []
    for _ in range(steps):
        if len(queue) < per_step:
            queue = torch.randperm(n, generator=generator).tolist()
        chosen, queue = chosen + queue[:per_step], queue[per_step:]
    return chosen


def _cut_off(eos_id: int) -> Callable[..., list[float]]:
    def cut_off(prompts, completions, completion_ids, **_) -> list[float]:
        return [float(ids[-1] != eos_id) for ids in completion_ids]

    return cut_off


class _Rows(Progress):
    """A row of statistics an iteration, from what TRL logs at each optimizer step."""

    def __init__(self, params: Params, shield: Shield | None, log: Log | None):
        arm = "shielded" if shield else "unshielded"
        super().__init__(track(range(params.ppo_steps), f"{params.algorithm}, {arm}"))
        self.params, self.shield, self.log = params, shield, log
        self.rows: list[dict] = []
        self._logs: list[dict] = []
        self._mark()

    def on_step_end(self, args, state, control, **kwargs):
        pass  # progress counts iterations

    def on_train_begin(self, args, state, control, **kwargs):
        self._mark()

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs):
        if logs and "loss" in logs:  # the last call is a summary
            self._logs.append(logs)
        if len(self._logs) == self.params.ppo_epochs * self.params.minibatches:
            self.rows.append(self._row())
            if self.log:
                self.log(self.rows[-1], len(self.rows))
            self._logs = []
            self._mark()
            next(self.ticks, None)

    def _mark(self) -> None:
        self._start = perf_counter()
        self._before = self.shield.seconds if self.shield else 0.0

    def _row(self) -> dict:
        first, number = self._logs[0], len(self.rows) + 1  # the first step is the one that sampled
        cut_off, length = first["rewards/cut_off/mean"], first["completions/mean_length"]
        texts = self.params.prompts_per_step * self.params.samples_per_prompt
        names = {"policy_loss": "loss", "clip_fraction": "clip_ratio/region_mean"}
        means = {
            name: sum(log[theirs] for log in self._logs) / len(self._logs)
            for name, theirs in (names | {"gradient_norm": "grad_norm"}).items()
        }
        return {
            "step": number,
            "episodes": number * texts,
            "reward": first["reward"] + self.params.missing_eos_penalty * cut_off,
            "score": first["reward"],
            **{f"reward_{part}": first[f"rewards/reward_{part}/mean"] for part in PARTS},
            "kl": first.get("kl", 0.0) * length,
            "entropy": first["entropy"],
            "length": length,
            "eos_rate": 1 - cut_off,
            **means,
            "shield_seconds": (self.shield.seconds if self.shield else 0.0) - self._before,
            "step_seconds": perf_counter() - self._start,
        }
