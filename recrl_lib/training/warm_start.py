"""Supervised warm start: shows the explainer what an explanation looks like, before PPO.

PPO needs rewards that differ, and a small model says little that makes sense. TRL's ``SFTTrainer``
fits the adapters to explanations composed from metadata, under the arm's own shield. Afterwards the
adapter is merged into the frozen weights, so that "adapter off" is the reference policy of PPO.
"""

import tempfile
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.scoring.composed import composed_line
from recrl_lib.shield.projection import Shield

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


def fit(
    explainer: Explainer, records: list[dict], params: Params, seed: int, shield: Shield | None
) -> list[dict]:
    """Tune the adapters towards the composed lines of ``records``; a row of step and loss each."""
    steps, batch, losses = params.warm_steps, params.warm_batch, []
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    lines = []
    for record in (records[i] for i in order[: steps * batch].tolist()):
        answer = {"role": "assistant", "content": composed_line(record)}
        lines.append({"prompt": messages(record), "completion": [answer]})
    settings = {
        "seed": seed, "max_steps": steps, "per_device_train_batch_size": batch, "max_length": None,
        "learning_rate": params.warm_lr, "max_grad_norm": 1.0, "completion_only_loss": True,
    }  # fmt: skip
    callback = Steps(lambda logs, _: losses.append(logs[0]["loss"]), shield, "warm start", steps)
    tokenizer = explainer.tokenizer
    run_trl("SFT", explainer, lines, settings, callback, processing_class=tokenizer)
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]


@torch.no_grad()
def merge(explainer: Explainer, fresh: dict[str, Tensor]) -> None:
    """Add the adapters' update to the frozen weights and reset the adapters to ``fresh``."""
    for _, _, module in explainer.adapted_modules():
        module.base_layer.weight += module.get_delta_weight("default")
    explainer.load_adapter(fresh)


def stack(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """One adapter of twice the rank with both updates: B1 A1 + B2 A2 = [B1 B2] [A1; A2]."""
    return {k: torch.cat([first[k], second[k]], 0 if "lora_A" in k else 1) for k in first}
