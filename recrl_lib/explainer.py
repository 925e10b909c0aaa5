"""The explainer: a small instruct LLM with LoRA on its top layers; prompts, sampling, item vectors.

The network is run in two parts. Layers below ``cut`` are never tuned, so what they compute for a
text (its *trunk states*) is computed once and reused by the reference policy, every PPO epoch and
every re-encoding of the items; only the layers from ``cut`` up, which carry the adapters, run again.
This is exact (the split changes no operation), and is the idea of trlX's "hydra" head
(https://github.com/CarperAI/trlx, issue 33).

One policy, everywhere: sampling, old, reference and new log-probabilities are all those of
``softmax(logits / temperature)`` with no other processor (Huang et al. 2024, arXiv 2403.17031).

Shapes: B rows, P prompt tokens (left-padded), R response tokens (right-padded), d hidden width, V vocabulary.
"""

import hashlib
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save as safetensors_bytes
from torch import Tensor

from recrl_lib import assets
from recrl_lib.files import write_atomic
from recrl_lib.paths import cache_dir
from recrl_lib.progress import track

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # transformers 5.23, on every PEFT wrap
transformers.utils.logging.disable_progress_bar()  # a bar in a stored notebook differs at every run
transformers.utils.logging.set_verbosity_error()

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
PACKAGED = {"smollm2-135m-instruct": assets.smollm2_folder}
SUPPORTED = ("llama",)  # model types whose layers the two-part forward below knows
SYSTEM = (
    "You recommend films. Explain each recommendation in one or two short sentences: "
    "name the film, and link it to films the viewer watched and to its genres."
)


# --- the network in two parts -------------------------------------------------------------------

class Explainer:
    """A causal LM, its tokenizer, and (after ``add_lora``) adapters on its layers from ``cut`` up."""

    def __init__(self, lm, tokenizer, device: torch.device | str = "cpu", name: str = "model"):
        if lm.config.model_type not in SUPPORTED:
            raise ValueError(
                f"llm={name!r} is a {lm.config.model_type!r} model; the two-part forward knows {', '.join(SUPPORTED)}. "
                "Choose a Llama-type model."
            )
        self.lm = lm.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.peft: PeftModel | None = None
        self._base_sha256: str | None = None
        self.adapters_off = True  # the model as it speaks now is the reference policy
        self.cut = self.n_layers
        # PAD must not be EOS: this tokenizer ships with pad == eos == <|im_end|>, which also ends
        # every turn inside the prompt. Masks come from lengths, never from `ids != pad`.
        self.eos_id = tokenizer.eos_token_id
        self.pad_id = next(i for i in (tokenizer.unk_token_id, 0, 1) if i is not None and i != self.eos_id)

    @property
    def n_layers(self) -> int:
        return len(self.lm.model.layers)

    def add_lora(self, rank: int, alpha: int, layers: int, seed: int) -> "Explainer":
        """Adapters on q, k, v, o of the top ``layers`` layers (0 = all); B = 0, so nothing changes yet."""
        if self.peft is not None:
            raise RuntimeError("this explainer already has adapters")
        if layers > self.n_layers:
            raise ValueError(f"lora_layers={layers}: the model has {self.n_layers} layers")
        self.cut = self.n_layers - (layers or self.n_layers)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(ADAPTED), task_type="CAUSAL_LM",
            layers_to_transform=list(range(self.cut, self.n_layers)),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # LoRA draws A on the CPU at creation
            self.peft = get_peft_model(self.lm, config)
        self.adapters_off = False
        return self

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
        self._base_sha256 = None

    def count_parameters(self) -> tuple[int, int]:
        """(trainable, total) parameters."""
        return sum(p.numel() for p in self.adapter_parameters()), sum(p.numel() for p in self.lm.parameters())

    def _run(self, h: Tensor, first: int, last: int, mask: Tensor, positions: Tensor, cache=None) -> Tensor:
        model = self.lm.model
        rotary = model.rotary_emb(h, positions)
        for layer in model.layers[first:last]:
            h = layer(h, attention_mask=mask, position_ids=positions, position_embeddings=rotary, past_key_values=cache)
        return h

    def trunk(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Trunk states (B, T, d) of ``ids`` (B, T): the input of layer ``cut``."""
        with torch.no_grad():
            return self._run(self.lm.model.embed_tokens(ids), 0, self.cut, causal_mask(mask), position_ids(mask))

    def top(self, states: Tensor, mask: Tensor) -> Tensor:
        """Final normed hidden states (B, T, d) from trunk states, through the adapters if they are on."""
        h = self._run(states, self.cut, self.n_layers, causal_mask(mask), position_ids(mask))
        return self.lm.model.norm(h)

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (..., V) in float32 of the policy at ``temperature``."""
        return torch.log_softmax(self.lm.lm_head(hidden).float() / temperature, dim=-1)


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that start at 0 at each row's first real token, whatever its left padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def causal_mask(mask: Tensor) -> Tensor:
    """Boolean attention mask (B, 1, T, T): real, not later. A padding row sees itself, or softmax would be 0/0."""
    length = mask.shape[1]
    lower = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    allowed = lower & mask.bool()[:, None, :]
    return (allowed | torch.eye(length, dtype=torch.bool, device=mask.device))[:, None]


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

def build_records(items, sequences, top, users, positions, history_length: int) -> list[dict]:
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
            "history_titles": [str(title[i - 1]) for i in history],
            "history_genres": [genres[i - 1] for i in history],
        })
    return records


def describe(record: dict) -> str:
    year = f" ({record['year']})" if record["year"] else ""
    genres = f", genres {', '.join(record['genres'])}" if record["genres"] else ""
    return f"{record['title']}{year}{genres}"


def messages(record: dict) -> list[dict]:
    """The chat that asks for one explanation."""
    question = f"I watched: {'; '.join(record['history_titles'])}.\nWhy do you recommend {describe(record)}?"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def prompt_ids(explainer: Explainer, chat: list[dict]) -> list[int]:
    text = explainer.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return explainer.tokenizer(text, add_special_tokens=False)["input_ids"]


def left_pad(prompts: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, P), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt):] = torch.tensor(prompt)
        mask[row, width - len(prompt):] = True
    return ids.to(device), mask.to(device)


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


class _Cache:
    """Preallocated keys and values of every layer, in the form that transformers' attention calls."""

    def __init__(self, explainer: Explainer, rows: int, length: int):
        config = explainer.lm.config
        heads, width = config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, rows, heads, length, width)
        self.data = torch.empty(shape, device=explainer.device, dtype=explainer.lm.dtype)
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[2]
        self.data[layer, 0, :, :, self.length:end] = keys
        self.data[layer, 1, :, :, self.length:end] = values
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]

    def select(self, rows: Tensor) -> None:
        self.data = self.data[:, :, rows]


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Sample a token a row by inverse CDF: logprobs (B, V), uniform (B,) in [0, 1) -> ids (B,).

    ``torch.multinomial`` takes 25 times as long at V = 49,152 on a CPU. The cumulative sum is in
    float64, so that no probability above 1e-16 is lost.
    """
    cdf = logprobs.double().exp().cumsum(-1)
    ids = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)
    return ids.squeeze(-1).clamp(max=logprobs.shape[-1] - 1)


@torch.no_grad()
def sample(
    explainer: Explainer, prompts: list[list[int]], samples: int, max_new_tokens: int, temperature: float,
    generator: torch.Generator | None, value_head: torch.nn.Module | None = None,
) -> Rollout:
    """``samples`` responses to each prompt (rows of one prompt are adjacent); greedy if ``generator`` is None.

    The prompt is read once per unique prompt. The uniforms are drawn on the CPU for all rows and
    positions before anything else, so two policies given equal generators see common random numbers.
    """
    rows, device = len(prompts) * samples, explainer.device
    ids, prompt_mask = left_pad(prompts, explainer.pad_id, device)
    uniforms = None if generator is None else torch.rand(rows, max_new_tokens, generator=generator, dtype=torch.float64).to(device)
    cache = _Cache(explainer, len(prompts), ids.shape[1] + max_new_tokens)
    h, state = _both_parts(explainer, ids, causal_mask(prompt_mask), position_ids(prompt_mask), cache)
    repeat = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    cache.select(repeat)
    h, prompt_mask, states = h[repeat, -1], prompt_mask[repeat], [state[repeat]]

    response = torch.full((rows, max_new_tokens), explainer.pad_id, device=device)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    logprobs, values = torch.zeros(rows, max_new_tokens, device=device), torch.zeros(rows, max_new_tokens, device=device)
    alive = torch.arange(rows, device=device)  # rows of the batch still being computed
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        logp = explainer.log_softmax(h, temperature)
        token = logp.argmax(-1) if uniforms is None else draw(logp, uniforms[alive, t])
        going = ~ended[alive]
        response[alive, t] = torch.where(going, token, explainer.pad_id)
        mask[alive, t] = going
        logprobs[alive, t] = torch.where(going, logp.gather(-1, token[:, None])[:, 0], 0.0)
        if value_head is not None:
            values[alive, t] = torch.where(going, value_head(h)[:, 0], 0.0)
        ended[alive] |= token == explainer.eos_id
        if ended.all() or t == max_new_tokens - 1:
            break
        if ended[alive].float().mean() > 0.25:  # drop finished rows, not at every step: it copies the cache
            keep = (~ended[alive]).nonzero()[:, 0]
            cache.select(keep)
            alive, token = alive[keep], token[keep]
        seen = torch.cat([prompt_mask, mask[:, : t + 1]], dim=1)[alive]
        h, state = _both_parts(explainer, token[:, None], seen[:, None, None, :], seen.sum(-1, keepdim=True) - 1, cache)
        h = h[:, -1]
        full = torch.zeros(rows, 1, state.shape[-1], device=device, dtype=state.dtype)
        full[alive] = state
        states.append(full)
    length = t + 1
    response, mask = response[:, :length], mask[:, :length]
    texts = [decode(explainer, row[keep]) for row, keep in zip(response, mask)]
    return Rollout(prompt_mask, response, mask, logprobs[:, :length], values[:, :length], torch.cat(states, 1), ended, texts)


def _both_parts(explainer, ids, mask, positions, cache) -> tuple[Tensor, Tensor]:
    """(final hidden, trunk states), both (B, T, d), of new tokens, whose keys and values go to the cache."""
    state = explainer._run(explainer.lm.model.embed_tokens(ids), 0, explainer.cut, mask, positions, cache)
    h = explainer._run(state, explainer.cut, explainer.n_layers, mask, positions, cache)
    cache.length += ids.shape[1]
    return explainer.lm.model.norm(h), state


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
