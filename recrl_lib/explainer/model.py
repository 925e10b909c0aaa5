"""The explainer: a small instruct LLM with LoRA on its top layers; prompts, sampling, item vectors.

A Llama-type network is run in two parts. Layers below ``cut`` are never tuned, so what they compute for a
text (its *trunk states*) is computed once and reused by the reference policy, every PPO epoch and
every re-encoding of the items; only the layers from ``cut`` up, which carry the adapters, run again.
This is exact (the split changes no operation), and is the idea of trlX's "hydra" head
(https://github.com/CarperAI/trlx, issue 33). Other architectures run whole: ``cut`` is 0, the trunk states
are the embeddings, and sampling goes through transformers' ``generate``.

One policy, everywhere: sampling, old, reference and new log-probabilities are all those of
``softmax(logits / temperature)`` with no other processor (Huang et al. 2024, arXiv 2403.17031).

Shapes: B rows, P prompt tokens (left-padded), R response tokens (right-padded), d hidden width, V vocabulary.
"""

import re
import warnings
from contextlib import contextmanager
from inspect import signature

import torch
import transformers
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor

from recrl_lib import assets

# --- rows of tokens -----------------------------------------------------------------------------


def left_pad(prompts: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, P), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    return ids.to(device), mask.to(device)


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that count each row's real tokens from 0, wherever its padding is."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def causal_mask(mask: Tensor) -> Tensor:
    """Boolean attention mask (B, 1, T, T): real, not later. A padding row sees itself, or softmax would be 0/0."""
    length = mask.shape[1]
    lower = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    allowed = lower & mask.bool()[:, None, :]
    return (allowed | torch.eye(length, dtype=torch.bool, device=mask.device))[:, None]


warnings.filterwarnings(
    "ignore", message=".*is_gradient_checkpointing.*"
)  # transformers 5.23, on every PEFT wrap
transformers.utils.logging.disable_progress_bar()  # a bar in a stored notebook differs at every run
transformers.utils.logging.set_verbosity_error()

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")  # of a Llama-type layer
# Projections of an attention block, as the architectures call them, and which of its two inputs each one reads.
INPUT_OF_PROJECTION = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"), "attention"
    ),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj"), "output"),
}
_PROJECTION = re.compile(r"\.(\d+)\.(?:self_attn|self_attention|attn|attention)\.(\w+)")
PACKAGED = {"smollm2-135m-instruct": assets.smollm2_folder}
SPLIT = (
    "llama",
)  # model types that can be run in two parts and decoded by our own loop; others run whole


# --- the network in two parts -------------------------------------------------------------------


class Explainer:
    """A causal LM, its tokenizer, and (after ``add_lora``) adapters on its layers from ``cut`` up."""

    def __init__(self, lm, tokenizer, device: torch.device | str = "cpu", name: str = "model"):
        self.split = lm.config.model_type in SPLIT
        self.lm = without_dropout(lm).to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.peft: PeftModel | None = None
        self._base_sha256: str | None = None
        self.adapters_off = True  # the model as it speaks now is the reference policy
        self._fused = None
        self.cut = self.n_layers if self.split else 0
        # PAD must not be EOS: this tokenizer ships with pad == eos == <|im_end|>, which also ends
        # every turn inside the prompt. Masks come from lengths, never from `ids != pad`.
        self.eos_id = tokenizer.eos_token_id
        self.pad_id = next(
            i for i in (tokenizer.unk_token_id, 0, 1) if i is not None and i != self.eos_id
        )
        if not self.split:
            self._check_head(name)

    @property
    def n_layers(self) -> int:
        return self.lm.config.num_hidden_layers

    def add_lora(self, rank: int, alpha: int, layers: int, seed: int) -> "Explainer":
        """Adapters on the attention projections of the top ``layers`` layers (0 = all); B = 0, so nothing changes yet."""
        if self.peft is not None:
            raise RuntimeError("this explainer already has adapters")
        if layers > self.n_layers:
            raise ValueError(f"lora_layers={layers}: the model has {self.n_layers} layers")
        first = self.n_layers - (layers or self.n_layers)
        targets = [name for name, layer, _ in self._projections() if layer >= first]
        if not targets:
            raise ValueError(
                f"llm of type {self.lm.config.model_type!r}: no attention projection to adapt was found; known names: "
                f"{', '.join(INPUT_OF_PROJECTION)}"
            )
        self.cut = first if self.split else 0
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=targets,
            task_type="CAUSAL_LM",
            fan_in_fan_out=isinstance(
                self.lm.get_submodule(targets[0]), transformers.pytorch_utils.Conv1D
            ),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # LoRA draws A on the CPU at creation
            self.peft = get_peft_model(self.lm, config)
        self.adapters_off = False
        return self

    def _projections(self) -> list[tuple[str, int, str]]:
        """(module name, layer number, projection name) of every attention projection, in the model's order."""
        found = ((name, _PROJECTION.search(name)) for name, _ in self.lm.named_modules())
        return [
            (n, int(m[1]), m[2])
            for n, m in found
            if m and m.end() == len(n) and m[2] in INPUT_OF_PROJECTION
        ]

    def adapted_modules(self) -> list[tuple[str, str, torch.nn.Module]]:
        """(name for messages, key of its input, module) of every adapted layer; modules of one key read the same input."""
        return [
            (
                f"layer {layer} {projection}",
                f"{layer}.{INPUT_OF_PROJECTION[projection]}",
                self.lm.get_submodule(name),
            )
            for name, layer, projection in self._projections()
            if hasattr(self.lm.get_submodule(name), "lora_A")
        ]

    @torch.no_grad()
    def _check_head(self, name: str) -> None:
        """An architecture we know nothing about must give its logits as its output embeddings of its last hidden state."""
        ids = torch.arange(4, device=self.device)[None]
        logits = self.lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ours = self.log_softmax(
            self.top(self.trunk(ids, torch.ones_like(ids)), torch.ones_like(ids)), 1.0
        )
        if not torch.allclose(torch.log_softmax(logits.float(), -1), ours, atol=1e-3):
            raise ValueError(
                f"llm={name!r}, a {self.lm.config.model_type!r} model, does more than a linear head on its last hidden state "
                "(a soft cap or a scale); choose another, e.g. of type llama, qwen2, mistral, opt or gpt2"
            )

    @contextmanager
    def reference(self):
        """Within: adapters off, so the model is the reference policy."""
        if self.peft is None:
            yield
            return
        trainable = [(p, p.requires_grad) for p in self.lm.parameters()]
        before_off, self.adapters_off = self.adapters_off, True
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            self.adapters_off = before_off
            for (
                p,
                before,
            ) in trainable:  # PEFT's context makes every adapter trainable again, a frozen A too
                p.requires_grad_(before)

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.lm.parameters() if p.requires_grad]

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters' tensors under PEFT's names, copied."""
        return {
            k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(self.peft).items()
        }

    def load_adapter(self, state: dict[str, Tensor]) -> None:
        expected = set(get_peft_model_state_dict(self.peft))
        if set(state) != expected:
            raise ValueError(
                f"adapter file: {len(set(state) ^ expected)} tensors are missing or unknown; it belongs to another LoRA setting"
            )
        set_peft_model_state_dict(self.peft, state)

    def forget_hash(self) -> None:
        """After a change of the frozen weights: what is cached for the old ones must not be found for these."""
        self._base_sha256 = self._fused = None

    def fused(self):
        """The frozen weights in the form that decoding likes, made at first use."""
        if self._fused is None:
            from recrl_lib.explainer.sampling import Fused  # sampling imports this module

            self._fused = Fused(self)
        return self._fused

    def count_parameters(self) -> tuple[int, int]:
        """(trainable, total) parameters."""
        return sum(p.numel() for p in self.adapter_parameters()), sum(
            p.numel() for p in self.lm.parameters()
        )

    def _run(self, h: Tensor, first: int, last: int, mask: Tensor, positions: Tensor) -> Tensor:
        model = self.lm.model
        rotary = model.rotary_emb(h, positions)
        for layer in model.layers[first:last]:
            h = layer(h, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return h

    def trunk(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Trunk states (B, T, d) of ``ids`` (B, T): the input of layer ``cut``, or the embeddings of a model run whole."""
        with torch.no_grad():
            if not self.split:
                return self.lm.get_input_embeddings()(ids)
            return self._run(
                self.lm.model.embed_tokens(ids), 0, self.cut, causal_mask(mask), position_ids(mask)
            )

    def top(self, states: Tensor, mask: Tensor) -> Tensor:
        """Final normed hidden states (B, T, d) from trunk states, through the adapters if they are on."""
        if not self.split:
            places = (
                {"position_ids": position_ids(mask)}
                if "position_ids" in signature(self.lm.base_model.forward).parameters
                else {}
            )
            return self.lm.base_model(
                inputs_embeds=states, attention_mask=mask.long(), use_cache=False, **places
            ).last_hidden_state
        h = self._run(states, self.cut, self.n_layers, causal_mask(mask), position_ids(mask))
        return self.lm.model.norm(h)

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (..., V) in float32 of the policy at ``temperature``."""
        return torch.log_softmax(
            self.lm.get_output_embeddings()(hidden).float() / temperature, dim=-1
        )


def without_dropout(lm):
    """``lm`` with every dropout at 0: old and new log-probabilities of one policy must not differ by chance."""
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", None):
            module.attention_dropout = 0.0
    if getattr(lm.config, "attention_dropout", 0):
        lm.config.attention_dropout = 0.0
    return lm


def load(name: str, device: torch.device | str = "cpu") -> Explainer:
    """The packaged default, a local folder or a Hugging Face id, in float32."""
    source = PACKAGED[name]() if name in PACKAGED else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        lm = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
        )
    except OSError as error:
        raise RuntimeError(
            f"llm={name!r}: not a packaged model ({', '.join(PACKAGED)}), not a local folder, and not to be had from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"llm={name!r}: its tokenizer has no chat template; choose an instruct model"
        )
    return Explainer(lm, tokenizer, device, name)


def load_for(params, seed: int, device: torch.device | str = "cpu") -> Explainer:
    """The run's LLM with the run's (still empty) adapters; ``params`` is a ``config.Params``."""
    return load(params.llm, device).add_lora(
        params.lora_rank, params.lora_alpha, params.lora_layers, seed
    )
