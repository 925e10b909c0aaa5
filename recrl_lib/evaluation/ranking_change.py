"""What tuning did to the ranking: user by user, and by group of items."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer
from recrl_lib.ranker import metrics
from recrl_lib.ranker.ranking import score_chunks, target_ranks, top_k
from recrl_lib.runs import write_atomic
from recrl_lib.study import TOP_K, Study

MEASURES = ("ndcg", "hr", "overlap", "set_same", "exact", "kendall_tau", "rbo", "top1_same")


def ranking_table(study: Study, text: Tensor | None) -> tuple[pd.DataFrame, np.ndarray]:
    """(one row a user: rank of the test item, NDCG, HR and churn against the base top 10; top 10 (U, 10))."""
    history = study.split.with_valid
    ranks = target_ranks(study.ranker, history, study.split.test, text)
    top = top_k(study.ranker, history, text, TOP_K)
    table = pd.DataFrame(
        {
            "user": np.arange(len(history)),
            "rank": ranks,
            "ndcg": metrics.ndcg_at(ranks, TOP_K),
            "hr": metrics.hr_at(ranks, TOP_K),
            **metrics.churn(study.top, top),
        }
    )
    return table.astype({m: float for m in MEASURES}), top


def score_change(study: Study, text: Tensor | None) -> dict[str, float]:
    """Largest and mean |score - base score| over all users x items, and the relative change of the item vectors."""
    history, largest, total, count = study.split.with_valid, 0.0, 0.0, 0
    pairs = zip(
        score_chunks(study.ranker, history, study.text),
        score_chunks(study.ranker, history, text),
        strict=True,
    )
    for (_, before), (_, after) in pairs:
        delta = (after[:, 1:] - before[:, 1:]).abs()
        largest, total, count = (
            max(largest, float(delta.max())),
            total + float(delta.double().sum()),
            count + delta.numel(),
        )
    moved = 0.0 if text is None else float((text - study.text).norm() / study.text.norm())
    return {
        "max_abs_score_delta": largest,
        "mean_abs_score_delta": total / count,
        "item_vector_change": moved,
    }


def change_by_group(
    study: Study, text: Tensor, top: np.ndarray, held: set[int]
) -> dict[str, float]:
    """What moved among items that bases were built from (``seen``) and those kept out (``held``, item numbers).

    For both groups: relative change of the item vectors, max and mean |score - base score| over all users x the
    group's items, and the share of the group's places in the base top 10 that it kept in ``top`` (U, 10).
    """
    mask = torch.zeros(len(study.items) + 1, dtype=torch.bool)
    mask[sorted(held)] = True
    groups = {"seen": ~mask, "held": mask}
    groups["seen"][0] = False
    history, out = study.split.with_valid, {}
    largest, total = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0.0)
    for (_, before), (_, after) in zip(
        score_chunks(study.ranker, history, study.text),
        score_chunks(study.ranker, history, text),
        strict=True,
    ):
        for name, rows in groups.items():
            delta = (after[:, rows] - before[:, rows]).abs()
            largest[name], total[name] = (
                max(largest[name], float(delta.max())),
                total[name] + float(delta.double().sum()),
            )
    stayed = _stayed(study, top)
    for name, rows in groups.items():
        entries = rows.numpy()[study.top]
        out |= {
            f"item_change_{name}": float(
                (text[rows] - study.text[rows]).norm() / study.text[rows].norm()
            ),
            f"max_abs_score_delta_{name}": largest[name],
            f"mean_abs_score_delta_{name}": total[name] / (len(history) * int(rows.sum())),
            f"overlap_{name}": float(stayed[entries].mean()) if entries.any() else 1.0,
        }
    return out


def _stayed(study: Study, top: np.ndarray) -> np.ndarray:
    """bool (U, 10): the places of the base top 10 whose item is anywhere in ``top`` (U, 10)."""
    return (study.top[:, :, None] == top[:, None, :]).any(2)


@torch.no_grad()
def served_vectors(tuned: Explainer, fresh: Explainer, items: ItemTexts) -> Tensor:
    """Item vectors (I+1, d) by ``fresh`` after it has read ``tuned``'s weights, adapters merged, from a safetensors file.

    ``fresh``: the same base model without adapters, changed in place. ``items`` belong to ``tuned``; their trunk
    states are used again, since no adapter lies below them.
    """
    merged = {
        f"{name}.weight": module.base_layer.weight + module.get_delta_weight("default")
        for name, module in tuned.lm.named_modules()
        if hasattr(module, "lora_A")
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merged.safetensors"
        write_atomic(path, safetensors_bytes({k: v.cpu().contiguous() for k, v in merged.items()}))
        for key, weight in load_file(path).items():
            fresh.lm.get_parameter(key).copy_(weight)
    fresh.cut = tuned.cut
    fresh.forget_hash()
    items.states()
    again = copy.copy(items)
    again.explainer = fresh
    return again.vectors()


def top_frame(tops: dict[str, np.ndarray]) -> pd.DataFrame:
    """Each arm's top lists (U, k) as rows: arm, user, position (from 1), item."""
    frames = []
    for arm, top in tops.items():
        users, k = top.shape
        frames.append(
            pd.DataFrame(
                {
                    "arm": arm,
                    "user": np.repeat(np.arange(users), k),
                    "position": np.tile(np.arange(1, k + 1), users),
                    "item": top.ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
