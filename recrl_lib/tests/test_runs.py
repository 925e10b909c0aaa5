"""The run folder: what is written, what is refused, and what makes a stage run again."""

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
    with pytest.raises(ValueError, match="has seed 0, not 4: give the new seed a run of its own"):
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


def finish_results(stage, rows):
    stage.results({"measure": name, "value": 1} for name in runs.REQUIRED_MEASURES[stage.name])
    stage.results(rows)
    stage.finish()


def test_results_come_back_as_they_were(notebooks):
    stage = runs.start("data", namespace("data"))
    stage.result("share", 0.1 + 0.2, arm="a", against="b", group="new_items", low=-0.1, n=4)
    stage.result("share", np.float32(0.1), arm="a", seeds=3)
    rows = [{"measure": "ok", "value": True}, {"measure": "t", "value": torch.tensor(2)}]
    finish_results(stage, pd.DataFrame(rows))
    lines = (stage.folder / "metrics" / "data.csv").read_text().splitlines()
    assert lines[:3] == [
        "arm,against,group,measure,value,low,high,n,seeds",
        "a,b,new_items,share,0.30000000000000004,-0.1,,4,",
        "a,,all,share,0.10000000149011612,,,,3",
    ]
    table = runs.read_results("smoke", "data")
    assert runs.value(table, "share", "a", "b", "new_items") == 0.1 + 0.2
    assert runs.value(table, "ok") == 1 and runs.value(table, "t") == 2
    row = table.iloc[1]
    assert row["against"] == "" and np.isnan(row["low"]) and row["seeds"] == 3
    assert not (stage.folder / "metrics" / "data.json").exists()
    assert runs.up_to_date("data", Params())


def test_one_value_is_taken_from_results_or_none():
    table = pd.DataFrame(
        [("a", "", "all", "m", 1.0)] * 2, columns=["arm", "against", "group", "measure", "value"]
    )
    for arm, count in (("a", 2), ("b", 0)):
        with pytest.raises(ValueError, match=f"arm='{arm}', .*measure='m'.*{count} results"):
            runs.value(table, "m", arm)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"value": float("nan")}, "value=nan must be a finite number"),
        ({"value": None}, "has no value"),
        ({"value": "much"}, "value='much' must be a finite number"),
        ({"value": [1]}, "must be a finite number"),
        ({"value": 1, "low": float("inf")}, "low=inf"),
        ({"value": 1, "lo": 0}, "unknown columns lo"),
        ({"value": 1, "passed": 1}, "unknown columns passed"),
        ({"value": 1, "arm": None}, "arm must be text"),
        ({"value": 1, "arm": "taken"}, "given twice"),
    ],
)
def test_bad_results_are_refused_with_their_row(notebooks, row, words):
    stage = runs.start("data", namespace("data"))
    stage.result("bad", 1, arm="taken")
    with pytest.raises(ValueError, match=f"^result .*bad.*{words}"):
        stage.results([{"measure": "bad", **row}])


def test_finish_names_missing_results(notebooks):
    stage = runs.start("data", namespace("data"))
    stage.result("n_users", 3)
    with pytest.raises(ValueError, match="no result n_items, n_interactions"):
        stage.finish()
    assert set(runs.REQUIRED_MEASURES) <= {stage.name for stage in params.STAGES}


def test_every_arm_of_the_evaluation_needs_its_results(notebooks, monkeypatch):
    monkeypatch.setattr(runs, "_check_needs", lambda *a: None)
    monkeypatch.setattr(runs, "stage_key", lambda *a, **k: "key")
    stage = runs.start("evaluation", namespace("evaluation"))
    needed = [(arm, name) for arm in runs.ARMS for name in runs.REQUIRED_MEASURES["evaluation"]]
    stage.results({"measure": m, "value": 0, "arm": arm} for arm, m in needed[:-1])
    with pytest.raises(ValueError, match="no result finished of shielded$"):
        stage.finish()


def test_reading_what_is_not_there(house):
    assert runs.read_manifest("new") == {"run": "new", "stages": {}}
    with pytest.raises(RuntimeError, match="ppo.json is missing"):
        runs.read_metrics("new", "ppo")
    with pytest.raises(RuntimeError, match="data.csv is missing: run notebooks/01_data.ipynb"):
        runs.read_results("new", "data")
    write_atomic(house.runs / "new" / "manifest.json", '{"run": ')
    with pytest.raises(RuntimeError, match="manifest.json: not valid JSON"):
        runs.read_manifest("new")


def test_git_state(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True
        )

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert runs.git_state() == (None, None)
    git("init")
    assert runs.git_state() == (None, None)
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    commit, dirty = runs.git_state()
    assert len(commit) == 40 and dirty is False
    (tmp_path / "file").write_text("2")
    assert runs.git_state() == (commit, True)
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(paths, "ROOT", tmp_path / "inner")
    assert runs.git_state() == (None, None)


# ------------------------------------------------------------------------------------------ what reruns a stage


@pytest.fixture
def library(notebooks, monkeypatch):
    """A toy library: the notebook imports a, which reaches b, c and d by three import forms; e is not reached."""
    folder = notebooks.root / "recrl_lib"
    files = {
        "__init__.py": "",
        "a.py": "from . import b\ndef f():\n    from .c import g  # inside a function\n",
        "b.py": "import numpy",
        "c.py": "import recrl_lib.sub.d\ng = 1",
        "e.py": "x = 1",
        "f.py": "x = 1",
        "sub/__init__.py": "",
        "sub/d.py": "from ..f import x",
        "policy.yaml": "limit: 1",
    }
    for name, text in files.items():
        write_atomic(folder / name, text)
    monkeypatch.setattr(paths, "LIBRARY", folder)
    notebooks.write("data", "%matplotlib inline\nfrom recrl_lib import a")
    notebooks.write("ranker", "pass")
    notebooks.write("audit", "pass")
    notebooks.write("evaluation", "pass")
    for stage in ("explainer", "shield", "shielded_ppo"):
        notebooks.write(stage, "pass")
    return folder


def closure_names(code):
    return {name.removeprefix("recrl_lib") for name in runs.library_closure(code)}


def test_the_closure_follows_every_import_form(library):
    assert closure_names("from recrl_lib import a") == {
        "",
        ".a",
        ".b",
        ".c",
        ".sub",
        ".sub.d",
        ".f",
    }
    assert closure_names("import recrl_lib.e as anything\n!ls") == {"", ".e"}
    assert closure_names("from recrl_lib.sub.d import x") == {"", ".sub", ".sub.d", ".f"}
    assert closure_names("from recrl_lib.sub import d") == {"", ".sub", ".sub.d", ".f"}
    assert closure_names("import numpy, recrl_library") == set()
    assert runs.library_closure(
        "%%time\nx = 1", "%%time\nfrom recrl_lib import e"
    ) == runs.library_closure("import recrl_lib.e")


def test_a_syntax_error_names_notebook_and_module(library):
    write_atomic(library / "f.py", "def (")
    with pytest.raises(ValueError, match=r"01_data.ipynb or a module.*recrl_lib.f, line 1"):
        runs.stage_key("data", Params())


def test_prose_is_no_part_of_a_digest_and_code_is():
    def digest(text):
        return runs._scan(text, "recrl_lib.x", False)[0]

    code = 'def f(x):\n    """{}"""\n    return x + {}\n'
    assert (
        digest(code.format("One.", 1))
        == digest(code.format("Two.", 1))
        != digest(code.format("One.", 2))
    )


def test_a_data_set_loader_is_in_the_closure_of_what_loads_it():
    assert ".data.ml100k" in closure_names("from recrl_lib import data")


def test_the_closure_of_the_real_library():
    closure = closure_names("from recrl_lib import runs")
    assert closure == {"", ".runs", ".params", ".paths"}


def changed(stage, edit):
    before = runs.stage_key(stage, Params())
    edit()
    return runs.stage_key(stage, Params()) != before


@pytest.mark.parametrize(
    "file, expected",
    [("a.py", True), ("c.py", True), ("f.py", True), ("e.py", False), ("policy.yaml", False)],
)
def test_an_edit_matters_only_inside_the_closure(library, file, expected):
    assert changed("data", lambda: write_atomic(library / file, "y = 2")) is expected


def test_comments_do_not_matter_and_data_files_matter_to_those_who_read_them(library):
    assert not changed("data", lambda: write_atomic(library / "e.py", "x  = 1  # why"))
    assert not changed("data", lambda: write_atomic(library / "f.py", "x  = 1  # why"))
    assert changed("audit", lambda: write_atomic(library / "policy.yaml", "limit: 2"))


def test_a_change_reaches_the_stages_downstream(library):
    assert changed("ranker", lambda: write_atomic(library / "a.py", "y = 2"))
    assert not changed("environment", lambda: write_atomic(library / "a.py", "y = 3"))


def test_only_owned_parameters_matter_and_the_name_of_the_run_does_not(library):
    base = runs.stage_key("ranker", Params())
    assert runs.stage_key("ranker", Params(run="other", ppo_steps=9)) == base
    keys = {
        runs.stage_key("ranker", p)
        for p in (Params(seed=1), Params(ranker_dim=32), Params(ppo_users=0.4))
    }
    assert len(keys | {base}) == 4


def test_the_files_of_a_data_folder_matter_to_the_data(library, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "items.csv").write_text("item,title\n")
    given = Params(data_dir=str(folder))
    before = {stage: runs.stage_key(stage, given) for stage in ("environment", "data", "ranker")}
    assert before["data"] == runs.stage_key("data", given) != runs.stage_key("data", Params())
    (folder / "items.csv").write_text("item,title,year\n")
    assert {stage: runs.stage_key(stage, given) == key for stage, key in before.items()} == {
        "environment": True,
        "data": False,
        "ranker": False,
    }


def test_of_a_notebook_only_the_code_matters(library):
    path = paths.NOTEBOOKS / "01_data.ipynb"
    content = json.loads(path.read_text())

    def edit(change):
        change(content["cells"])
        path.write_text(json.dumps(content))

    assert not changed("data", lambda: edit(lambda cells: cells[0].update(source="# new title")))
    assert not changed("data", lambda: edit(lambda cells: cells[1].update(source="seed = 1")))
    assert not changed(
        "data", lambda: edit(lambda cells: cells[-1].update(outputs=[1], execution_count=7))
    )
    assert changed("data", lambda: edit(lambda cells: cells[-1].update(source="x = 1")))


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
