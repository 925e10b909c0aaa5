"""The meta-test: rules that every notebook of the study obeys, and for each rule a notebook that breaks it.

A rule is a function from a notebook (its JSON, with ``"name"`` added: the file's name) to a list of
problems. ``make test`` runs this file last, over what nbval has just executed.
"""

import ast
import copy
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from recrl_lib import params, paths, runs
from recrl_lib.params import parameters_cell
from recrl_lib.pipeline import execute
from recrl_lib.tests.conftest import code, markdown, notebook

FILES = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
CHECKED = "nbval-check-output"
TEXT_TYPES = ("text/plain", "text/html", "text/markdown", "text/latex")

Rule = Callable[[dict], list[str]]


def cells_of(nb: dict, kind: str) -> list[dict]:
    return [cell for cell in nb["cells"] if cell["cell_type"] == kind]


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def texts(cell: dict, kinds: tuple[str, ...] = TEXT_TYPES) -> Iterator[str]:
    """The text in a cell's outputs, without embedded images."""
    for output in cell.get("outputs", []):
        found = [output["text"]] if output["output_type"] == "stream" else []
        found += [text for kind, text in output.get("data", {}).items() if kind in kinds]
        found += output.get("traceback", [])
        yield from (re.sub(r"data:[\w/+.-]+;base64,[\w/+=\s]+", "", joined(text)) for text in found)


def label(cell: dict) -> str:
    return f"[{cell.get('execution_count')}] {runs.source(cell)[:40]!r}"


def stage_of(nb: dict) -> params.Stage | None:
    return next((stage for stage in params.STAGES if stage.notebook == nb["name"]), None)


# ------------------------------------------------------------------------------------------ rules


def numbered_title(nb: dict) -> list[str]:
    first = nb["cells"][0]
    title = (
        re.match(r"# (\d\d)\b.*\w", runs.source(first))
        if first["cell_type"] == "markdown"
        else None
    )
    if title is None or title[1] != nb["name"][:2]:
        return [f"the first cell must be a heading '# {nb['name'][:2]} · ...'"]
    return []


def belongs_to_a_stage(nb: dict) -> list[str]:
    return [] if stage_of(nb) else [f"{nb['name']} is the notebook of no stage in params.STAGES"]


def parameters_are_those_of_the_stage(nb: dict) -> list[str]:
    """The parameters cell is ``params.parameters_cell``, word for word."""
    stage = stage_of(nb)
    found = [runs.source(cell) for cell in nb["cells"] if "parameters" in runs.tags(cell)]
    if stage is None or found == [parameters_cell(stage.name)]:
        return []
    return [f"the parameters cell is not params.parameters_cell({stage.name!r})"]


def executed_in_order(nb: dict) -> list[str]:
    counts = [cell["execution_count"] for cell in cells_of(nb, "code")]
    return (
        []
        if counts == list(range(1, len(counts) + 1))
        else [f"execution counts are {counts}, not 1, 2, ...: publish it"]
    )


def no_errors_or_stderr(nb: dict) -> list[str]:
    bad = (
        (c, o)
        for c in cells_of(nb, "code")
        for o in c["outputs"]
        if o["output_type"] == "error" or o.get("name") == "stderr"
    )
    return [
        f"{label(cell)} stores {output.get('name') or output['output_type']}"
        for cell, output in bad
    ]


def no_bars_or_widgets(nb: dict) -> list[str]:
    problems = []
    for cell in cells_of(nb, "code"):
        if any(mark in text for text in texts(cell) for mark in ("\r", "it/s", "s/it", "%|")):
            problems.append(f"{label(cell)} stores a progress bar")
        if any("widget" in kind for output in cell["outputs"] for kind in output.get("data", {})):
            problems.append(f"{label(cell)} stores a widget")
    return problems


def short_outputs(nb: dict) -> list[str]:
    # A table is stored as HTML and again as plain text: the longer counts.
    lengths = {
        label(c): max((t.count("\n") + 1 for t in texts(c, ("text/plain",))), default=0)
        for c in cells_of(nb, "code")
    }
    return [
        f"{cell} prints {lines} lines, more than 100"
        for cell, lines in lengths.items()
        if lines > 100
    ]


def plain_kernel_and_metadata(nb: dict) -> list[str]:
    problems = (
        []
        if nb["metadata"].get("kernelspec", {}).get("name") == "python3"
        else ["the kernelspec is not python3"]
    )
    if "papermill" in nb["metadata"] or any(
        "papermill" in cell["metadata"] for cell in nb["cells"]
    ):
        problems.append("papermill metadata is stored: publish it")
    if any("injected-parameters" in runs.tags(cell) for cell in nb["cells"]):
        problems.append("a cell with injected parameters is stored")
    return problems


def short_cells(nb: dict) -> list[str]:
    lengths = [len(runs.source(cell).splitlines()) for cell in cells_of(nb, "code")]
    problems = [f"a code cell has {n} lines, more than 30" for n in lengths if n > 30]
    if statistics.median(lengths) > 8:
        problems.append(f"the median code cell has {statistics.median(lengths)} lines, more than 8")
    return problems


def no_classes(nb: dict) -> list[str]:
    trees = [
        (cell, ast.parse(TransformerManager().transform_cell(runs.source(cell))))
        for cell in cells_of(nb, "code")
    ]
    return [
        f"{label(cell)} defines a class"
        for cell, tree in trees
        if any(isinstance(n, ast.ClassDef) for n in ast.walk(tree))
    ]


def prose_before_code(nb: dict) -> list[str]:
    problems = []
    for before, cell in zip(nb["cells"], nb["cells"][1:]):
        near_parameters = "parameters" in runs.tags(before) + runs.tags(cell)
        if before["cell_type"] == cell["cell_type"] == "code" and not near_parameters:
            problems.append(f"{label(cell)} has no markdown cell before it")
    return problems


def checked_outputs(nb: dict) -> list[str]:
    checked = [cell for cell in cells_of(nb, "code") if CHECKED in runs.tags(cell)]
    filled = [
        cell for cell in checked if any(text.strip() for text in texts(cell, ("text/plain",)))
    ]
    problems = [
        f"{label(cell)} is tagged {CHECKED} and prints nothing"
        for cell in checked
        if cell not in filled
    ]
    if len(filled) < 2:
        problems.append(
            f"{len(filled)} cells with output are tagged {CHECKED}; at least 2 are needed"
        )
    return problems


def finishes_its_stage(nb: dict) -> list[str]:
    stage, sources = stage_of(nb), [runs.source(cell) for cell in cells_of(nb, "code")]
    if stage and stage.name == "explore" and not any("runs.start(" in text for text in sources):
        return []
    problems = (
        []
        if any(stage and f'runs.start("{stage.name}", globals())' in text for text in sources)
        else ["it does not start its stage"]
    )
    return problems + (
        []
        if "stage.finish()" in sources[-1]
        else ["the last code cell does not call stage.finish()"]
    )


ABSOLUTE = re.compile(r"(?<![\w:/.<~\\])/(?:[\w.+-]+/)+[\w.+-]+|(?<!\w)[A-Za-z]:\\{1,2}\w")


def no_machine_paths(nb: dict) -> list[str]:
    """Absolute paths differ from one machine to the next, and tell whose it was."""
    problems = []
    for cell in nb["cells"]:
        for text in [runs.source(cell) if cell["cell_type"] == "code" else "", *texts(cell)]:
            problems += [
                f"{label(cell)} holds the path {found}" for found in ABSOLUTE.findall(text)
            ]
    return problems


DECIMAL = re.compile(r"(?<![\w.§])\d*\.\d+(?!\.?\d)")
# Code, links, paper numbers, and the numbers of sections are not results.
NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv:?\s*\d+\.\d+|^#+ +\d+\.\d+|\bsections? +\d+\.\d+",
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)


def decimals(text: str) -> dict[float, str]:
    return {float(found): found for found in DECIMAL.findall(text)}


def prose_numbers_are_checked(nb: dict) -> list[str]:
    """A result quoted in prose must stand in an output that nbval compares, or it will come to be false unnoticed."""
    printed: set[float] = set()
    for cell in cells_of(nb, "code"):
        if CHECKED in runs.tags(cell):
            for text in texts(cell, ("text/plain",)):
                printed |= decimals(text).keys()
    problems = []
    for cell in cells_of(nb, "markdown"):
        quoted = decimals(NOT_PROSE.sub(" ", runs.source(cell)))
        problems += [
            f"the prose says {text}, which no checked cell prints"
            for value, text in quoted.items()
            if value not in printed
        ]
    return problems


RULES: tuple[Rule, ...] = (
    numbered_title,
    belongs_to_a_stage,
    parameters_are_those_of_the_stage,
    executed_in_order,
    no_errors_or_stderr,
    no_bars_or_widgets,
    short_outputs,
    plain_kernel_and_metadata,
    short_cells,
    no_classes,
    prose_before_code,
    checked_outputs,
    finishes_its_stage,
    no_machine_paths,
    prose_numbers_are_checked,
)

# Paths that a run creates, which a clean checkout does not have.
GENERATED = ("runs/", "figures/", "metrics/", "curves/", "artifacts/", "logs/", ".venv/")
SOURCE_SUFFIXES = (".py", ".ipynb", ".md", ".yml", ".yaml", ".toml", ".cff")


def named_paths(text: str) -> set[str]:
    """Files that a markdown text names: link targets, and what is in backticks and looks like a path."""
    prose = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    links = {
        target.partition("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", prose)
        if "://" not in target
    }
    spans = {
        span
        for span in re.findall(r"`([^`\n]+)`", prose)
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span)
    }
    files = {
        span
        for span in spans
        if ("/" in span and "." in span.rpartition("/")[2])
        or span.endswith(("/", *SOURCE_SUFFIXES))
    }
    published = ("runs/reference", "figures/reference")
    return {
        path
        for path in links | files
        if path and (path.startswith(published) or not path.startswith(GENERATED))
    }


def missing_paths(text: str, root: Path) -> list[str]:
    """Those of ``named_paths`` that do not exist; a file may also lie in the library or with the notebooks."""
    folders = (root, root / "recrl_lib", root / "notebooks")
    return sorted(
        path
        for path in named_paths(text)
        if not any((folder / path).exists() for folder in folders)
    )


# ------------------------------------------------------------------------------------------ the study's notebooks


def test_there_is_a_notebook_for_every_stage():
    assert [file.name for file in FILES] == [stage.notebook for stage in params.STAGES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rule(file, rule):
    problems = rule({**runs.read_notebook(file), "name": file.name})
    assert not problems, f"{file.name}: " + "; ".join(problems)


def test_every_path_in_the_readme_exists():
    missing = missing_paths((paths.ROOT / "README.md").read_text(encoding="utf-8"), paths.ROOT)
    assert not missing, f"README.md names {', '.join(missing)}"


# ------------------------------------------------------------------------------------------ the rules themselves


def good() -> dict:
    nb = notebook(
        markdown("# 01 · Data\nThe share is 0.25, see arXiv:2601.03608 and `0.99`, version 1.2.3."),
        code(parameters_cell("data"), "parameters", count=1),
        code('from recrl_lib import runs\nstage = runs.start("data", globals())', count=2),
        markdown("Facts."),
        code("print(share)", CHECKED, output="share 0.250\n", count=3),
        markdown("## 1.2 More facts\nThe same 3 x .25x, as in section 1.1."),
        code("print(n)", CHECKED, output="n 12\n", count=4),
        markdown("The end."),
        code("stage.finish()", count=5),
    )
    return {**nb, "name": "01_data.ipynb"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_breaks_no_rule(rule):
    assert rule(good()) == []


def edit(index: int, **values) -> Callable[[dict], None]:
    return lambda nb: nb["cells"][index].update(values)


def edit_source(index: int, old: str, new: str) -> Callable[[dict], None]:
    def change(nb: dict) -> None:
        assert old in nb["cells"][index]["source"]
        nb["cells"][index]["source"] = nb["cells"][index]["source"].replace(old, new)

    return change


def printed(index: int, text: str, name: str = "stdout") -> Callable[[dict], None]:
    return edit(index, outputs=[{"output_type": "stream", "name": name, "text": text}])


def shown(index: int, **data: str) -> Callable[[dict], None]:
    content = {kind.replace("__", "/"): text for kind, text in data.items()}
    return edit(index, outputs=[{"output_type": "display_data", "metadata": {}, "data": content}])


WIDGET = "application/vnd.jupyter.widget-view+json"
ERROR = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]
BROKEN: list[tuple[Rule, Callable[[dict], None], str]] = [
    (numbered_title, edit(0, source="# 02 · Data"), "# 01"),
    (numbered_title, edit(0, source="## 01 · Data"), "# 01"),
    (numbered_title, lambda nb: nb["cells"].pop(0), "# 01"),
    (belongs_to_a_stage, lambda nb: nb.update(name="07_other.ipynb"), "no stage"),
    (parameters_are_those_of_the_stage, edit_source(1, "0.5", "0.7"), "parameters cell"),
    (parameters_are_those_of_the_stage, edit(1, metadata={}), "parameters cell"),
    (executed_in_order, edit(4, execution_count=7), "counts"),
    (executed_in_order, edit(4, execution_count=None), "counts"),
    (no_errors_or_stderr, edit(4, outputs=ERROR), "error"),
    (no_errors_or_stderr, printed(4, "W", name="stderr"), "stderr"),
    (no_bars_or_widgets, printed(4, "a\rb"), "bar"),
    (no_bars_or_widgets, printed(4, "12.1it/s"), "bar"),
    (no_bars_or_widgets, shown(4, text__plain=" 10%|#"), "bar"),
    (no_bars_or_widgets, shown(4, **{WIDGET: ""}), "widget"),
    (short_outputs, printed(4, "\n".join("x" * 101)), "101 lines"),
    (
        plain_kernel_and_metadata,
        lambda nb: nb["metadata"]["kernelspec"].update(name="mine"),
        "python3",
    ),
    (plain_kernel_and_metadata, lambda nb: nb["metadata"].update(papermill={}), "papermill"),
    (plain_kernel_and_metadata, edit(4, metadata={"papermill": {}}), "papermill"),
    (plain_kernel_and_metadata, edit(4, metadata={"tags": ["injected-parameters"]}), "injected"),
    (short_cells, edit(4, source="\n".join("x" * 31)), "31 lines"),
    (short_cells, lambda nb: [edit(i, source="\n".join("x" * 9))(nb) for i in (2, 4, 6)], "median"),
    (no_classes, edit(4, source="%time\nif True:\n    class A:\n        pass"), "class"),
    (prose_before_code, lambda nb: nb["cells"].pop(3), "no markdown"),
    (checked_outputs, edit(4, metadata={}), "1 cells"),
    (checked_outputs, edit(4, outputs=[]), "prints nothing"),
    (checked_outputs, shown(4, image__png="abc"), "prints nothing"),
    (finishes_its_stage, edit(8, source="print()"), "finish"),
    (finishes_its_stage, edit_source(2, '"data"', '"ranker"'), "start"),
    (no_machine_paths, edit(4, source='open("/home/me/x.csv")'), "/home/me/x.csv"),
    (no_machine_paths, printed(4, "saved to /srv/data/x.csv"), "/srv/data/x.csv"),
    (no_machine_paths, shown(4, text__html="<b>/srv/data</b>"), "/srv/data"),
    (no_machine_paths, printed(4, r"C:\Users\me"), "C:"),
    (prose_numbers_are_checked, edit_source(0, "0.25", "0.26"), "0.26"),
    (prose_numbers_are_checked, edit_source(5, ".25x", ".35x"), ".35"),
    (prose_numbers_are_checked, edit(4, metadata={}), "0.25"),
    (
        prose_numbers_are_checked,
        edit_source(5, "## 1.2 More facts", "## 1.2 More facts: 7.5"),
        "7.5",
    ),
]


@pytest.mark.parametrize(
    "rule, change, words",
    BROKEN,
    ids=[f"{rule.__name__}-{i}" for i, (rule, _, _) in enumerate(BROKEN)],
)
def test_a_broken_notebook_is_named(rule, change, words):
    nb = copy.deepcopy(good())
    change(nb)
    problems = rule(nb)
    assert problems and any(words in problem for problem in problems), problems


def test_every_rule_is_seen_to_fire():
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


def test_the_exploration_need_not_be_a_stage():
    nb = good()
    nb["name"] = "10_explore.ipynb"
    nb["cells"][2]["source"] = nb["cells"][8]["source"] = "pass"
    assert finishes_its_stage(nb) == []


@pytest.mark.parametrize(
    "text",
    [
        "</td></tr>",
        "https://a.org/b/c",
        "and/or/not",
        "runs/smoke/x",
        "../notebooks/a/b",
        "1/2/3",
        "~/x/y",
    ],
)
def test_what_is_no_machine_path(text):
    assert not ABSOLUTE.findall(text)


def test_paths_named_in_a_text(tmp_path):
    (tmp_path / "recrl_lib").mkdir()
    (tmp_path / "recrl_lib" / "ppo.py").touch()
    (tmp_path / "LICENSE").touch()
    text = (
        "[licence](LICENSE#x) [gone](docs/gone.md) [web](https://x.org/y) `ppo.py` `recrl_lib/ppo.py` `recrl_lib/` "
        "`lost.py` `notes/`"
        " `make all` `runs/x/report.html` `runs/reference/laptop/metrics/ppo.json` `metrics/ppo.json` `a/b` "
        "`x = 1`\n```\n`other.py`\n```"
    )
    assert missing_paths(text, tmp_path) == [
        "docs/gone.md",
        "lost.py",
        "notes/",
        "runs/reference/laptop/metrics/ppo.json",
    ]


def test_the_rules_read_what_the_runner_stores():
    """Sources and outputs are lists of lines in a published notebook and strings in the examples above."""
    nb = execute.clean_notebook(json.loads(json.dumps(good())))
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            output["text"] = output["text"].splitlines(keepends=True)
    assert [problem for rule in RULES for problem in rule({**nb, "name": "01_data.ipynb"})] == []
