"""What decides a stage's key: code, parameters, files and earlier stages, and nothing else."""

import json
import subprocess

import pytest

from recrl_lib import paths, provenance
from recrl_lib.params import STAGES, Params
from recrl_lib.provenance import library_closure, stage_key
from recrl_lib.runs import write_atomic

TOY = {
    "__init__.py": "",
    "a.py": "from . import b\ndef f():\n    from .c import g  # inside a function\n",
    "b.py": "import numpy",
    "c.py": "import toy_lib.sub.d\ng = 1",
    "e.py": "x = 1",
    "f.py": "x = 1",
    "sub/__init__.py": "",
    "sub/d.py": "from ..f import x",
    "policy.yaml": "limit: 1",
}


@pytest.fixture
def toy(house, monkeypatch):
    """A toy library whose module a reaches b, c, sub.d and f; notebook 01 imports a."""
    folder = house.root / "toy_lib"
    for name, text in TOY.items():
        write_atomic(folder / name, text)
    monkeypatch.setattr(paths, "LIBRARY", folder)
    monkeypatch.setattr(provenance, "PACKAGE", "toy_lib")
    monkeypatch.syspath_prepend(str(house.root))
    for stage in STAGES:
        house.write(stage.name, "pass")
    house.write("data", "%matplotlib inline\nfrom toy_lib import a")
    return folder


ALL = {"", ".a", ".b", ".c", ".sub", ".sub.d", ".f"}


@pytest.mark.parametrize(
    "code, expected",
    [
        ("from toy_lib import a", ALL),
        ("import toy_lib.e as anything\n!ls", {"", ".e"}),
        ("from toy_lib.sub.d import x", {"", ".sub", ".sub.d", ".f"}),
        ("from toy_lib.sub import d", {"", ".sub", ".sub.d", ".f"}),
        ("import numpy, toy_library", set()),
        ("%%time\nfrom toy_lib import e", {"", ".e"}),
        ("%%bash\nfrom toy_lib import e (not Python)", set()),
        ("for i in range(2):\n    %time x = i\nfrom toy_lib import e", {"", ".e"}),
    ],
)
def test_the_closure_follows_every_form_of_import(toy, code, expected):
    assert {name.removeprefix("toy_lib") for name in library_closure([code])} == expected


@pytest.mark.parametrize("file", ["f.py", "notebook"])
def test_a_syntax_error_names_notebook_and_place(toy, house, file):
    if file == "notebook":
        house.write("data", "def (")
    else:
        write_atomic(toy / file, "def (")
    with pytest.raises(ValueError, match=rf"01_data.ipynb or a module.*{file}.*line 1"):
        stage_key("data", Params())


def changed(stage, edit):
    before = stage_key(stage, Params())
    edit()
    return stage_key(stage, Params()) != before


@pytest.mark.parametrize(
    "stage, file, text, expected",
    [
        ("data", "a.py", "y = 2", True),
        ("data", "c.py", "y = 2", True),
        ("data", "f.py", "x = 2", True),
        ("data", "f.py", '"""Prose."""\nx  = 1  # why', False),
        ("data", "e.py", "x = 2", False),
        ("data", "policy.yaml", "limit: 2", False),
        ("audit", "policy.yaml", "limit: 2", True),
        ("ranker", "a.py", "y = 2", True),
        ("environment", "a.py", "y = 2", False),
    ],
)
def test_an_edit_changes_the_keys_that_it_can_reach(toy, stage, file, text, expected):
    write_atomic(toy / "f.py", '"""Words."""\nx = 1')
    assert changed(stage, lambda: write_atomic(toy / file, text)) is expected


def test_another_version_of_a_package_changes_every_key(toy, monkeypatch):
    def upgrade():
        monkeypatch.setattr(provenance, "package_version", lambda name: "99")

    assert changed("environment", upgrade)


def test_only_owned_parameters_matter_and_the_name_of_the_run_does_not(toy):
    base = stage_key("ranker", Params())
    assert stage_key("ranker", Params(run="other", ppo_steps=9)) == base
    others = (Params(seed=1), Params(ranker_dim=32), Params(ppo_users=0.4))
    assert len({stage_key("ranker", p) for p in others} | {base}) == 4


def test_the_contents_of_a_data_folder_matter_to_the_data_and_what_follows(toy, tmp_path):
    folder = tmp_path / "given"
    write_atomic(folder / "items.csv", "item,title\n")
    given = Params(data_dir=str(folder))
    before = {stage: stage_key(stage, given) for stage in ("environment", "data", "ranker")}
    write_atomic(folder / "items.csv", "item,title\n")
    assert stage_key("data", given) == before["data"] != stage_key("data", Params())
    write_atomic(folder / "items.csv", "item,name!\n")
    same = {stage for stage, key in before.items() if stage_key(stage, given) == key}
    assert same == {"environment"}


def test_a_new_run_of_a_batch_matters_to_the_ablations(toy, house):
    path = house.runs / "smoke-smoke-main-seed0" / "metrics" / "evaluation.csv"
    assert changed("ablations", lambda: write_atomic(path, "x"))
    assert not changed("evaluation", lambda: write_atomic(path, "y"))


@pytest.mark.parametrize(
    "cell, change, expected",
    [
        (0, {"source": "# new title"}, False),
        (1, {"source": "seed = 1"}, False),  # the parameters cell
        (-1, {"outputs": [1], "execution_count": 7}, False),
        (-1, {"source": ["x = ", "1"]}, True),
    ],
)
def test_of_a_notebook_only_the_code_matters(toy, cell, change, expected):
    path = paths.NOTEBOOKS / "01_data.ipynb"

    def edit():
        content = json.loads(path.read_text())
        content["cells"][cell].update(change)
        path.write_text(json.dumps(content))

    assert changed("data", edit) is expected


def test_git_state(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert provenance.git_state() == (None, None)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    commit, dirty = provenance.git_state()
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("2")
    assert provenance.git_state() == (commit, True)
    monkeypatch.setattr(paths, "ROOT", tmp_path / "inner")
    assert provenance.git_state() == (None, None)
