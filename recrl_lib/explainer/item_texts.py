"""Item vectors: the mean last hidden state of each item's text."""

import hashlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from recrl_lib.explainer.model import Explainer
from recrl_lib.paths import cache_dir
from recrl_lib.progress import track
from recrl_lib.runs import write_atomic

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
            raise ValueError(
                f"{len(empty)} items have an empty text, the first is item {empty[0]}; give each item a title"
            )
        self.n_items = len(ids)
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        self.batches: list[tuple[Tensor, Tensor]] = []  # (item numbers (b,), token ids (b, T))
        for length in sorted({len(row) for row in ids}):
            group = [i for i in order if len(ids[i]) == length]
            for start in range(0, len(group), batch):
                part = group[start : start + batch]
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
                    write_atomic(
                        path, safetensors_bytes({str(n): s for n, s in enumerate(self._states)})
                    )
        return self._states

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Item vectors (I+1, d) on the CPU by the model as it is: mean last hidden state; row 0 is zero."""
        out = torch.zeros(self.n_items + 1, self.explainer.lm.config.hidden_size)
        for (numbers, ids), states in zip(track(self.batches, "item vectors"), self.states()):
            hidden = self.explainer.top(
                states.to(self.explainer.device), torch.ones_like(ids, device=self.explainer.device)
            )
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
        machine = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability()
        )
        content = hashlib.sha256(base_weights_sha256(self.explainer).encode())
        for part in (
            kind,
            self.explainer.cut,
            device.type,
            machine,
            torch.get_num_threads(),
            torch.__version__,
            transformers.__version__,
        ):
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
