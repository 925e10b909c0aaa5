"""The run folder: what is written, what is refused, and what makes a stage run again."""

import hashlib
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

DATA = {"n_users": 2, "n_items": 3, "n_interactions": 5, "source": "toy", "sha256": "0"}


def namespace(stage, **values):
    return {
        **{name: getattr(Params(), name) for name in params.owned_by(stage)},
        **values,
        "unrelated": object(),
    }


@pytest.fixture
def notebooks(house):
    for stage in ("environment", "data", "ranker", "audit"):
        house.write(stage, "from recrl_lib import runs")
    return house


def finish_data(**values):
    stage = runs.start("data", namespace("data", **values))
    stage.save_table("items", pd.DataFrame({"item": [1, 2, 3], "title": ["a", 'b "c"', "d\ne"]}))
    stage.metrics(DATA)
    stage.finish()
    return stage


# ------------------------------------------------------------------------------------------ files


def test_write_atomic_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomic(path, "long first content")
    write_atomic(path, b"short")
    assert path.read_bytes() == b"short"
    assert os.listdir(path.parent) == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------ parameters


def test_start_stores_all_parameters_and_keeps_those_of_other_stages(notebooks):
    finish_data(ppo_users=0.4)
    assert runs.read_params("smoke") == Params(ppo_users=0.4)
    runs.start("ranker", namespace("ranker", ranker_dim=32))
    assert runs.read_params("smoke") == Params(ppo_users=0.4, ranker_dim=32)
    assert (
        list(yaml.safe_load((notebooks.runs / "smoke" / "params.yaml").read_text()))
        == params.names()
    )


def test_one_run_has_one_seed(notebooks):
    finish_data()
    with pytest.raises(ValueError, match="has seed 0, not 4: give that seed its own run"):
        runs.start("ranker", namespace("ranker", seed=4))
    assert runs.read_params("smoke").seed == 0


def test_exploring_a_run_takes_its_seed_and_changes_nothing(notebooks, monkeypatch):
    runs.write_params(Params(seed=4, ranker_dim=32))
    monkeypatch.setattr(runs, "_check_needs", lambda *a: None)
    monkeypatch.setattr(runs, "stage_key", lambda *a, **k: "key")
    stage = runs.start("explore", namespace("explore", interactive=True))
    assert stage.params == Params(seed=4, ranker_dim=32, interactive=True)
    assert runs.read_params("smoke") == Params(seed=4, ranker_dim=32)


def test_small_floats_survive_the_yaml_file(house):
    runs.write_params(Params(learning_rate=3e-5, kl_coef=1e-12))
    assert runs.read_params("smoke") == Params(learning_rate=3e-5, kl_coef=1e-12)


def test_start_names_missing_parameters_and_the_notebook(notebooks):
    incomplete = namespace("data")
    del incomplete["ppo_users"], incomplete["seed"]
    with pytest.raises(
        ValueError, match=r"01_data.ipynb: the parameters cell lacks seed, ppo_users"
    ):
        runs.start("data", incomplete)


@pytest.mark.parametrize("wrong", [{"ppo_users": 2.0}, {"seed": "1"}, {"run": "../elsewhere"}])
def test_bad_parameters_write_nothing(notebooks, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        runs.start("data", namespace("data", **wrong))
    assert not notebooks.runs.exists()


@pytest.mark.parametrize("text", ["a: [", "- 1", "no_such: 1", "seed: one"])
def test_a_damaged_params_file_is_named(notebooks, text):
    write_atomic(notebooks.runs / "smoke" / "params.yaml", text)
    with pytest.raises(ValueError, match="params.yaml.*delete the file"):
        runs.start("data", namespace("data"))


def test_start_names_the_notebook_to_run_first(notebooks):
    with pytest.raises(RuntimeError, match=r"'ranker' needs 'data'.*01_data.ipynb"):
        runs.start("ranker", namespace("ranker"))
    folder = finish_data().folder
    (folder / "artifacts" / "items.parquet").unlink()
    with pytest.raises(RuntimeError, match=r"items.parquet, which is missing.*01_data.ipynb"):
        runs.start("ranker", namespace("ranker"))


def test_cuda_without_a_device_is_refused(notebooks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(RuntimeError, match="device='cuda'"):
        runs.start("data", namespace("data", device="cuda"))


# ------------------------------------------------------------------------------------------ randomness


def test_start_seeds_torch_and_numpy(notebooks):
    draws = []
    for _ in range(2):
        runs.start("data", namespace("data", seed=5))
        draws.append((float(torch.rand(())), np.random.rand()))
    runs.start("data", namespace("data", seed=6))
    assert draws[0] == draws[1] != (float(torch.rand(())), np.random.rand())


def test_streams_depend_on_name_and_seed_only(notebooks):
    stage = runs.start("data", namespace("data", seed=0))
    other = runs.start("data", namespace("data", seed=1))
    assert stage.rng("a").integers(2**60) == stage.rng("a").integers(2**60)
    assert len({s.torch_seed(name) for s in (stage, other) for name in "ab"}) == 4
    # by hand, and so the same in every process: the first eight bytes of sha256("0/a") without the last bit
    assert stage.torch_seed("a") == int(hashlib.sha256(b"0/a").hexdigest()[:16], 16) // 2
    torch.Generator().manual_seed(stage.torch_seed("a"))


# ------------------------------------------------------------------------------------------ artifacts


def test_artifacts_come_back_as_they_were(notebooks):
    stage = runs.start("data", namespace("data"))
    table = pd.DataFrame({"user": np.arange(3), "title": ["é", "x,y", "z\n"]})
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "n": np.ones(2, np.float32)}
    stage.save_table("table", table)
    stage.save_tensors("tensors", tensors)
    stage.save_json("facts.json", {"x": "é"})
    pd.testing.assert_frame_equal(stage.load_table("table"), table)
    loaded = stage.load_tensors("tensors.safetensors")
    assert torch.equal(loaded["t"], tensors["t"]) and torch.equal(loaded["n"], torch.ones(2))
    assert stage.load_json("facts") == {"x": "é"}


def test_equal_tensors_make_equal_files_whatever_their_order(notebooks):
    stage = runs.start("data", namespace("data"))
    hashes = set()
    for i, names in enumerate(("xy", "yx")):
        stage.save_tensors(f"t{i}", {name: torch.full((2,), float(ord(name))) for name in names})
        hashes.add(sha256_file(stage.folder / "artifacts" / f"t{i}.safetensors"))
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["../x", "/x", "", "a/../../x"])
def test_artifacts_stay_in_their_folder(notebooks, name):
    with pytest.raises(ValueError, match="must be relative"):
        runs.start("data", namespace("data")).output(name)


def test_files_outside_artifacts_are_recorded_too(notebooks):
    stage = runs.start("data", namespace("data"))
    stage.output("report.html", folder="").write_text("<html>")
    stage.metrics(DATA)
    stage.finish()
    assert (stage.folder / "report.html").is_file()
    assert "report.html" in runs.read_manifest("smoke")["stages"]["data"]["outputs"]


def test_inputs_are_checked_against_their_stage(notebooks):
    finish_data()
    stage = runs.start("ranker", namespace("ranker"))
    assert len(stage.load_table("items")) == 3
    with pytest.raises(RuntimeError, match="nothing.json is missing: no finished stage"):
        stage.load_json("nothing")
    with pytest.raises(
        ValueError, match="must not write artifacts/items.parquet: stage 'data' does"
    ):
        stage.output("items.parquet")
    (stage.folder / "artifacts" / "items.parquet").write_bytes(b"changed")
    with pytest.raises(RuntimeError, match="changed since stage 'data' finished.*01_data.ipynb"):
        stage.input("items.parquet")
    (stage.folder / "artifacts" / "items.parquet").unlink()
    with pytest.raises(RuntimeError, match="items.parquet is missing: run notebooks/01_data.ipynb"):
        stage.input("items.parquet")


# ------------------------------------------------------------------------------------------ results


def test_finish_writes_metrics_curve_and_manifest(notebooks):
    stage = runs.start("data", namespace("data"))
    stage.save_json("facts", [1])
    stage.curve([{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.30000000000000004}])
    stage.metrics(
        DATA | {"numpy": np.float32(0.5), "tensor": torch.tensor(3), "flag": np.bool_(True)}
    )
    stage.finish()
    metrics = runs.read_metrics("smoke", "data")
    assert metrics == DATA | {"numpy": 0.5, "tensor": 3, "flag": True}
    assert (
        stage.folder / "curves" / "data.csv"
    ).read_text() == "step,loss\n1,0.1\n2,0.30000000000000004\n"
    manifest = runs.read_manifest("smoke")
    expected = "run git_commit git_dirty versions device cpu threads seed stages"
    assert list(manifest) == expected.split()
    assert (
        manifest["versions"]["torch"] == torch.__version__
        and manifest["device"] == stage.device.type
    )
    entry = manifest["stages"]["data"]
    assert entry["status"] == "finished" and entry["key"] == runs.stage_key("data", stage.params)
    assert set(entry["outputs"]) == {"artifacts/facts.json", "curves/data.csv", "metrics/data.json"}
    assert entry["outputs"]["artifacts/facts.json"] == hashlib.sha256(b"[\n 1\n]\n").hexdigest()


def test_finish_records_inputs_and_keeps_other_stages(notebooks):
    finish_data()
    stage = runs.start("ranker", namespace("ranker"))
    stage.load_table("items")
    stage.metrics(dict.fromkeys(runs.REQUIRED_METRICS["ranker"], 0.0))
    stage.finish()
    stages = runs.read_manifest("smoke")["stages"]
    assert list(stages) == ["data", "ranker"]
    assert stages["ranker"]["inputs"] == {
        "artifacts/items.parquet": stages["data"]["outputs"]["artifacts/items.parquet"]
    }


def test_finish_names_missing_metrics_and_outputs(notebooks):
    stage = runs.start("data", namespace("data"))
    stage.metrics({"n_users": 1, "n_items": 1, "source": "x"})
    with pytest.raises(ValueError, match="no result n_interactions, sha256"):
        stage.finish()
    stage.metrics(DATA)
    stage.output("never.parquet")
    with pytest.raises(ValueError, match="not written: artifacts/never.parquet"):
        stage.finish()
    assert runs.read_manifest("smoke")["stages"] == {}


def test_the_contract_of_the_evaluation_counts_every_arm():
    assert len(runs.REQUIRED_METRICS["evaluation"]) == 4 * 20 + 1
    assert "separate/own_item_retrieval@10" in runs.REQUIRED_METRICS["evaluation"]
    assert (
        "parity_gap_ok" in runs.REQUIRED_METRICS["audit"]
        and len(runs.REQUIRED_METRICS["audit"]) == 12
    )
    stages = {runs.metrics_name(stage.name) for stage in params.STAGES}
    assert set(runs.REQUIRED_METRICS) <= stages


@pytest.mark.parametrize(
    "value",
    [float("nan"), np.float64("inf"), torch.tensor(float("nan")), {"a": 1}, [1], None, np.ones(2)],
)
def test_metrics_refuse_what_is_not_a_finite_scalar(notebooks, value):
    with pytest.raises(ValueError, match="metric 'bad'"):
        runs.start("data", namespace("data")).metrics({"good": 1, "bad": value})


def test_results_are_written_and_required(notebooks):
    stage = runs.start("data", namespace("data"))
    stage.result("share", 0.5, arm="a", against="b", group="new", low=0.1, high=0.9, n=4, seeds=1)
    with pytest.raises(ValueError, match="'share'.*given twice"):
        stage.results(
            [{"measure": "share", "value": 1, "arm": "a", "against": "b", "group": "new"}]
        )
    with pytest.raises(ValueError, match="no result n_users, n_items, n_interactions"):
        stage.finish()
    names = ["n_users", "n_items", "n_interactions"]
    stage.results(pd.DataFrame({"measure": names, "value": [1, 2, 3]}))
    stage.finish()
    table = runs.read_results("smoke", "data")
    assert runs.value(table, "n_items") == 2 and len(table) == 4
    assert runs.up_to_date("data", Params())


def test_reading_what_is_not_there(house):
    assert runs.read_manifest("new") == {"run": "new", "stages": {}}
    with pytest.raises(RuntimeError, match="ppo.json is missing"):
        runs.read_metrics("new", "ppo")
    write_atomic(house.runs / "new" / "manifest.json", '{"run": ')
    with pytest.raises(RuntimeError, match="manifest.json: not valid JSON"):
        runs.read_manifest("new")


def test_up_to_date_needs_the_key_and_every_file(notebooks):
    assert not runs.up_to_date("data", Params())
    folder = finish_data().folder
    assert runs.up_to_date("data", Params())
    assert not runs.up_to_date("data", Params(ppo_users=0.4))
    for name in ("artifacts/items.parquet", "metrics/data.json"):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(original + b" ")
        assert not runs.up_to_date("data", Params()), name
        (folder / name).unlink()
        assert not runs.up_to_date("data", Params()), name
        (folder / name).write_bytes(original)
    assert runs.up_to_date("data", Params())


def test_a_changed_input_makes_the_reader_run_again(notebooks):
    finish_data()
    stage = runs.start("ranker", namespace("ranker"))
    stage.load_table("items")
    stage.metrics(dict.fromkeys(runs.REQUIRED_METRICS["ranker"], 0.0))
    stage.finish()
    assert runs.up_to_date("ranker", Params())
    (stage.folder / "artifacts" / "items.parquet").write_bytes(b"other")
    assert not runs.up_to_date("ranker", Params())


def test_importing_the_run_folder_does_not_load_torch():
    """The runner decides within a second that nothing has to be done."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from recrl_lib.pipeline import execute as runner; sys.exit('torch' in sys.modules)",
        ],
        cwd=paths.ROOT,
    )
    assert done.returncode == 0
