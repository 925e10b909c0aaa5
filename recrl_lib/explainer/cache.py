"""Keys and values of the tokens that a Llama-type model has read, for sampling.

The answers to one prompt share its keys and values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from recrl_lib.explainer.model import Explainer


class Cache:
    """Keys and values (layers, 2, B, heads, room, width) of the tokens seen so far: of the prompts,
    and after ``share`` of their answers, which then have the rows.

    transformers' ``DynamicCache`` copies all at each token; its ``StaticCache`` cannot lose rows.
    """

    def __init__(self, explainer: Explainer, rows: int, room: int):
        config = explainer.lm.config
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = (layers, 2, rows, config.num_key_value_heads, room, width)
        self.data = torch.empty(shape, device=explainer.device, dtype=explainer.lm.dtype)
        self.lengths = [0] * layers
        self.config = config

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, width) to ``layer``; all of its keys and values."""
        start, end = self.lengths[layer], self.lengths[layer] + keys.shape[2]
        own = self.data[layer, :, :, :, :end]
        own[0, :, :, start:], own[1, :, :, start:] = keys, values
        self.lengths[layer] = end
        return own[0], own[1]

    def take(self, rows: Tensor) -> None:
        """Row i becomes a copy of row ``rows[i]``."""
        old, length = self.data, max(self.lengths)
        self.data = old.new_empty(*old.shape[:2], len(rows), *old.shape[3:])
        self.data[..., :length, :] = old[:, :, rows, :, :length]

    def share(self, samples: int, room: int) -> None:
        """Give each row ``samples`` answers of ``room`` tokens, with rows of their own: what has
        been read so far stays as it is, once for all answers to one prompt."""
        layers, two, groups, heads, _, width = self.data.shape
        self.prompts = self.data[..., : self.lengths[0], :]
        self.data = self.data.new_empty(layers, two, groups * samples, heads, room, width)
        self.lengths = [0] * layers
        self.texts = groups * samples
        self.rows = torch.arange(self.texts, device=self.data.device)  # the text of each row

    def drop(self, gone: Tensor) -> Tensor:
        """Without the rows ``gone`` (B,), whose places the last ones take: the rows left, in their
        new order."""
        order, left = torch.arange(len(gone), device=gone.device), int((~gone).sum())
        free, moved = gone[:left].nonzero()[:, 0], left + (~gone[left:]).nonzero()[:, 0]
        length, order[free] = max(self.lengths), moved
        self.data[:, :, free, :, :length] = self.data[:, :, moved, :, :length]
        self.data, self.rows = self.data[:, :, :left], self.rows[order[:left]]
        return order[:left]

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Within, the layers of the model attend to shared prompts, too."""
        before, self.config._attn_implementation = self.config._attn_implementation, _SHARED
        try:
            yield
        finally:
            self.config._attn_implementation = before

    def with_prompts(self, rows: Tensor, prompts: Tensor) -> Tensor:
        """Products (B, heads, n, y) of rows (B, heads, n, x) with their prompts' (G, heads, x, y).

        Rows of one prompt go together, as one matrix; those of ended rows are 0.
        """
        every = rows.new_zeros(self.texts, *rows.shape[1:])
        every[self.rows] = rows
        folded = every.unflatten(0, (len(prompts), -1)).transpose(1, 2)  # (G, heads, s, n, x)
        found = (folded.flatten(2, 3) @ prompts).view(*folded.shape[:-1], -1)
        return found.transpose(1, 2).flatten(0, 1)[self.rows]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float,
    cached: Cache, **_: Any
) -> tuple[Tensor, None]:  # fmt: skip
    """One new token a row, ``query`` (B, H, 1, w), attends to its prompt and its own answer so far,
    ``key`` and ``value`` (B, heads, T, w): (B, 1, H, w).

    For transformers' attention layers, which hand over what ``Explainer`` hands to them.
    """
    keys, values = cached.prompts[module.layer_idx]  # (G, heads, P, w)
    rows = (query * scaling).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # those of one key head
    scores = torch.cat([cached.with_prompts(rows, keys.mT), rows @ key.mT], -1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    of_prompt, of_answer = weights.split([keys.shape[2], key.shape[2]], -1)
    heard = cached.with_prompts(of_prompt, values) + of_answer @ value
    return heard.flatten(1, 2)[:, None], None


_SHARED = "shared_prompts"
transformers.AttentionInterface.register(_SHARED, _attend)
