"""``make bench``: what costs the most, each beside another way to do it, in one run.

``python -m recrl_lib.pipeline.bench [SECTION ...] [--json PATH]``; all sections by default. Times are CPU-seconds of one
process (wall seconds on a GPU), so that other work on the machine weighs less; read the ratios, which carry over,
rather than the seconds, which do not.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from recrl_lib import assets, params, paths, study
from recrl_lib.data import load_for, tables
from recrl_lib.explainer import item_texts, model
from recrl_lib.explainer.prompts import build_records, messages, prompt_ids
from recrl_lib.explainer.sampling import Rollout, token_logprobs
from recrl_lib.explainer.sampling import sample as sample_sampling
from recrl_lib.pipeline import bench_data, bench_ranker
from recrl_lib.runs import write_atomic
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.shield.replay import Replay
from recrl_lib.training import diagnostics, ppo

PROMPTS, SAMPLES, TOKENS, ITEMS, STEPS = 8, 4, 40, 320, 2
PEER = "trl==1.12.0"  # the last with a PPOTrainer


@dataclass
class Row:
    """One comparison. ``ratio``: how many times better ours is; NaN where there is no other way to compare with."""

    what: str
    unit: str
    ours: float
    peer: float = float("nan")
    peer_is: str = ""
    more_is_better: bool = True

    @property
    def ratio(self) -> float:
        return self.ours / self.peer if self.more_is_better else self.peer / self.ours

    def line(self) -> str:
        peer = (
            f"{self.peer:>10,.2f}{self.ratio:>8.2f} x   {self.peer_is}"
            if self.peer == self.peer
            else ""
        )
        return f"{self.what:<28}{self.unit:<20}{self.ours:>10,.2f}{peer}"


def clocked(function: Callable, device: torch.device) -> tuple[float, object]:
    """(seconds, result) of one call."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


class Bench:
    """What the sections share, made when first asked for: the laptop profile's explainer and real prompts."""

    def __init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.params = params.resolve(
            "laptop", prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES, max_new_tokens=TOKENS
        )

    @cached_property
    def data(self) -> tables.Dataset:
        return load_for(self.params)

    @cached_property
    def reader(self) -> model.Explainer:
        return model.load_for(self.params, 0, self.device)

    @cached_property
    def records(self) -> list[dict]:
        """The first users' histories and the most popular film."""
        histories = [
            g["item"].to_numpy() for _, g in self.data.interactions.groupby("user", sort=True)
        ]
        popular = self.data.interactions["item"].value_counts().index[:10].to_numpy()
        return build_records(
            self.data.items,
            histories,
            np.tile(popular, (len(histories), 1)),
            range(PROMPTS),
            [1] * PROMPTS,
            5,
        )

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [prompt_ids(self.reader, messages(r)) for r in self.records]

    @cached_property
    def reward(self) -> Reward:
        return Reward(self.params.reward, study.catalogue_of(self.data.items))

    def sample(self, tokens: int = TOKENS) -> Rollout:
        return sample_sampling(
            self.reader,
            self.prompts,
            SAMPLES,
            tokens,
            self.params.temperature,
            torch.Generator().manual_seed(0),
        )

    @cached_property
    def rollout(self) -> Rollout:
        return self.sample()

    @cached_property
    def repeated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask) of every row's own prompt."""
        return model.left_pad(
            [p for p in self.prompts for _ in range(SAMPLES)], self.reader.pad_id, self.device
        )


# --- sections -----------------------------------------------------------------------------------


def sampling(bench: Bench) -> list[Row]:
    reader, (ids, mask) = bench.reader, bench.repeated
    bench.sample(2)  # packs the weights, once per model
    settings = dict(
        do_sample=True,
        temperature=bench.params.temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=reader.pad_id,
    )

    def generate(tokens: int) -> int:
        out = reader.lm.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=tokens, **settings
        )
        return int((out[:, ids.shape[1] :] != reader.pad_id).sum())

    def rates(run: Callable[[int], int]) -> tuple[float, float]:
        """Tokens a second, (all in, decoding alone: less the time to the first token)."""
        (first, n), (whole, total) = (
            clocked(lambda: run(1), bench.device),
            clocked(lambda: run(TOKENS), bench.device),
        )
        return total / whole, (total - n) / (whole - first)

    ours, theirs = rates(lambda n: int(bench.sample(n).mask.sum())), rates(generate)
    return [
        Row(name, "tokens / s", a, b, "transformers' generate")
        for name, a, b in zip(
            (f"sample {PROMPTS} x {SAMPLES}, all in", "decoding alone"), ours, theirs
        )
    ]


def update(bench: Bench) -> list[Row]:
    reader, rollout, (ids, prompt_mask) = bench.reader, bench.rollout, bench.repeated
    full, full_mask = (
        torch.cat([ids, rollout.response], 1)[:, :-1],
        torch.cat([prompt_mask, rollout.mask[:, :-1]], 1),
    )

    def whole() -> None:
        logits = reader.lm(
            input_ids=full,
            attention_mask=full_mask.long(),
            position_ids=model.position_ids(full_mask),
        ).logits
        torch.log_softmax(logits[:, ids.shape[1] - 1 :].float(), -1).gather(
            -1, rollout.response[..., None]
        ).sum().backward()

    tokens = int(full_mask.sum())
    ours, _ = clocked(
        lambda: token_logprobs(reader, rollout, bench.params.temperature).sum().backward(),
        bench.device,
    )
    plain, _ = clocked(whole, bench.device)
    return [
        Row(
            "update, one pass",
            "tokens / s",
            tokens / ours,
            tokens / plain,
            "all layers, every position through the head",
        )
    ]


def items(bench: Bench) -> list[Row]:
    texts = item_texts.ItemTexts(bench.reader, bench.data.items["text"].tolist()[:ITEMS])
    texts.states()
    ours, _ = clocked(texts.vectors, bench.device)

    @torch.no_grad()
    def encode() -> None:
        for _, part in texts.batches:
            bench.reader.lm.model(input_ids=part.to(bench.device)).last_hidden_state.mean(1)

    plain, _ = clocked(encode, bench.device)
    return [Row("re-encode items", "items / s", ITEMS / ours, ITEMS / plain, "all layers")]


def shield(bench: Bench) -> list[Row]:
    """The projection alone, as PPO has it in an arm that settles, and with the profile's replay, which reads item texts at every update."""
    texts = item_texts.ItemTexts(bench.reader, bench.data.items["text"].tolist()[:ITEMS])
    protected = subspaces.subspaces(
        subspaces.item_grams(bench.reader, texts)[0], bench.params.shield_energy
    )
    base, rows = texts.base_vectors(), []
    width = base.shape[1]
    replay = Replay(
        bench.reader,
        texts,
        base,
        torch.eye(width)[: bench.params.ranker_dim],
        bench.params.shield_penalty,
    )
    for what, added in (("projection in a PPO step", None), ("projection and replay", replay)):
        guard = projection.Shield(bench.reader, protected, replay=added)
        line = ppo.PPO(bench.reader, bench.reward, bench.records, bench.params, 0, guard).step()
        guard.detach()
        rows.append(Row(what, "% of its time", 100 * line["shield_seconds"] / line["step_seconds"]))
    return rows


def reward(bench: Bench) -> list[Row]:
    texts, records = (
        bench.rollout.texts * 40,
        [r for r in bench.records for _ in range(SAMPLES)] * 40,
    )
    seconds, _ = clocked(lambda: bench.reward(records, texts), torch.device("cpu"))
    return [Row("reward", "texts / s", len(texts) / seconds)]


def trl(bench: Bench) -> list[Row]:
    """Shielded PPO (no shield) and TRL's PPOTrainer, each in a process of its own, on equal work."""
    if bench.device.type != "cpu":
        raise RuntimeError(
            "the comparison with TRL is for CPUs; hide the GPU (CUDA_VISIBLE_DEVICES=) to run it"
        )
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps(ppo_task(bench, folder)), encoding="utf-8")
        python = peer_environment(Path(folder) / "peer")
        ours = _child([sys.executable, "-m", "recrl_lib.pipeline.bench", "--own-ppo", str(task)])
        theirs = _child([python, "-P", str(Path(__file__).with_name("bench_trl.py")), str(task)])
    rows = PROMPTS * SAMPLES
    return [
        Row(
            "PPO step",
            "episodes / cpu-s",
            rows / ours["cpu_seconds"],
            rows / theirs["cpu_seconds"],
            f"PPOTrainer of {PEER}",
        ),
        Row(
            "PPO step",
            "episodes / wall s",
            rows / ours["wall_seconds"],
            rows / theirs["wall_seconds"],
            f"PPOTrainer of {PEER}",
        ),
        Row(
            "PPO peak memory",
            "GiB",
            ours["peak_gb"],
            theirs["peak_gb"],
            f"PPOTrainer of {PEER}",
            more_is_better=False,
        ),
    ]


SECTIONS = {f.__name__: f for f in (sampling, update, items, shield, reward, trl)}
ELSEWHERE = {"ranker": bench_ranker.main, "data": bench_data.main}  # print tables of their own


# --- the comparison with TRL --------------------------------------------------------------------


def ppo_task(bench: Bench, folder: str) -> dict:
    """What both trainers are to do: a batch of prompts, each as often as it is sampled, and all settings."""
    p, reader = bench.params, bench.reader
    return dict(
        model=str(assets.smollm2_folder()),
        folder=folder,
        prompts=[ids for ids in bench.prompts for _ in range(SAMPLES)],
        tokens=TOKENS,
        temperature=p.temperature,
        epochs=p.ppo_epochs,
        minibatches=p.minibatches,
        learning_rate=p.learning_rate,
        rank=p.lora_rank,
        alpha=p.lora_alpha,
        modules=list(model.ADAPTED),
        layers=list(range(reader.cut, reader.n_layers)),
        steps=STEPS,
        threads=torch.get_num_threads(),
    )


def peer_environment(folder: Path) -> str:
    """Python of a fresh environment with the peer's TRL before everything that this environment has."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    _output(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            PEER,
        ]
    )
    packages = _output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    ).strip()
    Path(packages, "parent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return str(python)


def own_ppo(path: str) -> None:
    """Our side of ``trl``, in a process of its own; prints what ``bench_trl`` prints."""
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    bench = Bench()
    trainer = ppo.PPO(bench.reader, bench.reward, bench.records, bench.params, 0)
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.train(task["steps"])
    print(
        json.dumps(
            {
                "steps": task["steps"],
                "cpu_seconds": (time.process_time() - cpu) / task["steps"],
                "wall_seconds": (time.perf_counter() - wall) / task["steps"],
                "peak_gb": diagnostics.peak_memory_gb(bench.device),
            }
        )
    )


def _child(command: list[str]) -> dict:
    return json.loads(_output(command).splitlines()[-1])


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(paths.ROOT)},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recrl_lib.pipeline.bench", description="time the parts that cost the most"
    )
    parser.add_argument(
        "sections", nargs="*", help=f"of {', '.join([*SECTIONS, *ELSEWHERE])}; default: all"
    )
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--own-ppo", metavar="TASK", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := set(options.sections) - {*SECTIONS, *ELSEWHERE}:
        parser.error(
            f"no section is called {', '.join(sorted(unknown))}; sections: {', '.join([*SECTIONS, *ELSEWHERE])}"
        )
    os.environ["RECRL_PROGRESS"] = "off"  # bars would cut the table
    if options.own_ppo:
        own_ppo(options.own_ppo)
        return 0
    bench, table = Bench(), []
    print(
        f"{bench.device}, {torch.get_num_threads()} threads, {bench.params.llm}, adapters on the top {bench.params.lora_layers} layers"
    )
    print(f"{'':<48}{'ours':>10}{'peer':>10}{'ratio':>10}")
    failed = []
    for name, section in {**SECTIONS, **ELSEWHERE}.items():
        if options.sections and name not in options.sections:
            continue
        try:
            for row in section(bench) if name in SECTIONS else section() or ():
                print(row.line(), flush=True)
                table.append(
                    {"section": name, **asdict(row)}
                    | ({"ratio": row.ratio} if row.peer == row.peer else {"peer": None})
                )
        except Exception as error:  # one part that cannot run here must not hide the others
            print(
                f"{name}: FAILED: {type(error).__name__}: {error}{getattr(error, 'stderr', None) or ''}",
                flush=True,
            )
            failed.append(name)
    if options.json:
        where = {
            "device": str(bench.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rows": table,
        }
        write_atomic(options.json, json.dumps(where, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
