"""The explainer's network: a small instruct LLM with LoRA adapters on its top layers.

A Llama-type network is run in two parts. Layers below ``cut`` are never tuned, so their output for
a text (its *trunk states*) is computed once; only the layers from ``cut`` up run again. The split
changes no operation (the "hydra" idea of https://github.com/CarperAI/trlx, issue 33). Other
architectures run whole: ``cut`` is 0, trunk states are embeddings, ``generate`` samples.

All log-probabilities are of ``softmax(logits / temperature)`` (Huang et al. 2024, arXiv
2403.17031). Shapes: B rows, P prompt tokens (left-padded), R response tokens (right-padded), T
tokens in all, d hidden width, V vocabulary.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from recrl_lib import assets
from recrl_lib.params import Params

PACKAGED = {"smollm2-135m-instruct": assets.smollm2_folder}
SPLIT = ("llama",)  # model types that are run in two parts
# Attention projections by the names that architectures give them -> which input each one reads:
# the block's ("attention") or what the heads give out ("output").
INPUT_OF_PROJECTION = {
    **dict.fromkeys("q_proj k_proj v_proj qkv_proj query_key_value c_attn".split(), "attention"),
    **dict.fromkeys("o_proj out_proj dense c_proj".split(), "output"),
}
_PROJECTION = re.compile(r"\.(\d+)\.(?:self_attn|self_attention|attn|attention)\.(\w+)\Z")


def left_pad(prompts: list[list[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask of real tokens, both (B, P), padded on the left."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, True, pad_id, "left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left").bool()
    return ids.to(device), mask.to(device)


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that count each row's real tokens from 0, wherever its padding is."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Layout(NamedTuple):
    """What each of the last T of S tokens attends to, and its place in its own text."""

    allowed: Tensor  # (B, 1, T, S) bool
    positions: Tensor  # (B, T)


def causal_layout(mask: Tensor, new: int) -> Layout:
    """Of the last ``new`` tokens of rows that hold one text each; ``mask`` (B, S): real tokens.

    A token sees the real ones up to its own. Padding sees itself: no softmax over nothing.
    """
    square = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    allowed = square[-new:] & mask.bool()[:, None] | square.triu()[-new:]
    return Layout(allowed[:, None], position_ids(mask)[:, -new:])


def shared_layout(prompt_mask: Tensor, answers: Tensor) -> Layout:
    """Of rows that hold a prompt, then s answers to it side by side.

    ``prompt_mask`` (B, P), ``answers`` (B, s, R): real tokens. An answer sees the prompt and
    itself, and its places count on from the prompt's end, as if each had a row of its own.
    """
    samples, width = answers.shape[1:]
    place = position_ids(prompt_mask)
    owner = torch.arange(samples, device=answers.device).repeat_interleave(width)
    owner = torch.cat([owner.new_full(place.shape[1:], -1), owner])  # -1: the prompt
    square = torch.ones(len(owner), len(owner), dtype=torch.bool, device=owner.device).tril()
    seen = square & ((owner == -1) | (owner[:, None] == owner))
    real = torch.cat([prompt_mask, answers.flatten(1)], 1)
    within = position_ids(answers) + place[:, -1:, None] + 1
    allowed = seen & real[:, None] | square.triu()
    return Layout(allowed[:, None], torch.cat([place, within.flatten(1)], 1))


class Explainer:
    """A causal LM, its tokenizer, and (after ``add_lora``) adapters on its layers from ``cut`` up.

    ``ValueError``: the logits are no linear function of the last hidden state.
    """

    def __init__(self, lm: Any, tokenizer: Any, device: torch.device | str = "cpu"):
        self.split = lm.config.model_type in SPLIT
        for part in (lm.config, *lm.modules()):  # log-probabilities of one policy are always equal
            for dropout in ("p", "attention_dropout"):
                if isinstance(getattr(part, dropout, None), float):
                    setattr(part, dropout, 0.0)
        self.lm = lm.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.peft: peft.PeftModel | None = None
        self.adapters_off = True  # whether the model as it is now is the reference policy
        self.n_layers: int = lm.config.num_hidden_layers
        self.cut = self.n_layers if self.split else 0
        # Padding must not be EOS, which SmolLM2's own is: it also ends every turn of the prompt.
        self.eos_id = tokenizer.eos_token_id
        free = (i for i in (tokenizer.unk_token_id, 0, 1) if i not in (None, self.eos_id))
        self.pad_id: int = next(free)
        if not self.split:
            self._check_head()

    def add_lora(self, rank: int, alpha: int, layers: int, seed: int) -> "Explainer":
        """Adapters on the attention projections of the top ``layers`` layers (0: all); B is 0."""
        if layers > self.n_layers:
            raise ValueError(f"lora_layers={layers}: the model has {self.n_layers} layers")
        first = self.n_layers - (layers or self.n_layers)
        targets = [name for name, layer, _ in self._projections() if layer >= first]
        if not targets:
            kind, known = self.lm.config.model_type, ", ".join(INPUT_OF_PROJECTION)
            raise ValueError(f"llm of type {kind!r}: no attention projection; known names: {known}")
        self.cut = first if self.split else 0
        transposed = transformers.pytorch_utils.Conv1D  # stores its weight as (in, out)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=targets,
            fan_in_fan_out=isinstance(self.lm.get_submodule(targets[0]), transposed),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23's, on every wrap
            torch.manual_seed(seed)  # LoRA draws A on the CPU at creation
            self.peft = peft.get_peft_model(self.lm, config)
        self.adapters_off = False
        return self

    def _projections(self) -> list[tuple[str, int, str]]:
        """(module name, layer number, projection name) of every attention projection, in order."""
        found = ((name, _PROJECTION.search(name)) for name, _ in self.lm.named_modules())
        return [(n, int(m[1]), m[2]) for n, m in found if m and m[2] in INPUT_OF_PROJECTION]

    def adapted_modules(self) -> list[tuple[str, str, torch.nn.Module]]:
        """(name for messages, key of its input, module) of every layer that has an adapter."""
        found = []
        for name, n, projection in self._projections():
            if hasattr(module := self.lm.get_submodule(name), "lora_A"):
                key = f"{n}.{INPUT_OF_PROJECTION[projection]}"
                found.append((f"layer {n} {projection}", key, module))
        return found

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within: adapters off, so that the model is the reference policy."""
        if self.peft is None or self.adapters_off:
            yield
            return
        before = [(p, p.requires_grad) for p in self.lm.parameters()]
        self.adapters_off = True
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            self.adapters_off = False
            for p, trained in before:  # PEFT makes every adapter trainable again, a frozen A too
                p.requires_grad_(trained)

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.lm.parameters() if p.requires_grad]

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters' tensors under PEFT's names, copied to the CPU."""
        state = peft.get_peft_model_state_dict(self.peft)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_adapter(self, state: dict[str, Tensor]) -> None:
        """Give the adapters the tensors of ``adapter_state()``."""
        if wrong := set(state) ^ set(peft.get_peft_model_state_dict(self.peft)):
            raise ValueError(f"adapter: {len(wrong)} tensors differ; it has another LoRA setting")
        peft.set_peft_model_state_dict(self.peft, state)

    def trunk(self, ids: Tensor, mask: Any, cache: Any = None) -> Tensor:
        """Trunk states (B, T, d) of ``ids`` (B, T).

        ``mask`` (B, S): the real ones of all tokens seen, new ones last; S = T without a cache.
        For a split model a ``Layout`` will do too.
        ``cache``: keys and values of earlier tokens, to be extended (a split model only).
        """
        with torch.no_grad():
            embedded = self.lm.get_input_embeddings()(ids)
            return self._run(embedded, mask, slice(self.cut), cache) if self.split else embedded

    def top(self, states: Tensor, mask: Any, cache: Any = None) -> Tensor:
        """Last hidden states (B, T, d), normed, from trunk states, through the adapters if on.

        ``mask`` as for ``trunk``.
        """
        if self.split:
            h = self._run(states, mask, slice(self.cut, None), cache)
            return self.lm.model.norm(h)
        body, given = self.lm.base_model, {"attention_mask": mask.long(), "use_cache": False}
        if "position_ids" in signature(body.forward).parameters:
            given["position_ids"] = position_ids(mask)
        return body(inputs_embeds=states, **given).last_hidden_state

    def _run(self, h: Tensor, mask: Any, layers: slice, cache: Any) -> Tensor:
        """Hidden states (B, T, d) after ``layers``: the one forward pass of sampler and update."""
        allowed, positions = mask if isinstance(mask, Layout) else causal_layout(mask, h.shape[1])
        rotary = self.lm.model.rotary_emb(h, positions)
        shared = {"attention_mask": allowed, "position_ids": positions, "past_key_values": cache}
        shared |= {"cached": cache}  # the layers hand what they do not know to their attention
        for layer in self.lm.model.layers[layers]:
            h = layer(h, position_embeddings=rotary, **shared)
        return h

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (..., V) in float32 of the policy at ``temperature``."""
        logits = self.lm.get_output_embeddings()(hidden)
        return torch.log_softmax(logits.float() / temperature, dim=-1)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Logits must be the output embeddings of the last hidden state and nothing more."""
        ids = torch.arange(4, device=self.device)[None]
        mask = torch.ones_like(ids)
        logits = self.lm(input_ids=ids, attention_mask=mask).logits
        ours = self.log_softmax(self.top(self.trunk(ids, mask), mask), 1.0)
        if not torch.allclose(torch.log_softmax(logits.float(), -1), ours, atol=1e-3):
            kind = f"llm of type {self.lm.config.model_type!r}"
            more = "more than a linear head on its last hidden state, e.g. a soft cap"
            raise ValueError(f"{kind} has {more}; choose llama, qwen2, mistral, opt or gpt2")


def load(name: str, device: torch.device | str = "cpu") -> Explainer:
    """The packaged default, a local folder or a Hugging Face id, in float32.

    transformers shows errors only from here on, and no bars, which would differ at every run.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = PACKAGED[name]() if name in PACKAGED else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        lm = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
        )
    except OSError as error:
        known, reason = f"not packaged ({', '.join(PACKAGED)})", str(error).splitlines()[0]
        raise RuntimeError(f"llm={name!r}: {known}, no folder, not on the hub: {reason}") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"llm={name!r}: no chat template; choose an instruct model")
    return Explainer(lm, tokenizer, device)


def load_for(params: Params, seed: int, device: torch.device | str = "cpu") -> Explainer:
    """The run's LLM with the run's (still empty) adapters."""
    explainer = load(params.llm, device)
    return explainer.add_lora(params.lora_rank, params.lora_alpha, params.lora_layers, seed)
