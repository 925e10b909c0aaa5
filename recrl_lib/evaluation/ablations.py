"""RQ4: the finished runs of a batch side by side. RQ3: the price of the shields of ``frontier``.

An arm is a policy under one setting: ``main`` and every other arm of the grid is the shielded
policy of its runs, ``no_projection`` the unshielded policy that runs of ``main`` train too. Arms of
one seed explain the same items to the same users, so differences are paired. Intervals are over
seeds and users resampled together: of one seed over users alone, of three still too narrow.
"""

import json
import re

import numpy as np
import pandas as pd

from recrl_lib import runs
from recrl_lib.evaluation import stats
from recrl_lib.evaluation.findings import rows_of
from recrl_lib.params import Params

MAIN, NO_PROJECTION = "main", "no_projection"
# Columns of the texts; not the reward, which means another thing where its parts are changed.
PAIRED = ["faithfulness", "rank_drop", "quality", "kl"]
OF_RUN = (("ctr_lift", "base"), ("top10_overlap", ""), ("ndcg@10", ""), ("max_abs_score_delta", ""))


def finished(params: Params, batch: str) -> tuple[list[tuple[str, str, int]], list[str]]:
    """(run, arm, seed) of a batch's finished runs; the runs left out as unfinished or stale."""
    chosen, left_out, prefix = [], [], f"{params.run}-{batch}-"
    for run in sorted({path.split("/")[0] for path in runs.batch_files(params)}):
        if not run.startswith(prefix):
            continue
        stored, arm = runs.read_params(run), re.fullmatch(r"(.+)-seed\d+", run.removeprefix(prefix))
        if stored is None or arm is None or not runs.up_to_date("evaluation", stored):
            left_out.append(run)
        else:
            chosen.append((run, arm[1], stored.seed))
    return chosen, left_out


def collect(params: Params) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The explanations and the evaluation's results of a batch, and the runs left out. Both tables
    have the columns ``run`` and ``seed``, and the batch's name of the policy as ``arm``. Where no
    run of ``main`` has the base run's seed, the base run is it."""
    chosen, left_out = finished(params, params.batch)
    if not any(arm == MAIN and seed == params.seed for _, arm, seed in chosen):
        chosen.insert(0, (params.run, MAIN, params.seed))
    all_texts, all_results = [], []
    for run, arm, seed in chosen:
        texts = pd.read_parquet(runs.run_folder(run) / "artifacts" / "explanations.parquet")
        policies = {"shielded": arm} | ({"unshielded": NO_PROJECTION} if arm == MAIN else {})
        results = runs.read_results(run, "evaluation")
        for found, table in ((all_texts, texts), (all_results, results)):
            found.append(table.assign(run=run, seed=seed, arm=table["arm"].map(policies)))
    texts, results = (pd.concat(found).dropna(subset="arm") for found in (all_texts, all_results))
    return texts, results, left_out


def compare(
    texts: pd.DataFrame, results: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The arms as results, ``main`` first: ``PAIRED``, also against ``main``, and ``OF_RUN``. With
    several seeds the groups ``lowest_seed`` and ``highest_seed`` hold the least and the greatest
    mean of a seed. An arm that shares no user with ``main`` has no difference to it."""
    texts = texts.set_index(["seed", "user", "item"])  # what pairs the arms
    by_arm = {arm: said[PAIRED].astype(float) for arm, said in texts.groupby("arm")}
    rows = []
    for arm in sorted(by_arm, key=lambda name: (name != MAIN, name != NO_PROJECTION, name)):
        own = by_arm[arm]
        for values, against in ((own, ""), ((own - by_arm[MAIN]).dropna(), MAIN)):
            seeds, users = (values.index.get_level_values(name) for name in ("seed", "user"))
            for measure, x in values.items() if len(values) else ():
                row = {"arm": arm, "against": against, "measure": measure, "group": "all"}
                row |= {"n": len(x), "seeds": seeds.nunique()}
                interval = stats.crossed_mean(x.to_numpy(), seeds, users, n_boot, rng)
                rows.append(row | dict(zip(("value", "low", "high"), interval)))
                if seeds.nunique() > 1 and not against:
                    means = x.groupby("seed").mean()
                    rows.append(row | {"group": "lowest_seed", "value": means.min()})
                    rows.append(row | {"group": "highest_seed", "value": means.max()})
        for measure, against in OF_RUN:
            mean = rows_of(results, measure, arm, against)["value"].mean()
            rows.append({"arm": arm, "against": against, "measure": measure, "value": mean})
    return pd.DataFrame(rows).fillna({"group": "all"})


def price(
    chosen: list[tuple[str, str, int]], n_boot: int, rng: np.random.Generator
) -> pd.DataFrame:
    """What the shields of ``finished`` runs cost, as results; ``unshielded`` is their end point.

    ``reward_kept`` and ``faithfulness_kept``, also on ``new_items``: the gain over base as a share
    of the gain of the unshielded policy that the same run has trained; left out where the interval
    of the latter reaches 0. Against base: ``top10_overlap``, also of the places of
    ``held_out_items``, which no basis and no replay has read, ``top1_same`` and ``ndcg@10``.
    The interval of a ratio is that of its delta method.
    """
    users = pd.concat([_by_user(*one) for one in chosen], ignore_index=True)
    key, rows = ["arm", "against", "group", "measure"], []
    # The unshielded policy is the same in all runs of a seed.
    for names, part in users.drop_duplicates([*key, "seed", "user"]).groupby(key, sort=False):
        num, den, *labels = (part[name].to_numpy() for name in ("num", "den", "seed", "user"))
        if stats.crossed_mean(den, *labels, n_boot, rng)[1] > 0:
            ratio = num.mean() / den.mean()
            found = stats.crossed_mean(
                ratio + (num - ratio * den) / den.mean(), *labels, n_boot, rng
            )
            row = dict(zip((*key, "value", "low", "high"), (*names, *found)))
            rows.append(row | {"n": len(part), "seeds": part["seed"].nunique()})
    return pd.DataFrame(rows)


def _by_user(run: str, arm: str, seed: int) -> pd.DataFrame:
    """Numerator and denominator of every measure of ``price``, a row a user that it has."""
    folder, parts = runs.run_folder(run) / "artifacts", []
    texts, ranking, lists = (
        {
            name: part.set_index(labels)
            for name, part in pd.read_parquet(folder / file).groupby("arm")
        }
        for file, labels in (
            ("explanations.parquet", "user"),
            ("ranking.parquet", "user"),
            ("top10.parquet", ["user", "item"]),
        )
    )
    held = json.loads((folder / "held_out_items.json").read_text(encoding="utf-8"))
    asked = lists["base"].index[lists["base"].index.isin(held, level="item")]
    new = texts["base"]["new_item"]
    for policy, name in (("shielded", arm), ("unshielded", "unshielded")):
        ranked, one = ranking[policy], pd.Series(1.0, ranking[policy].index)
        stayed = pd.Series(asked.isin(lists[policy].index), asked).groupby("user")
        found = [
            ("base", "all", "top10_overlap", ranked["overlap"], one),
            ("base", "held_out_items", "top10_overlap", stayed.sum(), stayed.size()),
            ("base", "all", "top1_same", ranked["top1_same"], one),
            ("base", "all", "ndcg@10", ranked["ndcg"] - ranking["base"]["ndcg"], one),
        ]
        for measure in ("reward", "faithfulness"):
            mine, free = (
                texts[a][measure] - texts["base"][measure] for a in (policy, "unshielded")
            )
            for group, keep in (("all", new | True), ("new_items", new)):
                found.append(("unshielded", group, f"{measure}_kept", mine[keep], free[keep]))
        for against, group, measure, num, den in found:
            row = pd.DataFrame({"num": num, "den": den}).rename_axis("user").reset_index()
            parts.append(row.assign(arm=name, against=against, group=group, measure=measure))
    return pd.concat(parts).assign(seed=seed)
