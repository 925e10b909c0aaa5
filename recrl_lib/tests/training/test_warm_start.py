import torch

from recrl_lib.explainer.item_texts import weights_sha256
from recrl_lib.explainer.model import left_pad
from recrl_lib.shield import projection
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly
from recrl_lib.tests.training.small import PARAMS, RECORDS, protect
from recrl_lib.training import warm_start


def answer(explainer):
    ids, mask = left_pad([[1, 5, 6, 7, 2, 1], [1, 9, 2, 1]], explainer.pad_id, "cpu")
    return explainer.top(explainer.trunk(ids, mask), mask)[mask]


def fit(explainer, steps, seed=0, shield=None):
    params = PARAMS.replace(warm_steps=steps, warm_batch=4, warm_lr=1e-2)
    return warm_start.fit(explainer, RECORDS, params, seed, shield)


def test_it_learns_with_frozen_weights_left_alone():
    explainer = tiny_explainer(lora_layers=2)
    before = weights_sha256(explainer)
    rows = fit(explainer, steps=12)
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert weights_sha256(explainer) == before


def test_the_shield_holds_inside_trl():
    shielded, free = (tiny_explainer(lora_layers=2) for _ in range(2))
    protected = protect(shielded)
    shield = projection.Shield(shielded, protected)
    fit(shielded, 4, shield=shield)
    fit(free, 4)
    assert shield.seconds > 0 and projection.leak(shielded, protected) <= 1e-6
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
    first = explainer.adapter_state()
    warm_start.merge(explainer, fresh)
    tune_randomly(explainer, seed=2)
    whole = tiny_explainer().add_lora(8, 8, 2, seed=0)  # twice the rank, the same alpha / rank
    whole.load_adapter(warm_start.stack(first, explainer.adapter_state()))
    torch.testing.assert_close(answer(whole), answer(explainer), atol=1e-5, rtol=0)
