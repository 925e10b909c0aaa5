"""Sampling from the explainer: batched decoding, log-probabilities of what was said."""

from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from recrl_lib.explainer.model import Explainer, causal_mask, left_pad, position_ids
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.progress import track


class Decoded(NamedTuple):
    """``samples`` responses to each prompt; the fields of the same names in ``explainer.Rollout``."""

    prompt_mask: Tensor  # (B, P) bool
    response: Tensor  # (B, R)
    mask: Tensor  # (B, R) bool
    logprobs: Tensor  # (B, R)
    values: Tensor  # (B, R)
    states: Tensor  # (B, P + R - 1, d)


@torch.no_grad()
def generate(
    explainer,
    prompts: list[list[int]],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    value_head: torch.nn.Module | None = None,
) -> Decoded:
    """Rows of one prompt are adjacent; greedy if ``generator`` is None.

    The uniforms are drawn on the CPU for all rows and positions before anything else, so two policies
    given equal generators see common random numbers.
    """
    rows = len(prompts) * samples
    uniforms = None
    if generator is not None:
        uniforms = torch.rand(rows, max_new_tokens, generator=generator, dtype=torch.float64).to(
            explainer.device
        )
    run = _decode if explainer.split else _generate
    return run(explainer, prompts, samples, max_new_tokens, temperature, uniforms, value_head)


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Sample a token a row by inverse CDF: logprobs (B, V), uniform (B,) in [0, 1) -> ids (B,).

    ``torch.multinomial`` takes about 50 ms for 32 rows of V = 49,152 on a CPU, this 5 ms. The cumulative sum is in
    float64, so that no probability above 1e-16 is lost.
    """
    cdf = logprobs.double().exp().cumsum(-1)
    ids = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)
    return ids.squeeze(-1).clamp(max=logprobs.shape[-1] - 1)


# --- Llama-type models --------------------------------------------------------------------------


class Cache:
    """Keys and values (layers, 2, B, heads, room, width) of the ``length`` tokens seen so far."""

    def __init__(self, explainer, rows: int, room: int):
        config = explainer.lm.config
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, room, width)
        self.data, self.length = (
            torch.empty(shape, device=explainer.device, dtype=explainer.lm.dtype),
            0,
        )

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, width) to ``layer``; all of its keys and values, up to the new ones."""
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
    """``F.linear`` with a constant weight (out, in), on a CPU in oneDNN's layout where this torch has the (private) ops."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 32)
            product = torch.ops.mkldnn._linear_pointwise
            product(weight.new_zeros(1, weight.shape[1]), packed, bias, "none", [], "")
            return lambda x: product(x, packed, bias, "none", [], "")
        except (AttributeError, RuntimeError):
            pass
    return lambda x: F.linear(x, weight, bias)


class Fused:
    """A Llama-type model's frozen weights, fused for decoding."""

    def __init__(self, explainer):
        self.layers = []
        for layer in explainer.lm.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                (
                    _join(attention.q_proj, attention.k_proj, attention.v_proj),
                    _join(attention.o_proj),
                    _join(mlp.gate_proj, mlp.up_proj),
                    _join(mlp.down_proj),
                )
            )
        self.head = _join(explainer.lm.lm_head)


def _join(*modules) -> Callable[[Tensor], Tensor]:
    """One product for several linear layers that read the same input (what adapters add is left out)."""
    bare = [getattr(m, "base_layer", m) for m in modules]
    if len(bare) == 1:
        return linear(bare[0].weight, bare[0].bias)
    bias = None if bare[0].bias is None else torch.cat([m.bias for m in bare])
    return linear(torch.cat([m.weight for m in bare]), bias)


def _adapters(*modules) -> tuple[Tensor, Tensor] | None:
    """(A^T, B^T) of the adapters of ``modules`` side by side, scale included; None where there are none or they are off."""
    if any(not hasattr(m, "lora_A") or m.disable_adapters for m in modules):
        return None
    a = torch.cat([m.lora_A["default"].weight for m in modules])
    b = torch.block_diag(*(m.scaling["default"] * m.lora_B["default"].weight for m in modules))
    return a.T.contiguous(), b.T.contiguous()


class Policy:
    """The policy at one moment: fused weights and the adapters as they are (on, off or absent)."""

    def __init__(self, explainer):
        self.explainer, self.fused = explainer, explainer.fused()
        attentions = [layer.self_attn for layer in explainer.lm.model.layers]
        self.adapters = [
            (_adapters(a.q_proj, a.k_proj, a.v_proj), _adapters(a.o_proj)) for a in attentions
        ]

    def __call__(
        self, ids: Tensor, positions: Tensor, allowed: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """(final normed hidden, trunk states), both (B, T, d), of new tokens ids (B, T).

        ``allowed`` (B, 1, T, S) says which of the S tokens in the cache, the new ones last, each one sees.
        """
        model = self.explainer.lm.model
        h = states = model.embed_tokens(ids)
        cos, sin = (x[:, :, None] for x in model.rotary_emb(h, positions))
        for number, layer in enumerate(model.layers):
            if number == self.explainer.cut:
                states = h
            qkv, out, gate_up, down = self.fused.layers[number]
            adapt_qkv, adapt_out = self.adapters[number]
            x = _rms(h, layer.input_layernorm)
            x = _attend(_adapted(qkv, x, adapt_qkv), cos, sin, allowed, cache, number)
            h = h + _adapted(out, x, adapt_out)
            gate, up = gate_up(_rms(h, layer.post_attention_layernorm)).chunk(2, -1)
            h = h + down(layer.mlp.act_fn(gate) * up)
        if self.explainer.cut == len(model.layers):
            states = h
        cache.length += ids.shape[1]
        return _rms(h, model.norm), states

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        return torch.log_softmax(self.fused.head(hidden).float() / temperature, dim=-1)


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

    The query heads of one key head are laid out one after the other on the length axis, so that keys and
    values need not be repeated for them (grouped-query attention).
    """
    b, t, _ = qkv.shape
    groups, width = cache.data.shape[3], cache.data.shape[5]
    qkv = qkv.view(b, t, -1, width)
    heads = qkv.shape[2] - 2 * groups
    qk = qkv[:, :, : heads + groups]
    left, right = qk.chunk(2, -1)
    qk = qk * cos + torch.cat([-right, left], -1) * sin  # rotary positions
    keys, values = cache.add(
        layer, qk[:, :, heads:].transpose(1, 2), qkv[:, :, heads + groups :].transpose(1, 2)
    )
    per = heads // groups
    queries = (
        qk[:, :, :heads]
        .view(b, t, groups, per, width)
        .permute(0, 2, 3, 1, 4)
        .reshape(b, groups, per * t, width)
    )
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=allowed.repeat(1, 1, per, 1)
    )
    return out.view(b, groups, per, t, width).permute(0, 3, 1, 2, 4).reshape(b, t, heads * width)


def _decode(
    explainer, prompts, samples, max_new_tokens, temperature, uniforms, value_head
) -> Decoded:
    rows, device = len(prompts) * samples, explainer.device
    policy = Policy(explainer)
    h, prompt_mask, states, cached, cache = _read(
        explainer, policy, prompts, samples, max_new_tokens
    )
    width = prompt_mask.shape[1]
    room = width + max_new_tokens
    response = torch.full((rows, max_new_tokens), explainer.pad_id, device=device)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    logprobs, values = (
        torch.zeros(rows, max_new_tokens, device=device),
        torch.zeros(rows, max_new_tokens, device=device),
    )
    alive = torch.arange(rows, device=device)  # rows of the batch still being computed
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        logp = policy.log_softmax(h, temperature)
        token = logp.argmax(-1) if uniforms is None else draw(logp, uniforms[alive, t])
        going = ~ended[alive]
        response[alive, t] = torch.where(going, token, explainer.pad_id)
        mask[alive, t] = going
        logprobs[alive, t] = torch.where(going, logp.gather(-1, token[:, None])[:, 0], 0.0)
        if value_head is not None:
            values[alive, t] = torch.where(going, value_head(h)[:, 0], 0.0)
        ended[alive] |= token == explainer.eos_id
        left = max_new_tokens - 1 - t
        if left == 0 or ended.all():
            break
        if (
            ended[alive].float().mean() * left > 1
        ):  # copying the cache costs a third of a step: only if it can save one
            keep = (~ended[alive]).nonzero()[:, 0]
            cache.take(keep, room)
            alive, token = alive[keep], token[keep]
        seen = torch.cat([cached, mask[:, : t + 1]], dim=1)[alive]
        h, state = policy(
            token[:, None], seen.sum(-1, keepdim=True) - 1, seen[:, None, None, :], cache
        )
        h, states[alive, width + t] = h[:, -1], state[:, 0]
    length = t + 1
    return Decoded(
        prompt_mask,
        response[:, :length],
        mask[:, :length],
        logprobs[:, :length],
        values[:, :length],
        states[:, : width + t],
    )


def _read(
    explainer, policy, prompts, samples, max_new_tokens
) -> tuple[Tensor, Tensor, Tensor, Tensor, Cache]:
    """The prompts through the network, once each, their common beginning once for all.

    Returns the last hidden state (B, d), the mask (B, P) of left-padded prompts, trunk states with zeros where the
    response's will be (B, P + max_new_tokens - 1, d), the mask (B, P) of the cache, and the cache. In the cache padding
    stands between the common beginning and the rest: positions count real tokens, so its place does not matter.
    """
    device, lengths = explainer.device, list(map(len, prompts))
    common = commonprefix(prompts)[: min(lengths) - 1] if len(prompts) > 1 else []
    n, width = len(common), max(lengths)
    ids, mask = left_pad([p[n:] for p in prompts], explainer.pad_id, device)
    mask, room = F.pad(mask, (n, 0), value=True), width + max_new_tokens
    cache = Cache(explainer, 1 if n else len(prompts), room)
    if n:
        ones = torch.ones(1, n, dtype=torch.bool, device=device)
        _, first = policy(
            torch.tensor([common], device=device), position_ids(ones), causal_mask(ones), cache
        )
        cache.take(torch.zeros(len(prompts), dtype=torch.long, device=device), room)
    h, rest = policy(ids, position_ids(mask)[:, n:], causal_mask(mask)[:, :, n:], cache)
    states = rest.new_zeros(len(prompts), room - 1, rest.shape[-1])
    for row, length in enumerate(lengths):
        start = width - length
        if n:
            states[row, start : start + n] = first[0]
        states[row, start + n : width] = rest[row, n - length :]
    repeat = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    cache.take(repeat, room)
    prompt_mask = (
        torch.arange(width, device=device) >= width - torch.tensor(lengths, device=device)[:, None]
    )
    return h[repeat, -1], prompt_mask[repeat], states[repeat], mask[repeat], cache


# --- any architecture ---------------------------------------------------------------------------


class _Sampler(LogitsProcessor):
    """Leaves ``generate`` one token to choose: the one our sampler draws, with our uniforms."""

    def __init__(self, temperature: float, uniforms: Tensor | None, prompt: int):
        self.temperature, self.uniforms, self.prompt = temperature, uniforms, prompt

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits.float() / self.temperature, -1)
        token = (
            logp.argmax(-1)
            if self.uniforms is None
            else draw(logp, self.uniforms[:, ids.shape[1] - self.prompt])
        )
        return torch.full_like(logits, -torch.inf).scatter(-1, token[:, None], 0.0)


@torch.no_grad()
def generated(
    explainer, prompts, samples, max_new_tokens, temperature, uniforms
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Responses by transformers' ``generate`` with our sampler in it, through the model's own layers, whatever adapts them.

    Returns the left-padded prompts' ids and mask (B, P), the response (B, R) and the mask of its tokens up to and with the first EOS.
    """
    ids, prompt_mask = left_pad(
        [p for p in prompts for _ in range(samples)], explainer.pad_id, explainer.device
    )
    width = ids.shape[1]
    out = explainer.lm.generate(
        input_ids=ids,
        attention_mask=prompt_mask.long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=explainer.eos_id,
        pad_token_id=explainer.pad_id,
        logits_processor=LogitsProcessorList([_Sampler(temperature, uniforms, width)]),
    )
    response = out[:, width:]
    before = (response == explainer.eos_id).cumsum(-1) - (response == explainer.eos_id).long()
    mask = before == 0
    return ids, prompt_mask, response.masked_fill(~mask, explainer.pad_id), mask


def _generate(
    explainer, prompts, samples, max_new_tokens, temperature, uniforms, value_head
) -> Decoded:
    ids, prompt_mask, response, mask = generated(
        explainer, prompts, samples, max_new_tokens, temperature, uniforms
    )
    width = ids.shape[1]
    full_mask = torch.cat([prompt_mask, mask[:, :-1]], 1)
    states = explainer.trunk(torch.cat([ids, response[:, :-1]], 1), full_mask)
    hidden = explainer.top(states, full_mask)[:, width - 1 :]
    logprobs = torch.zeros(response.shape, device=ids.device)
    for row in range(len(ids)):  # a row at a time: the logits of a whole batch may not fit
        logp = explainer.log_softmax(hidden[row], temperature)
        logprobs[row] = logp.gather(-1, response[row, :, None])[:, 0]
    values = torch.zeros_like(logprobs) if value_head is None else value_head(hidden)[..., 0]
    return Decoded(
        prompt_mask,
        response,
        mask,
        logprobs.masked_fill(~mask, 0.0),
        values.masked_fill(~mask, 0.0),
        states,
    )


# --- sampling -----------------------------------------------------------------------------------


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


def sample(
    explainer: Explainer,
    prompts: list[list[int]],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    value_head: torch.nn.Module | None = None,
) -> Rollout:
    """``samples`` responses to each prompt (rows of one prompt are adjacent); greedy if ``generator`` is None.

    Equal generators give common random numbers, whatever the policy (see ``recrl_lib.decoding``).
    """
    out = generate(explainer, prompts, samples, max_new_tokens, temperature, generator, value_head)
    ended = (out.response.masked_fill(~out.mask, explainer.pad_id) == explainer.eos_id).any(-1)
    texts = [decode(explainer, row[keep]) for row, keep in zip(out.response, out.mask)]
    return Rollout(*out, ended, texts)


def decode(explainer: Explainer, ids: Tensor) -> str:
    """Text of a response without special tokens."""
    return explainer.tokenizer.decode(ids, skip_special_tokens=True).strip()


def response_hidden(explainer: Explainer, rollout: Rollout) -> Tensor:
    """Hidden states (B, R, d) at the positions *before* each response token, under the adapters as they are."""
    first = rollout.prompt_mask.shape[1] - 1
    return explainer.top(rollout.states, rollout.full_mask)[:, first:]


def token_logprobs(explainer: Explainer, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probabilities (B, R) of the sampled tokens under the adapters as they are; 0 where masked."""
    logp = explainer.log_softmax(response_hidden(explainer, rollout), temperature)
    return logp.gather(-1, rollout.response[..., None])[..., 0].masked_fill(~rollout.mask, 0.0)


@dataclass
class Explained:
    """One explanation a record, by the policy as it was."""

    texts: list[str]
    reference: list[
        np.ndarray
    ]  # the reference policy's per-token log-probabilities of each text, EOS included
    kl: (
        np.ndarray
    )  # (n,) KL from policy to reference, nats: exact over the vocabulary, summed over the text
    ended: np.ndarray  # (n,) bool: not cut off


@torch.no_grad()
def explain(
    explainer: Explainer,
    records: list[dict],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int = 32,
    desc: str = "explaining",
) -> Explained:
    """One sampled explanation a record by the policy as it is; equal seeds meet equal random numbers."""
    generator = torch.Generator().manual_seed(seed)
    texts, reference, kl, ended = [], [], [], []
    for start in track(range(0, len(records), batch), desc):
        prompts = [prompt_ids(explainer, messages(r)) for r in records[start : start + batch]]
        rollout = sample(explainer, prompts, 1, max_new_tokens, temperature, generator)
        if (
            explainer.adapters_off
        ):  # the policy is the reference, which sampled with the log-probabilities wanted
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
