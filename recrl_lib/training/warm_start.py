"""Supervised warm start: shows the explainer what answers look like, before PPO.

PPO needs rewards that differ, and a small model says little that makes sense. The adapters are
fitted to lines composed from metadata, under the arm's own shield. Afterwards the adapter is merged
into the frozen weights, so that "adapter off" is the reference policy of PPO.
"""

import torch
from torch import Tensor
from torch.optim import AdamW

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import given, token_logprobs
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.scoring.composed import composed_line
from recrl_lib.shield.projection import Shield
from recrl_lib.training.ppo import draw_prompts

ROWS = 4  # read at once


def fit(
    explainer: Explainer, records: list[dict], params: Params, seed: int, shield: Shield | None
) -> list[dict]:
    """Tune the adapters towards the composed lines of ``records``; a row of step and loss each."""
    adapters, queue, rows = explainer.adapter_parameters(), [], []
    generator = torch.Generator().manual_seed(seed)
    optimizer = AdamW(adapters, params.warm_lr, weight_decay=0.0)
    if shield:
        shield.attach(optimizer)
    name = f"warm start, {'shielded' if shield else 'unshielded'}"
    for step in track(range(1, params.warm_steps + 1), name):
        drawn, queue = draw_prompts(queue, params.warm_batch, len(records), generator)
        chosen = [records[i] for i in drawn]
        lines = [(prompt_ids(explainer, messages(r)), composed_line(r)) for r in chosen]
        lines.sort(key=lambda line: len(line[0]))  # rows of like length need little padding
        optimizer.zero_grad(set_to_none=True)
        parts = [lines[start : start + ROWS] for start in range(0, len(lines), ROWS)]
        read = [given(explainer, *map(list, zip(*part))) for part in parts]
        tokens, losses = sum(int(part.mask.sum()) for part in read), []
        for part in read:
            loss = -token_logprobs(explainer, part, 1.0).sum() / tokens
            loss.backward()
            losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(adapters, params.max_grad_norm)
        optimizer.step()
        rows.append({"step": step, "loss": sum(losses)})
    if shield:
        shield.detach()
    return rows


@torch.no_grad()
def merge(explainer: Explainer, fresh: dict[str, Tensor]) -> None:
    """Add the adapters' update to the frozen weights and reset the adapters to ``fresh``."""
    for _, _, module in explainer.adapted_modules():
        module.base_layer.weight += module.get_delta_weight("default")
    explainer.load_adapter(fresh)


def stack(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """One adapter of twice the rank with both updates: B1 A1 + B2 A2 = [B1 B2] [A1; A2]."""
    return {k: torch.cat([first[k], second[k]], 0 if "lora_A" in k else 1) for k in first}
