"""Publishing: notebook 09 as one HTML page, and a finished run's small files for the repository.

``make sync-reference RUN=laptop`` copies parameters, manifest, metrics, curves and notebooks to
``runs/reference/laptop/`` and the figures to ``figures/reference/laptop/``, and writes the README's
table of results.
"""

import argparse
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from recrl_lib import paths, provenance, runs
from recrl_lib.evaluation.findings import rows_of, words
from recrl_lib.params import PIPELINE, stage_named
from recrl_lib.runs import write_atomic

NOTEBOOK_BYTES = 3_000_000  # the most that the executed notebooks of a published run may weigh
MARKER = "<!-- results -->"  # stands before and after the README's table
RECORDS = ("params.yaml", "manifest.json")
# Arms of the main table; "_warm": after the warm start, before PPO.
ROWS = ("base", "separate", "unshielded_warm", "unshielded", "shielded_warm", "shielded")
COLUMNS = {  # heading of the main table: measure, against
    "reward": ("reward", ""),
    "faithfulness": ("faithfulness", ""),
    "rank drop": ("rank_drop", ""),
    "simulated clicks": ("ctr_lift", "base"),
    "top-10 places kept": ("top10_overlap", ""),
}
TAGS = (
    "a article b blockquote br caption code dd div dl dt em h1 h2 h3 h4 hr i img li mark ol p pre "
    "span strong table tbody td th thead tr ul"
).split()
DROPPED = ["script", "style", "iframe", "object", "embed", "form", "link", "meta", "base", "svg"]
ATTRIBUTES = "alt class colspan height rowspan scope start title width".split()


def _allowed(tag: str, name: str, value: str) -> bool:
    """Whether an attribute stays in the report: images are embedded, links are local."""
    if name == "src":
        return tag == "img" and value.startswith("data:image/")
    if name == "href":
        return tag == "a" and re.fullmatch(r"[\w./#%-]*", value) is not None
    return name in ATTRIBUTES


def render_report(run: str) -> Path:
    """Write ``runs/<run>/report.html`` from the executed notebook 09 and return its path.

    Code is hidden, what could load or run anything is removed, and images are embedded, so that the
    page needs no network. Raises ``RuntimeError`` if the notebook has not been executed.
    """
    import bleach
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    source = runs.run_folder(run) / "notebooks" / stage_named("report").notebook
    _require(source.is_file(), f"{runs.display(source)} is missing", f"make all RUN={run}")
    shown = {f"exclude_{part}": True for part in ("input", "input_prompt", "output_prompt")}
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True, **shown)
    page = BeautifulSoup(exporter.from_filename(str(source))[0], "html.parser")
    for tag in page(DROPPED):  # with what they hold, which bleach would leave as text
        tag.decompose()
    body = bleach.clean(str(page), TAGS, _allowed, protocols=["data", "http"], strip=True)
    page, entries = BeautifulSoup(body, "html.parser"), ""
    for number, heading in enumerate(page("h2"), 1):
        heading["id"] = f"section-{number}"
        entries += f'<li><a href="#section-{number}">{html.escape(heading.text)}</a></li>'
    for picture in page.select("img:not([src])"):
        picture.decompose()
    for wide in page.select("div.output_html"):
        wide["tabindex"] = "0"  # so that a keyboard can scroll it
    title = html.escape(f"{page.h1.text if page.h1 else 'Report'}: run {run}")
    parts = {"title": title, "contents": entries, "body": str(page)}
    skeleton = (paths.LIBRARY / "report.html").read_text(encoding="utf-8")
    target = runs.run_folder(run) / "report.html"
    write_atomic(target, re.sub("{{(title|body|contents)}}", lambda name: parts[name[1]], skeleton))
    return target


def main_table(run: str) -> pd.DataFrame:
    """The main results as text, one row an arm, with 95 % intervals in brackets."""
    table = runs.read_results(run, "evaluation")
    arms = [arm for arm in ROWS if arm in set(table["arm"])]
    cells = {
        heading: [words(rows_of(table, measure, arm, against)) for arm in arms]
        for heading, (measure, against) in COLUMNS.items()
    }
    return pd.DataFrame(cells, index=arms)


def sync(run: str) -> Path:
    """Copy the small files of ``run`` to ``runs/reference/<run>/`` and write the README's table.

    Raises ``RuntimeError`` if a stage is missing, out of date or ran on uncommitted changes, if the
    tree has such changes now, or if the notebooks are too large. Nothing is written then.
    """
    source, target = runs.run_folder(run), paths.REFERENCE / run
    params, manifest = runs.read_params(run), runs.read_manifest(run)
    again = f"make all RUN={run}, with the run's profile and seed"
    stale = [s.name for s in PIPELINE if params is None or not runs.up_to_date(s.name, params)]
    _require(not stale, f"runs/{run}: {', '.join(stale)} missing or out of date", again)
    sourced = all(s["git_commit"] and not s["git_dirty"] for s in manifest["stages"].values())
    problem = f"runs/{run} ran on uncommitted changes: its numbers have no source"
    _require(sourced, problem, f"commit, then {again} and FORCE=1")
    clean = runs.git_state()[1] is False
    _require(clean, "the git tree has uncommitted changes, or is none", "commit or remove them")
    books = {p.name: _without_paths(p) for p in sorted((source / "notebooks").glob("*.ipynb"))}
    size, largest = sum(map(len, books.values())), max(books, key=lambda name: len(books[name]))
    weight = f"runs/{run}/notebooks: {size / 1e6:.1f} MB, more than {NOTEBOOK_BYTES / 1e6:g}"
    _require(size <= NOTEBOOK_BYTES, weight, f"draw less in {largest}")
    outputs = [name for stage in manifest["stages"].values() for name in stage["outputs"]]
    small = [name for name in outputs if name.startswith(("metrics/", "curves/"))]
    figures = paths.FIGURES / "reference" / run
    files = {paths.ROOT / "README.md": _readme_with_results(run, manifest)}
    files |= {target / name: (source / name).read_bytes() for name in (*small, *RECORDS)}
    files |= {target / "notebooks" / name: content for name, content in books.items()}
    drawn = (paths.FIGURES / run).glob("*.svg")
    files |= {figures / path.name: path.read_bytes() for path in drawn}
    for old in (target, figures):
        shutil.rmtree(old, ignore_errors=True)
    for path, content in files.items():
        write_atomic(path, content)
    return target


def _require(holds: object, problem: str, remedy: str) -> None:
    if not holds:
        raise RuntimeError(f"{problem}: {remedy}")


def _without_paths(path: Path) -> str:
    """The notebook as text, without the folders and times that papermill notes in it."""
    notebook = provenance.read_notebook(path)
    for part in (notebook, *notebook["cells"]):
        part["metadata"].pop("papermill", None)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _readme_with_results(run: str, manifest: dict[str, Any]) -> str:
    """The README with the main results of ``run``, one row an arm, between its markers."""
    table = main_table(run)
    rows = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *table.reset_index().to_numpy()]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    minutes = sum(stage["seconds"] for stage in manifest["stages"].values()) / 60
    lines += (
        f"\nIn brackets 95 % intervals over users. Run `{run}`: seed {manifest['seed']}, "
        f"{manifest['device']}, {minutes:.0f} minutes, commit `{manifest['git_commit'][:10]}`, "
        f"[all numbers](runs/reference/{run}/metrics/evaluation.csv)."
    )
    parts = (paths.ROOT / "README.md").read_text(encoding="utf-8").split(MARKER)
    _require(len(parts) == 3, "README.md has no place for the table", f"write {MARKER} twice")
    return f"{parts[0]}{MARKER}\n{lines}\n{MARKER}{parts[2]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    try:
        print("copied to", runs.display(sync(parser.parse_args().run)))
    except RuntimeError as error:
        raise SystemExit(f"FAILED {error}") from None
