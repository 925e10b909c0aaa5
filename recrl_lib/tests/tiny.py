"""A 3-layer random Llama with a word tokenizer, and word counts as sentence vectors, for tests."""

import re
import zlib

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recrl_lib.explainer.model import Explainer

WORDS = "you i watched recommend films the a film and of good bad red blue green short long".split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def tiny_explainer(seed: int = 0, lora_layers: int | None = None, dtype=torch.float32) -> Explainer:
    vocabulary = {w: n for n, w in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<|im_start|>",
        eos_token="<|im_end|>", pad_token="<|im_end|>",
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        initializer_range=0.15,
    )  # fmt: skip
    explainer = Explainer(LlamaForCausalLM(config).to(dtype), tokenizer)
    if lora_layers is not None:
        explainer.add_lora(4, 4, lora_layers, seed)
    return explainer


def tune_randomly(explainer: Explainer, scale: float = 0.1, seed: int = 1) -> None:
    """Give the adapters random values, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in explainer.adapter_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)


class BagOfWords:
    """A sentence encoder of the plainest kind: normalised word counts."""

    def encode(self, texts):
        counts = np.full((len(texts), 64), 1e-6, np.float32)
        for row, text in zip(counts, texts):
            for word in re.findall(r"\w+", text.lower()):
                row[zlib.crc32(word.encode()) % 64] += 1
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)
