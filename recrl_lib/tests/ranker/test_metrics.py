import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib.ranker import metrics

RANKS = np.array([1, 2, 3, 10, 11, 1682])


def test_rank_metrics_by_hand():
    ndcg = [1, 0.63092975, 0.5, 0.28906483, 0, 0]
    np.testing.assert_allclose(metrics.ndcg_at(RANKS, 10), ndcg, atol=1e-8)
    np.testing.assert_array_equal(metrics.hr_at(RANKS, 10), [1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(metrics.mrr_at(RANKS, 10), [1, 1 / 2, 1 / 3, 1 / 10, 0, 0])
    np.testing.assert_array_equal(metrics.ndcg_at(RANKS, 1), [1, 0, 0, 0, 0, 0])


def rbo_twin(a, b, p):
    agreement = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, len(a) + 1)]
    tail = sum(x * p**d for d, x in enumerate(agreement, 1))
    return agreement[-1] * p ** len(a) + (1 - p) / p * tail


def tau_twin(a, b):
    """Concordant less discordant pairs of the union, over the pairs that are not tied in a list."""
    union = sorted({*a, *b})
    rank = [[list(top).index(i) if i in top else len(top) for i in union] for top in (a, b)]
    balance, untied = 0, [0, 0]
    for i in range(len(union)):
        for j in range(i):
            signs = [int(np.sign(r[i] - r[j])) for r in rank]
            balance += signs[0] * signs[1]
            untied = [n + abs(s) for n, s in zip(untied, signs)]
    return balance / (untied[0] * untied[1]) ** 0.5


@st.composite
def two_lists(draw):
    k = draw(st.integers(2, 6))
    pick = st.lists(st.integers(1, 9), min_size=k, max_size=k, unique=True)
    users = draw(st.integers(1, 3))
    return [np.array([draw(pick) for _ in range(users)]) for _ in range(2)]


@settings(max_examples=100, deadline=None)
@given(two_lists())
def test_churn_equals_its_naive_twins(lists):
    base, new = lists
    out = metrics.churn(base, new)
    for u, (a, b) in enumerate(zip(base.tolist(), new.tolist())):
        assert out["overlap"][u] == len(set(a) & set(b)) / len(a)
        assert out["set_same"][u] == (set(a) == set(b))
        assert out["exact"][u] == (a == b)
        assert out["top1_same"][u] == (a[0] == b[0])
        assert out["rbo"][u] == pytest.approx(rbo_twin(a, b, 0.9), abs=1e-12)
        assert out["kendall_tau"][u] == pytest.approx(tau_twin(a, b), abs=1e-12)
