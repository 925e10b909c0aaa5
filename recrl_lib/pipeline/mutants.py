"""``make mutants``: the share of small faults that the tests of their package notice.

Lines are drawn by a seed; on each, one of cosmic-ray's faults is planted in a copy of what git has.
"""

import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import cosmic_ray.plugins as kinds
import pytest
import sentence_transformers  # noqa: F401  (slow to import: the tests run in forks of this process)
import trl.trainer.sft_trainer  # noqa: F401
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from recrl_lib.paths import ROOT

PACKAGES, FAULTS, SEED, SECONDS = ("scoring", "evaluation", "training", "shield"), 80, 0, 300
LEFT_OUT = ("core/RemoveDecorator", "core/ReplaceBinaryOperator_BitOr")  # no_grad; types "A | B"
QUICK = "not three_lines and not killed and not processes"  # those start processes of their own


def passes(package: str, module: str = "") -> bool:
    def run_tests() -> None:
        for name in [name for name in sys.modules if name.startswith("recrl_lib")]:
            del sys.modules[name]  # the copy has its own
        folder = Path("recrl_lib/tests", package)
        own = [str(folder / name) for name in (f"test_{module}.py", "") if (folder / name).exists()]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(pytest.main(["-x", "-p", "no:cacheprovider", "-k", QUICK, *own]))

    process = multiprocessing.get_context("fork").Process(target=run_tests)
    process.start()
    process.join(SECONDS)
    process.kill()
    return process.exitcode == 0


def main(copy: str) -> None:
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={copy}/"], cwd=ROOT, check=True)
    os.chdir(copy)
    sys.path.insert(0, copy)
    os.environ["PYTHONPATH"], sys.dont_write_bytecode = copy, True
    if failing := [package for package in PACKAGES if not passes(package)]:
        sys.exit(f"tests fail without a fault: {', '.join(failing)}")
    used = [kinds.get_operator(n) for n in kinds.operator_names() if not n.startswith(LEFT_OUT)]
    draw, places, unnoticed = random.Random(SEED), {}, 0  # (file, line) -> [(kind, its number)]
    for path in sorted(path for name in PACKAGES for path in Path("recrl_lib", name).glob("*.py")):
        nodes = list(ast_nodes(get_ast(path.read_text(encoding="utf-8"))))
        for kind in (kind for kind in used if not kind.arguments()):
            found = [place for node in nodes for place in kind().mutation_positions(node)]
            for number, ((line, _), _) in enumerate(found):
                places.setdefault((path, line), []).append((kind, number))
    for path, line in draw.sample(sorted(places), FAULTS):
        text, (kind, number) = path.read_text(encoding="utf-8"), draw.choice(places[path, line])
        planted = mutate_code(text, kind(), number)
        path.write_text(planted, encoding="utf-8")
        if passes(path.parent.name, path.stem):
            unnoticed += 1
            print(f"{path}:{line}: {planted.splitlines()[line - 1].strip()}", flush=True)
        path.write_text(text, encoding="utf-8")
    print(f"{FAULTS - unnoticed} of {FAULTS} planted faults noticed, {1 - unnoticed / FAULTS:.0%}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
