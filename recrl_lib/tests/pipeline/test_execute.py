"""One notebook in a kernel: how it fails, what it shows meanwhile; and stored notebooks."""

import io
import json
import sys
import time

import pytest

from recrl_lib import provenance
from recrl_lib.params import STAGES
from recrl_lib.pipeline import execute

ENVIRONMENT = STAGES[0]


@pytest.fixture
def executed(house, capsys):
    """``executed(*bodies)``: exit code and last line of a notebook of stage ``environment``."""

    def call(*bodies) -> tuple[int, str]:
        house.write("environment", *bodies)
        exit_code = execute.execute(ENVIRONMENT, {}, "r", "stage 1/1")
        return exit_code, capsys.readouterr().out.splitlines()[-1]

    return call


def test_a_kernel_that_dies_is_told_from_a_failure(house, executed):
    dying = "import os, sys\nprint('last words', file=sys.__stderr__, flush=True)\nos._exit(1)"
    exit_code, line = executed("x = 1", dying, "x = 2")
    assert exit_code == execute.KERNEL_DIED == 3
    assert line.startswith("FAILED stage 1/1, cell 4: the kernel died, usually for want of memory")
    assert "see " in line and "00_environment.log (notebook kept at " in line
    assert "last words" in (house.runs / "r" / "logs" / "00_environment.log").read_text()


def test_a_kernel_that_does_not_start_is_tried_twice(executed, monkeypatch):
    attempts = []

    def fail(*_, **options):
        attempts.append(options["config"].KernelManager["transport"])
        raise RuntimeError("Kernel died before\nreplying to kernel_info")

    monkeypatch.setattr("papermill.execute_notebook", fail)
    exit_code, line = executed()
    assert exit_code == 1 and attempts == ["tcp" if sys.platform == "win32" else "ipc"] * 2
    assert "the kernel did not start: RuntimeError: Kernel died before replying" in line


def test_the_last_line_is_shown(tmp_path):
    path = tmp_path / "progress"
    assert execute.last_line(path) == ""
    for text, line in [("", ""), ("a\nb", "b"), ("x\rppo 4/12\n\n", "ppo 4/12")]:
        path.write_bytes(text.encode())
        assert execute.last_line(path) == line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_and_sees_into_a_cell(house, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    loop = "import time\nfrom recrl_lib.progress import track\n"
    house.write("environment", f"{loop}for _ in track(range(3), 'counting'):\n    time.sleep(0.7)")
    assert execute.execute(ENVIRONMENT, {}, "r", "stage 1/1") == 0
    assert " | counting 2/3" in terminal.getvalue()
    *live, last = terminal.getvalue().split("\r")
    assert not any("\n" in text for text in live) and last.startswith("stage 1/1: done in 00:")


def test_a_log_gets_a_line_now_and_then(capsys):
    line = execute.ProgressLine("stage 1/2 data")
    for seconds in (0, 1, 19, 20.5, 30, 3725):
        line.started = time.monotonic() - seconds
        line.update()
    line.close("end")
    times = [text.split()[-1] for text in capsys.readouterr().out.splitlines()]
    assert times == ["00:00", "00:20", "1:02:05", "end"]


def test_publish_stores_outputs_and_nothing_volatile(house):
    path = house.write("environment", "print('a')\nprint('b')", "1 + 1")
    ids = [cell["id"] for cell in provenance.read_notebook(path)["cells"]]
    for stage in STAGES[1:]:  # nothing but the one asked for is executed
        house.write(stage.name, "1 / 0")
    assert execute.publish(only=0) == 0
    stored = json.loads(path.read_text())
    cells = [c for c in stored["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == [1, 2, 3, 4]
    stream = {"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]}
    assert cells[2]["outputs"] == [stream]
    assert cells[3]["outputs"][0]["data"] == {"text/plain": ["2"]}
    assert [c["metadata"] for c in cells] == [{"tags": ["parameters"]}, {}, {}, {}]
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert [cell["id"] for cell in stored["cells"]] == ids
    assert path.read_bytes().endswith(b"}\n") and "papermill" not in path.read_text()


@pytest.mark.parametrize(
    "body, words",
    [
        ("1 / 0", "cell 3: ZeroDivisionError"),
        ("import sys\nsys.stderr.write('W: x')", "cell 3 wrote to stderr: W: x"),
    ],
)
def test_publish_refuses_a_notebook_that_fails_or_warns(house, body, words, capsys):
    path = house.write("environment", body)
    before = path.read_bytes()
    assert execute.publish(only=0) == 1
    assert words in capsys.readouterr().out.splitlines()[-1]
    assert path.read_bytes() == before
