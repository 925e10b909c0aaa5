import numpy as np
import pytest
import torch

from recrl_lib.explainer import item_texts, model, sampling
from recrl_lib.params import Params
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.explainer.networks import LLAMAS, OTHERS, PROMPTS, tuned, untuned
from recrl_lib.tests.explainer.test_prompts import RECORD
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly
from recrl_lib.training import ppo, warm_start

WHOLE = [kind for kind in OTHERS if kind != "gemma2"]


def hidden(explainer, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return explainer.top(explainer.trunk(ids, mask), mask)


def test_pad_is_not_eos_and_the_prompts_own_eos_stays_in_the_mask():
    explainer = tiny_explainer()
    assert explainer.tokenizer.pad_token_id == explainer.eos_id  # as SmolLM2 ships
    assert explainer.pad_id != explainer.eos_id
    _, mask = model.left_pad(PROMPTS, explainer.pad_id, "cpu")
    assert mask.sum(-1).tolist() == [5, 8, 4]


@pytest.mark.parametrize("kind", LLAMAS)
def test_two_part_forward_is_the_library_forward_whatever_the_padding(kind):
    explainer = tuned(kind)
    ids, mask = model.left_pad(PROMPTS, explainer.pad_id, "cpu")
    places = model.position_ids(mask)
    expected = explainer.lm(input_ids=ids, attention_mask=mask.long(), position_ids=places).logits
    together = hidden(explainer, ids, mask)
    got = explainer.lm.lm_head(together)
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=0)
    for row, prompt in enumerate(PROMPTS):
        alone = hidden(explainer, torch.tensor([prompt]))[0]
        torch.testing.assert_close(together[row, -len(prompt) :], alone, atol=1e-5, rtol=0)


def test_reference_is_the_untuned_model_and_frozen_weights_stay():
    base, explainer = tiny_explainer(), tiny_explainer(lora_layers=2)
    ids, mask = model.left_pad(PROMPTS, base.pad_id, "cpu")
    expected = hidden(base, ids, mask)
    assert torch.equal(hidden(explainer, ids, mask), expected)  # B = 0
    tune_randomly(explainer)
    trained = explainer.adapter_parameters()
    with explainer.reference(), explainer.reference():
        assert torch.equal(hidden(explainer, ids, mask), expected)
    assert not torch.equal(hidden(explainer, ids, mask), expected)
    assert all(a is b for a, b in zip(explainer.adapter_parameters(), trained, strict=True))
    assert item_texts.weights_sha256(explainer) == item_texts.weights_sha256(base)


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("llm='./no-such-model': not packaged", lambda: model.load("./no-such-model")),
        ("the model has 3 layers", lambda: tiny_explainer(lora_layers=4)),
        ("more than a linear head", lambda: untuned("gemma2")),
        ("another LoRA setting", lambda: untuned("top two").load_adapter({})),
    ],
)
def test_errors_name_the_remedy(message, wrong):
    with pytest.raises((ValueError, RuntimeError), match=message):
        wrong()


@pytest.mark.parametrize("kind", WHOLE)
def test_other_architectures_encode_items_and_are_shielded(kind):
    whole = tuned(kind)
    assert not whole.split and whole.cut == 0
    items = item_texts.ItemTexts(whole, ["good film", "the red film and a blue film", "bad"])
    grams, tokens = subspaces.item_grams(whole, items)
    assert tokens == 10 and sorted(grams) == ["1.attention", "1.output", "2.attention", "2.output"]
    protected = subspaces.protect(grams, rank=10)  # as many as there are tokens
    optimizer = torch.optim.Adam(whole.adapter_parameters(), lr=0.1)
    projection.Shield(whole, protected).attach(optimizer)
    before = items.base_vectors()
    for p in whole.adapter_parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert projection.leak(whole, protected) <= 1e-6
    # all of the texts' energy is protected
    torch.testing.assert_close(items.vectors(), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", WHOLE)
def test_other_architectures_learn_by_ppo_and_merge(kind):
    whole, constant = tuned(kind), lambda records, texts: (np.ones(len(texts), np.float32), {})
    settings = Params(ppo_steps=1, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=6)
    row = ppo.PPO(whole, constant, [RECORD] * 3, settings, 0).step()
    assert row["ratio_first_minibatch_max_dev"] < 1e-4 and row["gradient_norm"] > 0
    before = sampling.sample(whole, PROMPTS[:1], sampling.Settings(6, 0.7), None).logprobs
    warm_start.merge(whole, untuned(kind).adapter_state())
    with whole.reference():
        merged = sampling.sample(whole, PROMPTS[:1], sampling.Settings(6, 0.7), None).logprobs
    torch.testing.assert_close(merged, before, atol=1e-5, rtol=0)
