"""One notebook in a kernel: how it fails, what it shows meanwhile; and stored notebooks."""

import io
import json
import os
import subprocess
import sys
import time

import pytest

from recrl_lib import paths, runs
from recrl_lib.params import STAGES
from recrl_lib.pipeline import execute
from recrl_lib.tests.conftest import code, markdown, notebook

ENVIRONMENT = STAGES[0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def executed() -> tuple[int, str]:
    """Exit code and last line of the toy notebook of stage ``environment``."""
    out = io.StringIO()
    exit_code = execute.execute(ENVIRONMENT, {}, "r", execute.ProgressLine("stage 1/1", out))
    return exit_code, out.getvalue().splitlines()[-1]


def test_a_kernel_that_dies_is_told_from_a_failure(house):
    dying = "import os, sys\nprint('last words', file=sys.__stderr__, flush=True)\nos._exit(1)"
    house.write("environment", "x = 1", dying, "x = 2")
    exit_code, line = executed()
    assert exit_code == execute.KERNEL_DIED == 3
    assert line.startswith("FAILED stage 1/1, cell 4: the kernel died, usually for want of memory")
    assert "see " in line and "00_environment.log (notebook kept at " in line
    assert "last words" in (house.runs / "r" / "logs" / "00_environment.log").read_text()


def test_a_kernel_that_does_not_start_is_tried_twice(house, monkeypatch):
    attempts = []

    def fail(*_, **options):
        attempts.append(options["config"].KernelManager["transport"])
        raise RuntimeError("Kernel died before\nreplying to kernel_info")

    house.write("environment")
    monkeypatch.setattr("papermill.execute_notebook", fail)
    exit_code, line = executed()
    assert exit_code == 1 and attempts == ["tcp" if sys.platform == "win32" else "ipc"] * 2
    assert "the kernel did not start: RuntimeError: Kernel died before replying" in line


# -------------------------------------------------------------------------------------- progress


def test_the_last_complete_line_is_shown(tmp_path):
    path = tmp_path / "progress"
    assert execute.last_line(path) == ""
    for text, line in [("", ""), ("a\nhalf", "a"), ("x" * 9000 + "\nppo 4/12\n\n{", "ppo 4/12")]:
        path.write_text(text)
        assert execute.last_line(path) == line


def test_a_cell_in_progress_is_seen_from_outside(house):
    house.write(
        "environment",
        "import time\nfrom recrl_lib.progress import track\n"
        "for _ in track(range(3), 'counting'):\n    time.sleep(0.7)",
    )
    out = Terminal()
    assert execute.execute(ENVIRONMENT, {}, "r", execute.ProgressLine("stage 1/1", out)) == 0
    assert " | counting 2/3" in out.getvalue()
    assert out.getvalue().split("\r")[-1].startswith("stage 1/1: done in 00:")


def test_a_terminal_gets_one_line_and_a_log_a_line_now_and_then():
    terminal = Terminal()
    line = execute.ProgressLine("stage 1/2 data", terminal)
    line.update("ppo 1/2")
    line.update("ppo 2/2 " + "x" * 500)
    line.close("done after {time}")
    assert "\n" not in terminal.getvalue().removesuffix("done after 00:00\n")
    assert "stage 1/2 data 00:00 | ppo 1/2" in terminal.getvalue()
    log = io.StringIO()
    line = execute.ProgressLine("stage 1/2 data", log)
    for seconds in (0, 1, 19, 20.5, 30, 3725):
        line.started = time.monotonic() - seconds
        line.update()
    line.close("end")
    times = [text.split()[-1] for text in log.getvalue().splitlines()]
    assert times == ["00:00", "00:20", "1:02:05", "end"]


# --------------------------------------------------------------------------------------- publish


def test_publish_stores_outputs_and_nothing_volatile(house):
    path = house.write("environment", "print('a')\nprint('b')", "print('a')\nprint('b')", "1 + 1")
    assert execute.publish((ENVIRONMENT,), out=io.StringIO()) == 0
    stored = json.loads(path.read_text())
    cells = [c for c in stored["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == [1, 2, 3, 4, 5]
    stream = {"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]}
    assert cells[2]["outputs"] == [stream]
    assert cells[4]["outputs"][0]["data"] == {"text/plain": ["2"]}
    assert [c["metadata"] for c in cells] == [{"tags": ["parameters"]}, {}, {}, {}, {}]
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert len({c["id"] for c in stored["cells"]}) == len(stored["cells"])
    assert path.read_bytes().endswith(b"}\n") and "papermill" not in path.read_text()
    again = runs.read_notebook(house.runs / "smoke" / "notebooks" / path.name)
    again["cells"][0]["id"] = "random"
    assert execute.clean_notebook(again) == stored


@pytest.mark.parametrize(
    "body, words",
    [
        ("1 / 0", "cell 3: ZeroDivisionError"),
        ("import sys\nsys.stderr.write('W: x')", "cell 3 wrote to stderr: W: x"),
    ],
)
def test_publish_refuses_a_notebook_that_fails_or_warns(house, body, words):
    path = house.write("environment", body)
    before = path.read_bytes()
    out = io.StringIO()
    assert execute.publish((ENVIRONMENT,), out=out) == 1
    assert words in out.getvalue().splitlines()[-1]
    assert path.read_bytes() == before


def test_nbval_fails_when_a_stored_number_is_edited(tmp_path):
    """The command of ``make test`` on two toy notebooks; what is stored in one is edited."""
    for name, stored in {"00_right": "4\n", "01_edited": "5\n"}.items():
        cell = code("print(2 + 2)", "nbval-check-output", output=stored, count=1)
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(notebook(markdown("# Toy"), cell)))
    flags = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags],
        cwd=paths.ROOT,
        env=os.environ | {"RECRL_PROGRESS": "off"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout.splitlines()[-1]
    assert "01_edited.ipynb::Cell 0" in done.stdout and "00_right.ipynb::Cell 0" not in done.stdout
    assert done.stderr == ""
