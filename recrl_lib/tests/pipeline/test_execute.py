"""The runner: strict before it starts, resumable, clear when a stage fails; and notebooks that fail when edited."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from recrl_lib import paths, runs
from recrl_lib.params import PIPELINE, STAGES, Params, parameters_cell, resolve
from recrl_lib.pipeline import execute
from recrl_lib.runs import write_atomic
from recrl_lib.tests.conftest import code, finish, markdown, notebook

ENVIRONMENT, DATA = STAGES[:2]
FINISH = "from recrl_lib import runs\nstage = runs.start({!r}, globals())\nstage.metrics({!r})\nstage.finish()"
DATA_METRICS = {"n_users": 2, "n_items": 3, "n_interactions": 5, "source": "toy", "sha256": "0"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ------------------------------------------------------------------------------------------ before anything runs


def test_declared_parameters_are_literals():
    cell = code("a = 1  # type: int  count\nb = -1e-4\nc = 'x'\nd = True", "parameters")
    assert execute.declared_parameters(notebook(cell), "x") == {
        "a": 1,
        "b": -1e-4,
        "c": "x",
        "d": True,
    }


@pytest.mark.parametrize(
    "cell", ["a = 1 + b", "import os", "a = b = 1", "a, b = 1, 2", "a: int = 1", "a = (", "f()"]
)
def test_a_parameters_cell_with_anything_else_is_refused(cell):
    with pytest.raises(ValueError, match="nb.ipynb.*name = literal"):
        execute.declared_parameters(notebook(code(cell, "parameters")), "nb.ipynb")


@pytest.mark.parametrize("cells", [[], [code("a = 1", "parameters")] * 2])
def test_there_is_one_parameters_cell(cells):
    with pytest.raises(ValueError, match="exactly one"):
        execute.declared_parameters(notebook(*cells), "x")


def test_all_problems_of_all_notebooks_are_listed_before_anything_runs(house):
    house.write("data")
    cell = parameters_cell("ranker").replace("ranker_dim", "ranker_dimension")
    write_atomic(
        house.notebooks / "02_ranker.ipynb", json.dumps(notebook(code(cell, "parameters")))
    )
    with pytest.raises(ValueError) as error:
        execute.run_all(Params(), STAGES[:4], out=io.StringIO())
    message = str(error.value)
    assert "00_environment.ipynb is missing" in message
    assert "02_ranker.ipynb: the parameters cell lacks ranker_dim" in message
    assert "02_ranker.ipynb: stage 'ranker' does not own ranker_dimension" in message
    assert "03_explainer.ipynb is missing" in message
    assert "01_data" not in message
    assert not house.runs.exists()


def test_a_run_named_after_a_profile_has_it(monkeypatch):
    for cuda, machine in ((False, "laptop"), (True, "pod")):
        monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
        wanted = {
            None: machine,
            "mine": machine,
            "smoke": "smoke",
            "paper-seed1": "paper",
            "smoke-main-seed0": machine,
        }
        assert {run: execute.default_profile(run) for run in wanted} == wanted
    resolved = []
    monkeypatch.setattr(
        execute, "run_all", lambda params, stages, force: resolved.append(params) or 0
    )
    assert execute.main(["all", "--run", "smoke"]) == execute.main(["all", "--run", "mine"]) == 0
    assert resolved == [resolve("smoke", run="smoke"), resolve("pod", run="mine")]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "sheild_rank=3"], "did you mean shield_rank"),
        (["--set", "ranker_dim=wide"], "ranker_dim='wide' is not of type int"),
        (["--set", "ranker_dim"], "must have the form name=value"),
        (["--set", "seed=3"], "give seed as --seed 3"),
        (["--set", "ppo_users=7"], "ppo_users=7.0: must be at most"),
        (["--run", "a/b"], "parameter run"),
        (["--to", "end"], "choose one of environment"),
    ],
)
def test_wrong_arguments_exit_2_and_write_nothing(house, capsys, arguments, words):
    assert execute.main(["all", "--profile", "smoke", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not house.runs.exists()


def test_settings_get_their_types():
    assert execute.parse_overrides(["ppo_steps=3", "kl_coef=1e-3", "llm=a=b"]) == {
        "ppo_steps": 3,
        "kl_coef": 1e-3,
        "llm": "a=b",
    }


def test_the_pipeline_is_cut_after_the_named_stage():
    assert [s.name for s in execute.up_to("ranker")] == ["environment", "data", "ranker"]
    assert execute.up_to(None) == PIPELINE


# ------------------------------------------------------------------------------------------ running


def test_a_stage_runs_once_and_is_then_kept_until_something_changes(house, monkeypatch):
    """The first time in a real kernel; later only what would be executed is recorded."""
    house.write("data", FINISH.format("data", DATA_METRICS), "print(ppo_users)")
    params = Params(run="r", seed=3, ppo_users=0.4)

    def run(params, **options):
        out = io.StringIO()
        assert execute.run_all(params, (DATA,), out=out, **options) == 0
        return out.getvalue().splitlines()

    lines = run(params)
    assert lines[0] == "stage 1/1 data 00:00" and any(
        line.startswith("stage 1/1 data: done in 00:") for line in lines
    )
    assert any(line.startswith("run r: 1 stages (0 kept) in ") for line in lines)
    stored = runs.read_notebook(house.runs / "r" / "notebooks" / "01_data.ipynb")
    assert "".join(stored["cells"][-1]["outputs"][0]["text"]) == "0.4\n"
    assert runs.read_params("r") == params
    assert os.listdir(house.notebooks) == ["01_data.ipynb"]  # no sockets or checkpoints beside it

    executed = []
    monkeypatch.setattr(
        execute,
        "execute",
        lambda notebook, output, values, ticker: executed.append(
            (notebook.name, values["ppo_users"])
        ),
    )
    assert run(params)[0] == "stage 1/1 data: unchanged, kept"
    assert "run r: all 1 stages unchanged, nothing to do" in run(params)
    assert executed == []
    run(params.replace(ppo_users=0.6))
    run(params, force=True)
    assert executed == [("01_data.ipynb", 0.6), ("01_data.ipynb", 0.4)]


def test_a_failing_cell_ends_with_one_clear_line_and_keeps_the_notebook(house, capfd):
    house.write(
        "environment",
        "import sys\nprint('noise', file=sys.stderr)",
        "raise ValueError('no\\nluck')",
        "print('never')",
    )
    house.write("data")
    out = io.StringIO()
    assert execute.run_all(Params(run="r"), (ENVIRONMENT, DATA), out=out) == 1
    kept = house.runs / "r" / "notebooks" / "00_environment.ipynb"
    last = out.getvalue().splitlines()[-1]
    assert (
        last
        == f"FAILED stage 1/2 environment, cell 5: ValueError: no luck (notebook kept at {kept})"
    )
    assert "data" not in out.getvalue()
    cell = next(c for c in runs.read_notebook(kept)["cells"] if c.get("execution_count") == 5)
    assert "no\\nluck" in runs.source(cell) and cell["outputs"][-1]["ename"] == "ValueError"
    assert capfd.readouterr() == ("", "")


def test_a_kernel_that_dies_is_reported_with_its_cell(house):
    house.write("environment", "x = 1", "import os\nos._exit(1)", "x = 2")
    out = io.StringIO()
    assert (
        execute.run_all(Params(run="r"), (ENVIRONMENT,), out=out)
        == execute.KernelDied.exit_code
        == 3
    )
    last = out.getvalue().splitlines()[-1]
    assert last.startswith(
        "FAILED stage 1/1 environment, cell 5: the kernel died, usually for want of memory"
    )


def test_a_kernel_that_does_not_start_is_tried_twice(house, monkeypatch):
    attempts = []

    def fail(*arguments):
        attempts.append(arguments)
        raise RuntimeError("Kernel died before replying to kernel_info")

    house.write("environment")
    monkeypatch.setattr(execute, "_papermill", fail)
    out = io.StringIO()
    assert execute.run_all(Params(run="r"), (ENVIRONMENT,), out=out) == 1
    assert len(attempts) == 2
    assert (
        "the kernel did not start: RuntimeError: Kernel died before"
        in out.getvalue().splitlines()[-1]
    )


@pytest.mark.parametrize("platform, transport", [("linux", "ipc"), ("win32", "tcp")])
def test_kernels_are_spoken_to_by_what_the_system_has(tmp_path, monkeypatch, platform, transport):
    import papermill

    given = {}
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *arguments, **options: given.update(options)
    )
    monkeypatch.setattr(execute, "sys", types.SimpleNamespace(platform=platform))
    execute._papermill(
        tmp_path / "a.ipynb", tmp_path / "b.ipynb", {}, tmp_path / "1.json", tmp_path / "log"
    )
    assert given["config"].KernelManager == {
        "transport": transport,
        "connection_file": str(tmp_path / "1.json"),
    }


def test_being_stopped_ends_the_kernel_and_says_where(house):
    marker = house.root / "pid"
    house.write(
        "environment",
        f"import os, time\nPath({str(marker)!r}).write_text(str(os.getpid()))\ntime.sleep(60)",
    )
    script = (
        "import sys; from pathlib import Path; from recrl_lib import config, paths, runner\n"
        f"paths.NOTEBOOKS, paths.RUNS = Path({str(house.notebooks)!r}), Path({str(house.runs)!r})\n"
        "sys.exit(runner.main(['all', '--profile', 'smoke', '--run', 'r', '--to', 'environment']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (marker.is_file() and marker.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        kernel = int(marker.read_text())
        process.send_signal(signal.SIGTERM)  # becomes a KeyboardInterrupt, as Ctrl-C does
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out.splitlines()[-1].startswith("INTERRUPTED stage 1/1 environment after 00:")
    assert err == ""
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


# ------------------------------------------------------------------------------------------ one's own data


def test_own_tables_go_through_notebook_01_by_the_command_line(house, capsys):
    """The real notebook, on tables whose columns have names of their own."""
    own = house.root / "shop"
    own.mkdir()
    rows = [
        f"{n % 70},article-{(n // 70 * 4 + n % 70) % 30},{1.7e9 + n:.0f},\n" for n in range(70 * 8)
    ]
    (own / "interactions.csv").write_text("customer,sku,when,stars\n" + "".join(rows))
    (own / "items.csv").write_text(
        "sku,name\n" + "".join(f"article-{n},Article {n}\n" for n in range(30))
    )
    moved = runs.read_notebook(house.write("environment"))["cells"][2]
    finish("environment", Params(run="mine"))
    real = runs.read_notebook(paths.ROOT / "notebooks" / "01_data.ipynb")
    place = next(n for n, cell in enumerate(real["cells"]) if "parameters" in runs.tags(cell))
    real["cells"].insert(place + 1, moved | {"id": "moved"})
    write_atomic(house.notebooks / "01_data.ipynb", json.dumps(real))
    columns = [
        "user_column=customer",
        "item_column=sku",
        "time_column=when",
        "rating_column=stars",
        "title_column=name",
    ]
    given = ["--set", "dataset=csv", f"data_dir={own}", *columns]
    assert (
        execute.main(["all", "--profile", "smoke", "--run", "mine", "--to", "data", *given]) == 0
    ), capsys.readouterr().out
    metrics = runs.read_metrics("mine", "data")
    assert (
        metrics["n_users"],
        metrics["n_items"],
        metrics["n_interactions"],
        metrics["rows_skipped"],
    ) == (70, 30, 560, 0)
    assert runs.read_params("mine").title_column == "name"


# ------------------------------------------------------------------------------------------ progress


def test_progress_shows_the_last_complete_line(tmp_path):
    path = tmp_path / "progress"
    assert execute.latest_progress(path) == ""
    path.write_text("")
    assert execute.latest_progress(path) == ""
    line = json.dumps({"desc": "ppo unshielded", "done": 4, "total": 12})
    path.write_text("x" * 9000 + "\n" + line + '\n{"desc": "half')
    assert execute.latest_progress(path) == "ppo unshielded 4/12"
    path.write_text(json.dumps({"desc": "reading", "done": 4, "total": None}) + "\n")
    assert execute.latest_progress(path) == "reading 4"


def test_a_terminal_gets_one_line_and_a_log_a_line_now_and_then(tmp_path):
    path = tmp_path / "progress"
    path.write_text(json.dumps({"desc": "ppo", "done": 1, "total": 2}) + "\n")
    terminal = Terminal()
    ticker = execute.Ticker("stage 1/2 data", terminal)
    ticker.tick(path)
    ticker.tick(path)
    ticker.close("done")
    assert terminal.getvalue() == "\rstage 1/2 data 00:00 | ppo 1/2\x1b[K" * 2 + "\r\x1b[Kdone\n"
    log = io.StringIO()
    ticker = execute.Ticker("stage 1/2 data", log)
    for seconds in (0, 1, 19, 20.5, 30, 41):
        ticker.started = time.monotonic() - seconds
        ticker.tick(path)
    assert [line[15:20] for line in log.getvalue().splitlines()] == ["00:00", "00:20", "00:41"]


def test_clock():
    assert [execute.clock(s) for s in (0.9, 61, 3600, 3725)] == [
        "00:00",
        "01:01",
        "1:00:00",
        "1:02:05",
    ]


# ------------------------------------------------------------------------------------------ headline


def test_headline_has_a_row_per_arm(house):
    metrics = dict.fromkeys(runs.REQUIRED_METRICS["evaluation"], 0.0)
    metrics |= {
        "shielded/ctr_lift": 1.2345,
        "shielded/ctr_lift_lo": 1.1,
        "shielded/ctr_lift_hi": 1.31,
    }
    metrics |= {"unshielded/max_abs_score_delta": 0.12345, "unshielded/top10_set_same": 0.25}
    write_atomic(house.runs / "r" / "metrics" / "evaluation.json", json.dumps(metrics))
    header, *rows = execute.headline("r").splitlines()
    assert [row.split()[0] for row in rows] == list(runs.ARMS)
    assert "1.234 [1.100, 1.310]" in rows[3] or "1.235 [1.100, 1.310]" in rows[3]
    assert rows[2].split()[-2:] == ["0.2500", "0.123"]
    assert (
        header.split()
        == "arm reward ctr_lift [95 %] ndcg@10 top10_overlap top10_set_same max_abs_score_delta".split()
    )
    assert execute.results("r") == execute.headline("r")
    write_atomic(house.runs / "r" / "report.html", "")
    assert execute.results("r").splitlines()[-1].startswith("report: ")


def test_headline_of_a_run_without_evaluation_names_the_file(house, capsys):
    assert execute.main(["headline", "--run", "none"]) == 2
    assert "evaluation.json is missing" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ publish


def test_publish_stores_outputs_and_nothing_volatile(house):
    path = house.write("environment", "print('a')\nprint('b')", "print('a')\nprint('b')", "1 + 1")
    assert execute.publish((ENVIRONMENT,), out=io.StringIO()) == 0
    stored = json.loads(path.read_text())
    cells = [c for c in stored["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == [1, 2, 3, 4, 5]
    assert cells[2]["outputs"] == [
        {"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]}
    ]
    assert cells[4]["outputs"][0]["data"] == {"text/plain": ["2"]}
    assert [c["metadata"] for c in cells] == [{"tags": ["parameters"]}, {}, {}, {}, {}]
    assert (
        set(stored["metadata"]) == {"kernelspec", "language_info"}
        and "papermill" not in path.read_text()
    )
    assert len({c["id"] for c in stored["cells"]}) == len(stored["cells"])
    assert path.read_bytes().endswith(b"}\n")
    executed = runs.read_notebook(house.runs / "smoke" / "notebooks" / path.name)
    executed["cells"][0]["id"] = "random"
    assert execute.clean_notebook(executed) == stored


@pytest.mark.parametrize(
    "body, words",
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.stderr.write('W: x')", "wrote to stderr: W: x"),
    ],
)
def test_publish_refuses_a_notebook_that_fails_or_warns(house, body, words):
    path = house.write("environment", body)
    before = path.read_bytes()
    out = io.StringIO()
    assert execute.publish((ENVIRONMENT,), out=out) == 1
    assert f"cell 3{':' if body == '1 / 0' else ''} {words}" in out.getvalue().splitlines()[-1]
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------ nbval


def test_nbval_fails_when_a_stored_number_is_edited(tmp_path):
    """The command of ``make test`` on two toy notebooks: what is stored is right in one and edited in the other."""
    for name, stored in {"00_right": "4\n", "01_edited": "5\n"}.items():
        cells = notebook(
            markdown("# Toy"), code("print(2 + 2)", "nbval-check-output", output=stored, count=1)
        )
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(cells))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        cwd=paths.ROOT,
        env=os.environ | {"RECRL_PROGRESS": "off"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout.splitlines()[-1], (
        done.stdout
    )
    assert "01_edited.ipynb::Cell 0" in done.stdout and "00_right.ipynb::Cell 0" not in done.stdout
    assert done.stderr == ""
