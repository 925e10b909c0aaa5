import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recrl_lib.explainer import item_texts, model, sampling
from recrl_lib.params import Params
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly
from recrl_lib.training import ppo, warm_start

PROMPTS = [[1, 5, 6, 2, 1], [1, 5, 6, 7, 8, 9, 2, 1], [1, 4, 2, 1]]


@pytest.fixture(params=[0, 1, 2], ids=["all layers", "top layer", "top two"])
def tuned(request):
    explainer = tiny_explainer(lora_layers=request.param)
    tune_randomly(explainer)
    return explainer


def sample(explainer, samples=3, length=12, seed=0, temperature=0.7):
    return sampling.sample(
        explainer, PROMPTS, samples, length, temperature, torch.Generator().manual_seed(seed)
    )


def test_pad_is_not_eos_and_the_prompts_own_eos_stays_in_the_mask():
    explainer = tiny_explainer()
    assert explainer.tokenizer.pad_token_id == explainer.eos_id  # as SmolLM2 ships
    assert explainer.pad_id != explainer.eos_id
    _, mask = model.left_pad(PROMPTS, explainer.pad_id, "cpu")
    assert mask.sum(-1).tolist() == [5, 8, 4]


def test_two_part_forward_is_the_library_forward(tuned):
    ids, mask = model.left_pad(PROMPTS, tuned.pad_id, "cpu")
    expected = tuned.lm(
        input_ids=ids, attention_mask=mask.long(), position_ids=model.position_ids(mask)
    ).logits
    got = tuned.lm.lm_head(tuned.top(tuned.trunk(ids, mask), mask))
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=0)


def test_left_padding_changes_nothing(tuned):
    ids, mask = model.left_pad(PROMPTS, tuned.pad_id, "cpu")
    together = tuned.top(tuned.trunk(ids, mask), mask)
    for row, prompt in enumerate(PROMPTS):
        alone = torch.tensor([prompt])
        hidden = tuned.top(tuned.trunk(alone, torch.ones_like(alone)), torch.ones_like(alone))
        torch.testing.assert_close(together[row, -len(prompt) :], hidden[0], atol=1e-5, rtol=0)


def test_sampled_logprobs_and_states_are_those_of_the_training_forward(tuned):
    rollout = sample(tuned)
    torch.testing.assert_close(
        sampling.token_logprobs(tuned, rollout, 0.7), rollout.logprobs, atol=1e-5, rtol=0
    )
    assert (
        sampling.token_logprobs(tuned, rollout, 1.0) - rollout.logprobs
    ).abs().max() > 0.01  # temperature matters


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
    rollout = sampling.sample(tuned, PROMPTS, 1, 8, 0.7, None)
    ids, mask = model.left_pad(PROMPTS, tuned.pad_id, "cpu")
    expected = tuned.lm.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=tuned.pad_id,
    )[:, ids.shape[1] :]
    for row in range(len(PROMPTS)):
        real = rollout.mask[row]
        assert rollout.response[row][real].tolist() == expected[row][: int(real.sum())].tolist()


def test_sampler_draws_from_softmax():
    logp = torch.log_softmax(torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0]), -1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(sampling.draw(logp.expand(20_000, -1), uniforms), minlength=5) / 20_000
    torch.testing.assert_close(counts, logp.exp(), atol=0.012, rtol=0)  # 3 standard errors


def test_sampler_never_draws_a_token_of_probability_zero():
    logp = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]))
    for u in (0.0, 0.25, 0.5, 1 - 1e-12):
        assert sampling.draw(logp, torch.tensor([u], dtype=torch.float64)).item() in (1, 3)


def test_equal_generators_give_equal_rollouts_and_new_ones_do_not(tuned):
    assert torch.equal(sample(tuned).response, sample(tuned).response)
    assert not torch.equal(sample(tuned, seed=1).response[:, :3], sample(tuned).response[:, :3])


def test_reference_is_the_untuned_model_and_weights_stay():
    base = tiny_explainer()
    tuned = tiny_explainer(lora_layers=2)
    ids, mask = model.left_pad(PROMPTS, base.pad_id, "cpu")
    expected = base.top(base.trunk(ids, mask), mask)
    assert torch.equal(tuned.top(tuned.trunk(ids, mask), mask), expected)  # B = 0
    tune_randomly(tuned)
    assert not torch.equal(tuned.top(tuned.trunk(ids, mask), mask), expected)
    with tuned.reference():
        assert torch.equal(tuned.top(tuned.trunk(ids, mask), mask), expected)
    assert item_texts.weights_sha256(tuned) == item_texts.weights_sha256(base)


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
    texts = [
        "good film",
        "the red film and a blue film",
        "bad",
        "good film of the long",
        "a green film",
    ]
    items = item_texts.ItemTexts(tuned, texts, batch=2)
    got = items.vectors()
    assert torch.equal(got[0], torch.zeros(32))
    for row, text in enumerate(texts, 1):
        ids = torch.tensor([tuned.tokenizer(text, add_special_tokens=False)["input_ids"]])
        hidden = tuned.lm.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(got[row], hidden.mean(0), atol=1e-5, rtol=0)


def test_base_vectors_are_cached_bit_for_bit_and_unmoved_by_tuning():
    explainer = tiny_explainer(lora_layers=1)
    texts = ["good film", "the red film"]
    first = item_texts.ItemTexts(explainer, texts).base_vectors()
    tune_randomly(explainer)
    items = item_texts.ItemTexts(explainer, texts)
    assert torch.equal(items.base_vectors(), first)
    assert not torch.equal(items.vectors(), first)
    with explainer.reference():
        assert torch.equal(items.vectors(), first)


def test_empty_item_text_is_named():
    with pytest.raises(ValueError, match="item 2"):
        item_texts.ItemTexts(tiny_explainer(), ["good", ""])


def test_kl_of_an_explanation_is_zero_untuned_and_positive_tuned():
    explainer = tiny_explainer(lora_layers=2)
    record = dict(
        user=0,
        item=1,
        position=1,
        title="the",
        year=0,
        genres=["good"],
        history_titles=["red", "blue"],
        history_genres=[],
    )
    first = sampling.explain(explainer, [record] * 3, 6, 0.7, seed=0)
    assert (first.kl == 0).all() and all((r <= 0).all() for r in first.reference)
    tune_randomly(explainer, 0.3)
    assert (sampling.explain(explainer, [record] * 3, 6, 0.7, seed=0).kl > 0).all()


def test_unknown_model_is_a_clear_error():
    with pytest.raises(RuntimeError, match="no-such-model"):
        model.load("./no-such-model")


# --- architectures that are run whole ------------------------------------------------------------

OTHERS = {
    "qwen2": dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": dict(n_embd=32, n_inner=48, n_layer=3, n_head=4),
    "opt": dict(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
    "phi3": dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt_neox": dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    ),
}
RECORD = dict(
    user=0,
    item=1,
    position=1,
    title="the",
    year=0,
    genres=["good"],
    history_titles=["red", "blue"],
    history_genres=[["good"]],
)


def other(kind: str) -> model.Explainer:
    tokenizer = tiny_explainer().tokenizer
    torch.manual_seed(0)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    settings = dict(
        vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.15, **ids
    )
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings, **OTHERS[kind]))
    return model.Explainer(lm, tokenizer).add_lora(4, 4, 2, 0)


@pytest.fixture(params=OTHERS)
def whole(request):
    explainer = other(request.param)
    tune_randomly(explainer)
    return explainer


def forced_whole(monkeypatch, lora_layers: int) -> model.Explainer:
    monkeypatch.setattr(model, "SPLIT", ())
    explainer = tiny_explainer(lora_layers=lora_layers)
    tune_randomly(explainer)
    assert not explainer.split and explainer.cut == 0
    return explainer


def test_a_llama_run_whole_says_what_a_llama_run_in_two_parts_says(tuned, monkeypatch):
    layers = tuned.n_layers - tuned.cut
    whole = forced_whole(monkeypatch, layers)
    for greedy in (True, False):
        ours, theirs = (
            sampling.sample(
                e, PROMPTS, 3, 12, 0.7, None if greedy else torch.Generator().manual_seed(0)
            )
            for e in (tuned, whole)
        )
        assert (
            ours.texts == theirs.texts
            and torch.equal(ours.mask, theirs.mask)
            and torch.equal(ours.response, theirs.response)
        )
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            sampling.token_logprobs(whole, theirs, 0.7), theirs.logprobs, atol=1e-5, rtol=0
        )


def test_other_architectures_greedy_equals_generate(whole):
    rollout = sampling.sample(whole, PROMPTS, 1, 8, 0.7, None)
    ids, mask = model.left_pad(PROMPTS, whole.pad_id, "cpu")
    expected = whole.lm.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=whole.pad_id,
        eos_token_id=whole.eos_id,
    )[:, ids.shape[1] :]
    for row, real in enumerate(rollout.mask):
        assert rollout.response[row][real].tolist() == expected[row][: int(real.sum())].tolist()


def test_other_architectures_sampled_logprobs_are_those_of_the_training_forward(whole):
    rollout = sample(whole)
    assert rollout.mask.any(-1).all() and (rollout.logprobs[rollout.mask] < 0).all()
    torch.testing.assert_close(
        sampling.token_logprobs(whole, rollout, 0.7), rollout.logprobs, atol=1e-5, rtol=0
    )
    for row in range(3):  # without its padding a row says the same: positions and masks are right
        ids = torch.tensor([PROMPTS[row // 3] + rollout.response[row][rollout.mask[row]].tolist()])
        logp = torch.log_softmax(whole.lm(input_ids=ids).logits[0].float() / 0.7, -1)
        n = int(rollout.mask[row].sum())
        expected = logp[-n - 1 : -1].gather(-1, ids[0, -n:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[row, :n], expected, atol=1e-5, rtol=0)


def test_other_architectures_explain_encode_and_are_shielded(whole):
    said = sampling.explain(whole, [RECORD] * 3, 6, 0.7, seed=0)
    assert len(said.texts) == 3 and (said.kl > 0).all()
    items = item_texts.ItemTexts(whole, ["good film", "the red film and a blue film", "bad"])
    ids = torch.tensor([whole.tokenizer("good film", add_special_tokens=False)["input_ids"]])
    torch.testing.assert_close(
        items.vectors()[1],
        whole.lm.base_model(input_ids=ids).last_hidden_state[0].mean(0),
        atol=1e-5,
        rtol=0,
    )
    grams, tokens = subspaces.item_grams(whole, items)
    assert tokens == 10 and sorted(grams) == ["1.attention", "1.output", "2.attention", "2.output"]
    protected = subspaces.subspaces(grams, 1.0, rank=10)  # as many as there are tokens
    optimizer = torch.optim.Adam(whole.adapter_parameters(), lr=0.1)
    guard = projection.Shield(whole, protected).attach(optimizer)
    before = items.base_vectors()
    for p in whole.adapter_parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    guard.detach()
    assert projection.leak(whole, protected) <= 1e-6
    torch.testing.assert_close(
        items.vectors(), before, atol=1e-4, rtol=0
    )  # all of the texts' energy is protected
    assert (sampling.explain(whole, [RECORD], 6, 0.7, seed=0).kl > 0).all()


def test_other_architectures_learn_by_ppo(whole):
    settings = Params(ppo_steps=1, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=6)
    before = item_texts.weights_sha256(whole)
    row = ppo.PPO(
        whole,
        lambda records, texts: (np.ones(len(texts), np.float32), {}),
        [RECORD] * 3,
        settings,
        0,
    ).step()
    assert row["ratio_first_minibatch_max_dev"] < 1e-4 and row["gradient_norm"] > 0
    assert item_texts.weights_sha256(whole) == before


def test_merging_works_for_other_architectures(whole):
    prompts = [[1, 5, 6, 7, 2, 1]]
    before = sampling.sample(whole, prompts, 1, 6, 0.7, None).logprobs
    warm_start.merge(whole, other(whole.lm.config.model_type).adapter_state())
    with whole.reference():
        torch.testing.assert_close(
            sampling.sample(whole, prompts, 1, 6, 0.7, None).logprobs, before, atol=1e-5, rtol=0
        )


def test_a_model_that_caps_its_logits_is_refused():
    tokenizer = tiny_explainer().tokenizer
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.15,
    )
    with pytest.raises(ValueError, match="soft cap"):
        model.Explainer(AutoModelForCausalLM.from_config(config), tokenizer)
