"""Whole arms on a tiny model saved to disk, from the base to the stored adapter."""

import os
import shutil
import types

import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib import paths, runs, study
from recrl_lib.data import splits
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import load_for
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import sample
from recrl_lib.params import resolve, stage_named
from recrl_lib.ranker import ranking, sasrec
from recrl_lib.scoring import reward
from recrl_lib.scoring.claims import Catalogue
from recrl_lib.shield import replay, subspaces
from recrl_lib.tests.tiny import WORDS, tiny_explainer
from recrl_lib.tests.training.test_checkpoint import RECORDS, red
from recrl_lib.training import arms, diagnostics, warm_start

WORLD = types.SimpleNamespace(training_records=lambda: RECORDS)


@pytest.fixture
def stage(tmp_path, monkeypatch) -> runs.StageRun:
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    tiny = tiny_explainer()
    for part in (tiny.lm, tiny.tokenizer):
        part.save_pretrained(tmp_path / "model")
    params = resolve(
        "smoke",
        run="t",
        llm=str(tmp_path / "model"),
        lora_rank=4,
        lora_alpha=4,
        lora_layers=1,
        max_new_tokens=8,
        temperature=1.0,
        warm_steps=2,
        warm_batch=2,
        warm_lr=1e-2,
        learning_rate=3e-2,
    )
    made = runs.StageRun(stage_named("shielded_ppo"), params, torch.device("cpu"), "key")
    made.save_json("held_out_items", [])
    return made


def protected(stage) -> dict[str, subspaces.Subspace]:
    explainer = load_for(stage.params, 0)
    return subspaces.subspaces(
        subspaces.item_grams(
            explainer, ItemTexts(explainer, ["good film", "the red film and a blue film"])
        )[0],
        0.9,
    )


def timeless(curve):
    return [{k: v for k, v in row.items() if k not in diagnostics.TIMES} for row in curve]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_arm_is_sealed_or_leaks_and_leaves_frozen_weights_alone(stage):
    spaces = protected(stage)
    both = {name: arms.train(name, stage, WORLD, spaces, red) for name in arms.TRAINED}
    assert both["shielded"].leak <= 1e-6 < 0.1 < both["unshielded"].leak
    for arm in both.values():
        assert (
            arm.frozen_intact
            and len(arm.curve) == stage.params.ppo_steps
            and len(arm.warm_curve) == stage.params.warm_steps
        )
        assert arm.curve[0]["kl"] < 1e-6 and {
            t.shape[0] for k, t in arm.adapter.items() if "lora_A" in k
        } == {8}
    assert (stage.folder / "checkpoints" / "shielded" / "warm.safetensors").is_file()
    arms.forget(stage)
    assert not (stage.folder / "checkpoints").exists()


def watch_tracker(monkeypatch) -> list:
    """What the tracker of the next arms is told, in order."""
    told = []
    tracker = types.SimpleNamespace(
        log=lambda row, step: told.append((row, step)), finish=lambda: told.append("finished")
    )
    monkeypatch.setattr(arms.tracking, "open", lambda *a: tracker)
    return told


def test_the_tracker_hears_every_row_of_an_arm(stage, monkeypatch):
    told = watch_tracker(monkeypatch)
    arm = arms.train("unshielded", stage, WORLD, protected(stage), red)
    assert (
        told == [*((row, row["step"]) for row in arm.curve), "finished"]
        and len(arm.curve) == stage.params.ppo_steps
    )


def test_stored_adapters_are_the_policies_that_were_trained(stage, monkeypatch):
    """The warm adapter on the base is the policy that PPO met; the whole adapter is the one that it left."""
    seen = []
    real = arms.ppo.PPO.train

    def watched(self, *args):
        prompts = [prompt_ids(self.explainer, messages(r)) for r in RECORDS]
        said = lambda: (
            sample(self.explainer, prompts, 2, 8, 1.0, torch.Generator().manual_seed(5)).texts
        )
        seen.append(said())
        rows = real(self, *args)
        seen.append(said())
        return rows

    monkeypatch.setattr(arms.ppo.PPO, "train", watched)
    arm = arms.train("unshielded", stage, WORLD, protected(stage), red)
    again = []
    for adapter in (arm.warm_adapter, arm.adapter):
        explainer = arms.load_tuned(stage.params, adapter)
        prompts = [prompt_ids(explainer, messages(r)) for r in RECORDS]
        again.append(sample(explainer, prompts, 2, 8, 1.0, torch.Generator().manual_seed(5)).texts)
    assert again == seen and seen[0] != seen[1]


def test_a_second_call_goes_on_from_what_is_stored(stage, monkeypatch):
    spaces = protected(stage)
    whole = arms.train("shielded", stage, WORLD, spaces, red)
    arms.forget(stage)
    calls = iter(range(9))

    def cut_off(records, texts):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return red(records, texts)

    with pytest.raises(KeyboardInterrupt):
        arms.train("shielded", stage, WORLD, spaces, cut_off)
    monkeypatch.setattr(warm_start, "fit", lambda *a: pytest.fail("the warm start was repeated"))
    resumed = arms.train("shielded", stage, WORLD, spaces, red)
    assert same(resumed.adapter, whole.adapter) and same(resumed.warm_adapter, whole.warm_adapter)
    assert (
        timeless(resumed.curve) == timeless(whole.curve) and resumed.warm_curve == whole.warm_curve
    )
    assert resumed.leak == whole.leak and resumed.frozen_intact


def test_an_arm_that_settles_replays_before_and_after_ppo_and_settles_the_same_way_after_an_interruption(
    stage, monkeypatch
):
    spaces, texts = protected(stage), ["good film", "the red film and a blue film"]
    explainer = load_for(stage.params, 0)
    text = ItemTexts(explainer, texts).base_vectors()
    readout = torch.randn(4, text.shape[1], generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(
        replay,
        "replay_for",
        lambda explainer, *_: replay.Replay(
            explainer, ItemTexts(explainer, texts), text, readout, 10.0
        ),
    )
    untouched = stage.params
    stage.params = untouched.replace(
        shield_penalty=10.0, shield_replay_steps=3, shield_mode="penalty"
    )
    penalised = arms.train("shielded", stage, WORLD, spaces, red)  # this mode has nothing else
    stage.params = untouched
    plain = arms.train("shielded", stage, WORLD, spaces, red)
    stage.params = untouched.replace(shield_penalty=10.0, shield_replay_steps=3)
    settled = arms.train("shielded", stage, WORLD, spaces, red)
    monkeypatch.setattr(warm_start, "fit", lambda *a: pytest.fail("the warm start was repeated"))
    again = arms.train("shielded", stage, WORLD, spaces, red)
    assert all(row["replay_norm"] > 0 for row in (*plain.curve, *penalised.curve)) and all(
        row["replay_norm"] == 0 for row in settled.curve
    )
    assert same(settled.warm_adapter, plain.warm_adapter) and not same(
        settled.adapter, plain.adapter
    )
    assert same(settled.adapter, again.adapter) and timeless(settled.curve) == timeless(again.curve)
    assert (
        settled.leak <= 1e-6
        and settled.frozen_intact
        and settled.settle_seconds > plain.settle_seconds
    )


def test_without_warm_start_the_adapter_has_its_own_rank(stage):
    stage.params = resolve("smoke", **{**stage.params.as_dict(), "warm_start": False})
    arm = arms.train("unshielded", stage, WORLD, protected(stage), red)
    assert (
        arm.warm_adapter is None
        and not arm.warm_curve
        and {t.shape[0] for k, t in arm.adapter.items() if "lora_A" in k} == {4}
    )


def test_unknown_arm_and_failed_processes_are_clear_errors(stage):
    with pytest.raises(ValueError, match="arm 'separate'"):
        arms.train("separate", stage, WORLD, {}, red)
    stage.params = resolve(
        "smoke", **{**stage.params.as_dict(), "processes": 2, "run": "no-such-run"}
    )
    with pytest.raises(RuntimeError, match="2 processes: exit code .*ppo_unshielded.log"):
        arms._launch("unshielded", stage)


# What the launched processes import first: where this test's runs and notebooks lie, and a trace of each one's rank.
ELSEWHERE = """
import os
from pathlib import Path
from recrl_lib import paths
paths.NOTEBOOKS, paths.RUNS = Path({notebooks!r}), Path({runs!r})
if "RANK" in os.environ:
    Path({root!r}, "rank " + os.environ["RANK"] + " of " + os.environ["WORLD_SIZE"]).touch()
"""


def before_training(params) -> None:
    """The stages that the training reads, finished: six users, twenty items, an untrained ranker, subspaces of the tiny model."""

    def finish(stage):
        stage.metrics(dict.fromkeys(runs.REQUIRED_METRICS[stage.name], 0.5))
        stage.finish()

    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, 3, replace=False)) for _ in range(20)]
    items = pd.DataFrame(
        {"item": range(1, 21), "title": titles, "year": 0, "genres": "good", "text": titles}
    )
    rows = [(u, i, t) for u in range(6) for t, i in enumerate(rng.permutation(20)[:5] + 1)]
    seen = pd.DataFrame(rows, columns=["user", "item", "time"])
    stage = runs.start("data", params.as_dict())
    for name, table in (
        ("interactions", seen),
        ("items", items),
        ("users", pd.DataFrame({"user": range(6)})),
    ):
        stage.save_table(name, table)
    stage.save_json("dataset", {"noun": "film"})
    stage.save_json("user_groups", {"ppo": list(range(6)), "validation": [], "heldout": []})
    finish(stage)
    stage = runs.start("ranker", params.as_dict())
    model = sasrec.freeze(sasrec.SASRec(20, 16, 1, 2, 10, 0.0))
    sasrec.save(model, stage.output("ranker.safetensors"))
    top = ranking.top_k(model, splits.split(seen, 6, "leave-one-out").with_valid, None, 10)
    stage.save_tensors("base", {"top": torch.from_numpy(top)})
    stage.save_json("ranker_hashes", {"weights": sasrec.state_sha256(model)})
    finish(stage)
    finish(runs.start("explainer", params.as_dict()))
    stage = runs.start("shield", params.as_dict())
    explainer = load_for(params, 0)
    stage.save_tensors(
        "subspaces",
        subspaces.to_tensors(
            subspaces.subspaces(
                subspaces.item_grams(explainer, ItemTexts(explainer, titles))[0], 0.9
            )
        ),
    )
    stage.save_json("held_out_items", [])
    finish(stage)


def test_two_launched_processes_train_as_one(stage, house, finished, monkeypatch):
    """By the function that notebook 05 calls: accelerate launches, each process reads the run folder, and this one goes on from what they left."""
    shutil.copytree(finished.notebooks, house.notebooks)
    (house.root / "site").mkdir()
    code = ELSEWHERE.format(
        notebooks=str(house.notebooks), runs=str(house.runs), root=str(house.root)
    )
    (house.root / "site" / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(house.root / "site"), str(paths.ROOT)]))
    before_training(stage.params)
    trained = {}
    for processes in (2, 1):
        here = runs.start("shielded_ppo", {**stage.params.as_dict(), "processes": processes})
        world = study.load(here)
        spaces, scorer = (
            subspaces.from_tensors(here.load_tensors("subspaces")),
            reward.Reward.of(here.params, world.catalogue),
        )
        trained[processes] = arms.train("shielded", here, world, spaces, scorer)
        assert sorted(path.name for path in house.root.glob("rank *")) == [
            "rank 0 of 2",
            "rank 1 of 2",
        ]
    two, one = trained[2], trained[1]
    assert (
        two.leak <= 1e-6
        and two.frozen_intact
        and [row["step"] for row in two.curve] == [row["step"] for row in one.curve]
    )
    assert two.adapter.keys() == one.adapter.keys() and not same(one.adapter, one.warm_adapter)
    for name, tensor in one.adapter.items():
        torch.testing.assert_close(two.adapter[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_an_arm_of_trl_is_shielded_and_not_trained_twice(stage, algorithm, monkeypatch):
    trl_arms = pytest.importorskip("recrl_lib.training.trl")
    stage.params = resolve("smoke", **{**stage.params.as_dict(), "algorithm": algorithm})
    seen = ["blue", "short", "long", "green", "bad", "a", "and"]
    scorer = reward.Reward("grounded", Catalogue(["the red film", *seen], ["good"]))
    world = types.SimpleNamespace(
        training_records=lambda: [r | {"history_genres": [["good"]] * 2} for r in RECORDS]
    )
    spaces, told = protected(stage), watch_tracker(monkeypatch)
    arm = arms.train("shielded", stage, world, spaces, scorer)
    assert arm.leak <= 1e-6 and arm.frozen_intact and len(arm.curve) == stage.params.ppo_steps
    assert told == [*((row, row["step"]) for row in arm.curve), "finished"]
    assert (
        not same(arm.adapter, arm.warm_adapter)
        and diagnostics.summary(pd.DataFrame(arm.curve))["steps"] == stage.params.ppo_steps
    )
    monkeypatch.setattr(trl_arms, "train", lambda *a: pytest.fail("trained again"))
    assert same(arms.train("shielded", stage, world, spaces, scorer).adapter, arm.adapter)
