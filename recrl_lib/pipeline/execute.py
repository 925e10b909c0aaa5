"""Execute notebooks with papermill, each in a kernel of its own, and store executed notebooks.

Which stage of a run is executed when is decided in ``recrl_lib.pipeline.tasks``.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from recrl_lib import paths, provenance, runs
from recrl_lib.params import STAGES, Params, Stage

KERNEL_DIED, INTERRUPTED = 3, 130  # exit codes; after the first a batch tries again


class StageFailure(RuntimeError):
    """``StageFailure(message, exit code)``: a notebook was not executed to its end."""


clock = tqdm.format_interval  # 83 seconds -> "01:23"


class ProgressLine:
    """One line of live progress: redrawn by tqdm on a terminal, else printed now and then."""

    EVERY = 20.0  # seconds between two lines that are printed

    def __init__(self, label: str):
        self.label, self.started, self.printed = label, time.monotonic(), -self.EVERY
        hidden = not sys.stdout.isatty()
        self.bar = tqdm(bar_format="{desc}", file=sys.stdout, leave=False, disable=hidden)

    def update(self, note: str = "") -> None:
        """Show the time since the start and ``note``."""
        elapsed = time.monotonic() - self.started
        line = f"{self.label} {clock(elapsed)}" + (f" | {note}" if note else "")
        if not self.bar.disable:
            self.bar.set_description_str(line[: shutil.get_terminal_size().columns - 1])
        elif elapsed - self.printed >= self.EVERY:
            self.printed = elapsed
            print(line, flush=True)

    def close(self, text: str) -> None:
        """Replace the live line by ``text``, where {time} is the time since the start."""
        self.bar.close()
        print(text.replace("{time}", clock(time.monotonic() - self.started)), flush=True)


def last_line(path: Path) -> str:
    """The last line or progress text of a file that another process writes."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text.replace("\r", "\n").strip().rpartition("\n")[2].strip()


def one_line(text: object) -> str:
    """``text`` without line breaks and terminal colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text)).split())


def execute(stage: Stage, params: dict[str, Any], run: str, label: str) -> int:
    """Execute the notebook of ``stage``, kept in the run folder, and say how it ended; its code."""
    line, output = ProgressLine(label), runs.run_folder(run) / "notebooks" / stage.notebook
    log = runs.run_folder(run) / "logs" / f"{output.stem}.log"  # what the kernel itself prints
    for path in (output, log):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    try:
        _watched(output, params, log, line)
    except StageFailure as failure:
        message, code = failure.args
        see = f"; see {runs.display(log)}" if log.is_file() and "kernel" in message else ""
        line.close(f"FAILED {label}, {message}{see} (notebook kept at {runs.display(output)})")
        return code
    except KeyboardInterrupt:
        remedy = "finished stages are kept, the same command goes on from here"
        line.close(f"INTERRUPTED {label} after {{time}} ({remedy})")
        return INTERRUPTED
    line.close(f"{label}: done in {{time}}")
    return 0


def _watched(output: Path, params: dict[str, Any], log: Path, line: ProgressLine) -> None:
    """Execute in a thread and show progress. An exception here ends the kernel first."""
    # A folder with a short name: the path of a Unix socket may have about 100 characters.
    with tempfile.TemporaryDirectory(prefix="recrl-") as folder, ThreadPoolExecutor(1) as pool:
        news = Path(folder) / "progress"
        job = pool.submit(_with_retry, output, params, news, _logged_kernel_manager(log, news))
        try:
            line.update()
            while not wait([job], timeout=0.5).done:
                line.update(last_line(news))
        except BaseException:
            while not wait([job], timeout=0.2).done:
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            raise
    if log.is_file() and not log.stat().st_size:
        log.unlink()
    job.result()


def _with_retry(output: Path, params: dict[str, Any], news: Path, manager: type) -> None:
    """Execute; once more if the kernel did not start, which is rare and mostly gone then."""
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    # The kernel of this environment comes before one of the same name in the user's home.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # we report a failure, once
    # Unix sockets: no open ports, no race for them. On Windows ZeroMQ has only TCP.
    transport = "tcp" if sys.platform == "win32" else "ipc"
    for attempt in (1, 2):
        options = {
            "transport": transport,
            "connection_file": str(news.with_name(f"{attempt}.json")),
        }
        try:
            papermill.execute_notebook(
                paths.NOTEBOOKS / output.name, output, parameters=params, kernel_name="python3",
                progress_bar=False, log_output=False, coalesce_streams=True,
                kernel_manager_class=manager, config=Config({"KernelManager": options}),
            )  # fmt: skip
            return
        except PapermillExecutionError as error:
            reason = f"cell {error.exec_count}: {error.ename}: {one_line(error.evalue)}"
            raise StageFailure(reason, 1) from None
        except Exception as error:
            kind, begun = type(error).__name__, _cells_begun(output)
            if begun and kind == "DeadKernelError":
                remedy = "usually for want of memory: close programs or choose a smaller profile"
                raise StageFailure(
                    f"cell {begun}: the kernel died, {remedy}", KERNEL_DIED
                ) from error
            if begun or attempt == 2:
                where = f"cell {begun}" if begun else "the kernel did not start"
                raise StageFailure(f"{where}: {kind}: {one_line(error)}", 1) from error


def _logged_kernel_manager(log: Path, news: Path) -> type:
    from jupyter_client.manager import AsyncKernelManager

    class LoggedKernelManager(AsyncKernelManager):
        async def start_kernel(self, **options: Any) -> None:
            env = os.environ | {"RECRL_PROGRESS": str(news)}
            with open(log, "ab") as file:
                await super().start_kernel(stdout=file, stderr=file, env=env, **options)

    return LoggedKernelManager


def _cells_begun(output: Path) -> int:
    """Number of the last code cell that papermill began, as Jupyter counts; 0 if there is none."""
    cells = provenance.read_notebook(output)["cells"] if output.is_file() else []
    notes = [c["metadata"].get("papermill", {}) for c in cells if c["cell_type"] == "code"]
    return sum(bool(note.get("start_time")) for note in notes)


def publish(only: int | None = None) -> int:
    """Execute notebooks with their own defaults, store them without metadata; the exit code.

    All, from an empty default run, or the one numbered ``only``, in that run as it is. One that
    writes to stderr, where warnings go, is refused.
    """
    run, stages = Params().run, tuple(s for s in STAGES if only in (None, s.number))
    if not stages:
        raise ValueError(f"ONLY={only}: no notebook has this number")
    if only is None:
        shutil.rmtree(runs.run_folder(run), ignore_errors=True)
    for number, stage in enumerate(stages, 1):
        label = f"publish {number}/{len(stages)} {stage.name}"
        if code := execute(stage, {}, run, label):
            return code
        notebook = provenance.read_notebook(runs.run_folder(run) / "notebooks" / stage.notebook)
        for cell in notebook["cells"]:
            cell["metadata"] = {"tags": provenance.tags(cell)} if provenance.tags(cell) else {}
            for output in cell.get("outputs", []):
                if output.get("name") == "stderr":
                    text = one_line("".join(output["text"]))[:200]
                    print(f"FAILED {label}, cell {cell['execution_count']} wrote to stderr: {text}")
                    return 1
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}}
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        runs.write_atomic(paths.NOTEBOOKS / stage.notebook, text + "\n")
    return 0
