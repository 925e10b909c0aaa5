"""Supervised warm start: shows the explainer what an explanation looks like, before PPO.

At the temperature where it explores, a small model says little that makes sense, and PPO needs
rewards that differ. TRL's ``SFTTrainer`` fits the adapters to explanations composed from metadata
(``scoring.composed``), under the arm's own shield. Afterwards the adapter is merged into the
frozen weights, so that "adapter off" is the reference policy of PPO.
"""

import tempfile
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.scoring.composed import reference_line
from recrl_lib.shield.projection import Shield

# TRL's trainers run at a constant rate, in float32, without files and output.
COMMON = {
    "lr_scheduler_type": "constant", "weight_decay": 0.0, "gradient_checkpointing": False,
    "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "disable_tqdm": True, "log_level": "error", "dataloader_pin_memory": False,
}  # fmt: skip


class Progress(TrainerCallback):
    """Advances ``ticks`` by one after every ``each`` optimizer steps."""

    def __init__(self, ticks: Iterable, each: int = 1):
        self.ticks, self.each = iter(ticks), each

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.each == 0:
            next(self.ticks, None)

    def on_train_end(self, args, state, control, **kwargs):
        next(self.ticks, None)


def run_trl(
    kind: str,
    explainer: Explainer,
    rows: list[dict],
    settings: dict[str, Any],
    callback: Progress,
    shield: Shield | None,
    **options: Any,
) -> list[dict]:
    """Tune the adapters with TRL's trainer ``kind`` ("SFT", ...); what it logged at each step.

    ``settings`` go to the trainer's config, ``options`` to the trainer. Detaches the shield.
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
            callbacks=[*([shield.callback()] if shield else []), callback],
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
    return [row for row in trainer.state.log_history if "loss" in row]


def fit(
    explainer: Explainer,
    records: list[dict],
    params: Params,
    seed: int,
    shield: Shield | None = None,
    desc: str = "warm start",
) -> list[dict]:
    """Tune the adapters towards the composed lines of ``records``; a row of step and loss each."""
    steps, batch = params.warm_steps, params.warm_batch
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    chosen = [records[i] for i in order[: steps * batch].tolist()]
    answers = ({"role": "assistant", "content": reference_line(record)} for record in chosen)
    pairs = zip(map(messages, chosen), answers, strict=True)
    lines = [{"prompt": prompt, "completion": [answer]} for prompt, answer in pairs]
    settings = {
        "seed": seed, "max_steps": steps, "per_device_train_batch_size": batch,
        "learning_rate": params.warm_lr, "max_grad_norm": 1.0, "completion_only_loss": True,
        "max_length": None,
    }  # fmt: skip
    bar, tokenizer = Progress(track(range(steps), desc)), explainer.tokenizer
    logged = run_trl("SFT", explainer, lines, settings, bar, shield, processing_class=tokenizer)
    return [{"step": row["step"], "loss": row["loss"]} for row in logged]


@torch.no_grad()
def merge(explainer: Explainer, fresh: dict[str, Tensor]) -> None:
    """Add the adapters' update to the frozen weights and reset the adapters to ``fresh``."""
    for _, _, module in explainer.adapted_modules():
        module.base_layer.weight += module.get_delta_weight("default")
    explainer.weights_hash = ""
    explainer.load_adapter(fresh)


def stack(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """One adapter of twice the rank with both updates: B1 A1 + B2 A2 = [B1 B2] [A1; A2]."""
    return {k: torch.cat([first[k], second[k]], 0 if "lora_A" in k else 1) for k in first}
