"""TRL 1.12.0's ``PPOTrainer`` on the work that ``recrl_lib.pipeline.bench`` describes, as a script.

It runs in an environment that the bench builds, reads the task (JSON) from the file named on the
command line and prints one line of JSON. It is as lean as TRL's trainer allows: no gradient
checkpointing, no sample tables, one batch of rollouts. TRL insists on a value model and a reward
model: the value model is a linear head on the policy's own backbone, as ours is, and the reward
model answers 0 for every token and costs nothing.
"""

import json
import sys
import time
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
    def __init__(self):
        self.cpu = [time.process_time()]

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu.append(time.process_time())


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        task = json.load(file)
    disable_progress_bars()
    torch.set_num_threads(task["threads"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    tokenizer.pad_token = (
        "<|endoftext|>"  # TRL masks every pad token, and this tokenizer's own pad ends each turn
    )
    policy = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    rows = len(task["prompts"])
    clock = Clock()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=task["folder"],
            total_episodes=rows * task["steps"],
            per_device_train_batch_size=rows // task["minibatches"],
            gradient_accumulation_steps=task["minibatches"],
            num_mini_batches=task["minibatches"],
            num_ppo_epochs=task["epochs"],
            local_rollout_forward_batch_size=rows,
            response_length=task["tokens"],
            temperature=task["temperature"],
            stop_token="eos",
            learning_rate=task["learning_rate"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            num_sample_generations=0,
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=Head(Nothing(), 1).requires_grad_(False),
        value_model=Head(policy.model, policy.config.hidden_size),
        train_dataset=Dataset.from_dict({"input_ids": task["prompts"]}),
        peft_config=LoraConfig(
            r=task["rank"],
            lora_alpha=task["alpha"],
            lora_dropout=0.0,
            target_modules=task["modules"],
            layers_to_transform=task["layers"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )
    clock.__init__()
    sys.stdout = sys.stderr  # the trainer prints its log
    trainer.train()
    sys.stdout = sys.__stdout__
    cpu = clock.cpu
    steps = len(cpu) - 1
    print(
        json.dumps(
            {
                "cpu_seconds": (cpu[-1] - cpu[0]) / steps,
                "peak_gb": peak_memory_gb(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
