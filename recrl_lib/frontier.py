"""The frontier of learning against ranking moved: one short training and one measurement a point.

The signal is fixed and supervised: the likelihood of explanations composed from metadata
(``references.reference_line``), with Adam, a fixed number of steps, and the run's own layers, prompts
and item texts. It is the warm start's signal without its trainer, so a point costs a minute and a half
of one CPU core and not the quarter of an hour of PPO. What is measured is the same as in notebook 06.

A seed draws the adapters' first values and the order of the explanations; texts of the held-out users and
the held-out items are the same for all points. Every finished point is a row of a CSV, rewritten
atomically, so that an interrupted frontier goes on where it stopped.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recrl_lib import evaluation, explainer as ex, rewards, stats
from recrl_lib.explainer import Explainer, ItemTexts
from recrl_lib.files import write_atomic
from recrl_lib.progress import track
from recrl_lib.references import reference_line
from recrl_lib.study import Study


@dataclass(frozen=True)
class Point:
    """One setting of the frontier and its seed. ``rank`` > 0 fixes the strength by rank and overrides ``energy``."""

    mode: str = "update"
    basis: str = "activation"
    energy: float = 0.99
    rank: int = 0
    penalty: float = 0.0
    steps: int = 30
    seed: int = 0


@dataclass
class Lesson:
    """Prompts followed by their explanations, as trunk states: what one supervised step reads."""

    states: list[Tensor]  # (T_i, d) trunk states of every pair
    ids: list[list[int]]  # token ids, prompt and answer
    answers: list[int]    # tokens of the answer, EOS included

    def batch(self, rows, pad_id: int, device) -> tuple[Tensor, Tensor, Tensor]:
        """(states (B, T, d), mask (B, T), labels (B, T)), left-padded; prompt tokens carry the label -100."""
        ids, mask = ex.left_pad([self.ids[r] for r in rows], pad_id, device)
        labels = torch.full_like(ids, -100)
        states = torch.zeros(*ids.shape, self.states[0].shape[-1], device=device)
        for n, r in enumerate(rows):
            labels[n, -self.answers[r]:] = ids[n, -self.answers[r]:]
            states[n, -len(self.ids[r]):] = self.states[r].to(device)
        return states, mask, labels


@torch.no_grad()
def lesson(explainer: Explainer, records: list[dict], batch: int = 16) -> Lesson:
    """The reference line of every record after its prompt, read once by the layers that are never tuned."""
    out = Lesson([], [], [])
    for record in records:
        prompt = ex.prompt_ids(explainer, ex.messages(record))
        answer = explainer.tokenizer(reference_line(record), add_special_tokens=False)["input_ids"] + [explainer.eos_id]
        out.ids.append(prompt + answer)
        out.answers.append(len(answer))
    for start in track(range(0, len(records), batch), "reading explanations"):
        ids, mask = ex.left_pad(out.ids[start:start + batch], explainer.pad_id, explainer.device)
        out.states += [row[keep].cpu() for row, keep in zip(explainer.trunk(ids, mask), mask)]
    return out


def answer_loss(explainer: Explainer, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean negative log-likelihood of a batch's answer tokens, at temperature 1."""
    states, mask, labels = batch
    target = labels[:, 1:]
    hidden = explainer.top(states, mask)[:, :-1][target != -100]
    return torch.nn.functional.cross_entropy(explainer.lm.lm_head(hidden).float(), target[target != -100])
