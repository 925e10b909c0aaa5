import math

import numpy as np
import pytest
import torch

from recrl_lib.ranker.sasrec import SASRec
from recrl_lib.scoring import attribution


class SumRanker(SASRec):
    """A ranker whose state is the sum of the vectors of the history: easy to compute by hand."""

    def __init__(self, rows):
        super().__init__(len(rows), dim=len(rows[0]), heads=1, max_len=4)
        self.items.weight.data[1:] = torch.tensor(rows)

    def forward(self, histories, table):
        return torch.nn.functional.embedding(histories, table).sum(1, keepdim=True)


def histories(*items):
    return [np.array(each) for each in items]


def test_two_items_by_hand():
    # Scores of items 1 and 2 after history [1, 2]: 4 and 1; without 1: 0 and 1; without 2: 4 and 0.
    ranker = SumRanker([[2.0, 0.0], [0.0, 1.0]])
    (found,) = attribution.weights(ranker, histories([1, 2]), [1], 2, None)
    whole = 4 - math.log(math.exp(4) + math.exp(1))
    without = [-math.log(1 + math.exp(1)), 4 - math.log(math.exp(4) + 1)]
    assert found == pytest.approx([whole - without[0], whole - without[1]], abs=1e-6)
    assert found[0] > 0 > found[1]  # item 2 speaks for itself and so against item 1


def test_films_with_equal_vectors_have_equal_weights():
    ranker = SumRanker([[1.0, 0.5], [1.0, 0.5], [0.2, 1.0]])
    (found,) = attribution.weights(ranker, histories([1, 2]), [3], 2, None)
    assert found[0] == pytest.approx(found[1], abs=1e-7) and found[0] != 0


@pytest.fixture
def sasrec():
    return SASRec(n_items=12, dim=8, layers=1, heads=2, max_len=3, seed=3).eval()


def test_a_film_that_is_no_longer_read_weighs_nothing(sasrec):
    (found,) = attribution.weights(sasrec, histories([1, 2, 3, 4, 5]), [9], 5, None)
    assert found[:2].tolist() == [0, 0]
    assert (found[2:] != 0).all()


def test_weights_are_those_of_one_history_at_a_time(sasrec):
    read, items = histories([1, 2, 3, 4], [5], [7, 8]), [9, 10, 11]

    def logp(history, item):
        ids = torch.tensor([[0] * (3 - len(history[-3:])) + list(history[-3:])])
        table = sasrec.item_table(None).detach()
        return torch.log_softmax(sasrec(ids, table)[0, -1] @ table[1:].T, -1)[item - 1].item()

    found = attribution.weights(sasrec, read, items, 2, None)
    assert [len(each) for each in found] == [2, 1, 2]
    for history, item, got in zip(read, items, found, strict=True):
        for j, weight in zip(range(len(history) - len(got), len(history)), got, strict=True):
            rest = [x for k, x in enumerate(history) if k != j] or history
            assert weight == pytest.approx(logp(history, item) - logp(rest, item), abs=1e-5)


def test_several_items_are_read_from_one_history(sasrec):
    history = histories([1, 2, 3])
    both = attribution.weights(sasrec, history, [np.array([9, 11])], 2, None)[0]
    for row, item in zip(both, (9, 11), strict=True):
        assert row == pytest.approx(attribution.weights(sasrec, history, [item], 2, None)[0])


def test_no_records():
    assert attribution.weights(SumRanker([[1.0], [2.0]]), [], [], 2, None) == []
