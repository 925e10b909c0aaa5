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

import hashlib
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save as safetensors_bytes
from torch import Tensor

from recrl_lib import assets, decoding
from recrl_lib.claims import NOUNS
from recrl_lib.decoding import causal_mask, left_pad, position_ids  # left_pad: others import it from here
from recrl_lib.files import write_atomic
from recrl_lib.paths import cache_dir
from recrl_lib.progress import track

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # transformers 5.23, on every PEFT wrap
transformers.utils.logging.disable_progress_bar()  # a bar in a stored notebook differs at every run
transformers.utils.logging.set_verbosity_error()

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")  # of a Llama-type layer
# Projections of an attention block, as the architectures call them, and which of its two inputs each one reads.
INPUT_OF_PROJECTION = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"), "attention"),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj"), "output"),
}
_PROJECTION = re.compile(r"\.(\d+)\.(?:self_attn|self_attention|attn|attention)\.(\w+)")
PACKAGED = {"smollm2-135m-instruct": assets.smollm2_folder}
SPLIT = ("llama",)  # model types that can be run in two parts and decoded by our own loop; others run whole
SYSTEM = (
    "You recommend {noun}s. Explain each recommendation in one or two short sentences: "
    "name the {noun}, and link it to {noun}s the {person} {did} and to its genres."
)


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
        self._fused: decoding.Fused | None = None
        self.cut = self.n_layers if self.split else 0
        # PAD must not be EOS: this tokenizer ships with pad == eos == <|im_end|>, which also ends
        # every turn inside the prompt. Masks come from lengths, never from `ids != pad`.
        self.eos_id = tokenizer.eos_token_id
        self.pad_id = next(i for i in (tokenizer.unk_token_id, 0, 1) if i is not None and i != self.eos_id)
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
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM",
            fan_in_fan_out=isinstance(self.lm.get_submodule(targets[0]), transformers.pytorch_utils.Conv1D),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # LoRA draws A on the CPU at creation
            self.peft = get_peft_model(self.lm, config)
        self.adapters_off = False
        return self

    def _projections(self) -> list[tuple[str, int, str]]:
        """(module name, layer number, projection name) of every attention projection, in the model's order."""
        found = ((name, _PROJECTION.search(name)) for name, _ in self.lm.named_modules())
        return [(n, int(m[1]), m[2]) for n, m in found if m and m.end() == len(n) and m[2] in INPUT_OF_PROJECTION]

    def adapted_modules(self) -> list[tuple[str, str, torch.nn.Module]]:
        """(name for messages, key of its input, module) of every adapted layer; modules of one key read the same input."""
        return [
            (f"layer {layer} {projection}", f"{layer}.{INPUT_OF_PROJECTION[projection]}", self.lm.get_submodule(name))
            for name, layer, projection in self._projections() if hasattr(self.lm.get_submodule(name), "lora_A")
        ]

    @torch.no_grad()
    def _check_head(self, name: str) -> None:
        """An architecture we know nothing about must give its logits as its output embeddings of its last hidden state."""
        ids = torch.arange(4, device=self.device)[None]
        logits = self.lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ours = self.log_softmax(self.top(self.trunk(ids, torch.ones_like(ids)), torch.ones_like(ids)), 1.0)
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
            for p, before in trainable:  # PEFT's context makes every adapter trainable again, a frozen A too
                p.requires_grad_(before)

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.lm.parameters() if p.requires_grad]

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters' tensors under PEFT's names, copied."""
        return {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(self.peft).items()}

    def load_adapter(self, state: dict[str, Tensor]) -> None:
        expected = set(get_peft_model_state_dict(self.peft))
        if set(state) != expected:
            raise ValueError(f"adapter file: {len(set(state) ^ expected)} tensors are missing or unknown; it belongs to another LoRA setting")
        set_peft_model_state_dict(self.peft, state)

    def forget_hash(self) -> None:
        """After a change of the frozen weights: what is cached for the old ones must not be found for these."""
        self._base_sha256 = self._fused = None

    def fused(self) -> decoding.Fused:
        """The frozen weights in the form that decoding likes, made at first use."""
        if self._fused is None:
            self._fused = decoding.Fused(self)
        return self._fused

    def count_parameters(self) -> tuple[int, int]:
        """(trainable, total) parameters."""
        return sum(p.numel() for p in self.adapter_parameters()), sum(p.numel() for p in self.lm.parameters())

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
            return self._run(self.lm.model.embed_tokens(ids), 0, self.cut, causal_mask(mask), position_ids(mask))

    def top(self, states: Tensor, mask: Tensor) -> Tensor:
        """Final normed hidden states (B, T, d) from trunk states, through the adapters if they are on."""
        if not self.split:
            places = {"position_ids": position_ids(mask)} if "position_ids" in signature(self.lm.base_model.forward).parameters else {}
            return self.lm.base_model(inputs_embeds=states, attention_mask=mask.long(), use_cache=False, **places).last_hidden_state
        h = self._run(states, self.cut, self.n_layers, causal_mask(mask), position_ids(mask))
        return self.lm.model.norm(h)

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (..., V) in float32 of the policy at ``temperature``."""
        return torch.log_softmax(self.lm.get_output_embeddings()(hidden).float() / temperature, dim=-1)


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
        lm = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True)
    except OSError as error:
        raise RuntimeError(
            f"llm={name!r}: not a packaged model ({', '.join(PACKAGED)}), not a local folder, and not to be had from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if tokenizer.chat_template is None:
        raise ValueError(f"llm={name!r}: its tokenizer has no chat template; choose an instruct model")
    return Explainer(lm, tokenizer, device, name)


def load_for(params, seed: int, device: torch.device | str = "cpu") -> Explainer:
    """The run's LLM with the run's (still empty) adapters; ``params`` is a ``config.Params``."""
    return load(params.llm, device).add_lora(params.lora_rank, params.lora_alpha, params.lora_layers, seed)


# --- what it is asked ---------------------------------------------------------------------------

def build_records(items, sequences, top, users, positions, history_length: int, noun: str = "film") -> list[dict]:
    """One record a user (see ``recrl_lib``): the item at 1-based rank ``positions[i]`` of ``top[user]`` (U, k)."""
    title, year = items["title"].to_numpy(), items["year"].to_numpy()
    genres = [g.split("|") if g else [] for g in items["genres"]]
    records = []
    for user, position in zip(users, positions):
        item = int(top[user, position - 1])
        history = [int(i) for i in sequences[user][-history_length:]]
        records.append({
            "user": int(user), "item": item, "position": int(position),
            "title": str(title[item - 1]), "year": int(year[item - 1]), "genres": genres[item - 1],
            "noun": noun, "history_titles": [str(title[i - 1]) for i in history],
            "history_genres": [genres[i - 1] for i in history],
        })
    return records


def describe(record: dict) -> str:
    year = f" ({record['year']})" if record["year"] else ""
    genres = f", genres {', '.join(record['genres'])}" if record["genres"] else ""
    return f"{record['title']}{year}{genres}"


def messages(record: dict) -> list[dict]:
    """The chat that asks for one explanation."""
    noun = record.get("noun", "film")
    person, did = NOUNS[noun]
    question = f"I {did}: {'; '.join(record['history_titles'])}.\nWhy do you recommend {describe(record)}?"
    return [{"role": "system", "content": SYSTEM.format(noun=noun, person=person, did=did)}, {"role": "user", "content": question}]


def prompt_ids(explainer: Explainer, chat: list[dict]) -> list[int]:
    text = explainer.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return explainer.tokenizer(text, add_special_tokens=False)["input_ids"]


# --- sampling -----------------------------------------------------------------------------------

@dataclass
class Rollout:
    """Sampled responses with all that PPO needs of the moment they were sampled."""

    prompt_mask: Tensor  # (B, P) bool
    response: Tensor     # (B, R) token ids
    mask: Tensor         # (B, R) bool: real response tokens, the EOS included
    logprobs: Tensor     # (B, R) of the sampled tokens under the sampling policy
    values: Tensor       # (B, R) V(state before the token); 0 without a value head
    states: Tensor       # (B, P + R - 1, d) trunk states of prompt and response
    ended: Tensor        # (B,) bool: the response has its EOS
    texts: list[str]

    @property
    def full_mask(self) -> Tensor:
        """(B, P + R - 1): real tokens of prompt and response, the last response token excepted."""
        return torch.cat([self.prompt_mask, self.mask[:, :-1]], dim=1)


def sample(
    explainer: Explainer, prompts: list[list[int]], samples: int, max_new_tokens: int, temperature: float,
    generator: torch.Generator | None, value_head: torch.nn.Module | None = None,
) -> Rollout:
    """``samples`` responses to each prompt (rows of one prompt are adjacent); greedy if ``generator`` is None.

    Equal generators give common random numbers, whatever the policy (see ``recrl_lib.decoding``).
    """
    out = decoding.decode(explainer, prompts, samples, max_new_tokens, temperature, generator, value_head)
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
    reference: list[np.ndarray]  # the reference policy's per-token log-probabilities of each text, EOS included
    kl: np.ndarray               # (n,) KL from policy to reference, nats: exact over the vocabulary, summed over the text
    ended: np.ndarray            # (n,) bool: not cut off


@torch.no_grad()
def explain(
    explainer: Explainer, records: list[dict], max_new_tokens: int, temperature: float, seed: int, batch: int = 32,
    desc: str = "explaining",
) -> Explained:
    """One sampled explanation a record by the policy as it is; equal seeds meet equal random numbers."""
    generator = torch.Generator().manual_seed(seed)
    texts, reference, kl, ended = [], [], [], []
    for start in track(range(0, len(records), batch), desc):
        prompts = [prompt_ids(explainer, messages(r)) for r in records[start:start + batch]]
        rollout = sample(explainer, prompts, 1, max_new_tokens, temperature, generator)
        if explainer.adapters_off:  # the policy is the reference, which sampled with the log-probabilities wanted
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


# --- item vectors -------------------------------------------------------------------------------

class ItemTexts:
    """The ranker's item texts, tokenised once and grouped by length (no padding, fixed batches).

    Fixed batches make encodings comparable bit for bit: same weights, same vectors.
    """

    def __init__(self, explainer: Explainer, texts: list[str], batch: int = 64):
        self.explainer = explainer
        ids = explainer.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        empty = [i + 1 for i, row in enumerate(ids) if not row]
        if empty:
            raise ValueError(f"{len(empty)} items have an empty text, the first is item {empty[0]}; give each item a title")
        self.n_items = len(ids)
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        self.batches: list[tuple[Tensor, Tensor]] = []  # (item numbers (b,), token ids (b, T))
        for length in sorted({len(row) for row in ids}):
            group = [i for i in order if len(ids[i]) == length]
            for start in range(0, len(group), batch):
                part = group[start:start + batch]
                self.batches.append((torch.tensor(part) + 1, torch.tensor([ids[i] for i in part])))
        self._states: list[Tensor] | None = None

    def states(self) -> list[Tensor]:
        """Trunk states of every batch, from the cache if these texts met these weights and this cut before."""
        if self._states is None:
            path = self._cached("states")
            if path.exists():
                stored = load_file(path)
                self._states = [stored[str(n)] for n in range(len(self.batches))]
            else:
                self._states = []
                for _, ids in track(self.batches, "reading item texts"):
                    ids = ids.to(self.explainer.device)
                    self._states.append(self.explainer.trunk(ids, torch.ones_like(ids)).cpu())
                if self.explainer.cut:  # at cut 0 the states are the embeddings, not worth a file
                    write_atomic(path, safetensors_bytes({str(n): s for n, s in enumerate(self._states)}))
        return self._states

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Item vectors (I+1, d) on the CPU by the model as it is: mean last hidden state; row 0 is zero."""
        out = torch.zeros(self.n_items + 1, self.explainer.lm.config.hidden_size)
        for (numbers, ids), states in zip(track(self.batches, "item vectors"), self.states()):
            hidden = self.explainer.top(states.to(self.explainer.device), torch.ones_like(ids, device=self.explainer.device))
            out[numbers] = hidden.mean(1).float().cpu()
        return out

    def base_vectors(self) -> Tensor:
        """``vectors()`` of the untuned model, from the cache if known."""
        path = self._cached("vectors")
        if not path.exists():
            with self.explainer.reference():
                write_atomic(path, safetensors_bytes({"text": self.vectors()}))
        return load_file(path)["text"]

    def _cached(self, kind: str) -> Path:
        device = self.explainer.device
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        content = hashlib.sha256(base_weights_sha256(self.explainer).encode())
        for part in (kind, self.explainer.cut, device.type, machine, torch.get_num_threads(), torch.__version__, transformers.__version__):
            content.update(f"{part}\n".encode())  # all that can change the last bits of a vector
        for numbers, ids in self.batches:
            content.update(numbers.numpy().tobytes() + ids.numpy().tobytes())
        return cache_dir("item_texts") / f"{kind}-{content.hexdigest()[:24]}.safetensors"


def base_weights_sha256(explainer: Explainer) -> str:
    """sha256 over the frozen weights, adapters excluded; computed once per model."""
    if explainer._base_sha256 is None:
        explainer._base_sha256 = weights_sha256(explainer)
    return explainer._base_sha256


def weights_sha256(explainer: Explainer) -> str:
    """sha256 over the frozen weights as they are now: proof that tuning touched the adapters only."""
    content = hashlib.sha256()
    for name, tensor in sorted(explainer.lm.state_dict().items()):
        if "lora_" not in name:
            content.update(name.replace(".base_layer", "").encode())
            content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()
