"""Derived runs: what they share, what is left to run, and that nothing shared can be damaged or mistaken."""

import os
import shutil

import pytest

from recrl_lib import runs
from recrl_lib.params import Params
from recrl_lib.pipeline import derive
from recrl_lib.runs import write_atomic
from recrl_lib.tests.conftest import finish
from recrl_lib.training import arms


def test_only_what_the_change_reaches_is_left_to_run(base):
    for changes, left in (
        ({}, ()),
        ({"sim_beta": 1.0}, ("evaluation",)),
        ({"kl_coef": 0.0}, ("shielded_ppo", "evaluation")),
        ({"lora_rank": 3}, ("shielded_ppo", "evaluation")),
        ({"seed": 5}, ("shielded_ppo", "evaluation")),
        ({"shield_energy": 0.5}, ("shield", "shielded_ppo", "evaluation")),
        ({"ranker_epochs": 7}, ("ranker", "explainer", "shield", "shielded_ppo", "evaluation")),
    ):
        params = derive.changed(base, "d", changes)
        shared = derive.shareable(base, params, derive.base_run("base")[1])
        assert [name for name in derive.with_needs("evaluation") if name not in shared] == list(
            left
        ), changes


def test_a_derived_run_shares_files_and_entries_and_runs_the_rest(base):
    params = derive.derive("base", "d", lora_rank=3, seed=5)
    manifest, before = runs.read_manifest("d"), runs.read_manifest("base")
    assert manifest["derived_from"] == {
        "run": "base",
        "stages": list(derive.PREPARING),
        "changed": {"seed": 4, "lora_rank": 16},
    }
    assert (
        manifest["stages"] == {name: before["stages"][name] for name in derive.PREPARING}
        and manifest["seed"] == 5
    )
    for name in ("artifacts/subspaces.safetensors", "metrics/ranker.json"):
        assert (runs.run_folder("d") / name).samefile(runs.run_folder("base") / name)
    assert runs.read_params("d") == params == base.replace(run="d", lora_rank=3, seed=5)
    assert all(runs.up_to_date(name, params) for name in derive.PREPARING) and not runs.up_to_date(
        "shielded_ppo", params
    )
    finish("shielded_ppo", params)
    finish("evaluation", params)
    assert runs.up_to_date("shielded_ppo", params) and runs.up_to_date("evaluation", params)
    assert runs.read_manifest("d")["derived_from"] == manifest["derived_from"]
    assert derive.derive("base", "d", lora_rank=3, seed=5) == params and runs.up_to_date(
        "evaluation", params
    )


def test_a_change_after_the_warm_start_shares_its_adapters(base):
    params = derive.derive("base", "d", kl_coef=0.0, weight_length=0.0, eval_users=5)
    for arm in arms.TRAINED:
        adapter, plain = arms.checkpoints(params, arm).load("warm")
        assert plain == {"curve": [{"step": 1, "loss": float(len(arm))}], "intact": True}
        assert (
            adapter["lora_A"].tolist() == [[1, 1]]
            and adapter["lora_B"].tolist() == [[len(arm)]] * 2
        )
    arms.checkpoints(params, "shielded").save("warm", adapter, {"curve": [], "intact": True})
    derive.derive("base", "d", kl_coef=0.0, weight_length=0.0, eval_users=5)
    assert arms.checkpoints(params, "shielded").load("warm")[1]["curve"] == []  # its own is kept
    finish("shielded_ppo", params)
    folder = runs.run_folder("d") / "checkpoints"
    shutil.rmtree(folder)
    derive.derive("base", "d", kl_coef=0.0, weight_length=0.0, eval_users=5)
    assert not folder.exists()  # nothing left to train


@pytest.mark.parametrize(
    "change",
    [
        {"warm_steps": 9},
        {"lora_rank": 3},
        {"seed": 5},
        {"shield_penalty": 7.0},
        {"dtype": "float32"},
    ],
)
def test_a_change_that_reaches_the_warm_start_shares_none(base, change):
    assert arms.checkpoints(derive.derive("base", "d", **change), "shielded").load("warm") is None


def test_executing_a_shared_stage_makes_it_the_runs_own(base):
    params = derive.derive("base", "d", lora_rank=3)
    finish("shield", params)
    assert runs.read_manifest("d")["derived_from"]["stages"] == list(derive.PREPARING[:-1])
    assert runs.up_to_date("shield", params)
    finish(
        "shield", base
    )  # a stage writes whole files, so the base cannot reach into the derived run
    ours, theirs = (
        runs.run_folder(run) / "artifacts/subspaces.safetensors" for run in ("d", "base")
    )
    assert not ours.samefile(theirs)


def test_a_base_that_ran_again_is_taken_over_and_what_was_made_of_it_is_stale(base):
    params = derive.derive("base", "d", kl_coef=0.0)
    finish("shielded_ppo", params)
    for name in ("ranker", "explainer", "shield"):
        finish(name, base, value=2.0)
    shared = runs.run_folder("d") / "artifacts/ranker.safetensors"
    old = shared.read_bytes()
    derive.derive("base", "d", kl_coef=0.0)
    assert shared.read_bytes() != old
    assert runs.up_to_date("ranker", params) and not runs.up_to_date("shielded_ppo", params)


def test_across_file_systems_files_are_copied(base, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    params = derive.derive("base", "d", kl_coef=0.0)
    ours, theirs = (runs.run_folder(r) / "artifacts/ranker.safetensors" for r in ("d", "base"))
    assert (
        not ours.samefile(theirs)
        and ours.read_bytes() == theirs.read_bytes()
        and runs.up_to_date("ranker", params)
    )


def test_a_rank_that_does_not_fit_beside_the_basis_is_refused(base):
    derive.derive("base", "d", lora_rank=3)
    with pytest.raises(
        ValueError,
        match="lora_rank=4: layer input 0.attn .* 8 directions, 5 of them protected; use at most 3",
    ):
        derive.derive("base", "e", lora_rank=4)
    assert not runs.run_folder("e").exists()


def test_refused_before_anything_is_written(base):
    for run, changes, words in (
        ("d", {"kl_coeff": 0.0}, "did you mean kl_coef"),
        ("d", {"kl_coef": -1.0}, "at least 0"),
        ("a/b", {}, "parameter run"),
    ):
        with pytest.raises(ValueError, match=words):
            derive.derive("base", run, **changes)
    with pytest.raises(ValueError, match="runs/none does not exist; make all RUN=none"):
        derive.derive("none", "d")
    assert not runs.run_folder("d").exists()
    with pytest.raises(ValueError, match="not derived from"):
        finish("environment", Params(run="mine"))
        derive.derive("base", "mine")


def test_a_base_out_of_date_is_refused(base):
    (runs.run_folder("base") / "artifacts/ranker.safetensors").unlink()
    with pytest.raises(
        ValueError, match="stages ranker, explainer, shield are missing or out of date"
    ):
        derive.derive("base", "d")


def test_a_changed_shared_parameter_of_another_kind_is_noticed(base):
    """Only what was changed on purpose is excused: a later edit of params.yaml makes the shared stages stale."""
    params = derive.derive("base", "d", lora_rank=3)
    assert runs.up_to_date("shield", params) and not runs.up_to_date(
        "shield", params.replace(shield_energy=0.5)
    )


def test_a_damaged_manifest_is_named(base):
    derive.derive("base", "d", kl_coef=0.0)
    write_atomic(runs.run_folder("d") / "manifest.json", "{")
    with pytest.raises(RuntimeError, match="not valid JSON"):
        derive.derive("base", "d", kl_coef=0.0)
