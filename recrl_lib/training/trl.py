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
from time import perf_counter

import torch

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.scoring.reward import PARTS, Reward
from recrl_lib.shield.projection import Shield
from recrl_lib.training.ppo import Log, draw_prompts
from recrl_lib.training.warm_start import Progress, run_trl


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
    rows = _Rows(params, shield, log)
    with torch.random.fork_rng():
        run_trl(params.algorithm.upper(), explainer, prompts, settings, rows, shield, **rewards)
    return rows.rows


class _Rows(Progress):
    """A row of statistics an iteration, from what TRL logs at each optimizer step."""

    def __init__(self, params: Params, shield: Shield | None, log: Log | None):
        arm = "shielded" if shield else "unshielded"
        bar = track(range(params.ppo_steps), f"{params.algorithm}, {arm}")
        super().__init__(bar, each=params.ppo_epochs * params.minibatches)
        self.params, self.shield, self.log = params, shield, log
        self.rows: list[dict] = []
        self._logs: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = perf_counter(), self.shield.seconds if self.shield else 0.0

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs):
        if logs and "loss" in logs:  # the last call is a summary
            self._logs.append(logs)
        if len(self._logs) == self.each:
            now = perf_counter(), self.shield.seconds if self.shield else 0.0
            seconds, shield = (a - b for a, b in zip(now, self._last, strict=True))
            self.rows.append(self._row() | {"shield_seconds": shield, "step_seconds": seconds})
            self._logs, self._last = [], now
            if self.log:
                self.log(self.rows[-1], len(self.rows))

    def _row(self) -> dict:
        first, number = self._logs[0], len(self.rows) + 1  # the first step is the one that sampled
        cut_off, length = first["rewards/cut_off/mean"], first["completions/mean_length"]
        texts = self.params.prompts_per_step * self.params.samples_per_prompt
        names = {"policy_loss": "loss", "clip_fraction": "clip_ratio/region_mean"}
        names |= {"gradient_norm": "grad_norm"}
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
            **{k: sum(log[v] for log in self._logs) / self.each for k, v in names.items()},
        }
