import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from recrl_lib.evaluation import audit
from recrl_lib.ranker import metrics
from recrl_lib.scoring import judge

RANKS = np.array([1, 2, 3, 10, 11, 1682])


def test_rank_metrics_by_hand():
    np.testing.assert_allclose(
        metrics.ndcg_at(RANKS, 10), [1, 0.63092975, 0.5, 0.28906483, 0, 0], atol=1e-8
    )
    np.testing.assert_array_equal(metrics.hr_at(RANKS, 10), [1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(metrics.mrr_at(RANKS, 10), [1, 1 / 2, 1 / 3, 1 / 10, 0, 0])
    np.testing.assert_array_equal(metrics.ndcg_at(RANKS, 1), [1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("function", [metrics.ndcg_at, metrics.hr_at, metrics.mrr_at])
@pytest.mark.parametrize("ranks", [np.array([0, 3]), np.array([], dtype=int)])
def test_ranks_are_one_based(function, ranks):
    with pytest.raises(ValueError, match="1-based"):
        function(ranks, 10)


def rbo_twin(a, b, p):
    agreement = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, len(a) + 1)]
    return agreement[-1] * p ** len(a) + (1 - p) / p * sum(
        x * p**d for d, x in enumerate(agreement, 1)
    )


def tau_twin(a, b):
    union = sorted({*a, *b})
    rank = [[list(top).index(i) if i in top else len(top) for i in union] for top in (a, b)]
    return kendalltau(*rank, variant="b").statistic


@st.composite
def two_lists(draw):
    k = draw(st.integers(2, 6))
    pick = st.lists(st.integers(1, 9), min_size=k, max_size=k, unique=True)
    users = draw(st.integers(1, 3))
    return [np.array([draw(pick) for _ in range(users)]) for _ in range(2)]


@settings(max_examples=150, deadline=None)
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


def test_churn_limits():
    base = np.array([np.arange(1, 11), np.arange(10, 0, -1)])
    for name, values in metrics.churn(base, base).items():
        np.testing.assert_allclose(values, 1, atol=1e-12, err_msg=name)
    disjoint = metrics.churn(base, base + 10)
    assert all(
        (disjoint[name] == 0).all() for name in ("overlap", "set_same", "exact", "top1_same", "rbo")
    )
    np.testing.assert_allclose(disjoint["kendall_tau"], -20 / 29)
    np.testing.assert_allclose(metrics.churn(base, base[:, ::-1])["kendall_tau"], -1)


def test_churn_of_one_swap_by_hand():
    swap = metrics.churn(np.array([[1, 2, 3]]), np.array([[1, 3, 2]]))
    assert (swap["overlap"], swap["set_same"], swap["exact"], swap["top1_same"]) == (1, 1, 0, 1)
    assert swap["kendall_tau"] == pytest.approx(1 / 3)  # two pairs agree, one does not
    # A = 1, 1/2, 1: A_3 p^3 + (1 - p)/p (p + p^2/2 + p^3)
    assert swap["rbo"] == pytest.approx(0.729 + (0.1 / 0.9) * (0.9 + 0.81 / 2 + 0.729))


def test_one_item_lists():
    tau = metrics.kendall_tau_top_k(np.array([[1], [1]]), np.array([[1], [2]]))
    np.testing.assert_array_equal(tau, [1, -1])


@pytest.mark.parametrize(
    "base, new", [([[1, 2]], [[1, 2, 3]]), ([[1, 1]], [[1, 2]]), ([1, 2], [1, 2])]
)
def test_churn_refuses_bad_lists(base, new):
    with pytest.raises(ValueError, match="top-k lists"):
        metrics.churn(np.array(base), np.array(new))


def test_distinct_n_by_hand():
    texts = ["a b a", "A, b!"]
    assert judge.distinct_n(texts, 1) == 2 / 5
    assert judge.distinct_n(texts, 2) == 2 / 3  # ab ba | ab: none crosses the texts
    assert judge.distinct_n(texts, 4) == 0
    assert judge.distinct_n(["it's sci-fi"], 1) == 1  # two words, not four
    with pytest.raises(ValueError, match="n=0"):
        judge.distinct_n(texts, 0)


def test_usr_counts_texts_that_differ_in_words():
    assert judge.usr(["Good film.", "good film", "bad film"]) == 2 / 3
    assert judge.usr(["a", "b"]) == 1
    with pytest.raises(ValueError, match="no texts"):
        judge.usr([])


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any))
def test_gini_equals_mean_absolute_difference(counts):
    spread = sum(abs(a - b) for a, b in itertools.product(counts, counts))
    assert audit.gini(np.array(counts)) == pytest.approx(
        spread / (2 * len(counts) * sum(counts)), abs=1e-12
    )


def test_gini_limits():
    assert audit.gini(np.ones(7)) == pytest.approx(0, abs=1e-12)
    assert audit.gini(np.array([0, 0, 0, 5])) == pytest.approx(3 / 4)
    for bad in (np.zeros(3), np.array([1, -1]), np.array([]), np.array([1, math.nan])):
        with pytest.raises(ValueError, match="gini"):
            audit.gini(bad)
