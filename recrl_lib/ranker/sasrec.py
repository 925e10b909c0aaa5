"""SASRec (Kang & McAuley 2018) with item texts, stored as safetensors.

A causal transformer reads a user's history. The score of item i is the dot product of the last
state with the item's vector, which is also the input embedding (tied). With item texts::

    v_i = e_i + W norm(t_i)

``t_i`` is the LLM's vector of item i's text, an argument and no part of the ranker. ``norm``
standardises each feature over items 1..I of the *base* LLM's vectors and divides by the root of
their number, so that |norm(t)| is about 1 and W and e learn at one rate. Its constants are stored
in the model: a drift of a tuned LLM's vectors reaches the ranking.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from recrl_lib.runs import write_atomic


class SASRec(nn.Module):
    """``layers`` pre-norm causal blocks of width ``dim`` over the last ``max_len`` items.

    Order enters as a learned attention bias by distance, ``distances[d, head]`` for the item d
    places back (Raffel et al. 2020, §2.1), which all positions train; of the paper's vectors a
    place, one target a window trains the last, the only one ranked from. In training a share
    ``item_dropout`` of the items read is zeroed. With ``text_dim`` > 0 call ``fit_text``.
    """

    text_mean: Tensor
    text_scale: Tensor

    def __init__(
        self,
        n_items: int,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        max_len: int = 50,
        dropout: float = 0.3,
        text_dim: int = 0,
        seed: int = 0,
        item_dropout: float = 0.0,
    ):
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if dim % heads:
            raise ValueError(f"SASRec: dim={dim} must be a multiple of heads={heads}")
        self.n_items, self.max_len, self.item_dropout = n_items, max_len, item_dropout
        self.items = nn.Embedding(n_items + 1, dim, padding_idx=0)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.text = nn.Linear(text_dim, dim, bias=False) if text_dim else None
        if text_dim:
            self.register_buffer("text_mean", torch.full((text_dim,), math.nan))
            self.register_buffer("text_scale", torch.full((text_dim,), math.nan))
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.items.weight.data[0] = 0.0
        # As ALiBi (Press et al. 2022), whose exponent of 8, made for text, sees too far here.
        slopes = 2.0 ** (-6.0 / heads * torch.arange(1, heads + 1))
        self.distances = nn.Parameter(-torch.arange(max_len)[:, None] * slopes)

    def fit_text(self, text: Tensor) -> None:
        """Take the constants of ``norm`` from the base LLM's vectors, (I+1, text_dim)."""
        rows = text[1:].double()
        self.text_mean.copy_(rows.mean(0))
        std = rows.std(0, correction=0).clamp_min(1e-6)  # a constant feature stays 0, not 0/0
        self.text_scale.copy_(std * text.shape[1] ** 0.5)

    def item_table(self, text: Tensor | None, items: Tensor | None = None) -> Tensor:
        """Item vectors (I+1, dim), row 0 zero; without ``text`` W norm(t) is left out.

        With ``items``, int64 (n,) whose first is 0, only their rows: (n, dim).
        """
        table = self.items.weight if items is None else self.items(items)
        if text is not None:
            expected = (self.n_items + 1, self.text.in_features if self.text else 0)
            if self.text is None or text.shape != expected:
                shape = tuple(text.shape)
                raise ValueError(f"SASRec: text is {shape}, not (I+1, text_dim) = {expected}")
            if self.text_mean.isnan().any():
                raise RuntimeError("SASRec: call fit_text with the base LLM's vectors first")
            text = text if items is None else text[items]
            table = table + self.text((text - self.text_mean) / self.text_scale)
        return torch.cat([torch.zeros_like(table[:1]), table[1:]])

    def forward(self, histories: Tensor, table: Tensor) -> Tensor:
        """States (B, L, dim) after each item of ``histories``, int64 (B, L) left-padded with 0.

        The state at position j has seen items 1..j only. Rows at padded positions are meaningless.
        """
        length = histories.shape[1]
        if length > self.max_len:
            raise ValueError(f"SASRec: histories of length {length} exceed max_len={self.max_len}")
        real = histories > 0
        place = torch.arange(length, device=histories.device)
        back = place[:, None] - place  # how far before the query the key is
        itself = back == 0  # a padded row needs one key, or is NaN
        allowed = (back >= 0) & real[:, None, :] | itself
        # Looked up as an embedding: an index's gradient is summed in no fixed order by threads.
        bias = F.embedding(back.clamp_min(0), self.distances).permute(2, 0, 1)
        mask = torch.where(allowed[:, None], bias, -torch.inf)  # (B, heads, L, L)
        # Vectors start near 0, so they are scaled (Vaswani et al. 2017, §3.4).
        x = F.embedding(histories, table) * table.shape[1] ** 0.5
        if self.training and self.item_dropout:
            x = x * (torch.rand(histories.shape, device=x.device) >= self.item_dropout)[..., None]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    @property
    def device(self) -> torch.device:
        return self.items.weight.device


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward of width ``dim``, each with a residual."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed_in, self.feed_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_out(F.gelu(self.feed_in(self.norm_feed(x)))))


def add_items(model: SASRec, text: Tensor, rows: Tensor) -> tuple[SASRec, Tensor]:
    """Add items that training never saw, with e = 0 and text vectors ``rows`` (n, text_dim), as
    I+1..I+n. Returns a larger frozen copy of ``model``, and ``text`` (I+1, text_dim) with ``rows``
    added."""
    larger = SASRec(**{**model.arguments, "n_items": model.n_items + len(rows)})
    state = model.state_dict()
    state["items.weight"] = F.pad(state["items.weight"], (0, 0, 0, len(rows)))
    larger.load_state_dict(state)
    return freeze(larger.to(model.device)), torch.cat([text, rows.to(text)])


def state_sha256(model: nn.Module) -> str:
    """Hex sha256 of names, types, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()


def freeze(model: SASRec) -> SASRec:
    """``model`` in eval mode with no parameter that takes a gradient."""
    return model.requires_grad_(False).eval()


def save(model: SASRec, path: Path) -> None:
    """Weights and constructor arguments as safetensors, written whole or not at all."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomic(path, safetensors_bytes(tensors, metadata={"sasrec": json.dumps(model.arguments)}))


def load(path: Path) -> SASRec:
    """The model that ``save`` wrote, on the CPU, frozen.

    Raises ``FileNotFoundError``, or ``ValueError`` if it is damaged or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run notebooks/02_ranker.ipynb first")
    try:
        with safe_open(path, framework="pt") as file:
            arguments = file.metadata()["sasrec"]
        model = SASRec(**json.loads(arguments))
        model.load_state_dict(load_file(path))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        remedy = "run notebooks/02_ranker.ipynb again"
        raise ValueError(f"{path}: not a stored SASRec ({error}); {remedy}") from None
    return freeze(model)
