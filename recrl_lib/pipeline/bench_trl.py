"""TRL 1.12.0's ``PPOTrainer`` on the work that ``recrl_lib.pipeline.bench`` describes, as a script.

It runs in an environment that the bench builds, reads the task (JSON) from the file named on the
command line and prints one line of JSON. It is as lean as TRL's trainer allows. TRL insists on a
value model and a reward model: the value model is a linear head on the policy's own backbone, as
ours is, and the reward model answers 0 for every token and costs nothing.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from recrl_lib.training.diagnostics import peak_memory_gb


class Head(nn.Module):
    """What TRL asks of a value model: a backbone under ``base_model_prefix`` and ``score``."""

    base_model_prefix = "model"

    def __init__(self, backbone: nn.Module, width: int):
        super().__init__()
        self.model, self.score = backbone, nn.Linear(width, 1)


class Nothing(nn.Module):
    """A backbone whose hidden states are 0 and wide as one number."""

    def forward(self, input_ids, **_):
        return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 1)])


class Clock(TrainerCallback):
    """CPU-seconds of this process after each step."""

    def __init__(self):
        self.cpu = []

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu.append(time.process_time())


def trainer(task: dict, clock: Clock) -> PPOTrainer:
    """The trainer of the task; its settings are TRL's names."""
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    # TRL masks every pad token, and this tokenizer's own pad ends each turn.
    tokenizer.pad_token = "<|endoftext|>"
    policy = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    lean = {
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none",
        "num_sample_generations": 0, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return PPOTrainer(
        args=PPOConfig(stop_token="eos", seed=0, **lean, **task["ppo"]),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=Head(Nothing(), 1).requires_grad_(False),
        value_model=Head(policy.model, policy.config.hidden_size),
        train_dataset=Dataset.from_dict({"input_ids": task["prompts"]}),
        peft_config=LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **task["lora"]),
        callbacks=[clock],
    )


def main(path: str) -> None:
    task, clock = json.loads(Path(path).read_text(encoding="utf-8")), Clock()
    disable_progress_bars()
    torch.set_num_threads(task["threads"])
    made = trainer(task, clock)
    out, sys.stdout = sys.stdout, sys.stderr  # the trainer prints its log
    start = time.process_time()
    made.train()
    seconds = (clock.cpu[-1] - start) / len(clock.cpu)
    peak = peak_memory_gb(torch.device("cpu"))
    print(json.dumps({"cpu_seconds": seconds, "peak_gb": peak}), file=out)


if __name__ == "__main__":
    main(sys.argv[1])
