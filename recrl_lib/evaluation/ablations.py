"""RQ4: the finished runs of a batch side by side, and what becomes of published claims.

An arm is a policy under one setting: ``main`` and every other arm of the grid is the shielded
policy of its runs, ``no_projection`` the unshielded policy that runs of ``main`` train too.
Where the batch has no ``main`` at the base run's seed, the base run is it. At one seed, arms
explain the same items to the same users, so differences are paired.

Intervals are over seeds and users resampled together (``stats.crossed_mean``): of one seed they are
over users alone, of three still too narrow. With a dozen arms, one in twenty excludes 0 by chance.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from recrl_lib import runs
from recrl_lib.evaluation import stats
from recrl_lib.evaluation.findings import Finding, rows_of, share, side, words
from recrl_lib.params import Params
from recrl_lib.scoring import reward

MAIN, NO_PROJECTION = "main", "no_projection"
PAIRED = ("reward", "quality", "kl")  # columns of the explanations
OF_RUN = (("ctr_lift", "base"), ("top10_overlap", ""), ("ndcg@10", ""), ("max_abs_score_delta", ""))


class Policy(NamedTuple):
    """One policy of one finished run: a row of ``texts`` a user, ``OF_RUN`` by measure."""

    run: str
    arm: str
    seed: int
    texts: pd.DataFrame
    values: dict[str, float]


def collect(params: Params) -> tuple[list[Policy], list[str]]:
    """The policies of the base run and its batch, and the runs left out as unfinished or stale."""
    prefix = f"{params.run}-{params.batch}-"
    found, left_out = [], []
    for run in sorted({path.split("/")[0] for path in runs.batch_files(params)}):
        stored = runs.read_params(run)
        arm = re.fullmatch(r"(.+)-seed\d+", run.removeprefix(prefix))
        if stored is None or arm is None or not runs.up_to_date("evaluation", stored):
            left_out.append(run)
        else:
            found += _policies(run, arm[1], stored)
    if not any(p.arm == MAIN and p.seed == params.seed for p in found):
        found = _policies(params.run, MAIN, params) + found
    return found, left_out


def _policies(run: str, arm: str, params: Params) -> list[Policy]:
    table = pd.read_parquet(runs.run_folder(run) / "artifacts" / "explanations.parquet")
    # An arm without a part of the reward was tuned for another sum: all are compared by the same.
    table["reward"] = sum(
        weight * table[f"reward_{part}"].astype(float)
        for weight, part in zip(reward.WEIGHTS, reward.PARTS, strict=True)
    )
    results = runs.read_results(run, "evaluation")
    named = {arm: "shielded"} | ({NO_PROJECTION: "unshielded"} if arm == MAIN else {})
    return [
        Policy(
            run,
            name,
            params.seed,
            table[table["arm"] == policy],
            {m: runs.value(results, m, policy, against) for m, against in OF_RUN},
        )
        for name, policy in named.items()
    ]


def compare(found: Sequence[Policy], n_boot: int, rng: np.random.Generator) -> pd.DataFrame:
    """The arms as results, ``main`` first: ``PAIRED``, also against ``main``, and ``OF_RUN``.

    Columns are those of ``runs.read_results``. With several seeds the groups ``lowest_seed`` and
    ``highest_seed`` hold the least and the greatest mean of a seed. An arm that shares no user with
    ``main`` has no difference to it. ``ValueError`` without ``main``.
    """
    by_arm: dict[str, list[Policy]] = {}
    for one in found:
        by_arm.setdefault(one.arm, []).append(one)
    if MAIN not in by_arm:
        raise ValueError(f"no run of the arm {MAIN!r} is finished: run make batch with that arm")
    main = _pooled(by_arm[MAIN])
    rows: list[dict[str, Any]] = []
    for arm in sorted(by_arm, key=lambda name: (name != MAIN, name != NO_PROJECTION, name)):
        texts = _pooled(by_arm[arm])
        for values, against in ((texts, ""), ((texts - main).dropna(), MAIN)):
            seeds, users = (values.index.get_level_values(name) for name in ("seed", "user"))
            for measure in PAIRED if len(values) else ():
                x = values[measure]
                mean, low, high = stats.crossed_mean(x.to_numpy(), seeds, users, n_boot, rng)
                row = {"arm": arm, "against": against, "measure": measure, "group": "all"}
                row |= {"n": len(x), "seeds": seeds.nunique()}
                rows.append(row | {"value": mean, "low": low, "high": high})
                if seeds.nunique() > 1 and not against:
                    means = x.groupby("seed").mean()
                    rows.append(row | {"group": "lowest_seed", "value": means.min()})
                    rows.append(row | {"group": "highest_seed", "value": means.max()})
        for measure, against in OF_RUN:
            mean = float(np.mean([p.values[measure] for p in by_arm[arm]]))
            rows.append({"arm": arm, "against": against, "measure": measure, "value": mean})
    return pd.DataFrame(rows).fillna({"group": "all"})


def _pooled(policies: list[Policy]) -> pd.DataFrame:
    """The texts of an arm's runs, indexed by what pairs them: seed, user, item."""
    texts = pd.concat([p.texts.assign(seed=p.seed) for p in policies])
    return texts.set_index(["seed", "user", "item"])[list(PAIRED)].astype(float)


# The published account's claims about drift: arm, the sign it gives to the arm's KL minus main's.
DRIFT = {
    "without the KL penalty the policy drifts further": ("kl0", "up"),
    "more steps drift less": ("more_steps", "down"),
    "a lower learning rate drifts less": ("low_lr", "down"),
}


def claims(table: pd.DataFrame, mains: Sequence[pd.DataFrame]) -> list[Finding]:
    """The published claims with verdicts, from ``compare`` and the results of each run of ``main``.

    A claim about clicks or NDCG, whose intervals are those of single runs, held if it did in each.
    """
    source = "metrics/ablations.csv"
    lifts = [rows_of(t, "ctr_lift", "shielded", "base") for t in mains]
    held = all(t.iloc[0]["low"] <= 1.225 <= t.iloc[0]["high"] for t in lifts)
    text = ", ".join(map(words, lifts)) + " under this study's click model"
    found = [Finding("simulated clicks rise 1.225-fold", _yes(held), text, source)]
    kept, free = (runs.value(table, "top10_overlap", arm) for arm in (MAIN, NO_PROJECTION))
    changes = [rows_of(t, "ndcg@10", "shielded", "base") for t in mains]
    same = kept >= 0.95 and all(side(change) == "undecided" for change in changes)
    text = f"{share(kept)} of the top ten kept (asked for: 95 %), change of NDCG@10 "
    text += ", ".join(words(change, "+.4f") for change in changes)
    found.append(Finding("the ranking is virtually unchanged", _yes(same), text, source))
    text = f"{share(kept)} kept with it, {share(free)} without"
    found.append(Finding("it is the projection that keeps it", _yes(kept > free), text, source))
    for claim, (arm, direction) in DRIFT.items():
        rows = rows_of(table, "kl", arm, MAIN)
        answer, text = "not tested", f"the arm {arm} has no finished run"
        if len(rows):
            answer = {"undecided": "not shown", direction: "yes"}.get(side(rows), "no")
            text = f"KL against main: {words(rows, '+.2f')} nats a text"
        found.append(Finding(claim, answer, text, source))
    return found


def _yes(held: bool) -> str:
    return "yes" if held else "no"
