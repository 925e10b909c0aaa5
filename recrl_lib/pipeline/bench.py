"""``make bench``: what costs the most, each beside another way to do it, in one run.

``python -m recrl_lib.pipeline.bench [SECTION ...]``; all sections by default. Times are CPU-seconds
of one process (wall seconds on a GPU), so that other work on the machine weighs less. Ratios carry
over to other machines, seconds do not. The table is printed and kept in ``runs/bench/bench.csv``.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from recrl_lib import assets, data, params, paths, runs, study
from recrl_lib.explainer import model, sampling
from recrl_lib.explainer.prompts import build_records, messages, prompt_ids
from recrl_lib.scoring.reward import Reward
from recrl_lib.training import diagnostics, ppo

PROMPTS, SAMPLES, TOKENS, STEPS = 8, 4, 40, 2
PEER, TRL = "trl==1.12.0", "trl_1.12"  # the last release with a PPOTrainer


class Row(NamedTuple):
    """One measurement; with ``against`` a ratio of ours to the other, else absolute."""

    work: str
    against: str
    value: float
    unit: str = "ratio"


class Bench:
    """The laptop profile's explainer and real prompts, each made when first asked for."""

    def __init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
        self.params = params.resolve("laptop", max_new_tokens=TOKENS, **sizes)

    @cached_property
    def data(self) -> data.Dataset:
        return data.load_for(self.params)

    @cached_property
    def reader(self) -> model.Explainer:
        return model.load_for(self.params, 0, self.device)

    @cached_property
    def records(self) -> list[dict]:
        """The first users' histories and the most popular film."""
        histories = [g["item"].to_numpy() for _, g in self.data.interactions.groupby("user")]
        popular = self.data.interactions["item"].value_counts().index[:10].to_numpy()
        top = np.tile(popular, (len(histories), 1))
        return build_records(self.data.items, histories, top, [(u, 1) for u in range(PROMPTS)], 5)

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [prompt_ids(self.reader, messages(r)) for r in self.records]

    def trainer(self) -> ppo.PPO:
        reward = Reward.of(self.params, study.catalogue_of(self.data.items))
        return ppo.PPO(self.reader, reward, self.records, self.params, 0)

    def sample(self) -> sampling.Rollout:
        settings = sampling.Settings(TOKENS, self.params.temperature, SAMPLES)
        generator = torch.Generator().manual_seed(0)
        return sampling.sample(self.reader, self.prompts, settings, generator)

    def repeated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask) of every row's own prompt."""
        rows = [p for p in self.prompts for _ in range(SAMPLES)]
        return model.left_pad(rows, self.reader.pad_id, self.device)

    def seconds(self, function: Callable[[], object]) -> float:
        """Of one call, after one that warms up."""
        function()
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        start = clock()
        function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def sampler(bench: Bench) -> Iterator[Row]:
    (ids, mask), tokens = bench.repeated(), int(bench.sample().mask.sum())

    def generate() -> None:
        bench.reader.lm.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
            pad_token_id=bench.reader.pad_id, do_sample=True, top_k=0,
            temperature=bench.params.temperature,
        )  # fmt: skip

    ours, theirs = tokens / bench.seconds(bench.sample), len(ids) * TOKENS / bench.seconds(generate)
    yield Row("sampled_tokens_per_second", "", ours, "tokens/s")
    yield Row("sampled_tokens_per_second", "transformers_generate", ours / theirs)


def update(bench: Bench) -> Iterator[Row]:
    reader, rollout, (ids, prompt_mask) = bench.reader, bench.sample(), bench.repeated()
    full = torch.cat([ids, rollout.response], 1)[:, :-1]
    mask = torch.cat([prompt_mask, rollout.mask[:, :-1]], 1)

    def whole() -> None:
        positions = model.position_ids(mask)
        logits = reader.lm(input_ids=full, attention_mask=mask.long(), position_ids=positions)
        logp = torch.log_softmax(logits.logits[:, ids.shape[1] - 1 :].float(), -1)
        logp.gather(-1, rollout.response[..., None]).sum().backward()

    def ours() -> None:
        sampling.token_logprobs(reader, rollout, bench.params.temperature).sum().backward()

    ratio = bench.seconds(whole) / bench.seconds(ours)
    yield Row("update_pass_per_second", "all_layers_all_positions", ratio)


def trl(bench: Bench) -> Iterator[Row]:
    """Our PPO and TRL's PPOTrainer, each in a process of its own, on equal work; for CPUs."""
    episodes = PROMPTS * SAMPLES
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "task.json")
        task = peer_task(bench) | {"threads": torch.get_num_threads()}
        task["ppo"]["output_dir"] = folder
        file.write_text(json.dumps(task), encoding="utf-8")
        python = peer_environment(Path(folder, "peer"))
        script = str(Path(__file__).with_name("bench_trl.py"))
        ours = json.loads(_last_line(sys.executable, "-m", "recrl_lib.pipeline.bench", "--own-ppo"))
        theirs = json.loads(_last_line(python, "-P", script, str(file)))
    yield Row("ppo_episodes_per_cpu_second", "", episodes / ours["cpu_seconds"], "episodes/s")
    yield Row("ppo_episodes_per_cpu_second", TRL, theirs["cpu_seconds"] / ours["cpu_seconds"])
    yield Row("ppo_peak_memory", TRL, ours["peak_gb"] / theirs["peak_gb"])


SECTIONS = {f.__name__: f for f in (sampler, update, trl)}


def peer_task(bench: Bench) -> dict:
    """Our PPO step in TRL's names, for ``bench_trl``."""
    p, reader, rows = bench.params, bench.reader, PROMPTS * SAMPLES
    return {
        "model": str(assets.smollm2_folder()),
        "prompts": [ids for ids in bench.prompts for _ in range(SAMPLES)],
        "ppo": {
            "total_episodes": rows * STEPS, "per_device_train_batch_size": rows // p.minibatches,
            "gradient_accumulation_steps": p.minibatches, "num_mini_batches": p.minibatches,
            "num_ppo_epochs": p.ppo_epochs, "local_rollout_forward_batch_size": rows,
            "response_length": TOKENS, "temperature": p.temperature,
            "learning_rate": p.learning_rate,
        },
        "lora": {
            "r": p.lora_rank, "lora_alpha": p.lora_alpha,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "layers_to_transform": list(range(reader.cut, reader.n_layers)),
        },
    }  # fmt: skip


def peer_environment(folder: Path) -> str:
    """Python of a fresh environment with the peer's TRL before what this environment has."""
    venv.create(folder, with_pip=False)
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = (sys.executable, "-m", "pip", "--python", python)
    _last_line(*pip, "install", "--quiet", "--no-deps", PEER)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    parent = Path(_last_line(python, "-c", ask), "parent.pth")
    parent.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def own_ppo() -> None:
    """Our side of ``trl`` in a process of its own; prints what ``bench_trl`` prints."""
    trainer = Bench().trainer()
    start = time.process_time()
    trainer.train(STEPS)
    seconds = (time.process_time() - start) / STEPS
    peak = diagnostics.peak_memory_gb(torch.device("cpu"))
    print(json.dumps({"cpu_seconds": seconds, "peak_gb": peak}))


def _last_line(*command: str) -> str:
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return "".join(done.stdout.splitlines()[-1:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="time the parts that cost the most")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--own-ppo", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        parser.error(f"no section is called {', '.join(unknown)}; choose of {', '.join(SECTIONS)}")
    os.environ["RECRL_PROGRESS"] = "off"  # bars would cut the table
    if options.own_ppo:
        own_ppo()
        return 0
    bench, rows, failed = Bench(), [], []
    print(f"{bench.device}, {torch.get_num_threads()} threads, {bench.params.llm}")
    for name in options.sections or SECTIONS:
        try:
            for row in SECTIONS[name](bench):
                rows.append(row)
                print(f"{row.work:<30}{row.against:<26}{row.value:>12,.3f} {row.unit}", flush=True)
        except Exception as error:  # a part that cannot run here must not hide the others
            failed.append(name)
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
    table = pd.DataFrame(rows, columns=Row._fields)
    runs.write_atomic(paths.RUNS / "bench" / "bench.csv", table.to_csv(index=False))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
