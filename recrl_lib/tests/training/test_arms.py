"""Whole arms on a tiny model saved to disk, from the base to the stored adapter."""

import os
import shutil
import types

import pandas as pd
import pytest
import torch

from recrl_lib import paths, runs, study
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import load_for
from recrl_lib.explainer.sampling import explain
from recrl_lib.params import resolve, stage_named
from recrl_lib.scoring.claims import Catalogue
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import replay, subspaces
from recrl_lib.tests.conftest import required
from recrl_lib.tests.evaluation.built import prepare
from recrl_lib.tests.evaluation.toy import toy_study
from recrl_lib.tests.tiny import tiny_explainer
from recrl_lib.tests.training.small import PROTECTED_TEXTS, RECORDS, protect, red, timeless
from recrl_lib.training import arms, diagnostics, trl, warm_start

STUDY = types.SimpleNamespace(training_records=lambda: RECORDS)


@pytest.fixture
def stage(tmp_path, monkeypatch) -> runs.StageRun:
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    tiny = tiny_explainer()
    for part in (tiny.lm, tiny.tokenizer):
        part.save_pretrained(tmp_path / "model")
    params = resolve(
        "smoke", run="t", llm=str(tmp_path / "model"), lora_rank=4, lora_alpha=4, lora_layers=1,
        max_new_tokens=8, temperature=1.0, warm_steps=2, warm_batch=2, warm_lr=1e-2,
        learning_rate=3e-2,
    )  # fmt: skip
    made = runs.StageRun(stage_named("shielded_ppo"), params, torch.device("cpu"), "key")
    made.save_json("held_out_items", [])
    return made


def train(name: str, stage: runs.StageRun, reward=red, study=STUDY, protected=None) -> arms.Arm:
    protected = protected or protect(load_for(stage.params, 0))
    training = arms.Training(name, stage, study, protected, reward)
    training.warm_start()
    training.reinforce()
    return training.finish()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_arm_is_sealed_or_leaks_and_leaves_frozen_weights_alone(stage, monkeypatch):
    trained, told = {}, []
    tracker = types.SimpleNamespace(
        log=lambda row, step: told.append((row, step)), finish=lambda: told.append("finished")
    )
    monkeypatch.setattr(diagnostics, "start_tracker", lambda *_: tracker)
    for name in arms.TRAINED:
        told.clear()
        arm = trained[name] = train(name, stage)
        assert told == [*((row, row["step"]) for row in arm.curve), "finished"]
        assert arm.frozen_intact and arm.curve[0]["kl"] < 1e-6
        assert len(arm.curve) == stage.params.ppo_steps
        assert len(arm.warm_curve) == stage.params.warm_steps
    assert trained["shielded"].leak <= 1e-6 < 0.1 < trained["unshielded"].leak


@pytest.mark.parametrize("warm", [True, False])
def test_stored_adapters_are_the_policies_that_were_trained(stage, warm):
    """The warm adapter on the base is the policy that PPO met; the other the one that it left."""

    def says(explainer):
        return explain(explainer, RECORDS, 8, 1.0, seed=5).texts

    stage.params = stage.params.replace(warm_steps=3 * warm)
    protected = protect(load_for(stage.params, 0))
    training = arms.Training("unshielded", stage, STUDY, protected, red)
    training.warm_start()
    before = says(training.explainer)
    training.reinforce()
    after, arm = says(training.explainer), training.finish()
    assert (arm.warm_adapter is not None) == warm == bool(arm.warm_curve)
    assert says(arms.load_tuned(stage.params, arm.warm_adapter)) == before
    assert says(arms.load_tuned(stage.params, arm.adapter)) == after != before


def test_a_second_call_goes_on_from_what_is_stored(stage, monkeypatch):
    whole = train("shielded", stage)
    shutil.rmtree(stage.folder / "checkpoints")
    calls = iter(range(9))

    def cut_off(records, texts):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return red(records, texts)

    with pytest.raises(KeyboardInterrupt):
        train("shielded", stage, cut_off)
    monkeypatch.setattr(warm_start, "fit", lambda *a: pytest.fail("the warm start was repeated"))
    resumed = train("shielded", stage)
    assert same(resumed.adapter, whole.adapter) and same(resumed.warm_adapter, whole.warm_adapter)
    assert timeless(resumed.curve) == timeless(whole.curve)
    assert resumed.warm_curve == whole.warm_curve
    assert resumed.leak == whole.leak and resumed.frozen_intact


def test_replay_steps_after_training_take_the_replay_out_of_projecting_ppo(stage, monkeypatch):
    """Mode penalty has nothing else and keeps its replay. A run that goes on does the same."""
    vectors = ItemTexts(load_for(stage.params, 0), PROTECTED_TEXTS).base_vectors()
    readout = torch.randn(4, vectors.shape[1], generator=torch.Generator().manual_seed(3))

    def replay_of(explainer, *_):
        items = ItemTexts(explainer, PROTECTED_TEXTS)
        return replay.Replay(explainer, items, vectors, readout, 10.0)

    monkeypatch.setattr(arms, "replay_for", replay_of)
    without, after = stage.params, {"shield_penalty": 10.0, "shield_replay_steps": 3}
    plain = train("shielded", stage)
    stage.params = without.replace(**after, shield_mode="penalty")
    penalised = train("shielded", stage)
    stage.params = without.replace(**after)
    replayed = train("shielded", stage)
    monkeypatch.setattr(warm_start, "fit", lambda *a: pytest.fail("the warm start was repeated"))
    again = train("shielded", stage)
    assert all(row["replay_norm"] > 0 for row in (*plain.curve, *penalised.curve))
    assert all(row["replay_norm"] == 0 for row in replayed.curve)
    assert same(replayed.warm_adapter, plain.warm_adapter)
    assert not same(replayed.adapter, plain.adapter) and same(replayed.adapter, again.adapter)
    assert timeless(replayed.curve) == timeless(again.curve)
    assert replayed.leak <= 1e-6 and replayed.frozen_intact
    assert replayed.replay_seconds > plain.replay_seconds


def test_unknown_arm_and_failed_processes_are_clear_errors(stage):
    with pytest.raises(ValueError, match="arm 'separate': only unshielded, shielded"):
        train("separate", stage)
    stage.params = stage.params.replace(processes=2, run="no-such-run")
    with pytest.raises(RuntimeError, match="2 processes: exit code .*ppo_unshielded.log"):
        train("unshielded", stage)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_an_arm_of_trl_is_shielded_and_not_trained_twice(stage, algorithm, monkeypatch):
    stage.params = stage.params.replace(algorithm=algorithm)
    seen = ["blue", "short", "long", "green", "bad", "a", "and"]
    scorer = Reward("grounded", Catalogue(["the red film", *seen], ["good"]))
    arm = train("shielded", stage, scorer)
    assert arm.leak <= 1e-6 and arm.frozen_intact and len(arm.curve) == stage.params.ppo_steps
    assert not same(arm.adapter, arm.warm_adapter)
    assert diagnostics.summary(pd.DataFrame(arm.curve))["steps"] == stage.params.ppo_steps
    monkeypatch.setattr(trl, "train", lambda *a: pytest.fail("trained a second time"))
    assert same(train("shielded", stage, scorer).adapter, arm.adapter)


# What the launched processes do first: leave a trace of each one's rank.
TRACE = """
import os
if "RANK" in os.environ:
    Path({!r}, "rank " + os.environ["RANK"] + " of " + os.environ["WORLD_SIZE"]).touch()
"""


def before_training(params) -> None:
    """The stages that the training reads: of the toy study, with the subspaces of two texts."""
    prepare(toy_study()[0], params)
    stage = runs.start("shield", params.as_dict())
    stage.save_tensors("subspaces", subspaces.to_tensors(protect(load_for(params, 0))))
    stage.save_json("held_out_items", [])
    stage.results(required("shield"))
    stage.finish()


def test_two_launched_processes_train_as_one(stage, house, finished, monkeypatch):
    """accelerate launches them, each reads the run folder, and this one goes on from their work."""
    shutil.copytree(finished.notebooks, house.notebooks)
    (house.root / "site").mkdir()
    first = house.move + TRACE.format(str(house.root))
    (house.root / "site" / "sitecustomize.py").write_text(first)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(house.root / "site"), str(paths.ROOT)]))
    before_training(stage.params)
    trained = {}
    for processes in (2, 1):
        here = runs.start("shielded_ppo", {**stage.params.as_dict(), "processes": processes})
        loaded = study.load(here)
        spaces = subspaces.from_tensors(here.load_tensors("subspaces"))
        scorer = Reward.of(here.params, loaded.catalogue)
        trained[processes] = train("shielded", here, scorer, loaded, spaces)
        started = sorted(path.name for path in house.root.glob("rank *"))
        assert started == ["rank 0 of 2", "rank 1 of 2"]
    two, one = trained[2], trained[1]
    assert two.leak <= 1e-6 and two.frozen_intact
    for ours, theirs in zip(timeless(two.curve), timeless(one.curve), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert two.adapter.keys() == one.adapter.keys() and not same(one.adapter, one.warm_adapter)
    for name, tensor in one.adapter.items():
        torch.testing.assert_close(two.adapter[name], tensor, atol=1e-5, rtol=0, msg=name)
