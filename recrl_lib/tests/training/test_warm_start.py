import pytest
import torch

from recrl_lib.explainer.item_texts import ItemTexts, weights_sha256
from recrl_lib.explainer.model import left_pad
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly
from recrl_lib.training import warm_start

RECORDS = [
    dict(
        user=u,
        item=1,
        position=1,
        title="the red film",
        year=0,
        genres=["good"],
        history_titles=["blue", word],
        history_genres=[["good"], ["bad"]],
    )
    for u, word in enumerate(["short", "long", "green", "bad", "a", "and"])
]
TEXTS = ["good film", "the red film and a blue film", "bad", "a green film"]


def answer(explainer):
    ids, mask = left_pad([[1, 5, 6, 7, 2, 1], [1, 9, 2, 1]], explainer.pad_id, "cpu")
    return explainer.top(explainer.trunk(ids, mask), mask)[mask]


def test_it_learns_with_frozen_weights_left_alone():
    explainer = tiny_explainer(lora_layers=2)
    before = weights_sha256(explainer)
    rows = warm_start.fit(explainer, RECORDS, steps=12, batch=4, lr=1e-2, seed=0)
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert weights_sha256(explainer) == before


def test_equal_seeds_equal_adapters():
    def tuned(seed):
        explainer = tiny_explainer(lora_layers=1)
        warm_start.fit(explainer, RECORDS, 2, 2, 1e-2, seed)
        return torch.cat([p.flatten() for p in explainer.adapter_parameters()])

    assert torch.equal(tuned(0), tuned(0)) and not torch.equal(tuned(0), tuned(1))


def test_the_shield_holds_inside_trl():
    explainer = tiny_explainer(lora_layers=2)
    protected = subspaces.subspaces(
        subspaces.item_grams(explainer, ItemTexts(explainer, TEXTS))[0], 0.9
    )
    shield = projection.Shield(explainer, protected)
    warm_start.fit(explainer, RECORDS, 4, 4, 1e-2, 0, shield)
    assert shield.seconds > 0 and projection.leak(explainer, protected) <= 1e-6
    free = tiny_explainer(lora_layers=2)
    warm_start.fit(free, RECORDS, 4, 4, 1e-2, 0)
    assert projection.leak(free, protected) > 0.1


def test_merging_changes_no_answer_and_makes_it_the_reference():
    explainer = tiny_explainer(lora_layers=2)
    fresh = explainer.adapter_state()
    tune_randomly(explainer)
    before = answer(explainer)
    with explainer.reference():
        assert (answer(explainer) - before).abs().max() > 1e-3
    warm_start.merge(explainer, fresh)
    torch.testing.assert_close(answer(explainer), before, atol=1e-5, rtol=0)
    with explainer.reference():
        torch.testing.assert_close(answer(explainer), before, atol=1e-5, rtol=0)


def test_a_stacked_adapter_on_the_base_is_both_updates():
    explainer = tiny_explainer(lora_layers=2)
    fresh = explainer.adapter_state()
    tune_randomly(explainer, seed=1)
    first = warm_start.merge(explainer, fresh)
    tune_randomly(explainer, seed=2)
    expected, second = answer(explainer), explainer.adapter_state()
    whole = tiny_explainer().add_lora(8, 8, 2, seed=0)  # twice the rank, the same alpha / rank
    stacked = warm_start.stack(first, second)
    whole.load_adapter(stacked)
    assert all(
        torch.equal(a[name], b[name])
        for a, b in zip(warm_start.unstack(stacked), (first, second), strict=True)
        for name in first
    )
    torch.testing.assert_close(answer(whole), expected, atol=1e-5, rtol=0)


def test_adapters_of_other_layers_do_not_stack():
    with pytest.raises(ValueError, match="same layers"):
        warm_start.stack(
            tiny_explainer(lora_layers=1).adapter_state(),
            tiny_explainer(lora_layers=2).adapter_state(),
        )
