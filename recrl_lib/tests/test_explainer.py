import pytest
import torch

from recrl_lib import decoding, explainer as ex
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly

PROMPTS = [[1, 5, 6, 2, 1], [1, 5, 6, 7, 8, 9, 2, 1], [1, 4, 2, 1]]


@pytest.fixture(params=[0, 1, 2], ids=["all layers", "top layer", "top two"])
def tuned(request):
    explainer = tiny_explainer(lora_layers=request.param)
    tune_randomly(explainer)
    return explainer


def sample(explainer, samples=3, length=12, seed=0, temperature=0.7):
    return ex.sample(explainer, PROMPTS, samples, length, temperature, torch.Generator().manual_seed(seed))


def test_pad_is_not_eos_and_the_prompts_own_eos_stays_in_the_mask():
    explainer = tiny_explainer()
    assert explainer.tokenizer.pad_token_id == explainer.eos_id  # as SmolLM2 ships
    assert explainer.pad_id != explainer.eos_id
    _, mask = ex.left_pad(PROMPTS, explainer.pad_id, "cpu")
    assert mask.sum(-1).tolist() == [5, 8, 4]


def test_two_part_forward_is_the_library_forward(tuned):
    ids, mask = ex.left_pad(PROMPTS, tuned.pad_id, "cpu")
    expected = tuned.lm(input_ids=ids, attention_mask=mask.long(), position_ids=ex.position_ids(mask)).logits
    got = tuned.lm.lm_head(tuned.top(tuned.trunk(ids, mask), mask))
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=0)


def test_left_padding_changes_nothing(tuned):
    ids, mask = ex.left_pad(PROMPTS, tuned.pad_id, "cpu")
    together = tuned.top(tuned.trunk(ids, mask), mask)
    for row, prompt in enumerate(PROMPTS):
        alone = torch.tensor([prompt])
        hidden = tuned.top(tuned.trunk(alone, torch.ones_like(alone)), torch.ones_like(alone))
        torch.testing.assert_close(together[row, -len(prompt):], hidden[0], atol=1e-5, rtol=0)


def test_sampled_logprobs_and_states_are_those_of_the_training_forward(tuned):
    rollout = sample(tuned)
    torch.testing.assert_close(ex.token_logprobs(tuned, rollout, 0.7), rollout.logprobs, atol=1e-5, rtol=0)
    assert (ex.token_logprobs(tuned, rollout, 1.0) - rollout.logprobs).abs().max() > 0.01  # temperature matters


def test_response_ends_at_its_first_eos(tuned):
    rollout = sample(tuned, samples=40, length=20, temperature=1.5)
    assert rollout.ended.any()
    for ids, mask, ended in zip(rollout.response, rollout.mask, rollout.ended):
        eos = (ids == tuned.eos_id).nonzero()[:, 0]
        length = int(mask.sum())
        assert mask[:length].all()
        assert bool(ended) == (len(eos) > 0)
        if len(eos):
            assert length == int(eos[0]) + 1
            assert (ids[length:] == tuned.pad_id).all()


def test_greedy_equals_generate(tuned):
    rollout = ex.sample(tuned, PROMPTS, 1, 8, 0.7, None)
    ids, mask = ex.left_pad(PROMPTS, tuned.pad_id, "cpu")
    expected = tuned.lm.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=8, do_sample=False, pad_token_id=tuned.pad_id,
    )[:, ids.shape[1]:]
    for row in range(len(PROMPTS)):
        real = rollout.mask[row]
        assert rollout.response[row][real].tolist() == expected[row][: int(real.sum())].tolist()


def test_sampler_draws_from_softmax():
    logp = torch.log_softmax(torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0]), -1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(decoding.draw(logp.expand(20_000, -1), uniforms), minlength=5) / 20_000
    torch.testing.assert_close(counts, logp.exp(), atol=0.012, rtol=0)  # 3 standard errors


def test_sampler_never_draws_a_token_of_probability_zero():
    logp = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]))
    for u in (0.0, 0.25, 0.5, 1 - 1e-12):
        assert decoding.draw(logp, torch.tensor([u], dtype=torch.float64)).item() in (1, 3)


def test_equal_generators_give_equal_rollouts_and_new_ones_do_not(tuned):
    assert torch.equal(sample(tuned).response, sample(tuned).response)
    assert not torch.equal(sample(tuned, seed=1).response[:, :3], sample(tuned).response[:, :3])


def test_reference_is_the_untuned_model_and_weights_stay():
    base = tiny_explainer()
    tuned = tiny_explainer(lora_layers=2)
    ids, mask = ex.left_pad(PROMPTS, base.pad_id, "cpu")
    expected = base.top(base.trunk(ids, mask), mask)
    assert torch.equal(tuned.top(tuned.trunk(ids, mask), mask), expected)  # B = 0
    tune_randomly(tuned)
    assert not torch.equal(tuned.top(tuned.trunk(ids, mask), mask), expected)
    with tuned.reference():
        assert torch.equal(tuned.top(tuned.trunk(ids, mask), mask), expected)
    assert ex.weights_sha256(tuned) == ex.weights_sha256(base)


def test_adapter_state_round_trip_and_foreign_state():
    tuned, other = tiny_explainer(lora_layers=2), tiny_explainer(lora_layers=2)
    tune_randomly(tuned)
    other.load_adapter(tuned.adapter_state())
    for a, b in zip(tuned.adapter_parameters(), other.adapter_parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another LoRA setting"):
        tiny_explainer(lora_layers=1).load_adapter(tuned.adapter_state())


def test_lora_init_depends_on_the_seed_alone():
    torch.manual_seed(5)
    first = tiny_explainer(seed=3, lora_layers=1).adapter_parameters()[0]
    torch.manual_seed(6)
    assert torch.equal(first, tiny_explainer(seed=3, lora_layers=1).adapter_parameters()[0])


def test_item_vectors_equal_a_plain_loop(tuned):
    texts = ["good film", "the red film and a blue film", "bad", "good film of the long", "a green film"]
    items = ex.ItemTexts(tuned, texts, batch=2)
    got = items.vectors()
    assert torch.equal(got[0], torch.zeros(32))
    for row, text in enumerate(texts, 1):
        ids = torch.tensor([tuned.tokenizer(text, add_special_tokens=False)["input_ids"]])
        hidden = tuned.lm.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(got[row], hidden.mean(0), atol=1e-5, rtol=0)


def test_base_vectors_are_cached_bit_for_bit_and_unmoved_by_tuning():
    explainer = tiny_explainer(lora_layers=1)
    texts = ["good film", "the red film"]
    first = ex.ItemTexts(explainer, texts).base_vectors()
    tune_randomly(explainer)
    items = ex.ItemTexts(explainer, texts)
    assert torch.equal(items.base_vectors(), first)
    assert not torch.equal(items.vectors(), first)
    with explainer.reference():
        assert torch.equal(items.vectors(), first)


def test_empty_item_text_is_named():
    with pytest.raises(ValueError, match="item 2"):
        ex.ItemTexts(tiny_explainer(), ["good", ""])


def test_kl_of_an_explanation_is_zero_untuned_and_positive_tuned():
    explainer = tiny_explainer(lora_layers=2)
    record = dict(user=0, item=1, position=1, title="the", year=0, genres=["good"], history_titles=["red", "blue"], history_genres=[])
    first = ex.explain(explainer, [record] * 3, 6, 0.7, seed=0)
    assert (first.kl == 0).all() and all((r <= 0).all() for r in first.reference)
    tune_randomly(explainer, 0.3)
    assert (ex.explain(explainer, [record] * 3, 6, 0.7, seed=0).kl > 0).all()


def test_unknown_model_is_a_clear_error():
    with pytest.raises(RuntimeError, match="no-such-model"):
        ex.load("./no-such-model")
