"""The replay penalty beside the projection and after it."""

from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from recrl_lib.params import resolve
from recrl_lib.shield import Replay, leak, protect
from recrl_lib.shield.projection import REPLAY_LR
from recrl_lib.shield.replay import replay_for
from recrl_lib.tests.evaluation.toy import toy_study
from recrl_lib.tests.shield.toy import make, moved, replay_of, train_shielded
from recrl_lib.tests.tiny import tune_randomly


def stored_bytes(replay: Replay) -> int:
    return sum(t.numel() * t.element_size() for part in replay.parts for t in part)


def test_the_penalty_is_the_formula():
    explainer, items, _ = make()
    replay = replay_of(explainer, items, 2.0)
    assert float(replay.loss().detach()) < 1e-10  # the untuned model has lost nothing but rounding
    tune_randomly(explainer)
    base, new = items.base_vectors(), items.vectors()
    readout = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    scale = ((base[1:] - base[1:].mean(0)) @ readout.T).square().sum(-1).mean()
    lost = ((new - base) @ readout.T).square().sum(-1) / scale
    by_length = {round(2 * float(lost[numbers].mean()), 5) for numbers, _ in items.batches}
    assert {round(float(replay.loss().detach()), 5) for _ in range(40)} == by_length


def test_the_penalty_reads_only_the_items_it_is_given():
    explainer, items, _ = make()
    tune_randomly(explainer)
    replay = replay_of(explainer, items, 1.0, only={1, 3})  # "good film" and "bad"
    assert len({round(float(replay.loss().detach()), 6) for _ in range(40)}) == 2
    states_and_vectors = 4 * 32 * ((2 + 1) + (1 + 1))  # float32, width 32, tokens and a vector
    assert stored_bytes(replay) == states_and_vectors
    with pytest.raises(ValueError, match="positive weight"):
        replay_of(explainer, items, 0.0)


@pytest.mark.parametrize("mode", ["update", "penalty"])
def test_replay_keeps_items_near_while_training_and_nearer_after_it(mode):
    def trained(used: str, weight: float):
        explainer, items, grams = make()
        protected = protect(grams, energy=0.9)
        replay = replay_of(explainer, items, weight)
        shield = train_shielded(explainer, protected, 20, used, replay)

        def distances():
            return moved(items, items.base_vectors()), leak(explainer, protected)

        return explainer, shield, distances

    free = trained("penalty", 1e-9)[2]()  # as good as no penalty
    explainer, shield, measured = trained(mode, 10.0)
    during = measured()
    with pytest.raises(RuntimeError, match="attached already"):
        shield.run_replay(1)
    shield.detach()
    rates = []
    hook = register_optimizer_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    shield.run_replay(30)
    hook.remove()
    assert rates == pytest.approx([REPLAY_LR * n / 30 for n in range(30, 0, -1)])
    after = measured()
    assert all(p.grad is None for p in explainer.adapter_parameters())
    assert after[0] < 0.9 * during[0] < 0.7 * free[0]
    assert mode == "penalty" or (during[1] <= 1e-6 and after[1] <= 1e-6)


def test_the_runs_replay_is_the_one_its_parameters_ask_for():
    study, explainer = toy_study()
    params, held = resolve("smoke", shield_penalty=10.0), {2, 5, 9}
    replay = replay_for(explainer, study, params, held)
    per_item = [len(text.split()) + 1 for text in study.items["text"]]  # trunk states and a vector
    kept = sum(n for item, n in enumerate(per_item, 1) if item not in held)
    assert replay.weight == 10.0 and stored_bytes(replay) == 4 * 32 * kept
    assert replay_for(explainer, study, resolve("smoke"), held) is None
    with pytest.raises(ValueError, match="text='none'"):
        replay_for(explainer, replace(study, text=None), params, held)
