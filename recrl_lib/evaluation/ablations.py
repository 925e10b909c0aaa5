"""RQ4: the finished runs of a batch side by side.

An arm is a policy under one setting: ``main`` and every other arm of the grid is the shielded
policy of its runs, ``no_projection`` the unshielded policy that runs of ``main`` train too. Arms of
one seed explain the same items to the same users, so differences are paired. Intervals are over
seeds and users resampled together: of one seed over users alone, of three still too narrow.
"""

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


def collect(params: Params) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The explanations and the evaluation's results of a batch, and the runs left out as unfinished
    or stale. Both tables have the columns ``run`` and ``seed``, and the batch's name of the policy
    as ``arm``. Where no run of ``main`` has the base run's seed, the base run is it."""
    chosen, left_out = [], []
    for run in sorted({path.split("/")[0] for path in runs.batch_files(params)}):
        stored = runs.read_params(run)
        arm = re.fullmatch(r"(.+)-seed\d+", run.removeprefix(f"{params.run}-{params.batch}-"))
        if stored is None or arm is None or not runs.up_to_date("evaluation", stored):
            left_out.append(run)
        else:
            chosen.append((run, arm[1], stored.seed))
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
