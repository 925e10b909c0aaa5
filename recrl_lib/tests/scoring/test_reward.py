import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib import params
from recrl_lib.scoring.claims import Catalogue
from recrl_lib.scoring.reward import PARTS, VARIANTS, Reward

RECORD = dict(user=7, item=3, position=2, title="Con Air", year=1997, genres=["Action", "Thriller"])
RECORD |= dict(
    history_titles=["Heat", "The Rock", "Fargo"],
    history_genres=[["Crime"], ["Action", "Thriller"], ["Crime", "Drama"]],
    history_weights=[2.0, 1.0, -0.5],
)
CATALOGUE = Catalogue(
    ["Con Air", "Heat", "The Rock", "Fargo", "Annie Hall", "Emma", "Sabrina"],
    ["Action", "Thriller", "Crime", "Drama", "Comedy", "Romance"],
)
HONEST = (
    "Because you liked Heat and The Rock, I recommend Con Air (1997), an action thriller in the "
    "same vein."
)
KEYWORDS = "Con Air, Heat, The Rock, Fargo, Action, Thriller, Crime, Drama"
RAMBLE = (
    "You will love it because it is the kind of thing that people who like such things tend to "
    "like, and the more you think of it the more it becomes clear that it is what you want to see "
    "when you come home and"
)
LIKED = "Because you liked "
PRAISE = "This is a great film that you will surely love and enjoy with your friends tonight."
DEGENERATE = {
    "empty": "", "constant praise": PRAISE, "praise in a loop": "Great film! " * 12,
    "rambling": RAMBLE, "longest rambling": f"{RAMBLE} then you {RAMBLE} so {RAMBLE}",
    "honest in a loop": " ".join([HONEST] * 4),
    "keywords with commas": KEYWORDS + ", Con Air, Heat, The Rock.",
    "keywords with and": KEYWORDS.replace(",", " and") + ".",
    "keywords alone": KEYWORDS.replace(",", "") + " Con Air Heat The Rock Fargo",
    "another item": LIKED + "Annie Hall and Emma, I recommend Sabrina (1995), a romantic comedy.",
    "every title": LIKED
    + "Heat, The Rock, Annie Hall and Emma, I recommend Con Air or Sabrina, a romance.",
    "copied prompt": "I watched: Heat; The Rock; Fargo.\nWhy do you recommend Con Air (1997), "
    "genres Action, Thriller?",
    "copied fields": "Title: Con Air (1997). Genres: Action, Thriller. The viewer has watched "
    "Heat and liked it.",
}  # fmt: skip


def score(text, variant="grounded", record=RECORD):
    """The parts of one text's reward."""
    _, parts = Reward(variant, CATALOGUE)([record], [text])
    return {part: float(values[0]) for part, values in parts.items()}


def total(text):
    return float(Reward("grounded", CATALOGUE)([RECORD], [text])[0][0])


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_texts_lose_by_a_margin_to_full_marks(name):
    assert score(HONEST) == dict(length=1, relevance=1, coherence=1)
    assert total(DEGENERATE[name]) < 1 - 0.2


@pytest.mark.parametrize(
    "part, text, value",
    [
        *(
            ("length", "so " * n, v)
            for n, v in [(0, 0), (7, 0.5), (14, 1), (45, 1), (60, 2 / 3), (90, 0), (200, 0)]
        ),
        ("relevance", "I recommend Con Air to you because it is so good.", 0.4),  # the title alone
        ("relevance", "I recommend Con Air to you because you liked Heat.", 0.55),  # one of two
        ("relevance", "I recommend it to you because it is an action film.", 0.15),  # one of two
        ("relevance", "I recommend Con Air to you because of Nicolas Cage in it.", 0.4 - 0.2),
        ("relevance", "I recommend Con Air to you as it is like Annie Hall.", 0.4 - 0.25),
        ("relevance", "I recommend Con Air to you as it is a comedy of 1995.", 0.4 - 0.15 - 0.15),
        ("relevance", "Con Air is a comedy by Nicolas Cage and John Woo.", 0),  # never below 0
        ("coherence", "It is the film that you will like.", 1),
        ("coherence", "it is the film that you will like.", 2 / 3),  # opens small
        ("coherence", "It is the film that you will", 2 / 3),  # cut off
        ("coherence", "It is the film that you will like. <|im_end|>", 0),
        ("coherence", "You recommend films. Explain why the film is so good.", 0),
        ("coherence", "It is the Zzxqwrtpsdfghjklmnbvcxzqw of the film.", 2 / 3),  # no word
        ("coherence", "It is 这部 电影 很好 电影的 so it is one that you like.", 2 / 3),
        # 9 words, 7 trigrams, 3 of them distinct
        ("coherence", "With them they with them they with them they.", 3 / 7),
    ],
)
def test_parts_by_hand(part, text, value):
    assert score(text)[part] == pytest.approx(value)


def because(cited, film="Con Air (1997)"):
    return f"Because you watched {cited}, I recommend {film}, an action film."


@pytest.mark.parametrize(
    "text, faithfulness",
    [
        (because("Heat and The Rock"), 1),
        (because("Heat"), 1),
        (because("Heat and Heat"), 1),  # counted once
        (because("The Rock"), 1 / 2),
        (because("Heat and Fargo"), (2 - 0.5) / (2 + 1)),
        (because("Heat, The Rock and Fargo"), (2.5 / 3) / (3 / 2)),  # all of them
        (because("Fargo"), 0),  # never below 0
        ("I recommend Con Air (1997) to you because it is an action film.", 0),
    ],
)
def test_faithful_variant_by_hand(text, faithfulness):
    assert score(text, "faithful") == pytest.approx(dict(form=1, faithfulness=faithfulness))


@pytest.mark.parametrize(
    "text",
    [
        *(text for name, text in DEGENERATE.items() if name != "constant praise"),
        because("Con Air"),  # the recommended film as its own reason
        because("Heat and Palglone"),  # an invented one beside a true one
        because("Heat and Annie Hall"),
        because("Heat", film="Con Air (1995)"),
        because("Heat").removesuffix("film."),  # cut off
        "Con Air is like Heat.",  # too short
        because("Heat") + " It is a film that" + " you will like a lot" * 8 + ".",  # too long
    ],
)
def test_what_does_not_pass_the_gate_earns_nothing(text):
    assert score(text, "faithful") == dict(form=0, faithfulness=0)


def test_where_no_film_moved_the_ranker_no_text_is_faithful():
    unmoved = RECORD | dict(history_weights=[0.0, -1.0, 0.0])
    assert score(because("Heat"), "faithful", unmoved) == dict(form=1, faithfulness=0)


def test_relevance_stays_reachable_without_history_and_genres():
    bare = RECORD | dict(history_titles=[], history_genres=[], genres=["unknown"])
    assert score("I recommend Con Air to you as it is so good.", record=bare)["relevance"] == 1


@pytest.mark.parametrize(
    "text, parts",
    [
        ("Con Air has action. It is good fun.", (8 / 40, 1, 1)),
        ("A comedy.", (2 / 40, 0, 0)),
        ("word " * 40, (1, 0, 0.5)),  # length alone: what the grounded variant is there to close
    ],
)
def test_paper_variant_by_hand(text, parts):
    assert score(text, "paper") == pytest.approx(dict(zip(PARTS["paper"], parts)))


def test_500_real_texts_keep_their_values():
    """The first, slower implementation's values; the file says what was charged since."""
    golden = json.loads((Path(__file__).parent / "golden_rewards.json").read_text(encoding="utf-8"))
    catalogue = Catalogue(golden["titles"], golden["genres"])
    records = [golden["records"][row[0]] for row in golden["rows"]]
    texts = [row[1] for row in golden["rows"]]
    for variant, first in (("grounded", 2), ("paper", 5)):
        _, parts = Reward(variant, catalogue)(records, texts)
        wanted = np.array([row[first : first + 3] for row in golden["rows"]])
        got = np.stack(list(parts.values()), 1).astype(np.float64)
        assert np.array_equal(got, wanted), variant


@pytest.mark.parametrize("false", ["Palglone", "Kurt Russell", "Annie Hall"])
def test_a_false_mention_costs_more_than_a_true_one_earns(false):
    """An invented film, a person, a film not watched: a guess pays only if it is mostly right."""
    true = "I recommend Con Air to you because you liked Heat, and it is good."
    relevance = score(true)["relevance"]
    earned = relevance - score(true.replace("Heat", "it"))["relevance"]
    cost = relevance - score(true.replace("Heat", f"Heat and {false}"))["relevance"]
    assert cost > earned == pytest.approx(0.15)


@settings(deadline=None)
@given(st.text(max_size=120), st.sampled_from(sorted(VARIANTS)))
def test_parts_stay_in_the_unit_interval(text, variant):
    assert all(0 <= v <= 1 for v in score(text, variant).values())


def test_trl_functions_agree_with_the_batch():
    reward = Reward("grounded", CATALOGUE)
    texts = [HONEST, DEGENERATE["another item"]]
    columns = {field: [value, value] for field, value in RECORD.items()}
    chats = [[{"role": "assistant", "content": t}] for t in texts]
    _, parts = reward([RECORD] * 2, texts)
    assert reward([], [])[0].shape == (0,) and len(reward.as_trl()) == 3
    for function, part in zip(reward.as_trl(), reward.names, strict=True):
        assert function.__name__ == f"reward_{part}"
        for completions in (texts, chats):  # called as TRL's trainers do, with columns of their own
            own = dict(completion_ids=[[1], [2]], trainer_state=None)
            got = function(prompts=["p", "p"], completions=completions, **own, **columns)
            assert isinstance(got, list) and got == pytest.approx(parts[part].tolist())
    with pytest.raises(ValueError, match="lacks .*history_genres"):
        reward.as_trl()[0](["p"], ["x"], user=[1])


def test_weights_are_rescaled_to_sum_to_one():
    texts = [HONEST, *DEGENERATE.values()]
    without = Reward("grounded", CATALOGUE, (0.5, 0.0, 0.2))
    values, parts = without([RECORD] * len(texts), texts)
    assert without.weights == pytest.approx((5 / 7, 0, 2 / 7)) and values[0] == pytest.approx(1)
    expected = 5 / 7 * parts["length"] + 2 / 7 * parts["coherence"]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert Reward("grounded", CATALOGUE).weights == (0.5, 0.3, 0.2)  # sum to 1: equal to the bit
    of = Reward.of(params.Params(weight_form=0.6, weight_faithfulness=1.8), CATALOGUE)
    assert of.names == ["form", "faithfulness"] and of.weights == pytest.approx((0.25, 0.75))
    assert Reward.of(params.Params(reward="paper", intents="why=1"), CATALOGUE).weights == (
        0.5,
        0.3,
        0.2,
    )
