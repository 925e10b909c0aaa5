"""Recompute a finished run's numbers from its artifacts: ``make verify RUN=laptop``.

Every file is compared with the sha256 in the manifest. Then the rows of ``metrics/<stage>.csv`` are
computed again, by the functions that made them, from tables, tensors and texts. What needs the
language model (item vectors after tuning, KL, fluency) or a clock is not: the last line counts.

Tolerances: counts exactly; other values to 1e-3 of their size, since another processor rounds
otherwise; ends of intervals to a tenth of the interval's width and p-values to .05, since a tie may
fall otherwise. Where ``runs/reference/<run>`` was made with the same parameters, headline numbers
must agree with the published ones to ``REFERENCE``: wider, because tuning amplifies the last bits.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from recrl_lib import assets, measures, paths, runs, study
from recrl_lib.evaluation import audit, clicks, ranking_change, results
from recrl_lib.explainer.model import INPUT_OF_PROJECTION
from recrl_lib.params import Params, stage_named
from recrl_lib.ranker import metrics
from recrl_lib.ranker.ranking import target_ranks
from recrl_lib.scoring import judge, reward
from recrl_lib.shield import subspaces
from recrl_lib.training import diagnostics

KEY = list(measures.KEY)
RELATIVE, FLOOR, INTERVAL, P_VALUE = 1e-3, 1e-7, 0.1, 0.05
REFERENCE = {  # by stage and measure, how far from the published run (absolute)
    "data": {"n_users": 0, "n_items": 0, "n_interactions": 0},
    "ranker": {"ndcg@10": 0.01, "text_free_ndcg@10": 0.01},
    "shield": {"energy": 0.005, "overlap": 0.02},
    "evaluation": {
        "reward": 0.03, "quality": 0.03, "ctr_lift": 0.03, "ndcg@10": 0.01, "top10_overlap": 0.05,
    },
}  # fmt: skip


class FinishedRun:
    """A finished run, read only. ``RuntimeError`` where a file is missing or has been changed."""

    def __init__(self, run: str, encoder=None):
        self.params = runs.read_params(run) or Params()
        self.stage = runs.StageRun(stage_named("report"), self.params, torch.device("cpu"), key="")
        self.study = study.load(self.stage)
        self.encoder = encoder or judge.SentenceEncoder(assets.minilm_folder())

    def curve(self, stage: str) -> pd.DataFrame:
        return pd.read_csv(self.stage.input(f"{stage}.csv", "curves"))


def rows(values: Mapping[str, float], arm: str = "") -> pd.DataFrame:
    """Measures and their values as rows of results."""
    return pd.DataFrame({"arm": arm, "measure": values.keys(), "value": values.values()})


def data(run: FinishedRun) -> list[pd.DataFrame]:
    sizes = {name: len(run.stage.load_table(name)) for name in ("interactions", "items", "users")}
    for group in ("ppo_users", "validation_users", "heldout_users"):
        sizes[group] = len(getattr(run.study, group))
    return [rows({f"n_{name}": size for name, size in sizes.items()})]


def ranker(run: FinishedRun) -> list[pd.DataFrame]:
    made, curve, split = run.study, run.curve("ranker"), run.study.split
    full, bare = (
        target_ranks(made.ranker, split.with_valid, split.test, text) for text in (made.text, None)
    )
    found = {
        "ndcg@10": metrics.ndcg_at(full, 10).mean(),
        "hr@10": metrics.hr_at(full, 10).mean(),
        "mrr@10": metrics.mrr_at(full, 10).mean(),
        "text_free_ndcg@10": metrics.ndcg_at(bare, 10).mean(),
        "valid_ndcg@10": curve["valid_ndcg@10"].max(),
        "epochs": len(curve),
    }
    return [rows(found, "sasrec")]


def shield(run: FinishedRun) -> list[pd.DataFrame]:
    bases = subspaces.from_tensors(run.stage.load_tensors("subspaces"))
    found = {"energy": float(np.mean([basis.energy for basis in bases.values()]))}
    table = run.stage.load_table("overlap")
    return [rows(found | {"rank_mean": table["rank"].mean(), "overlap": table["overlap"].mean()})]


def adapter_leak(adapter: dict[str, Tensor], bases: dict[str, subspaces.Subspace]) -> float:
    """``projection.leak`` from an adapter's tensors alone (PEFT's names), without the model."""
    inside = total = 0.0
    for name in adapter:
        if found := re.search(r"layers\.(\d+)\.self_attn\.(\w+)\.lora_A\.weight$", name):
            a, b = adapter[name].double(), adapter[name.replace("lora_A", "lora_B")].double()
            basis = bases[f"{found[1]}.{INPUT_OF_PROJECTION[found[2]]}"].basis.double()
            inside += float((b @ (a @ basis)).square().sum())
            total += float((b @ a).square().sum())
    return math.sqrt(inside / total) if total else 0.0


def leaks(run: FinishedRun) -> list[pd.DataFrame]:
    bases = subspaces.from_tensors(run.stage.load_tensors("subspaces"))
    adapters = {arm: run.stage.load_tensors(f"adapter_{arm}") for arm in measures.ARMS[2:]}
    return [rows({"leak": adapter_leak(a, bases)}, arm) for arm, a in adapters.items()]


def shielded_ppo(run: FinishedRun) -> list[pd.DataFrame]:
    curves = run.curve("shielded_ppo").groupby("arm")
    return leaks(run) + [rows(diagnostics.summary(curve), str(arm)) for arm, curve in curves]


def evaluation(run: FinishedRun) -> list[pd.DataFrame]:
    made, load, rng, n = run.study, run.stage.load_table, run.stage.rng, run.params.bootstrap
    said = pd.concat([load("explanations"), load("other_texts")], ignore_index=True)
    records = made.records(*said.loc[said["arm"] == "base", ["user", "position"]].to_numpy().T)
    rewarder = reward.Reward.of(run.params, made.catalogue)
    scorer = results.Scorer(made, records, rewarder, run.encoder, run.stage.torch_seed("said"))
    parts = []
    for arm, part in said.groupby("arm", sort=False):
        # One token of the stored fluency's probability stands for the tokens, which are not stored.
        tokens = [np.log([f]) if f > 0 else np.array([]) for f in part["fluency"]]
        stored = part[["kl", "tokens", "finished"]].reset_index(drop=True)
        parts.append(scorer.score(str(arm), part["text"].tolist(), tokens).join(stored))
    model, texts = clicks.ClickModel.of(run.params), pd.concat(parts, ignore_index=True)
    scored, _, _ = results.click_table(made, texts, model, rng("clicks"))
    ranking, lists = load("ranking"), load("top10")
    ranking = pd.concat(
        ranking_change.ranking_rows(
            made, part.sort_values("user")["rank"].to_numpy(), study.top_array(lists, str(arm))
        ).assign(arm=arm)
        for arm, part in ranking.groupby("arm", sort=False)
    )
    held = np.isin(made.split.test, run.stage.load_json("held_out_items"))
    groups = {"subspace_items": ~held, "held_out_items": held}
    return [
        *leaks(run),
        results.ranking_rows(ranking, groups, n, rng("ranking")),
        results.text_rows(scored, n, rng("texts")),
        results.judge_rows(scorer, scored, n, rng("judge")),
        results.tests(scored, ranking, n, rng("tests")),
        results.detectable(scored),
    ]


def audited(run: FinishedRun) -> list[pd.DataFrame]:
    said, ranking, lists = map(run.stage.load_table, ("explanations", "ranking", "top10"))
    said, ranking = (table[table["arm"] == "shielded"] for table in (said, ranking))
    records = run.study.records(said["user"], said["position"])
    tops = {"base": study.top_array(lists, "base"), "after": study.top_array(lists, "shielded")}
    ndcg, n_items = ranking.sort_values("user")["ndcg"].to_numpy(), len(run.study.items)
    found = audit.measure(said, records, run.study.users, ndcg, tops, n_items)
    return [audit.judge(found, audit.load_policy()).drop(columns="threshold")]


RECOMPUTED: dict[str, Callable[[FinishedRun], list[pd.DataFrame]]] = {
    "data": data, "ranker": ranker, "shield": shield, "shielded_ppo": shielded_ppo,
    "evaluation": evaluation, "audit": audited,
}  # fmt: skip


def compare(
    stored: pd.DataFrame, expected: pd.DataFrame, resamples: int = 2000, relative: float = RELATIVE
) -> pd.DataFrame:
    """Each expected number beside the stored one. A row that is not stored does not hold.

    Returns:
        The key, ``column`` (value, low, high or passed), stored, expected, tolerance, holds.
    """
    numbers = ["value", "low", "high", "passed"]
    kinds = dict.fromkeys(KEY, object) | dict.fromkeys(numbers, float)
    expected = expected.reindex(columns=KEY + numbers).astype(kinds)
    expected = expected.fillna({"arm": "", "against": "", "group": "all"})
    stored = stored.reindex(columns=KEY + numbers)
    both = expected.merge(stored, "left", KEY, suffixes=("", "_stored"))
    size = both["value"].abs() * relative + FLOOR * (relative > 0)
    size = size.mask(both["measure"].str.contains("_p$|_p_holm$"), P_VALUE)
    width = (both["high"] - both["low"]) * INTERVAL * math.sqrt(max(1, 2000 / resamples)) + FLOOR
    tolerance = {"value": size, "low": width, "high": width, "passed": 0.0}
    parts = [
        both[KEY].assign(column=c, stored=both[f"{c}_stored"], expected=both[c], tolerance=within)
        for c, within in tolerance.items()
    ]
    found = pd.concat(parts, ignore_index=True).dropna(subset="expected")
    return found.assign(holds=(found["stored"] - found["expected"]).abs() <= found["tolerance"])


def changed_files(run: str) -> list[str]:
    """Files of the run that are missing or not what their stage recorded."""
    stages, changed = runs.read_manifest(run)["stages"].values(), []
    for name, sha in (pair for entry in stages for pair in entry["outputs"].items()):
        file = runs.run_folder(run) / name
        if not file.is_file() or runs.sha256_file(file) != sha:
            changed.append(name)
    return sorted(changed)


def recompute(run: str, encoder=None) -> pd.DataFrame:
    """Every number of the finished stages that can be computed again: ``compare``, and the stage.

    ``encoder``: as ``judge.SentenceEncoder``, which is the default. ``RuntimeError`` if an artifact
    is not intact, or the evaluation has not finished; a run of a batch may lack the audit.
    """
    present = [stage for stage in RECOMPUTED if stage in runs.read_manifest(run)["stages"]]
    if missing := RECOMPUTED.keys() - {"audit", *present}:
        absent = ", ".join(sorted(missing))
        raise RuntimeError(f"run {run!r} has not finished {absent}: make all RUN={run}")
    finished, checks = FinishedRun(run, encoder), []
    for stage in present:
        expected, stored = pd.concat(RECOMPUTED[stage](finished)), runs.read_results(run, stage)
        relative = 0.0 if stage == "data" else RELATIVE
        found = compare(stored, expected, finished.params.bootstrap, relative)
        checks.append(found.assign(stage=stage))
    return pd.concat(checks, ignore_index=True)


def against_reference(run: str) -> pd.DataFrame | None:
    """Headline numbers against ``runs/reference/<run>``, or ``None``: none of equal parameters."""
    folder, checks = paths.REFERENCE / run, []
    if not (folder / "params.yaml").is_file() or not list(folder.glob("metrics/*.csv")):
        return None
    files = (runs.run_folder(run) / "params.yaml", folder / "params.yaml")
    ours, theirs = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    if any(ours[name] != value for name, value in theirs.items() if name in ours):
        return None  # a newer run may have more parameters
    for stage, tolerances in REFERENCE.items():
        published = runs.read_results(f"{paths.REFERENCE.name}/{run}", stage)
        headline = published["measure"].isin(tolerances) & published["group"].eq("all")
        headline &= published["against"].eq("") | published["measure"].eq("ctr_lift")
        found = compare(runs.read_results(run, stage), published[headline][[*KEY, "value"]])
        tolerance, difference = (
            found["measure"].map(tolerances),
            found["stored"] - found["expected"],
        )
        holds = difference.abs() <= tolerance
        checks.append(found.assign(stage=stage, tolerance=tolerance, holds=holds))
    return pd.concat(checks, ignore_index=True)


def main(argv: list[str] | None = None) -> int:
    """Print what differs; 1 if anything does, or if the run cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True)
    run = parser.parse_args(argv).run
    try:
        recomputed, published, changed = recompute(run), against_reference(run), changed_files(run)
    except (RuntimeError, ValueError) as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    checks = pd.concat([recomputed, published], ignore_index=True)
    headline = [m in REFERENCE.get(s, ()) for s, m in zip(checks["stage"], checks["measure"])]
    shown = checks[pd.Series(headline) & checks["column"].eq("value")]
    columns = ["stage", *KEY, "stored", "expected", "tolerance", "holds"]
    print(shown[columns].to_string(index=False, float_format="{:.6g}".format))
    wrong = checks[~checks["holds"]]
    for name in changed:
        print(f"CHANGED runs/{run}/{name}: not what its stage wrote")
    for row in wrong.itertuples():
        key = f"arm={row.arm} against={row.against} group={row.group} {row.column}"
        print(f"DIFFERS {row.stage}: {row.measure} ({key}): {row.stored}, not {row.expected}")
    if "audit" not in set(recomputed["stage"]):
        print("not finished, not looked at: audit")
    compared = "not" if published is None else len(published)
    print(
        f"run {run}: {len(recomputed)} numbers recomputed, {compared} compared with "
        f"runs/reference/{run}; {len(wrong)} differ, {len(changed)} files changed"
    )
    return 1 if len(wrong) or changed else 0


if __name__ == "__main__":
    sys.exit(main())
