import numpy as np
import pytest
import torch

from recrl_lib.explainer import sampling
from recrl_lib.explainer.item_texts import ItemTexts, weights_sha256
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import response_hidden, sample, token_logprobs
from recrl_lib.params import resolve
from recrl_lib.shield import projection, subspaces
from recrl_lib.shield.replay import Replay
from recrl_lib.tests.tiny import WORDS, tiny_explainer, tune_randomly
from recrl_lib.training import diagnostics, ppo

PARAMS = resolve("smoke", lora_layers=1, max_new_tokens=8, temperature=1.0)
RECORDS = [
    dict(
        user=u,
        item=1,
        position=1,
        title="the red film",
        year=0,
        genres=["good"],
        history_titles=["blue", word],
        history_genres=[],
    )
    for u, word in enumerate(["short", "long", "green", "bad", "a", "and"])
]


class WordReward:
    """1 for each response that says ``word``: a real signal that a policy can learn."""

    def __init__(self, word: str, sign: float = 1.0):
        self.word, self.sign = word, sign

    def __call__(self, records, texts):
        assert len(records) == len(texts)
        total = np.array([self.sign * (self.word in t.split()) for t in texts], dtype=np.float32)
        return total, {"word": total}


def trainer(reward=WordReward("red"), shield=None, seed=0, explainer=None, **changes):
    explainer = explainer or tiny_explainer(lora_layers=1)
    return ppo.PPO(explainer, reward, RECORDS, PARAMS.replace(**changes), seed, shield)


def ragged_mask(generator, rows=6, width=9):
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return torch.arange(width)[None] < lengths[:, None]


# --- the pieces against naive twins -------------------------------------------------------------


def naive_gae(rewards, values, length, lam):
    out = [0.0] * len(rewards)
    for t in range(length):
        for later in range(t, length):
            after = values[later + 1] if later + 1 < length else 0.0
            out[t] += lam ** (later - t) * (rewards[later] + after - values[later])
    return out


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_a_double_loop(lam):
    generator = torch.Generator().manual_seed(0)
    mask = ragged_mask(generator)
    rewards, values = (
        torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    got = ppo.gae(rewards, values, mask, lam)
    for row in range(len(mask)):
        expected = naive_gae(rewards[row].tolist(), values[row].tolist(), int(mask[row].sum()), lam)
        torch.testing.assert_close(
            got[row], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
        )


def test_gae_by_hand():
    # two tokens, reward 1 at the end, V = (.5, .25), lambda .5: A1 = 1 - .25 = .75, A0 = .25 - .5 + .5 * .75 = .125
    got = ppo.gae(
        torch.tensor([[0.0, 1.0, 9.0]]),
        torch.tensor([[0.5, 0.25, 9.0]]),
        torch.tensor([[True, True, False]]),
        0.5,
    )
    assert got.tolist() == [[0.125, 0.75, 0.0]]


def test_score_lands_on_the_last_real_token_and_kl_on_every_one():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    logp, ref = torch.full((2, 3), -1.0), torch.full((2, 3), -3.0)
    got = ppo.token_rewards(torch.tensor([5.0, 7.0]), logp, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.2, -0.2, 4.8], [6.8, 0.0, 0.0]]))


def test_whitening_is_over_the_mask_alone():
    generator = torch.Generator().manual_seed(1)
    mask = ragged_mask(generator)
    x = torch.randn(mask.shape, generator=generator) * 7 + 3
    white = ppo.masked_whiten(x, mask)
    chosen = white[mask]
    assert (
        abs(chosen.mean()) < 1e-5
        and abs(chosen.var(unbiased=False) - 1) < 1e-4
        and (white[~mask] == 0).all()
    )
    poisoned = torch.where(mask, x, 1e6)
    torch.testing.assert_close(ppo.masked_whiten(poisoned, mask), white)


def test_policy_loss_by_hand():
    old = torch.zeros(1, 3)
    new = torch.log(torch.tensor([[1.5, 0.5, 2.0]]))
    advantages, mask = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[True, True, False]])
    loss, clipped, ratio = ppo.policy_loss(new, old, advantages, mask, 0.2)
    assert float(loss) == pytest.approx(
        -(1.2 + 0.5)
    )  # gain capped at 1.2; a fall below 0.8 is not forgiven
    assert int(clipped) == 1 and ratio[0, 0] == pytest.approx(1.5)
    loss, clipped, _ = ppo.policy_loss(new, old, -advantages, mask, 0.2)
    assert float(loss) == pytest.approx(1.5 + 0.8) and int(clipped) == 1


def test_value_loss_by_hand():
    mask = torch.tensor([[True, True, False]])
    old, new, returns = (
        torch.tensor([[0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 0.1, 5.0]]),
        torch.tensor([[1.0, 1.0, 0.0]]),
    )
    # token 0: plain 0, clipped (0.2 - 1)^2 = .64; token 1: within the clip, .81
    assert float(ppo.value_loss(new, old, returns, mask, 0.2)) == pytest.approx(0.5 * (0.64 + 0.81))


def test_k3_is_never_negative_zero_when_equal_and_estimates_kl():
    generator = torch.Generator().manual_seed(2)
    p, q = (torch.log_softmax(torch.randn(12, generator=generator), -1) for _ in range(2))
    draws = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    estimate = ppo.k3(p[draws], q[draws])
    exact = float((p.exp() * (p - q)).sum())
    assert (estimate >= 0).all() and (ppo.k3(p, p) == 0).all()
    assert float(estimate.mean()) == pytest.approx(exact, abs=0.02) and exact > 0.2


# --- the trainer --------------------------------------------------------------------------------


def test_first_minibatch_ratio_is_one_and_kl_at_the_start_is_zero():
    row = trainer().step()
    assert row["ratio_first_minibatch_max_dev"] < 1e-4
    assert row["kl"] < 1e-9 and row["reward"] >= 0


def test_ratio_stays_one_in_every_epoch_without_learning_rate():
    ppo_ = trainer(learning_rate=0.0, ppo_epochs=3)
    row = ppo_.step()
    assert row["clip_fraction"] == 0 and abs(row["approx_kl"]) < 1e-8


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (2, 4), (3, 2)])
def test_optimizer_steps_are_epochs_times_minibatches(epochs, minibatches):
    ppo_ = trainer(ppo_epochs=epochs, minibatches=minibatches)
    calls = []
    ppo_.optimizer.register_step_post_hook(lambda *a: calls.append(1))
    ppo_.step()
    assert len(calls) == ppo_.optimizer_steps == epochs * minibatches


def weights(ppo_):
    return torch.cat(
        [
            p.detach().flatten()
            for p in (*ppo_.explainer.adapter_parameters(), *ppo_.value_head.parameters())
        ]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_micro_batches_change_no_update(size):
    """Answers of unequal lengths, so that a mean of micro-batch means would differ."""
    whole, split = (
        trainer(
            micro_batch=n, ppo_epochs=1, minibatches=2, prompts_per_step=4, samples_per_prompt=4
        )
        for n in (16, size)
    )
    rows = [whole.step(), split.step()]
    assert rows[0]["eos_rate"] < 1 and rows[0]["length"] < 8  # lengths do differ
    torch.testing.assert_close(weights(split), weights(whole), atol=1e-6, rtol=0)
    for name in rows[0].keys() - set(diagnostics.TIMES):
        assert rows[1][name] == pytest.approx(rows[0][name], abs=1e-5), name


def test_trimmed_rows_are_scored_as_in_the_whole_rollout():
    explainer = tiny_explainer(lora_layers=1)
    tune_randomly(explainer)
    prompts = [prompt_ids(explainer, messages(r)) for r in RECORDS[:3]] + [
        prompt_ids(explainer, messages(RECORDS[0]))[-5:]
    ]
    rollout = sample(explainer, prompts, 2, 8, 1.0, torch.Generator().manual_seed(0))
    whole = token_logprobs(explainer, rollout, 1.0)
    for rows in torch.arange(8).split(2):
        part = ppo.part_of(rollout, rows)
        got = token_logprobs(explainer, part, 1.0)
        torch.testing.assert_close(got, whole[rows, : part.mask.shape[1]], atol=1e-6, rtol=0)
    assert part.prompt_mask.shape[1] == 5 < rollout.prompt_mask.shape[1]


def test_entropy_is_that_of_the_policy():
    ppo_ = trainer(learning_rate=0.0, value_lr=0.0, ppo_epochs=1)
    caught = []
    real = ppo_._update
    ppo_._update = lambda rollout, *rest: caught.append(rollout) or real(rollout, *rest)
    row = ppo_.step()
    with torch.no_grad():
        logp = ppo_.explainer.log_softmax(response_hidden(ppo_.explainer, caught[0]), 1.0)
    # Minibatches are averaged with equal weight, so compare up to how their lengths differ.
    expected = torch.distributions.Categorical(logits=logp).entropy()[caught[0].mask].mean()
    assert row["entropy"] == pytest.approx(float(expected), rel=0.05)
    assert row["surprisal"] == pytest.approx(row["entropy"], rel=0.25)


def test_linear_schedule_ends_where_it_should():
    ppo_ = trainer(lr_schedule="linear", ppo_steps=2, ppo_epochs=2, minibatches=2)
    rates = []
    ppo_.optimizer.register_step_pre_hook(
        lambda optimizer, *a: rates.append([g["lr"] for g in optimizer.param_groups])
    )
    rows = ppo_.train(2)
    np.testing.assert_allclose(
        rates, [[f * PARAMS.learning_rate, f * PARAMS.value_lr] for f in np.arange(8, 0, -1) / 8]
    )
    assert rows[-1]["learning_rate"] == pytest.approx(PARAMS.learning_rate / 8)
    assert trainer().train(1)[0]["learning_rate"] == PARAMS.learning_rate


def test_adaptive_kl_by_hand_and_towards_its_target():
    assert ppo.adapted(0.1, kl=3.0, target=2.0) == pytest.approx(
        0.1 * 1.02
    )  # error .5 is cut to .2
    assert ppo.adapted(0.1, kl=1.9, target=2.0) == pytest.approx(0.1 * 0.995)
    assert ppo.adapted(0.1, kl=0.0, target=2.0) == pytest.approx(0.1 * 0.98)
    steered = [row["kl_coef"] for row in trainer(kl_target=1e-9, learning_rate=3e-2).train(3)]
    assert (
        steered[0] == PARAMS.kl_coef > steered[1] and steered[2] > steered[1]
    )  # KL is 0 at the first step, then above the target
    assert {row["kl_coef"] for row in trainer(learning_rate=3e-2).train(3)} == {PARAMS.kl_coef}


def test_early_stop_skips_the_remaining_epochs():
    stopped = trainer(stop_kl=1e-7, learning_rate=3e-2, ppo_epochs=4)
    row = stopped.step()
    assert row["epochs_skipped"] == 3 and stopped.optimizer_steps == PARAMS.minibatches
    free = trainer(stop_kl=10.0, learning_rate=3e-2, ppo_epochs=4)
    assert free.step()["epochs_skipped"] == 0 and free.optimizer_steps == 4 * PARAMS.minibatches


class Level:
    """Scores that differ by little around a high level."""

    def __call__(self, records, texts):
        return np.array([0.9 + 0.05 * ("red" in t.split()) for t in texts], dtype=np.float32), {}


def test_values_start_at_the_mean_score():
    row = trainer(Level(), missing_eos_penalty=0.0).step()
    assert abs(row["explained_variance"]) < 0.05  # from 0 it would be below -100


def test_bfloat16_recomputes_old_logprobs_and_keeps_master_weights():
    ppo_ = trainer(dtype="bfloat16", learning_rate=3e-2)
    row = ppo_.step()
    assert row["ratio_first_minibatch_max_dev"] < 0.1
    assert {p.dtype for p in ppo_.explainer.adapter_parameters()} == {torch.float32}
    free = trainer(learning_rate=3e-2).step()
    assert row["reward"] == pytest.approx(free["reward"], abs=0.5) and np.isfinite(
        row["gradient_norm"]
    )


def test_adapters_change_and_base_weights_do_not():
    ppo_ = trainer()
    before = weights_sha256(ppo_.explainer)
    adapters = [p.clone() for p in ppo_.explainer.adapter_parameters()]
    ppo_.step()
    assert weights_sha256(ppo_.explainer) == before
    assert any(not torch.equal(a, p) for a, p in zip(adapters, ppo_.explainer.adapter_parameters()))


def test_value_loss_does_not_reach_the_adapters():
    ppo_ = trainer()
    ids = torch.tensor([[1, 5, 2, 1]])
    hidden = ppo_.explainer.top(
        ppo_.explainer.trunk(ids, torch.ones_like(ids)), torch.ones_like(ids)
    )
    ppo_.value_head(hidden).sum().backward()
    assert all(p.grad is None for p in ppo_.explainer.adapter_parameters())
    assert ppo_.value_head.weight.grad.abs().sum() > 0


def test_cut_off_answers_pay_and_finished_ones_do_not(monkeypatch):
    scores, rollouts = [], []
    real_rewards, real_sample = ppo.token_rewards, sampling.sample
    monkeypatch.setattr(
        ppo,
        "token_rewards",
        lambda score, *a: scores.append(score.clone()) or real_rewards(score, *a),
    )
    monkeypatch.setattr(
        sampling, "sample", lambda *a: rollouts.append(real_sample(*a)) or rollouts[-1]
    )
    for penalty in (0.0, 0.5):
        trainer(missing_eos_penalty=penalty).step()
    ended = rollouts[0].ended
    assert ended.any() and not ended.all()
    torch.testing.assert_close(scores[0] - scores[1], 0.5 * (~ended).float())


def test_gradient_is_clipped_before_the_step():
    ppo_ = trainer(max_grad_norm=1e-3)
    norms = []
    ppo_.optimizer.register_step_pre_hook(
        lambda *a: norms.append(
            torch.cat([p.grad.flatten() for p in ppo_.explainer.adapter_parameters()]).norm()
        )
    )
    row = ppo_.step()
    assert row["gradient_norm"] > 1e-3 and max(norms) <= 1.001e-3


def test_same_seed_same_numbers_other_seed_other_numbers():
    def curve(seed):
        return [
            {k: v for k, v in r.items() if k not in diagnostics.TIMES}
            for r in trainer(seed=seed).train(2)
        ]

    assert curve(0) == curve(0) != curve(1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_learns_a_word_and_unlearns_it_with_the_sign_flipped(sign):
    large = dict(prompts_per_step=6, samples_per_prompt=8, micro_batch=24)
    ppo_ = trainer(
        WordReward("red", sign), learning_rate=3e-2, kl_coef=0.0, missing_eos_penalty=0.0, **large
    )
    rows = ppo_.train(15)
    said = [abs(r["reward"]) for r in rows]
    start, end = np.mean(said[:2]), np.mean(said[-3:])
    assert 0.1 < start < 0.7
    assert (end > start + 0.25) if sign > 0 else (end < start - 0.1)


def test_kl_penalty_holds_the_policy_near_the_reference():
    def final_kl(coef):
        return trainer(
            learning_rate=3e-2,
            kl_coef=coef,
            prompts_per_step=6,
            samples_per_prompt=8,
            micro_batch=24,
        ).train(6)[-1]["kl"]

    assert final_kl(1.0) < 0.5 * final_kl(0.0)


def test_shielded_ppo_keeps_the_invariant_at_every_step():
    explainer = tiny_explainer(lora_layers=1)
    items = ItemTexts(explainer, ["good film", "the red film and a blue film", "bad"])
    protected = subspaces.subspaces(subspaces.item_grams(explainer, items)[0], 0.95)
    ppo_ = trainer(
        shield=projection.Shield(explainer, protected), explainer=explainer, learning_rate=3e-2
    )
    leaks = []
    ppo_.optimizer.register_step_post_hook(
        lambda *a: leaks.append(projection.leak(explainer, protected))
    )
    rows = ppo_.train(2)
    assert len(leaks) == 8 and max(leaks) <= 1e-6 and rows[0]["shield_seconds"] > 0
    free = trainer(learning_rate=3e-2)
    free.train(2)
    assert projection.leak(free.explainer, protected) > 0.1


def test_the_replays_norm_is_logged_beside_the_gradients():
    """It joins after the clipping: a heavy replay must not hide behind a clipped norm of 1."""
    norms = {}
    for weight in (10.0, 1000.0):
        explainer = tiny_explainer(lora_layers=1)
        items = ItemTexts(explainer, ["good film", "bad", "red film"])
        text = items.vectors()
        replay = Replay(explainer, items, text, torch.eye(text.shape[1]), weight)
        guard = projection.Shield(
            explainer,
            subspaces.subspaces(subspaces.item_grams(explainer, items)[0], 0.5),
            replay=replay,
        )
        norms[weight] = trainer(
            shield=guard, explainer=explainer, learning_rate=3e-2, minibatches=1
        ).train(1)[0]["replay_norm"]
    assert norms[1000.0] > 5 * norms[10.0] > 0
    assert trainer().train(1)[0]["replay_norm"] == 0


def test_the_shield_stays_on_from_one_call_of_train_to_the_next():
    explainer = tiny_explainer(lora_layers=1)
    protected = subspaces.subspaces(
        subspaces.item_grams(explainer, ItemTexts(explainer, ["good film", "a red film"]))[0], 0.95
    )
    ppo_ = trainer(
        shield=projection.Shield(explainer, protected), explainer=explainer, learning_rate=3e-2
    )
    for steps in (1, 2):
        ppo_.train(steps)
        assert ppo_.steps_done == steps and projection.leak(explainer, protected) <= 1e-6


def test_a_frozen_a_stays_frozen_though_the_reference_policy_is_asked():
    explainer = tiny_explainer(lora_layers=1)
    protected = subspaces.subspaces(
        subspaces.item_grams(explainer, ItemTexts(explainer, ["good film", "a red film"]))[0], 0.95
    )
    ppo_ = trainer(
        shield=projection.Shield(explainer, protected, "frozen_a"),
        explainer=explainer,
        learning_rate=3e-2,
    )
    before = [t.a.clone() for t in projection._targets(explainer, protected)]
    ppo_.step()
    assert all(
        torch.equal(t.a, a) for t, a in zip(projection._targets(explainer, protected), before)
    )
    assert projection.leak(explainer, protected) <= 1e-6


def test_reference_logprobs_equal_the_untuned_policy():
    ppo_ = trainer(learning_rate=3e-2)
    ppo_.train(2)
    explainer, base = ppo_.explainer, tiny_explainer(lora_layers=1)
    prompts = [prompt_ids(explainer, messages(r)) for r in RECORDS[:2]]
    rollout = sample(explainer, prompts, 2, 8, 1.0, torch.Generator().manual_seed(0))
    with explainer.reference():
        reference = token_logprobs(explainer, rollout, 1.0)
    torch.testing.assert_close(reference, token_logprobs(base, rollout, 1.0), atol=1e-6, rtol=0)
    assert response_hidden(explainer, rollout).shape[:2] == rollout.response.shape


def test_clear_errors():
    same = tiny_explainer(lora_layers=1)
    same.pad_id = same.eos_id
    with pytest.raises(ValueError, match="padding token is the end token"):
        trainer(explainer=same)
    noisy = tiny_explainer(lora_layers=1)
    noisy.lm.model.extra = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match="dropout"):
        trainer(explainer=noisy)
    with pytest.raises(ValueError, match="nothing to train"):
        ppo.PPO(tiny_explainer(), WordReward("red"), RECORDS, PARAMS, 0)
    with pytest.raises(ValueError, match="only 2 prompts"):
        ppo.PPO(tiny_explainer(lora_layers=1), WordReward("red"), RECORDS[:2], PARAMS, 0)


def test_the_tiny_vocabulary_has_the_word():
    assert "red" in WORDS
