from contextlib import nullcontext

import pytest
import torch

from recrl_lib.explainer import model, sampling
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.tests.explainer.networks import LLAMAS, OTHERS, PROMPTS, tuned
from recrl_lib.tests.explainer.test_prompts import RECORD
from recrl_lib.tests.tiny import tune_randomly

KINDS = [*LLAMAS, *(kind for kind in OTHERS if kind != "gemma2")]
SYSTEM = [1, 5, 6, 7, 8, 2]
CHATS = [SYSTEM + rest for rest in ([1, 9, 2, 1], [1, 4, 2, 1], [1, 10, 11, 12, 13, 2, 1])]
close = dict(atol=1e-5, rtol=0)


def sample(explainer, prompts=CHATS, samples=2, length=10, seed=0, temperature=0.7):
    """By the random numbers of ``seed``; greedy if None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return sampling.sample(
        explainer, prompts, sampling.Settings(length, temperature, samples), generator
    )


def assert_trained_alike(explainer, rollout, temperature=0.7):
    """The sampler's log-probabilities and trunk states are those of the training forward."""
    got = sampling.token_logprobs(explainer, rollout, temperature)
    torch.testing.assert_close(got, rollout.logprobs, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_logprobs_are_those_of_the_training_forward_and_of_each_row_alone(kind):
    explainer = tuned(kind)
    rollout = sample(explainer, PROMPTS, samples=3, length=12)
    assert_trained_alike(explainer, rollout)
    assert rollout.mask.any(-1).all() and (rollout.logprobs[rollout.mask] < 0).all()
    hotter = sampling.token_logprobs(explainer, rollout, 1.0)
    assert (hotter - rollout.logprobs).abs().max() > 0.01  # temperature matters
    for row in range(3):  # without its padding a row says the same: positions and masks are right
        ids = torch.tensor([PROMPTS[row // 3] + rollout.response[row][rollout.mask[row]].tolist()])
        logp = torch.log_softmax(explainer.lm(input_ids=ids).logits[0].float() / 0.7, -1)
        n = int(rollout.mask[row].sum())
        expected = logp[-n - 1 : -1].gather(-1, ids[0, -n:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[row, :n], expected, **close)


@pytest.mark.parametrize("kind", LLAMAS)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_llama_run_whole_says_what_a_llama_run_in_two_parts_says(kind, seed, monkeypatch):
    ours = sample(tuned(kind), PROMPTS, 3, 12, seed)
    monkeypatch.setattr(model, "SPLIT", ())
    whole = tuned(kind)
    theirs = sample(whole, PROMPTS, 3, 12, seed)
    assert not whole.split and ours.texts == theirs.texts
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.response, theirs.response)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, **close)


@pytest.mark.parametrize("kind", ["top two", "gpt2"])
def test_rows_end_at_their_first_eos_and_leave_the_batch_without_a_trace(kind):
    explainer = tuned(kind)
    rollout = sample(explainer, PROMPTS, samples=40, length=30, temperature=1.5)
    assert 0.1 < rollout.ended.float().mean() < 1 or kind == "gpt2"
    for ids, mask, ended in zip(rollout.response, rollout.mask, rollout.ended, strict=True):
        eos, length = (ids == explainer.eos_id).nonzero()[:, 0], int(mask.sum())
        assert mask[:length].all() and bool(ended) == (len(eos) > 0)
        if ended:
            assert length == int(eos[0]) + 1 and (ids[length:] == explainer.pad_id).all()
    assert_trained_alike(explainer, rollout, 1.5)


@pytest.mark.parametrize(
    "prompts",
    [CHATS, CHATS[:1], [CHATS[0]] * 3, [[1], [1, 2]], [SYSTEM, SYSTEM + [1]]],
    ids=["usual", "one", "equal", "shortest", "a beginning"],
)
def test_a_common_beginning_is_read_once_and_changes_nothing(prompts):
    explainer = tuned("top two")
    rollout = sample(explainer, prompts)
    assert_trained_alike(explainer, rollout)
    ids, mask = model.left_pad(prompts, explainer.pad_id, "cpu")
    assert torch.equal(rollout.prompt_mask, mask) and rollout.samples == 2
    expected = explainer.trunk(ids, mask)
    torch.testing.assert_close(rollout.prompt_states[mask], expected[mask], **close)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("adapters", ["on", "off"])
def test_responses_in_one_row_with_their_prompt_are_read_as_rows_of_their_own(samples, adapters):
    """Ragged prompts and answers: the naive twin gives every response a row of its own."""
    explainer = tuned("top two")
    rollout = sample(explainer, PROMPTS, samples, 12, temperature=1.5)
    assert samples == 1 or len(set(rollout.mask.sum(-1).tolist())) > 1
    with explainer.reference() if adapters == "off" else nullcontext():
        shared = sampling.response_hidden(explainer, rollout)
        for row, real in enumerate(rollout.mask):
            said = rollout.response[row][real].tolist()
            ids = torch.tensor([PROMPTS[row // samples] + said[:-1]])
            mask = torch.ones_like(ids)
            alone = explainer.top(explainer.trunk(ids, mask), mask)[0, -len(said) :]
            torch.testing.assert_close(shared[row][real], alone, **close)


def test_draws_are_from_the_softmax_and_never_of_probability_zero():
    logp = torch.log_softmax(torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0]), -1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(sampling.draw(logp.expand(20_000, -1), uniforms), minlength=5) / 20_000
    torch.testing.assert_close(counts, logp.exp(), atol=0.012, rtol=0)  # 3 standard errors
    holes = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])).expand(4, -1)
    edges = torch.tensor([0.0, 0.25, 0.5, 1 - 1e-12], dtype=torch.float64)
    assert set(sampling.draw(holes, edges).tolist()) <= {1, 3}


@pytest.mark.parametrize("kind", ["top two", "opt"])
def test_kl_and_reference_of_an_explanation_are_those_of_two_plain_forwards(kind):
    explainer, records = tuned(kind), [RECORD, RECORD | {"title": "a blue film"}]
    tune_randomly(explainer, 0.3)
    said = sampling.explain(explainer, records, 6, 0.7, seed=0)
    chats = [prompt_ids(explainer, messages(record)) for record in records]
    rollout = sample(explainer, chats, 1, 6)
    assert said.texts == rollout.texts and said.ended.tolist() == rollout.ended.tolist()
    for row, (chat, mask) in enumerate(zip(chats, rollout.mask, strict=True)):
        answer = rollout.response[row][mask].tolist()
        ids = torch.tensor([chat + answer])

        before = slice(-len(answer) - 1, -1)  # what each token of the answer was drawn from
        logits = explainer.lm(input_ids=ids).logits[0, before] / 0.7
        with explainer.reference():
            base = explainer.lm(input_ids=ids).logits[0, before] / 0.7
        policy, base = (torch.distributions.Categorical(logits=x) for x in (logits, base))
        exact = torch.distributions.kl_divergence(policy, base).sum().item()
        assert said.kl[row] == pytest.approx(exact, rel=1e-4) and exact > 0.01
        wanted = base.log_prob(ids[0, -len(answer) :]).detach()
        torch.testing.assert_close(torch.from_numpy(said.reference[row]), wanted, **close)
    with explainer.reference():
        assert (sampling.explain(explainer, records, 6, 0.7, seed=0).kl == 0).all()
