"""Verdicts: fixed rules that turn a run's tables of results into findings, the bad news included.

``findings`` answers the study's questions, ``not_shown`` lists what must not be concluded, and
``target_table`` holds the shield against its target. Notebook 09 shows them. Every rule reads the
tables of ``runs.read_results`` and names the file it read, so that no verdict is typed by hand.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

from recrl_lib import runs
from recrl_lib.evaluation import results, stats
from recrl_lib.params import Params
from recrl_lib.scoring.claims import Catalogue

SHARED = ("unshielded", "shielded")  # the arms in which one model serves both towers
LEAST_USERS = 10  # a bootstrap over fewer says nothing
FEW_USERS = 100
Tables = Mapping[str, pd.DataFrame]  # results by stage


class Finding(NamedTuple):
    """An answer (yes, no, not shown, ...), the numbers behind it, and the file they stand in."""

    question: str
    answer: str
    evidence: str
    source: str = "metrics/evaluation.csv"


def share(value: float) -> str:
    """Per cent with one digit; "100 %" and "0 %" mean exactly that."""
    if value in (0.0, 1.0):
        return f"{value:.0%}".replace("%", " %")
    text = f"{100 * value:.1f}"
    return {"0.0": "< 0.1 %", "-0.0": "< 0.1 %", "100.0": "> 99.9 %"}.get(text, f"{text} %")


def rows_of(
    table: pd.DataFrame, measure: str, arm: str = "", against: str = "", group: str = "all"
) -> pd.DataFrame:
    """The rows of ``table`` with this key: one, or none where the run did not measure it."""
    key = (table["measure"] == measure) & (table["arm"] == arm)
    return table[key & (table["against"] == against) & (table["group"] == group)]


def words(rows: pd.DataFrame, spec: str = ".3f") -> str:
    """The one row of results as "0.743 [0.720, 0.761]"; "" without a row."""
    found = rows[["value", "low", "high"]].to_numpy(float)
    return stats.interval(*found[0], spec) if len(found) else ""


def side(rows: pd.DataFrame, null: float = 0.0) -> str:
    """ "up", "down" or "undecided": on which side of ``null`` the interval of the one row lies."""
    low, high = rows.iloc[0]["low"], rows.iloc[0]["high"]
    return "up" if low > null else "down" if high < null else "undecided"


# --- findings --------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A question that an interval answers: on which side of ``null`` does the whole of it lie?"""

    question: str  # {arm} is filled in
    measure: str
    against: str = "base"  # {arm} is filled in
    group: str = "all"
    null: float = 0.0


RULES = (
    Rule("Did tuning raise the reward of held-out users ({arm})?", "reward"),
    Rule("Did PPO add reward to its own warm start ({arm})?", "reward", "{arm}_warm"),
    Rule("Does a tuned text earn more than a composed template ({arm})?", "reward", "reference"),
    Rule("Did it rise on items that PPO never explained ({arm})?", "reward", group="new_items"),
    Rule("Does the judge, which training never saw, agree ({arm})?", "quality"),
    Rule("Did PPO add judged quality to its warm start ({arm})?", "quality", "{arm}_warm"),
    Rule("Are more of its claims true ({arm})?", "grounding_precision"),
    Rule("Do the texts read more fluently to the base model ({arm})?", "fluency"),
    Rule("Do simulated clicks rise ({arm})?", "ctr_lift", null=1.0),
)
ANSWERS = {"up": "yes", "down": "no, it fell", "undecided": "not shown"}


def findings(evaluation: pd.DataFrame) -> list[Finding]:
    """The study's questions, answered from the results of stage ``evaluation``."""
    equal = runs.value(evaluation, "scores_equal", "separate") == 1
    moved = runs.value(evaluation, "max_abs_score_delta", "unshielded") > 0
    exact = "sha256 over all users × items " + ("equal" if equal else "differs")
    ranking = {arm: _ranking_words(evaluation, arm) for arm in SHARED}
    fixed = {
        "Separate towers: are scores bit-identical after tuning?": (
            "yes" if equal else "no",
            exact,
        ),
        "Shared backbone: did tuning without a shield move the ranking?": (
            "yes" if moved else "no",
            ranking["unshielded"],
        ),
        "Did the shield hold the ranking?": (_held(evaluation), ranking["shielded"]),
        "Does it need a shield to hold the ranking exactly?": (
            "no" if equal else "not shown",
            f"a second copy of the adapted weights does, as arm separate: {exact}",
        ),
        "How much of the gain in reward was kept under the shield?": _gain_kept(evaluation),
    }
    found = [Finding(question, *rest) for question, rest in fixed.items()]
    for rule, arm in itertools.product(RULES, SHARED):
        against = rule.against.format(arm=arm)
        rows = rows_of(evaluation, rule.measure, arm, against, rule.group)
        if len(rows):
            users = rows.iloc[0]["n"]
            few = users < LEAST_USERS
            answer = "too few users to say" if few else ANSWERS[side(rows, rule.null)]
            evidence = f"{rule.measure} against {against}: {words(rows)}, {users:.0f} users"
            found.append(Finding(rule.question.format(arm=arm), answer, evidence))
    return found + [one for arm in SHARED for one in _controls(evaluation, arm)]


def _held(table: pd.DataFrame) -> str:
    if runs.value(table, "max_abs_score_delta", "shielded") == 0:
        return "yes, exactly"
    if runs.value(table, "top10_exact", "shielded") == 1:
        return "yes, every top 10 is the same"
    free, held = (runs.value(table, "top10_overlap", arm) for arm in SHARED)
    if held <= free:
        return "no"
    return "nearly" if held >= KEPT else "in part"


def _ranking_words(table: pd.DataFrame, arm: str) -> str:
    overlap, exact = (runs.value(table, m, arm) for m in ("top10_overlap", "top10_exact"))
    change = words(rows_of(table, "ndcg@10", arm, "base"), "+.4f")
    return (
        f"{share(1 - overlap)} of top-10 places replaced, {share(exact)} of lists the same in "
        f"order; change of NDCG@10 {change}"
    )


def _gain_kept(table: pd.DataFrame) -> tuple[str, str]:
    """A share of a gain means something only where there is a gain."""
    free, held = (rows_of(table, "reward", arm, "base") for arm in SHARED)
    gains = f"gain {words(held)} with the shield, {words(free)} without"
    if side(free) != "up":
        return "cannot be said", f"{gains}: no gain to keep a share of"
    interval = words(rows_of(table, "gain_kept", "shielded", "unshielded"))
    kept = share(held.iloc[0]["value"] / free.iloc[0]["value"])
    return kept, f"{gains}; share {interval or 'without an interval'}"


def _controls(table: pd.DataFrame, arm: str) -> list[Finding]:
    beaten = results.beaten_controls(table, arm)
    if not beaten:
        return []
    equal = [name.replace("_", " ") for name, below in beaten.items() if not below]
    few = rows_of(table, "reward", arm, f"control_{min(beaten)}").iloc[0]["n"] < LEAST_USERS
    return [
        Finding(
            f"Do all texts composed to fool the measures lose to the policy ({arm})?",
            "not shown" if equal else "too few users to say" if few else "yes",
            f"of {len(beaten)}, not below it by a whole interval: {', '.join(equal) or 'none'}",
        )
    ]


# --- the target of the shield ----------------------------------------------------------------

GAIN, KEPT, FIRST, NDCG = 0.9, 0.99, 0.99, 0.01
TARGETS = (  # what, measure, group, least
    ("reward gain, as a share of the unshielded one", "gain_kept", "all", GAIN),
    ("places of the top 10 kept", "top10_overlap", "all", KEPT),
    ("places kept of items that no basis had seen", "top10_overlap", "held_out_items", KEPT),
    ("users whose first item is the same", "top1_same", "all", FIRST),
    ("users with the same ten (beyond the target)", "top10_set_same", "all", KEPT),
    ("users with the same list (beyond the target)", "top10_exact", "all", KEPT),
)


def target_table(evaluation: pd.DataFrame) -> pd.DataFrame:
    """The study's target, line by line: measure, target, unshielded, shielded, met.

    "by its mean": the value is there, and its interval over users reaches to where it is not.
    """
    rows = []
    for what, measure, group, least in TARGETS:
        against = "unshielded" if measure == "gain_kept" else ""
        held = rows_of(evaluation, measure, "shielded", against, group)
        if len(held):
            value, low = held.iloc[0]["value"], held.iloc[0]["low"]
            met = "no" if value < least else "by its mean" if low < least else "yes"
            free = words(rows_of(evaluation, measure, "unshielded", "", group)) or "1"
            rows.append((what, f"at least {share(least)}", free, words(held), met))
    limit = NDCG * runs.value(evaluation, "ndcg@10", "base")
    moved = [rows_of(evaluation, "ndcg@10", arm, "base") for arm in SHARED]
    value, *ends = moved[1][["value", "low", "high"]].abs().to_numpy()[0]
    met = "no" if value >= limit else "yes" if max(ends) < limit else "by its mean"
    cells = (words(change, "+.4f") for change in moved)
    rows.append(("change of NDCG@10, up or down", f"below {limit:.4f}", *cells, met))
    return pd.DataFrame(rows, columns=["measure", "target", *SHARED, "met"])


# --- what the run does not show ----------------------------------------------------------------


CHECKS = (  # stage, measure, arm, the most that is sound, what more of it means
    ("shielded_ppo", "leak", "shielded", 1e-6,  # rounding of float32 adapters
     "That the shield is sealed: {:.2g} of the update lies in protected directions."),
    ("shielded_ppo", "ratio_first_minibatch_max_dev", "shielded", 1e-3,
     "That sampling and training agree: the first probability ratios are off by {:.2g}."),
    ("shielded_ppo", "warnings", "", 0,
     "That training was healthy throughout: {:g} warnings about its statistics."),
)  # fmt: skip
LIMITS = {  # text: the file it rests on
    "That another seed agrees: this is one run, seed {seed}; intervals are over users only.":
        "params.yaml",
    "That people would click more: clicks come from a model that believes the judge.":
        "metrics/evaluation.csv",
    "That the gains hold for every viewer: texts of {users} held-out users were judged{few}.":
        "artifacts/explanations.parquet",
    "That it carries over: one data set ({dataset}) and one language model ({llm}).":
        "params.yaml",
    "That nothing harmful is said: a passed audit means that these checks found nothing.":
        "metrics/audit.csv",
}  # fmt: skip
SHOWN = ("yes", "yes, exactly", "yes, every top 10 is the same")


def not_shown(tables: Tables, params: Params, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must not conclude, each with the file it rests on; the last hold for any run.

    Args:
        tables: Results of the stages ranker, shielded_ppo, evaluation and audit.
        params: Parameters of the run.
        manifest: ``runs.read_manifest`` of the run.
    """
    evaluation, found = tables["evaluation"], []
    for one in findings(evaluation):
        if one.answer not in SHOWN and not one.answer.endswith("%"):
            answer = one.answer[0].upper() + one.answer[1:]
            found.append((f"{one.question} {answer}: {one.evidence}.", one.source))
    for stage, measure, arm, most, text in CHECKS:
        rows = rows_of(tables[stage], measure, arm)
        if len(rows) and rows.iloc[0]["value"] > most:
            found.append((text.format(rows.iloc[0]["value"]), f"metrics/{stage}.csv"))
    full, bare = (rows_of(tables["ranker"], m, "sasrec") for m in ("ndcg@10", "text_free_ndcg@10"))
    if bare.iloc[0]["value"] > 0.9 * full.iloc[0]["value"]:
        text = f"NDCG@10 is {words(bare, '.4f')} without item vectors, {words(full, '.4f')} with"
        found.append((f"That there was much to protect: {text}.", "metrics/ranker.csv"))
    if failed := tables["audit"].query("passed == 0")["measure"].tolist():
        text = f"That the texts are safe to show: the audit failed on {', '.join(failed)}."
        found.append((text, "metrics/audit.csv"))
    if manifest.get("git_dirty") is not False or not manifest.get("git_commit"):
        text = "That the named commit gives these numbers: the code differed, or there was none."
        found.append((text, "manifest.json"))
    users = int(rows_of(evaluation, "reward", "shielded").iloc[0]["n"])
    few = ", too few to see small effects" if users < FEW_USERS else ""
    values = params.as_dict() | {"users": users, "few": few}
    return found + [(text.format(**values), source) for text, source in LIMITS.items()]


def too_small(params: Params) -> bool:
    """Whether the run is as small as the smoke profile in steps or users: it shows nothing."""
    smoke = Params()
    return params.ppo_steps <= smoke.ppo_steps or params.eval_users <= smoke.eval_users


# --- examples ----------------------------------------------------------------------------------

PERCENTILES = (4, 12, 21, 29, 38, 46, 54, 62, 71, 79, 88, 96)


def chosen_users(explanations: pd.DataFrame) -> list[tuple[int, int]]:
    """(percentile, user): the users nearest ``PERCENTILES`` of the quality gain, shielded - base.

    Ties go to the lower user number; nobody is chosen twice.
    """
    quality = explanations.pivot(index="user", columns="arm", values="quality")
    gain = (quality["shielded"] - quality["base"]).sort_index()
    chosen: dict[int, int] = {}
    for percentile in PERCENTILES[: len(gain)]:
        distance = (gain - np.percentile(gain, percentile)).abs().drop(chosen.values())
        chosen[percentile] = int(distance.idxmin())
    return list(chosen.items())


def example(
    percentile: int, record: Mapping[str, Any], said: pd.DataFrame, catalogue: Catalogue
) -> Markup:
    """One viewer's recommendation and what each arm says of it, as escaped HTML with marked claims.

    Args:
        percentile: Where the viewer stands by gain in judged quality.
        record: What the texts are about (``study`` builds it).
        said: The viewer's rows of the explanations: arm, text, reward, quality.
        catalogue: Knows which words of a text are claims, and which claims are true.
    """
    parts = [
        Markup("<h3>Percentile {}: {}</h3><p>At place {}. Watched last: {}.</p>").format(
            percentile, record["title"], record["position"], "; ".join(record["history_titles"])
        )
    ]
    for arm in ("base", *SHARED):
        row = said[said["arm"] == arm].iloc[0]
        text = marked(row["text"], catalogue.marks(record, row["text"])) or "(no text)"
        scores = f"reward {row['reward']:.2f}, judged quality {row['quality']:.2f}"
        parts.append(Markup("<b>{}</b>, {}<blockquote>{}</blockquote>").format(arm, scores, text))
    return Markup("<article>{}</article>").format(Markup("").join(parts))


def marked(text: str, marks: Sequence[tuple[int, int, bool]]) -> Markup:
    """``text``, escaped, with its claims marked as true or false: (start, end, whether true)."""
    out, at = Markup(""), 0
    for start, end, true in marks:
        kind = ("true", "true by the metadata") if true else ("false", "not supported by it")
        claim = Markup('<mark class="{}" title="{}">{}</mark>').format(*kind, text[start:end])
        out, at = out + text[at:start] + claim, end
    return out + text[at:]
