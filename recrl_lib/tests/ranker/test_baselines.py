import numpy as np
import pytest
import torch

from recrl_lib.ranker import baselines, ranking


@pytest.fixture
def train():
    rng = np.random.default_rng(0)
    return [rng.permutation(8)[: rng.integers(2, 6)] + 1 for _ in range(30)]


def test_popularity_and_markov_by_hand(monkeypatch):
    monkeypatch.setattr(ranking, "USERS", 1)
    train = [np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([3, 1, 4])]
    asked = [np.array([3, 1]), np.array([5])]
    chunks = {name: list(c) for name, c in baselines.closed_form(train, 5, asked).items()}
    assert all([start for start, _ in found] == [0, 1] for found in chunks.values())
    popular, chain, *_ = (torch.cat([s for _, s in found]) for found in chunks.values())
    assert popular.dtype == torch.float32 and popular[:, 0].isneginf().all()
    assert popular[:, 1:].tolist() == [[3, 2, 2, 2, 0]] * 2
    after_1, after_5 = chain[:, 1:].tolist()
    assert after_1 == [0 + 3 / 4, 2 + 2 / 4, 0 + 2 / 4, 1 + 2 / 4, 0]
    assert after_5 == [0.75, 0.5, 0.5, 0.5, 0]  # nothing follows 5: popularity decides
    ranks = ranking.ranks_of(chunks["Markov chain"], asked, np.array([2, 4]))
    assert ranks.tolist() == [1, 4]


def test_ease_columns_are_constrained_ridge_regressions(train):
    """Column j of B is a ridge regression of item j on all the others, solved one by one."""
    weights = baselines.ease_weights(train, 8, regularisation=3.0)
    seen = np.array([np.isin(range(1, 9), items) for items in train], float)
    for j in range(8):
        others = [i for i in range(8) if i != j]
        x = seen[:, others]
        expected = np.linalg.solve(x.T @ x + 3.0 * np.eye(7), x.T @ seen[:, j])
        np.testing.assert_allclose(weights[others, j], expected, atol=1e-12)
        assert weights[j, j] == 0


def test_chain_counts_decayed_steps(train):
    weights = baselines.chain_weights(train, 8, window=3, decay=0.5, smoothing=2.0)
    expected = np.zeros((8, 8))
    for items in train:
        for i in range(len(items)):
            for j in range(i + 1, min(i + 4, len(items))):
                expected[items[i] - 1, items[j] - 1] += 0.5 ** (j - i - 1)
    for item in range(8):
        expected[item] /= 2.0 + sum(int((items == item + 1).sum()) for items in train)
    np.testing.assert_allclose(weights, expected, atol=1e-12)


def test_queries_of_ease(train):
    asked = [np.array([5, 3, 8, 3]), np.array([2])]  # item 3 twice: its last place counts
    ease = baselines.ease_weights(train, 8, 2.0)
    recent = baselines.ease(train, 8, regularisation=2.0, window=2)(asked)
    np.testing.assert_allclose(recent, [ease[2] + ease[7], ease[1]])
    both = ease + 0.3 * baselines.chain_weights(train, 8)
    faded = baselines.ease_chain(train, 8, 2.0, 0.3, 0.5)(asked)
    np.testing.assert_allclose(faded, [both[2] + 0.5 * both[7] + 0.125 * both[4], both[1]])


def test_a_large_catalogue_is_asked_without_item_to_item_matrices(train, monkeypatch):
    assert set(baselines.closed_form(train, 8, train)) > set(baselines.RIVALS.values())
    monkeypatch.setattr(baselines, "EASE_ITEMS", 7)
    assert list(baselines.closed_form(train, 8, train)) == ["popularity", "Markov chain"]
