import numpy as np
import pytest
import torch

from recrl_lib.data.splits import Split
from recrl_lib.params import Params
from recrl_lib.ranker import cold_start, sasrec, training

N_ITEMS, TEXT_DIM = 24, 6


def clusters(n_users=120, seed=0):
    """Users who stay within one of three groups of items; an item's text names its group."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 3, n_users)
    walks = [rng.choice(np.arange(1 + g, N_ITEMS + 1, 3), 6, replace=False) for g in groups]
    text = 0.1 * torch.randn(N_ITEMS + 1, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    text[torch.arange(1, N_ITEMS + 1), torch.arange(N_ITEMS) % 3] += 1.0
    valid, test = (np.array([w[end] for w in walks]) for end in (-2, -1))
    return Split([w[:-2] for w in walks], valid, test), text


def fit(split, text):
    values = dict(dim=16, max_len=6, dropout=0.1, lr=1e-2, epochs=8, patience=8)
    values |= dict(item_dropout=0.0, average=0.0)
    params = Params(**{f"ranker_{name}": value for name, value in values.items()})
    return training.fit(params, split, len(text) - 1, text, 0)[0]


def test_text_places_items_that_training_never_saw():
    split, text = clusters()
    cold = np.array([5, 9, 1, 16, 24, 11])  # neighbours differ in group: wrong text is wrong
    right, wrong = cold_start.cold_ranks(split, text, cold, fit)
    assert len(right) == len(wrong) == np.isin(split.test, cold).sum() > 20
    assert right.mean() + 2 < wrong.mean() and wrong.max() <= N_ITEMS


def test_training_sees_no_cold_item():
    split, text = clusters(20)
    cold = np.array([11, 3, 24])
    given = {}

    def spy(warm, known):
        given.update(split=warm, text=known)
        model = sasrec.SASRec(len(known) - 1, 8, 1, 1, 6, text_dim=TEXT_DIM)
        model.fit_text(known)
        return sasrec.freeze(model)

    cold_start.cold_ranks(split, text, cold, spy)
    old = np.setdiff1d(np.arange(N_ITEMS + 1), cold)  # new id -> old id
    torch.testing.assert_close(given["text"], text[old])
    expected = [[i for i in items if i not in cold] for items in split.with_valid]
    got = [old[items].tolist() for items in given["split"].with_valid]
    assert got == [items for items in expected if len(items) >= 2]
    absent = np.setdiff1d(np.arange(1, N_ITEMS + 1), split.test[:3])[:4]
    few = Split(split.train[:3], split.valid[:3], split.test[:3])
    with pytest.raises(ValueError, match="4 items held out, 0 of them in the test; hold out more"):
        cold_start.cold_ranks(few, text, absent, fit)
    # users who only train keep their warm items
    others = (np.array([5, 4, 1]), np.array([5, 2]))
    split = Split([np.array([1, 2, 3])], np.array([4]), np.array([5]), others=others)
    # Item 5 is cold, and the one item that is left of the last user is no history.
    warm = cold_start.warm_split(split, np.arange(6), n_warm=4)
    assert [ids.tolist() for ids in warm.others] == [[4, 1]]
    assert [ids.tolist() for ids in warm.train] == [[1, 2, 3]]
