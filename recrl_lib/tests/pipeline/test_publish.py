"""The rendered report, and published runs: what is copied, and what is refused."""

import json
import re

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from recrl_lib import paths, runs
from recrl_lib.params import Params
from recrl_lib.pipeline import publish
from recrl_lib.runs import write_atomic
from recrl_lib.tests.conftest import code, markdown, notebook

PIXEL = "iVBORw0KGgoAAAANSUhEUg=="  # any base64 text
HOSTILE = (
    "<script>alert(1)</script> [a](javascript:alert(2)) $x$ {{body}} {7} "
    '<a href="java&#10;script:alert(3)">b</a> <img src="https://example.org/c.png" onerror="d()"> '
    '<img src="data:text/html,e"> ![f](http://example.org/g.png) [h](https://example.org)'
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    places = {"ROOT": "", "RUNS": "runs", "FIGURES": "figures", "REFERENCE": "runs/reference"}
    for name, folder in places.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    return tmp_path


def output(**data: str) -> dict:
    cell = code("secret_code()")
    data = {name.replace("_", "/"): text for name, text in data.items()}
    cell["outputs"] = [{"output_type": "display_data", "data": data, "metadata": {}}]
    return cell


@pytest.fixture
def report(place):
    cells = (
        markdown(f"# Report {HOSTILE}"),
        markdown(f"## Results {HOSTILE}"),
        output(image_png=PIXEL, text_plain="<Figure>"),
        output(text_html=f"<style>td {{color: red}}</style><table><td>{HOSTILE}</td></table>"),
        output(application_javascript="alert(8)", text_plain="plain"),
        code("print()", output=f"said {HOSTILE}\n"),
        markdown("## Rest\n\n> quoted & [local](metrics/evaluation.csv)"),
    )
    cells[2]["metadata"]["alt"] = "a curve that rises"
    folder = place / "runs" / "r"
    with pytest.raises(RuntimeError, match="09_report.ipynb is missing: make all RUN=r"):
        publish.render_report("r")
    write_atomic(folder / "notebooks" / "09_report.ipynb", json.dumps(notebook(*cells)))
    assert publish.render_report("r") == folder / "report.html"
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_report_loads_and_runs_nothing(report):
    page = BeautifulSoup(report, "html.parser")
    assert not page(["script", "iframe", "link", "object", "svg"])
    assert not re.search("require.js|mathjax|secret_code|color: red", report, re.IGNORECASE)
    links = [tag[name] for tag in page.find_all() for name in ("src", "href") if tag.get(name)]
    assert all(re.match("data:image/png;base64,|#section-|metrics/", link) for link in links), links
    assert not [name for tag in page.find_all() for name in tag.attrs if name.startswith("on")]
    policy = page.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    assert "default-src 'none'" in policy and "img-src data:" in policy


def test_the_report_is_readable(report):
    page = BeautifulSoup(report, "html.parser")
    assert page.html["lang"] == "en" and page.title.text.endswith(": run r")
    assert page.find("meta", {"name": "viewport"})["content"].startswith("width=device-width")
    assert [a["href"] for a in page.nav("a")] == ["#section-1", "#section-2"]
    assert [h["id"] for h in page("h2")] == ["section-1", "section-2"]
    assert page.img["src"].endswith(PIXEL) and page.img["alt"] == "a curve that rises"
    assert "$x$ {{body}} {7}" in page.h1.text and "quoted &" in page.blockquote.text
    assert f"said {HOSTILE}" in page.find_all("pre")[-1].text  # printed text stays as it is
    assert "max-width: 100%" in page.style.text and page.table.find_parent("div")["tabindex"] == "0"


def results() -> pd.DataFrame:
    rows = [(arm, *key) for arm in runs.ARMS for key in publish.COLUMNS.values()]
    table = pd.DataFrame(rows, columns=["arm", "measure", "against"])
    return table.assign(group="all", value=0.5, low=0.25, high=0.75, n=128, seeds=1)


@pytest.fixture
def finished(place, monkeypatch):
    """A run folder in which every stage is finished, and a README with the markers."""
    monkeypatch.setattr(runs, "up_to_date", lambda stage, params: True)
    monkeypatch.setattr(runs, "git_state", lambda: ("c" * 40, False))
    runs.write_params(Params(run="r"))
    folder = place / "runs" / "r"
    write_atomic(folder / "metrics" / "evaluation.csv", results().to_csv(index=False))
    write_atomic(folder / "curves" / "ranker.csv", "step\n1\n")
    write_atomic(folder / "curves" / "old.csv", "left over from another setting")
    write_atomic(place / "figures" / "r" / "a.svg", "<svg/>")
    cells = [markdown("# Report"), code("1", count=1)]
    for part in (executed := notebook(*cells))["cells"]:
        part["metadata"]["papermill"] = {"start_time": "now"}
    executed["metadata"]["papermill"] = {"output_path": "/home/somebody/runs/r"}
    write_atomic(folder / "notebooks" / "09_report.ipynb", json.dumps(executed))
    stage = {"status": "finished", "seconds": 60.0, "git_commit": "c" * 40, "git_dirty": False}
    stages = {
        "ranker": stage | {"outputs": {"curves/ranker.csv": "", "artifacts/big": ""}},
        "evaluation": stage | {"outputs": {"metrics/evaluation.csv": ""}},
    }
    manifest = {"run": "r", "seed": 0, "device": "cpu", "git_commit": "c" * 40, "stages": stages}
    write_atomic(folder / "manifest.json", json.dumps(manifest))
    marker = publish.MARKER
    write_atomic(place / "README.md", f"before\n{marker}\nold\n{marker}\nafter\n")
    return folder


def test_small_files_are_copied_and_the_readme_is_written(finished):
    write_atomic(paths.REFERENCE / "r" / "metrics" / "evaluation.json", "from an earlier version")
    target = publish.sync("r")
    files = sorted(p.relative_to(target).as_posix() for p in target.rglob("*.*"))
    expected = "curves/ranker.csv manifest.json metrics/evaluation.csv notebooks/09_report.ipynb"
    assert files == [*expected.split(), "params.yaml"]
    assert "papermill" not in (target / "notebooks" / "09_report.ipynb").read_text()
    assert (paths.FIGURES / "reference" / "r" / "a.svg").exists()
    readme = (paths.ROOT / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert "| shielded | 0.500 [0.250, 0.750] |" in readme
    assert "2 minutes, commit `cccccccccc`" in readme
    publish.sync("r")  # a second time changes nothing
    assert (paths.ROOT / "README.md").read_text() == readme


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"stale": "audit"}, "audit missing or out of date: make all RUN=r"),
        ({"state": ("c" * 40, True)}, "is none: commit or remove them"),
        ({"state": (None, None)}, "is none: commit or remove them"),
        ({"dirty": True}, "ran on uncommitted changes.*FORCE=1"),
        ({"readme": "old"}, "write .*results.* twice"),
        ({"size": publish.NOTEBOOK_BYTES + 1}, "more than 3: draw less in 04_shield.ipynb"),
    ],
)
def test_what_has_no_source_or_no_place_is_refused(finished, monkeypatch, changed, message):
    monkeypatch.setattr(runs, "up_to_date", lambda stage, _: stage != changed.get("stale"))
    monkeypatch.setattr(runs, "git_state", lambda: changed.get("state", ("c" * 40, False)))
    manifest = runs.read_manifest("r")
    manifest["stages"]["evaluation"]["git_dirty"] = changed.get("dirty", False)
    write_atomic(finished / "manifest.json", json.dumps(manifest))
    readme = paths.ROOT / "README.md"
    write_atomic(readme, changed.get("readme", readme.read_text()))
    heavy = notebook(code("x", output="0" * changed.get("size", 1)))
    write_atomic(finished / "notebooks" / "04_shield.ipynb", json.dumps(heavy))
    with pytest.raises(RuntimeError, match=message):
        publish.sync("r")
    assert not paths.REFERENCE.exists() and "old" in readme.read_text()  # nothing was written
    with pytest.raises(RuntimeError, match="runs/unknown: .* missing .*: make all RUN=unknown"):
        publish.sync("unknown")
