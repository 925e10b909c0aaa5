import pytest
import torch
import torch.nn.functional as F

from recrl_lib.explainer import model, sampling
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly

SYSTEM = [1, 5, 6, 7, 8, 2]
PROMPTS = [SYSTEM + rest for rest in ([1, 9, 2, 1], [1, 4, 2, 1], [1, 10, 11, 12, 13, 2, 1])]


def sample(explainer, prompts, samples=2, length=10, uniforms=None):
    generator = None if uniforms is None else torch.Generator().manual_seed(uniforms)
    return sampling.sample(explainer, prompts, samples, length, 0.7, generator)


def tuned(layers=2):
    explainer = tiny_explainer(lora_layers=layers)
    tune_randomly(explainer)
    return explainer


def test_a_common_beginning_read_once_changes_nothing(monkeypatch):
    explainer = tuned()
    together = sample(explainer, PROMPTS, uniforms=0)
    read = []
    monkeypatch.setattr(sampling, "commonprefix", lambda prompts: read.append(1) or [])
    apart = sample(explainer, PROMPTS, uniforms=0)
    assert (
        read
        and torch.equal(together.response, apart.response)
        and torch.equal(together.prompt_mask, apart.prompt_mask)
    )
    torch.testing.assert_close(together.logprobs, apart.logprobs, atol=1e-5, rtol=0)
    real = together.full_mask
    torch.testing.assert_close(together.states[real], apart.states[real], atol=1e-5, rtol=0)


def test_prompts_come_out_padded_on_the_left_with_the_trunk_states_of_their_tokens():
    explainer = tuned()
    rollout = sample(explainer, PROMPTS, uniforms=0)
    ids, mask = model.left_pad([p for p in PROMPTS for _ in range(2)], explainer.pad_id, "cpu")
    assert torch.equal(rollout.prompt_mask, mask)
    full = torch.cat([ids, rollout.response], 1)[:, :-1]
    expected = explainer.trunk(full, rollout.full_mask)
    torch.testing.assert_close(
        rollout.states[rollout.full_mask], expected[rollout.full_mask], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "prompts",
    [PROMPTS[:1], [PROMPTS[0]] * 3, [[1], [1, 2]], [SYSTEM, SYSTEM + [1]]],
    ids=["one", "equal", "shortest", "a beginning"],
)
def test_prompts_of_every_shape(prompts):
    explainer = tuned()
    rollout = sample(explainer, prompts, uniforms=0)
    torch.testing.assert_close(
        sampling.token_logprobs(explainer, rollout, 0.7), rollout.logprobs, atol=1e-5, rtol=0
    )


def test_rows_that_end_leave_the_batch_without_a_trace(monkeypatch):
    explainer = tuned()
    kept = []
    take = sampling.Cache.take
    monkeypatch.setattr(
        sampling.Cache,
        "take",
        lambda self, rows, room: kept.append(len(rows)) or take(self, rows, room),
    )
    rollout = sampling.sample(explainer, PROMPTS, 20, 30, 1.5, torch.Generator().manual_seed(0))
    assert (
        0 < rollout.ended.float().mean() and min(kept[2:]) < 60
    )  # after the prefix and the repetition: rows dropped
    torch.testing.assert_close(
        sampling.token_logprobs(explainer, rollout, 1.5), rollout.logprobs, atol=1e-5, rtol=0
    )


def test_decoding_follows_the_adapters_as_they_are_and_the_weights_after_a_merge():
    explainer, prompt = tuned(), PROMPTS[:2]
    first = sample(explainer, prompt).logprobs
    with explainer.reference():
        base = sample(explainer, prompt).logprobs
    assert not torch.allclose(first, base, atol=1e-3)
    torch.testing.assert_close(
        base, sample(tiny_explainer(lora_layers=2), prompt).logprobs, atol=1e-6, rtol=0
    )
    tune_randomly(explainer, seed=7)
    second = sample(explainer, prompt)
    assert not torch.allclose(first, second.logprobs, atol=1e-3)
    with torch.no_grad():
        for p in explainer.lm.model.layers[0].parameters():
            p.mul_(1.1)
    explainer.forget_hash()
    third = sample(explainer, prompt)
    torch.testing.assert_close(
        sampling.token_logprobs(explainer, third, 0.7), third.logprobs, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("rows", [1, 3, 32, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_the_plain_ones(rows, bias):
    torch.manual_seed(0)
    weight, b, x = torch.randn(48, 32), torch.randn(48) if bias else None, torch.randn(rows, 32)
    torch.testing.assert_close(
        sampling.linear(weight, b)(x), F.linear(x, weight, b), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        sampling.linear(weight, b)(x.view(rows, 1, 32))[:, 0],
        F.linear(x, weight, b),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_torch_without_the_packing_ops_decodes_the_same(monkeypatch):
    expected = sample(tuned(), PROMPTS, uniforms=0)
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_reorder_linear_weight",
        lambda *_: (_ for _ in ()).throw(RuntimeError("not here")),
    )
    got = sample(tuned(), PROMPTS, uniforms=0)
    assert torch.equal(got.response, expected.response)
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_bfloat16_decodes_near_its_training_forward():
    explainer = tiny_explainer(lora_layers=2, dtype=torch.bfloat16)
    tune_randomly(explainer)
    rollout = sample(explainer, PROMPTS, uniforms=0)
    assert (
        sampling.token_logprobs(explainer, rollout, 0.7) - rollout.logprobs
    ).abs().max() < 0.2  # why old ones are computed again in bf16
