"""Sampling from the explainer, and the log-probabilities of what was sampled.

The uniform random numbers of a call are drawn on the CPU for all rows and positions before anything
else, so two policies given equal generators meet common random numbers.

Shapes as in ``recrl_lib.explainer.model``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from recrl_lib.explainer.model import Explainer, causal_mask, left_pad, position_ids, quiet
from recrl_lib.explainer.prompts import Record, messages, prompt_ids
from recrl_lib.progress import track


@dataclass
class Rollout:
    """Sampled responses with all that PPO needs of the moment they were sampled."""

    prompt_mask: Tensor  # (B, P) bool
    response: Tensor  # (B, R) token ids
    mask: Tensor  # (B, R) bool: real response tokens, the EOS included
    logprobs: Tensor  # (B, R) of the sampled tokens under the sampling policy
    values: Tensor  # (B, R) V(state before the token); 0 without a value head
    states: Tensor  # (B, P + R - 1, d) trunk states of prompt and response
    ended: Tensor  # (B,) bool: the response has its EOS
    texts: list[str]

    @property
    def full_mask(self) -> Tensor:
        """(B, P + R - 1): real tokens of prompt and response, the last response token excepted."""
        return torch.cat([self.prompt_mask, self.mask[:, :-1]], dim=1)


@dataclass
class Explained:
    """One explanation a record, by the policy as it was."""

    texts: list[str]
    reference: list[np.ndarray]  # the reference policy's log-probability of each token, EOS too
    kl: np.ndarray  # (n,) KL to the reference, nats: exact over V, summed over the text
    ended: np.ndarray  # (n,) bool: not cut off


def sample(
    explainer: Explainer,
    prompts: list[list[int]],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    value_head: torch.nn.Module | None = None,
) -> Rollout:
    """``samples`` responses to each prompt, those of one prompt in adjacent rows.

    Args:
        generator: None for greedy decoding.
        value_head: maps hidden states (B, d) to values (B, 1).
    """
    uniforms = None
    if generator is not None:
        shape = (len(prompts) * samples, max_new_tokens)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64).to(explainer.device)
    task = _Task(explainer, prompts, samples, max_new_tokens, temperature, uniforms, value_head)
    with torch.no_grad():
        rollout = _decode(task) if explainer.split else _generate(task)
    rollout.ended = ((rollout.response == explainer.eos_id) & rollout.mask).any(-1)
    rows = zip(rollout.response, rollout.mask)
    rollout.texts = [decode(explainer, row[keep]) for row, keep in rows]
    return rollout


def decode(explainer: Explainer, ids: Tensor) -> str:
    """Text of a response without special tokens."""
    return explainer.tokenizer.decode(ids, skip_special_tokens=True).strip()


def response_hidden(explainer: Explainer, rollout: Rollout) -> Tensor:
    """Hidden states (B, R, d) *before* each response token, under the adapters as they are."""
    first = rollout.prompt_mask.shape[1] - 1
    return explainer.top(rollout.states, rollout.full_mask)[:, first:]


def token_logprobs(explainer: Explainer, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probabilities (B, R) of the sampled tokens, adapters as they are; 0 where masked."""
    logp = explainer.log_softmax(response_hidden(explainer, rollout), temperature)
    return logp.gather(-1, rollout.response[..., None])[..., 0].masked_fill(~rollout.mask, 0.0)


@torch.no_grad()
def explain(
    explainer: Explainer,
    records: Sequence[Record],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    desc: str = "explaining",
) -> Explained:
    """One sampled explanation a record by the policy as it is, in batches of 32 records."""
    generator = torch.Generator().manual_seed(seed)
    texts, reference, kl, ended = [], [], [], []
    for start in track(range(0, len(records), 32), desc):
        prompts = [prompt_ids(explainer, messages(r)) for r in records[start : start + 32]]
        rollout = sample(explainer, prompts, 1, max_new_tokens, temperature, generator)
        if explainer.adapters_off:  # the reference sampled: its log-probabilities are at hand
            chosen, divergence = rollout.logprobs, torch.zeros(len(prompts))
        else:
            new = explainer.log_softmax(response_hidden(explainer, rollout), temperature)
            with explainer.reference():
                ref = explainer.log_softmax(response_hidden(explainer, rollout), temperature)
            divergence = (new.exp() * (new - ref)).sum(-1).masked_fill(~rollout.mask, 0.0).sum(-1)
            chosen = ref.gather(-1, rollout.response[..., None])[..., 0]
        texts += rollout.texts
        reference += [row[keep].cpu().numpy() for row, keep in zip(chosen, rollout.mask)]
        kl.append(divergence.clamp(min=0).cpu().numpy())
        ended.append(rollout.ended.cpu().numpy())
    return Explained(texts, reference, np.concatenate(kl), np.concatenate(ended))


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Sample a token a row by inverse CDF: logprobs (B, V), uniform (B,) in [0, 1) -> ids (B,).

    Ten times as fast as ``torch.multinomial`` for 32 rows of V = 49,152 on a CPU. The cumulative
    sum is in float64, so that no probability above 1e-16 is lost.
    """
    cdf = logprobs.double().exp().cumsum(-1)
    ids = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)
    return ids.squeeze(-1).clamp(max=logprobs.shape[-1] - 1)


@dataclass
class _Task:
    """The arguments of ``sample``, its random numbers drawn."""

    explainer: Explainer
    prompts: list[list[int]]
    samples: int
    max_new_tokens: int
    temperature: float
    uniforms: Tensor | None  # (B, max_new_tokens)
    value_head: torch.nn.Module | None = None

    def choose(self, logprobs: Tensor, rows: Tensor | slice, position: int) -> Tensor:
        """The next token of ``rows``, whose log-probabilities are (rows, V)."""
        if self.uniforms is None:
            return logprobs.argmax(-1)
        return draw(logprobs, self.uniforms[rows, position])

    def value(self, hidden: Tensor) -> Tensor:
        """Values (...) of hidden states (..., d)."""
        if self.value_head is None:
            return hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32)
        return self.value_head(hidden)[..., 0]


# --- Llama-type models ----------------------------------------------------------------------------


def _decode(task: _Task) -> Rollout:
    explainer, device, tokens = task.explainer, task.explainer.device, task.max_new_tokens
    policy = _Policy(explainer)
    h, prompt_mask, states, cached, cache = _read(task, policy)
    rows, width = prompt_mask.shape
    response = torch.full((rows, tokens), explainer.pad_id, device=device)
    mask = torch.zeros(rows, tokens, dtype=torch.bool, device=device)
    logprobs, values = (torch.zeros(rows, tokens, device=device) for _ in range(2))
    alive = torch.arange(rows, device=device)  # rows of the batch still being computed
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for t in range(tokens):
        logp = policy.log_softmax(h, task.temperature)
        token = task.choose(logp, alive, t)
        going = ~ended[alive]
        response[alive, t] = torch.where(going, token, explainer.pad_id)
        mask[alive, t] = going
        logprobs[alive, t] = torch.where(going, logp.gather(-1, token[:, None])[:, 0], 0.0)
        values[alive, t] = torch.where(going, task.value(h), 0.0)
        ended[alive] |= token == explainer.eos_id
        left = tokens - 1 - t
        if left == 0 or ended.all():
            break
        # Copying the cache costs a third of a step: only if leaving ended rows out can save one
        if ended[alive].float().mean() * left > 1:
            keep = (~ended[alive]).nonzero()[:, 0]
            cache.take(keep, width + tokens)
            alive, token = alive[keep], token[keep]
        seen = torch.cat([cached, mask[:, : t + 1]], dim=1)[alive]
        positions = seen.sum(-1, keepdim=True) - 1
        h, state = policy(token[:, None], positions, seen[:, None, None, :], cache)
        h, states[alive, width + t] = h[:, -1], state[:, 0]
    r, full = slice(t + 1), slice(width + t)
    found = (x[:, r] for x in (response, mask, logprobs, values))
    return Rollout(prompt_mask, *found, states[:, full], ended, [])


def _read(task: _Task, policy: "_Policy") -> tuple[Tensor, Tensor, Tensor, Tensor, "Cache"]:
    """Run the prompts through the network, once each, and their common beginning once for all.

    Returns the last hidden state (B, d), the mask (B, P) of left-padded prompts, trunk states with
    room for the response's (B, P + max_new_tokens - 1, d), the mask (B, P) of the cache, the cache.
    In the cache padding stands between the common beginning and the rest: positions count real
    tokens, so its place does not matter.
    """
    explainer, prompts, device = task.explainer, task.prompts, task.explainer.device
    lengths = list(map(len, prompts))
    common = commonprefix(prompts)[: min(lengths) - 1] if len(prompts) > 1 else []
    n, width = len(common), max(lengths)
    room = width + task.max_new_tokens
    ids, mask = left_pad([p[n:] for p in prompts], explainer.pad_id, device)
    mask = F.pad(mask, (n, 0), value=True)
    cache = Cache(explainer, 1 if n else len(prompts), room)
    first = None
    if n:
        ones = torch.ones(1, n, dtype=torch.bool, device=device)
        beginning = torch.tensor([common], device=device)
        _, first = policy(beginning, position_ids(ones), causal_mask(ones), cache)
        cache.take(torch.zeros(len(prompts), dtype=torch.long, device=device), room)
    h, rest = policy(ids, position_ids(mask)[:, n:], causal_mask(mask)[:, :, n:], cache)
    states = rest.new_zeros(len(prompts), room - 1, rest.shape[-1])
    for row, length in enumerate(lengths):
        start = width - length
        if first is not None:
            states[row, start : start + n] = first[0]
        states[row, start + n : width] = rest[row, n - length :]
    repeat = torch.arange(len(prompts), device=device).repeat_interleave(task.samples)
    cache.take(repeat, room)
    padding = width - torch.tensor(lengths, device=device)
    prompt_mask = torch.arange(width, device=device) >= padding[:, None]
    return h[repeat, -1], prompt_mask[repeat], states[repeat], mask[repeat], cache


class Cache:
    """Keys and values (layers, 2, B, heads, room, width) of the ``length`` tokens seen so far."""

    def __init__(self, explainer: Explainer, rows: int, room: int):
        config = explainer.lm.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, room, width)
        self.data = torch.empty(shape, device=explainer.device, dtype=explainer.lm.dtype)
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, width) to ``layer``; returns all of its keys and values."""
        end = self.length + keys.shape[2]
        self.data[layer, 0, :, :, self.length : end] = keys
        self.data[layer, 1, :, :, self.length : end] = values
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]

    def take(self, rows: Tensor, room: int) -> None:
        """Row i becomes a copy of row ``rows[i]``, with room for ``room`` tokens."""
        old = self.data
        self.data = old.new_empty(*old.shape[:2], len(rows), old.shape[3], room, old.shape[5])
        self.data[..., : self.length, :] = old[:, :, rows, :, : self.length]


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``F.linear`` with a constant weight (out, in).

    On a CPU in oneDNN's layout, where this torch has the (private) operations for it.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 32)
            product = torch.ops.mkldnn._linear_pointwise
            product(weight.new_zeros(1, weight.shape[1]), packed, bias, "none", [], "")
            return lambda x: product(x, packed, bias, "none", [], "")
        except (AttributeError, RuntimeError):
            pass
    return lambda x: F.linear(x, weight, bias)


def _packed(explainer: Explainer) -> list[list[Callable[[Tensor], Tensor]]]:
    """The frozen weights fused for decoding: four products a layer, and last the head's."""
    layers = [
        [
            _join(attention.q_proj, attention.k_proj, attention.v_proj),
            _join(attention.o_proj),
            _join(mlp.gate_proj, mlp.up_proj),
            _join(mlp.down_proj),
        ]
        for attention, mlp in ((x.self_attn, x.mlp) for x in explainer.lm.model.layers)
    ]
    return [*layers, [_join(explainer.lm.lm_head)]]


def _join(*modules) -> Callable[[Tensor], Tensor]:
    """One product for linear layers that read the same input, without their adapters."""
    bare = [getattr(m, "base_layer", m) for m in modules]
    if len(bare) == 1:
        return linear(bare[0].weight, bare[0].bias)
    bias = None if bare[0].bias is None else torch.cat([m.bias for m in bare])
    return linear(torch.cat([m.weight for m in bare]), bias)


def _adapters(*modules) -> tuple[Tensor, Tensor] | None:
    """(A^T, B^T) of the modules' adapters side by side, scaled; None if there are none or off."""
    if any(not hasattr(m, "lora_A") or m.disable_adapters for m in modules):
        return None
    a = torch.cat([m.lora_A["default"].weight for m in modules])
    b = torch.block_diag(*(m.scaling["default"] * m.lora_B["default"].weight for m in modules))
    return a.T.contiguous(), b.T.contiguous()


class _Policy:
    """The network's forward pass for decoding, with the adapters as they are at construction."""

    def __init__(self, explainer: Explainer):
        self.model, self.cut = explainer.lm.model, explainer.cut
        *self.layers, (self.head,) = explainer.derived(_packed)
        attentions = [layer.self_attn for layer in self.model.layers]
        self.adapters = [
            (_adapters(a.q_proj, a.k_proj, a.v_proj), _adapters(a.o_proj)) for a in attentions
        ]

    def __call__(
        self, ids: Tensor, positions: Tensor, allowed: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """(final normed hidden, trunk states), both (B, T, d), of new tokens ids (B, T).

        ``allowed`` (B, 1, T, S): which of the S tokens in the cache, new ones last, each one sees.
        """
        h = states = self.model.embed_tokens(ids)
        cos, sin = (x[:, :, None] for x in self.model.rotary_emb(h, positions))
        for number, layer in enumerate(self.model.layers):
            qkv, out, gate_up, down = self.layers[number]
            adapt_qkv, adapt_out = self.adapters[number]
            x = _adapted(qkv, _rms(h, layer.input_layernorm), adapt_qkv)
            h = h + _adapted(out, _attend(x, cos, sin, allowed, cache, number), adapt_out)
            gate, up = gate_up(_rms(h, layer.post_attention_layernorm)).chunk(2, -1)
            h = h + down(layer.mlp.act_fn(gate) * up)
            if number + 1 == self.cut:
                states = h
        cache.length += ids.shape[1]
        return _rms(h, self.model.norm), states

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        return torch.log_softmax(self.head(hidden).float() / temperature, dim=-1)


def _rms(x: Tensor, norm) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _adapted(product: Callable, x: Tensor, adapters: tuple[Tensor, Tensor] | None) -> Tensor:
    if adapters is None:
        return product(x)
    a, b = adapters  # float32 in a bf16 model too: PEFT's choice
    return (product(x) + x.to(a.dtype) @ a @ b).to(x.dtype)


def _attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor, cache: Cache, layer: int
) -> Tensor:
    """Attention output (B, T, heads x width) from projected q, k, v side by side.

    The query heads of one key head are laid out one after the other on the length axis, so that
    keys and values need not be repeated for them (grouped-query attention).
    """
    b, t, _ = qkv.shape
    groups, width = cache.data.shape[3], cache.data.shape[5]
    qkv = qkv.view(b, t, -1, width)
    heads = qkv.shape[2] - 2 * groups
    qk, values = qkv.split([heads + groups, groups], 2)
    left, right = qk.chunk(2, -1)
    qk = qk * cos + torch.cat([-right, left], -1) * sin  # rotary positions
    keys, values = cache.update(qk[:, :, heads:].transpose(1, 2), values.transpose(1, 2), layer)
    per = heads // groups
    queries = qk[:, :, :heads].view(b, t, groups, per, width).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(b, groups, per * t, width)
    allowed = allowed.repeat(1, 1, per, 1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
    return out.view(b, groups, per, t, width).permute(0, 3, 1, 2, 4).reshape(b, t, heads * width)


# --- any architecture -----------------------------------------------------------------------------


class _Chosen(LogitsProcessor):
    """Leaves ``generate`` one token to choose: the one that our sampler draws."""

    def __init__(self, task: _Task, prompt: int):
        self.task, self.prompt = task, prompt

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits.float() / self.task.temperature, -1)
        token = self.task.choose(logp, slice(None), ids.shape[1] - self.prompt)
        return torch.full_like(logits, -torch.inf).scatter(-1, token[:, None], 0.0)


def generated(
    explainer: Explainer, prompts: list[list[int]], max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Greedy responses by transformers' ``generate``, through whatever adapts the model's layers.

    Returns the response (B, R) and the mask of its tokens up to and with the first EOS.
    """
    return _by_generate(_Task(explainer, prompts, 1, max_new_tokens, 1.0, None))[2:]


@torch.no_grad()
def _by_generate(task: _Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt ids and mask (B, P), response ids and mask (B, R), by transformers' ``generate``."""
    explainer = task.explainer
    repeated = [p for p in task.prompts for _ in range(task.samples)]
    ids, prompt_mask = left_pad(repeated, explainer.pad_id, explainer.device)
    width = ids.shape[1]
    with quiet():
        out = explainer.lm.generate(
            input_ids=ids,
            attention_mask=prompt_mask.long(),
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            eos_token_id=explainer.eos_id,
            pad_token_id=explainer.pad_id,
            logits_processor=LogitsProcessorList([_Chosen(task, width)]),
        )
    response = out[:, width:]
    ends = response == explainer.eos_id
    mask = ends.cumsum(-1) - ends.long() == 0
    return ids, prompt_mask, response.masked_fill(~mask, explainer.pad_id), mask


def _generate(task: _Task) -> Rollout:
    explainer = task.explainer
    ids, prompt_mask, response, mask = _by_generate(task)
    full_mask = torch.cat([prompt_mask, mask[:, :-1]], 1)
    states = explainer.trunk(torch.cat([ids, response[:, :-1]], 1), full_mask)
    hidden = explainer.top(states, full_mask)[:, ids.shape[1] - 1 :]
    logprobs = torch.zeros(response.shape, device=ids.device)
    for row in range(len(ids)):  # a row at a time: the logits of a whole batch may not fit
        logp = explainer.log_softmax(hidden[row], task.temperature)
        logprobs[row] = logp.gather(-1, response[row, :, None])[:, 0]
    values = task.value(hidden).masked_fill(~mask, 0.0)
    logprobs = logprobs.masked_fill(~mask, 0.0)
    return Rollout(prompt_mask, response, mask, logprobs, values, states, mask[:, 0], [])
