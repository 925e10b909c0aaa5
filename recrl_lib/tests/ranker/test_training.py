from dataclasses import replace

import numpy as np
import pytest
import torch

from recrl_lib.params import Params
from recrl_lib.ranker import metrics, ranking, sasrec, training
from recrl_lib.tests.ranker.toy import N_ITEMS, cycles, small, some_text


def fit(split, text=None, seed=0, **changes):
    values = {"dim": 8, "layers": 2, "max_len": 6, "lr": 1e-2, "batch": 8, "epochs": 4}
    values |= {"item_dropout": 0.0, "average": 0.0, "patience": 20} | changes
    params = Params(**{f"ranker_{name}": value for name, value in values.items()})
    return training.fit(params, split, N_ITEMS, text, seed)


@pytest.mark.parametrize("width", [2, 3, 5, 50])
def test_windows_hold_every_transition_once(width):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 100, n) for n in (1, 2, 3, 4, 5, 9, 23)]
    expected = sorted((int(a), int(b)) for s in sequences for a, b in zip(s[:-1], s[1:]))
    cuts = set()
    for _ in range(5):
        windows = training.windows_of(sequences, width, rng).numpy()
        assert windows.shape[1] == width
        pairs = [(int(a), int(b)) for row in windows for a, b in zip(row[:-1], row[1:]) if a]
        assert sorted(pairs) == expected
        assert (np.diff((windows > 0).astype(int)) >= 0).all()  # padded on the left only
        cuts.add(windows.tobytes())
    assert (len(cuts) > 1) == (2 < width < 23)


@pytest.mark.parametrize("text", [None, some_text()], ids=["plain", "text"])
@pytest.mark.parametrize("sampled", [False, True])
def test_training_learns_and_keeps_the_best_epoch(monkeypatch, text, sampled):
    if sampled:
        monkeypatch.setattr(training, "FULL_SOFTMAX_ITEMS", N_ITEMS - 1)
        monkeypatch.setattr(training, "NEGATIVES", 6)
    split = cycles()
    model, curve = fit(split, text, epochs=12)
    best = max(row["valid_ndcg@10"] for row in curve)
    assert curve[-1]["loss"] < curve[0]["loss"] and best > 0.6
    assert [row["epoch"] for row in curve] == list(range(1, len(curve) + 1))
    ranks = ranking.target_ranks(model, split.train, split.valid, text)
    assert metrics.ndcg_at(ranks, 10).mean() == best
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_many_negatives_give_nearly_the_full_loss(monkeypatch):
    still = {"lr": 0.0, "epochs": 1, "dropout": 0.0}
    full = fit(cycles(), some_text(), **still)[1][0]["loss"]
    monkeypatch.setattr(training, "FULL_SOFTMAX_ITEMS", N_ITEMS - 1)
    monkeypatch.setattr(training, "NEGATIVES", 20_000)
    assert fit(cycles(), some_text(), **still)[1][0]["loss"] == pytest.approx(full, rel=0.01)


def test_users_who_are_not_evaluated_teach_too():
    """The evaluated users' single training items hold no transition: all comes from the others."""
    walks = cycles()
    split = replace(walks, train=[w[-1:] for w in walks.train], others=tuple(walks.train))
    model, _ = fit(split, epochs=12)
    hits = metrics.hr_at(ranking.target_ranks(model, split.train, split.valid, None), 1)
    assert hits.mean() > 0.5


def test_training_stops_early_and_is_reproducible_whatever_the_global_state():
    assert len(fit(cycles(), lr=0.0, epochs=20, patience=3)[1]) == 4  # the first is the best
    split, text, found = cycles(), some_text(), []
    for global_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model, curve = fit(split, text, seed, epochs=2)
        assert torch.equal(before, torch.get_rng_state())
        found.append((sasrec.state_sha256(model), str(curve)))
    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[1], found[2]))


def test_the_average_by_hand():
    """Decay .75; the first steps n are forgotten sooner, by n / (n + 9)."""
    start, model = small(), small(seed=1)
    expected = start.items.weight.detach().clone()
    average = training.averaged(start, 0.25)
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.25):
        average.update_parameters(model)
        expected = decay * expected + (1 - decay) * model.items.weight
        assert torch.allclose(average.module.items.weight, expected, atol=1e-6)
