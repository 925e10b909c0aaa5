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
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from recrl_lib import assets, measures, paths, runs, study
from recrl_lib.evaluation import audit, clicks, conversations, ranking_change, results
from recrl_lib.explainer.model import INPUT_OF_PROJECTION
from recrl_lib.explainer.sampling import Explained
from recrl_lib.params import Params, stage_named
from recrl_lib.ranker import metrics
from recrl_lib.ranker.ranking import target_ranks
from recrl_lib.scoring import judge, reward
from recrl_lib.shield import subspaces
from recrl_lib.training import diagnostics

KEY, NUMBERS = list(measures.KEY), ["value", "low", "high", "passed"]
RELATIVE, FLOOR, INTERVAL, P_VALUE = 1e-3, 1e-7, 0.1, 0.05
REFERENCE = {  # by stage and measure, how far from the published run (absolute)
    "data": {"n_users": 0, "n_items": 0, "n_interactions": 0},
    "ranker": {"ndcg@10": 0.01, "text_free_ndcg@10": 0.01},
    "shield": {"energy": 0.005, "overlap": 0.02},
    "evaluation": {
        "reward": 0.03, "quality": 0.03, "ctr_lift": 0.03, "ndcg@10": 0.01, "top10_overlap": 0.05,
    },
}  # fmt: skip


@dataclass
class Finished:
    """A finished run, read only: ``stage`` reads its artifacts and knows its parameters."""

    stage: runs.StageRun
    study: study.Study
    encoder: Any  # as ``judge.SentenceEncoder``


def rows(values: Mapping[str, float], arm: str = "") -> pd.DataFrame:
    """Measures and their values as rows of results."""
    return pd.DataFrame({"arm": arm, "measure": values.keys(), "value": values.values()})


def data(run: Finished) -> list[pd.DataFrame]:
    sizes = {name: len(run.stage.load_table(name)) for name in ("interactions", "items", "users")}
    for group in ("ppo_users", "validation_users", "heldout_users"):
        sizes[group] = len(getattr(run.study, group))
    return [rows({f"n_{name}": size for name, size in sizes.items()})]


def ranker(run: Finished) -> list[pd.DataFrame]:
    made, split = run.study, run.study.split
    curve = pd.read_csv(run.stage.input("ranker.csv", "curves"))
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


def shield(run: Finished) -> list[pd.DataFrame]:
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


def leaks(run: Finished) -> list[pd.DataFrame]:
    bases = subspaces.from_tensors(run.stage.load_tensors("subspaces"))
    adapters = {arm: run.stage.load_tensors(f"adapter_{arm}") for arm in measures.ARMS[2:]}
    return [rows({"leak": adapter_leak(a, bases)}, arm) for arm, a in adapters.items()]


def shielded_ppo(run: Finished) -> list[pd.DataFrame]:
    curves = pd.read_csv(run.stage.input("shielded_ppo.csv", "curves")).groupby("arm")
    return leaks(run) + [rows(diagnostics.summary(curve), str(arm)) for arm, curve in curves]


def evaluation(run: Finished) -> list[pd.DataFrame]:
    made, params, load, rng = run.study, run.stage.params, run.stage.load_table, run.stage.rng
    said = pd.concat([load("explanations"), load("other_texts")], ignore_index=True)
    records = made.records(*said.loc[said["arm"] == "base", ["user", "position"]].to_numpy().T)
    rewarder = reward.Reward.of(params, made.catalogue)
    scorer = results.Scorer(made, records, rewarder, run.encoder, run.stage.torch_seed("said"))
    parts = []
    for arm, part in said.groupby("arm", sort=False):
        # One token of the stored fluency's probability stands for the tokens, which are not stored.
        tokens = [np.log([f]) if f > 0 else np.array([]) for f in part["fluency"]]
        by_model = ["kl", "tokens", "finished", "faithfulness_served"]
        again = scorer.score(str(arm), part["text"].tolist(), tokens)
        parts.append(again.assign(**part[by_model].reset_index(drop=True)))
    model, texts = clicks.ClickModel.of(params), pd.concat(parts, ignore_index=True)
    scored, _, _ = results.click_table(made, texts, model, rng("clicks"))
    lists, tables = load("top10"), []
    for arm, part in load("ranking").groupby("arm", sort=False):
        ranks, top = part.sort_values("user")["rank"].to_numpy(), study.top_array(lists, str(arm))
        tables.append(ranking_change.ranking_rows(made, ranks, top).assign(arm=arm))
    ranking, n = pd.concat(tables), params.bootstrap
    held = np.isin(made.split.test, run.stage.load_json("held_out_items"))
    groups = {"subspace_items": ~held, "held_out_items": held}
    talks = []
    for arm, part in load("conversations").groupby("arm", sort=False):
        stored = (turn for _, turn in part.groupby("turn"))

        def say(_, turn: int, stored=stored) -> Explained:
            rows_of_turn = next(stored)
            said, kl = rows_of_turn["text"].tolist(), rows_of_turn["kl"].to_numpy()
            return Explained(said, [], kl, np.ones(len(kl)))

        first = [""] * (len(part) // 2)
        again = conversations.converse(made, records[: len(first)], first, say, params.seed)
        talks.append(again.assign(arm=arm))
    return [
        *leaks(run),
        results.with_separate(conversations.rows(pd.concat(talks), n, rng("chats"))),
        results.ranking_rows(ranking, groups, n, rng("ranking")),
        results.text_rows(scored, n, rng("texts")),
        results.judge_rows(scorer, scored, n, rng("judge")),
        results.tests(scored, ranking, n, rng("tests")),
        results.detectable(scored),
    ]


def audited(run: Finished) -> list[pd.DataFrame]:
    said, ranking, lists = map(run.stage.load_table, ("explanations", "ranking", "top10"))
    said, ranking = (table[table["arm"] == "shielded"] for table in (said, ranking))
    records = run.study.records(said["user"], said["position"])
    tops = {"base": study.top_array(lists, "base"), "after": study.top_array(lists, "shielded")}
    ndcg, n_items = ranking.sort_values("user")["ndcg"].to_numpy(), len(run.study.items)
    found = audit.measure(said, records, run.study.users, ndcg, tops, n_items)
    return [audit.judge(found, audit.load_policy()).drop(columns="threshold")]


RECOMPUTED: dict[str, Callable[[Finished], list[pd.DataFrame]]] = {
    "data": data, "ranker": ranker, "shield": shield, "shielded_ppo": shielded_ppo,
    "evaluation": evaluation, "audit": audited,
}  # fmt: skip


def compare(stored: pd.DataFrame, expected: pd.DataFrame, tolerance: pd.DataFrame) -> pd.DataFrame:
    """Each expected number beside the stored one; one that is not stored does not hold.

    ``tolerance`` is a table like ``expected``. Columns: the key, ``column`` (value, low, high or
    passed), expected, tolerance, stored, holds.
    """
    tables = {"expected": expected, "tolerance": tolerance, "stored": stored}
    columns = [name for name in NUMBERS if name in expected]
    long = [table.melt(KEY, columns, "column", name) for name, table in tables.items()]
    found = long[0].dropna()
    for other in long[1:]:
        found = found.merge(other, "left", [*KEY, "column"])
    return found.assign(holds=(found["stored"] - found["expected"]).abs() <= found["tolerance"])


def rounding(expected: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """How far each number of another machine may be from ``expected``."""
    name, width = expected["measure"], expected["high"] - expected["low"]
    size = expected["value"].abs() * RELATIVE + FLOOR
    size = size.mask(name.str.contains("_p$|_p_holm$"), P_VALUE).mask(name.str.match("n_"), 0.0)
    ends = width * INTERVAL * math.sqrt(max(1, 2000 / resamples)) + FLOOR
    return expected.assign(value=size, low=ends, high=ends, passed=0.0)


def changed_files(run: str) -> list[str]:
    """Files of the run that are missing or not what their stage recorded."""
    entries = runs.read_manifest(run)["stages"].values()
    return sorted(name for entry in entries for name in runs.changed_files(run, entry["outputs"]))


def recompute(run: str, encoder: Any = None) -> pd.DataFrame:
    """``compare`` for every number of the finished stages that can be computed again.

    ``encoder``: as ``judge.SentenceEncoder``, which is the default. ``RuntimeError`` if an artifact
    is not intact, or the evaluation has not finished; a run of a batch may lack the audit.
    """
    present = [stage for stage in RECOMPUTED if stage in runs.read_manifest(run)["stages"]]
    if missing := RECOMPUTED.keys() - {"audit", *present}:
        absent = ", ".join(sorted(missing))
        raise RuntimeError(f"run {run!r} has not finished {absent}: make all RUN={run}")
    params = runs.read_params(run) or Params()
    stage = runs.StageRun(stage_named("report"), params, torch.device("cpu"), key="")
    encoder = encoder or judge.SentenceEncoder(assets.minilm_folder())
    finished, checks = Finished(stage, study.load(stage), encoder), []
    for name in present:
        expected = pd.concat(RECOMPUTED[name](finished)).reindex(columns=KEY + NUMBERS)
        kinds = dict.fromkeys(KEY, object) | dict.fromkeys(NUMBERS, float)
        expected = expected.astype(kinds).fillna({"arm": "", "against": "", "group": "all"})
        stored = runs.read_results(run, name).reindex(columns=KEY + NUMBERS)
        tolerance = rounding(expected, params.bootstrap)
        checks.append(compare(stored, expected, tolerance).assign(stage=name))
    return pd.concat(checks, ignore_index=True)


def against_reference(run: str) -> pd.DataFrame | None:
    """Headline numbers against ``runs/reference/<run>``, or ``None``: none of equal parameters."""
    folder, checks = paths.REFERENCE / run, []
    if not (folder / "metrics").is_dir():
        return None
    theirs = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    ours = (runs.read_params(run) or Params()).as_dict()
    if any(ours[name] != theirs[name] for name in theirs.keys() & ours.keys()):
        return None  # parameters may have come and gone since
    for stage, within in REFERENCE.items():
        table = runs.read_results(f"{paths.REFERENCE.name}/{run}", stage)[[*KEY, "value"]]
        paired = table["against"].ne("") & table["measure"].ne("ctr_lift")
        table = table[table["measure"].isin(within) & table["group"].eq("all") & ~paired]
        tolerance = table.assign(value=table["measure"].map(within))
        checks.append(compare(runs.read_results(run, stage), table, tolerance).assign(stage=stage))
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
