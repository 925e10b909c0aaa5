import pytest
import torch

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.tests.explainer.networks import tuned
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly

TEXTS = ["good film", "the red film and a blue film", "bad", "good film of the long", "a film"]


@pytest.mark.parametrize("kind", ["all layers", "top layer", "qwen2", "gpt2"])
def test_item_vectors_equal_a_plain_loop(kind):
    explainer = tuned(kind)
    got = ItemTexts(explainer, TEXTS, batch=2).vectors()
    assert torch.equal(got[0], torch.zeros(32))
    for row, text in enumerate(TEXTS, 1):
        ids = torch.tensor([explainer.tokenizer(text, add_special_tokens=False)["input_ids"]])
        hidden = explainer.lm.base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(got[row], hidden.mean(0), atol=1e-5, rtol=0)


def test_base_vectors_are_cached_unmoved_by_tuning_and_an_empty_text_is_named():
    explainer = tiny_explainer(lora_layers=1)
    first = ItemTexts(explainer, TEXTS).base_vectors()
    tune_randomly(explainer)
    items = ItemTexts(explainer, TEXTS)
    assert torch.equal(items.base_vectors(), first)
    assert not torch.equal(items.vectors(), first)
    with explainer.reference():
        assert torch.equal(items.vectors(), first)
    with pytest.raises(ValueError, match="item 2"):
        ItemTexts(tiny_explainer(), ["good", ""])
