"""``make bench``, the ranker's part: quality and CPU time beside the baselines, and ranking at scale.

``main`` prints all of it. Ranking at scale runs in a process of its own, so that its peak memory is its own.

``python -m recrl_lib.pipeline.bench_ranker --seeds N`` is no part of ``make bench``: it trains the laptop profile's ranker with the
seeds 0..N-1, with text and without, and writes ``runs/reference/ranker_seeds.csv``.
"""

import argparse
import functools
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
from torch import Tensor

from recrl_lib import data, paths
from recrl_lib.data import splits
from recrl_lib.evaluation import stats
from recrl_lib.explainer import item_texts
from recrl_lib.explainer.model import load_for
from recrl_lib.memory import peak_rss
from recrl_lib.params import Params, resolve
from recrl_lib.ranker import baselines, metrics, ranking, sasrec, training
from recrl_lib.runs import write_atomic

USERS, ITEMS, HISTORY, K = 20_000, 200_000, 50, 10
MIB = 2**20


def main() -> None:
    print("\nMovieLens-100K, leave-one-out, all items ranked, seen ones masked")
    print(f"{'':<28}{'CPU-s':>8}{'NDCG@10':>10}{'HR@10':>8}", flush=True)
    quality()
    command = [sys.executable, "-m", "recrl_lib.pipeline.bench_ranker"]
    print(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout,
        end="",
        flush=True,
    )


def quality() -> None:
    """The laptop profile's ranker, one seed, and the baselines: CPU-seconds to train and to rank all users, test metrics."""
    params, split, n_items, text = _laptop()

    def trained(vectors) -> np.ndarray:
        model, _ = training.fit(params, split, n_items, vectors, 0)
        return ranking.target_ranks(model, split.with_valid, split.test, vectors)

    arms = {
        name: functools.partial(ranking.ranks_of, chunks, split.with_valid, split.test)
        for name, chunks in baselines.closed_form(split.training, n_items, split.with_valid).items()
    }
    arms |= {"SASRec, no text": lambda: trained(None), "SASRec, with text": lambda: trained(text)}
    for name, ranks in arms.items():
        start = time.process_time()
        r = ranks()
        seconds = time.process_time() - start
        print(
            f"{name:<28}{seconds:>8.1f}{metrics.ndcg_at(r, 10).mean():>10.4f}{metrics.hr_at(r, 10).mean():>8.4f}",
            flush=True,
        )


def _laptop() -> tuple[Params, splits.Split, int, Tensor]:
    """The laptop profile's parameters, split, number of items, and text vectors."""
    params = resolve("laptop")
    loaded = data.load_for(params)
    split = splits.split_leave_one_out(loaded.interactions, len(loaded.users))
    text = item_texts.ItemTexts(load_for(params, 0), loaded.items["text"].tolist()).base_vectors()
    return params, split, len(loaded.items), text


def seeds(n: int) -> pd.DataFrame:
    """A row for each of ``n`` seeds with text and without, their means, and the closed-form rivals: test metrics, and NDCG@10
    over each rival's and, with text, over that without (``plain``).

    The intervals (95 %) are of paired differences, bootstrapped over users; a mean's is of the users' means over seeds.
    """
    params, split, n_items, text = _laptop()
    history, test = split.with_valid, split.test
    closed = baselines.closed_form(split.training, n_items, history)
    rivals = {
        key: metrics.ndcg_at(ranking.ranks_of(closed[name], history, test), 10)
        for key, name in baselines.RIVALS.items()
    }
    tables: dict[str, list[dict]] = {"llm": [], "none": []}
    users: dict[str, list[np.ndarray]] = {"llm": [], "none": []}
    for arm, vectors in (("llm", text), ("none", None)):
        for seed in range(n):
            start = time.process_time()
            model, curve = training.fit(params, split, n_items, vectors, seed)
            seconds = time.process_time() - start
            valid = [row["valid_ndcg@10"] for row in curve]
            ranks = ranking.target_ranks(model, history, test, vectors)
            free = ranking.target_ranks(model, history, test, None)
            users[arm].append(metrics.ndcg_at(ranks, 10))
            tables[arm].append(
                {
                    "ndcg@10": users[arm][-1].mean(),
                    "hr@10": metrics.hr_at(ranks, 10).mean(),
                    "mrr@10": metrics.mrr_at(ranks, 10).mean(),
                    "text_free_ndcg@10": metrics.ndcg_at(free, 10).mean(),
                    "valid_ndcg@10": max(valid),
                    "epochs": len(valid),
                    "best_epoch": int(np.argmax(valid)) + 1,
                    "train_cpu_seconds": seconds,
                }
            )
        tables[arm].append(pd.DataFrame(tables[arm]).mean().to_dict())
        users[arm].append(np.mean(users[arm], 0))
    rows = []
    for arm, table in tables.items():
        for i, (seed, row, values) in enumerate(
            zip([*range(n), f"mean of {n}"], table, users[arm])
        ):
            row = {"text": arm, "seed": seed, **row}
            for name, rival in (
                rivals | ({"plain": users["none"][i]} if arm == "llm" else {})
            ).items():
                over = stats.paired_bootstrap_diff(values, rival, 10_000, np.random.default_rng(0))[
                    :3
                ]
                row |= dict(zip((f"over_{name}", f"over_{name}_lo", f"over_{name}_hi"), over))
            rows.append(row)
    return pd.DataFrame(
        rows + [{"text": name, "ndcg@10": rival.mean()} for name, rival in rivals.items()]
    )


def scale() -> None:
    """Rank a random catalogue with an untrained model: what ranking costs does not depend on the weights."""
    rng = np.random.default_rng(0)
    model = sasrec.freeze(sasrec.SASRec(ITEMS))
    histories = list(rng.integers(1, ITEMS, (USERS, HISTORY)))
    targets = np.full(USERS, ITEMS)  # the one item that no history holds
    before = peak_rss() / MIB
    print(
        f"\n{USERS:,} users x {ITEMS:,} items; all scores at once would be {USERS * (ITEMS + 1) * 4 / MIB:,.0f} MiB"
    )
    for what, function in (
        ("rank of the test item", lambda: ranking.target_ranks(model, histories, targets, None)),
        (f"top {K}", lambda: ranking.rank(model, histories, K, None)),
    ):
        start = time.process_time()
        function()
        speed = USERS / (time.process_time() - start)
        print(
            f"{what:<28}{speed:>8,.0f} users a CPU-second, peak memory {before:,.0f} + {peak_rss() / MIB - before:,.0f} MiB"
        )


if __name__ == "__main__":
    os.environ["RECRL_PROGRESS"] = "off"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="write runs/reference/ranker_seeds.csv instead"
    )
    if count := parser.parse_args().seeds:
        written = seeds(count).to_csv(index=False, float_format="%.4f", lineterminator="\n")
        write_atomic(paths.REFERENCE / "ranker_seeds.csv", written.encode())
        print(written, end="")
    else:
        scale()
