"""What tuning did to the ranking: user by user, and by group of items."""

import copy
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recrl_lib.evaluation import stats
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer
from recrl_lib.params import TOP_K
from recrl_lib.ranker import metrics
from recrl_lib.ranker.ranking import score_chunks, target_ranks, top_k
from recrl_lib.study import Study


def ranking_table(study: Study, text: Tensor | None) -> tuple[pd.DataFrame, np.ndarray]:
    """(one row a user: rank of the test item, NDCG, HR and churn against the base top 10; top 10
    (U, 10))."""
    history = study.split.with_valid
    ranks = target_ranks(study.ranker, history, study.split.test, text)
    top = top_k(study.ranker, history, text, TOP_K)
    return ranking_rows(study, ranks, top), top


def ranking_rows(study: Study, ranks: np.ndarray, top: np.ndarray) -> pd.DataFrame:
    """``ranking_table`` of known ranks (U,) and lists (U, 10)."""
    quality = {"ndcg": metrics.ndcg_at(ranks, TOP_K), "hr": metrics.hr_at(ranks, TOP_K)}
    measures = pd.DataFrame(quality | metrics.churn(study.top, top)).astype(float)
    return pd.DataFrame({"user": np.arange(len(ranks)), "rank": ranks}).join(measures)


def score_change(study: Study, text: Tensor | None) -> dict[str, float]:
    """Largest and mean |score - base score| over all users x items, and the relative change of the
    item vectors."""
    found = _changes(study, text, {"all": range(1, len(study.items) + 1)})["all"]
    return {"item_vector_change" if k == "item_change" else k: v for k, v in found.items()}


def change_by_group(
    study: Study, text: Tensor, top: np.ndarray, groups: Mapping[str, Iterable[int]]
) -> dict[str, dict[str, float]]:
    """What moved among groups of items (item numbers).

    For each group: relative change of the item vectors (``item_change``), max and mean |score -
    base score| over all users x the group's items, and ``overlap``, the share of the group's places
    in the base top 10 that it kept in ``top`` (U, 10); 1 for a group that has none.
    """
    out = _changes(study, text, groups)
    for name, (kept, places) in places_kept(study, top, groups).items():
        out[name]["overlap"] = float(kept.sum() / places.sum()) if places.any() else 1.0
    return out


def group_rows(
    study: Study,
    text: Tensor,
    top: np.ndarray,
    groups: Mapping[str, Iterable[int]],
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """``change_by_group`` as rows of results; ``top10_overlap`` with its interval over users."""
    rows = []
    kept = places_kept(study, top, groups)
    for group, found in change_by_group(study, text, top, groups).items():
        names = {"item_change": "item_vector_change", "overlap": "top10_overlap"}
        rows += [{"group": group, "measure": names.get(m, m), "value": v} for m, v in found.items()]
        if kept[group][1].any():
            overlap = stats.bootstrap(*kept[group], resamples, rng)
            rows[-1] |= {"low": overlap.low, "high": overlap.high, "n": len(top)}
    return pd.DataFrame(rows)


def places_kept(
    study: Study, top: np.ndarray, groups: Mapping[str, Iterable[int]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each group of items: (places of it in each user's base top 10 that are still in ``top``,
    places) (U,)."""
    stayed = (study.top[:, :, None] == top[:, None, :]).any(2)
    theirs = {name: np.isin(study.top, list(items)) for name, items in groups.items()}
    return {name: ((stayed & mask).sum(1), mask.sum(1)) for name, mask in theirs.items()}


def relative_change(vectors: Tensor | None, base: Tensor | None, items: Tensor) -> float:
    """Frobenius norm of the change of ``items`` over ``base``'s; 0 without vectors."""
    if vectors is None or base is None:
        return 0.0
    return float((vectors[items] - base[items]).norm() / base[items].norm())


def _changes(
    study: Study, text: Tensor | None, groups: Mapping[str, Iterable[int]]
) -> dict[str, dict[str, float]]:
    history = study.split.with_valid
    rows = {name: torch.tensor(sorted(items)) for name, items in groups.items()}
    largest, total = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
    chunks = (score_chunks(study.ranker, history, vectors) for vectors in (study.text, text))
    for (_, before), (_, after) in zip(*chunks, strict=True):
        delta = (after - before).abs()
        for name, items in rows.items():
            part = delta[:, items]
            largest[name] = max(largest[name], float(part.max()))
            total[name] += float(part.double().sum())
    out = {}
    for name, items in rows.items():
        out[name] = {
            "item_change": relative_change(text, study.text, items),
            "max_abs_score_delta": largest[name],
            "mean_abs_score_delta": total[name] / (len(history) * len(items)),
        }
    return out


@torch.no_grad()
def served_vectors(tuned: Explainer, fresh: Explainer, items: ItemTexts) -> Tensor:
    """Item vectors (I+1, d) by ``fresh`` after it has read ``tuned``'s weights, adapters merged,
    from a safetensors file.

    ``fresh``: the same base model without adapters, changed in place. ``items`` belong to
    ``tuned``; their hidden states below the adapters are used again.
    """
    merged = {
        f"{name}.weight": module.base_layer.weight + module.get_delta_weight("default")
        for name, module in tuned.lm.named_modules()
        if hasattr(module, "lora_A")
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merged.safetensors"
        save_file({name: weight.cpu().contiguous() for name, weight in merged.items()}, path)
        for name, weight in load_file(path).items():
            fresh.lm.get_parameter(name).copy_(weight)
    fresh.cut = tuned.cut
    fresh.weights_hash = ""
    items.states()
    again = copy.copy(items)
    again.explainer = fresh
    return again.vectors()


def top_frame(tops: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Each arm's top lists (U, k) as rows: arm, user, position (from 1), item."""
    frames = []
    for arm, top in tops.items():
        user, position = np.indices(top.shape)
        columns = {"user": user.ravel(), "position": position.ravel() + 1, "item": top.ravel()}
        frames.append(pd.DataFrame({"arm": arm, **columns}))
    return pd.concat(frames, ignore_index=True)
