"""The frontier of learning against ranking moved: one short training and one measurement a point.

The signal is fixed and supervised: the likelihood of explanations composed from metadata
(``references.reference_line``) under Adam for a fixed number of steps, on the run's own layers, prompts and
item texts. It is the signal of the warm start without its trainer, so a point costs minutes and not the quarter of
an hour of PPO. What is measured is what notebook 06 measures.

A seed draws the adapters' first values and the order of the explanations; validation users and held-out items
are the same for all points. Every finished point is a row of a CSV that is rewritten atomically, so an
interrupted frontier goes on where it stopped. Where torch leaves cores idle (``OMP_NUM_THREADS=1``), points run side by
side, a process each.
"""

import io
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from time import process_time

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recrl_lib.evaluation import ranking_change, stats
from recrl_lib.explainer import sampling
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer, left_pad
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.paths import REFERENCE
from recrl_lib.progress import track
from recrl_lib.ranker import ranking
from recrl_lib.runs import write_atomic
from recrl_lib.scoring.composed import reference_line
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import alignment, projection, subspaces
from recrl_lib.shield.projection import Shield
from recrl_lib.shield.replay import Replay
from recrl_lib.shield.subspaces import Evidence
from recrl_lib.study import TOP_K, Study

BATCH, LR = 4, 3e-3  # the warm start's
MAX_NORM = 1.0  # gradient clipping, before the shield
TEXT_TOKENS = 40  # longest explanation when the reward is measured
MODES = (*projection.MODES, "alora")
REPLAYS = ("all", "boundary")

# The study's target: at least these shares of the unshielded gain, of places of the top 10, and of first places, and the
# relative change of NDCG@10 below the last.
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
    settle: int = 0  # steps of the replay alone, afterwards
    replay: str = "all"  # items that the penalty reads: all alike, or those around the ``boundary`` of the top ten more often
    refresh: int = 0  # steps after which the item Grams are taken again, under the adapters as they are, and added; 0 = never
    inputs: int = (
        0  # protect only this many layer inputs, those that the scores react to most; 0 = all
    )

    @property
    def curve(self) -> str:
        """The line of the figure this point lies on: its strength varies along it."""
        more = (", of the boundary" if self.replay == "boundary" else "") + (
            ", settled" if self.settle else ""
        )
        if self.mode in ("none", "penalty", "align", "alora"):
            return {"none": "no shield, stopped early", "penalty": "replay penalty"}.get(
                self.mode, self.mode
            ) + more
        replay = f" {self.energy:g}, with replay" if self.penalty else ""
        more += (", refreshed" if self.refresh else "") + (
            f", {self.inputs} inputs" if self.inputs else ""
        )
        return f"{self.mode}, {self.basis}{replay}{more}"


def named(name: str, seeds: int, steps: int) -> list[Point]:
    """The points of set ``name``, most telling first and all settings of a seed before the next seed, so that a part is of use."""
    if name not in SETS:
        raise ValueError(f"frontier_points={name!r}: choose one of {', '.join(SETS)}")
    return [
        Point(
            **{k: v for k, v in setting.items() if k != "share"},
            steps=max(1, round(steps * setting.get("share", 1))),
            seed=seed,
        )
        for seed in range(seeds)
        for setting in SETS[name]
    ]


SETS: dict[
    str, list[dict]
] = {  # fields of ``Point``; ``share``: of the steps, for training stopped early
    "none": [],
    "small": [{"mode": "none"}, {"basis": "contrastive", "energy": 0.99, "penalty": 1000.0}],
    "full": [
        {"mode": "none"},
        {"energy": 0.99},
        {"basis": "contrastive", "energy": 0.999},
        {"mode": "penalty", "penalty": 100.0},
        {"energy": 0.999},
        {"basis": "contrastive", "energy": 0.9999},
        {"basis": "contrastive", "energy": 0.99},
        *(
            {"basis": "contrastive", "energy": energy, "penalty": weight}
            for weight in (1000.0, 100.0, 10000.0)
            for energy in (0.99, 0.999)
        ),
        {"basis": "contrastive", "energy": 0.99, "penalty": 1000.0, "settle": 150},
        {
            "basis": "contrastive",
            "energy": 0.99,
            "penalty": 1000.0,
            "replay": "boundary",
            "settle": 150,
        },
        {"mode": "none", "share": 0.25},
        {"mode": "penalty", "penalty": 1000.0},
        {"energy": 0.9},
        {"energy": 0.9999},
        {"energy": 0.99, "penalty": 100.0},
        {"mode": "penalty", "penalty": 10.0},
        {"mode": "penalty", "penalty": 1.0},
        {"mode": "alora"},
        {"mode": "align"},
        {"basis": "sensitivity", "energy": 0.99},
        {"basis": "sensitivity", "energy": 0.999},
        {"basis": "boundary", "energy": 0.99},
        {"basis": "boundary", "energy": 0.999},
        {"basis": "boundary", "energy": 0.99, "penalty": 1000.0},
        {"basis": "contrastive", "energy": 0.99, "penalty": 1000.0, "replay": "boundary"},
        {"basis": "contrastive", "energy": 0.99, "refresh": 4},
        {"basis": "contrastive", "energy": 0.99, "inputs": 10},
        {"mode": "gradient"},
        {"mode": "frozen_a"},
        {"mode": "restart"},
        {"basis": "readout", "rank": 64},
        {"basis": "random", "rank": 311},
        {"mode": "none", "share": 0.5},
        {"mode": "none", "share": 0.1},
    ],
}


CONTRASTIVE = {"basis": "contrastive", "energy": 0.99}
REPLAYED = {**CONTRASTIVE, "penalty": 1000.0}
IDEAS: dict[
    str, tuple[dict, dict]
] = {  # what was tried beyond the textbook: (the setting with it, its twin without)
    "basis contrastive, not activation": (CONTRASTIVE, {"energy": 0.99}),
    "basis sensitivity, not activation": (
        {"basis": "sensitivity", "energy": 0.99},
        {"energy": 0.99},
    ),
    "basis boundary, not sensitivity": (
        {"basis": "boundary", "energy": 0.99},
        {"basis": "sensitivity", "energy": 0.99},
    ),
    "10 inputs protected, not all": ({**CONTRASTIVE, "inputs": 10}, CONTRASTIVE),
    "basis refreshed every 4 steps": ({**CONTRASTIVE, "refresh": 4}, CONTRASTIVE),
    "a replay beside the projection": (REPLAYED, CONTRASTIVE),
    "the replay reads the boundary oftener": ({**REPLAYED, "replay": "boundary"}, REPLAYED),
    "settled for 150 steps": ({**REPLAYED, "settle": 150}, REPLAYED),
    "both of these": ({**REPLAYED, "replay": "boundary", "settle": 150}, REPLAYED),
}


# --- the signal -----------------------------------------------------------------------------------


@dataclass
class Lesson:
    """Prompts followed by their explanations, as trunk states: what supervised steps read."""

    states: list[Tensor]  # (T_i, d) trunk states of every pair
    ids: list[list[int]]  # token ids, prompt and answer
    answers: list[int]  # tokens of the answer, EOS included

    def batch(self, rows, pad_id: int, device) -> tuple[Tensor, Tensor, Tensor]:
        """(states (B, T, d), mask (B, T), labels (B, T)), left-padded; prompt tokens carry the label -100."""
        ids, mask = left_pad([self.ids[r] for r in rows], pad_id, device)
        labels = torch.full_like(ids, -100)
        states = torch.zeros(*ids.shape, self.states[0].shape[-1], device=device)
        for n, r in enumerate(rows):
            labels[n, -self.answers[r] :] = ids[n, -self.answers[r] :]
            states[n, -len(self.ids[r]) :] = self.states[r].to(device)
        return states, mask, labels


@torch.no_grad()
def lesson(explainer: Explainer, records: list[dict], batch: int = 16) -> Lesson:
    """The reference line of every record after its prompt, read once by the layers that are never tuned."""
    out = Lesson([], [], [])
    for record in records:
        prompt = prompt_ids(explainer, messages(record))
        answer = explainer.tokenizer(reference_line(record), add_special_tokens=False)[
            "input_ids"
        ] + [explainer.eos_id]
        out.ids.append(prompt + answer)
        out.answers.append(len(answer))
    for start in track(range(0, len(records), batch), "reading explanations"):
        ids, mask = left_pad(out.ids[start : start + batch], explainer.pad_id, explainer.device)
        out.states += [row[keep].cpu() for row, keep in zip(explainer.trunk(ids, mask), mask)]
    return out


@torch.no_grad()
def lesson_grams(explainer: Explainer, given: Lesson, batch: int = 16) -> dict[str, Tensor]:
    """Grams of the adapted layers' inputs over prompts with their explanations, under the base model."""
    with explainer.reference(), subspaces.GramCollector(explainer) as collector:
        for start in track(range(0, len(given.ids), batch), "explanation Grams"):
            rows = range(start, min(start + batch, len(given.ids)))
            states, mask, _ = given.batch(rows, explainer.pad_id, explainer.device)
            collector.masked(mask)
            explainer.top(states, mask)
    return collector.grams


def answer_loss(explainer: Explainer, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean negative log-likelihood of a batch's answer tokens, at temperature 1."""
    states, mask, labels = batch
    target = labels[:, 1:]
    hidden = explainer.top(states, mask)[:, :-1][target != -100]
    return torch.nn.functional.cross_entropy(
        explainer.lm.lm_head(hidden).float(), target[target != -100]
    )


# --- one point ------------------------------------------------------------------------------------


@dataclass
class Lab:
    """What all points of a frontier share."""

    explainer: Explainer
    study: Study
    items: ItemTexts
    held: set[int]  # items that no basis, penalty or alignment has seen
    evidence: Evidence
    taught: Lesson  # of PPO users
    asked: Lesson  # of validation users: what a point learned decides settings
    records: list[dict]  # of the same users
    loss_base: float  # of the untuned model, on ``asked``
    reward_base: float
    base: pd.DataFrame  # the untuned model's ranking table
    n_boot: int = 10_000

    @property
    def seen(self) -> set[int]:
        return set(range(1, self.items.n_items + 1)) - self.held


def user_states(study: Study) -> Tensor:
    """(U, d_rank): what the ranker multiplies every item vector with, for all users."""
    model, rows = study.ranker, study.split.with_valid
    with torch.no_grad():
        table = model.item_table(study.text)
        chunks = [
            model(ranking.pad_sequences(rows[n : n + 256], model.max_len), table)[:, -1]
            for n in range(0, len(rows), 256)
        ]
    return torch.cat(chunks)


def around_tenth(study: Study, only: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """(items, users (0-based)), one pair for every item of ``only`` in the places 6 to 15 of a user's base ranking.

    A change of such an item's score is what takes a place in the top ten, or gives one.
    """
    places = ranking.top_k(study.ranker, study.split.with_valid, study.text, TOP_K + TOP_K // 2)[
        :, TOP_K // 2 :
    ]
    users = np.repeat(np.arange(len(places)), places.shape[1])
    items = places.ravel()
    keep = np.isin(items, sorted(only))
    return items[keep], users[keep]


def probes(
    study: Study, pairs: tuple[np.ndarray, np.ndarray], rng: np.random.Generator, n: int = 256
) -> dict[int, Tensor]:
    """For ``n`` items of ``pairs`` (items, users), the oftener paired the sooner, the state of one of their users."""
    items, users = pairs
    states, order = user_states(study), rng.permutation(len(items))
    chosen, first = np.unique(items[order], return_index=True)
    soonest = np.argsort(first)[:n]
    return {int(i): states[users[order[f]]] for i, f in zip(chosen[soonest], first[soonest])}


def gather(
    explainer: Explainer,
    study: Study,
    items: ItemTexts,
    seen: set[int],
    grams: dict[str, Tensor],
    taught: Lesson,
    bases: set[str],
    rng: np.random.Generator,
    seed: int,
) -> Evidence:
    """What ``bases`` need, from ``seen`` items and ``taught`` explanations only; ``grams`` are the seen items'."""
    readout = subspaces.readout_of(study.ranker) if study.text is not None else None
    sensitivity = boundary = None
    if readout is not None and "sensitivity" in bases:
        pairs = np.array(sorted(seen)), rng.integers(0, len(study.users), len(seen))
        sensitivity = subspaces.sensitivity_grams(
            explainer, items, readout, probes(study, pairs, rng)
        )
    if readout is not None and "boundary" in bases:
        boundary = subspaces.sensitivity_grams(
            explainer, items, readout, probes(study, around_tenth(study, seen), rng)
        )
    return Evidence(
        items=grams,
        prompts=lesson_grams(explainer, taught) if "contrastive" in bases else None,
        sensitivity=sensitivity,
        boundary=boundary,
        readout=subspaces.readout_rows(explainer, readout)
        if readout is not None and "readout" in bases
        else None,
        seed=seed,
    )


def prepare(
    explainer: Explainer,
    study: Study,
    items: ItemTexts,
    held: set[int],
    evidence: Evidence,
    taught: Lesson,
    records: list[dict],
) -> Lab:
    """A ``Lab`` that measures on ``records`` of users who were not taught; reads what the untuned model says to them."""
    base, _ = ranking_change.ranking_table(study, study.text)
    lab = Lab(
        explainer,
        study,
        items,
        held,
        evidence,
        taught,
        lesson(explainer, records),
        records,
        0.0,
        0.0,
        base,
    )
    with explainer.reference():
        lab.loss_base, (reward, _) = _loss(lab), _reward(lab)
    lab.reward_base = float(reward)
    return lab


@torch.no_grad()
def restart_adapters(explainer: Explainer, seed: int) -> None:
    """B = 0 and A drawn anew, from PEFT's own distribution."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in explainer.lm.named_parameters():
        if "lora_A" in name:
            parameter.copy_(
                torch.nn.init.kaiming_uniform_(
                    torch.empty(parameter.shape), a=sqrt(5), generator=generator
                )
            )
        elif "lora_B" in name:
            parameter.zero_()


def most_sensitive(
    protected: dict[str, subspaces.Subspace], sensitivity: Mapping[str, Tensor], n: int
) -> dict[str, subspaces.Subspace]:
    """``protected`` with nothing protected in all but the ``n`` layer inputs that the scores react to most."""
    kept = sorted(protected, key=lambda name: -float(sensitivity[name].trace()))[:n]
    return {
        name: s if name in kept else subspaces.Subspace(s.basis[:, :0], s.spectrum)
        for name, s in protected.items()
    }


def replay_of(lab: Lab, point: Point) -> Replay | None:
    if not point.penalty:
        return None
    often = (
        None
        if point.replay == "all"
        else 1 + np.bincount(around_tenth(lab.study, lab.seen)[0], minlength=lab.items.n_items + 1)
    )
    return Replay(
        lab.explainer,
        lab.items,
        lab.study.text,
        subspaces.readout_of(lab.study.ranker),
        point.penalty,
        point.seed,
        lab.seen,
        often=often,
    )


def refreshed(lab: Lab, point: Point) -> dict[str, subspaces.Subspace]:
    """The point's subspaces with the item texts' Grams under the adapters as they are added to those of the base model."""
    now, _ = subspaces.item_grams(lab.explainer, lab.items, lab.seen, tuned=True)
    both = {name: gram + now[name] for name, gram in lab.evidence.items.items()}
    return subspaces.protect(
        replace(lab.evidence, items=both), point.basis, point.energy, point.rank
    )


def learn(lab: Lab, point: Point, guard: Shield | None, invoke=None) -> float:
    """Tune the adapters for ``point.steps``; the CPU seconds spent."""
    explainer, start = lab.explainer, process_time()
    parameters = explainer.adapter_parameters()
    optimizer = torch.optim.Adam(parameters, lr=LR)
    if guard:
        guard.attach(optimizer)
    rng = np.random.default_rng(point.seed)
    order: list[int] = []
    for step in track(range(point.steps), "frontier steps"):
        if point.refresh and step and step % point.refresh == 0:
            guard.renew(refreshed(lab, point))
        if len(order) < BATCH:
            order = rng.permutation(len(lab.taught.ids)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        if invoke:
            invoke([lab.taught.answers[r] for r in rows])
        optimizer.zero_grad(set_to_none=True)
        answer_loss(
            explainer, lab.taught.batch(rows, explainer.pad_id, explainer.device)
        ).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
    if guard:
        guard.detach()
    if point.settle:
        guard.settle(point.settle)
    return process_time() - start


def run_point(lab: Lab, point: Point) -> dict:
    """Train and measure one point: its fields, then every measure, as one flat row."""
    if point.mode not in MODES:
        raise ValueError(f"frontier: mode {point.mode!r}; choose one of {', '.join(MODES)}")
    if point.settle and (not point.penalty or point.mode in ("none", "alora")):
        raise ValueError(
            f"frontier: settle={point.settle} is for a mode of the shield with a penalty"
        )
    if point.refresh and point.mode not in projection.PROJECTING:
        raise ValueError(f"frontier: refresh={point.refresh} is for a mode that projects")
    if point.inputs and lab.evidence.sensitivity is None:
        raise ValueError(
            f"frontier: inputs={point.inputs} needs Evidence.sensitivity, by which they are chosen"
        )
    if point.replay not in REPLAYS:
        raise ValueError(f"frontier: replay={point.replay!r}; choose one of {', '.join(REPLAYS)}")
    explainer = lab.explainer
    restart_adapters(explainer, point.seed)
    protected = subspaces.protect(lab.evidence, point.basis, point.energy, point.rank)
    if point.inputs:
        protected = most_sensitive(protected, lab.evidence.sensitivity, point.inputs)
    if point.mode == "alora":
        with activated(explainer) as invoke:
            seconds = learn(lab, point, None, invoke)
            row = measure(lab, point, invoke)
    else:
        guard = (
            None
            if point.mode == "none"
            else Shield(explainer, protected, point.mode, replay_of(lab, point))
        )
        seconds = learn(lab, point, guard)
        row = measure(lab, point)
        protected = guard.protected if guard else protected
    spaces, told = (
        protected if point.mode in (*projection.PROJECTING, "restart") else {},
        lab.evidence.prompts,
    )
    held = {
        "rank_mean": [s.rank for s in spaces.values()],
        "items_inside": [s.energy for s in spaces.values()],
        "explanations_inside": [
            np.nan if told is None else s.holds(told[name]) for name, s in spaces.items()
        ],
    }
    return {  # a mode that projects nothing shows its leak against the subspaces it was not held to
        **asdict(point),
        "curve": point.curve,
        **{name: float(np.mean(values)) if values else 0.0 for name, values in held.items()},
        "leak": projection.leak(explainer, protected),
        **row,
        "train_cpu_seconds": seconds,
    }


@torch.no_grad()
def measure(lab: Lab, point: Point, invoke=None) -> dict:
    """Learning (loss on the users asked, reward of greedy texts) and ranking moved, of the adapters as they are."""
    study, rng = lab.study, np.random.default_rng(0)
    if invoke:
        invoke(None)  # an item text holds no turn header
    text = lab.items.vectors()
    if point.mode == "align":
        text = alignment.fit_alignment(
            text, study.text, np.array(sorted(lab.seen)), np.random.default_rng(point.seed)
        )(text)
    table, top = ranking_change.ranking_table(study, text)
    change, lo, hi, _ = stats.paired_bootstrap_diff(
        table["ndcg"].to_numpy(), lab.base["ndcg"].to_numpy(), lab.n_boot, rng
    )
    reward, error = _reward(lab, invoke)
    groups = {"seen": lab.seen, "held": lab.held}
    changed = ranking_change.change_by_group(study, text, top, groups)
    return {
        "loss_base": lab.loss_base,
        "loss": _loss(lab, invoke),
        "reward_base": lab.reward_base,
        "reward": reward,
        "reward_se": error,
        **{
            name: float(table[name].mean())
            for name in ("overlap", "set_same", "exact", "top1_same", "rbo", "kendall_tau")
        },
        "ndcg": float(table["ndcg"].mean()),
        "ndcg_base": float(lab.base["ndcg"].mean()),
        "ndcg_change": change,
        "ndcg_change_lo": lo,
        "ndcg_change_hi": hi,
        **ranking_change.score_change(study, text),
        **{
            f"{name}_{group}": value
            for group, found in changed.items()
            for name, value in found.items()
        },
    }


@torch.no_grad()
def _loss(lab: Lab, invoke=None) -> float:
    """Mean over all answer tokens of the users asked."""
    explainer, total = lab.explainer, 0.0
    for start in range(0, len(lab.asked.ids), 16):
        rows = range(start, min(start + 16, len(lab.asked.ids)))
        answers = [lab.asked.answers[r] for r in rows]
        if invoke:
            invoke(answers)
        total += float(
            answer_loss(explainer, lab.asked.batch(rows, explainer.pad_id, explainer.device))
        ) * sum(answers)
    return total / sum(lab.asked.answers)


def _reward(lab: Lab, invoke=None) -> tuple[float, float]:
    """(mean reward of greedy texts for the users asked, its standard error over users)."""
    prompts = [prompt_ids(lab.explainer, messages(r)) for r in lab.records]
    texts = (
        greedy_activated(lab.explainer, prompts, invoke)
        if invoke
        else sampling.sample(lab.explainer, prompts, 1, TEXT_TOKENS, 1.0, None).texts
    )
    reward, _ = Reward("grounded", lab.study.catalogue)(lab.records, texts)
    return float(reward.mean()), float(reward.std(ddof=1) / sqrt(len(reward)))


@contextmanager
def activated(explainer: Explainer):
    """Within: the adapters are activated LoRA (Greenewald et al. 2025, arXiv 2504.12397) through PEFT's own layers.

    They act from the template's last turn header on. The two-part forward calls the layers itself, so what PEFT
    would work out from token ids is told here: yields ``invoke(answers)``, with the number of tokens after the header
    in every row (or in all), or None for texts without a header, which the base weights read.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.variants import ALoraLinearVariant

    with_header, without = (
        explainer.tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}],
            tokenize=True,
            return_dict=False,
            add_generation_prompt=more,
        )
        for more in (True, False)
    )
    header, told = len(with_header) - len(without), [None]
    layers = [m for m in explainer.lm.modules() if isinstance(m, LoraLayer)]

    def offsets(module, args, kwargs):
        rows = len(args[0])
        after = told[0] if isinstance(told[0], list) else [told[0]] * rows
        return args, {**kwargs, "alora_offsets": [None if a is None else a + header for a in after]}

    handles = [m.register_forward_pre_hook(offsets, with_kwargs=True) for m in layers]
    before = [dict(m.lora_variant) for m in layers]
    for m in layers:
        m.lora_variant["default"] = ALoraLinearVariant
    try:
        yield lambda answers: told.__setitem__(0, answers)
    finally:
        for handle, m, variant in zip(handles, layers, before):
            handle.remove()
            m.lora_variant.clear()
            m.lora_variant.update(variant)


def greedy_activated(explainer: Explainer, prompts: list[list[int]], invoke) -> list[str]:
    """Greedy texts under activated LoRA. ``ex.sample`` multiplies plain LoRA, which would hear the whole prompt: PEFT's layers speak here."""
    invoke(0)  # a prompt ends with the header; new tokens are read one by one, after it
    response, mask = sampling.generated(explainer, prompts, TEXT_TOKENS)
    return [sampling.decode(explainer, row[keep]) for row, keep in zip(response, mask)]


# --- many points ----------------------------------------------------------------------------------


def run_points(lab: Lab, points: list[Point]) -> Iterator[dict]:
    """The rows of ``points``, as they are finished. On a CPU where torch has one thread, as many points at a time as there are cores.

    Products this small share badly: two cores finish more points as two processes than as two threads of one. Every row
    but its CPU seconds is the one that ``run_point`` gives here, bit for bit.
    """
    alone = (
        torch.get_num_threads() > 1 or torch.cuda.is_available()
    )  # a fork loses torch's other threads, and autograd's where there is a GPU
    workers = 1 if alone else min(len(points), cores())
    if workers < 2:
        yield from map(partial(run_point, lab), points)
        return
    with ProcessPoolExecutor(
        workers, get_context("fork"), _begin, (lab,)
    ) as pool:  # forked: a lab is too large to send
        try:
            yield from (
                future.result()
                for future in as_completed([pool.submit(_run_point, point) for point in points])
            )
        finally:
            pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Cores that points may fill: those of this process; 1 for a job of a batch, whose like have the others, and where a process
    cannot be forked safely (not Linux)."""
    return (
        len(os.sched_getaffinity(0))
        if sys.platform == "linux" and "RECRL_BATCH" not in os.environ
        else 1
    )


def _begin(lab: Lab) -> None:
    global _lab
    _lab = lab
    os.environ["RECRL_PROGRESS"] = "off"  # the parent counts the points


def _run_point(point: Point) -> dict:
    return run_point(_lab, point)


def sweep(lab: Lab, points: list[Point], path: Path, key: str) -> pd.DataFrame:
    """All rows of ``points``, running those that the CSV at ``path`` does not hold yet; each is added when it is finished, in its place.

    Rows with another ``key`` (of the code and parameters they came from: ``runs.stage_key``) are run again.
    """
    rows = pd.read_csv(path).to_dict("records") if Path(path).exists() else []
    rows = [row for row in rows if row["key"] == key]
    done = {_setting(row) for row in rows}
    todo = [p for p in points if _setting(asdict(p)) not in done]
    places = {_setting(asdict(p)): n for n, p in enumerate(points)}
    for row in track(run_points(lab, todo), "frontier", total=len(todo)):
        rows.append({**row, "key": key})
        rows.sort(key=lambda row: places.get(_setting(row), -1))
        out = io.StringIO()
        pd.DataFrame(rows).to_csv(out, index=False, lineterminator="\n")
        write_atomic(path, out.getvalue())
    return pd.DataFrame([row for row in rows if _setting(row) in places])


def _setting(row: dict) -> tuple:
    return tuple(str(row[f.name]) for f in fields(Point))


def with_gains(table: pd.DataFrame) -> pd.DataFrame:
    """Points as rows with ``gain_loss`` and ``gain_reward``: shares of what the unshielded point of the same seed and most steps gained."""
    table = table.copy()
    free = table[table["mode"] == "none"].sort_values("steps").groupby("seed").last()
    for name, sign in (("loss", -1), ("reward", 1)):
        gain = sign * (table[name] - table[f"{name}_base"])
        whole = sign * (free[name] - free[f"{name}_base"])
        table[f"gain_{name}"] = gain / table["seed"].map(whole)
    return table


def of_setting(table: pd.DataFrame, setting: dict) -> pd.DataFrame:
    """The rows of ``table`` with these fields of ``Point``, all others at their defaults, and the most steps; by seed."""
    point, most = asdict(Point(**setting)), table["steps"] == table["steps"].max()
    key = [f.name for f in fields(Point) if f.name not in ("seed", "steps")]
    return table[most & (table[key] == [point[name] for name in key]).all(axis=1)].set_index("seed")


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """What each of ``IDEAS`` changed against its twin: one row an idea, for seeds that have both: the mean difference of each
    measure, and the least and most over the seeds."""
    measures = ["gain_loss", "gain_reward", "overlap", "overlap_held", "top1_same"]
    table, rows = with_gains(table), []
    for idea, (point, twin) in IDEAS.items():
        difference = (
            of_setting(table, point)[measures] - of_setting(table, twin)[measures]
        ).dropna()
        if len(difference):
            row = {"idea": idea, "seeds": len(difference)}
            for name in measures:
                row |= {
                    name: difference[name].mean(),
                    f"{name}_lo": difference[name].min(),
                    f"{name}_hi": difference[name].max(),
                }
            rows.append(row)
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row a setting: mean, least and most over seeds of every measure, and of the gain kept (``with_gains``)."""
    table = with_gains(table)
    setting = [f.name for f in fields(Point) if f.name != "seed"] + ["curve"]
    numbers = [c for c in table.columns if c not in (*setting, "seed", "key")]
    grouped = table.groupby(setting, sort=False)
    out = grouped[numbers].mean()
    for name in ("gain_loss", "gain_reward", "overlap", "top1_same", "set_same"):
        out[f"{name}_lo"], out[f"{name}_hi"] = grouped[name].min(), grouped[name].max()
    return out.assign(seeds=grouped.size()).reset_index()


def foretold(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, tuple[float, float, float]]]:
    """What protected directions hold before any training, against what the training then kept: (rows, rank correlations).

    A row a setting whose shield is a projection of the update and nothing else, means over seeds: ``explanations_inside``
    and ``items_outside`` (shares of energy that the directions hold and leave free, means over layer inputs), ``gain_loss``, and
    ``lost`` (places of the top 10). The correlations, each with its interval over settings (``stats.rank_correlation``): of the
    explanations' share with the learning kept (``learning``), of the mere number of directions with it (``learning, by count``), and of the
    item texts' share with the places lost (``ranking``).
    """
    points = summarise(table)
    alone = (points["mode"] == "update") & (points[["penalty", "settle", "refresh"]] == 0).all(
        axis=1
    )
    columns = [
        "curve",
        "basis",
        "energy",
        "rank",
        "inputs",
        "seeds",
        "rank_mean",
        "explanations_inside",
        "items_outside",
        "gain_loss",
        "lost",
    ]
    rows = (
        points[alone]
        .assign(items_outside=1 - points["items_inside"], lost=1 - points["overlap"])[columns]
        .reset_index(drop=True)
    )
    return rows, {
        "learning": stats.rank_correlation(rows["explanations_inside"], rows["gain_loss"]),
        "learning, by count": stats.rank_correlation(rows["rank_mean"], rows["gain_loss"]),
        "ranking": stats.rank_correlation(rows["items_outside"], rows["lost"]),
    }


def stopped_early(points: pd.DataFrame) -> np.ndarray:
    """The overlap that training without a shield has when it has learned as much as each of ``points`` (from ``summarise``).

    Between the unshielded points, and from nothing learned and nothing moved to the first of them, on straight lines in
    ``gain_loss``; beyond the most learned, that point's own.
    """
    free = points[(points["mode"] == "none") & (points["gain_loss"] > 0)].sort_values("gain_loss")
    return np.interp(points["gain_loss"], [0.0, *free["gain_loss"]], [1.0, *free["overlap"]])


def published(name: str = "frontier") -> pd.DataFrame:
    """The rows of the frontier in ``runs/reference/frontier`` (its ``params.yaml`` says how it was run), or of ``capitals`` beside it (``notes.json``)."""
    return pd.read_csv(REFERENCE / "frontier" / f"{name}.csv")


def settled() -> pd.DataFrame:
    """``runs/reference/frontier/settle.csv``: a laptop run's shielded arm after steps of settling (which run: ``notes.json``).

    Ranking kept over all users, PPO's users and held-out users, and in places of items seen and held out; the reward of the
    first ``reward_users`` judged users beside that of other arms for the same users, and its paired change with one standard error.
    """
    return pd.read_csv(REFERENCE / "frontier" / "settle.csv")
