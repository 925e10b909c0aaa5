"""Small tuned explainers of every kind of network that is supported."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recrl_lib.explainer.model import Explainer
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly

PROMPTS = [[1, 5, 6, 2, 1], [1, 5, 6, 7, 8, 9, 2, 1], [1, 4, 2, 1]]
_PLAIN = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48
)
OTHERS = {
    "qwen2": _PLAIN | dict(num_key_value_heads=2),
    "gpt2": dict(n_embd=32, n_inner=48, n_layer=3, n_head=4),
    "opt": _PLAIN | dict(word_embed_proj_dim=32),
    "phi3": _PLAIN | dict(num_key_value_heads=2),
    "gpt_neox": _PLAIN,
    "gemma2": _PLAIN | dict(head_dim=16, num_key_value_heads=1, final_logit_softcapping=0.5),
}
LLAMAS = {"all layers": 0, "top layer": 1, "top two": 2}


def untuned(kind: str) -> Explainer:
    """A random network: a Llama with adapters on the layers named, or an architecture run whole."""
    if kind in LLAMAS:
        return tiny_explainer(lora_layers=LLAMAS[kind])
    tokenizer = tiny_explainer().tokenizer
    torch.manual_seed(0)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, vocab_size=len(tokenizer))
    settings = ids | dict(max_position_embeddings=256, initializer_range=0.15) | OTHERS[kind]
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return Explainer(lm, tokenizer).add_lora(4, 4, 2, 0)


def tuned(kind: str) -> Explainer:
    explainer = untuned(kind)
    tune_randomly(explainer)
    return explainer
