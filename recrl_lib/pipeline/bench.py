"""``make bench``: our PPO beside TRL's PPOTrainer and the first edition's PPO, on equal work.

Each trains the laptop profile's explainer for a few steps on the CPU, in a process of its own. Time
is CPU-seconds of that process, so that other work on the machine weighs less. Ratios carry over to
other machines, seconds do not. The table is printed and kept in ``runs/bench/bench.csv``.

``gemm_bound``: the time that the matrix products of a step would take at the rate of one large
product on this machine; its row is the share of the step's CPU time that they explain.
"""

import json
import os
import shutil
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
from torch.utils.flop_counter import FlopCounterMode

from recrl_lib import data, paths, runs, study
from recrl_lib.explainer import model
from recrl_lib.explainer.prompts import build_records
from recrl_lib.params import resolve
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import Shield, protect
from recrl_lib.training import diagnostics, ppo

PEER, TRL = "trl==1.12.0", "trl_1.12"  # the last release with a PPOTrainer
FIRST = "7fb97b3"  # the first edition's commit
# The reward that all three have, of metadata alone.
ASKED = {"reward": "grounded", "intents": "why=1", "shield_penalty": 0.0, "shield_replay_steps": 0}
PARAMS, STEPS = resolve("laptop", **ASKED), 2
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
    """``measure`` of ours, the products of a step, and the share of a shield in it."""
    runs.choose_products()
    dataset, records = work()
    rewarder = Reward.of(PARAMS, study.catalogue_of(dataset.items))
    explainer = model.load_for(PARAMS, 0)
    width = explainer.lm.config.hidden_size  # of the inputs of all adapted layers
    eye = torch.eye(width, dtype=torch.float64)
    grams = {key: eye for _, key, _ in explainer.adapted_modules()}
    shield = Shield(explainer, protect(grams, rank=2 * width // 3))
    trainer = ppo.PPO(explainer, rewarder, records, PARAMS, 0, shield)
    found = json.loads(measure(lambda: trainer.train(STEPS)))
    shielded = sum(row["shield_seconds"] for row in trainer.rows)
    found["shield"] = shielded / sum(row["step_seconds"] for row in trainer.rows)
    with FlopCounterMode(display=False) as counter:
        trainer.step()
    return json.dumps(found | {"flops": counter.get_total_flops(), "rate": product_rate()})


def product_rate(rows: int = 2048, width: int = 1536, repeats: int = 40) -> float:
    """FLOP a CPU-second of float32 products of (rows, width) and (width, width) matrices."""
    a, b = torch.randn(rows, width), torch.randn(width, width)
    start = time.process_time()
    for _ in range(repeats):
        torch.mm(a, b)
    return repeats * 2 * rows * width * width / (time.process_time() - start)


# Run in the first edition's tree, whose names it uses.
FIRST_PPO = """
import json, sys, time
import numpy as np, torch
from recrl_lib import config, datasets, explainer, ppo, rewards, study
steps, history, sizes = json.loads(sys.argv[1])
params = config.resolve("laptop", **sizes)
data = datasets.load_for(params)
histories = [g["item"].to_numpy() for _, g in data.interactions.groupby("user", sort=True)]
popular = data.interactions["item"].value_counts().index[:10].to_numpy()
n, top = params.prompts_per_step, np.tile(popular, (len(histories), 1))
records = explainer.build_records(data.items, histories, top, range(n), [1] * n, history)
reward = rewards.Reward("grounded", study.catalogue_of(data.items))
reader = explainer.load_for(params, 0, torch.device("cpu"))
trainer, start = ppo.PPO(reader, reward, records, params, 0), time.process_time()
trainer.train(steps)
seconds = (time.process_time() - start) / steps
print(json.dumps({"cpu_seconds": seconds}))
"""


def first_edition(folder: str) -> str:
    """``measure`` of the first edition's PPO, whose tree is unpacked from the repository."""
    archive = Path(folder, "first.tar")
    last_line("git", "-C", str(paths.ROOT), "archive", "-o", str(archive), FIRST, "recrl_lib")
    shutil.unpack_archive(archive, Path(folder, "first"), filter="data")
    names = "prompts_per_step samples_per_prompt max_new_tokens ppo_epochs minibatches lora_layers"
    sizes = {name: getattr(PARAMS, name) for name in [*names.split(), "temperature"]}
    given = json.dumps([STEPS, PARAMS.history_length, sizes])
    return last_line(sys.executable, "-c", FIRST_PPO, given, tree=str(Path(folder, "first")))


def last_line(*command: str, tree: str = str(paths.ROOT)) -> str:
    """The last line that a command prints, in ``tree``. ``RuntimeError`` with its stderr."""
    settings = {"TOKENIZERS_PARALLELISM": "false", "RECRL_PROGRESS": "off", "PYTHONPATH": tree}
    env = os.environ | settings
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tree)
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
        python = peer_environment(str(Path(folder, "peer")))
        theirs = json.loads(last_line(python, "-m", "recrl_lib.pipeline.bench_trl"))
        first = json.loads(first_edition(folder))
    speed, memory, seconds = "ppo_episodes_per_cpu_second", "ppo_peak_memory", ours["cpu_seconds"]
    rows = [
        (speed, "", EPISODES / seconds, "episodes/s"),
        (speed, TRL, theirs["cpu_seconds"] / seconds, "ratio"),
        (speed, "first_edition", first["cpu_seconds"] / seconds, "ratio"),
        (memory, TRL, ours["peak_gb"] / theirs["peak_gb"], "ratio"),
        ("ppo_step_flops", "", ours["flops"] / 1e9, "GFLOP"),
        ("product_rate", "", ours["rate"] / 1e9, "GFLOP/s"),
        ("ppo_step_flops", "gemm_bound", ours["flops"] / ours["rate"] / seconds, "ratio"),
        ("shield_seconds", "ppo_step", ours["shield"], "ratio"),
    ]
    table = pd.DataFrame(rows, columns=["work", "against", "value", "unit"])
    print(table.to_string(index=False, float_format="{:,.3f}".format))
    runs.write_atomic(paths.RUNS / "bench" / "bench.csv", table.to_csv(index=False))


if __name__ == "__main__":
    if "own-ppo" in sys.argv:
        print(own_ppo())
    else:
        main()
