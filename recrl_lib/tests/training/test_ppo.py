import numpy as np
import pytest
import torch

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.shield import projection
from recrl_lib.shield.replay import Replay
from recrl_lib.tests.tiny import tiny_explainer
from recrl_lib.tests.training.small import PARAMS, RECORDS, TIMES, leak, protect, red, trainer
from recrl_lib.training import ppo

LARGE = {"prompts_per_step": 6, "samples_per_prompt": 8, "micro_batch": 24, "learning_rate": 3e-2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged(seed: int, rows: int = 6, width: int = 9):
    """A mask of texts of random lengths, and a function that draws numbers of its shape."""
    source = generator(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=source)
    mask = torch.arange(width)[None] < lengths[:, None]
    return mask, lambda: torch.randn(mask.shape, generator=source, dtype=torch.float64)


def naive_gae(rewards, values, length, lam):
    out = [0.0] * len(rewards)
    for t in range(length):
        for later in range(t, length):
            after = values[later + 1] if later + 1 < length else 0.0
            out[t] += lam ** (later - t) * (rewards[later] + after - values[later])
    return out


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_a_double_loop(lam):
    mask, draw = ragged(0)
    rewards, values = draw(), draw()
    got = ppo.gae(rewards, values, mask, lam)
    for row, length in enumerate(mask.sum(-1).tolist()):
        expected = naive_gae(rewards[row].tolist(), values[row].tolist(), length, lam)
        assert got[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_score_lands_on_the_last_real_token_and_kl_on_every_one():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    logp, reference = torch.full((2, 3), -1.0), torch.full((2, 3), -3.0)
    got = ppo.token_rewards(torch.tensor([5.0, 7.0]), logp, reference, mask, kl_coef=0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.2, -0.2, 4.8], [6.8, 0.0, 0.0]]))


@pytest.mark.parametrize("sign, expected", [(1.0, -(1.2 + 0.5)), (-1.0, 1.5 + 0.8)])
def test_policy_loss_by_hand(sign, expected):
    """A gain is capped at ratio 1.2, and a loss counts in full; a fall below .8 is not forgiven."""
    new, old = torch.log(torch.tensor([1.5, 0.5])), torch.zeros(2)
    loss, clipped, ratio = ppo.policy_loss(new, old, torch.full((2,), sign), 0.2)
    assert float(loss) == pytest.approx(expected)
    assert int(clipped) == 1 and ratio[0] == pytest.approx(1.5)


def test_value_loss_and_leave_one_out_baseline_by_hand():
    new, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.ones(2)
    # Token 0: plain 0, clipped (.2 - 1)^2 = .64; token 1: within the clip, .81.
    assert float(ppo.value_loss(new, old, returns, 0.2)) == pytest.approx(0.5 * (0.64 + 0.81))
    # Returns of the texts of two prompts: 1, 3, 5 and 2, 2, -1.
    rewards = torch.tensor([[1.0, 0], [1, 2], [5, 0], [2, 0], [0, 2], [-1, 0]])
    got = ppo.leave_one_out(rewards, 3)
    assert got[:, 0].tolist() == [4.0, 3.0, 2.0, 0.5, 0.5, 2.0]


@pytest.mark.parametrize("baseline", ["value", "leave_one_out"])
def test_texts_that_earn_the_same_teach_nothing(baseline):
    """The value head starts at their reward, so that returns and values agree exactly."""

    def constant(records, texts):
        return np.ones(len(texts), np.float32), {}

    settings = {"kl_coef": 0.0, "missing_eos_penalty": 0.0, "baseline": baseline}
    for reward, same in ((constant, True), (red, False)):
        trained = trainer(reward, **settings)
        before = trained.explainer.adapter_state()
        row, after = trained.step(), trained.explainer.adapter_state()
        assert all(torch.equal(before[k], after[k]) for k in before) == same
        assert (row["value_loss"] == 0) == (same or baseline == "leave_one_out")


def test_the_scale_of_the_reward_changes_no_gradient():
    settings = {"kl_coef": 0.0, "missing_eos_penalty": 0.0}
    whole = trainer(red, **settings).step()
    tenth = trainer(lambda *said: (0.1 * red(*said)[0], {}), **settings).step()
    assert tenth["reward"] == pytest.approx(0.1 * whole["reward"]) and whole["reward"] > 0
    assert tenth["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-3)


def test_k3_is_never_negative_zero_when_equal_and_estimates_kl():
    source = generator(2)
    p, q = (torch.log_softmax(torch.randn(12, generator=source), -1) for _ in range(2))
    draws = torch.multinomial(p.exp(), 200_000, replacement=True, generator=source)
    estimate, exact = ppo.k3(p[draws], q[draws]), float((p.exp() * (p - q)).sum())
    assert (estimate >= 0).all() and (ppo.k3(p, p) == 0).all()
    assert float(estimate.mean()) == pytest.approx(exact, abs=0.02) and exact > 0.2


def weights(trained: ppo.PPO) -> torch.Tensor:
    """Adapters and, last, the 32 + 1 numbers of the value head."""
    parts = *trained.explainer.adapter_parameters(), *trained.value_head.parameters()
    return torch.cat([p.detach().flatten() for p in parts])


def hook(trained: ppo.PPO, look, before: bool = False) -> list:
    """What ``look()`` gives at each optimizer step."""
    seen = []
    register = trained.optimizer.register_step_post_hook
    if before:
        register = trained.optimizer.register_step_pre_hook
    register(lambda *_: seen.append(look()))
    return seen


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_micro_batches_change_no_update(size):
    """Texts of unequal lengths, so that a mean of micro-batch means would differ."""
    changes = {"ppo_epochs": 1, "prompts_per_step": 4, "samples_per_prompt": 4}
    whole, split = (trainer(micro_batch=n, **changes) for n in (16, size))
    expected, row = whole.step(), split.step()
    assert expected["eos_rate"] < 1 and expected["length"] < 8  # lengths do differ
    assert row["ratio_first_minibatch_max_dev"] < 1e-4 and row["kl"] < 1e-9  # at the first step
    torch.testing.assert_close(weights(split), weights(whole), atol=1e-6, rtol=0)
    for name in row.keys() - TIMES:
        assert row[name] == pytest.approx(expected[name], abs=1e-5), name


def test_linear_schedule_ends_where_it_should():
    trained = trainer(lr_schedule="linear", ppo_steps=2, ppo_epochs=2, minibatches=2)
    rates = hook(trained, lambda: [g["lr"] for g in trained.optimizer.param_groups], before=True)
    rows = trained.train(2)
    falling = np.arange(8, 0, -1)[:, None] / 8
    np.testing.assert_allclose(rates, falling * [PARAMS.learning_rate, PARAMS.value_lr])
    assert rows[-1]["learning_rate"] == pytest.approx(PARAMS.learning_rate / 8)
    assert trainer().train(1)[0]["learning_rate"] == PARAMS.learning_rate


@pytest.mark.parametrize(
    "target, factors", [(1e-9, (0.98, 1.02)), (1e9, (0.98, 0.98)), (0, (1, 1))]
)
def test_adaptive_kl_moves_towards_its_target(target, factors):
    """KL is 0 at the first step, then above the small target."""
    rows = trainer(kl_target=target, learning_rate=3e-2).train(3)
    coefs = [row["kl_coef"] for row in rows]
    assert [b / a for a, b in zip(coefs, coefs[1:], strict=False)] == pytest.approx(factors)


@pytest.mark.parametrize("stop, skipped", [(1e-7, 3), (10.0, 0)])
def test_early_stop_skips_the_remaining_passes(stop, skipped):
    trained = trainer(stop_kl=stop, learning_rate=3e-2, ppo_epochs=4)
    steps = hook(trained, lambda: 1)
    assert trained.step()["epochs_skipped"] == skipped
    assert len(steps) == (4 - skipped) * PARAMS.minibatches


def test_bfloat16_recomputes_old_logprobs_and_keeps_float32_weights():
    trained = trainer(dtype="bfloat16", learning_rate=3e-2, minibatches=1, micro_batch=16)
    row = trained.step()
    assert row["ratio_first_minibatch_max_dev"] < 1e-6 and np.isfinite(row["gradient_norm"])
    assert {p.dtype for p in trained.explainer.adapter_parameters()} == {torch.float32}


def test_value_loss_does_not_reach_the_adapters():
    head, hidden = ppo.ValueHead(32, 1), torch.ones(2, 32, requires_grad=True)
    head(hidden).sum().backward()
    assert hidden.grad is None and head.weight.grad.abs().sum() > 0


def test_cut_off_texts_pay_and_finished_ones_do_not():
    free, paying = (trainer(missing_eos_penalty=p).step() for p in (0.0, 0.5))
    assert 0 < free["eos_rate"] < 1 and free["score"] == pytest.approx(free["reward"])
    assert free["score"] - paying["score"] == pytest.approx(0.5 * (1 - free["eos_rate"]), abs=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_learns_a_word_and_unlearns_it_with_the_sign_flipped(sign):
    rows = trainer(
        lambda *said: (sign * red(*said)[0], {}), kl_coef=0.0, missing_eos_penalty=0.0, **LARGE
    ).train(15)
    said = [abs(row["reward"]) for row in rows]
    start, end = np.mean(said[:2]), np.mean(said[-3:])
    assert 0.1 < start < 0.7
    assert end > start + 0.25 if sign > 0 else end < start - 0.1


def test_shielded_ppo_keeps_the_invariant_at_every_step_and_call():
    trained = trainer(mode="update", learning_rate=3e-2)
    leaks = hook(trained, lambda: leak(trained))
    for steps in (1, 2):  # the shield stays on from one call of train to the next
        rows = trained.train(steps)
    assert len(leaks) == 8 and max(leaks) <= 1e-6 and rows[0]["shield_seconds"] > 0
    free = trainer(learning_rate=3e-2)
    free.train(2)
    assert leak(free) > 0.1


def test_gradients_are_clipped_before_the_replay_joins_whose_norm_is_logged_beside_theirs():
    explainer = tiny_explainer(lora_layers=1)
    items = ItemTexts(explainer, ["good film", "bad", "red film"])
    replay = Replay(explainer, items, items.vectors(), torch.eye(32), 1000.0)
    shield = projection.Shield(explainer, protect(explainer, 0.5), "penalty", replay)
    params = PARAMS.replace(learning_rate=3e-2, minibatches=1, max_grad_norm=1e-3)
    trained = ppo.PPO(explainer, red, RECORDS, params, 0, shield)
    adapters = explainer.adapter_parameters()
    norms = hook(trained, lambda: torch.cat([p.grad.flatten() for p in adapters]).norm(), True)
    row = trained.step()
    assert row["replay_norm"] > 1e-3 < row["gradient_norm"]
    # at the first step B is 0 and so are the replay's gradients; then they are what steps
    assert norms[0] <= 1.001e-3 and norms[1] == pytest.approx(replay.norm, rel=0.2)


def test_a_frozen_a_stays_frozen_though_the_reference_policy_is_asked():
    trained = trainer(mode="frozen_a", learning_rate=3e-2)
    before = trained.explainer.adapter_state()
    trained.step()
    after = trained.explainer.adapter_state()
    assert {k for k in after if torch.equal(after[k], before[k])} == {k for k in after if "_A" in k}
    assert leak(trained) <= 1e-6


def test_clear_errors():
    with pytest.raises(ValueError, match="nothing to train"):
        ppo.PPO(tiny_explainer(), red, RECORDS, PARAMS, 0)
    with pytest.raises(ValueError, match="only 2 prompts"):
        ppo.draw_prompts([], 4, 2, generator())
