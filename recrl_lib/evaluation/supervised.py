"""Supervised texts: prompts with their explanations, and activated LoRA to compare with."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recrl_lib.explainer import sampling
from recrl_lib.explainer.model import Explainer, left_pad, position_ids
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.progress import track
from recrl_lib.scoring.composed import reference_line
from recrl_lib.shield.subspaces import state_grams

TEXT_TOKENS = 40  # longest explanation of ``Demonstrations.greedy``


class Demonstrations:
    """Prompts followed by explanations, by default those that ``reference_line`` composes.

    ``ids`` are their tokens, ``states`` what the layers below the adapters make of them, read once.
    """

    @torch.no_grad()
    def __init__(self, explainer: Explainer, records: list[dict], texts: list[str] | None = None):
        self.explainer, self.records = explainer, records
        self.peft: Any = explainer.peft
        self.prompts = [prompt_ids(explainer, messages(r)) for r in records]
        texts = [reference_line(r) for r in records] if texts is None else list(texts)
        answers = explainer.tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.ids, self.labels, self.states = [], [], []  # (T,), (T,), (T, d) each
        for prompt, answer in zip(self.prompts, answers):
            self.ids.append(torch.tensor(prompt + answer + [explainer.eos_id]))
            self.labels.append(self.ids[-1].clone())
            self.labels[-1][: len(prompt)] = -100  # no loss on the prompt
        self.tokens = sum(int((row != -100).sum()) for row in self.labels)
        for rows in track(self.batches(), "reading explanations"):
            ids, mask = self._padded(self.ids, rows, explainer.pad_id), self._mask(rows)
            self.states += [s[m].cpu() for s, m in zip(explainer.trunk(ids, mask), mask)]

    def batches(self, size: int = 16) -> list[list[int]]:
        rows = list(range(len(self.ids)))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _padded(self, parts: list[Tensor], rows: list[int], value: float = 0) -> Tensor:
        chosen = [parts[r] for r in rows]
        return pad_sequence(chosen, True, value, "left").to(self.explainer.device)

    def _mask(self, rows: list[int]) -> Tensor:
        return self._padded([torch.ones(len(row)) for row in self.ids], rows).bool()

    def grams(self) -> dict[str, Tensor]:
        """Gram matrices of the layer inputs over prompts and explanations, under the base model."""
        parts = track(self.batches(), "explanation Grams")
        pairs = ((self._padded(self.states, rows), self._mask(rows)) for rows in parts)
        return state_grams(self.explainer, pairs)[0]

    def loss(self, rows: list[int], reduction: str = "mean") -> Tensor:
        """Negative log-likelihood of the rows' answer tokens, at temperature 1."""
        explainer, mask = self.explainer, self._mask(rows)
        target = self._padded(self.labels, rows, -100)[:, 1:]
        if self.peft.active_adapter == "alora":  # PEFT looks for the turn header in the ids
            places = {"attention_mask": mask.long(), "position_ids": position_ids(mask)}
            ids = self._padded(self.ids, rows, explainer.pad_id)
            logits = self.peft(ids, **places).logits[:, :-1][target != -100]
        else:
            hidden = explainer.top(self._padded(self.states, rows), mask)[:, :-1]
            logits = explainer.lm.get_output_embeddings()(hidden[target != -100])
        answers = target[target != -100]
        return torch.nn.functional.cross_entropy(logits.float(), answers, reduction=reduction)

    @torch.no_grad()
    def mean_loss(self) -> float:
        """The mean over all answer tokens."""
        return sum(float(self.loss(rows, "sum")) for rows in self.batches()) / self.tokens

    @torch.no_grad()
    def greedy(self) -> list[str]:
        """What the explainer says to the prompts, at most ``TEXT_TOKENS`` tokens."""
        explainer = self.explainer
        if self.peft.active_adapter != "alora":
            return sampling.sample(explainer, self.prompts, 1, TEXT_TOKENS, 1.0, None).texts
        ids, mask = left_pad(self.prompts, explainer.pad_id, explainer.device)
        given = {"input_ids": ids, "attention_mask": mask.long(), "pad_token_id": explainer.pad_id}
        out = self.peft.generate(**given, max_new_tokens=TEXT_TOKENS, do_sample=False)
        said = [row[row != explainer.pad_id] for row in out[:, ids.shape[1] :]]
        return [sampling.decode(explainer, row) for row in said]


@contextmanager
def activated_lora(explainer: Explainer) -> Iterator[None]:
    """Within: PEFT's activated LoRA (Greenewald et al. 2025, arXiv 2504.12397) is the adapter.

    It acts from the template's last turn header on; item texts have none and never meet it.
    """
    peft: Any = explainer.peft
    turn, template = [{"role": "user", "content": "x"}], explainer.tokenizer.apply_chat_template
    without = template(turn, return_dict=False)
    header = template(turn, return_dict=False, add_generation_prompt=True)
    config = copy.deepcopy(peft.peft_config["default"])
    config.alora_invocation_tokens = header[len(without) :]
    with torch.random.fork_rng(devices=[]):
        peft.add_adapter("alora", config)
    peft.set_adapter("alora")
    try:
        yield
    finally:
        peft.set_adapter("default")
        peft.delete_adapter("alora")
