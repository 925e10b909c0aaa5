"""Execute notebooks with papermill, each in a kernel of its own, and store executed notebooks.

Which stage of a run is executed when is decided in ``recrl_lib.pipeline.tasks``.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

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
        except ValueError as error:
            problems.append(str(error))
            continue
        declaring = "\n".join(runs.source(c) for c in cells if "parameters" in runs.tags(c))
        declared = re.findall(r"^(\w+) *=", declaring, re.MULTILINE)
        if wrong := ", ".join(sorted(set(declared) ^ set(owned_by(stage.name)))):
            fault = f"the cell tagged 'parameters' lacks {wrong}, or should not declare it"
            remedy = f"its text is params.parameters_cell({stage.name!r})"
            problems.append(f"notebooks/{stage.notebook}: {fault}; {remedy}")
    if problems:
        raise ValueError("\n".join(problems))


# ---------------------------------------------------------------------------------- live progress

clock = tqdm.format_interval  # 83 seconds -> "01:23"


class ProgressLine:
    """One line of live progress: redrawn by tqdm on a terminal, else printed now and then."""

    def __init__(self, label: str, out: TextIO, every: float = 20.0):
        self.label, self.out, self.every = label, out, every
        self.started, self.printed = time.monotonic(), -every
        self.bar = tqdm(bar_format="{desc}", file=out, leave=False, disable=not out.isatty())

    def update(self, note: str = "") -> None:
        """Show the time since the start and ``note``."""
        elapsed = time.monotonic() - self.started
        line = f"{self.label} {clock(elapsed)}" + (f" | {note}" if note else "")
        if not self.bar.disable:
            self.bar.set_description_str(line[: shutil.get_terminal_size().columns - 1])
        elif elapsed - self.printed >= self.every:
            self.printed = elapsed
            print(line, file=self.out, flush=True)

    def close(self, text: str) -> None:
        """Replace the live line by ``text``, where {time} is the time since the start."""
        self.bar.close()
        text = text.replace("{time}", clock(time.monotonic() - self.started))
        print(text, file=self.out, flush=True)


def last_line(path: Path) -> str:
    """The last complete line of a file that another process writes; empty if there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# ----------------------------------------------------------------------------------- one notebook


def execute(
    stage: Stage, params: dict[str, Any], run: str, line: ProgressLine,
    check: Callable[[dict], None] | None = None,
) -> int:  # fmt: skip
    """Execute the notebook of ``stage``, say on ``line`` how it ended; return the exit code.

    The executed notebook is kept in the run folder, also if a cell fails. With ``check``, which may
    refuse it by a ``StageFailure``, it is to be stored: no progress is shown inside it.
    """
    folder = runs.run_folder(run)
    output = folder / "notebooks" / stage.notebook
    log = folder / "logs" / f"{output.stem}.log"  # what the kernel process itself prints
    for path in (output, log):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    try:
        _watched(paths.NOTEBOOKS / stage.notebook, output, params, log, line, check is None)
        if check:
            check(runs.read_notebook(output))
    except StageFailure as failure:
        see = f"; see {runs.display(log)}" if log.is_file() and "kernel" in str(failure) else ""
        kept = f"(notebook kept at {runs.display(output)})"
        line.close(f"FAILED {line.label}, {failure}{see} {kept}")
        return failure.exit_code
    except KeyboardInterrupt:
        remedy = "finished stages are kept, the same command goes on from here"
        line.close(f"INTERRUPTED {line.label} after {{time}} ({remedy})")
        return INTERRUPTED
    line.close(f"{line.label}: done in {{time}}")
    return 0


def _watched(
    notebook: Path, output: Path, params: dict, log: Path, line: ProgressLine, progress: bool
) -> None:
    """Execute in a thread and show progress. An exception here ends the kernel first."""
    # A folder with a short name: the path of a Unix socket may have about 100 characters.
    with tempfile.TemporaryDirectory(prefix="recrl-") as folder, ThreadPoolExecutor(1) as pool:
        news = Path(folder) / "progress"
        manager = _logged_kernel_manager(log, str(news) if progress else "off")
        job = pool.submit(_with_retry, notebook, output, params, Path(folder), manager)
        try:
            line.update()
            while not wait([job], timeout=0.5).done:
                line.update(last_line(news))
        except BaseException:
            while not wait([job], timeout=0.2).done:
                _end_kernel(folder)
            raise
    if log.is_file() and not log.stat().st_size:
        log.unlink()
    job.result()


def _with_retry(notebook: Path, output: Path, params: dict, scratch: Path, manager: type) -> None:
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
                notebook, output, parameters=params, kernel_name="python3", progress_bar=False,
                log_output=False, coalesce_streams=True, kernel_manager_class=manager,
                config=Config({"KernelManager": options}),
            )  # fmt: skip
            return
        except PapermillExecutionError as error:
            reason = f"{error.ename}: {one_line(error.evalue)}"
            raise StageFailure(f"cell {error.exec_count}: {reason}") from None
        except Exception as error:
            reason, cell = f"{type(error).__name__}: {one_line(error)}", _last_started_cell(output)
            if reason.startswith("DeadKernelError") and cell:
                why = "the kernel died, usually for want of memory"
                remedy = "close other programs or choose a smaller profile"
                raise StageFailure(f"cell {cell}: {why}: {remedy}", KERNEL_DIED) from None
            if cell:
                raise StageFailure(f"cell {cell}: {reason}") from error
            if attempt == 2:
                raise StageFailure(f"the kernel did not start: {reason}") from error


def _logged_kernel_manager(log: Path, progress: str) -> type:
    from jupyter_client.manager import AsyncKernelManager

    class LoggedKernelManager(AsyncKernelManager):
        async def start_kernel(self, **options: Any) -> None:
            env = os.environ | {"RECRL_PROGRESS": progress}
            with open(log, "ab") as file:
                await super().start_kernel(stdout=file, stderr=file, env=env, **options)

    return LoggedKernelManager


def _last_started_cell(output: Path) -> int:
    """Number of the last code cell that papermill began, as Jupyter counts; 0 if there is none."""
    cells = runs.read_notebook(output)["cells"] if output.is_file() else []
    notes = [c["metadata"].get("papermill", {}) for c in cells if c["cell_type"] == "code"]
    return sum(bool(note.get("start_time")) for note in notes)


def _end_kernel(scratch: str) -> None:
    """End the child process whose connection file lies in ``scratch``, and what it has started."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(scratch in argument for argument in child.cmdline()):
                for process in [*child.children(recursive=True), child]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def one_line(text: object) -> str:
    """``text`` without line breaks and terminal colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text)).split())


# --------------------------------------------------------------------------------- make notebooks


def publish(
    stages: tuple[Stage, ...] = STAGES, fresh: bool = True, out: TextIO | None = None
) -> int:
    """Execute notebooks with their own defaults and store them with outputs; return the exit code.

    ``fresh`` starts from an empty default run, as ``make test`` does. A notebook that fails, or
    that writes to stderr, is not stored.
    """
    run = Params().run
    check_notebooks(stages)
    if fresh:
        shutil.rmtree(runs.run_folder(run), ignore_errors=True)
    for number, stage in enumerate(stages, 1):
        line = ProgressLine(f"publish {number}/{len(stages)} {stage.name}", out or sys.stdout)
        if code := execute(stage, {}, run, line, refuse_stderr):
            return code
        notebook = runs.read_notebook(runs.run_folder(run) / "notebooks" / stage.notebook)
        text = json.dumps(clean_notebook(notebook), indent=1, ensure_ascii=False, sort_keys=True)
        runs.write_atomic(paths.NOTEBOOKS / stage.notebook, text + "\n")
    return 0


def refuse_stderr(notebook: dict) -> None:
    """``StageFailure`` naming the first cell that wrote to stderr, where warnings go."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                first = one_line("".join(output["text"]))[:200]
                raise StageFailure(f"cell {cell['execution_count']} wrote to stderr: {first}")


def clean_notebook(notebook: dict) -> dict:
    """``notebook`` without what changes at each execution: ids come from content, metadata go."""
    cells, seen = [], set()
    for cell in notebook["cells"]:
        source, tags = runs.source(cell), runs.tags(cell)
        identity = hashlib.sha256(f"{cell['cell_type']}\n{source}".encode()).hexdigest()[:8]
        while identity in seen:  # a cell that repeats an earlier one
            identity = hashlib.sha256(identity.encode()).hexdigest()[:8]
        seen.add(identity)
        stable = {"id": identity, "metadata": {"tags": tags} if tags else {}}
        cells.append({**cell, **stable, "source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":  # until all callers say recrl_lib.pipeline.tasks
    from recrl_lib.pipeline.tasks import main

    sys.exit(main())
