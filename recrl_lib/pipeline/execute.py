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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from recrl_lib import paths, runs
from recrl_lib.params import STAGES, Params, Stage, owned_by

KERNEL_DIED = 3  # exit code that tells a batch to try again: not an error of the notebook
INTERRUPTED = 130


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
        names = re.findall(r"^(\w+) *=", declaring, re.MULTILINE)
        owned = owned_by(stage.name)
        if wrong := ", ".join(sorted(set(names) ^ set(owned))):
            fault = f"the cell tagged 'parameters' lacks {wrong}, or should not declare it"
            remedy = f"its text is params.parameters_cell({stage.name!r})"
            problems.append(f"notebooks/{stage.notebook}: {fault}; {remedy}")
    if problems:
        raise ValueError("\n".join(problems))


# ------------------------------------------------------------------------------------ live progress

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


# ------------------------------------------------------------------------------------- one notebook


def execute(
    stage: Stage, params: dict[str, Any], run: str, line: ProgressLine,
    check: Callable[[dict], None] = lambda notebook: None, quiet: bool = False,
) -> int:  # fmt: skip
    """Execute the notebook of ``stage``, say on ``line`` how it ended; return the exit code.

    The executed notebook is kept in the run folder, also if a cell fails. ``check`` may refuse it
    with a ``StageFailure``. ``quiet``: no progress inside the notebook, so that none is stored.
    """
    output = runs.run_folder(run) / "notebooks" / stage.notebook
    try:
        _watched(_Execution(paths.NOTEBOOKS / stage.notebook, output, params), line, quiet)
        check(runs.read_notebook(output))
    except StageFailure as failure:
        kept = runs.display(output)
        line.close(f"FAILED {line.label}, {failure} (notebook kept at {kept})")
        return failure.exit_code
    except KeyboardInterrupt:
        remedy = "finished stages are kept, the same command goes on from here"
        line.close(f"INTERRUPTED {line.label} after {{time}} ({remedy})")
        return INTERRUPTED
    line.close(f"{line.label}: done in {{time}}")
    return 0


def _watched(execution: "_Execution", line: ProgressLine, quiet: bool) -> None:
    """Execute in a thread and show progress. An exception here ends the kernel first."""
    execution.output.parent.mkdir(parents=True, exist_ok=True)
    execution.log.parent.mkdir(parents=True, exist_ok=True)
    execution.output.unlink(missing_ok=True)
    execution.log.unlink(missing_ok=True)
    # A folder with a short name: the path of a Unix socket may have about 100 characters.
    with tempfile.TemporaryDirectory(prefix="recrl-") as folder, ThreadPoolExecutor(1) as pool:
        progress = Path(folder) / "progress"
        job = pool.submit(execution.run, Path(folder), "off" if quiet else str(progress))
        try:
            line.update()
            while not wait([job], timeout=0.5).done:
                line.update(last_line(progress))
        except BaseException:
            while not wait([job], timeout=0.2).done:
                _end_kernel(folder)
            raise
    if execution.log.is_file() and not execution.log.stat().st_size:
        execution.log.unlink()
    job.result()


@dataclass(frozen=True)
class _Execution:
    notebook: Path
    output: Path
    parameters: dict[str, Any]

    @property
    def log(self) -> Path:
        """``runs/x/logs/05_shielded_ppo.log`` for ``runs/x/notebooks/05_shielded_ppo.ipynb``."""
        return self.output.parent.parent / "logs" / f"{self.output.stem}.log"

    def run(self, scratch: Path, progress: str) -> None:
        """Execute; once more if the kernel did not start, which is rare and mostly gone then."""
        from papermill.exceptions import PapermillExecutionError

        for attempt in (1, 2):
            try:
                return self._papermill(scratch / f"{attempt}.json", progress)
            except PapermillExecutionError as error:
                reason = f"{error.ename}: {one_line(error.evalue)}"
                raise StageFailure(f"cell {error.exec_count}: {reason}") from None
            except Exception as error:
                cell = self._last_started_cell()
                printed = self.log.is_file() and self.log.stat().st_size
                see = f"; see {runs.display(self.log)}" if printed else ""
                reason = f"{type(error).__name__}: {one_line(error)}"
                if type(error).__name__ == "DeadKernelError" and cell:
                    why = "the kernel died, usually for want of memory: close other programs or"
                    message = f"cell {cell}: {why} choose a smaller profile{see}"
                    raise StageFailure(message, KERNEL_DIED) from None
                if cell:
                    raise StageFailure(f"cell {cell}: {reason}") from error
                if attempt == 2:
                    raise StageFailure(f"the kernel did not start: {reason}{see}") from error

    def _papermill(self, connection: Path, progress: str) -> None:
        import papermill
        from jupyter_client.manager import AsyncKernelManager
        from traitlets.config import Config

        log = self.log

        class LoggedKernelManager(AsyncKernelManager):
            """What the kernel process itself prints (start-up, crash) goes to a file."""

            async def start_kernel(self, **options: Any) -> None:
                env = os.environ | {"RECRL_PROGRESS": progress}
                with open(log, "ab") as file:
                    await super().start_kernel(stdout=file, stderr=file, env=env, **options)

        # The kernel of this environment comes before one of the same name in the user's home.
        os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # we report a failure, once
        # Unix sockets: no open ports, no race for them. On Windows ZeroMQ has only TCP.
        transport = "tcp" if sys.platform == "win32" else "ipc"
        manager = {"transport": transport, "connection_file": str(connection)}
        papermill.execute_notebook(
            self.notebook, self.output, parameters=self.parameters, kernel_name="python3",
            progress_bar=False, log_output=False, coalesce_streams=True,
            kernel_manager_class=LoggedKernelManager, config=Config({"KernelManager": manager}),
        )  # fmt: skip

    def _last_started_cell(self) -> int | None:
        """Number of the last code cell that papermill began, as Jupyter counts."""
        if not self.output.is_file():
            return None
        cells = runs.read_notebook(self.output)["cells"]
        notes = [c["metadata"].get("papermill", {}) for c in cells if c["cell_type"] == "code"]
        return sum(bool(note.get("start_time")) for note in notes) or None


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


# ----------------------------------------------------------------------------------- make notebooks


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
        if code := execute(stage, {}, run, line, refuse_stderr, quiet=True):
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
