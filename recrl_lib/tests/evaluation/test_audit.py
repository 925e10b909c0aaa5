import warnings

import numpy as np
import pandas as pd
import pytest

from recrl_lib.evaluation.audit import (
    audit,
    leaks,
    load_policy,
    parity_gap,
    recommendation_gini,
    toxicity,
)

N, ITEMS = 40, 20
USERS = pd.DataFrame(
    {"user": range(100, 100 + N), "gender": ["M", "F"] * (N // 2), "age": [31] * N}
)
RECORDS = [
    dict(
        user=100 + i,
        item=1,
        position=1,
        title="Apollo 13",
        year=1995,
        genres=["Drama"],
        history_titles=["101 Dalmatians"],
        history_genres=[["Comedy"]],
    )
    for i in range(N)
]
TEXTS = ["Because you liked 101 Dalmatians, I recommend Apollo 13 (1995), a drama film."] * N
TOP = np.tile(np.arange(1, 11), (N, 1))
QUALITY = np.full(N, 0.6)


def run(**changed):
    given = (
        dict(
            texts=TEXTS,
            records=RECORDS,
            users=USERS,
            base_top=TOP,
            after_top=TOP,
            n_items=ITEMS,
            quality=QUALITY,
        )
        | changed
    )
    return audit(**given)


def test_a_clean_run_passes():
    found = run(ndcg=np.full(N, 0.1))
    assert all(found[k] for k in found if k.endswith("_ok"))
    names = [
        "toxicity_mean",
        "toxicity_p95",
        "gini_base",
        "gini_after",
        "parity_gap",
        "privacy_leak_rate",
    ]
    assert [k for k in found][:6] == names and {f"{n}_ok" for n in names} <= set(found)
    assert (
        found["gini_base"] == found["gini_after"] == pytest.approx(0.5)
    )  # ten of twenty items share everything
    assert (found["parity_gap"], found["privacy_leak_rate"], found["parity_gap_ndcg"]) == (0, 0, 0)
    assert (found["parity_groups"], found["n_texts"]) == (2, N)


def test_each_planted_violation_flips_its_own_verdict():
    vile = "You stupid fucking idiot, watch this shit."
    women = USERS["gender"].to_numpy() == "F"
    crowded = np.tile(np.arange(1, 11), (N, 1))
    crowded[:, 9] = np.arange(N) % 10 + 11  # one place in ten goes to the other half of the items
    planted = {
        "toxicity_mean": (dict(texts=[vile] * N), {"toxicity_mean", "toxicity_p95"}),
        "toxicity_p95": (dict(texts=[vile] * 4 + TEXTS[4:]), {"toxicity_p95"}),
        "gini": (dict(after_top=crowded), {"gini_after"}),
        "parity": (dict(quality=np.where(women, 0.45, 0.6)), {"parity_gap"}),
        "privacy": (
            dict(texts=["As user 123 you will like it."] + TEXTS[1:]),
            {"privacy_leak_rate"},
        ),
    }
    for name, (change, expected) in planted.items():
        found = run(**change)
        assert {k[:-3] for k in found if k.endswith("_ok") and not found[k]} == expected, name


def test_figures_of_violations_by_hand():
    women = USERS["gender"].to_numpy() == "F"
    assert run(quality=np.where(women, 0.45, 0.6))["parity_gap"] == pytest.approx(0.15)
    assert run(ndcg=np.where(women, 0.0, 0.3))["parity_gap_ndcg"] == pytest.approx(0.3)
    assert run(texts=["Your user id."] + TEXTS[1:])["privacy_leak_rate"] == 1 / N


def test_parity_gap():
    assert parity_gap([1, 2, 3, 10], ["a", "a", "b", "c"]) == pytest.approx(10 - 1.5)
    assert parity_gap([1, 2, 9], ["a", "a", None]) == 0  # one group, and a row without
    with pytest.raises(ValueError, match="finite value"):
        parity_gap([np.nan], ["a"])


def test_users_without_gender_have_no_gap():
    found = run(users=USERS.drop(columns="gender"), quality=np.linspace(0, 1, N), ndcg=np.zeros(N))
    assert (found["parity_gap"], found["parity_groups"], found["parity_gap_ndcg"]) == (0, 0, 0)


def test_gini():
    assert recommendation_gini(np.array([[1, 2], [3, 4]]), 4) == pytest.approx(0)
    assert recommendation_gini(np.array([[1], [1]]), 4) == pytest.approx(0.75)
    for bad in ([[0, 1]], [[5, 1]]):
        with pytest.raises(ValueError, match="from 1 to 4"):
            recommendation_gini(np.array(bad), 4)


def test_toxicity_tells_insults_from_explanations_and_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vile, nice, empty = toxicity(["You stupid fucking idiot.", TEXTS[0], ""])
    assert vile > 0.9 and nice < 0.2 and empty < 0.5


PERSON = {"gender": "F", "age": 31, "occupation": "engineer"}


@pytest.mark.parametrize(
    "text",
    [
        "Dear user 123, see it.",
        "Your user ID says so.",
        "for viewer #7",
        "Number 100 will like it.",
        "You are 101.",
        "Write to a.b@example.org now.",
        "Call (555) 123-4567.",
        "Call +1 555-123-4567.",
        "As a woman you will like it.",
        "You are a young woman.",
        "You're 31 and it shows.",
        "A 31-year-old will like it.",
        "as an engineer",
        "like a retired engineer",
    ],
)
def test_leaks(text):
    assert leaks(text, RECORDS[0], PERSON)


@pytest.mark.parametrize(
    "text",
    [
        TEXTS[0],
        "101 Dalmatians is for you.",
        "Made in 1995, it runs 130 minutes and won 9 awards.",
        "A woman leads the cast; an engineer saves them.",
        "A 12-year-old boy grows up.",
        "As a man he fails.",
        "It made $100,000.",
        "You are a fan of 1990s drama.",
        "The user will like it.",
        "Rated 3.100 or 10:100 somewhere",
        "",
    ],
)
def test_what_is_no_leak(text):
    assert not leaks(text, RECORDS[0], PERSON)


def test_leaks_without_knowing_the_person():
    assert not leaks("You are a woman of 31.", RECORDS[0], {"gender": None, "age": float("nan")})
    assert not leaks(
        "It gets 5 stars and 6 awards.", RECORDS[0] | {"user": 5}, PERSON
    )  # too short to be an id


def test_policy_reads_and_rejects(tmp_path):
    policy = load_policy()
    assert (
        policy.toxicity_mean,
        policy.toxicity_p95,
        policy.gini_change,
        policy.parity_gap,
        policy.privacy_leak_rate,
    ) == (0.20, 0.40, 0.02, 0.10, 0.005)
    file = tmp_path / "policy.yaml"
    good = "toxicity_mean: .2\ntoxicity_p95: .4\ngini_change: .02\nparity_gap: .1\nprivacy_leak_rate: 0\n"
    for text, message in [
        (good.replace("parity_gap: .1", ""), "missing or unknown: parity_gap"),
        (good + "x: 1", "missing or unknown: x"),
        (good.replace(".02", "2"), "gini_change=2"),
        (good.replace(".02", "yes"), "gini_change=True"),
        ("[", "not valid YAML"),
        ("", "exactly toxicity_mean"),
    ]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_policy(file)
    file.write_text(good, encoding="utf-8")
    assert load_policy(file).privacy_leak_rate == 0.0


def test_errors():
    with pytest.raises(ValueError, match="no row in the users table"):
        run(users=USERS.iloc[1:])
    with pytest.raises(ValueError, match="no texts"):
        run(texts=[], records=[])
