"""Verdicts: fixed rules that turn a run's tables of results into findings, the bad news included.

``findings`` answers the study's questions, ``target_table`` holds the shield against its target,
``not_shown`` lists what must not be concluded. Every rule reads the tables of ``runs.read_results``
and names the file it read, so that no verdict is typed by hand. Notebook 09 shows them.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import pandas as pd

from recrl_lib import runs
from recrl_lib.evaluation import results, stats
from recrl_lib.params import Params

SHARED = ("unshielded", "shielded")  # the arms in which one model serves both towers
LEAST_USERS = 10  # a bootstrap over fewer says nothing
FEW_USERS = 100


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
    """Results as "0.743 [0.720, 0.761]", one after the other; "" without a row."""
    numbers = rows[["value", "low", "high"]].to_numpy(float)
    return ", ".join(stats.interval(*row, spec) for row in numbers)


def side(rows: pd.DataFrame, null: float = 0.0) -> str:
    """ "up", "down" or "undecided": on which side of ``null`` the interval of the one row lies."""
    low, high = rows["low"].item(), rows["high"].item()
    return "up" if low > null else "down" if high < null else "undecided"


RULES = (  # question, measure, against, group; the answer is where the whole interval lies
    ("Did tuning raise the reward of held-out users ({arm})?", "reward", "base", "all"),
    ("Did PPO add reward to its own warm start ({arm})?", "reward", "{arm}_warm", "all"),
    ("Did PPO make texts more faithful ({arm})?", "faithfulness", "{arm}_warm", "all"),
    ("Did PPO make texts on films that it never explained more faithful ({arm})?",
     "faithfulness", "{arm}_warm", "new_items"),
    ("Does the judge's rank_drop, which training never saw, agree with PPO's gain ({arm})?",
     "rank_drop", "{arm}_warm", "all"),
    ("Did tuning make more answers to follow-up questions true ({arm})?",
     "answered_truly", "base", "follow_ups"),
    ("Did PPO make more answers to follow-up questions true ({arm})?",
     "answered_truly", "{arm}_warm", "follow_ups"),
    ("Are the texts more faithful than citing the last two films ({arm})?",
     "faithfulness", "rule_recent", "all"),
    ("Are the texts more faithful than citing the nearest genres ({arm})?",
     "faithfulness", "rule_genre", "all"),
    ("Are the texts as faithful as the rule that reads the weights themselves ({arm})?",
     "faithfulness", "rule_oracle", "all"),
    ("Does the judge of quality, which training never saw, agree ({arm})?",
     "quality", "base", "all"),
    ("Did PPO add judged quality to its warm start ({arm})?", "quality", "{arm}_warm", "all"),
    ("Are more of its claims true ({arm})?", "grounding_precision", "base", "all"),
    ("Do the texts read more fluently to the base model ({arm})?", "fluency", "base", "all"),
    ("Do simulated clicks rise ({arm})?", "ctr_lift", "base", "all"),
)  # fmt: skip
ANSWERS = {"up": "yes", "down": "no, it is lower", "undecided": "not shown"}
FEW = "too few users to say"
SHOWN = ("yes", "yes, exactly", "yes, every top 10 is the same")


def findings(evaluation: pd.DataFrame) -> list[Finding]:
    """The study's questions, answered from the results of stage ``evaluation``."""
    found = _of_the_ranking(evaluation)
    for (question, measure, against, group), arm in product(RULES, SHARED):
        against = against.format(arm=arm)
        rows = rows_of(evaluation, measure, arm, against, group)
        if len(rows):
            users = rows.iloc[0]["n"]
            unchanged = 1.0 if measure == "ctr_lift" else 0.0  # a lift is a ratio
            answer = FEW if users < LEAST_USERS else ANSWERS[side(rows, unchanged)]
            evidence = f"{measure} against {against}: {words(rows)}, {users:.0f} users"
            found.append(Finding(question.format(arm=arm), answer, evidence))
    for arm in SHARED:
        if beaten := results.beaten_controls(evaluation, arm):
            users = rows_of(evaluation, "reward", arm, f"control_{min(beaten)}").iloc[0]["n"]
            equal = [name.replace("_", " ") for name, below in beaten.items() if not below]
            answer = "not shown" if equal else FEW if users < LEAST_USERS else "yes"
            question = f"Do all texts composed to fool the measures lose to the policy ({arm})?"
            evidence = f"of {len(beaten)}, not below it by a whole interval: "
            found.append(Finding(question, answer, evidence + (", ".join(equal) or "none")))
    return found


def _of_the_ranking(table: pd.DataFrame) -> list[Finding]:
    """What became of the ranking in each arm, and of the gain in reward."""
    equal = runs.value(table, "scores_equal", "separate") == 1
    moved = runs.value(table, "max_abs_score_delta", "unshielded") > 0
    exact = "sha256 over all users × items " + ("equal" if equal else "differs")
    copy = f"a second copy of the adapted weights does, as arm separate: {exact}"
    kept = []
    for arm in SHARED:
        overlap, same = (runs.value(table, m, arm) for m in ("top10_overlap", "top10_exact"))
        lost = f"{share(1 - overlap)} of top-10 places replaced, {share(same)} of lists the same"
        change = words(rows_of(table, "ndcg@10", arm, "base"), "+.4f")
        kept.append(f"{lost} in order; change of NDCG@10 {change}")
    (free, held), needed = kept, "no" if equal else "not shown"
    yes = {True: "yes", False: "no"}
    return [
        Finding("Separate towers: are scores bit-identical after tuning?", yes[equal], exact),
        Finding("Shared backbone: did tuning without a shield move the ranking?", yes[moved], free),
        Finding("Did the shield hold the ranking?", _held(table), held),
        Finding("Does it need a shield to hold the ranking exactly?", needed, copy),
        Finding("How much of the gain in reward was kept under the shield?", *_gain_kept(table)),
    ]


def _held(table: pd.DataFrame) -> str:
    if runs.value(table, "max_abs_score_delta", "shielded") == 0:
        return "yes, exactly"
    if runs.value(table, "top10_exact", "shielded") == 1:
        return "yes, every top 10 is the same"
    free, held = (runs.value(table, "top10_overlap", arm) for arm in SHARED)
    if held <= free:
        return "no"
    return "nearly" if held >= KEPT else "in part"


def _gain_kept(table: pd.DataFrame) -> tuple[str, str]:
    """A share of a gain means something only where there is a gain."""
    free, held = (rows_of(table, "reward", arm, "base") for arm in SHARED)
    gains = f"gain {words(held)} with the shield, {words(free)} without"
    if side(free) != "up":
        return "cannot be said", f"{gains}: no gain to keep a share of"
    interval = words(rows_of(table, "gain_kept", "shielded", "unshielded"))
    kept = share(held["value"].item() / free["value"].item())
    return kept, f"{gains}; share {interval or 'without an interval'}"


KEPT, NDCG = 0.99, 0.01
TARGETS = (  # what, measure, against, group, least
    ("reward gain, as a share of the unshielded one", "gain_kept", "unshielded", "all", 0.9),
    ("places of the top 10 kept", "top10_overlap", "", "all", KEPT),
    ("places kept of items that no basis had seen", "top10_overlap", "", "held_out_items", KEPT),
    ("users whose first item is the same", "top1_same", "", "all", KEPT),
    ("true answers, why not another film", "answered_truly", "", "intent:why_not", 0.8),
    ("true answers, something instead", "answered_truly", "", "intent:instead", 0.7),
    ("true answers, comparing two films", "answered_truly", "", "intent:compare", 0.8),
    ("well-formed answers to follow-ups", "well_formed", "", "follow_ups", 0.9),
    ("users with the same ten (beyond the target)", "top10_set_same", "", "all", KEPT),
    ("users with the same list (beyond the target)", "top10_exact", "", "all", KEPT),
)


def target_table(evaluation: pd.DataFrame) -> pd.DataFrame:
    """The study's target, line by line: measure, target, unshielded, shielded, met. "by its mean":
    the value is there, and its interval over users reaches to where it is not."""
    rows = []
    for what, measure, against, group, least in TARGETS:
        held = rows_of(evaluation, measure, "shielded", against, group)
        for value, low in held[["value", "low"]].to_numpy():
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


CHECKS = (  # measure of PPO, its arm, the most that is sound, what more of it means
    ("leak", "shielded", 1e-6,
     "That the shield is sealed: {:.2g} of the update lies in protected directions."),
    ("ratio_first_minibatch_max_dev", "shielded", 1e-3,
     "That sampling and training agree: the first probability ratios are off by {:.2g}."),
    ("warnings", "", 0,
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


def not_shown(
    tables: Mapping[str, pd.DataFrame], params: Params, manifest: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What a reader must not conclude, each with the file it rests on; the last hold for any run.
    ``tables``: results of the stages ranker, shielded_ppo, evaluation and audit."""
    evaluation, found = tables["evaluation"], []
    for one in findings(evaluation):
        if one.answer not in SHOWN and not one.answer.endswith("%"):
            answer = one.answer[0].upper() + one.answer[1:]
            found.append((f"{one.question} {answer}: {one.evidence}.", one.source))
    for measure, arm, most, text in CHECKS:
        for value in rows_of(tables["shielded_ppo"], measure, arm)["value"]:
            if value > most:
                found.append((text.format(value), "metrics/shielded_ppo.csv"))
    full, bare = (rows_of(tables["ranker"], m, "sasrec") for m in ("ndcg@10", "text_free_ndcg@10"))
    if bare["value"].item() > 0.9 * full["value"].item():
        text = f"NDCG@10 is {words(bare, '.4f')} without item vectors, {words(full, '.4f')} with"
        found.append((f"That there was much to protect: {text}.", "metrics/ranker.csv"))
    if failed := tables["audit"].query("passed == 0")["measure"].tolist():
        text = f"That the texts are safe to show: the audit failed on {', '.join(failed)}."
        found.append((text, "metrics/audit.csv"))
    if manifest.get("git_dirty") is not False or not manifest.get("git_commit"):
        text = "That the named commit gives these numbers: the code differed, or there was none."
        found.append((text, "manifest.json"))
    users = int(rows_of(evaluation, "reward", "shielded")["n"].item())
    few = ", too few to see small effects" if users < FEW_USERS else ""
    values = params.as_dict() | {"users": users, "few": few}
    return found + [(text.format(**values), source) for text, source in LIMITS.items()]
