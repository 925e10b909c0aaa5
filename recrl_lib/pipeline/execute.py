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

from recrl_lib import paths, runs
from recrl_lib.params import STAGES, Params, Stage, owned_by

KERNEL_DIED, INTERRUPTED = 3, 130  # exit codes; after the first a batch tries again


class StageFailure(RuntimeError):
    """A notebook was not executed to its end. The message says where and why, in one line."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def check_notebooks(stages: tuple[Stage, ...]) -> None:
    """``ValueError`` unless each notebook exists and declares exactly its stage's parameters."""
    problems = []
    for stage in stages:
        try:
            cells = runs.read_notebook(paths.NOTEBOOKS / stage.notebook)["cells"]
            text = "\n".join(runs.source(c) for c in cells if "parameters" in runs.tags(c))
            declared = set(re.findall(r"^(\w+) *=", text, re.MULTILINE))
            if wrong := ", ".join(sorted(declared ^ set(owned_by(stage.name)))):
                fault = f"the cell tagged 'parameters' lacks {wrong}, or should not declare it"
                remedy = f"its text is params.parameters_cell({stage.name!r})"
                raise ValueError(f"notebooks/{stage.notebook}: {fault}; {remedy}")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


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


def execute(
    stage: Stage, params: dict[str, Any], run: str, line: ProgressLine, to_store: bool = False
) -> int:
    """Execute the notebook of ``stage``, say on ``line`` how it ended; return the exit code.

    The executed notebook is kept in the run folder, also if a cell fails. One that is ``to_store``
    shows no progress inside and must not write to stderr, where warnings go.
    """
    output = runs.run_folder(run) / "notebooks" / stage.notebook
    log = runs.run_folder(run) / "logs" / f"{output.stem}.log"  # what the kernel itself prints
    for path in (output, log):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    try:
        _watched(output, params, log, line, progress=not to_store)
        if to_store:
            _refuse_stderr(output)
    except StageFailure as failure:
        see = f"; see {runs.display(log)}" if log.is_file() and "kernel" in str(failure) else ""
        line.close(f"FAILED {line.label}, {failure}{see} (notebook kept at {runs.display(output)})")
        return failure.exit_code
    except KeyboardInterrupt:
        remedy = "finished stages are kept, the same command goes on from here"
        line.close(f"INTERRUPTED {line.label} after {{time}} ({remedy})")
        return INTERRUPTED
    line.close(f"{line.label}: done in {{time}}")
    return 0


def _watched(output: Path, params: dict, log: Path, line: ProgressLine, progress: bool) -> None:
    """Execute in a thread and show progress. An exception here ends the kernel first."""
    # A folder with a short name: the path of a Unix socket may have about 100 characters.
    with tempfile.TemporaryDirectory(prefix="recrl-") as folder, ThreadPoolExecutor(1) as pool:
        news = Path(folder) / "progress"
        manager = _logged_kernel_manager(log, str(news) if progress else "off")
        job = pool.submit(_with_retry, output, params, Path(folder), manager)
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


def _with_retry(output: Path, params: dict, scratch: Path, manager: type) -> None:
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
        options = {"transport": transport, "connection_file": str(scratch / f"{attempt}.json")}
        try:
            papermill.execute_notebook(
                paths.NOTEBOOKS / output.name, output, parameters=params, kernel_name="python3",
                progress_bar=False, log_output=False, coalesce_streams=True,
                kernel_manager_class=manager, config=Config({"KernelManager": options}),
            )  # fmt: skip
            return
        except PapermillExecutionError as error:
            reason = f"{error.ename}: {one_line(error.evalue)}"
            raise StageFailure(f"cell {error.exec_count}: {reason}") from None
        except Exception as error:
            reason, cell, code = f"{type(error).__name__}: {one_line(error)}", _last_cell(output), 1
            if cell and reason.startswith("DeadKernelError"):
                reason, code = "the kernel died, usually for want of memory", KERNEL_DIED
                reason += ": close other programs or choose a smaller profile"
            if cell or attempt == 2:
                where = f"cell {cell}" if cell else "the kernel did not start"
                raise StageFailure(f"{where}: {reason}", code) from error


def _logged_kernel_manager(log: Path, progress: str) -> type:
    from jupyter_client.manager import AsyncKernelManager

    class LoggedKernelManager(AsyncKernelManager):
        async def start_kernel(self, **options: Any) -> None:
            env = os.environ | {"RECRL_PROGRESS": progress}
            with open(log, "ab") as file:
                await super().start_kernel(stdout=file, stderr=file, env=env, **options)

    return LoggedKernelManager


def _last_cell(output: Path) -> int:
    """Number of the last code cell that papermill began, as Jupyter counts; 0 if there is none."""
    cells = runs.read_notebook(output)["cells"] if output.is_file() else []
    notes = [c["metadata"].get("papermill", {}) for c in cells if c["cell_type"] == "code"]
    return sum(bool(note.get("start_time")) for note in notes)


def _refuse_stderr(output: Path) -> None:
    for cell in runs.read_notebook(output)["cells"]:
        for part in cell.get("outputs", []):
            if part.get("name") == "stderr":
                first = one_line("".join(part["text"]))[:200]
                raise StageFailure(f"cell {cell['execution_count']} wrote to stderr: {first}")


def publish(only: int | None = None) -> int:
    """Execute notebooks with their own defaults, store them without metadata; the exit code.

    All, from an empty default run, or the one numbered ``only``, in that run as it is.
    """
    run, stages = Params().run, tuple(s for s in STAGES if only in (None, s.number))
    if not stages:
        raise ValueError(f"ONLY={only}: no notebook has this number")
    check_notebooks(stages)
    if only is None:
        shutil.rmtree(runs.run_folder(run), ignore_errors=True)
    for number, stage in enumerate(stages, 1):
        line = ProgressLine(f"publish {number}/{len(stages)} {stage.name}")
        if code := execute(stage, {}, run, line, to_store=True):
            return code
        notebook = runs.read_notebook(runs.run_folder(run) / "notebooks" / stage.notebook)
        for cell in notebook["cells"]:
            cell["metadata"] = {"tags": runs.tags(cell)} if runs.tags(cell) else {}
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}}
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        runs.write_atomic(paths.NOTEBOOKS / stage.notebook, text + "\n")
    return 0
