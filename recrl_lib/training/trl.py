"""Comparison arms: TRL's own RLOO and GRPO on the same prompts, reward, adapters and shield as Shielded PPO.

What is held equal to ``ppo.PPO`` for the same parameters and seed: the prompts and their order; samples a prompt and an
iteration; optimizer steps (``ppo_epochs`` passes of ``minibatches`` steps over each rollout); sampling temperature and
length; AdamW with a constant rate, eps 1e-5 and no decay; gradient clipping, then the shield; the reward with
``missing_eos_penalty``; the adapters, from where they are, with "adapter off" as the reference policy.

What differs is the algorithm, as TRL 1.16 has it, and one knob means two things:

======  =====================================================  ==========================================  ===========
        advantage                                              ``kl_coef`` weighs                          ratio of
======  =====================================================  ==========================================  ===========
rloo    score less the mean of the prompt's other samples      k1 summed over the text, in the reward      sequences
grpo    score less the prompt's mean, over its deviation       k3 per token, in the loss                   tokens
======  =====================================================  ==========================================  ===========

So ``kl`` is reported for both: nats a text, the estimator that the algorithm itself uses, before the iteration's first step.
RLOO: Ahmadian et al. 2024 (arXiv 2402.14740). GRPO: Shao et al. 2024 (arXiv 2402.03300); loss "dapo", TRL's default.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.progress import track
from recrl_lib.scoring.reward import PARTS, Reward
from recrl_lib.shield.projection import Shield

ALGORITHMS = ("rloo", "grpo")


def train(
    explainer: Explainer,
    reward: Reward,
    records: list[dict],
    params,
    seed: int,
    shield: Shield | None = None,
    desc: str = "",
    log: Callable[[dict, int], None] | None = None,
) -> list[dict]:
    """Tune the adapters by ``params.algorithm`` for ``params.ppo_steps`` iterations; a row of statistics each.

    ``params`` is a ``config.Params``. ``log(row, step)`` is told of every row. The shield is on TRL's optimizer while it trains.
    """
    if params.algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={params.algorithm!r}: TRL trains {', '.join(ALGORITHMS)}")
    if params.samples_per_prompt < 2:
        raise ValueError(
            f"samples_per_prompt={params.samples_per_prompt}: {params.algorithm} compares a prompt's samples; take at least 2"
        )
    if not explainer.adapter_parameters():
        raise ValueError("the explainer has nothing to train; call add_lora first")
    import datasets
    import trl

    datasets.disable_progress_bars()
    order = prompt_order(len(records), params.prompts_per_step, params.ppo_steps, seed)
    data = datasets.Dataset.from_list(
        [{"prompt": messages(records[i]), **records[i]} for i in order]
    )
    trainer_class, config_class = {
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }[params.algorithm]
    updates = params.ppo_epochs * params.minibatches
    watcher = _Watcher(
        params, updates, shield, iter(track(range(params.ppo_steps), desc or params.algorithm)), log
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(),
        torch.random.fork_rng(),
    ):
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers 5.23 renames gradient_checkpointing; 5.17 lacks the new name
        settings = config_class(
            output_dir=scratch,
            seed=seed,
            max_steps=params.ppo_steps * updates,
            shuffle_dataset=False,
            per_device_train_batch_size=params.prompts_per_step
            * params.samples_per_prompt
            // params.minibatches,
            steps_per_generation=params.minibatches,
            num_iterations=params.ppo_epochs,
            num_generations=params.samples_per_prompt,
            max_completion_length=params.max_new_tokens,
            temperature=params.temperature,
            top_p=1.0,
            top_k=0,
            learning_rate=params.learning_rate,
            lr_scheduler_type="constant",
            adam_epsilon=1e-5,
            weight_decay=0.0,
            max_grad_norm=params.max_grad_norm,
            beta=params.kl_coef,
            epsilon=params.clip_range,
            disable_dropout=True,
            reward_weights=[*reward.weights, -params.missing_eos_penalty],
            gradient_checkpointing=False,
            use_cpu=explainer.device.type == "cpu",
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=False,
        )
        tokenizer = copy.deepcopy(
            explainer.tokenizer
        )  # TRL sets its padding; and PAD must not be EOS
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(explainer.pad_id)
        trainer = trainer_class(
            model=explainer.peft,
            reward_funcs=[*reward.as_trl(), _cut_off(explainer.eos_id)],
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[watcher],
        )
        explainer.peft.delete_adapter(
            "ref"
        )  # TRL's copy of a fresh adapter; without it the reference is "adapter off"
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            explainer.lm.__dict__.pop(
                "forward", None
            )  # TRL's own, with the LM head fused into the loss
            explainer.lm.eval()
    return watcher.rows


def prompt_order(n: int, per_step: int, steps: int, seed: int) -> list[int]:
    """Prompts of all iterations, those of ``ppo.PPO``: random orders, each drawn anew when too few are left."""
    if n < per_step:
        raise ValueError(f"prompts_per_step={per_step}, but there are only {n} prompts")
    generator, chosen, queue = torch.Generator().manual_seed(seed * 3), [], []
    for _ in range(steps):
        if len(queue) < per_step:
            queue = torch.randperm(n, generator=generator).tolist()
        chosen, queue = chosen + queue[:per_step], queue[per_step:]
    return chosen


def _cut_off(eos_id: int):
    def cut_off(prompts, completions, completion_ids, **_) -> list[float]:
        return [float(ids[-1] != eos_id) for ids in completion_ids]

    return cut_off


class _Watcher(TrainerCallback):
    """Attaches the shield to the trainer's optimizer, gathers a row an iteration from TRL's log, reports progress."""

    def __init__(
        self,
        params,
        updates: int,
        shield: Shield | None,
        ticks: Iterator,
        log: Callable[[dict, int], None] | None,
    ):
        self.params, self.updates, self.shield, self.ticks, self.log = (
            params,
            updates,
            shield,
            ticks,
            log,
        )
        self.rows: list[dict] = []
        self._logs: list[dict] = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.shield:
            self.shield.attach(optimizer)
        self._mark()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:  # the last call is a summary
            self._logs.append(logs)
        if len(self._logs) == self.updates:
            self.rows.append(self._row())
            if self.log:
                self.log(self.rows[-1], len(self.rows))
            self._logs = []
            self._mark()
            next(self.ticks, None)

    def on_train_end(self, args, state, control, **kwargs):
        next(self.ticks, None)
        if self.shield:
            self.shield.detach()

    def _mark(self) -> None:
        self._start, self._shield_before = (
            perf_counter(),
            self.shield.seconds if self.shield else 0.0,
        )

    def _row(self) -> dict:
        first = self._logs[0]  # the step that sampled
        parts = {part: first[f"rewards/reward_{part}/mean"] for part in PARTS}
        cut_off, length = first["rewards/cut_off/mean"], first["completions/mean_length"]
        number = len(self.rows) + 1

        def mean(name):
            return sum(log[name] for log in self._logs) / len(self._logs)

        return {
            "step": number,
            "episodes": number * self.params.prompts_per_step * self.params.samples_per_prompt,
            "reward": first["reward"] + self.params.missing_eos_penalty * cut_off,
            "score": first["reward"],
            **{f"reward_{part}": value for part, value in parts.items()},
            "kl": first.get("kl", 0.0) * length,
            "entropy": first["entropy"],
            "length": length,
            "eos_rate": 1 - cut_off,
            "policy_loss": mean("loss"),
            "clip_fraction": mean("clip_ratio/region_mean"),
            "gradient_norm": mean("grad_norm"),
            "shield_seconds": (self.shield.seconds if self.shield else 0.0) - self._shield_before,
            "step_seconds": perf_counter() - self._start,
        }
