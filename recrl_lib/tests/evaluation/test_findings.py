"""Verdicts follow the numbers: each rule is given numbers on both sides of its line."""

import numpy as np
import pandas as pd
import pytest

from recrl_lib.evaluation import findings
from recrl_lib.params import Params

SOUND = [  # arm, against, group, measure, value, low, high
    ("separate", "", "all", "scores_equal", 1, None, None),
    ("base", "", "all", "ndcg@10", 0.11, 0.10, 0.12),
    ("unshielded", "", "all", "max_abs_score_delta", 4.9, None, None),
    ("shielded", "", "all", "max_abs_score_delta", 0.07, None, None),
    ("unshielded", "", "all", "top10_overlap", 0.57, 0.55, 0.58),
    ("shielded", "", "all", "top10_overlap", 0.993, 0.991, 0.994),
    ("unshielded", "", "all", "top10_exact", 0, 0, 0),
    ("shielded", "", "all", "top10_exact", 0.64, 0.61, 0.67),
    ("shielded", "", "all", "top1_same", 0.995, 0.98, 0.999),
    ("unshielded", "base", "all", "ndcg@10", -0.02, -0.03, -0.01),
    ("shielded", "base", "all", "ndcg@10", -0.0003, -0.0005, 0.0009),
    ("shielded", "", "all", "reward", 0.90, 0.88, 0.92),
    ("unshielded", "base", "all", "reward", 0.20, 0.15, 0.25),
    ("shielded", "base", "all", "reward", 0.18, 0.13, 0.23),
    ("shielded", "unshielded", "all", "gain_kept", 0.9, 0.8, 1.0),
    ("shielded", "shielded_warm", "all", "reward", 0.003, -0.014, 0.020),
    ("shielded", "shielded_warm", "new_items", "faithfulness", 0.1, 0.05, 0.15),
    ("shielded", "rule_oracle", "all", "faithfulness", -0.09, -0.12, -0.06),
    ("shielded", "base", "all", "fluency", -0.16, -0.19, -0.14),
    ("shielded", "base", "all", "ctr_lift", 1.09, 1.06, 1.12),
    ("shielded", "control_empty", "all", "reward", 0.9, 0.87, 0.93),
    ("shielded", "control_empty", "all", "ctr_lift", 1.7, 1.6, 1.8),
    ("shielded", "control_copied_prompt", "all", "reward", 0.4, 0.3, 0.5),
    ("shielded", "control_copied_prompt", "all", "ctr_lift", 1.7, 1.6, 1.8),
]
KEY = ["arm", "against", "group", "measure"]


def table(rows=SOUND, n=128, **changed) -> pd.DataFrame:
    """``rows`` as results; ``changed``: (value, low, high[, n]) by "arm against group measure"."""
    frame = pd.DataFrame(rows, columns=[*KEY, "value", "low", "high"]).assign(n=float(n), seeds=1.0)
    frame = frame.astype({"value": float, "low": float, "high": float}).set_index(KEY)
    for key, numbers in changed.items():
        frame.loc[tuple(key.split("|")), ["value", "low", "high", "n"][: len(numbers)]] = numbers
    return frame.reset_index()


def test_a_sound_run_answers_good_and_bad_news_alike():
    assert [one.answer for one in findings.findings(table())] == [
        "yes",  # bit-identical when separate
        "yes",  # moved without a shield
        "nearly",  # held by it
        "no",  # no shield is needed to be exact
        "90.0 %",  # of the gain
        "yes",  # reward, unshielded
        "yes",  # reward, shielded
        "not shown",  # PPO's own part
        "yes",  # new items
        "no, it is lower",  # against the rule that reads the weights
        "no, it is lower",  # fluency
        "yes",  # clicks
        "yes",  # controls
    ]
    changed = {"shielded|control_copied_prompt|all|reward": (-0.1, -0.2, 0.1)}
    evidence = {one.question: one for one in findings.findings(table(**changed))}
    beaten = evidence["Do all texts composed to fool the measures lose to the policy (shielded)?"]
    assert beaten.evidence == "of 2, not below it by a whole interval: copied prompt"
    held = evidence["Did the shield hold the ranking?"].evidence
    assert held.startswith("0.7 % of top-10 places replaced, 64.0 % of lists the same in order")
    own = evidence["Did PPO add reward to its own warm start (shielded)?"]
    assert own.evidence == "reward against shielded_warm: 0.003 [-0.014, 0.020], 128 users"
    assert own.source == "metrics/evaluation.csv"


EMPTY, FEW = "shielded|control_empty|all|", "too few users to say"
COPIED = "shielded|control_copied_prompt|all|reward"
BASE, WARM = "shielded|base|all|", "shielded|shielded_warm|all|reward"
NEW = "shielded|shielded_warm|new_items|faithfulness"
HELD, DELTA = "Did the shield hold", "shielded||all|max_abs_score_delta"


@pytest.mark.parametrize(
    "start, changed, expected",
    [
        ("Separate towers", {"separate||all|scores_equal": (0,)}, "no"),
        ("Does it need", {"separate||all|scores_equal": (0,)}, "not shown"),
        ("Shared backbone", {"unshielded||all|max_abs_score_delta": (0,)}, "no"),
        (HELD, {DELTA: (0,)}, "yes, exactly"),
        (HELD, {"shielded||all|top10_exact": (1,)}, "yes, every top 10 is the same"),
        (HELD, {"shielded||all|top10_overlap": (0.98,)}, "in part"),
        (HELD, {"shielded||all|top10_overlap": (0.57,)}, "no"),
        ("How much", {"unshielded|base|all|reward": (0.2, -0.01, 0.4)}, "cannot be said"),
        ("Did PPO add", {WARM: (0.02, 0.01, 0.03)}, "yes"),
        ("Did PPO add", {WARM: (0.02, 0.0, 0.03)}, "not shown"),
        ("Did PPO add", {WARM: (-0.02, -0.03, -0.01)}, "no, it is lower"),
        ("Did PPO make texts on films", {NEW: (1, 1, 1, 9)}, FEW),
        ("Do simulated", {BASE + "ctr_lift": (1.01, 0.99, 1.03)}, "not shown"),
        ("Do all texts", {EMPTY + "reward": (0.1, -0.1, 0.3)}, "not shown"),
        ("Do all texts", {EMPTY + "ctr_lift": (1.1, 0.9, 1.3)}, "not shown"),
        ("Do all texts", {COPIED: (1, 1, 1, 6)}, FEW),
    ],
)  # fmt: skip
def test_each_answer_turns_with_its_numbers(start, changed, expected):
    found = findings.findings(table(**changed))
    assert [one.answer for one in found if one.question.startswith(start)] == [expected]


def test_target_table():
    found = findings.target_table(table()).set_index("measure")
    assert found["met"].tolist() == ["by its mean", "yes", "by its mean", "no", "yes"]
    assert found.loc["reward gain, as a share of the unshielded one", "unshielded"] == "1"
    moved = table(**{"shielded|base|all|ndcg@10": (-0.0003, -0.0018, 0.0009)})
    assert findings.target_table(moved).iloc[-1]["met"] == "by its mean"
    moved = table(**{"shielded|base|all|ndcg@10": (0.0012, 0.001, 0.0018)})
    assert findings.target_table(moved).iloc[-1]["met"] == "no"


PPO = [("shielded", "", "all", "leak", 1e-9), ("", "", "all", "warnings", 0)]
PPO += [("shielded", "", "all", "ratio_first_minibatch_max_dev", 1e-6)]
RANKER = [("sasrec", "", "all", "ndcg@10", 0.11), ("sasrec", "", "all", "text_free_ndcg@10", 0.05)]
CLEAN = {"git_commit": "c" * 40, "git_dirty": False}


def doubts(manifest=CLEAN, users=128, ppo=PPO, ranker=RANKER, passed=1.0, **changed):
    short = {
        name: pd.DataFrame(rows, columns=[*KEY, "value"]).assign(low=np.nan, high=np.nan)
        for name, rows in (("shielded_ppo", ppo), ("ranker", ranker))
    }
    audited = pd.DataFrame({"measure": ["parity_gap", "gini_base"], "passed": [passed, np.nan]})
    tables = short | {"evaluation": table(n=users, **changed), "audit": audited}
    return findings.not_shown(tables, Params(run="r", seed=3), manifest)


def test_limits_hold_for_any_run_and_bad_answers_are_repeated():
    found = doubts()
    assert [text.split(":")[0] for text, _ in found[-5:]] == [
        "That another seed agrees",
        "That people would click more",
        "That the gains hold for every viewer",
        "That it carries over",
        "That nothing harmful is said",
    ]
    assert "seed 3" in found[-5][0] and "128 held-out users were judged." in found[-3][0]
    texts = "\n".join(text for text, _ in found[:-5])
    fell = "themselves (shielded)? No, it is lower: faithfulness against rule_oracle: -0.090"
    assert fell in texts
    assert "Did PPO add reward to its own warm start (shielded)? Not shown: " in texts
    assert "simulated clicks" not in texts and len(found) == 5 + 5


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"ppo": [("shielded", "", "all", "leak", 1e-3)]}, "sealed: 0.001 of the update"),
        ({"ppo": [("", "", "all", "warnings", 2)]}, "healthy throughout: 2 warnings"),
        ({"ppo": [(*PPO[2][:4], 0.1)]}, "sampling and training agree"),
        ({"ranker": [RANKER[0], (*RANKER[1][:4], 0.105)]}, "0.1050 without item vectors"),
        ({"passed": 0.0}, "the audit failed on parity_gap"),
        ({"manifest": CLEAN | {"git_dirty": True}}, "the named commit"),
        ({"manifest": {}}, "the named commit"),
        ({"users": 99}, "99 held-out users were judged, too few"),
    ],
)
def test_each_check_finds_what_it_looks_for(given, expected):
    sound, found = (" ".join(text for text, _ in doubts(**g)) for g in ({}, given))
    assert expected in found and expected not in sound


@pytest.mark.parametrize(
    "value, text",
    [(0, "0 %"), (1, "100 %"), (0.5, "50.0 %"), (1e-5, "< 0.1 %"), (0.99999, "> 99.9 %")],
)
def test_share_says_all_and_nothing_only_of_all_and_nothing(value, text):
    assert findings.share(value) == text
