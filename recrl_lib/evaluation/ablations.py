"""RQ4: the finished runs of a batch side by side, each against ``main``, and what becomes of the paper's claims.

A row is a policy under one setting: ``main`` and every other arm of the grid is the shielded policy of its runs, and
``no_projection`` is the unshielded policy that the runs of ``main`` train beside it. Arms are paired: at one seed they
explain the same films to the same users with the same random numbers. Where the batch has no ``main`` at the base
run's seed, the base run itself is it.

Intervals are over seeds and users resampled together (``stats.crossed_mean``): of one seed they are over users alone,
of three still too narrow, so the lowest and the highest mean of a seed stand beside them. With a dozen arms, about one
interval in twenty excludes 0 by chance.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from recrl_lib import runs
from recrl_lib.evaluation import stats
from recrl_lib.params import Params
from recrl_lib.scoring import reward

MAIN, NO_PROJECTION = "main", "no_projection"
PAIRED = (
    "reward",
    "quality",
    "kl",
)  # columns of the explanations; kl is the published account's "drift"
OF_RUN = (
    "ctr_lift",
    "top10_overlap",
    "ndcg@10",
    "max_abs_score_delta",
)  # from metrics/evaluation.json


@dataclass(frozen=True)
class Finished:
    """One policy of one finished run: ``texts`` has a row a user, ``metrics`` the run's evaluation of that policy."""

    run: str
    arm: str
    seed: int
    texts: pd.DataFrame
    metrics: dict[str, float]


@dataclass(frozen=True)
class Claim:
    """``held``: yes, no, not shown, where an interval includes 0, or not tested, where the arm has no finished run."""

    claim: str
    held: str
    numbers: str


def collect(params: Params) -> tuple[list[Finished], list[str]]:
    """(policies of the base run ``params.run`` and of its batch ``params.batch``, runs left out as unfinished or stale)."""
    prefix = f"{params.run}-{params.batch}-"
    names = {path.split("/")[0] for path in runs.batch_files(params)}
    found, left_out = [], []
    for run in sorted(names):
        stored = runs.read_params(run)
        arm = re.fullmatch(r"(.+)-seed\d+", run.removeprefix(prefix))
        if stored is None or arm is None or not runs.up_to_date("evaluation", stored):
            left_out.append(run)
        else:
            found += _policies(run, arm[1], stored)
    if not any(f.arm == MAIN and f.seed == params.seed for f in found):
        found = _policies(params.run, MAIN, params) + found
    return found, left_out


def _policies(run: str, arm: str, params: Params) -> list[Finished]:
    table = pd.read_parquet(runs.run_folder(run) / "artifacts" / "explanations.parquet")
    metrics = runs.read_metrics(run, "evaluation")
    # An arm without a part of the reward was tuned for another sum: all are compared by the same one.
    table["reward"] = sum(
        w * table[f"reward_{part}"].astype(float)
        for w, part in zip(reward.WEIGHTS, reward.PARTS, strict=True)
    )
    named = {arm: "shielded"} | ({NO_PROJECTION: "unshielded"} if arm == MAIN else {})
    return [
        Finished(
            run,
            name,
            params.seed,
            table[table["arm"] == policy],
            {m: float(metrics[f"{policy}/{m}"]) for m in OF_RUN},
        )
        for name, policy in named.items()
    ]


def compare(found: Iterable[Finished], n_boot: int, rng: np.random.Generator) -> pd.DataFrame:
    """One row an arm, ``main`` first: means over users and seeds with intervals, and the paired difference to ``main``.

    For each of ``PAIRED``: ``<m> <m>_lo <m>_hi``, ``<m>_low_seed <m>_high_seed``, ``<m>_diff <m>_diff_lo <m>_diff_hi``
    (NaN where no user is shared with ``main``, as when arms were judged at other seeds). For each of ``OF_RUN`` the
    mean over runs. ``ValueError`` without ``main``.
    """
    by_arm: dict[str, list[Finished]] = {}
    for one in found:
        by_arm.setdefault(one.arm, []).append(one)
    if MAIN not in by_arm:
        raise ValueError(f"no run of the arm {MAIN!r} is finished: everything is compared with it")
    main = _pooled(by_arm[MAIN])
    rows = []
    for arm in sorted(by_arm, key=lambda name: (name != MAIN, name != NO_PROJECTION, name)):
        texts = _pooled(by_arm[arm])
        paired = texts.join(main.add_suffix("_main"), how="inner")
        seeds = {f.seed for f in by_arm[arm]}
        row: dict[str, float | str | int] = {
            "arm": arm,
            "seeds": len(seeds),
            "texts": len(texts),
            "paired": len(paired),
        }
        for m in PAIRED:
            row[m], row[f"{m}_lo"], row[f"{m}_hi"] = _over_seeds_and_users(texts[m], n_boot, rng)
            means = texts[m].groupby("seed").mean()
            row[f"{m}_low_seed"], row[f"{m}_high_seed"] = float(means.min()), float(means.max())
            change = paired[m] - paired[f"{m}_main"]
            interval = _over_seeds_and_users(change, n_boot, rng) if len(change) else (np.nan,) * 3
            row[f"{m}_diff"], row[f"{m}_diff_lo"], row[f"{m}_diff_hi"] = interval
        rows.append(row | {m: float(np.mean([f.metrics[m] for f in by_arm[arm]])) for m in OF_RUN})
    return pd.DataFrame(rows)


def _over_seeds_and_users(
    values: pd.Series, n_boot: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    seeds, users = (values.index.get_level_values(name).to_numpy() for name in ("seed", "user"))
    return stats.crossed_mean(values.to_numpy(), seeds, users, n_boot, rng)


def _pooled(of_arm: list[Finished]) -> pd.DataFrame:
    """The texts of an arm's runs, indexed by what pairs them: seed, user, item."""
    key = ["seed", "user", "item"]
    return (
        pd.concat([f.texts.assign(seed=f.seed)[[*key, *PAIRED]] for f in of_arm])
        .set_index(key)
        .astype(float)
    )


# ------------------------------------------------------------------------------------- the paper's claims

# (claim, arm, measure, the sign that the published account gives to arm minus main)
DIRECTIONS = (
    ("without the KL penalty the policy drifts further", "kl0", "kl", 1),
    ("more steps drift less", "more_steps", "kl", -1),
    ("a lower learning rate drifts less", "low_lr", "kl", -1),
)


def claims(table: pd.DataFrame, evaluations: Sequence[dict[str, float]]) -> list[Claim]:
    """The published claims, each with a verdict built from ``table`` (see ``compare``) and the ``evaluations`` of the runs of ``main``.

    A difference counts if its interval excludes 0. Clicks and NDCG are intervals of single runs: a claim about them held if it
    did at every seed.
    """
    row = table.set_index("arm")

    def ends(key: str) -> list[tuple[float, float]]:
        return [(e[f"shielded/{key}_lo"], e[f"shielded/{key}_hi"]) for e in evaluations]

    lifts = [stats.bracketed(e, "shielded/ctr_lift", ".3f") for e in evaluations]
    held = "yes" if all(lo <= 1.225 <= hi for lo, hi in ends("ctr_lift")) else "no"
    out = [
        Claim(
            "simulated clicks rise 1.225-fold",
            held,
            f"{', '.join(lifts)} under this study's click model",
        )
    ]
    kept = row.loc[MAIN, "top10_overlap"]
    free = row.loc[NO_PROJECTION, "top10_overlap"]
    changes = ends("ndcg@10_change")
    spans = ", ".join(f"[{lo:+.4f}, {hi:+.4f}]" for lo, hi in changes)
    words = (
        f"{kept:.1%} of the top ten kept, NDCG@10 changes by {spans}; asked for: 95 %, and 0 inside"
    )
    unchanged = kept >= 0.95 and all(lo <= 0 <= hi for lo, hi in changes)
    out.append(Claim("the ranking is virtually unchanged", "yes" if unchanged else "no", words))
    out.append(
        Claim(
            "it is the projection that keeps it",
            "yes" if kept > free else "no",
            f"{kept:.1%} kept with it, {free:.1%} without",
        )
    )
    for claim, arm, measure, sign in DIRECTIONS:
        if arm not in row.index or np.isnan(row.loc[arm, f"{measure}_diff"]):
            out.append(Claim(claim, "not tested", f"the arm {arm} has no finished run"))
            continue
        diff, lo, hi = (row.loc[arm, f"{measure}_diff{end}"] for end in ("", "_lo", "_hi"))
        words = stats.bracketed(row.loc[arm], f"{measure}_diff", "+.2f")
        held = "not shown" if lo <= 0 <= hi else "yes" if np.sign(diff) == sign else "no"
        out.append(Claim(claim, held, f"KL differs from main's by {words} nats a text"))
    return out


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table for reading: ``mean [lo, hi]`` and the paired difference to ``main``."""

    def cell(r, name: str, sign: str = "") -> str:
        return "" if np.isnan(r[name]) else stats.bracketed(r, name, f"{sign}.3f")

    columns = {"arm": table["arm"], "seeds": table["seeds"], "texts": table["texts"]}
    for m in PAIRED:
        columns[m] = [cell(r, m) for _, r in table.iterrows()]
        columns[f"{m} - main"] = [
            "" if r["arm"] == MAIN else cell(r, f"{m}_diff", "+") for _, r in table.iterrows()
        ]
    return pd.DataFrame(columns | {m: table[m].round(4) for m in OF_RUN}).set_index("arm")
