import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from recrl_lib.explainer.item_texts import weights_sha256
from recrl_lib.explainer.model import left_pad
from recrl_lib.scoring.claims import Catalogue
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import projection
from recrl_lib.tests.tiny import tiny_explainer
from recrl_lib.tests.training import small
from recrl_lib.tests.training.small import RECORDS, protect
from recrl_lib.training import ppo, trl

PARAMS = small.PARAMS.replace(samples_per_prompt=2, learning_rate=1e-2, algorithm="rloo")
CATALOGUE = Catalogue(["the red film", "blue"], ["good"])


def adapters(explainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in explainer.adapter_parameters()])


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_shielded_arm_trains_and_leaves_the_explainer_as_it_should_be(algorithm):
    explainer, reward, heard = tiny_explainer(lora_layers=2), Reward("paper", CATALOGUE), []
    protected = protect(explainer)
    frozen, before = weights_sha256(explainer), adapters(explainer)
    names, state = set(explainer.adapter_state()), torch.random.get_rng_state()
    shield, params = projection.Shield(explainer, protected), PARAMS.replace(algorithm=algorithm)
    log = lambda row, step: heard.append((step, row))  # noqa: E731
    rows = trl.train(explainer, reward, RECORDS, params, 0, shield, log)

    assert heard == [(1, rows[0]), (2, rows[1])] and [r["episodes"] for r in rows] == [8, 16]
    assert not torch.equal(adapters(explainer), before) and weights_sha256(explainer) == frozen
    assert projection.leak(explainer, protected) <= 1e-6 and shield.seconds > 0
    assert shield.seconds == pytest.approx(sum(r["shield_seconds"] for r in rows))
    # Before the first step the policy is the reference.
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[1]["kl"] != 0
    for row in rows:
        total = sum(w * row[f"reward_{p}"] for w, p in zip(reward.weights, reward.names))
        assert row["reward"] == pytest.approx(total, abs=1e-6)
        penalty = params.missing_eos_penalty * (1 - row["eos_rate"])
        assert row["score"] == pytest.approx(row["reward"] - penalty, abs=1e-6)
        assert 0 <= row["eos_rate"] <= 1

    assert not explainer.lm.training and set(explainer.adapter_state()) == names
    assert list(explainer.peft.peft_config) == ["default"]
    ids, mask = left_pad([[1, 5, 6, 2, 1]], explainer.pad_id, "cpu")
    logits = explainer.lm(input_ids=ids, attention_mask=mask.long()).logits  # TRL's forward is gone
    ours = explainer.lm.lm_head(explainer.top(explainer.trunk(ids, mask), mask))
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


asked: list[list[int]] = []


class Spy(Reward):
    """The reward, keeping in ``asked`` whom it was asked about."""

    def __call__(self, records, texts):
        asked.append([r["user"] for r in records])
        return super().__call__(records, texts)


def test_the_same_prompts_and_the_same_number_of_steps_as_ppo():
    params, users, steps, ends = PARAMS.replace(ppo_steps=3), [], [], []
    for train in (lambda *given: ppo.PPO(*given).train(3), trl.train):
        asked.clear()
        hook = register_optimizer_step_post_hook(lambda *_: steps.append("taken"))
        train(tiny_explainer(lora_layers=1), Spy("paper", CATALOGUE), RECORDS, params, 5)
        hook.remove()
        users.append(list(asked))
        ends.append(len(steps))
    assert users[0] == users[1][::3]  # TRL asks for each part by itself
    assert ends == [n * 3 * params.ppo_epochs * params.minibatches for n in (1, 2)]
