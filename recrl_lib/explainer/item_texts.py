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


class ItemTexts:
    """The items' texts, tokenised once, in fixed batches of equal length without padding.

    So equal weights give equal vectors, bit for bit. ``ValueError``: an item has no text.
    """

    def __init__(self, explainer: Explainer, texts: list[str], batch: int = 64):
        self.explainer = explainer
        ids = explainer.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        if [] in ids:
            raise ValueError(f"item {ids.index([]) + 1} has an empty text; give each item a title")
        self.n_items = len(ids)
        self.batches: list[tuple[Tensor, Tensor]] = []  # (item numbers (b,), token ids (b, T))
        for length in sorted({len(row) for row in ids}):
            numbers = torch.tensor([n for n, row in enumerate(ids, 1) if len(row) == length])
            rows = torch.tensor([row for row in ids if len(row) == length])
            self.batches += zip(numbers.split(batch), rows.split(batch))
        self._states: list[Tensor] | None = None

    def states(self) -> list[Tensor]:
        """Trunk states (b, T, d) of every batch, from the cache if known for these weights."""
        if self._states is None:
            path = self._cached("states")
            if path.exists():
                stored = load_file(path)
                self._states = [stored[str(n)] for n in range(len(self.batches))]
            else:
                device = self.explainer.device
                self._states = [
                    self.explainer.trunk(ids.to(device), torch.ones_like(ids, device=device)).cpu()
                    for _, ids in track(self.batches, "reading item texts")
                ]
                if self.explainer.cut:  # at cut 0 the states are the embeddings: not worth a file
                    named = {str(n): states for n, states in enumerate(self._states)}
                    write_atomic(path, safetensors_bytes(named))
        return self._states

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Item vectors (I+1, d), float32 on the CPU, by the model as it is; row 0 is zero."""
        device = self.explainer.device
        out = torch.zeros(self.n_items + 1, self.explainer.lm.config.hidden_size)
        for (numbers, ids), states in zip(track(self.batches, "item vectors"), self.states()):
            hidden = self.explainer.top(states.to(device), torch.ones_like(ids, device=device))
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
        """The cache file for all that can change the last bits of a vector."""
        device, cpu = self.explainer.device, torch.backends.cpu.get_cpu_capability()
        processor = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        parts = [kind, self.explainer.cut, device.type, processor, torch.get_num_threads()]
        parts += [torch.__version__, transformers.__version__]
        parts += [torch.backends.mkldnn.matmul.fp32_precision]  # see runs.choose_products
        content = hashlib.sha256(weights_sha256(self.explainer).encode())
        content.update("".join(f"{part}\n" for part in parts).encode())
        for numbers, ids in self.batches:
            content.update(numbers.numpy().tobytes() + ids.numpy().tobytes())
        return cache_dir("item_texts") / f"{kind}-{content.hexdigest()[:24]}.safetensors"


def weights_sha256(explainer: Explainer) -> str:
    """sha256 over the frozen weights as they are now."""
    content = hashlib.sha256()
    for name, tensor in sorted(explainer.lm.state_dict().items()):
        if "lora_" not in name:
            content.update(name.replace(".base_layer", "").encode())
            content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()
