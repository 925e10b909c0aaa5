"""Recompute a finished run's numbers from its artifacts: ``make verify RUN=laptop``.

Every file is compared with the sha256 in the manifest. Then the rows of ``metrics/<stage>.csv`` are
computed again, by the functions that made them, from tables, tensors and texts: ranks from the
frozen ranker, churn from the stored lists, rewards and quality from the texts and their stored
fluency, clicks from quality, leaks from the adapters. What needs the language model (item vectors
after tuning, KL, fluency) or a clock is not, and the last line says how much is.

Tolerances: counts exactly; other values to 1e-3 of their size, since another processor rounds
otherwise; ends of intervals to a tenth of the interval's width, and p-values to .05, since a
resample may fall otherwise. Where ``runs/reference/<run>`` was made with the same parameters,
headline numbers must agree with the published ones to ``REFERENCE``: wider, because tuning
amplifies the last bits.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from recrl_lib import assets, paths, runs, study
from recrl_lib.evaluation import audit, clicks, ranking_change, results
from recrl_lib.explainer.model import INPUT_OF_PROJECTION
from recrl_lib.params import stage_named
from recrl_lib.ranker import metrics
from recrl_lib.ranker.ranking import target_ranks
from recrl_lib.scoring import judge, reward
from recrl_lib.shield import subspaces
from recrl_lib.training import diagnostics

KEY = list(runs.RESULT_KEY)
RELATIVE, FLOOR, INTERVAL, P_VALUE = 1e-3, 1e-7, 0.1, 0.05
# By stage and measure, how far from the published run (absolute).
REFERENCE = {
    "data": {"n_users": 0, "n_items": 0, "n_interactions": 0},
    "ranker": {"ndcg@10": 0.01, "text_free_ndcg@10": 0.01},
    "shield": {"energy": 0.005, "overlap": 0.02},
    "evaluation": {
        "reward": 0.03, "quality": 0.03, "ctr_lift": 0.03, "ndcg@10": 0.01, "top10_overlap": 0.05,
    },
}  # fmt: skip


class FinishedRun:
    """A finished run, read only. ``RuntimeError`` where a file is missing or not what its stage
    recorded."""

    def __init__(self, run: str, encoder=None):
        self.params = runs.read_params(run)
        self.stage = runs.StageRun(stage_named("report"), self.params, torch.device("cpu"), key="")
        self.table, self.tensors, self.rng = (
            self.stage.load_table, self.stage.load_tensors, self.stage.rng,
        )  # fmt: skip
        self.study = study.load(self.stage)
        self.encoder = encoder or judge.SentenceEncoder(assets.minilm_folder())

    def curve(self, stage: str) -> pd.DataFrame:
        return pd.read_csv(self.stage.input(f"{stage}.csv", "curves"))


def rows(values: dict[str, float], **key: str) -> pd.DataFrame:
    """Measures and their values as rows of results."""
    return pd.DataFrame({"measure": values.keys(), "value": values.values(), **key})


def data(run: FinishedRun) -> list[pd.DataFrame]:
    found = {f"n_{name}": len(run.table(name)) for name in ("interactions", "items", "users")}
    groups = ("ppo_users", "validation_users", "heldout_users")
    return [rows(found | {f"n_{name}": len(getattr(run.study, name)) for name in groups})]


def ranker(run: FinishedRun) -> list[pd.DataFrame]:
    split, curve = run.study.split, run.curve("ranker")
    ranks, bare = (
        target_ranks(run.study.ranker, split.with_valid, split.test, text)
        for text in (run.study.text, None)
    )
    found = {
        "ndcg@10": metrics.ndcg_at(ranks, 10).mean(),
        "hr@10": metrics.hr_at(ranks, 10).mean(),
        "mrr@10": metrics.mrr_at(ranks, 10).mean(),
        "text_free_ndcg@10": metrics.ndcg_at(bare, 10).mean(),
        "valid_ndcg@10": curve["valid_ndcg@10"].max(),
        "epochs": len(curve),
    }
    return [rows(found, arm="sasrec")]


def shield(run: FinishedRun) -> list[pd.DataFrame]:
    bases = subspaces.from_tensors(run.tensors("subspaces"))
    table = run.table("overlap")
    found = {"energy": np.mean([basis.energy for basis in bases.values()])}
    return [rows(found | {"rank_mean": table["rank"].mean(), "overlap": table["overlap"].mean()})]


def adapter_leak(adapter: dict[str, Tensor], bases: dict[str, subspaces.Subspace]) -> float:
    """``projection.leak`` from an adapter's tensors alone (PEFT's names), without the language
    model."""
    inside = total = 0.0
    for name in adapter:
        if found := re.search(r"layers\.(\d+)\.self_attn\.(\w+)\.lora_A\.weight$", name):
            a, b = adapter[name].double(), adapter[name.replace("lora_A", "lora_B")].double()
            basis = bases[f"{found[1]}.{INPUT_OF_PROJECTION[found[2]]}"].basis.double()
            inside += float((b @ (a @ basis)).square().sum())
            total += float((b @ a).square().sum())
    return math.sqrt(inside / total) if total else 0.0


def leaks(run: FinishedRun) -> list[pd.DataFrame]:
    bases = subspaces.from_tensors(run.tensors("subspaces"))
    adapters = {arm: run.tensors(f"adapter_{arm}") for arm in ("unshielded", "shielded")}
    return [rows({"leak": adapter_leak(a, bases)}, arm=arm) for arm, a in adapters.items()]


def shielded_ppo(run: FinishedRun) -> list[pd.DataFrame]:
    curves = run.curve("shielded_ppo").groupby("arm")
    return leaks(run) + [rows(diagnostics.summary(curve), arm=str(arm)) for arm, curve in curves]


def evaluation(run: FinishedRun) -> list[pd.DataFrame]:
    made, n = run.study, run.params.bootstrap
    said = pd.concat([run.table("explanations"), run.table("other_texts")], ignore_index=True)
    base = said[said["arm"] == "base"]
    scorer = results.Scorer(
        made,
        made.records(base["user"], base["position"]),
        reward.Reward.of(run.params, made.catalogue),
        run.encoder,
        run.stage.torch_seed("said"),
    )
    parts = []
    for arm, part in said.groupby("arm", sort=False):
        # One token of the stored fluency's probability stands for the tokens, which are not stored.
        tokens = [np.log([f]) if f > 0 else np.array([]) for f in part["fluency"]]
        stored = part[["kl", "tokens", "finished"]].reset_index(drop=True)
        parts.append(pd.concat([scorer.score(arm, part["text"].tolist(), tokens), stored], axis=1))
    model, texts = clicks.ClickModel.of(run.params), pd.concat(parts, ignore_index=True)
    scored, _, _ = results.click_table(made, texts, model, run.rng("clicks"))
    ranking = rankings(run)
    held = set(run.stage.load_json("held_out_items"))
    theirs = np.isin(made.split.test, sorted(held))
    groups = {"subspace_items": ~theirs, "held_out_items": theirs}
    return [
        *leaks(run),
        results.ranking_rows(ranking, groups, n, run.rng("ranking")),
        results.text_rows(scored, n, run.rng("texts")),
        results.judge_rows(scorer, scored, n, run.rng("judge")),
        results.test_rows(results.tests(scored, ranking, n, run.rng("tests"))),
        results.detectable(scored),
    ]


def rankings(run: FinishedRun) -> pd.DataFrame:
    """The ranking table from the stored lists; ranks anew where the ranker reads base vectors,
    which are stored."""
    stored, tops, parts = run.table("ranking"), run.table("top10"), []
    split, text = run.study.split, run.study.text
    ranks = target_ranks(run.study.ranker, split.with_valid, split.test, text)
    for arm in runs.ARMS:
        own = stored[stored["arm"] == arm].sort_values("user")["rank"].to_numpy()
        known = ranks if arm in ("base", "separate") else own
        top = study.top_array(tops, arm)
        parts.append(ranking_change.ranking_rows(run.study, known, top).assign(arm=arm))
    return pd.concat(parts, ignore_index=True)


def audited(run: FinishedRun) -> list[pd.DataFrame]:
    said, tops = run.table("explanations"), run.table("top10")
    said = said[said["arm"] == "shielded"]
    found = audit.audit(
        said["text"].tolist(), run.study.records(said["user"], said["position"]), run.study.users,
        study.top_array(tops, "base"), study.top_array(tops, "shielded"), len(run.study.items),
        said["quality"].to_numpy(),
    )  # fmt: skip
    return [rows({name: found[name] for name in runs.AUDITED})]


RECOMPUTED: dict[str, Callable[[FinishedRun], list[pd.DataFrame]]] = {
    "data": data, "ranker": ranker, "shield": shield, "shielded_ppo": shielded_ppo,
    "evaluation": evaluation, "audit": audited,
}  # fmt: skip


def compare(
    stored: pd.DataFrame, expected: pd.DataFrame, resamples: int = 2000, relative: float = RELATIVE
) -> pd.DataFrame:
    """Each expected number beside the stored one: the key, ``column`` (value, low or high), stored,
    expected, tolerance, holds. A row that is not stored does not hold."""
    expected = expected.reindex(columns=[*KEY, "value", "low", "high"])
    expected = expected.fillna({"arm": "", "against": "", "group": "all"})
    both = expected.merge(stored, "left", KEY, suffixes=("", "_stored"))
    width = (
        (both["high"] - both["low"]).astype(float) * INTERVAL * math.sqrt(max(1, 2000 / resamples))
    )
    size = both["value"].astype(float).abs() * relative + FLOOR * (relative > 0)
    size = size.where(~both["measure"].str.contains("_p(?:_holm)?$"), P_VALUE)
    parts = [
        both[KEY].assign(
            column=column, stored=both[f"{column}_stored"], expected=both[column].astype(float),
            tolerance=size if column == "value" else width + FLOOR,
        )
        for column in ("value", "low", "high")
    ]  # fmt: skip
    found = pd.concat(parts, ignore_index=True).dropna(subset="expected")
    return found.assign(holds=(found["stored"] - found["expected"]).abs() <= found["tolerance"])


def changed_files(run: str) -> list[str]:
    """Files of the run that are missing or not what their stage recorded."""
    folder, stages = runs.run_folder(run), runs.read_manifest(run)["stages"]
    recorded = {name: sha for entry in stages.values() for name, sha in entry["outputs"].items()}
    return [
        name
        for name, sha in sorted(recorded.items())
        if not (folder / name).is_file() or runs.sha256_file(folder / name) != sha
    ]


def unfinished(run: str) -> list[str]:
    """Those stages with numbers to recompute that the run has not finished."""
    return [stage for stage in RECOMPUTED if stage not in runs.read_manifest(run)["stages"]]


def recompute(run: str, encoder=None) -> pd.DataFrame:
    """Every number of the finished stages that can be computed again: ``compare`` with a column
    ``stage``.

    ``encoder``: as ``judge.SentenceEncoder``, which is the default. ``RuntimeError`` if an artifact
    is not intact, or the evaluation has not finished; a run of a batch may lack the audit.
    """
    if missing := set(unfinished(run)) - {"audit"}:
        raise RuntimeError(
            f"run {run!r} has no finished {', '.join(sorted(missing))}: make all RUN={run}"
        )
    finished, checks = FinishedRun(run, encoder), []
    for stage in [name for name in RECOMPUTED if name not in unfinished(run)]:
        expected = pd.concat(RECOMPUTED[stage](finished), ignore_index=True)
        relative = 0.0 if stage == "data" else RELATIVE
        found = compare(
            runs.read_results(run, stage), expected, finished.params.bootstrap, relative
        )
        checks.append(found.assign(stage=stage, source="artifacts"))
    return pd.concat(checks, ignore_index=True)


def against_reference(run: str) -> pd.DataFrame | None:
    """Headline numbers against ``runs/reference/<run>``; ``None`` if there is none, or it had other
    parameters."""
    folder = paths.REFERENCE / run
    if not (folder / "params.yaml").is_file() or not list(folder.glob("metrics/*.csv")):
        return None
    ours, theirs = (
        yaml.safe_load((f / "params.yaml").read_text(encoding="utf-8"))
        for f in (runs.run_folder(run), folder)
    )
    if any(ours[name] != value for name, value in theirs.items() if name in ours):
        return None  # a newer run may have more parameters
    checks = []
    for stage, tolerances in REFERENCE.items():
        published = runs.read_results(f"{paths.REFERENCE.name}/{run}", stage)
        headline = published["measure"].isin(tolerances) & (published["group"] == "all")
        headline &= published["against"].eq("") | published["measure"].eq("ctr_lift")
        expected = published[headline].assign(low=np.nan, high=np.nan)
        found = compare(runs.read_results(run, stage), expected)
        found["tolerance"] = found["measure"].map(tolerances)
        found["holds"] = (found["stored"] - found["expected"]).abs() <= found["tolerance"]
        checks.append(found.assign(stage=stage, source="reference"))
    return pd.concat(checks, ignore_index=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recrl_lib.pipeline.verify", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--run", required=True)
    run = parser.parse_args(argv).run
    try:
        if runs.read_params(run) is None:
            raise RuntimeError(f"runs/{run} does not exist: make all RUN={run}")
        changed, recomputed, published = changed_files(run), recompute(run), against_reference(run)
        absent = unfinished(run)
        stored = sum(len(runs.read_results(run, s)) for s in RECOMPUTED if s not in absent)
    except (RuntimeError, ValueError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    checks = pd.concat([recomputed, published], ignore_index=True)
    headline = [m in REFERENCE.get(s, {}) for s, m in zip(checks["stage"], checks["measure"])]
    shown = checks[
        (headline & checks["group"].eq("all") & checks["column"].eq("value")) | ~checks["holds"]
    ]
    columns = ["stage", *KEY, "column", "stored", "expected", "tolerance", "source", "holds"]
    print(shown[columns].to_string(index=False, float_format="{:.6g}".format))
    for name in changed:
        print(f"CHANGED runs/{run}/{name}: not what its stage wrote")
    for row in checks[~checks["holds"]].itertuples():
        name = " ".join(
            filter(
                None, [row.arm, row.measure, row.against and f"against {row.against}", row.group]
            )
        )
        print(
            f"DIFFERS {row.stage}: {name} ({row.column}): stored {row.stored}, from {row.source} {row.expected}"
        )
    if absent:
        print(f"not finished, not looked at: {', '.join(absent)}")
    reference = (
        "not compared with a reference run" if published is None
        else f"{len(published)} compared with runs/reference/{run}"
    )  # fmt: skip
    wrong = int((~checks["holds"]).sum())
    print(
        f"run {run}: {len(recomputed)} numbers of {stored} rows recomputed, {reference}; "
        f"{wrong} differ, {len(changed)} files changed"
    )
    return 1 if wrong or changed else 0


if __name__ == "__main__":
    sys.exit(main())
