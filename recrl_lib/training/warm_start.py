"""Supervised warm start: show the explainer what an explanation looks like before PPO.

At a temperature where it explores, a 135M model is close to word salad, and PPO needs rewards that differ.
TRL's ``SFTTrainer`` fits the adapters to explanations composed from metadata (``recrl_lib.references``)
for the PPO users. The ranker always saw the untouched base, so this is tuning like any other: the arm's
own shield is attached here too. Afterwards the adapter is merged, so that "adapter off" is the
reference policy of the RL that follows.

Two updates on one base are one update of twice the rank: ``B1 A1 + B2 A2 = [B1 B2] [A1; A2]``, which is
how an arm is stored (``stack``) and later measured against the base model.
"""

import tempfile
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages
from recrl_lib.progress import track
from recrl_lib.scoring.composed import reference_line
from recrl_lib.shield.projection import Shield


def fit(
    explainer: Explainer,
    records: list[dict],
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    shield: Shield | None = None,
    desc: str = "warm start",
) -> list[dict]:
    """Tune the adapters towards the reference lines of ``records``; rows of step, loss. Detaches the shield."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[
        : steps * batch
    ]
    data = datasets.Dataset.from_list(
        [
            {
                "prompt": messages(r),
                "completion": [{"role": "assistant", "content": reference_line(r)}],
            }
            for r in (records[i] for i in chosen.tolist())
        ]
    )
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers 5.23 renames gradient_checkpointing; 5.17 lacks the new name
        settings = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            seed=seed,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            completion_only_loss=True,
            max_length=None,
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
        watcher = _Watcher(shield, iter(track(range(steps), desc)))
        trainer = SFTTrainer(
            model=explainer.peft,
            args=settings,
            train_dataset=data,
            processing_class=explainer.tokenizer,
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = trainer.state.log_history
    explainer.lm.eval()
    return [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row]


class _Watcher(TrainerCallback):
    """Attaches the shield to the trainer's optimizer, and reports progress."""

    def __init__(self, shield: Shield | None, ticks: Iterator):
        self.shield, self.ticks = shield, ticks

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.shield:
            self.shield.attach(optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        next(self.ticks, None)

    def on_train_end(self, args, state, control, **kwargs):
        next(self.ticks, None)
        if self.shield:
            self.shield.detach()


@torch.no_grad()
def merge(explainer: Explainer, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the adapters' update to the frozen weights and reset them to ``fresh``; returns the merged adapter."""
    merged = explainer.adapter_state()
    for _, _, module in explainer.adapted_modules():
        module.base_layer.weight += module.get_delta_weight("default")
    explainer.forget_hash()
    explainer.load_adapter(fresh)
    return merged


def stack(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """One adapter with the update of both: A matrices below each other, B matrices side by side."""
    if set(first) != set(second):
        raise ValueError("the two adapters are not on the same layers")
    return {
        name: torch.cat([first[name], second[name]], dim=0 if "lora_A" in name else 1)
        for name in first
    }


def unstack(stacked: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two adapters that ``stack`` made one of."""
    halves = {
        name: tensor.chunk(2, dim=0 if "lora_A" in name else 1) for name, tensor in stacked.items()
    }
    return {name: half[0].contiguous() for name, half in halves.items()}, {
        name: half[1].contiguous() for name, half in halves.items()
    }
