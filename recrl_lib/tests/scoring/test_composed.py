import pytest

from recrl_lib.scoring.composed import cited_by, composed_line

RECORD = dict(
    user=0, item=1, position=1, title="Con Air", year=1997, genres=["Action", "Thriller"],
    history_titles=["Heat", "Emma", "Fargo", "The Rock"],
    history_genres=[["Crime"], ["Romance"], ["Thriller"], ["Action", "Thriller"]],
    history_weights=[1.0, 0.1, -2.0, 0.5], history_similarity=[0.1, 0.9, 0.2, 0.2],
)  # fmt: skip


@pytest.mark.parametrize(
    "rule, places",
    [
        ("recent", [3, 2]),
        ("genre", [3, 2]),
        ("similar", [1, 3]),  # of equal ones the later
        ("oracle", [0, 3]),
    ],
)
def test_each_rule_by_hand(rule, places):
    assert cited_by(rule, RECORD) == places
    first, second = (RECORD["history_titles"][j] for j in places)
    assert f"{first} and {second}" in composed_line(RECORD, rule)


def test_the_oracle_cites_a_second_film_only_if_it_moved_the_ranker():
    assert cited_by("oracle", RECORD | {"history_weights": [-1.0, 0.3, -0.2, 0.0]}) == [1]
    assert cited_by("oracle", RECORD | {"history_weights": [-1.0, -0.3, -0.2, -0.5]}) == [2]


def test_the_random_rule_favours_no_place_and_repeats_itself():
    drawn = [cited_by("random", RECORD | {"user": user}) for user in range(400)]
    assert drawn[:3] == [cited_by("random", RECORD | {"user": user}) for user in range(3)]
    counts = [sum(place in pair for pair in drawn) for place in range(4)]
    assert all(150 < count < 250 for count in counts)  # 200 expected, standard deviation 10


def test_a_line_says_what_is_known():
    line = composed_line(RECORD | {"history_titles": [], "history_genres": []})
    assert line == "I recommend Con Air (1997), an action and thriller film."
