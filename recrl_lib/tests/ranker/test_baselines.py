import math

import numpy as np
import pytest
import torch

from recrl_lib.ranker import baselines, ranking


def test_popularity_and_markov_by_hand():
    train = [np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([3, 1, 4])]
    ((_, popularity),) = baselines.popularity_chunks(train, 5, n_users=3)
    assert popularity.tolist() == [[-math.inf, 3, 2, 2, 2, 0]] * 3
    chunks = list(baselines.markov_chunks(train, 5, [np.array([3, 1]), np.array([5])], chunk=1))
    assert [start for start, _ in chunks] == [0, 1]
    after_1 = torch.tensor([-math.inf, 0 + 3 / 4, 2 + 2 / 4, 0 + 2 / 4, 1 + 2 / 4, 0])
    assert torch.equal(chunks[0][1][0], after_1)
    assert chunks[1][1].tolist() == [
        [-math.inf, 0.75, 0.5, 0.5, 0.5, 0]
    ]  # nothing follows item 5: popularity decides
    assert ranking.ranks_of(
        chunks, [np.array([3, 1]), np.array([5])], np.array([2, 4])
    ).tolist() == [1, 4]


def some_sequences(n_users=30, n_items=8, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.permutation(np.arange(1, n_items + 1))[: rng.integers(2, 6)] for _ in range(n_users)
    ]


@pytest.mark.parametrize("chunk", [7, 1000])
def test_ease_columns_are_constrained_ridge_regressions(chunk):
    """Column j of B is a ridge regression of item j on all the others: solved one by one, as a naive twin."""
    train, n_items, regularisation = some_sequences(), 8, 3.0
    weights = baselines.ease_weights(train, n_items, regularisation, chunk)
    seen = np.zeros((len(train), n_items))
    for row, items in zip(seen, train):
        row[items - 1] = 1
    for j in range(n_items):
        others = [i for i in range(n_items) if i != j]
        x = seen[:, others]
        expected = np.linalg.solve(x.T @ x + regularisation * np.eye(n_items - 1), x.T @ seen[:, j])
        np.testing.assert_allclose(weights[others, j], expected, atol=1e-12)
        assert weights[j, j] == 0


def test_ease_query_is_the_last_items_in_any_chunk():
    train = some_sequences()
    weights = baselines.ease_weights(train, 8, 2.0)
    histories = [np.array([5, 3, 8]), np.array([2])]
    scores = torch.cat(
        [
            s
            for _, s in baselines.ease_chunks(
                train, 8, histories, regularisation=2.0, window=2, chunk=1
            )
        ]
    )
    np.testing.assert_allclose(scores[0, 1:], weights[2] + weights[7], rtol=1e-6)
    np.testing.assert_allclose(scores[1, 1:], weights[1], rtol=1e-6)
    assert scores.dtype == torch.float32 and scores[:, 0].isneginf().all()


def test_chain_counts_decayed_steps():
    train = some_sequences()
    weights = baselines.chain_weights(train, 8, window=3, decay=0.5, smoothing=2.0)
    expected = np.zeros((8, 8))
    for items in train:
        for i in range(len(items)):
            for j in range(i + 1, min(i + 4, len(items))):
                expected[items[i] - 1, items[j] - 1] += 0.5 ** (j - i - 1)
    for item in range(8):
        expected[item] /= 2.0 + sum(int((items == item + 1).sum()) for items in train)
    np.testing.assert_allclose(weights, expected, atol=1e-12)


def test_ease_with_the_chain_fades_the_query():
    train = some_sequences()
    weights = baselines.ease_weights(train, 8, 2.0) + 0.3 * baselines.chain_weights(train, 8)
    histories = [np.array([5, 3, 8, 3]), np.array([2])]  # item 3 twice: its last place counts
    scores = torch.cat(
        [s for _, s in baselines.ease_chain_chunks(train, 8, histories, 2.0, 0.3, 0.5, chunk=1)]
    )
    np.testing.assert_allclose(
        scores[0, 1:], weights[2] + 0.5 * weights[7] + 0.125 * weights[4], rtol=1e-6
    )
    np.testing.assert_allclose(scores[1, 1:], weights[1], rtol=1e-6)
    assert scores.dtype == torch.float32 and scores[:, 0].isneginf().all()


def test_published_seeds_are_split_from_their_means_and_the_rivals():
    seeds, means = baselines.published_seeds()
    assert set(seeds["text"]) == {"llm", "none"} and list(means.index) == [
        "llm",
        "none",
        *baselines.RIVALS,
    ]
    for arm in ("llm", "none"):
        assert means.loc[arm, "ndcg@10"] == pytest.approx(
            seeds.loc[seeds["text"] == arm, "ndcg@10"].mean(), abs=1e-4
        )
