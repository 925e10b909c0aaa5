"""Recompute a finished run's numbers from its artifacts: ``make verify RUN=laptop``.

Every file is compared with the sha256 in the manifest; then the numbers of ``metrics/*.json`` are computed again from
tables, tensors and texts, without the LLM: ranks from the frozen ranker, churn from the stored top lists, rewards
from the texts, quality from the texts and the stored fluency, clicks from quality, leaks from the adapters. What needs
the LLM (item vectors after tuning, KL, fluency) or a clock is not recomputed, and the last line says how much is.

Tolerances: counts, texts and hashes exactly; sums and means of stored columns to 1e-5 of their value; what passes
through the ranker or the sentence encoder to 1e-3, since another processor rounds otherwise; interval ends to a tenth
of the interval's width, since resamples are drawn anew (the noise of 2,000 is about a fiftieth of it; fewer get more). Beside it, where ``runs/reference/<run>`` was made with the same parameters, headline
numbers must agree with the published ones to ``REFERENCE``: wider, because tuning amplifies the last bits.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from recrl_lib import assets, paths, runs, study
from recrl_lib.evaluation import audit, clicks, results, stats
from recrl_lib.explainer.model import INPUT_OF_PROJECTION
from recrl_lib.params import stage_named
from recrl_lib.ranker import metrics, sasrec
from recrl_lib.ranker.ranking import target_ranks
from recrl_lib.runs import sha256_file
from recrl_lib.scoring import judge, reward
from recrl_lib.shield import subspaces
from recrl_lib.training import diagnostics

EXACT, SUMS, MODELS = 0.0, 1e-5, 1e-3  # relative
FLOOR = 1e-7  # absolute: a sealed leak is rounding
INTERVAL = 0.1  # of the interval's width, for names that end in _lo or _hi
# Absolute, against the published run.
REFERENCE = {
    "data": {"n_users": 0, "n_items": 0, "n_interactions": 0},
    "ranker": {"ndcg@10": 0.01, "text_free_ndcg@10": 0.01},
    "shield": {"energy": 0.005, "overlap_mean": 0.02},
    "evaluation": {
        f"{arm}/{name}": tolerance
        for arm in runs.ARMS
        for name, tolerance in (
            ("reward", 0.03),
            ("quality", 0.03),
            ("ctr_lift", 0.03),
            ("ndcg@10", 0.01),
            ("top10_overlap", 0.05),
        )
    },
}


@dataclass(frozen=True)
class Check:
    """One number: as stored, as it should be, and how far apart the two may be (absolute)."""

    name: str
    stored: float | str | bool | None
    expected: float | str | bool
    tolerance: float
    source: str

    @property
    def holds(self) -> bool:
        if (
            isinstance(self.expected, (str, bool))
            or isinstance(self.stored, (str, bool))
            or self.stored is None
        ):
            return type(self.stored) is type(self.expected) and self.stored == self.expected
        return math.isclose(self.stored, self.expected, rel_tol=0, abs_tol=self.tolerance)


class Evidence:
    """A finished run, read only. ``RuntimeError`` where a file is missing or not what its stage recorded."""

    def __init__(self, run: str, encoder=None):
        self.params = runs.read_params(run)
        self.stage = runs.StageRun(stage_named("report"), self.params, torch.device("cpu"), key="")
        self.table, self.tensors = self.stage.load_table, self.stage.load_tensors
        self.world = study.load(self.stage)
        self.encoder = encoder or judge.SentenceEncoder(assets.minilm_folder())

    def curve(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.stage.input(f"{name}.csv", "curves"))


Numbers = Iterator[tuple[str, float | str | bool, float]]  # name, value, relative tolerance


def data(e: Evidence) -> Numbers:
    for name in ("interactions", "items", "users"):
        yield f"n_{name}", len(e.table(name)), EXACT
    yield "n_ppo_users", len(e.world.ppo_users), EXACT
    yield "n_validation_users", len(e.world.validation_users), EXACT
    yield "n_heldout_users", len(e.world.heldout_users), EXACT


def ranked(e: Evidence) -> Numbers:
    history, test = e.world.split.with_valid, e.world.split.test
    ranks = target_ranks(e.world.ranker, history, test, e.world.text)
    for name, function in (
        ("ndcg", metrics.ndcg_at),
        ("hr", metrics.hr_at),
        ("mrr", metrics.mrr_at),
    ):
        yield f"{name}@10", float(function(ranks, 10).mean()), MODELS
    bare = target_ranks(e.world.ranker, history, test, None)
    yield "text_free_ndcg@10", float(metrics.ndcg_at(bare, 10).mean()), MODELS
    curve = e.curve("ranker")
    yield "valid_ndcg@10", float(curve["valid_ndcg@10"].max()), SUMS
    yield "epochs", len(curve), EXACT
    yield "weights_sha256", sasrec.state_sha256(e.world.ranker), EXACT


def protected(e: Evidence) -> Numbers:
    bases = subspaces.from_tensors(e.tensors("subspaces"))
    yield "energy", float(np.mean([basis.energy for basis in bases.values()])), SUMS
    overlap = e.table("overlap")
    yield "rank_mean", float(overlap["rank"].mean()), SUMS
    yield "rank_max", int(overlap["rank"].max()), EXACT
    yield "capacity_left_mean", float((1 - overlap["rank"] / overlap["width"]).mean()), SUMS
    yield "overlap_mean", float(overlap["overlap"].mean()), SUMS


def adapter_leak(adapter: dict[str, Tensor], bases: dict[str, subspaces.Subspace]) -> float:
    """``shield.leak`` from an adapter's tensors alone (PEFT's names), without the LLM."""
    inside = total = 0.0
    for name in adapter:
        if found := re.search(r"layers\.(\d+)\.self_attn\.(\w+)\.lora_A\.weight$", name):
            a, b = adapter[name].double(), adapter[name.replace("lora_A", "lora_B")].double()
            basis = bases[f"{found[1]}.{INPUT_OF_PROJECTION[found[2]]}"].basis.double()
            inside += float((b @ (a @ basis)).square().sum())
            total += float((b @ a).square().sum())
    return math.sqrt(inside / total) if total else 0.0


def tuned(e: Evidence) -> Numbers:
    bases = subspaces.from_tensors(e.tensors("subspaces"))
    for arm in ("unshielded", "shielded"):
        yield f"{arm}/leak", adapter_leak(e.tensors(f"adapter_{arm}"), bases), MODELS
    for arm, rows in e.curve("ppo").groupby("arm"):
        for name, value in diagnostics.summary(rows).items():
            yield f"{arm}/{name}", value, SUMS
            if arm == "shielded":
                yield name, value, SUMS


def evaluated(e: Evidence) -> Numbers:
    stage, params, world = e.stage, e.params, e.world
    said, ranking, tops = e.table("explanations"), e.table("ranking"), e.table("top10")
    mine = said[said["arm"] == "base"]
    scorer = results.panel(
        world,
        world.records(mine["user"], mine["position"]),
        reward.Reward.of(params, world.catalogue),
        e.encoder,
        stage.torch_seed("said"),
    )
    judged = []
    for arm in results.TEXT_ARMS:
        part = said[said["arm"] == arm]
        # One token of the stored fluency's probability stands for the tokens, which are not stored.
        tokens = [np.log([f]) if f > 0 else np.array([]) for f in part["fluency"]]
        judged.append(scorer.score(arm, part["text"].tolist(), tokens))
    model = clicks.ClickModel(
        params.sim_alpha, params.sim_beta, params.sim_bias, params.sim_user_std, params.sim_position
    )
    table, _, _ = results.click_table(
        world, pd.concat(judged, ignore_index=True), model, stage.rng("clicks")
    )
    base = table[table["arm"] == "base"]
    for arm in runs.ARMS:
        mine = table[table["arm"] == ("unshielded" if arm == "separate" else arm)]
        for name in ("reward", "reward_length", "reward_relevance", "reward_coherence"):
            yield f"{arm}/{name}", float(mine[name].mean()), SUMS
        for name, column in (
            ("quality", "quality"),
            ("ctr", "click"),
            ("own_item_retrieval@10", "own_item"),
            ("grounding_recall",) * 2,
        ):
            yield f"{arm}/{name}", float(mine[column].mean()), MODELS
        for name, a, b in (
            ("reward_change", mine["reward"], base["reward"]),
            ("quality_change", mine["quality"], base["quality"]),
        ):
            _, lo, hi = stats.bootstrap_mean(
                a.to_numpy() - b.to_numpy(), params.bootstrap, stage.rng("verify")
            )
            yield f"{arm}/{name}_lo", lo, EXACT
            yield f"{arm}/{name}_hi", hi, EXACT
        lift, lo, hi = clicks.ctr_lift(
            mine["click"].to_numpy(),
            base["click"].to_numpy(),
            params.bootstrap,
            stage.rng("verify"),
        )
        yield f"{arm}/ctr_lift", lift, MODELS
        yield f"{arm}/ctr_lift_lo", lo, EXACT
        yield f"{arm}/ctr_lift_hi", hi, EXACT
        yield f"{arm}/distinct_2", judge.distinct_n(mine["text"], 2), SUMS
        yield f"{arm}/usr", judge.usr(mine["text"]), SUMS
        if arm in (
            "base",
            "separate",
        ):  # these read the base model's item vectors, which are stored
            ranks = target_ranks(world.ranker, world.split.with_valid, world.split.test, world.text)
            tolerance = MODELS
        else:
            ranks, tolerance = (
                ranking[ranking["arm"] == arm].sort_values("user")["rank"].to_numpy(),
                SUMS,
            )
        yield f"{arm}/ndcg@10", float(metrics.ndcg_at(ranks, 10).mean()), tolerance
        yield f"{arm}/hr@10", float(metrics.hr_at(ranks, 10).mean()), tolerance
        changed = metrics.churn(world.top, study.top_array(tops, arm))
        for name, column in results.CHURN.items():
            yield f"{arm}/{name}", float(changed[column].mean()), SUMS
    for name, value in results.gain_kept(table, params.bootstrap, stage.rng("verify")).items():
        yield name, value, EXACT if name.endswith(("_lo", "_hi")) else MODELS


def audited(e: Evidence) -> Numbers:
    said = e.table("explanations")
    said = said[said["arm"] == "shielded"]
    ranking, lists = e.table("ranking"), e.table("top10")
    ndcg = ranking[ranking["arm"] == "shielded"].sort_values("user")["ndcg"].to_numpy()
    tops = {
        name: study.top_array(lists, arm) for name, arm in (("base", "base"), ("after", "shielded"))
    }
    records = e.world.records(said["user"], said["position"])
    found = audit.measure(said, records, e.world.users, ndcg, tops, len(e.world.items))
    for name in runs.AUDITED:
        yield name, found[name], MODELS


RECOMPUTED: dict[str, Callable[[Evidence], Numbers]] = {
    "data": data, "ranker": ranked, "shield": protected, "ppo": tuned, "evaluation": evaluated, "audit": audited,
}  # fmt: skip


def changed_files(run: str) -> list[str]:
    """Files of the run that are missing or not what their stage recorded."""
    folder, stages = runs.run_folder(run), runs.read_manifest(run)["stages"]
    recorded = {name: sha for entry in stages.values() for name, sha in entry["outputs"].items()}
    return [
        name
        for name, sha in sorted(recorded.items())
        if not (folder / name).is_file() or sha256_file(folder / name) != sha
    ]


def unfinished(run: str) -> list[str]:
    """Names of the metrics files that the run does not have, of those that can be recomputed."""
    finished = {runs.metrics_name(stage) for stage in runs.read_manifest(run)["stages"]}
    return [name for name in RECOMPUTED if name not in finished]


def _width(stored: dict, key: str) -> float:
    """Of the interval that ``key`` is an end of, as stored; 0 if the other end is missing."""
    return abs(stored.get(f"{key[:-3]}_hi", 0.0) - stored.get(f"{key[:-3]}_lo", 0.0))


def recompute(run: str, encoder=None) -> list[Check]:
    """Every number of the finished stages that can be computed again, against the run's stored one.

    ``encoder``: as ``judge.SentenceEncoder``, which is the default. ``RuntimeError`` if an artifact is not intact, or
    the evaluation has not finished; a run of a batch may lack the audit.
    """
    if missing := {"data", "ranker", "shield", "ppo", "evaluation"} & set(unfinished(run)):
        raise RuntimeError(
            f"run {run!r} has no finished {', '.join(sorted(missing))}: make all RUN={run}"
        )
    e = Evidence(run, encoder)
    checks = []
    for name, numbers in RECOMPUTED.items():
        if name in unfinished(run):
            continue
        stored = runs.read_metrics(run, name)
        for key, value, relative in numbers(e):
            size = (
                0.0
                if isinstance(value, str) or relative == EXACT
                else max(relative * abs(value), FLOOR)
            )
            drawn_anew = (
                INTERVAL * math.sqrt(max(1.0, 2000 / e.params.bootstrap)) * _width(stored, key)
            )
            tolerance = max(drawn_anew, FLOOR) if key.endswith(("_lo", "_hi")) else size
            checks.append(Check(f"{name}: {key}", stored.get(key), value, tolerance, "artifacts"))
    return checks


def against_reference(run: str) -> list[Check] | None:
    """Headline numbers against ``runs/reference/<run>``; ``None`` if there is none, or it had other parameters."""
    folder = paths.REFERENCE / run
    if not (folder / "params.yaml").is_file():
        return None
    ours, theirs = (
        yaml.safe_load((f / "params.yaml").read_text(encoding="utf-8"))
        for f in (runs.run_folder(run), folder)
    )
    if any(
        ours.get(name) != value for name, value in theirs.items() if name in ours
    ):  # a newer run may have more of them
        return None
    return [
        Check(
            f"{name}: {key}",
            runs.read_metrics(run, name).get(key),
            published[key],
            tolerance,
            "reference",
        )
        for name, headline in REFERENCE.items()
        for published in [runs.read_metrics(f"{paths.REFERENCE.name}/{run}", name)]
        for key, tolerance in headline.items()
        if key in published
    ]


def table(checks: list[Check]) -> str:
    """The checks as text: headline numbers and whatever does not hold."""
    headline = {f"{name}: {key}" for name, keys in REFERENCE.items() for key in keys}
    rows = [("number", "stored", "expected", "within", "from", "")]
    for check in checks:
        if check.name in headline or not check.holds:
            stored, expected = (
                f"{v:.6g}" if isinstance(v, float) else str(v)
                for v in (check.stored, check.expected)
            )
            verdict = "ok" if check.holds else "DIFFERS"
            rows.append(
                (
                    check.name,
                    stored[:24],
                    expected[:24],
                    f"{check.tolerance:.2g}",
                    check.source,
                    verdict,
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recrl_lib.pipeline.verify", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--run", required=True)
    run = parser.parse_args(argv).run
    try:
        if runs.read_params(run) is None:
            raise RuntimeError(f"runs/{run} does not exist: make all RUN={run}")
        changed = changed_files(run)
        checks = recompute(run)
        published = against_reference(run)
    except (RuntimeError, ValueError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    print(table(checks + (published or [])))
    wrong = [check for check in checks + (published or []) if not check.holds]
    for name in changed:
        print(f"CHANGED runs/{run}/{name}: not what its stage wrote")
    for check in wrong:
        print(
            f"DIFFERS {check.name}: stored {check.stored}, from {check.source} {check.expected} (within {check.tolerance:.2g})"
        )
    absent = unfinished(run)
    total = sum(
        isinstance(v, float)
        for name in RECOMPUTED
        if name not in absent
        for v in runs.read_metrics(run, name).values()
    )
    if absent:
        print(f"not finished, not looked at: {', '.join(absent)}")
    reference = (
        "not compared with a reference run"
        if published is None
        else f"{len(published)} compared with runs/reference/{run}"
    )
    print(
        f"run {run}: {len(checks)} numbers recomputed ({total} stored), {reference}; {len(wrong)} differ, {len(changed)} files changed"
    )
    return 1 if wrong or changed else 0


if __name__ == "__main__":
    sys.exit(main())
