import numpy as np
import pandas as pd
import pytest

from recrl_lib.explainer import prompts

RECORD = dict(
    user=0, item=1, position=1, title="the", year=0, genres=["good"],
    history_titles=["red", "blue"], history_genres=[["good"], []], history_weights=[-0.5, 0.2],
)  # fmt: skip


@pytest.mark.parametrize(
    "change, watched, film",
    [
        ({"genres": ["good"]}, "I watched: red; blue.", "the, genres good"),
        ({"year": 1990}, "I watched: red; blue.", "the (1990)"),
        ({"noun": "game"}, "I played: red; blue.", "the"),
        ({"evidence": "order"}, "I watched, what counted most first: blue; red.", "the"),
        ({"evidence": "named"}, "I watched: red; blue.\nWhat counted most: blue.", "the"),
    ],
)
def test_the_question_names_what_is_known(change, watched, film):
    system, asked = prompts.messages(RECORD | {"genres": []} | change)
    question = f"{watched}\nWhy do you recommend {film}?"
    assert system["role"] == "system" and asked == {"role": "user", "content": question}


def test_records_name_the_last_of_the_history_and_the_item_at_the_position():
    items = pd.DataFrame(
        {"title": ["a", "b", "c", "d"], "year": [0, 1, 2, 3], "genres": ["X|Y", "", "Z", "X"]}
    )
    histories = [np.array([1, 2, 3]), np.array([], int)]
    first, second = prompts.build_records(
        items, histories, np.array([[4, 3], [2, 1]]), [(0, 1), (1, 2)], 2, "book"
    )
    assert first == dict(
        user=0, item=4, position=1, title="d", year=3, genres=["X"], noun="book",
        history_titles=["b", "c"], history_genres=[[], ["Z"]],
    )  # fmt: skip
    assert second["item"] == 1 and second["history_titles"] == []
    # what a record lacks is named
    prompts.check_records([RECORD], ["a"])
    with pytest.raises(ValueError, match="1 records but 2 texts"):
        prompts.check_records([RECORD], ["a", "b"])
    with pytest.raises(ValueError, match="record 0 lacks position, year"):
        kept = {k: v for k, v in RECORD.items() if k not in ("year", "position")}
        prompts.check_records([kept], ["a"])
