from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from recrl_lib.explainer.item_texts import ItemTexts, weights_sha256
from recrl_lib.explainer.model import left_pad
from recrl_lib.params import Params
from recrl_lib.scoring.claims import Catalogue
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.tiny import tiny_explainer
from recrl_lib.training import ppo, trl

RECORDS = [
    dict(
        user=u,
        item=1,
        position=1,
        title="the red film",
        year=0,
        genres=["good"],
        history_titles=["blue", word],
        history_genres=[["good"], ["bad"]],
    )
    for u, word in enumerate(["short", "long", "green", "bad", "a", "and"])
]
REWARD = Reward("paper", Catalogue(["the red film", "blue"], ["good"]))


def params(**changes) -> SimpleNamespace:
    settings = dict(
        ppo_steps=2,
        prompts_per_step=4,
        samples_per_prompt=2,
        max_new_tokens=8,
        temperature=1.0,
        learning_rate=1e-2,
    )
    return SimpleNamespace(**{**Params().as_dict(), **settings, "algorithm": "rloo", **changes})


class Spy(Reward):
    """The reward, keeping whom it was asked about."""

    def __init__(self):
        super().__init__("paper", REWARD.catalogue)
        self.users, self.texts = [], []

    def __call__(self, records, texts):
        self.users.append([r["user"] for r in records])
        return super().__call__(records, texts)

    def as_trl(self):
        def spied(prompts, completions, completion_ids, user, **columns):
            self.users.append(user)
            self.texts += completion_ids
            return functions[0](prompts, completions, completion_ids, user=user, **columns)

        functions = super().as_trl()
        spied.__name__ = functions[0].__name__
        return [spied, *functions[1:]]


def adapters(explainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in explainer.adapter_parameters()])


@pytest.mark.parametrize("algorithm", trl.ALGORITHMS)
def test_a_shielded_arm_trains_and_leaves_the_explainer_as_it_should_be(algorithm):
    explainer = tiny_explainer(lora_layers=2)
    protected = subspaces.subspaces(
        subspaces.item_grams(
            explainer, ItemTexts(explainer, ["good film", "the red film and a blue film", "bad"])
        )[0],
        0.9,
    )
    frozen, before, reward = weights_sha256(explainer), adapters(explainer), Spy()
    names, state = set(explainer.adapter_state()), torch.random.get_rng_state()
    shield = projection.Shield(explainer, protected)
    rows = trl.train(explainer, reward, RECORDS, params(algorithm=algorithm), 0, shield)

    assert [r["step"] for r in rows] == [1, 2] and [r["episodes"] for r in rows] == [8, 16]
    assert not torch.equal(adapters(explainer), before) and weights_sha256(explainer) == frozen
    assert projection.leak(explainer, protected) <= 1e-6 and shield.seconds > 0
    assert shield.seconds == pytest.approx(sum(r["shield_seconds"] for r in rows))
    assert (
        rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[1]["kl"] != 0
    )  # before the first step the policy is the reference
    for row in rows:
        total = sum(
            w * row[f"reward_{p}"]
            for w, p in zip(reward.weights, ("length", "relevance", "coherence"))
        )
        assert row["reward"] == pytest.approx(total, abs=1e-6) and 0 <= row["eos_rate"] <= 1
        assert row["score"] == pytest.approx(
            row["reward"] - Params().missing_eos_penalty * (1 - row["eos_rate"]), abs=1e-6
        )
    ended = [ids[-1] == explainer.eos_id for ids in reward.texts]
    assert np.mean(ended) == pytest.approx(np.mean([r["eos_rate"] for r in rows]))

    assert (
        not explainer.lm.training
        and list(explainer.peft.peft_config) == ["default"]
        and set(explainer.adapter_state()) == names
    )
    assert all(
        p.requires_grad == ("lora_" in n)
        for n, p in explainer.lm.named_parameters()
        if explainer.cut == 1 and "layers.0" not in n
    )
    ids, mask = left_pad([[1, 5, 6, 2, 1]], explainer.pad_id, "cpu")
    logits = explainer.lm(input_ids=ids, attention_mask=mask.long()).logits  # TRL's forward is gone
    torch.testing.assert_close(
        logits,
        explainer.lm.lm_head(explainer.top(explainer.trunk(ids, mask), mask)),
        atol=1e-5,
        rtol=0,
    )
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_same_prompts_and_the_same_number_of_steps_as_ppo():
    settings, asked, steps = params(ppo_steps=3), [], []
    for train in (
        lambda e, r: ppo.PPO(e, r, RECORDS, settings, 5).train(3),
        lambda e, r: trl.train(e, r, RECORDS, settings, 5),
    ):
        reward, count = Spy(), []
        hook = register_optimizer_step_post_hook(lambda *_: count.append(1))
        try:
            train(tiny_explainer(lora_layers=1), reward)
        finally:
            hook.remove()
        asked.append(reward.users)
        steps.append(len(count))
    assert asked[0] == asked[1]
    assert steps[0] == steps[1] == 3 * settings.ppo_epochs * settings.minibatches


def test_equal_seeds_equal_adapters():
    def trained(seed):
        explainer = tiny_explainer(lora_layers=1)
        trl.train(explainer, REWARD, RECORDS, params(ppo_steps=1), seed)
        return adapters(explainer)

    assert torch.equal(trained(0), trained(0)) and not torch.equal(trained(0), trained(1))


def test_clear_errors():
    explainer = tiny_explainer(lora_layers=1)
    wrong = (
        (dict(algorithm="ppo"), "rloo, grpo"),
        (dict(samples_per_prompt=1), "at least 2"),
        (dict(prompts_per_step=7), "only 6"),
    )
    for changes, said in wrong:
        with pytest.raises(ValueError, match=said):
            trl.train(explainer, REWARD, RECORDS, params(**changes), 0)
    with pytest.raises(ValueError, match="nothing to train"):
        trl.train(tiny_explainer(), REWARD, RECORDS, params(), 0)
