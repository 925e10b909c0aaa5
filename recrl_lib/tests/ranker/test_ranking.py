import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib.ranker import ranking
from recrl_lib.ranker.sasrec import SASRec
from recrl_lib.tests.ranker.toy import N_ITEMS, cycles, small


def test_sequences_are_padded_and_nan_and_seen_targets_refused():
    padded = ranking.pad_sequences([np.array([1, 2]), np.array([], dtype=int), np.arange(1, 6)], 3)
    assert padded.tolist() == [[0, 1, 2], [0, 0, 0], [3, 4, 5]] and padded.dtype == torch.int64
    with pytest.raises(RuntimeError, match="NaN scores for users 0..0"):
        ranking.ranks_of([(0, torch.full((1, 4), torch.nan))], [np.array([1])], np.array([2]))
    with pytest.raises(ValueError, match="target item 1 of user 1"):
        ranking.ranks_of([(0, torch.zeros(2, 4))], [np.array([2]), np.array([1])], np.array([1, 1]))


def test_chunks_cover_all_users_in_bounded_memory_and_do_not_mask_history(monkeypatch):
    assert [p.stop for p in ranking.chunks(700, 1_682)] == [256, 512, 768]
    model, split = small().eval(), cycles()
    ((_, whole),) = ranking.score_chunks(model, split.train, None)
    monkeypatch.setattr(ranking, "CELLS", 7 * (N_ITEMS + 1) + 5)
    parts = list(ranking.score_chunks(model, split.train, None))
    assert [start for start, _ in parts] == list(range(0, 40, 7))
    scores = torch.cat([s for _, s in parts])
    assert scores.shape == (40, N_ITEMS + 1) and torch.allclose(scores, whole, atol=1e-6)
    assert scores[:, 0].isneginf().all() and scores[:, 1:].isfinite().all()


class Tied(SASRec):
    """Scores from small whole numbers, so that they are exact and often tie."""

    def __init__(self, n_items, seed):
        super().__init__(n_items, 3, 1, 1, max_len=n_items)
        self.seed, generator = seed, torch.Generator().manual_seed(seed)
        self.table = torch.randint(-1, 2, (n_items + 1, 3), generator=generator).float()

    def item_table(self, text):
        return self.table

    def forward(self, histories, table):
        seeds = [[self.seed, *h[h > 0]] for h in histories.numpy()]
        states = [np.random.default_rng(s).integers(-1, 2, (1, 3)) for s in seeds]
        return torch.from_numpy(np.stack(states)).float()


@given(st.integers(4, 30), st.integers(0, 10**6), *(st.integers(1, n) for n in (10, 200, 4)))
@settings(max_examples=100, deadline=None)
def test_ranking_in_chunks_equals_the_full_matrix(n_items, seed, users, cells, k):
    """Ties go to the lower id in a list, and against us in a rank."""
    rng, model = np.random.default_rng(seed), Tied(n_items, seed)
    drawn = [rng.permutation(n_items)[: rng.integers(2, n_items)] + 1 for _ in range(8)]
    sequences, targets = [d[:-1] for d in drawn], np.array([d[-1] for d in drawn])
    scores = (model(ranking.pad_sequences(sequences, n_items), None)[:, 0] @ model.table.T).numpy()
    unseen = [[i for i in range(1, n_items + 1) if i not in s] for s in sequences]
    best = [sorted(rest, key=lambda i: (-row[i], i))[:k] for row, rest in zip(scores, unseen)]
    enough = [u for u in range(8) if len(unseen[u]) >= k]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "USERS", users)
        patch.setattr(ranking, "CELLS", cells)
        ranks = ranking.target_ranks(model, sequences, targets, None)
        top, top_scores = ranking.rank(model, [sequences[u] for u in enough], k, None)
    expected = [sum(row[i] >= row[t] for i in r) for row, r, t in zip(scores, unseen, targets)]
    assert ranks.tolist() == expected
    assert top.tolist() == [best[u] for u in enough]
    assert top_scores.tolist() == [[scores[u, i] for i in best[u]] for u in enough]


def test_rank_takes_users_that_training_never_saw():
    model = small().eval()
    items, scores = ranking.rank(model, [[3, 4], [1]], 2, None)
    assert items.shape == scores.shape == (2, 2) and (np.diff(scores) <= 0).all()
    assert not set(items[0]) & {3, 4} and items.dtype == np.int64
    for history in ([], [0], [13], [-1]):
        with pytest.raises(ValueError, match=r"history 1 must .* at least one item, .* 1\.\.12"):
            ranking.rank(model, [[1], history], 2, None)
    with pytest.raises(ValueError, match="fewer than k=12"):
        ranking.rank(model, [[1]], 12, None)
