"""The run folder: what is written, what is refused, and what makes a stage run again."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from recrl_lib import params, paths, runs
from recrl_lib.params import Params
from recrl_lib.runs import sha256_file, write_atomic
from recrl_lib.tests.conftest import required


@pytest.fixture
def notebooks(house):
    for stage in params.STAGES:
        house.write(stage.name, "from recrl_lib import runs")
    return house


def begin(stage="data", **values):
    owned = {name: getattr(Params(), name) for name in params.owned_by(stage)}
    return runs.start(stage, {**owned, **values, "unrelated": object()})


def finish_data(**values):
    stage = begin(**values)
    stage.save_table("items", pd.DataFrame({"item": [1, 2, 3], "title": ["a", 'b "c"', "d\ne"]}))
    stage.results(required("data"))
    stage.finish()
    return stage


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_atomic(path, "long first content")
    write_atomic(path, b"short")

    def failing(descriptor):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "short" and os.listdir(path.parent) == ["file"]


def test_start_stores_all_parameters_and_keeps_those_of_other_stages(notebooks):
    finish_data(ppo_users=0.4)
    assert runs.read_params("smoke") == Params(ppo_users=0.4)
    begin("ranker", ranker_dim=32, ranker_lr=3e-5)
    assert runs.read_params("smoke") == Params(ppo_users=0.4, ranker_dim=32, ranker_lr=3e-5)
    stored = yaml.safe_load((notebooks.runs / "smoke" / "params.yaml").read_text())
    assert list(stored) == list(Params.model_fields)


def test_one_run_has_one_seed_and_exploring_it_takes_that_and_changes_nothing(notebooks):
    stages = ("data", "ranker", "explainer", "shielded_ppo")
    finished = dict.fromkeys(stages, {"status": "finished", "outputs": []})
    stored = Params(seed=4, ranker_dim=32)
    runs.write_params(stored)
    path = notebooks.runs / "smoke" / "manifest.json"
    write_atomic(path, json.dumps({"run": "smoke", "stages": finished}))
    with pytest.raises(ValueError, match="has seed 4, not 0: give that seed its own run"):
        begin("ranker", seed=0)
    assert begin("explore", interactive=True).params == stored.replace(interactive=True)
    assert runs.read_params("smoke") == stored


def test_start_names_bad_and_missing_parameters_and_the_notebook_to_run_first(notebooks):
    with pytest.raises(ValueError, match="01_data.ipynb: the parameters cell lacks seed, dataset"):
        runs.start("data", {"run": "smoke", "device": "cpu"})
    for wrong in ({"ppo_users": 2.0}, {"seed": "1"}, {"run": "../elsewhere"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            begin(**wrong)
    assert not notebooks.runs.exists()
    with pytest.raises(RuntimeError, match=r"'ranker' needs 'data'.*01_data.ipynb"):
        begin("ranker")


@pytest.mark.parametrize("text", ["a: [", "- 1", "no_such: 1", "seed: one"])
def test_a_damaged_params_file_is_named(notebooks, text):
    write_atomic(notebooks.runs / "smoke" / "params.yaml", text)
    with pytest.raises(ValueError, match="params.yaml.*delete the file"):
        begin()


def test_randomness_depends_on_seed_and_name_only(notebooks):
    draws, stages = [], []
    for seed in (0, 0, 1):
        stages.append(begin(seed=seed))
        draws.append((float(torch.rand(())), np.random.rand()))
    assert draws[0] == draws[1] != draws[2]
    stage, _, other = stages
    assert stage.rng("a").integers(2**60) == stage.rng("a").integers(2**60)
    assert len({s.torch_seed(name) for s in (stage, other) for name in "ab"}) == 4
    # By hand, so the same in every process: the first 8 bytes of sha256("0/a") but the last bit.
    assert stage.torch_seed("a") == int(hashlib.sha256(b"0/a").hexdigest()[:16], 16) // 2


def test_artifacts_come_back_as_they_were(notebooks):
    stage = begin()
    table = pd.DataFrame({"user": np.arange(3), "title": ["é", "x,y", "z\n"]})
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "n": np.ones(2, np.float32)}
    stage.save_table("table", table)
    stage.save_tensors("tensors", tensors)
    stage.save_tensors("reversed", dict(reversed(tensors.items())))
    stage.save_json("facts", {"x": "é"})
    pd.testing.assert_frame_equal(stage.load_table("table"), table)
    loaded = stage.load_tensors("tensors")
    assert torch.equal(loaded["t"], tensors["t"]) and torch.equal(loaded["n"], torch.ones(2))
    assert stage.load_json("facts") == {"x": "é"}
    ways = [stage.input(f"{name}.safetensors") for name in ("tensors", "reversed")]
    assert sha256_file(ways[0]) == sha256_file(ways[1])


def test_inputs_are_checked_against_their_stage(notebooks):
    path = finish_data().folder / "artifacts" / "items.parquet"
    stage = begin("ranker")
    assert len(stage.load_table("items")) == 3
    with pytest.raises(RuntimeError, match="nothing.json is missing: no finished stage"):
        stage.load_json("nothing")
    with pytest.raises(ValueError, match="not write artifacts/items.parquet: stage 'data' does"):
        stage.output("items.parquet")
    path.write_bytes(b"changed")
    with pytest.raises(RuntimeError, match="changed since 'data' finished.*01_data.ipynb"):
        stage.input("items.parquet")
    path.unlink()
    with pytest.raises(RuntimeError, match="items.parquet is missing: run notebooks/01_data.ipynb"):
        stage.input("items.parquet")


def test_finish_writes_results_curve_and_manifest(notebooks):
    stage = begin()
    stage.save_json("facts", [1])
    stage.curve([{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.30000000000000004}])
    stage.result("share", 0.5, arm="a", against="b", group="new", low=0.1, high=0.9, n=4, seeds=1)
    stage.results(pd.DataFrame(required("data")))
    stage.finish()
    table = runs.read_results("smoke", "data")
    assert runs.value(table, "share", "a", "b", "new") == runs.value(table, "n_items") == 0.5
    curve = (stage.folder / "curves" / "data.csv").read_text()
    assert curve == "step,loss\n1,0.1\n2,0.30000000000000004\n"
    manifest = runs.read_manifest("smoke")
    expected = "run git_commit git_dirty versions device cpu threads seed stages"
    assert list(manifest) == expected.split()
    assert manifest["versions"]["torch"] == torch.__version__
    entry = manifest["stages"]["data"]
    assert entry["status"] == "finished" and entry["key"] == runs.stage_key("data", stage.params)
    written = {"artifacts/facts.json", "curves/data.csv", "metrics/data.csv"}
    assert set(entry["outputs"]) == written
    assert entry["outputs"]["artifacts/facts.json"] == hashlib.sha256(b"[\n 1\n]\n").hexdigest()


def test_finish_names_missing_results_and_files(notebooks):
    stage = begin()
    stage.result("n_users", 1)
    with pytest.raises(ValueError, match="'n_users'.*given twice"):
        stage.result("n_users", 2)
    with pytest.raises(ValueError, match="no result n_interactions, no result n_items"):
        stage.finish()
    stage.results(required("data")[1:])
    stage.output("never.parquet")
    with pytest.raises(ValueError, match="not written: artifacts/never.parquet"):
        stage.finish()
    assert runs.read_manifest("smoke")["stages"] == {}


def test_up_to_date_needs_the_key_and_every_file(notebooks):
    assert not runs.up_to_date("data", Params())
    folder, name = finish_data().folder, "artifacts/items.parquet"
    assert not runs.up_to_date("data", Params(ppo_users=0.4))
    stage = begin("ranker")
    stage.load_table("items")
    stage.results(required("ranker"))
    stage.finish()
    stages = runs.read_manifest("smoke")["stages"]
    assert list(stages) == ["data", "ranker"]
    assert stages["ranker"]["inputs"] == {name: stages["data"]["outputs"][name]}
    for stage, file in (("data", name), ("data", "metrics/data.csv"), ("ranker", name)):
        original = (folder / file).read_bytes()
        (folder / file).write_bytes(original + b" ")
        assert not runs.up_to_date(stage, Params()), file
        (folder / file).unlink()
        assert not runs.up_to_date(stage, Params()), file
        (folder / file).write_bytes(original)
        assert runs.up_to_date(stage, Params())


def test_deciding_what_to_run_does_not_load_torch():
    code = "import sys; from recrl_lib.pipeline import execute; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT).returncode == 0


def test_the_chosen_products_are_of_float32_numbers():
    runs.choose_products()
    a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    assert (a @ b - exact).norm() < 2e-6 * exact.norm()
