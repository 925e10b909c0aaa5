"""What no other test runs still has to name things that exist: benches, notebooks' long paths, what a GPU alone reaches."""

import ast
import importlib
import json

import pytest

from recrl_lib import paths

FILES = sorted(paths.LIBRARY.glob("*.py")) + sorted(paths.NOTEBOOKS.glob("*.ipynb"))


def missing(source: str) -> list[str]:
    """``module.name`` of the library's modules that ``source`` uses and that do not exist."""
    tree, modules = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "recrl_lib":
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    used = {
        (modules[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }
    return sorted(f"{module}.{name}" for module, name in used if not hasattr(importlib.import_module(f"recrl_lib.{module}"), name))


def test_a_name_that_has_moved_is_found():
    assert missing("from recrl_lib import ppo, shield as sh\nppo.gae_of_old(sh.Shield, ppo.PPO)") == ["ppo.gae_of_old"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_name_of_another_module_exists(file):
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        source = "\n".join("".join(cell["source"]) for cell in json.loads(source)["cells"] if cell["cell_type"] == "code")
    assert missing(source) == []
