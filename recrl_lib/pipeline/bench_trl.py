"""TRL 1.12.0's ``PPOTrainer`` on the work of ``bench``, in the environment that it builds.

As lean as TRL's trainer allows. TRL insists on a value model and a reward model: the value model is
a linear head on the policy's own backbone, as ours is, and the reward model answers 0 for every
token and costs nothing.
"""

import contextlib
import sys
import tempfile
from types import SimpleNamespace

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import nn
from trl.experimental.ppo import PPOConfig, PPOTrainer

from recrl_lib.explainer import model
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.pipeline.bench import EPISODES, PARAMS, STEPS, measure, work


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


def trainer(folder: str) -> PPOTrainer:
    """The trainer; its settings are our PPO step in TRL's names."""
    p, explainer = PARAMS, model.load(PARAMS.llm)
    prompts = [prompt_ids(explainer, messages(record)) for record in work()[1]]
    tokenizer, policy = explainer.tokenizer, explainer.lm
    tokenizer.padding_side = "left"
    # TRL masks every pad token, and this tokenizer's own pad ends each turn.
    tokenizer.pad_token = "<|endoftext|>"
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=p.lora_rank, lora_alpha=p.lora_alpha, lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        layers_to_transform=list(range(explainer.n_layers))[-p.lora_layers :],
    )  # fmt: skip
    settings = PPOConfig(
        output_dir=folder, stop_token="eos", seed=0, gradient_checkpointing=False, bf16=False,
        use_cpu=True, report_to="none", num_sample_generations=0, save_strategy="no",
        disable_tqdm=True, total_episodes=EPISODES * STEPS, num_mini_batches=p.minibatches,
        per_device_train_batch_size=EPISODES // p.minibatches,
        gradient_accumulation_steps=p.minibatches, num_ppo_epochs=p.ppo_epochs,
        local_rollout_forward_batch_size=EPISODES, response_length=p.max_new_tokens,
        temperature=p.temperature, learning_rate=p.learning_rate,
    )  # fmt: skip
    return PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=Head(Nothing(), 1).requires_grad_(False),
        value_model=Head(policy.model, policy.config.hidden_size),
        train_dataset=Dataset.from_dict(
            {"input_ids": [ids for ids in prompts for _ in range(p.samples_per_prompt)]}
        ),
        peft_config=lora,
    )


if __name__ == "__main__":
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        found = measure(trainer(output).train)  # it prints its log
    print(found)
