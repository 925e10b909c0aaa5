"""``make bench``, the ranker's part: ranking at scale, in a process of its own so that its peak memory is its own."""

import os
import resource
import subprocess
import sys
import time

import numpy as np

from recrl_lib import ranker

USERS, ITEMS, HISTORY, K = 20_000, 200_000, 50, 10
MIB = 2**20


def main() -> None:
    """Rank all items for all users of a random catalogue and print users a second and the memory it took."""
    command = [sys.executable, "-m", "recrl_lib.bench_ranker"]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def measure() -> None:
    """An untrained model: the cost of ranking does not depend on the weights."""
    rng = np.random.default_rng(0)
    model = ranker.freeze(ranker.SASRec(ITEMS))
    histories = list(rng.integers(1, ITEMS, (USERS, HISTORY)))
    targets = np.full(USERS, ITEMS)  # the one item that no history holds
    before = peak_mib()
    print(f"ranking {USERS:,} users x {ITEMS:,} items; all scores at once would be {USERS * (ITEMS + 1) * 4 / MIB:,.0f} MiB")
    for what, function in (
        ("rank of the test item", lambda: ranker.target_ranks(model, histories, targets, None)),
        (f"top {K}", lambda: ranker.rank(model, histories, K, None)),
    ):
        start = time.process_time()
        function()
        seconds = time.process_time() - start
        print(f"{what:<28}{USERS / seconds:>8,.0f} users a CPU-second, peak {peak_mib() - before:,.0f} MiB above {before:,.0f}")


def peak_mib() -> float:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


if __name__ == "__main__":
    os.environ["RECRL_PROGRESS"] = "off"
    measure()
