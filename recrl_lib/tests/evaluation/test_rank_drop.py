import numpy as np
import pytest

from recrl_lib.evaluation.rank_drop import DRAWS, cited, rank_drop
from recrl_lib.ranker.ranking import score_chunks
from recrl_lib.tests.evaluation.toy import ITEMS, toy_study

RECORD = {"title": "Alien 3", "history_titles": ["Alien", "Aliens", "Heat", "The Game"]}


@pytest.mark.parametrize(
    "text, places",
    [
        ("Because you watched Heat and Aliens, I recommend Alien 3.", [1, 2]),
        ("You liked Alien and the game.", [0, 3]),  # of several words in any case
        ("An alien in the heat.", []),  # of one word with its capital
        ("Alien 3 is a good film.", []),  # the recommended film, not the one inside its title
        ("A heated game.", []),
        ("", []),
    ],
)
def test_what_a_text_cites_by_hand(text, places):
    assert cited(RECORD, text) == places


def test_drop_is_the_places_lost_beyond_those_lost_without_random_films():
    study, _ = toy_study()
    records = study.records([7, 6, 8], [2, 1, 3])
    texts = ["nothing", records[1]["history_titles"][1], " ".join(records[2]["history_titles"])]
    got = rank_drop(study, records, texts, seed=5)

    def rank(record, without):
        """By one history at a time; seen films, those taken out too, are no candidates."""
        history = study.split.with_valid[record["user"]]
        kept = np.array([x for j, x in enumerate(history) if j not in without])
        ((_, scores),) = score_chunks(study.ranker, [kept], study.text)
        rivals = [i for i in range(1, ITEMS + 1) if i not in history]
        return sum(scores[0, i] >= scores[0, record["item"]] for i in rivals).item()

    length, rng = len(study.split.with_valid[6]), np.random.default_rng([5, 6, records[1]["item"]])
    draws = [rng.choice(3, 1, replace=False) + length - 3 for _ in range(DRAWS)]
    expected = rank(records[1], [length - 2]) - np.mean([rank(records[1], d) for d in draws])
    assert got[1] == pytest.approx(expected) != 0
    assert got[0] == got[2] == 0  # nothing cited; every set of three is the cited one
