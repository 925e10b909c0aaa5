"""The frontier of learning against ranking moved: one short training and one measurement a point.

The training is supervised: the likelihood of explanations composed from metadata, the signal of the
warm start, so that a point costs minutes and not PPO's quarter of an hour. What is measured is what
notebook 06 measures. A seed draws the adapters' first values and the order of the explanations;
validation users and held-out items are the same for all points.
"""

import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from time import process_time

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from recrl_lib.evaluation import ranking_change, stats
from recrl_lib.evaluation.supervised import Demonstrations, activated_lora
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer
from recrl_lib.paths import LIBRARY, REFERENCE
from recrl_lib.progress import track
from recrl_lib.ranker import ranking
from recrl_lib.runs import write_atomic
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import GramMatrices, Replay, Shield, fit_alignment, leak, projection, protect
from recrl_lib.shield.subspaces import readout_of
from recrl_lib.study import Study

BATCH, LR = 4, 3e-3  # the warm start's
MAX_NORM = 1.0  # gradient clipping, before the shield
MODES = (*projection.MODES, "alora")
SETS = {"none": [], **yaml.safe_load((LIBRARY / "grids.yaml").read_text(encoding="utf-8"))}
CONTRASTIVE = {"basis": "contrastive", "energy": 0.99}
REPLAYED = {**CONTRASTIVE, "penalty": 1000.0}

# The study's target: at least these shares of the unshielded gain, of places of the top 10 and of
# first places, and a relative change of NDCG@10 below the last.
GAIN, HELD, FIRST, NDCG = 0.9, 0.99, 0.98, 0.005


@dataclass(frozen=True)
class Point:
    """One setting and its seed. Strength is ``energy``, or ``rank`` where that is above 0."""

    mode: str = "update"
    basis: str = "activation"
    energy: float = 0.99
    rank: int = 0
    penalty: float = 0.0
    steps: int = 20
    seed: int = 0
    replay_steps: int = 0  # steps of the replay alone after the training

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"frontier: mode {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.replay_steps and (not self.penalty or self.mode in ("none", "alora")):
            raise ValueError("frontier: replay_steps needs a mode of the shield and a penalty")

    @property
    def curve(self) -> str:
        """The line of the figure this point lies on: its strength varies along it."""
        after = ", replay steps after" if self.replay_steps else ""
        if self.mode in ("none", "penalty", "align", "alora"):
            names = {"none": "no shield, stopped early", "penalty": "replay penalty"}
            return names.get(self.mode, self.mode) + after
        replay = f" {self.energy:g}, with replay" if self.penalty else ""
        return f"{self.mode}, {self.basis}{replay}{after}"


SETTING = [f.name for f in fields(Point)]


def named(name: str, seeds: int, steps: int) -> list[Point]:
    """The points of a set in ``grids.yaml``, all settings of a seed before the next seed."""
    if name not in SETS:
        raise ValueError(f"frontier_points={name!r}: choose one of {', '.join(SETS)}")
    points = []
    for setting in SETS[name]:
        given = dict(setting)
        taken = max(1, round(steps * given.pop("share", 1)))
        points.append(Point(**given, steps=taken))
    return [replace(point, seed=seed) for seed in range(seeds) for point in points]


# --- one point ------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What all points share: model, study, Gram matrices, and the explanations taught and asked."""

    explainer: Explainer
    study: Study
    items: ItemTexts
    held: set[int]  # items that no basis, penalty or alignment has seen
    grams: GramMatrices
    taught: Demonstrations  # of PPO users
    asked: Demonstrations  # of validation users: what a point learned decides settings
    n_boot: int = 10_000
    untuned: dict[str, float] = field(init=False)
    vectors: Tensor = field(init=False)  # item vectors (I+1, d) of the untuned model
    ranking: pd.DataFrame = field(init=False)  # its ranking, a row a user

    def __post_init__(self):
        if self.study.text is None:
            raise ValueError("text='none': no item vectors to protect; set frontier_points=none")
        self.vectors = self.study.text
        self.ranking, _ = ranking_change.ranking_table(self.study, self.vectors)
        with self.explainer.reference():
            loss, (reward, _) = self.asked.mean_loss(), self.reward()
        self.untuned = {"loss_base": loss, "reward_base": reward}

    @property
    def seen(self) -> set[int]:
        return set(range(1, self.items.n_items + 1)) - self.held

    def replay(self, point: Point) -> Replay | None:
        if not point.penalty:
            return None
        given = (self.explainer, self.items, self.vectors, readout_of(self.study.ranker))
        return Replay(*given, point.penalty, point.seed, self.seen)

    def reward(self) -> tuple[float, float]:
        """(mean reward of greedy texts for the users asked, its standard error over users)."""
        score = Reward("grounded", self.study.catalogue)
        reward, _ = score(self.asked.records, self.asked.greedy())
        return float(reward.mean()), float(reward.std(ddof=1) / sqrt(len(reward)))


def probes(
    study: Study, seen: set[int], rng: np.random.Generator, n: int = 256
) -> dict[int, Tensor]:
    """For ``n`` random items of ``seen``, the ranker's state (d_rank,) of a random user."""
    items = np.array(sorted(seen))
    users, order = rng.integers(0, len(study.users), len(items)), rng.permutation(len(items))[:n]
    model, rows = study.ranker, [study.split.with_valid[user] for user in users[order]]
    with torch.no_grad():
        padded = ranking.pad_sequences(rows, model.max_len)
        return dict(zip(items[order].tolist(), model(padded, model.item_table(study.text))[:, -1]))


def run_point(shared: Comparison, point: Point) -> dict:
    """Train and measure one point: its fields, then every measure, as one flat row."""
    explainer, grams = shared.explainer, shared.grams
    protected = protect(grams, point.basis, point.energy, point.rank)
    with activated_lora(explainer) if point.mode == "alora" else nullcontext():
        restart_adapters(explainer, point.seed)
        shield = None
        if point.mode not in ("none", "alora"):
            shield = Shield(explainer, protected, point.mode, shared.replay(point))
        seconds = tune(shared, point, shield)
        measured = {"leak": leak(explainer, protected), **measure(shared, point)}
    # A mode that projects nothing shows its leak against the subspaces it was not held to.
    prompts = grams.behind("contrastive")
    held = protected if point.mode in (*projection.PROJECTING, "restart") else {}
    shares = {
        "rank_mean": [s.rank for s in held.values()],
        "items_inside": [s.energy for s in held.values()],
        "explanations_inside": [s.holds(prompts[name]) for name, s in held.items()],
    }
    row = {**asdict(point), "curve": point.curve}
    row |= {name: float(np.mean(values)) if values else 0.0 for name, values in shares.items()}
    return {**row, **measured, "train_cpu_seconds": seconds}


@torch.no_grad()
def restart_adapters(explainer: Explainer, seed: int) -> None:
    """B = 0 and A drawn anew, from PEFT's own distribution."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, module in explainer.adapted_modules():
        adapter = module.active_adapters[0]
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        drawn = torch.empty(a.shape)
        a.copy_(torch.nn.init.kaiming_uniform_(drawn, a=sqrt(5), generator=generator))
        b.zero_()


def tune(shared: Comparison, point: Point, shield: Shield | None) -> float:
    """Adam on the explanations taught, then the replay alone if asked for; CPU seconds spent."""
    parameters, taught = shared.explainer.adapter_parameters(), shared.taught
    start = process_time()
    optimizer = torch.optim.Adam(parameters, lr=LR)
    if shield:
        shield.attach(optimizer)
    rng = np.random.default_rng(point.seed)
    order: list[int] = []
    for _ in track(range(point.steps), "frontier steps"):
        if len(order) < BATCH:
            order = rng.permutation(len(taught.ids)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad(set_to_none=True)
        taught.loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
    if shield:
        shield.detach()
        if point.replay_steps:
            shield.run_replay(point.replay_steps)
    return process_time() - start


@torch.no_grad()
def measure(shared: Comparison, point: Point) -> dict:
    """Learning (loss, reward of the users asked) and ranking moved, of the adapters as they are."""
    study = shared.study
    vectors = shared.items.vectors()  # no offsets are given: activated LoRA stays out
    if point.mode == "align":
        rng = np.random.default_rng(point.seed)
        items = np.array(sorted(shared.seen))
        vectors = fit_alignment(vectors, shared.vectors, items, rng)(vectors)
    table, top = ranking_change.ranking_table(study, vectors)
    after, before = table["ndcg"].to_numpy(), shared.ranking["ndcg"].to_numpy()
    change, low, high = stats.bootstrap_mean(
        after - before, shared.n_boot, np.random.default_rng(0)
    )
    reward, error = shared.reward()
    names = ["overlap", "set_same", "exact", "top1_same", "rbo", "kendall_tau", "ndcg"]
    groups = {"seen": shared.seen, "held": shared.held}
    moved = ranking_change.change_by_group(study, vectors, top, groups).items()
    return {
        **shared.untuned,
        "loss": shared.asked.mean_loss(),
        "reward": reward,
        "reward_se": error,
        **table[names].mean().to_dict(),
        "ndcg_base": float(before.mean()),
        "ndcg_change": change,
        "ndcg_change_lo": low,
        "ndcg_change_hi": high,
        **ranking_change.score_change(study, vectors),
        **{f"{name}_{group}": x for group, found in moved for name, x in found.items()},
    }


# --- many points ----------------------------------------------------------------------------------


def run_points(shared: Comparison, points: list[Point]) -> Iterator[dict]:
    """The rows of ``points``, as they are finished; a process each on cores that are idle.

    Products this small share badly: two processes finish more points than two threads. Every row
    but its CPU seconds is what ``run_point`` gives here, bit for bit. The processes are forked, for
    ``shared`` is too large to send; joblib cannot hand back rows of forked ones as they end.
    """
    global _shared
    workers = min(len(points), idle_cores())
    if workers < 2:
        yield from (run_point(shared, point) for point in points)
        return
    _shared = shared
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        try:
            futures = [pool.submit(_run_point, point) for point in points]
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def idle_cores() -> int:
    """Cores that points may fill: 1 where torch uses them, in a job of a batch, and off Linux."""
    alone = torch.get_num_threads() > 1 or torch.cuda.is_available()  # a fork loses their threads
    if alone or sys.platform != "linux" or "RECRL_BATCH" in os.environ:
        return 1
    return len(os.sched_getaffinity(0))


def _run_point(point: Point) -> dict:
    os.environ["RECRL_PROGRESS"] = "off"  # the parent counts the points
    return run_point(_shared, point)


def sweep(shared: Comparison, points: list[Point], path: Path, key: str) -> pd.DataFrame:
    """The rows of ``points`` in their order; those that the CSV at ``path`` lacks are run.

    Rows with another ``key`` (``runs.stage_key``: of the code and parameters) are run again.
    """
    rows = pd.read_csv(path).to_dict("records") if Path(path).exists() else []
    rows = [row for row in rows if row["key"] == key and set(SETTING) <= set(row)]
    places = {_setting(asdict(point)): n for n, point in enumerate(points)}
    done = {_setting(row) for row in rows}
    todo = [point for point in points if _setting(asdict(point)) not in done]
    for row in track(run_points(shared, todo), "frontier", total=len(todo)):
        rows.append({**row, "key": key})
        rows.sort(key=lambda row: places.get(_setting(row), -1))
        out = io.StringIO()
        pd.DataFrame(rows).to_csv(out, index=False, lineterminator="\n")
        write_atomic(path, out.getvalue())
    return pd.DataFrame([row for row in rows if _setting(row) in places])


def _setting(row: dict) -> tuple:
    return tuple(str(row[name]) for name in SETTING)


# --- what they say --------------------------------------------------------------------------------


def with_gains(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with ``gain_loss``, ``gain_reward``: shares of the same seed's unshielded gain."""
    table = table.copy()
    free = table[table["mode"] == "none"].sort_values("steps").groupby("seed").last()
    for name, sign in (("loss", -1), ("reward", 1)):
        gain = sign * (table[name] - table[f"{name}_base"])
        whole = sign * (free[name] - free[f"{name}_base"])
        table[f"gain_{name}"] = gain / table["seed"].map(whole)
    return table


def of_setting(table: pd.DataFrame, setting: dict) -> pd.DataFrame:
    """The rows of a setting (fields of ``Point``, else defaults) with the most steps; by seed."""
    point = Point(**setting)
    wanted = {**asdict(point), "curve": point.curve, "steps": table["steps"].max()}
    del wanted["seed"]
    return table[(table[list(wanted)] == list(wanted.values())).all(axis=1)].set_index("seed")


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row a setting: means over seeds; of the main measures least and most (``_lo``, ``_hi``).

    ``stopped_early``: the overlap of an unshielded training that has learned as much, on lines in
    ``gain_loss`` from nothing learned and nothing moved through the unshielded points.
    """
    table = with_gains(table)
    setting = [name for name in SETTING if name != "seed"] + ["curve"]
    numbers = [c for c in table.select_dtypes("number") if c not in (*setting, "seed")]
    grouped = table.groupby(setting, sort=False)
    out = grouped[numbers].mean()
    for name in ("gain_loss", "gain_reward", "overlap", "top1_same", "set_same"):
        out[f"{name}_lo"], out[f"{name}_hi"] = grouped[name].min(), grouped[name].max()
    out = out.assign(seeds=grouped.size()).reset_index()
    free = out[(out["mode"] == "none") & (out["gain_loss"] > 0)].sort_values("gain_loss")
    line = [0.0, *free["gain_loss"]], [1.0, *free["overlap"]]
    return out.assign(stopped_early=np.interp(out["gain_loss"], *line))


def published(name: str = "frontier") -> pd.DataFrame:
    """The rows of ``frontier``, ``capitals`` or ``settle`` in ``runs/reference/frontier``.

    Columns ``replay``, ``refresh`` and ``inputs`` are of null results that the code no longer has.
    """
    rows = pd.read_csv(REFERENCE / "frontier" / f"{name}.csv")
    if "curve" in rows:
        rows["curve"] = rows["curve"].str.replace("settled", "replay steps after")
    return rows.rename(columns={"settle": "replay_steps"})
