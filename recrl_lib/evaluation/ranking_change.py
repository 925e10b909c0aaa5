"""What tuning did to the ranking: user by user, and by group of items."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from recrl_lib.params import TOP_K
from recrl_lib.ranker import metrics
from recrl_lib.ranker.ranking import score_chunks, target_ranks, top_k
from recrl_lib.study import Study


def ranking_table(study: Study, text: Tensor | None) -> tuple[pd.DataFrame, np.ndarray]:
    """(a row a user: rank of the test item, NDCG, HR, churn against the base top 10; top 10
    (U, 10))."""
    history = study.split.with_valid
    ranks = target_ranks(study.ranker, history, study.split.test, text)
    top = top_k(study.ranker, history, text, TOP_K)
    return ranking_rows(study, ranks, top), top


def ranking_rows(study: Study, ranks: np.ndarray, top: np.ndarray) -> pd.DataFrame:
    """``ranking_table`` of known ranks (U,) and lists (U, 10)."""
    quality = {"ndcg": metrics.ndcg_at(ranks, TOP_K), "hr": metrics.hr_at(ranks, TOP_K)}
    measures = pd.DataFrame(quality | metrics.churn(study.top, top))
    return pd.DataFrame({"user": np.arange(len(ranks)), "rank": ranks}).join(measures)


def change_by_group(
    study: Study, text: Tensor | None, top: np.ndarray, groups: Mapping[str, Iterable[int]]
) -> dict[str, dict[str, float]]:
    """What moved among the items of each group (item numbers).

    ``item_change``, relative, of the item vectors; max and mean |score - base score| over all users
    x the group's items; ``overlap``, the share of the group's places in the base top 10 that it
    kept in ``top`` (U, 10), 1 where it had none.
    """
    history, base = study.split.with_valid, study.text
    largest, total = torch.zeros(len(study.items) + 1), torch.zeros(len(study.items) + 1).double()
    chunks = (score_chunks(study.ranker, history, vectors) for vectors in (base, text))
    for (_, before), (_, after) in zip(*chunks, strict=True):
        delta = (after - before).abs()
        largest, total = largest.maximum(delta.amax(0)), total + delta.sum(0, dtype=torch.float64)
    out = {}
    for name, members in groups.items():
        items = torch.tensor(sorted(members))
        kept, places = places_kept(study, top, items)
        moved = 0.0
        if text is not None and base is not None:
            moved = float((text[items] - base[items]).norm() / base[items].norm())
        out[name] = {
            "item_change": moved,
            "max_abs_score_delta": float(largest[items].max()),
            "mean_abs_score_delta": float(total[items].mean() / len(history)),
            "overlap": float(kept.sum() / places.sum()) if places.any() else 1.0,
        }
    return out


def places_kept(study: Study, top: np.ndarray, items: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(places of ``items`` in each user's base top 10 that are still in ``top``, places) (U,)."""
    stayed = (study.top[:, :, None] == top[:, None, :]).any(2)
    places = np.isin(study.top, items)
    return (stayed & places).sum(1), places.sum(1)


def top_frame(tops: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Each arm's top lists (U, 10) as rows: arm, user, position (from 1), item."""
    places = range(1, TOP_K + 1)
    lists = {arm: pd.DataFrame(top, columns=places).stack() for arm, top in tops.items()}
    return pd.concat(lists, names=["arm", "user", "position"]).rename("item").reset_index()
