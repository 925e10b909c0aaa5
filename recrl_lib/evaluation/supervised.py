"""Prompts with their explanations as supervised texts; two competitors of the shield's modes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from recrl_lib.explainer import sampling
from recrl_lib.explainer.model import Explainer, left_pad, position_ids
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.progress import track
from recrl_lib.scoring.composed import composed_line
from recrl_lib.shield.subspaces import state_grams

TEXT_TOKENS = 40  # longest explanation of ``Demonstrations.greedy``
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
Rows = range | list[int]


class Demonstrations:
    """Prompts followed by explanations, by default those that ``composed_line`` composes.
    ``states`` is what the layers below the adapters make of the tokens ``ids``, read once."""

    @torch.no_grad()
    def __init__(self, explainer: Explainer, records: list[dict], texts: list[str] | None = None):
        self.explainer, self.records = explainer, records
        self.peft: Any = explainer.peft
        self.prompts = [prompt_ids(explainer, messages(r)) for r in records]
        texts = [composed_line(r) for r in records] if texts is None else list(texts)
        answers = explainer.tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.ids, self.labels, self.states = [], [], []  # (T,), (T,), (T, d) each
        for prompt, answer in zip(self.prompts, answers):
            answer = answer + [explainer.eos_id]
            self.ids.append(torch.tensor(prompt + answer))
            self.labels.append(torch.tensor([-100] * len(prompt) + answer))  # no loss on the prompt
        rows = range(len(records))
        self.batches = [rows[start : start + 16] for start in rows[::16]]
        for rows in track(self.batches, "reading explanations"):
            ids, mask = self._padded(self.ids, rows, explainer.pad_id), self._mask(rows)
            self.states += [s[m].cpu() for s, m in zip(explainer.trunk(ids, mask), mask)]

    def _padded(self, parts: list[Tensor], rows: Rows, value: float = 0) -> Tensor:
        chosen = [parts[r] for r in rows]
        return pad_sequence(chosen, True, value, "left").to(self.explainer.device)

    def _mask(self, rows: Rows) -> Tensor:
        return self._padded([torch.ones(len(row)) for row in self.ids], rows).bool()

    def grams(self) -> dict[str, Tensor]:
        """Gram matrices of the layer inputs over prompts and explanations, under the base model."""
        parts = track(self.batches, "explanation Grams")
        pairs = ((self._padded(self.states, rows), self._mask(rows)) for rows in parts)
        return state_grams(self.explainer, pairs)[0]

    def loss(self, rows: Rows, reduction: str = "mean") -> Tensor:
        """Negative log-likelihood of the rows' answer tokens, at temperature 1."""
        explainer, mask = self.explainer, self._mask(rows)
        target = self._padded(self.labels, rows, -100)[:, 1:]
        answered = target != -100
        if self.peft.active_adapter == "alora":  # PEFT looks for the turn header in the ids
            ids = self._padded(self.ids, rows, explainer.pad_id)
            out = self.peft(ids, attention_mask=mask.long(), position_ids=position_ids(mask))
            logits = out.logits[:, :-1][answered]
        else:
            hidden = explainer.top(self._padded(self.states, rows), mask)[:, :-1]
            logits = explainer.lm.get_output_embeddings()(hidden[answered])
        return cross_entropy(logits.float(), target[answered], reduction=reduction)

    @torch.no_grad()
    def mean_loss(self) -> float:
        """The mean over all answer tokens."""
        tokens = sum(int((row != -100).sum()) for row in self.labels)
        return sum(float(self.loss(rows, "sum")) for rows in self.batches) / tokens

    @torch.no_grad()
    def greedy(self) -> list[str]:
        """What the explainer says to the prompts, at most ``TEXT_TOKENS`` tokens."""
        explainer = self.explainer
        if self.peft.active_adapter != "alora":
            settings = sampling.Settings(TEXT_TOKENS)
            return sampling.sample(explainer, self.prompts, settings, None).texts
        ids, mask = left_pad(self.prompts, explainer.pad_id, explainer.device)
        out = self.peft.generate(
            input_ids=ids, attention_mask=mask.long(), pad_token_id=explainer.pad_id,
            max_new_tokens=TEXT_TOKENS, do_sample=False,
        )[:, ids.shape[1] :]  # fmt: skip
        return [sampling.decode(explainer, row[row != explainer.pad_id]) for row in out]


@contextmanager
def activated_lora(explainer: Explainer) -> Iterator[None]:
    """Within: PEFT's activated LoRA (Greenewald et al. 2025, arXiv 2504.12397) is the adapter. It
    acts from the template's last turn header on; item texts have none and never meet it."""
    peft: Any = explainer.peft
    turn, template = [{"role": "user", "content": "x"}], explainer.tokenizer.apply_chat_template
    with_header = template(turn, return_dict=False, add_generation_prompt=True)
    config = copy.deepcopy(peft.peft_config["default"])
    config.alora_invocation_tokens = with_header[len(template(turn, return_dict=False)) :]
    with torch.random.fork_rng(devices=[]):
        peft.add_adapter("alora", config)
    peft.set_adapter("alora")
    try:
        yield
    finally:
        peft.set_adapter("default")
        peft.delete_adapter("alora")


def aligned(new: Tensor, old: Tensor, items: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Tuned item vectors ``new`` (I+1, d) mapped back to the base vectors ``old``; row 0 is zero.

    Fitted on ``items`` by ridge regression towards the identity, least ``|X M - Y|^2 + ridge
    tr(X^T X)/d |M - I|^2`` of centred vectors (bc-emb, Hu et al. 2022, arXiv 2206.03040, in closed
    form), with the ridge of least error on a fifth that is kept out.
    """
    kept, fitted = np.split(rng.permutation(items), [len(items) // 5])

    def fit(rows: np.ndarray, ridge: float) -> Tensor:
        x, y = new[rows].double(), old[rows].double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        gram = x.T @ x
        loading = ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
        matrix = torch.linalg.solve(gram + loading, x.T @ y + loading)
        moved = mean_y + (new.double() - mean_x) @ matrix
        moved[0] = 0.0
        return moved.to(new)

    return fit(items, min(RIDGES, key=lambda r: float((fit(fitted, r)[kept] - old[kept]).norm())))
