"""The frontier of learning against ranking moved: one short training and one measurement a point.

The training is supervised: the likelihood of explanations composed from metadata, as in the warm
start, so that a point costs minutes. A seed draws the adapters' first values and the order of the
explanations; the rest is the same for all points.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from math import sqrt
from pathlib import Path
from time import process_time

import numpy as np
import pandas as pd
import torch
import yaml

from recrl_lib.evaluation import ranking_change, stats
from recrl_lib.evaluation.supervised import Demonstrations, activated_lora, aligned
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer
from recrl_lib.paths import LIBRARY, REFERENCE
from recrl_lib.progress import track
from recrl_lib.runs import write_atomic
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import GramMatrices, Replay, Shield, leak, projection, protect
from recrl_lib.shield.subspaces import readout_of
from recrl_lib.study import Study

BATCH, LR = 4, 3e-3  # the warm start's
MAX_NORM = 1.0  # gradient clipping, before the shield
BOOTSTRAP = 10_000  # resamples of users
MODES = ("none", *projection.MODES, "align", "alora")
SETS = {"none": [], **yaml.safe_load((LIBRARY / "grids.yaml").read_text(encoding="utf-8"))}


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
        if self.replay_steps and (not self.penalty or self.mode not in projection.MODES):
            raise ValueError("frontier: replay_steps needs a mode of the shield and a penalty")

    @property
    def curve(self) -> str:
        """The line of the figure this point lies on: its strength varies along it."""
        names = {"none": "no shield, stopped early", "penalty": "replay penalty"}
        names |= {"align": "align", "alora": "alora"}
        replay = f" {self.energy:g}, with replay" if self.penalty else ""
        name = names.get(self.mode, f"{self.mode}, {self.basis}{replay}")
        return name + (", replay steps after" if self.replay_steps else "")


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

    def __post_init__(self):
        if self.study.text is None:
            raise ValueError("text='none': a frontier needs a ranker that reads item texts")
        self.text = self.study.text
        self.seen = set(range(1, self.items.n_items + 1)) - self.held
        self.ranking, _ = ranking_change.ranking_table(self.study, self.text)
        with self.explainer.reference():
            self.untuned = {"loss_base": self.asked.mean_loss(), "reward_base": self.reward()[0]}

    def reward(self) -> tuple[float, float]:
        """(mean reward of greedy texts for the users asked, its standard error over users)."""
        score = Reward("grounded", self.study.catalogue)
        reward, _ = score(self.asked.records, self.asked.greedy())
        return float(reward.mean()), float(reward.std(ddof=1) / sqrt(len(reward)))


def run_point(shared: Comparison, point: Point) -> dict:
    """Train and measure one point: its fields, then every measure, as one flat row."""
    explainer, grams = shared.explainer, shared.grams
    protected = protect(grams, point.basis, point.energy, point.rank)
    with activated_lora(explainer) if point.mode == "alora" else nullcontext():
        shield = replay = None
        if point.penalty:
            reader = explainer, shared.items, shared.text, readout_of(shared.study.ranker)
            replay = Replay(*reader, point.penalty, point.seed, shared.seen)
        if point.mode in projection.MODES:
            shield = Shield(explainer, protected, point.mode, replay)
        seconds = tune(shared, point, shield)
        measured = {"leak": leak(explainer, protected), **measure(shared, point)}
    # A mode that projects nothing shows its leak against the subspaces it was not held to.
    held = protected if point.mode in (*projection.PROJECTING, "restart") else {}
    prompts = grams.prompts or {}
    inside = [(s.rank, s.energy, s.holds(prompts[name])) for name, s in held.items()]
    shares = np.mean(inside or [(0, 0, 0)], axis=0).tolist()
    row = {**asdict(point), "curve": point.curve, **measured, "train_cpu_seconds": seconds}
    return row | dict(zip(("rank_mean", "items_inside", "explanations_inside"), shares))


def tune(shared: Comparison, point: Point, shield: Shield | None) -> float:
    """Fresh adapters, Adam on the explanations taught, the replay alone if asked; CPU seconds."""
    explainer, taught, rng = shared.explainer, shared.taught, np.random.default_rng(point.seed)
    with torch.random.fork_rng():
        torch.manual_seed(point.seed)
        for _, _, module in explainer.adapted_modules():
            module.reset_lora_parameters(module.active_adapters[0], True)
    parameters, order, start = explainer.adapter_parameters(), [], process_time()
    optimizer = torch.optim.Adam(parameters, lr=LR)
    if shield:
        shield.attach(optimizer)
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
        vectors = aligned(vectors, shared.text, np.array(sorted(shared.seen)), rng)
    table, top = ranking_change.ranking_table(study, vectors)
    before = shared.ranking["ndcg"]
    change = stats.bootstrap(table["ndcg"] - before, 1, BOOTSTRAP, np.random.default_rng(0))
    names = ["overlap", "set_same", "exact", "top1_same", "rbo", "kendall_tau", "ndcg"]
    groups = {"all": shared.seen | shared.held, "seen": shared.seen, "held": shared.held}
    moved = ranking_change.change_by_group(study, vectors, top, groups)
    everywhere = moved.pop("all")
    return {
        **shared.untuned,
        "loss": shared.asked.mean_loss(),
        **dict(zip(("reward", "reward_se"), shared.reward())),
        **table[names].mean().to_dict(),
        "ndcg_base": float(before.mean()),
        **dict(zip(("ndcg_change", "ndcg_change_lo", "ndcg_change_hi"), change)),
        "item_vector_change": everywhere["item_change"],
        **{name: everywhere[name] for name in ("max_abs_score_delta", "mean_abs_score_delta")},
        **{f"{name}_{group}": x for group, found in moved.items() for name, x in found.items()},
    }


def sweep(shared: Comparison, points: list[Point], path: Path, key: str) -> pd.DataFrame:
    """The rows of ``points`` in their order. Those that the CSV at ``path`` has are kept, if their
    ``key`` (``provenance.stage_key``: of the code and parameters) is the same; the rest is run."""
    stored = pd.read_csv(path).to_dict("records") if path.exists() else []
    rows = {_setting(row): row for row in stored if row["key"] == key}
    wanted = {_setting(asdict(point)): point for point in points}
    for setting in track([setting for setting in wanted if setting not in rows], "frontier"):
        rows[setting] = {**run_point(shared, wanted[setting]), "key": key}
        table = pd.DataFrame(list(rows.values()))
        write_atomic(path, table.to_csv(index=False, lineterminator="\n"))
    return pd.DataFrame([rows[setting] for setting in wanted])


def _setting(row: dict) -> tuple:
    return tuple(str(row[name]) for name in SETTING)


def with_gains(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with ``gain_loss``, ``gain_reward``: shares of the same seed's unshielded gain."""
    table = table.copy()
    free = table[table["mode"] == "none"].sort_values("steps").groupby("seed").last()
    for name in ("loss", "reward"):
        whole = table["seed"].map(free[name] - free[f"{name}_base"])
        table[f"gain_{name}"] = (table[name] - table[f"{name}_base"]) / whole
    return table


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row a setting: means over seeds; of the main measures least and most (``_lo``, ``_hi``).
    ``stopped_early``: the overlap of an unshielded training that has learned as much, interpolated
    in ``gain_loss`` between its points and the untuned model."""
    setting = [name for name in SETTING if name != "seed"] + ["curve"]
    seeds = with_gains(table).groupby(setting, sort=False)
    out = seeds.mean(numeric_only=True).drop(columns="seed")
    for name in ("gain_loss", "gain_reward", "overlap", "top1_same", "set_same"):
        out[f"{name}_lo"], out[f"{name}_hi"] = seeds[name].min(), seeds[name].max()
    out = out.assign(seeds=seeds.size()).reset_index()
    free = out[(out["mode"] == "none") & (out["gain_loss"] > 0)].sort_values("gain_loss")
    line = [0.0, *free["gain_loss"]], [1.0, *free["overlap"]]
    return out.assign(stopped_early=np.interp(out["gain_loss"], *line))


def published(name: str = "frontier") -> pd.DataFrame:
    """The rows of ``frontier``, ``capitals`` or ``settle`` in ``runs/reference/frontier``. Columns
    ``replay``, ``refresh`` and ``inputs`` are of null results that the code no longer has."""
    rows = pd.read_csv(REFERENCE / "frontier" / f"{name}.csv")
    if "curve" in rows:
        rows["curve"] = rows["curve"].str.replace("settled", "replay steps after")
    return rows.rename(columns={"settle": "replay_steps"})
