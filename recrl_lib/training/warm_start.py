"""Supervised warm start: shows the explainer what an explanation looks like, before PPO.

At the temperature where it explores, a small model says little that makes sense, and PPO needs
rewards that differ. TRL's ``SFTTrainer`` fits the adapters to explanations composed from metadata
(``scoring.composed``). The arm's own shield is on this optimizer too. Afterwards the adapter is
merged into the frozen weights, so that "adapter off" is the reference policy of PPO.

Two updates of one base are one update of twice the rank, ``B1 A1 + B2 A2 = [B1 B2] [A1; A2]``,
which is how an arm is stored (``stack``).
"""

import tempfile
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.scoring.composed import reference_line
from recrl_lib.shield.projection import Shield


def trainer_settings(explainer: Explainer, seed: int, steps: int) -> dict[str, Any]:
    """What TRL's trainers have in common here: a constant rate, float32, no files, no output."""
    return {
        "seed": seed,
        "max_steps": steps,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "use_cpu": explainer.device.type == "cpu",
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": False,
    }


def peft_model(explainer: Explainer) -> PeftModel:
    if explainer.peft is None:
        raise ValueError("the explainer has nothing to train; call add_lora first")
    return explainer.peft


def fit(
    explainer: Explainer,
    records: list[dict],
    params: Params,
    seed: int,
    shield: Shield | None = None,
    desc: str = "warm start",
) -> list[dict]:
    """Tune the adapters towards the composed lines of ``records``; a row of step and loss each.

    ``warm_steps`` steps of ``warm_batch`` records at rate ``warm_lr``. Detaches the shield.
    """
    import datasets  # these two take seconds to import
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    steps, batch = params.warm_steps, params.warm_batch
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    lines = [_example(records[i]) for i in order[: steps * batch].tolist()]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # transformers 5.23 renames gradient_checkpointing; 5.17 lacks the new name.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = SFTTrainer(
            model=peft_model(explainer),
            args=SFTConfig(
                output_dir=scratch,
                per_device_train_batch_size=batch,
                learning_rate=params.warm_lr,
                max_grad_norm=1.0,
                completion_only_loss=True,
                max_length=None,
                **trainer_settings(explainer, seed, steps),
            ),
            train_dataset=datasets.Dataset.from_list(lines),
            processing_class=explainer.tokenizer,
            callbacks=[
                Progress(track(range(steps), desc)),
                *([shield.callback()] if shield else []),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    explainer.lm.eval()
    history = trainer.state.log_history
    return [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row]


def _example(record: dict) -> dict[str, list[dict]]:
    answer = {"role": "assistant", "content": reference_line(record)}
    return {"prompt": messages(record), "completion": [answer]}


class Progress(TrainerCallback):
    """Advances ``ticks`` by one at every optimizer step."""

    def __init__(self, ticks: Iterable):
        self.ticks = iter(ticks)

    def on_step_end(self, args, state, control, **kwargs):
        next(self.ticks, None)

    def on_train_end(self, args, state, control, **kwargs):
        next(self.ticks, None)


@torch.no_grad()
def merge(explainer: Explainer, fresh: dict[str, Tensor]) -> None:
    """Add the adapters' update to the frozen weights and reset the adapters to ``fresh``."""
    for _, _, module in explainer.adapted_modules():
        module.base_layer.weight += module.get_delta_weight("default")
    explainer.weights_hash = ""
    explainer.load_adapter(fresh)


def stack(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """One adapter with both updates: A matrices below each other, B matrices side by side."""
    if set(first) != set(second):
        raise ValueError("the two adapters are not on the same layers")
    return {k: torch.cat([first[k], second[k]], 0 if "lora_A" in k else 1) for k in first}
