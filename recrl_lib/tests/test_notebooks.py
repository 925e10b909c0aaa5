"""Rules that every notebook of the study obeys, and for each rule a notebook that breaks it.

A rule yields the problems of a notebook: its JSON, with ``"name"`` added, the file's name. ``make
test`` runs this file last, over what nbval has just executed.
"""

import ast
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from recrl_lib import params, paths
from recrl_lib.provenance import read_notebook, source, tags
from recrl_lib.tests.conftest import code, markdown, notebook

CHECKED = "nbval-check-output"
TEXTS = ("text/plain", "text/html", "text/markdown", "text/latex")
Rule = Callable[[dict], Iterator[str]]


def cells(nb: dict, kind: str = "code") -> list[dict]:
    return [cell for cell in nb["cells"] if cell["cell_type"] == kind]


def label(cell: dict) -> str:
    return f"[{cell.get('execution_count')}] {source(cell)[:40]!r}"


def texts(cell: dict, kinds: tuple[str, ...] = TEXTS) -> Iterator[str]:
    """The text in a cell's outputs, without embedded images."""
    for output in cell.get("outputs", []):
        found = [output["text"]] if output["output_type"] == "stream" else []
        found += [text for kind, text in output.get("data", {}).items() if kind in kinds]
        for text in found:
            yield re.sub(r"data:[\w/+.-]+;base64,[\w/+=\s]+", "", "".join(text))


def stage_of(nb: dict) -> str:
    return next((stage.name for stage in params.STAGES if stage.notebook == nb["name"]), "")


def numbered_title(nb: dict) -> Iterator[str]:
    title = source(nb["cells"][0]) if nb["cells"][0]["cell_type"] == "markdown" else ""
    if not re.match(rf"# {nb['name'][:2]}\b.*\w", title):
        yield f"the first cell must be a heading '# {nb['name'][:2]} ...'"


def parameters_are_those_of_the_stage(nb: dict) -> Iterator[str]:
    found = [source(cell) for cell in nb["cells"] if "parameters" in tags(cell)]
    if found != [params.parameters_cell(stage_of(nb))]:
        yield f"the parameters cell is not params.parameters_cell({stage_of(nb)!r})"


def executed_in_order(nb: dict) -> Iterator[str]:
    counts = [cell["execution_count"] for cell in cells(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}, not 1, 2, ...: publish it"


def clean_outputs(nb: dict) -> Iterator[str]:
    for cell in cells(nb):
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield f"{label(cell)} stores {output.get('name') or 'error'}"
            if any("widget" in kind for kind in output.get("data", {})):
                yield f"{label(cell)} stores a widget"
        if any(mark in text for text in texts(cell) for mark in ("\r", "it/s", "s/it", "%|")):
            yield f"{label(cell)} stores a progress bar"
        # A table is stored as HTML and again as plain text, which is the one that is read.
        longest = max((text.count("\n") + 1 for text in texts(cell, TEXTS[:1])), default=0)
        if longest > 100:
            yield f"{label(cell)} prints {longest} lines, more than 100"


def plain_metadata(nb: dict) -> Iterator[str]:
    if nb["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec is not python3"
    if any("papermill" in part["metadata"] for part in (nb, *nb["cells"])):
        yield "papermill metadata is stored: publish it"
    if any("injected-parameters" in tags(cell) for cell in nb["cells"]):
        yield "a cell with injected parameters is stored"


def short_cells(nb: dict) -> Iterator[str]:
    written = [source(cell) for cell in cells(nb) if "parameters" not in tags(cell)]
    lengths = [len(text.splitlines()) for text in written]
    if max(lengths) > 30 or statistics.median(lengths) > 8:
        yield f"code cells have up to {max(lengths)} lines, median {statistics.median(lengths)}"


def no_classes(nb: dict) -> Iterator[str]:
    for cell in cells(nb):
        tree = ast.parse(TransformerManager().transform_cell(source(cell)))
        if any(isinstance(node, ast.ClassDef) for node in ast.walk(tree)):
            yield f"{label(cell)} defines a class"


def prose_before_code(nb: dict) -> Iterator[str]:
    for before, cell in zip(nb["cells"], nb["cells"][1:]):
        near_parameters = "parameters" in tags(before) + tags(cell)
        if before["cell_type"] == cell["cell_type"] == "code" and not near_parameters:
            yield f"{label(cell)} has no markdown cell before it"


def checked_outputs(nb: dict) -> Iterator[str]:
    checked = [cell for cell in cells(nb) if CHECKED in tags(cell)]
    empty = [cell for cell in checked if not any(t.strip() for t in texts(cell, TEXTS[:1]))]
    yield from (f"{label(cell)} is tagged {CHECKED} and prints nothing" for cell in empty)
    if len(checked) - len(empty) < 2:
        yield f"{len(checked) - len(empty)} cells with output are tagged {CHECKED}, 2 are needed"


def starts_and_finishes(nb: dict) -> Iterator[str]:
    written = [source(cell) for cell in cells(nb)]
    if stage_of(nb) == "explore" and not any("runs.start(" in text for text in written):
        return
    if not any(f'runs.start("{stage_of(nb)}", globals())' in text for text in written):
        yield "it does not start its stage"
    if "stage.finish()" not in written[-1]:
        yield "the last code cell does not call stage.finish()"


ABSOLUTE = re.compile(r"(?<![\w:/.<~\\])/(?:[\w.+-]+/)+[\w.+-]+|(?<!\w)[A-Za-z]:\\{1,2}\w")


def no_machine_paths(nb: dict) -> Iterator[str]:
    """Absolute paths differ from one machine to the next, and tell whose it was."""
    for cell in nb["cells"]:
        for text in [source(cell) if cell["cell_type"] == "code" else "", *texts(cell)]:
            yield from (f"{label(cell)} holds the path {path}" for path in ABSOLUTE.findall(text))


DECIMAL = re.compile(r"(?<![\w.§])\d*\.\d+(?!\.?\d)")
# Code, links, paper numbers, and the numbers of sections are not results.
NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv:?\s*\d+\.\d+|^#+ +\d+\.\d+|"
    r"\bsections? +\d+\.\d+",
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)


def prose_numbers_are_checked(nb: dict) -> Iterator[str]:
    """A result quoted in prose stands in an output that nbval compares, or it may become false."""
    checked = (cell for cell in cells(nb) if CHECKED in tags(cell))
    outputs = (text for cell in checked for text in texts(cell, TEXTS[:1]))
    printed = {float(number) for text in outputs for number in DECIMAL.findall(text)}
    for cell in cells(nb, "markdown"):
        for number in DECIMAL.findall(NOT_PROSE.sub(" ", source(cell))):
            if float(number) not in printed:
                yield f"the prose says {number}, which no checked cell prints"


RULES: tuple[Rule, ...] = (
    numbered_title, parameters_are_those_of_the_stage, executed_in_order, clean_outputs,
    plain_metadata, short_cells, no_classes, prose_before_code, checked_outputs,
    starts_and_finishes, no_machine_paths, prose_numbers_are_checked,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("stage", params.STAGES, ids=lambda stage: stage.name)
def test_rule(stage, rule):
    nb = read_notebook(paths.NOTEBOOKS / stage.notebook)
    problems = list(rule({**nb, "name": stage.notebook}))
    assert not problems, f"{stage.notebook}: " + "; ".join(problems)


def good() -> dict:
    nb = notebook(
        markdown("# 01 · Data\nThe share is 0.25, see arXiv:2601.03608 and `0.99`, version 1.2.3."),
        code(params.parameters_cell("data"), "parameters", count=1),
        code('from recrl_lib import runs\nstage = runs.start("data", globals())', count=2),
        markdown("Facts."),
        code("print(share)", CHECKED, output="share 0.250\n", count=3),
        markdown("## 1.2 More facts\nThe same 3 x .25x, as in section 1.1."),
        code("print(n)", CHECKED, output="n 12 </td> https://a.org/b/c ../a/b/c ~/x/y\n", count=4),
        markdown("The end."),
        code("stage.finish()", count=5),
    )
    return {**nb, "name": "01_data.ipynb"}


def edit(index: int, **values) -> Callable[[dict], None]:
    return lambda nb: nb["cells"][index].update(values)


def printed(text: str, name: str = "stdout") -> Callable[[dict], None]:
    return edit(4, outputs=[{"output_type": "stream", "name": name, "text": [text]}])


def shown(kind: str, text: str) -> Callable[[dict], None]:
    return edit(4, outputs=[{"output_type": "display_data", "metadata": {}, "data": {kind: text}}])


BROKEN: list[tuple[Rule, Callable[[dict], None], str]] = [
    (numbered_title, edit(0, source="# 02 · Data"), "# 01"),
    (parameters_are_those_of_the_stage, edit(1, source="seed = 1"), "is not params"),
    (executed_in_order, edit(4, execution_count=7), "counts"),
    (clean_outputs, edit(4, outputs=[{"output_type": "error", "traceback": []}]), "stores error"),
    (clean_outputs, printed("W", name="stderr"), "stores stderr"),
    (clean_outputs, printed("a\rb"), "bar"),
    (clean_outputs, shown("application/vnd.jupyter.widget-view+json", ""), "widget"),
    (clean_outputs, printed("\n".join("x" * 101)), "101 lines"),
    (plain_metadata, lambda nb: nb["metadata"]["kernelspec"].update(name="mine"), "python3"),
    (plain_metadata, lambda nb: nb["metadata"].update(papermill={}), "papermill"),
    (plain_metadata, edit(4, metadata={"tags": ["injected-parameters"]}), "injected"),
    (short_cells, edit(4, source="\n".join("x" * 31)), "31 lines"),
    (short_cells, lambda nb: [edit(i, source="\n".join("x" * 9))(nb) for i in (2, 4, 6)], "median"),
    (no_classes, edit(4, source="%time\nif True:\n    class A:\n        pass"), "class"),
    (prose_before_code, lambda nb: nb["cells"].pop(3), "no markdown"),
    (checked_outputs, edit(4, metadata={}), "1 cells"),
    (checked_outputs, edit(4, outputs=[]), "prints nothing"),
    (starts_and_finishes, edit(8, source="print()"), "finish"),
    (starts_and_finishes, edit(2, source='runs.start("ranker", globals())'), "start"),
    (no_machine_paths, edit(4, source='open("/home/me/x.csv")'), "/home/me/x.csv"),
    (no_machine_paths, shown("text/html", "<b>/srv/data</b>"), "/srv/data"),
    (no_machine_paths, printed(r"C:\Users\me"), "C:"),
    (prose_numbers_are_checked, edit(0, source="# 01 · Data\nIt is .26"), ".26"),
    (prose_numbers_are_checked, edit(5, source="## 1.2 More facts: 7.5"), "7.5"),
]


@pytest.mark.parametrize("rule, change, words", BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_notebook_is_named(rule, change, words):
    nb = good()
    assert list(rule(nb)) == []
    change(nb)
    problems = list(rule(nb))
    assert any(words in problem for problem in problems), problems


def test_every_rule_is_seen_to_fire_and_every_notebook_is_a_stage():
    assert {rule for rule, _, _ in BROKEN} == set(RULES)
    files = sorted(file.name for file in paths.NOTEBOOKS.glob("*.ipynb"))
    assert files == [stage.notebook for stage in params.STAGES]


# Folders that a run creates, which a clean checkout does not have.
GENERATED = ("runs/", "figures/", "metrics/", "curves/", "artifacts/", "logs/", ".venv/")
SUFFIXES = ("/", ".py", ".ipynb", ".md", ".yml", ".yaml", ".toml", ".cff")


def test_every_path_in_the_readme_exists():
    """In links and in backticks."""
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s:]+)\)", prose)}
    spans = re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", prose)
    files = {s for s in spans if s.endswith(SUFFIXES) or ("/" in s and "." in Path(s).name)}
    published = ("runs/reference", "figures/reference")
    named = {p for p in links | files if p.startswith(published) or not p.startswith(GENERATED)}
    folders = (paths.ROOT, paths.LIBRARY, paths.NOTEBOOKS)
    assert not [p for p in sorted(named) if p and not any((f / p).exists() for f in folders)]
