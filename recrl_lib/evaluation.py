"""Arms side by side: what tuning did to the ranking, to the explanations, and to simulated clicks.

Ranking is measured on all users; explanations on held-out users whose prompts PPO never saw. All arms
explain the same items to the same users with the same random numbers (a fixed slate), and the click
model scores items with the *base* ranker, so a lift can come from the words alone.
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save as safetensors_bytes
from torch import Tensor

from recrl_lib import judge, metrics, ranker, simulator, stats
from recrl_lib.explainer import Explainer, ItemTexts, explain
from recrl_lib.files import write_atomic
from recrl_lib.study import TOP_K, Study

TEXT_ARMS = ("base", "unshielded", "shielded")  # `separate` speaks with the unshielded policy
MEASURES = ("ndcg", "hr", "overlap", "set_same", "exact", "kendall_tau", "rbo", "top1_same")


def ranking_table(study: Study, text: Tensor | None) -> tuple[pd.DataFrame, np.ndarray]:
    """(one row a user: rank of the test item, NDCG, HR and churn against the base top 10; top 10 (U, 10))."""
    history = study.split.with_valid
    ranks = ranker.target_ranks(study.ranker, history, study.split.test, text)
    top = ranker.top_k(study.ranker, history, text, TOP_K)
    table = pd.DataFrame({
        "user": np.arange(len(history)), "rank": ranks,
        "ndcg": metrics.ndcg_at(ranks, TOP_K), "hr": metrics.hr_at(ranks, TOP_K),
        **metrics.churn(study.top, top),
    })
    return table.astype({m: float for m in MEASURES}), top


def score_change(study: Study, text: Tensor | None) -> dict[str, float]:
    """Largest and mean |score - base score| over all users x items, and the relative change of the item vectors."""
    history, largest, total, count = study.split.with_valid, 0.0, 0.0, 0
    pairs = zip(
        ranker.score_chunks(study.ranker, history, study.text), ranker.score_chunks(study.ranker, history, text), strict=True
    )
    for (_, before), (_, after) in pairs:
        delta = (after[:, 1:] - before[:, 1:]).abs()
        largest, total, count = max(largest, float(delta.max())), total + float(delta.double().sum()), count + delta.numel()
    moved = 0.0 if text is None else float((text - study.text).norm() / study.text.norm())
    return {"max_abs_score_delta": largest, "mean_abs_score_delta": total / count, "item_vector_change": moved}


def change_by_group(study: Study, text: Tensor, top: np.ndarray, held: set[int]) -> dict[str, float]:
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
        ranker.score_chunks(study.ranker, history, study.text), ranker.score_chunks(study.ranker, history, text), strict=True
    ):
        for name, rows in groups.items():
            delta = (after[:, rows] - before[:, rows]).abs()
            largest[name], total[name] = max(largest[name], float(delta.max())), total[name] + float(delta.double().sum())
    stayed = (study.top[:, :, None] == top[:, None, :]).any(2)
    for name, rows in groups.items():
        entries = rows.numpy()[study.top]
        out |= {
            f"item_change_{name}": float((text[rows] - study.text[rows]).norm() / study.text[rows].norm()),
            f"max_abs_score_delta_{name}": largest[name], f"mean_abs_score_delta_{name}": total[name] / (len(history) * int(rows.sum())),
            f"overlap_{name}": float(stayed[entries].mean()) if entries.any() else 1.0,
        }
    return out


@torch.no_grad()
def served_vectors(tuned: Explainer, fresh: Explainer, items: ItemTexts) -> Tensor:
    """Item vectors (I+1, d) by ``fresh`` after it has read ``tuned``'s weights, adapters merged, from a safetensors file.

    ``fresh``: the same base model without adapters, changed in place. ``items`` belong to ``tuned``; their trunk
    states are used again, since no adapter lies below them.
    """
    merged = {
        f"{name}.weight": module.base_layer.weight + module.get_delta_weight("default")
        for name, module in tuned.lm.named_modules() if hasattr(module, "lora_A")
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


def explanation_table(
    arm: str, study: Study, explainer: Explainer, records: list[dict], reward, encoder, params, seed: int,
) -> pd.DataFrame:
    """One row a record: the arm's text, its reward and parts, KL to the reference, and every judge measure.

    The explainer speaks with its adapters as they are; ``seed`` is shared by the arms.
    """
    said = explain(explainer, records, params.max_new_tokens, params.temperature, seed, desc=f"explaining, {arm}")
    total, parts = reward(records, said.texts)
    table = pd.DataFrame({
        "arm": arm, **{key: [r[key] for r in records] for key in ("user", "item", "position", "title")},
        "text": said.texts, "reward": total, **{f"reward_{k}": v for k, v in parts.items()}, "kl": said.kl,
        "tokens": [len(r) for r in said.reference], "ended": said.ended,
    })
    judged = judge.judge_texts(records, said.texts, said.reference, encoder, study.catalogue, np.random.default_rng(seed))
    return pd.concat([table, judged.reset_index(drop=True)], axis=1)


def click_table(study: Study, explanations: pd.DataFrame, model: simulator.ClickModel, rng: np.random.Generator) -> pd.DataFrame:
    """``explanations`` with a column ``click``: the click probability under noise that all arms share."""
    first = explanations[explanations["arm"] == TEXT_ARMS[0]]
    users, items = first["user"].to_numpy(), first["item"].to_numpy()
    history = [study.split.with_valid[u] for u in users]
    rows = [ranker.mask_seen(scores, history[start:start + len(scores)])
            for start, scores in ranker.score_chunks(study.ranker, history, study.text)]
    score = simulator.standardised_score(torch.cat(rows).numpy(), items)
    noise = model.draw(len(users), rng)
    parts = []
    for arm in TEXT_ARMS:
        part = explanations[explanations["arm"] == arm]
        if not np.array_equal(part["user"], users) or not np.array_equal(part["item"], items):
            raise ValueError(f"arm {arm}: its explanations are not about the base arm's users and items")
        click = model.probabilities(score, part["quality"].to_numpy(), part["position"].to_numpy(), noise)
        parts.append(part.assign(click=click))
    return pd.concat(parts, ignore_index=True)


def arm_metrics(
    arm: str, explanations: pd.DataFrame, ranking: pd.DataFrame, change: dict[str, float], n_boot: int, rng: np.random.Generator,
) -> dict[str, float]:
    """All of an arm's numbers for ``metrics/evaluation.json``, keyed ``<arm>/<name>``; intervals are over users."""
    said = explanations[explanations["arm"] == ("unshielded" if arm == "separate" else arm)]
    base = explanations[explanations["arm"] == "base"]
    ranked, before = ranking[ranking["arm"] == arm], ranking[ranking["arm"] == "base"]
    out: dict[str, float] = {}
    for name, values in (("reward", said["reward"]), ("quality", said["quality"]), ("ndcg@10", ranked["ndcg"])):
        out[name], out[f"{name}_lo"], out[f"{name}_hi"] = stats.bootstrap_mean(values.to_numpy(), n_boot, rng)
    for name, after_, before_ in (
        ("reward_change", said["reward"], base["reward"]), ("quality_change", said["quality"], base["quality"]),
        ("ndcg@10_change", ranked["ndcg"], before["ndcg"]),
    ):
        difference = after_.to_numpy() - before_.to_numpy()
        out[name], out[f"{name}_lo"], out[f"{name}_hi"] = stats.bootstrap_mean(difference, n_boot, rng)
    out["ctr"] = said["click"].mean()
    out["ctr_lift"], out["ctr_lift_lo"], out["ctr_lift_hi"] = simulator.ctr_lift(
        said["click"].to_numpy(), base["click"].to_numpy(), n_boot, rng
    )
    claimed = said["grounding_precision"].dropna()
    out |= {
        "kl": said["kl"].mean(), "eos_rate": said["ended"].mean(), "mean_tokens": said["tokens"].mean(),
        **{name: said[name].mean() for name in ("reward_length", "reward_relevance", "reward_coherence", "grounding_recall", "fluency")},
        "grounding_precision": claimed.mean() if len(claimed) else 0.0,  # an arm that claims nothing supports nothing
        "claiming_share": len(claimed) / len(said),
        "own_item_retrieval@10": said["own_item"].mean(),
        "distinct_2": metrics.distinct_n(said["text"], 2), "usr": metrics.usr(said["text"]),
        "hr@10": ranked["hr"].mean(), "top10_overlap": ranked["overlap"].mean(), "top10_set_same": ranked["set_same"].mean(),
        "top10_exact": ranked["exact"].mean(), "kendall_tau": ranked["kendall_tau"].mean(), "rbo": ranked["rbo"].mean(),
        "top1_same": ranked["top1_same"].mean(), **change,
    }
    return {f"{arm}/{name}": float(value) for name, value in out.items()}




def top_frame(tops: dict[str, np.ndarray]) -> pd.DataFrame:
    """Each arm's top lists (U, k) as rows: arm, user, position (from 1), item."""
    frames = []
    for arm, top in tops.items():
        users, k = top.shape
        frames.append(pd.DataFrame({
            "arm": arm, "user": np.repeat(np.arange(users), k), "position": np.tile(np.arange(1, k + 1), users), "item": top.ravel(),
        }))
    return pd.concat(frames, ignore_index=True)
