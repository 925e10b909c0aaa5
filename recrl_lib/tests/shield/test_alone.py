"""The shield without the rest of the library: what ``help(recrl_lib.shield)`` promises."""

import subprocess
import sys

SCRIPT = """
import sys
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from recrl_lib.shield import Shield, collect_grams, leak, protect

torch.manual_seed(0)
network = LlamaForCausalLM(LlamaConfig(
    vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2))
rows = torch.randint(3, 20, (8, 6))
texts = [{"input_ids": rows[:4], "attention_mask": (rows[:4] > 5).long()}, {"input_ids": rows[4:]}]

def new_model():
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    return get_peft_model(network, lora)

def trained(model):
    return any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)

# three lines, a plain loop
model = new_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
protected = protect(collect_grams(model, texts), energy=0.9)
shield = Shield(model, protected).attach(optimizer)
for _ in range(3):
    optimizer.zero_grad()
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
assert trained(model) and leak(model, protected) < 1e-6, leak(model, protected)
shield.detach()
model.unload()

# three lines, a trainer of TRL
model = new_model()
words = Tokenizer(models.WordLevel({str(n): n for n in range(20)}, unk_token="0"))
trainer = SFTTrainer(
    model, SFTConfig(sys.argv[1], max_steps=2, learning_rate=0.01, use_cpu=True, bf16=False,
                     report_to="none", save_strategy="no", disable_tqdm=True),
    train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
    processing_class=PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="0", eos_token="1", pad_token="2"))
protected = protect(collect_grams(model, texts), energy=0.9)
trainer.add_callback(Shield(model, protected).callback())
trainer.train()
assert trained(model) and leak(model, protected) < 1e-6, leak(model, protected)

loaded = [name for name in sys.modules if name.startswith("recrl_lib.")]
assert all(name.startswith("recrl_lib.shield") for name in loaded), loaded
"""


def test_the_shield_attaches_in_three_lines_without_the_rest_of_the_library(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
