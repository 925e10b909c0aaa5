"""``make bench``: our PPO beside TRL's PPOTrainer, on equal work.

Each trains the laptop profile's explainer for a few steps on the CPU, in a process of its own. Time
is CPU-seconds of that process, so that other work on the machine weighs less. Ratios carry over to
other machines, seconds do not. The table is printed and kept in ``runs/bench/bench.csv``.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recrl_lib import data, paths, runs, study
from recrl_lib.explainer import model
from recrl_lib.explainer.prompts import build_records
from recrl_lib.params import resolve
from recrl_lib.scoring.reward import Reward
from recrl_lib.training import diagnostics, ppo

PEER, TRL = "trl==1.12.0", "trl_1.12"  # the last release with a PPOTrainer
PARAMS, STEPS = resolve("laptop"), 2
EPISODES = PARAMS.prompts_per_step * PARAMS.samples_per_prompt  # of a step


def work() -> tuple[data.Dataset, list[dict]]:
    """The data, and the first users' records, about the most popular film."""
    dataset = data.load_for(PARAMS)
    histories = [g["item"].to_numpy() for _, g in dataset.interactions.groupby("user")]
    popular = dataset.interactions["item"].value_counts().index[:10].to_numpy()
    top = np.tile(popular, (len(histories), 1))
    asked = [(user, 1) for user in range(PARAMS.prompts_per_step)]
    return dataset, build_records(dataset.items, histories, top, asked, PARAMS.history_length)


def measure(train: Callable[[], object]) -> str:
    """Train; CPU-seconds of a step and this process's peak memory in GB, as one line of JSON."""
    start = time.process_time()
    train()
    seconds = (time.process_time() - start) / STEPS
    peak = diagnostics.peak_memory_gb(torch.device("cpu"))
    return json.dumps({"cpu_seconds": seconds, "peak_gb": peak})


def own_ppo() -> str:
    """Our side of the comparison: ``measure`` in this process."""
    dataset, records = work()
    rewarder = Reward.of(PARAMS, study.catalogue_of(dataset.items))
    trainer = ppo.PPO(model.load_for(PARAMS, 0), rewarder, records, PARAMS, 0)
    return measure(lambda: trainer.train(STEPS))


def last_line(*command: str) -> str:
    """The last line that a command prints. ``RuntimeError`` with its stderr if it fails."""
    settings = {"TOKENIZERS_PARALLELISM": "false", "RECRL_PROGRESS": "off"}
    settings["PYTHONPATH"] = str(paths.ROOT)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return "".join(done.stdout.splitlines()[-1:])


def peer_environment(folder: str) -> str:
    """Python of a fresh environment with the peer's TRL before what this environment has."""
    venv.create(folder, with_pip=False)
    python = str(Path(folder, "Scripts" if os.name == "nt" else "bin", "python"))
    pip = (sys.executable, "-m", "pip", "--python", python)
    last_line(*pip, "install", "--quiet", "--no-deps", PEER)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    parent = Path(last_line(python, "-c", ask), "parent.pth")
    parent.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def main() -> None:
    """Measure both sides; print and store the table. ``against``: a ratio of ours to theirs."""
    ours = json.loads(last_line(sys.executable, "-m", "recrl_lib.pipeline.bench", "own-ppo"))
    with tempfile.TemporaryDirectory() as folder:
        python = peer_environment(folder)
        theirs = json.loads(last_line(python, "-m", "recrl_lib.pipeline.bench_trl"))
    speed, memory = "ppo_episodes_per_cpu_second", "ppo_peak_memory"
    rows = [
        (speed, "", EPISODES / ours["cpu_seconds"], "episodes/s"),
        (speed, TRL, theirs["cpu_seconds"] / ours["cpu_seconds"], "ratio"),
        (memory, TRL, ours["peak_gb"] / theirs["peak_gb"], "ratio"),
    ]
    table = pd.DataFrame(rows, columns=["work", "against", "value", "unit"])
    print(table.to_string(index=False, float_format="{:,.3f}".format))
    runs.write_atomic(paths.RUNS / "bench" / "bench.csv", table.to_csv(index=False))


if __name__ == "__main__":
    if "own-ppo" in sys.argv:
        print(own_ppo())
    else:
        main()
