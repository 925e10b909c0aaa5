"""``make bench``: what costs the most, each beside another way to do it, in one run.

``python -m recrl_lib.pipeline.bench [SECTION ...]``; all sections by default. Times are CPU-seconds
of one process (wall seconds on a GPU), so that other work on the machine weighs less. Ratios carry
over to other machines, seconds do not. The table is printed and kept in ``runs/bench/bench.csv``:
work, against (empty for an absolute value), value, unit.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recrl_lib import assets, data, params, paths, runs, study
from recrl_lib.explainer import item_texts, model, sampling
from recrl_lib.explainer.prompts import build_records, messages, prompt_ids
from recrl_lib.ranker import ranking, sasrec
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.training import diagnostics, ppo

PROMPTS, SAMPLES, TOKENS, ITEMS, STEPS = 8, 4, 40, 320, 2
PEER = "trl==1.12.0"  # the last release with a PPOTrainer
TRL = "trl_1.12"


@dataclass(frozen=True)
class Row:
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
    def texts(self) -> item_texts.ItemTexts:
        return item_texts.ItemTexts(self.reader, self.data.items["text"].tolist()[:ITEMS])

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

    @cached_property
    def reward(self) -> Reward:
        return Reward.of(self.params, study.catalogue_of(self.data.items))

    def sample(self, tokens: int = TOKENS) -> sampling.Rollout:
        generator = torch.Generator().manual_seed(0)
        settings = sampling.Settings(tokens, self.params.temperature, SAMPLES)
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


# --- sections -----------------------------------------------------------------------------------


def sampler(bench: Bench) -> Iterator[Row]:
    ids, mask = bench.repeated()
    settings = {"do_sample": True, "temperature": bench.params.temperature, "top_k": 0}

    def generate() -> None:
        lm, pad = bench.reader.lm, bench.reader.pad_id
        mask_ = mask.long()
        lm.generate(
            input_ids=ids,
            attention_mask=mask_,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            pad_token_id=pad,
            **settings,
        )

    tokens = int(bench.sample().mask.sum())
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


def items(bench: Bench) -> Iterator[Row]:
    bench.texts.states()
    ours = bench.seconds(bench.texts.vectors)

    @torch.no_grad()
    def encode() -> None:
        for _, part in bench.texts.batches:
            bench.reader.lm.model(input_ids=part.to(bench.device)).last_hidden_state.mean(1)

    yield Row("item_texts_per_second", "", ITEMS / ours, "items/s")
    yield Row("item_texts_per_second", "all_layers", bench.seconds(encode) / ours)


def shield(bench: Bench) -> Iterator[Row]:
    """The projection's share of a PPO step."""
    grams = subspaces.item_grams(bench.reader, bench.texts)[0]
    protected = subspaces.protect(grams, energy=bench.params.shield_energy)
    guard = projection.Shield(bench.reader, protected)
    line = ppo.PPO(bench.reader, bench.reward, bench.records, bench.params, 0, guard).step()
    guard.detach()
    yield Row("shield_seconds", "ppo_step", line["shield_seconds"] / line["step_seconds"])


def reward(bench: Bench) -> Iterator[Row]:
    texts = bench.sample().texts * 40
    records = [r for r in bench.records for _ in range(SAMPLES)] * 40
    seconds = bench.seconds(lambda: bench.reward(records, texts))
    yield Row("rewarded_texts_per_second", "", len(texts) / seconds, "texts/s")


def ranker(bench: Bench) -> Iterator[Row]:
    """A random catalogue and an untrained model: the cost does not depend on the weights."""
    n_items, users, length = 100_000, 2_000, 50
    rng, ranker = np.random.default_rng(0), sasrec.freeze(sasrec.SASRec(100_000))
    histories = list(rng.integers(1, n_items, (users, length)))
    targets = np.full(users, n_items)  # the one item that no history holds
    before = diagnostics.peak_memory_gb(torch.device("cpu"))
    start = time.process_time()
    ranking.target_ranks(ranker, histories, targets, None)
    yield Row("ranked_users_per_second", "", users / (time.process_time() - start), "users/s")
    more = diagnostics.peak_memory_gb(torch.device("cpu")) - before
    yield Row("ranking_memory", "all_scores", more / (users * n_items * 4 / 2**30))


def reading(bench: Bench, reviews: int = 1_000_000, books: int = 50_000) -> Iterator[Row]:
    """Amazon Books in the form of 2018, generated."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with gzip.open(Path(folder, "meta_Books.json.gz"), "wt", compresslevel=1) as out:
            for n in range(books):
                book = {
                    "asin": f"{n:010d}",
                    "title": f"Title {n}",
                    "category": ["Books", "Fantasy"],
                }
                out.write(json.dumps(book) + "\n")
        with gzip.open(Path(folder, "Books.json.gz"), "wt", compresslevel=1) as out:
            draws = zip(rng.integers(0, reviews // 20, reviews), rng.integers(0, books, reviews))
            for n, (user, book) in enumerate(draws):
                review = {"overall": 5.0, "reviewerID": f"A{user:013d}", "asin": f"{book:010d}"}
                out.write(json.dumps(review | {"unixReviewTime": 1_300_000_000 + n}) + "\n")
        start = time.process_time()
        data.load_for(params.Params(dataset="amazon-books-2018", data_dir=folder))
    rate = (reviews + books) / (time.process_time() - start)
    yield Row("read_lines_per_second", "", rate, "lines/s")


def trl(bench: Bench) -> Iterator[Row]:
    """Our PPO and TRL's PPOTrainer, each in a process of its own, on equal work; for CPUs."""
    p, reader = bench.params, bench.reader
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "model": str(assets.smollm2_folder()),
            "folder": folder,
            "prompts": [ids for ids in bench.prompts for _ in range(SAMPLES)],
            "tokens": TOKENS,
            "temperature": p.temperature,
            "epochs": p.ppo_epochs,
            "minibatches": p.minibatches,
            "learning_rate": p.learning_rate,
            "rank": p.lora_rank,
            "alpha": p.lora_alpha,
            "modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "layers": list(range(reader.cut, reader.n_layers)),
            "steps": STEPS,
            "threads": torch.get_num_threads(),
        }
        file = Path(folder, "task.json")
        file.write_text(json.dumps(task), encoding="utf-8")
        python = peer_environment(Path(folder, "peer"))
        ours = _child([sys.executable, "-m", "recrl_lib.pipeline.bench", "--own-ppo", str(file)])
        theirs = _child([python, "-P", str(Path(__file__).with_name("bench_trl.py")), str(file)])
    episodes = PROMPTS * SAMPLES
    yield Row("ppo_episodes_per_cpu_second", "", episodes / ours["cpu_seconds"], "episodes/s")
    yield Row("ppo_episodes_per_cpu_second", TRL, theirs["cpu_seconds"] / ours["cpu_seconds"])
    yield Row("ppo_peak_memory", TRL, ours["peak_gb"] / theirs["peak_gb"])


SECTIONS = {f.__name__: f for f in (sampler, update, items, shield, reward, ranker, reading, trl)}


def peer_environment(folder: Path) -> str:
    """Python of a fresh environment with the peer's TRL before what this environment has."""
    venv.create(folder, with_pip=False)
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [sys.executable, "-m", "pip", "--python", python]
    _output([*pip, "install", "--quiet", "--no-deps", PEER])
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    parent = Path(_output([python, "-c", ask]).strip(), "parent.pth")
    parent.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def own_ppo(path: str) -> None:
    """Our side of ``trl`` in a process of its own; prints what ``bench_trl`` prints."""
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    bench = Bench()
    trainer = ppo.PPO(bench.reader, bench.reward, bench.records, bench.params, 0)
    start = time.process_time()
    trainer.train(task["steps"])
    seconds = (time.process_time() - start) / task["steps"]
    peak = diagnostics.peak_memory_gb(bench.device)
    print(json.dumps({"cpu_seconds": seconds, "peak_gb": peak}))


def _child(command: list[str]) -> dict[str, float]:
    return json.loads(_output(command).splitlines()[-1])


def _output(command: list[str]) -> str:
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="time the parts that cost the most")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--own-ppo", metavar="TASK", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        parser.error(f"no section is called {', '.join(unknown)}; choose of {', '.join(SECTIONS)}")
    os.environ["RECRL_PROGRESS"] = "off"  # bars would cut the table
    if options.own_ppo:
        own_ppo(options.own_ppo)
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
    table = pd.DataFrame(rows, columns=["work", "against", "value", "unit"])
    runs.write_atomic(paths.RUNS / "bench" / "bench.csv", table.to_csv(index=False))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
