import pytest
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


@pytest.mark.parametrize("shielded", [True, False])
def test_it_learns_under_the_shield_or_free_with_frozen_weights_left_alone(shielded):
    explainer = tiny_explainer(lora_layers=2)
    frozen, protected = weights_sha256(explainer), protect(explainer)
    shield = projection.Shield(explainer, protected) if shielded else None
    params = PARAMS.replace(warm_steps=12, warm_batch=4, warm_lr=1e-2)
    rows = warm_start.fit(explainer, RECORDS, params, 0, shield)
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2 and weights_sha256(explainer) == frozen
    assert (projection.leak(explainer, protected) <= 1e-6) == shielded


def test_merging_makes_an_answer_the_reference_and_a_stacked_adapter_is_both_updates():
    explainer = tiny_explainer(lora_layers=2)
    fresh = explainer.adapter_state()
    tune_randomly(explainer, seed=1)
    first, before = explainer.adapter_state(), answer(explainer)
    warm_start.merge(explainer, fresh)
    with explainer.reference():
        torch.testing.assert_close(answer(explainer), before, atol=1e-5, rtol=0)
    tune_randomly(explainer, seed=2)
    whole = tiny_explainer().add_lora(8, 8, 2, seed=0)  # twice the rank, the same alpha / rank
    whole.load_adapter(warm_start.stack(first, explainer.adapter_state()))
    torch.testing.assert_close(answer(whole), answer(explainer), atol=1e-5, rtol=0)
