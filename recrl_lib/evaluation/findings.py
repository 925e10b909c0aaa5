"""The report: one self-contained HTML page on a run, ``runs/<run>/report.html``.

Every number on it is read from the run folder, and every verdict is a rule applied to those numbers here,
so the page cannot say what the run did not show. Titles and texts are untrusted: the template escapes them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from recrl_lib import paths, plots, runs, study
from recrl_lib.data import splits
from recrl_lib.evaluation import audit, clicks, results
from recrl_lib.evaluation.frontier import (
    FIRST,
    GAIN,
    HELD,
    NDCG,
    published,
    stopped_early,
    summarise,
)
from recrl_lib.params import COMMON, PROFILES, STAGES, Params, owned_by
from recrl_lib.runs import write_atomic
from recrl_lib.shield import subspaces

METRICS = ("data", "ranker", "explainer", "shield", "ppo", "evaluation", "audit")
EVALUATION = "metrics/evaluation.json"
PPO = "metrics/ppo.json"
PUBLISHED = "runs/reference/frontier/frontier.csv"
SHARED = ("unshielded", "shielded")
TUNED = ("separate", *SHARED)
SEALED = 1e-6  # a leak below this is rounding of float32 adapters
FEW_USERS = 100
LEAST_USERS = 10  # in a group of users, to answer a question about it
CHANCE = 0.1  # own-item retrieval among ten candidates


@dataclass(frozen=True)
class Evidence:
    """All that the page is made from. ``metrics``: by name of the file; ``protected``: the shield's subspaces."""

    params: Params
    manifest: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    curves: dict[str, pd.DataFrame]
    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    explanations: pd.DataFrame
    overlap: pd.DataFrame
    top10: pd.DataFrame
    protected: dict[str, subspaces.Subspace]
    # Tables that a run may lack
    sensitivity: pd.DataFrame | None = None
    frontier: pd.DataFrame | None = (
        None  # one row a setting: ``frontier.summarise``; the run's own, or the published one
    )
    frontier_source: str = "curves/frontier.csv"
    ablations: pd.DataFrame | None = None  # one row an arm: ``ablations.compare``

    @property
    def evaluation(self) -> dict[str, Any]:
        return self.metrics["evaluation"]

    @property
    def smoke(self) -> bool:
        """Whether the run is as small as the smoke profile in steps or users: too small to show anything."""
        least = Params()
        return (
            self.params.ppo_steps <= least.ppo_steps or self.params.eval_users <= least.eval_users
        )


def gather(stage: runs.StageRun) -> Evidence:
    """Read the run. ``RuntimeError`` names a file that is missing and the notebook that writes it."""
    run = stage.params.run
    tables = ("interactions", "items", "users", "explanations", "overlap", "top10")
    there = [
        name
        for name in ("sensitivity", "ablations")
        if (stage.folder / "artifacts" / f"{name}.parquet").is_file()
    ]
    points, source = _frontier(stage)
    return Evidence(
        params=stage.params,
        manifest=runs.read_manifest(run),
        metrics={
            name: json.loads(stage.input(f"{name}.json", "metrics").read_text(encoding="utf-8"))
            for name in METRICS
        },
        curves={
            name: pd.read_csv(stage.input(f"{file}.csv", "curves"))
            for name, file in (("ranker", "ranker"), ("ppo", "shielded_ppo"))
        },
        protected=subspaces.from_tensors(stage.load_tensors("subspaces")),
        **{name: stage.load_table(name) for name in (*tables, *there)},
        frontier=points,
        frontier_source=source,
    )


def _frontier(stage: runs.StageRun) -> tuple[pd.DataFrame | None, str]:
    """The run's own frontier and its file; a run without one shows the published, if its data and model are the same."""
    own = Evidence.frontier_source
    if (stage.folder / own).is_file():
        return summarise(pd.read_csv(stage.input("frontier.csv", "curves"))), own
    default = Params()
    if (stage.params.dataset, stage.params.llm, stage.params.text) != (
        default.dataset,
        default.llm,
        default.text,
    ):
        return None, own
    return summarise(published()), PUBLISHED


# --- words for numbers ---------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """Fixed digits; what is not zero never reads as zero."""
    value = value + 0.0  # -0.0 becomes 0.0
    text = f"{value:.{digits}f}"
    if value and not float(text):
        text = f"{value:.1e}"
    return text.replace("-", "−")


def share(value: float) -> str:
    """Per cent with one digit; "100 %" and "0 %" mean exactly that."""
    if value in (0.0, 1.0):
        return f"{value:.0%}".replace("%", " %")
    text = f"{100 * value:.1f}".replace("-", "−")
    return {"0.0": "< 0.1 %", "−0.0": "< 0.1 %", "100.0": "> 99.9 %"}.get(text, f"{text} %")


def with_interval(metrics: Mapping[str, Any], key: str, digits: int = 3) -> str:
    """ "0.743 [0.720, 0.761]", or the value alone where the stage gives no interval."""
    value = number(_get(metrics, key), digits)
    if f"{key}_lo" not in metrics:
        return value
    return f"{value} [{number(metrics[f'{key}_lo'], digits)}, {number(_get(metrics, f'{key}_hi'), digits)}]"


def verdict(metrics: Mapping[str, Any], key: str, null: float) -> str:
    """ "up", "down" or "undecided": on which side of ``null`` the whole interval of ``key`` lies."""
    if _get(metrics, f"{key}_lo") > null:
        return "up"
    return "down" if _get(metrics, f"{key}_hi") < null else "undecided"


def _get(metrics: Mapping[str, Any], key: str, file: str = EVALUATION) -> Any:
    if key not in metrics:
        raise ValueError(f"{file} lacks {key!r}: run the notebook that writes it again")
    return metrics[key]


# --- what the run shows --------------------------------------------------------------------------------


class Claim(NamedTuple):
    question: str
    answer: str
    evidence: str


def headline(evaluation: Mapping[str, Any]) -> pd.DataFrame:
    """The main table as text, one row an arm; brackets hold 95 % intervals over users."""
    rows = []
    for arm in runs.ARMS:
        rows.append(
            {
                "arm": arm,
                "reward": with_interval(evaluation, f"{arm}/reward"),
                "CTR lift": "1 (reference)"
                if arm == "base"
                else with_interval(evaluation, f"{arm}/ctr_lift"),
                "judged quality": with_interval(evaluation, f"{arm}/quality"),
                "KL (nats)": number(_get(evaluation, f"{arm}/kl"), 2),
                "NDCG@10": with_interval(evaluation, f"{arm}/ndcg@10", 4),
                "top 10 kept": share(_get(evaluation, f"{arm}/top10_overlap")),
                "same ten": share(_get(evaluation, f"{arm}/top10_set_same")),
                "same order": share(_get(evaluation, f"{arm}/top10_exact")),
                "max |Δscore|": f"{_get(evaluation, f'{arm}/max_abs_score_delta'):.3g}",
            }
        )
    return pd.DataFrame(rows)


def claims(evaluation: Mapping[str, Any]) -> list[Claim]:
    """The study's questions, each answered by a rule from the numbers of ``metrics/evaluation.json``."""
    equal = bool(_get(evaluation, "separate/scores_sha256_equal"))
    found = [
        Claim(
            "Separate towers: are the ranker's scores bit-identical after tuning?",
            "yes" if equal else "no",
            "sha256 over all users × items " + ("equal" if equal else "differs"),
        ),
        Claim(
            "Shared backbone: did tuning without a shield move the ranking?",
            "yes" if _moved(evaluation, "unshielded") else "no",
            _ranking_words(evaluation, "unshielded"),
        ),
        Claim(
            "Did the shield hold the ranking?",
            _held(evaluation),
            _ranking_words(evaluation, "shielded"),
        ),
    ]
    found += _gains(
        evaluation, "reward_change", "Did tuning raise the reward of held-out users", "change"
    )
    found.append(
        Claim("How much of the reward gain was kept under the shield?", *_kept(evaluation))
    )
    found += _gains(
        evaluation,
        "quality_change",
        "Did the judge, which training never saw, agree",
        "change of quality",
    )
    for arm in TUNED:
        side = verdict(evaluation, f"{arm}/ctr_lift", 1.0)
        answer = {"up": "yes, a gain", "down": "yes, a loss", "undecided": "no"}[side]
        found.append(
            Claim(
                f"Does the interval of the simulated CTR lift exclude 1 ({arm})?",
                answer,
                "lift " + with_interval(evaluation, f"{arm}/ctr_lift"),
            )
        )
    return [*found, *_more_claims(evaluation)]


def _more_claims(m: Mapping[str, Any]) -> list[Claim]:
    """Questions that runs made before they were asked cannot answer."""
    found = []
    for arm in SHARED:
        if f"{arm}/reward_by_ppo" in m:
            words = f"reward {with_interval(m, f'{arm}/reward_by_ppo')}, quality {with_interval(m, f'{arm}/quality_by_ppo')}"
            found.append(
                Claim(
                    f"Did PPO add reward to the warm start ({arm})?",
                    _rose_in_group(m, arm, "by_ppo"),
                    words,
                )
            )
        if f"{arm}/reward_new_items" in m:
            words = f"change {with_interval(m, f'{arm}/reward_new_items')}, users: {m[f'{arm}/users_new_items']:g}"
            question = f"Did the reward rise on items that PPO never explained ({arm})?"
            found.append(Claim(question, _rose_in_group(m, arm, "new_items"), words))
        if (survives := m.get(f"{arm}/lift_sign_survives")) is not None:
            words = f"lift between {number(m[f'{arm}/lift_lowest'])} and {number(m[f'{arm}/lift_highest'])}"
            question = f"Does the sign of the lift survive half and double the click model's weights ({arm})?"
            found.append(Claim(question, "yes" if survives else "no", words))
        if losers := results.losers(m, arm):
            won = [name.replace("_", " ") for name, lost in losers.items() if not lost]
            question = f"Do all texts composed to fool the measures lose to the policy ({arm})?"
            answer = (
                "not shown"
                if won
                else "yes"
                if m["users_controls"] >= LEAST_USERS
                else "too few users to say"
            )
            found.append(
                Claim(
                    question,
                    answer,
                    f"not below it by a whole interval: {', '.join(won) or 'none'}, users: {m['users_controls']:g}",
                )
            )
    return found


def _gains(m: Mapping[str, Any], change: str, question: str, words: str) -> list[Claim]:
    """One claim an arm: did ``change`` go up beyond its interval?"""
    keys = {arm: f"{arm}/{change}" for arm in SHARED}
    return [
        Claim(f"{question} ({arm})?", _rose(m, key), f"{words} {with_interval(m, key)}")
        for arm, key in keys.items()
    ]


def _rose(evaluation: Mapping[str, Any], key: str) -> str:
    return {"up": "yes", "down": "no, it fell", "undecided": "not shown"}[
        verdict(evaluation, key, 0.0)
    ]


def _rose_in_group(m: Mapping[str, Any], arm: str, group: str) -> str:
    """A bootstrap over a handful of users knows nothing: one user has an interval of no width."""
    return (
        _rose(m, f"{arm}/reward_{group}")
        if _get(m, f"{arm}/users_{group}") >= LEAST_USERS
        else "too few users to say"
    )


def _moved(evaluation: Mapping[str, Any], arm: str) -> bool:
    return _get(evaluation, f"{arm}/max_abs_score_delta") > 0


def _held(evaluation: Mapping[str, Any]) -> str:
    if not _moved(evaluation, "shielded"):
        return "yes, exactly"
    if _get(evaluation, "shielded/top10_exact") == 1:
        return "yes, every top 10 is the same"
    lost = {arm: 1 - _get(evaluation, f"{arm}/top10_overlap") for arm in SHARED}
    if lost["shielded"] >= lost["unshielded"]:
        return "no"
    return "nearly" if _get(evaluation, "shielded/top10_overlap") >= HELD else "in part"


def _ranking_words(evaluation: Mapping[str, Any], arm: str) -> str:
    replaced = 1 - _get(evaluation, f"{arm}/top10_overlap")
    return (
        f"{share(replaced)} of top-10 entries replaced, {share(_get(evaluation, f'{arm}/top10_exact'))} of lists "
        f"unchanged in order; NDCG@10 {number(_get(evaluation, 'base/ndcg@10'), 4)} → "
        f"{number(_get(evaluation, f'{arm}/ndcg@10'), 4)}, "
        f"change {with_interval(evaluation, f'{arm}/ndcg@10_change', 4)}"
    )


def _kept(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    """A ratio of gains means something only where the gain below the line is one."""
    free, held = (_get(evaluation, f"{arm}/reward_change") for arm in SHARED)
    words = f"gain {number(held)} with the shield, {number(free)} without"
    if verdict(evaluation, "unshielded/reward_change", 0.0) != "up":
        return "cannot be said", words + ": no gain without it to compare with"
    if held < 0:
        return "nothing: it lost reward", words
    ends = [evaluation.get(f"shielded/gain_kept{end}") for end in ("_lo", "_hi")]
    return share(held / free) + (
        f" [{share(ends[0])}, {share(ends[1])}]" if None not in ends else ""
    ), words


def summary(evaluation: Mapping[str, Any]) -> str:
    """The answers in one paragraph."""
    identical = (
        "are bit-identical"
        if _get(evaluation, "separate/scores_sha256_equal")
        else "are NOT identical"
    )
    lost = {arm: 1 - _get(evaluation, f"{arm}/top10_overlap") for arm in SHARED}
    held = {
        "yes, exactly": "left the ranking exactly as it was",
        "yes, every top 10 is the same": "left every top 10 as it was",
        "nearly": "nearly held the ranking",
        "in part": "held the ranking in part",
        "no": "did not hold the ranking",
    }[_held(evaluation)]
    kept, gain = _kept(evaluation)
    shown = [arm for arm in TUNED if verdict(evaluation, f"{arm}/ctr_lift", 1.0) == "up"]
    lift = f"lies above 1 for {', '.join(shown)}" if shown else "lies above 1 for no arm"
    return (
        f"With separate towers the ranker's scores {identical} before and after tuning. With a shared backbone, tuning "
        f"without a shield replaced {share(lost['unshielded'])} of the top-10 entries; the shield {held}: "
        f"{share(lost['shielded'])} replaced. Reward gain kept under the shield: {kept} ({gain}). The interval of the "
        f"simulated click lift {lift}."
    )


# --- what it does not show -----------------------------------------------------------------------------


class Doubt(NamedTuple):
    text: str
    source: str


def not_shown(e: Evidence) -> list[Doubt]:
    """What a reader must not conclude from this run: rules over its numbers, then the limits of any one run."""
    return [
        *_doubts_about_ranking(e),
        *_doubts_about_price(e),
        *_doubts_about_explanations(e),
        *_doubts_about_procedure(e),
        *_limits(e),
    ]


def _doubts_about_ranking(e: Evidence) -> list[Doubt]:
    m, found = e.evaluation, []
    if not _get(m, "separate/scores_sha256_equal"):
        found.append(
            "The scores of the separate arm are not those from before tuning: something that must not change did."
        )
    if _moved(m, "shielded") and _get(m, "shielded/top10_overlap") < HELD:
        found.append(
            f"That the shield keeps the ranking: {share(1 - m['shielded/top10_overlap'])} of top-10 entries differ."
        )
    elif _get(m, "shielded/top10_exact") < 1:
        found.append(
            f"That the shielded ranking is the same: {share(1 - m['shielded/top10_exact'])} of users see another list."
        )
    if (side := verdict(m, "shielded/ndcg@10_change", 0.0)) != "undecided":
        found.append(
            f"That the shielded ranking is as good as before: its NDCG@10 went {side}, beyond its interval."
        )
    doubts = [Doubt(text, EVALUATION) for text in found]
    leak = e.metrics["ppo"].get("shielded/leak")
    if leak is not None and leak > SEALED:
        doubts.append(
            Doubt(
                f"That the shield is sealed: {leak:.2g} of the shielded update lies in protected directions.",
                "metrics/ppo.json",
            )
        )
    full, bare = e.metrics["ranker"]["ndcg@10"], e.metrics["ranker"]["text_free_ndcg@10"]
    if bare > 0.9 * full:
        doubts.append(
            Doubt(
                "That there was much to protect: without the LLM's item vectors the ranker has NDCG@10 "
                f"{number(bare, 4)}, with them {number(full, 4)}.",
                "metrics/ranker.json",
            )
        )
    return doubts


def _doubts_about_price(e: Evidence) -> list[Doubt]:
    """How near the frontier comes to the target: 90 % of the unshielded learning with 99 % of the top 10, adapters merged."""
    if e.frontier is None:
        return []
    learned = e.frontier[
        (e.frontier["gain_loss"] >= GAIN) & ~e.frontier["mode"].isin(["none", "alora"])
    ]
    if learned.empty:
        return [
            Doubt(
                f"That a shield can keep {share(GAIN)} of the learning: no setting of the frontier did.",
                e.frontier_source,
            )
        ]
    best = learned.loc[learned["overlap"].idxmax()]
    if best["overlap"] >= HELD:
        return []
    return [
        Doubt(
            f"That {share(GAIN)} of the learning can be had with {share(HELD)} of the top 10: of the settings tried that learn as much, "
            f"the nearest ({best['curve']}) keeps {share(best['overlap'])} of the places and {share(best['top1_same'])} of the first ones. "
            f"Learning is measured by likelihood there; of the gain in reward it has {share(best['gain_reward'])}.",
            e.frontier_source,
        )
    ]


def _doubts_about_explanations(e: Evidence) -> list[Doubt]:
    m, found = e.evaluation, []
    for arm in SHARED:
        for key, what in (
            ("reward_change", "the reward of held-out users"),
            ("quality_change", "the judged quality"),
        ):
            if verdict(m, f"{arm}/{key}", 0.0) != "up":
                found.append(
                    f"That tuning ({arm}) raised {what}: change {with_interval(m, f'{arm}/{key}')}."
                )
    for arm in TUNED:
        if verdict(m, f"{arm}/ctr_lift", 1.0) != "up":
            found.append(
                f"A gain in simulated clicks ({arm}): the interval of the lift, {with_interval(m, f'{arm}/ctr_lift')}, "
                "does not lie above 1."
            )
    for arm in SHARED:
        if not m.get(f"{arm}/beats_controls", True):
            found.append(
                f"That no text composed by rule scores as well as the tuned policy ({arm}), by the whole interval: see the controls."
            )
    for arm in ("base", *SHARED):
        if _get(m, f"{arm}/own_item_retrieval@10") <= CHANCE:
            found.append(
                f"That the explanations ({arm}) are about their own item and viewer: they pick theirs among ten "
                f"in {share(m[f'{arm}/own_item_retrieval@10'])} of cases, and chance is {share(CHANCE)}."
            )
    return [Doubt(text, EVALUATION) for text in found]


def _doubts_about_procedure(e: Evidence) -> list[Doubt]:
    ppo, checks, found = e.metrics["ppo"], e.metrics["audit"], []
    m = e.evaluation
    shown = [
        arm
        for arm in SHARED
        if f"{arm}/reward_by_ppo" in m and _rose_in_group(m, arm, "by_ppo") == "yes"
    ]
    if e.params.warm_start and len(shown) < len(SHARED):
        rewards = "; ".join(
            f"{arm} {number(_get(ppo, f'{arm}/reward_first', PPO))} before PPO's first step, "
            f"{number(_get(ppo, f'{arm}/reward_last', PPO))} at its last"
            for arm in SHARED
        )
        found.append(
            Doubt(
                "That the gain is PPO's: a supervised warm start under the same shield came first. Mean reward of the "
                f"texts that PPO sampled: {rewards}.",
                PPO,
            )
        )
    if ppo["ratio_first_minibatch_max_dev"] > 1e-3:
        found.append(
            Doubt(
                "That sampling and training agree: the first probability ratios are off by "
                f"{ppo['ratio_first_minibatch_max_dev']:.2g}.",
                "metrics/ppo.json",
            )
        )
    if ppo.get("warnings"):
        found.append(
            Doubt(
                f"That training was healthy throughout: notebook 05 gave {ppo['warnings']:g} warnings about its statistics.",
                PPO,
            )
        )
    failed = [name for name in runs.AUDITED if not checks[f"{name}_ok"]]
    if failed:
        found.append(
            Doubt(
                f"That the explanations are safe to show: the audit failed on {', '.join(failed)}.",
                "metrics/audit.json",
            )
        )
    if e.manifest.get("git_dirty") is not False or not e.manifest.get("git_commit"):
        found.append(
            Doubt(
                "That the named commit gives these numbers: the code differed from it, or there was none.",
                "manifest.json",
            )
        )
    return found


def _limits(e: Evidence) -> list[Doubt]:
    n = len(e.explanations["user"].unique())
    few = (
        ", which is few: intervals are wide and effects of useful size can hide in them"
        if n < FEW_USERS
        else ""
    )
    return [
        Doubt(
            f"That another seed agrees: this page is one run, seed {e.params.seed}; its intervals are over users only.",
            "params.yaml",
        ),
        Doubt(
            "That people would click more: clicks come from a stated model, whose quality term is the judge's opinion.",
            EVALUATION,
        ),
        Doubt(
            f"That the gains hold for every viewer: explanations of {n} held-out users were judged{few}.",
            "artifacts/explanations.parquet",
        ),
        Doubt(
            f"That it carries over: one data set ({e.params.dataset}) and one language model ({e.params.llm}).",
            "params.yaml",
        ),
        Doubt(
            "That nothing harmful is said: a passed audit means that these checks found nothing.",
            "metrics/audit.json",
        ),
    ]


# --- examples, audit, provenance -------------------------------------------------------------------------

PERCENTILES = (4, 12, 21, 29, 38, 46, 54, 62, 71, 79, 88, 96)


def chosen_users(explanations: pd.DataFrame) -> list[tuple[int, int]]:
    """(percentile, user): the users nearest each of ``PERCENTILES`` of the quality gain, shielded - base.

    Ties go to the lower user number; nobody is chosen twice.
    """
    quality = explanations.pivot(index="user", columns="arm", values="quality")
    gain = (quality["shielded"] - quality["base"]).sort_index()
    chosen: list[tuple[int, int]] = []
    for percentile in PERCENTILES[: len(gain)]:
        distance = (gain - np.percentile(gain, percentile)).abs().drop([user for _, user in chosen])
        chosen.append((percentile, int(distance.idxmin())))
    return chosen


def examples(e: Evidence) -> list[dict[str, Any]]:
    """The chosen users: percentile, user, history (titles), film (with year), genres, position, texts by arm."""
    histories = splits.split(e.interactions, len(e.users), e.params.split).with_valid
    items = e.items.set_index("item")
    catalogue = study.catalogue_of(e.items)
    found = []
    for percentile, user in chosen_users(e.explanations):
        rows = e.explanations[e.explanations["user"] == user].set_index("arm")
        film = items.loc[rows["item"].iloc[0]]
        watched = items.loc[histories[user][-e.params.history_length :]]
        record = {
            "user": user, "title": film["title"], "year": int(film["year"]), "genres": film["genres"].split("|"),
            "history_titles": watched["title"].tolist(), "history_genres": [g.split("|") for g in watched["genres"]],
        }  # fmt: skip
        found.append(
            {
                "percentile": percentile,
                "user": user,
                "history": record["history_titles"],
                "film": film["title"] + (f" ({film['year']})" if film["year"] else ""),
                "genres": film["genres"].replace("|", ", "),
                "position": int(rows["position"].iloc[0]),
                "texts": [
                    {
                        "arm": arm,
                        "text": rows.loc[arm, "text"],
                        "marked": marked(
                            rows.loc[arm, "text"], catalogue.marks(record, rows.loc[arm, "text"])
                        ),
                        "reward": number(rows.loc[arm, "reward"], 2),
                        "quality": number(rows.loc[arm, "quality"], 2),
                    }
                    for arm in ("base", *SHARED)
                ],
            }
        )
    return found


def marked(text: str, marks: list[tuple[int, int, bool]]) -> Markup:
    """``text`` as HTML, escaped, with what it claims marked as true or false (``claims.Catalogue.marks``)."""
    out, at = Markup(""), 0
    for start, end, true in marks:
        claim = Markup('<mark class="{}" title="{}">{}</mark>').format(
            "true" if true else "false",
            "true by the metadata" if true else "not supported by the metadata",
            text[start:end],
        )
        out, at = out + text[at:start] + claim, end
    return out + text[at:]


def evidence_tables(m: Mapping[str, Any]) -> list[tuple[str, pd.DataFrame]]:
    """(caption, table as text) of what section "The measures themselves" shows; those that the run has numbers for."""
    found = []
    if "reference/fcr" in m:
        shown = results.judge_table(m).rename_axis("measure").reset_index()
        found.append(("The judge beside its controls: the same texts shuffled among the records, and explanations composed from metadata. "
                      "LOWER div is more varied; chance is one in ten for own_item and own_film.", shown))  # fmt: skip
    if f"shielded/{results.JUDGED[0]}_change" in m:
        shown = results.judged_gain_table(m).rename_axis("measure").reset_index()
        found.append(("The judge's measures: the base, and each policy's change from it, user by user, with 95 % intervals, on all items "
                      "and on those that PPO never explained.", shown))  # fmt: skip
    if "reference/reward" in m:
        shown = results.control_table(m).rename_axis("texts").reset_index()
        found.append(
            (
                "Texts composed by rule, and the arms on the same users. Each control must lose to the tuned arms: their reward above "
                "its reward, and their clicks over its clicks, user by user with 95 % intervals.",
                shown,
            )
        )
        found.append(("Gains with 95 % intervals: over the base on all items, on items of the training and on new ones, "
                      "and over the warm start.", results.gain_table(m)))  # fmt: skip
    if "shielded/reward_p_holm" in m:
        rows = [{"question": f"{arm}: {what} differs from the base", "p": m[f"{arm}/{what}_p"], "p (Holm)": m[f"{arm}/{what}_p_holm"]}
                for arm in SHARED for what in ("reward", "quality", "click", "ndcg")]  # fmt: skip
        found.append(
            (
                "Eight questions at once: p of a paired bootstrap, and corrected for their number (Holm).",
                pd.DataFrame(rows),
            )
        )
    if "mde/smoke/reward" in m:
        rows = [{"profile": profile, **{name: m[f"mde/{profile}/{name}"] for name in (*results.GAINS, "ctr_lift")}}
                for profile in PROFILES if f"mde/{profile}/reward" in m]  # fmt: skip
        found.append(
            (
                "Smallest gain that each profile's users show four times out of five, given this run's spread.",
                pd.DataFrame(rows),
            )
        )
    return [
        (
            caption,
            frame.map(lambda v: "" if v != v else number(v) if isinstance(v, float) else str(v)),
        )
        for caption, frame in found
    ]


def price_tables(e: Evidence) -> list[tuple[str, pd.DataFrame, str]]:
    """(caption, table as text, source) of section "The price of the shield"; those that the run has numbers for."""
    m, cost, ppo, found = e.evaluation, e.metrics["shield"], e.metrics["ppo"], []
    if "shielded/overlap_held" in m:
        found.append(("The two arms that share one model, beside the target. They differ in the shield alone; what each learned is "
                      "the first row.", _target_table(m), EVALUATION))  # fmt: skip
    if e.frontier is not None:
        points = e.frontier.assign(free=stopped_early(e.frontier)).sort_values(
            "overlap", ascending=False
        )
        rows = [{"setting": p.curve, "strength": (f"rank {p.rank}" if p.rank else f"energy {p.energy:g}") if p.rank_mean else "", "replay weight": f"{p.penalty:g}",
                 "steps": f"{p.steps}", "learning kept (likelihood)": share(p.gain_loss), "reward gain kept": share(p.gain_reward),
                 "top 10 kept": share(p.overlap),
                 "top 10 kept by unshielded training that learned as much": share(p.free)}
                for p in points.itertuples()]  # fmt: skip
        found.append(("Short trainings at equal learning: an unshielded training stopped early moves less, too (the last column "
                      "lies on straight lines between nothing learned and where it was stopped)." + _elsewhere(e), pd.DataFrame(rows), e.frontier_source))  # fmt: skip
    if "build_seconds" in cost:
        rows = [
            (
                "reading the item texts for the bases, beside the encoding of all items",
                f"{cost['gram_seconds']:.1f} s",
            ),
            (
                "building the bases, those of the frontier's settings too",
                f"{cost['build_seconds']:.1f} s",
            ),
            (
                "memory of the bases and their complements while training",
                f"{cost['basis_mb']:.1f} MB",
            ),
            *(
                [("memory of the replay", f"{cost['replay_mb']:.1f} MB")]
                if cost.get("replay_mb")
                else []
            ),
            (
                "the shield's share of a PPO step, with its replay if it has one there",
                share(ppo["shield_seconds"] / ppo["step_seconds"]),
            ),
            *(
                [("settling after the training", f"{ppo['shielded/settle_seconds']:.1f} s")]
                if e.params.shield_replay_steps
                else []
            ),
            (
                "`separate` instead: memory of a second copy of the model",
                f"{cost['second_copy_mb']:.1f} MB",
            ),
            (
                "`separate` instead: memory of a second copy of the adapted matrices",
                f"{cost['second_copy_adapted_mb']:.1f} MB",
            ),
            ("`separate` instead: reading all items once more", f"{cost['encode_seconds']:.1f} s"),
        ]
        found.append(
            (
                "What it takes, on this machine.",
                pd.DataFrame(rows, columns=["cost", "measured"]),
                f"metrics/shield.json, {PPO}",
            )
        )
    return found


def _elsewhere(e: Evidence) -> str:
    """What a caption must add where the frontier is not the run's own."""
    return (
        " Not measured in this run: it is the published frontier, of a laptop run."
        if e.frontier_source == PUBLISHED
        else ""
    )


def _target_table(m: Mapping[str, Any]) -> pd.DataFrame:
    """The study's target, line by line. "by its mean": the value is there, and its interval over users reaches to where it is not."""

    if (
        verdict(m, "unshielded/reward_change", 0.0) == "up"
    ):  # the share of the gain has no interval where a resample has no gain
        m = {
            "shielded/gain_kept": _get(m, "shielded/reward_change")
            / _get(m, "unshielded/reward_change")
        } | dict(m)

    def shown(key: str) -> str:
        if key not in m:
            return "no gain"
        return (
            f"{share(m[key])} [{share(m[f'{key}_lo'])}, {share(m[f'{key}_hi'])}]"
            if f"{key}_lo" in m
            else share(m[key])
        )

    def met(key: str, least: float) -> str:
        value = m.get(key, 0.0)
        return (
            "no"
            if value < least
            else "yes"
            if m.get(f"{key}_lo", value) >= least
            else "by its mean"
        )

    rows = []
    for words, key, least in (
        ("reward gain, as a share of the unshielded one", "gain_kept", GAIN), ("places of the top 10 kept", "top10_overlap", HELD),
        ("places kept that items held out from the bases had", "overlap_held", HELD), ("users whose first item is the same", "top1_same", FIRST),
        ("users with the same ten (beyond the target)", "top10_set_same", HELD), ("users with the same list (beyond the target)", "top10_exact", HELD),
    ):  # fmt: skip
        free = (
            "100 %" if key == "gain_kept" and f"shielded/{key}" in m else shown(f"unshielded/{key}")
        )
        rows.append({"measure": words, "target": f"at least {share(least)}", "unshielded": free, "shielded": shown(f"shielded/{key}"),
                     "met": met(f"shielded/{key}", least)})  # fmt: skip
    rows.insert(
        4,
        {
            "measure": "relative change of NDCG@10, up or down",
            "target": f"below {share(NDCG)}",
            **_ndcg_moved(m),
        },
    )
    return pd.DataFrame(rows)


def _ndcg_moved(m: Mapping[str, Any]) -> dict[str, str]:
    """NDCG@10 after tuning, relative to the base's, and the ends of its interval likewise."""
    base = _get(m, "base/ndcg@10")
    moved = {
        arm: [_get(m, f"{arm}/ndcg@10_change{end}") / base for end in ("", "_lo", "_hi")]
        for arm in SHARED
    }
    value, *ends = map(abs, moved["shielded"])
    verdict = "no" if value >= NDCG else "yes" if max(ends) < NDCG else "by its mean"
    signed = {
        arm: [share(v) if v == 0 or share(v)[0] in "−<" else f"+{share(v)}" for v in values]
        for arm, values in moved.items()
    }
    return {arm: f"{v} [{lo}, {hi}]" for arm, (v, lo, hi) in signed.items()} | {"met": verdict}


def audit_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """The shielded arm's measures beside the thresholds of ``policy.yaml``: measure, value, passes if, verdict."""
    policy = audit.load_policy()
    limits = {
        "gini_base": "not judged: the ranker before tuning",
        "gini_after": f"within {policy.gini_change:g} of gini_base",
    }
    return pd.DataFrame(
        [
            {
                "measure": name,
                "value": number(found[name], 4),
                "passes if": limits.get(name) or f"at most {getattr(policy, name):g}",
                "verdict": "shown only"
                if name == "gini_base"
                else "pass"
                if found[f"{name}_ok"]
                else "FAIL",
            }
            for name in runs.AUDITED
        ]
    )


def parameter_table(params: Params) -> pd.DataFrame:
    """All parameters beside the smoke defaults; columns stage, parameter, value, smoke default, changed."""
    smoke, given = Params().as_dict(), params.as_dict()
    stages = {name: stage.name for stage in reversed(STAGES) for name in owned_by(stage.name)}
    return pd.DataFrame(
        [
            {
                "stage": COMMON if name in owned_by("environment") else stages[name],
                "parameter": name,
                "value": str(value),
                "smoke default": str(smoke[name]),
                "changed": value != smoke[name],
            }
            for name, value in given.items()
        ]
    )


def provenance(e: Evidence) -> list[tuple[str, str]]:
    """Commit, machine, seed and versions, as the manifest has them."""
    m = e.manifest
    state = {True: " with uncommitted changes", False: ""}.get(
        m.get("git_dirty"), " (state of the tree unknown)"
    )
    versions = ", ".join(
        f"{name} {version}" for name, version in (m.get("versions") or {}).items() if version
    )
    return [
        (
            "commit",
            f"{m['git_commit']}{state}"
            if m.get("git_commit")
            else "none: not run from a repository with a commit",
        ),
        ("device", str(m.get("device"))),
        ("processor", f"{m.get('cpu')}, {m.get('threads')} threads"),
        ("seed", str(e.params.seed)),
        ("versions", versions),
    ]


def stage_table(manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Seconds and time of each finished stage, and the start of the sha256 of its metrics file."""
    rows = []
    for name, entry in manifest["stages"].items():
        file = f"metrics/{runs.metrics_name(name)}.json"
        rows.append(
            {
                "stage": name,
                "seconds": f"{entry['seconds']:.1f}",
                "finished (UTC)": entry["finished_at"],
                "metrics file": file,
                "sha256": entry["outputs"].get(file, "")[:12],
            }
        )
    return pd.DataFrame(rows)


# --- figures and the page --------------------------------------------------------------------------------

CAPTIONS = {  # in the order of the page: (caption, source)
    "ranking_moved": (
        "What is left of the base top 10 after tuning, over all users, and the ranking's quality.",
        EVALUATION,
    ),
    "tradeoff": (
        "Reward of held-out users against the share of the base top 10 that is kept.",
        EVALUATION,
    ),
    "reward_parts": (
        "Reward, its three parts and the judge's quality; error bars are ±1.96 standard errors.",
        "artifacts/explanations.parquet",
    ),
    "ctr_lift": (
        "Simulated click rate relative to the base arm. The dotted line is the most that the published account's "
        "click model can give, where length alone is quality.",
        EVALUATION,
    ),
    "sensitivity": (
        "The shielded arm's lift with two of the click model's assumptions multiplied at a time; outlined where it is below 1.",
        "artifacts/sensitivity.parquet",
    ),
    "controls": (
        "Texts composed by rule against the shielded policy, on the same users.",
        EVALUATION,
    ),
    "frontier": (
        "What each way of shielding keeps of the ranking and of the reward.",
        "curves/frontier.csv",
    ),
    "ablations": (
        "What becomes of reward and ranking when one thing is changed.",
        "artifacts/ablations.parquet",
    ),
    "ppo_curves": (
        "PPO by step. Every step has new prompts, so single steps are noisy.",
        "curves/shielded_ppo.csv",
    ),
    "spectrum": (
        "Energy of the item texts' activations outside the protected directions.",
        "artifacts/subspaces.safetensors",
    ),
    "overlap_by_layer": (
        "Share of the explanation prompts' energy that lies inside the protected subspace.",
        "artifacts/overlap.parquet",
    ),
    "ranker_training": ("Training of the ranker, which is frozen afterwards.", "curves/ranker.csv"),
    "data_overview": (
        "The data: popularity, history lengths, genres.",
        "artifacts/interactions.parquet",
    ),
    "recommendation_concentration": (
        "How unevenly items are recommended before and after tuning.",
        "artifacts/top10.parquet",
    ),
}


def figures(e: Evidence) -> dict[str, Figure]:
    """The figures drawn from this run's numbers, by name."""
    more = {}
    if e.frontier is not None:
        more["frontier"] = plots.frontier(e.frontier)
    if e.ablations is not None:
        more["ablations"] = plots.ablations(e.ablations)
    if e.sensitivity is not None:
        more["sensitivity"] = plots.sensitivity(e.sensitivity)
    if any(key.startswith(results.CONTROL) for key in e.evaluation):
        more["controls"] = plots.controls(e.evaluation)
    base, after = (study.top_array(e.top10, arm) for arm in ("base", "shielded"))
    return {
        "ranking_moved": plots.ranking_moved(e.evaluation),
        "tradeoff": plots.tradeoff(e.evaluation),
        "reward_parts": plots.reward_parts(e.explanations),
        "ctr_lift": plots.ctr_lift(e.evaluation, clicks.paper_ceiling()),
        "ppo_curves": plots.ppo_curves(e.curves["ppo"]),
        "spectrum": plots.spectrum(e.protected),
        "overlap_by_layer": plots.overlap_by_layer(e.overlap),
        "ranker_training": plots.ranker_training(e.curves["ranker"]),
        "data_overview": plots.data_overview(e.interactions, e.items),
        "recommendation_concentration": plots.recommendation_concentration(
            base, after, len(e.items)
        ),
        **more,
    }


def inline_svg(svg: str, name: str, label: str) -> Markup:
    """An SVG document as an element of the page: scalable, labelled, its ids made unique by ``name``."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:href="|href="|url\()#', rf"\g<1>#{name}-", body)
    head, _, rest = body.partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', head)[1])
    return Markup(
        f'{head} role="img" style="max-width:{math.ceil(width * 4 / 3)}px" '
        + f'aria-label="{Markup.escape(label)}">'
    ) + Markup(rest)


def render(e: Evidence, pictures: Mapping[str, str]) -> str:
    """The page from the evidence and the figures' SVG documents by name; of ``CAPTIONS``, those that there are."""
    environment = Environment(
        loader=FileSystemLoader(paths.LIBRARY / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    captions = CAPTIONS | {"frontier": (CAPTIONS["frontier"][0] + _elsewhere(e), e.frontier_source)}
    shown = [
        {
            "svg": inline_svg(pictures[name], name, caption),
            "caption": caption,
            "source": source,
            "number": i,
        }
        for i, (name, (caption, source)) in enumerate(
            ((n, c) for n, c in captions.items() if n in pictures), 1
        )
    ]
    return environment.get_template("report.html.j2").render(
        run=e.params.run,
        smoke=e.smoke,
        seed=e.params.seed,
        n_users=len(e.users),
        n_judged=e.explanations["user"].nunique(),
        summary=summary(e.evaluation),
        claims=claims(e.evaluation),
        headline=headline(e.evaluation),
        doubts=not_shown(e),
        figures=shown,
        examples=examples(e),
        percentiles=PERCENTILES,
        measures=evidence_tables(e.evaluation),
        prices=price_tables(e),
        audit=audit_table(e.metrics["audit"]),
        parameters=parameter_table(e.params),
        provenance=provenance(e),
        stages=stage_table(e.manifest),
    )


def build(stage: runs.StageRun) -> Path:
    """Write ``runs/<run>/report.html`` and ``figures/<run>/*.svg``; returns the page's path, an output of ``stage``."""
    import matplotlib.pyplot as plt

    e = gather(stage)
    pictures = {}
    for name, fig in figures(e).items():
        pictures[name] = plots.save(fig, e.params.run, name).read_text(encoding="utf-8")
        plt.close(fig)  # or a notebook would show it a second time
    path = stage.output("report.html", folder="")
    write_atomic(path, render(e, pictures))
    return path
