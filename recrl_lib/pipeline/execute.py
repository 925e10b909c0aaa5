"""Run the notebooks in order with papermill: strict parameters, resume, live progress, one clear last line on failure.

::

    python -m recrl_lib.pipeline.execute all --profile laptop --run mine --seed 1 --set shield_rank=128
    python -m recrl_lib.pipeline.execute publish            # execute notebooks/ with their defaults and store the outputs
    python -m recrl_lib.pipeline.execute headline --run mine
    python -m recrl_lib.pipeline.execute job --run laptop-ablations-kl0-seed0 --stages shielded_ppo evaluation   # of a batch

A stage whose code, parameters and files are unchanged is kept; the executed notebooks lie in
``runs/<run>/notebooks/``, also that of a stage that failed. Exit codes: 0 done, 1 a stage failed,
2 wrong arguments, 3 a kernel died, 130 interrupted.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

from recrl_lib import paths, runs
from recrl_lib.params import (
    PIPELINE,
    PROFILES,
    STAGES,
    Params,
    Stage,
    owned_by,
    parse_value,
    resolve,
    stage_named,
)
from recrl_lib.runs import write_atomic

HEADLINE = (
    "reward",
    "ctr_lift",
    "ndcg@10",
    "top10_overlap",
    "top10_set_same",
    "max_abs_score_delta",
)


class StageFailure(RuntimeError):
    """A notebook could not be executed to its end; the message says where and why, in one line."""

    exit_code = 1


class KernelDied(StageFailure):
    """The notebook's process is gone: not the notebook's error, so a batch may try again."""

    exit_code = 3


# --------------------------------------------------------------------------------- checks before anything runs


def declared_parameters(notebook: dict, where: str) -> dict[str, Any]:
    """Names and default values of the notebook's ``parameters`` cell.

    The cell may hold ``name = literal`` lines and comments only: papermill injects its values after the
    cell, so that anything derived in it would silently keep the default (nteract/papermill, docs).
    Raises ``ValueError`` naming the notebook.
    """
    cells = [runs.source(c) for c in notebook["cells"] if "parameters" in runs.tags(c)]
    if len(cells) != 1:
        raise ValueError(
            f"{where}: {len(cells)} cells are tagged 'parameters'; there must be exactly one"
        )
    values: dict[str, Any] = {}
    try:
        for node in ast.parse(cells[0]).body:
            (target,) = node.targets
            values[target.id] = ast.literal_eval(node.value)
    except (SyntaxError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: the parameters cell may hold only lines of the form name = literal ({error})"
        ) from None
    return values


def check_notebooks(stages: tuple[Stage, ...]) -> None:
    """Each stage's notebook exists and declares exactly its parameters. ``ValueError`` lists all that is wrong."""
    problems = []
    for stage in stages:
        try:
            where = f"notebooks/{stage.notebook}"
            declared = declared_parameters(
                runs.read_notebook(paths.NOTEBOOKS / stage.notebook), where
            )
        except ValueError as error:
            problems.append(str(error))
            continue
        owned = owned_by(stage.name)
        if missing := [name for name in owned if name not in declared]:
            problems.append(f"{where}: the parameters cell lacks {', '.join(missing)}")
        if unknown := [name for name in declared if name not in owned]:
            problems.append(
                f"{where}: stage {stage.name!r} does not own {', '.join(unknown)} (see recrl_lib/params.py)"
            )
    if problems:
        raise ValueError("\n".join(problems))


# ----------------------------------------------------------------------------------------------- execution


class Ticker:
    """One line of live progress: rewritten in place on a terminal, else repeated every ``every`` seconds."""

    def __init__(self, label: str, out: TextIO, every: float = 20.0):
        self.label, self.out, self.every = label, out, every
        self.started = time.monotonic()
        self.tty = out.isatty()
        self.last = -every

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def tick(self, progress: Path) -> None:
        """Show the time and the newest line of ``progress`` (written by ``recrl_lib.progress`` in the kernel)."""
        if not self.tty and self.elapsed - self.last < self.every:
            return
        self.last = self.elapsed
        line = f"{self.label} {clock(self.elapsed)}"
        if note := latest_progress(progress):
            line += f" | {note}"
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r{line[:width]}\x1b[K")
        else:
            self._write(f"{line}\n")

    def close(self, text: str) -> None:
        """Replace the live line by ``text``."""
        self._write(f"\r\x1b[K{text}\n" if self.tty else f"{text}\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def latest_progress(path: Path) -> str:
    """``"ppo unshielded 4/12"`` from the last complete line of a progress file; empty if there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline may be half written
    try:
        last = json.loads(lines[-1])
        return f"{last['desc']} {last['done']}" + (f"/{last['total']}" if last["total"] else "")
    except (IndexError, ValueError, KeyError):
        return ""


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def execute(
    notebook: Path, output: Path, parameters: dict[str, Any], ticker: Ticker, quiet: bool = False
) -> None:
    """Execute ``notebook`` in a fresh kernel, keeping it at ``output`` whatever happens.

    ``quiet`` silences progress inside the notebook, so that nothing of it is stored. Raises
    ``StageFailure``; on ``KeyboardInterrupt`` the kernel is ended first.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="recrl-") as scratch, ThreadPoolExecutor(1) as pool:
        progress = Path(scratch) / "progress"
        # A virtual environment's kernel before one of the same name in the user's home.
        with _environment(
            RECRL_PROGRESS="off" if quiet else str(progress), JUPYTER_PREFER_ENV_PATH="1"
        ):
            job = pool.submit(_execute_with_retry, notebook, output, parameters, Path(scratch))
            try:
                ticker.tick(progress)
                while not wait([job], timeout=0.5).done:
                    ticker.tick(progress)
            except BaseException:
                while not wait([job], timeout=0.2).done:
                    _end_kernel(Path(scratch))
                raise
            log = kernel_log(output)
            if log.is_file() and not log.stat().st_size:
                log.unlink()
            job.result()


def _execute_with_retry(
    notebook: Path, output: Path, parameters: dict[str, Any], scratch: Path
) -> None:
    from papermill.exceptions import PapermillExecutionError

    log = kernel_log(output)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    for attempt in (1, 2):
        try:
            return _papermill(notebook, output, parameters, scratch / f"{attempt}.json", log)
        except PapermillExecutionError as error:
            raise StageFailure(
                f"cell {error.exec_count}: {error.ename}: {one_line(error.evalue)}"
            ) from None
        except Exception as error:
            cell = _last_started_cell(output)
            if cell is None and attempt == 1:
                continue  # the kernel did not come up: rare, and mostly gone the second time
            if cell is None:
                reason = f"{type(error).__name__}: {one_line(error)}{see(log)}"
                raise StageFailure(f"the kernel did not start: {reason}") from error
            if type(error).__name__ == "DeadKernelError":
                remedy = (
                    "usually for want of memory: close other programs or choose a smaller profile"
                )
                raise KernelDied(f"cell {cell}: the kernel died, {remedy}{see(log)}") from None
            raise StageFailure(f"cell {cell}: {type(error).__name__}: {one_line(error)}") from error


def _papermill(
    notebook: Path, output: Path, parameters: dict[str, Any], connection: Path, log: Path
) -> None:
    import papermill
    from jupyter_client.manager import AsyncKernelManager
    from traitlets.config import Config

    class LoggedKernelManager(AsyncKernelManager):
        """What the kernel process itself prints (start-up, crash, shutdown) goes to a file, not between our lines."""

        async def start_kernel(self, **options: Any) -> None:
            with open(log, "ab") as file:
                await super().start_kernel(stdout=file, stderr=file, **options)

    logging.getLogger("papermill").setLevel(
        logging.CRITICAL
    )  # what goes wrong is reported once, by the runner
    papermill.execute_notebook(
        notebook,
        output,
        parameters=parameters,
        kernel_name="python3",
        cwd=notebook.parent,
        progress_bar=False,
        log_output=False,
        coalesce_streams=True,
        kernel_manager_class=LoggedKernelManager,
        # Sockets in a short-named scratch folder: no port races between runs, no open ports, and a path
        # well below the ~100 characters that a Unix socket may have. On Windows ZeroMQ has no such sockets.
        config=Config(
            {
                "KernelManager": {
                    "transport": "tcp" if sys.platform == "win32" else "ipc",
                    "connection_file": str(connection),
                }
            }
        ),
    )


def kernel_log(output: Path) -> Path:
    """``runs/x/logs/05_shielded_ppo.log`` for ``runs/x/notebooks/05_shielded_ppo.ipynb``."""
    return output.parent.parent / "logs" / f"{output.stem}.log"


def see(log: Path) -> str:
    """A hint at the kernel's own output, if there is any."""
    return f"; see {runs.display(log)}" if log.is_file() and log.stat().st_size else ""


def _last_started_cell(output: Path) -> int | None:
    """Number of the last code cell that papermill began to execute, as Jupyter counts; ``None`` if there is none."""
    if not output.is_file():
        return None
    cells = [c for c in runs.read_notebook(output)["cells"] if c["cell_type"] == "code"]
    return sum(bool(c["metadata"].get("papermill", {}).get("start_time")) for c in cells) or None


def _end_kernel(scratch: Path) -> None:
    """End the child process whose connection file lies in ``scratch``, and what it has started."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(str(scratch) in argument for argument in child.cmdline()):
                for process in [*child.children(recursive=True), child]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def one_line(text: object) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text))
    return " ".join(plain.split())


# --------------------------------------------------------------------------------------------------- all


def run_all(
    params: Params,
    stages: tuple[Stage, ...] = PIPELINE,
    force: bool = False,
    out: TextIO | None = None,
) -> int:
    """Run ``stages`` in order, skipping those that are up to date; print progress and results to ``out``.

    Returns the exit code. Raises ``ValueError`` before anything runs if a notebook is missing or does
    not declare its parameters.
    """
    out = out or sys.stdout
    check_notebooks(stages)
    runs.write_params(params)
    begun = time.monotonic()
    kept = 0
    for number, stage in enumerate(stages, 1):
        label = f"stage {number}/{len(stages)} {stage.name}"
        ticker = Ticker(label, out)
        if not force and runs.up_to_date(stage.name, params):
            kept += 1
            ticker.close(f"{label}: unchanged, kept")
            continue
        output = runs.run_folder(params.run) / "notebooks" / stage.notebook
        try:
            values = {name: getattr(params, name) for name in owned_by(stage.name)}
            execute(paths.NOTEBOOKS / stage.notebook, output, values, ticker)
        except StageFailure as failure:
            ticker.close(f"FAILED {label}, {failure} (notebook kept at {runs.display(output)})")
            return failure.exit_code
        except KeyboardInterrupt:
            done = "finished stages are kept, the same command goes on from here"
            ticker.close(f"INTERRUPTED {label} after {clock(ticker.elapsed)} ({done})")
            return 130
        ticker.close(f"{label}: done in {clock(ticker.elapsed)}")
    if kept == len(stages):
        summary = f"run {params.run}: all {kept} stages unchanged, nothing to do"
    else:
        summary = f"run {params.run}: {len(stages)} stages ({kept} kept) in {clock(time.monotonic() - begun)}"
    shown = (
        results(params.run) if stages[-1] is PIPELINE[-1] else ""
    )  # else the table may be an older one
    print(f"\n{summary}\n\n{shown}".rstrip(), file=out, flush=True)
    return 0


def results(run: str) -> str:
    """The headline table and the report's path, as far as the run has got."""
    parts = []
    if (runs.run_folder(run) / "metrics" / "evaluation.json").is_file():
        parts.append(headline(run))
    report = runs.run_folder(run) / "report.html"
    if report.is_file():
        parts.append(f"report: {runs.display(report)}")
    return "\n\n".join(parts)


def headline(run: str) -> str:
    """The main table as text, one row per arm, from ``metrics/evaluation.json``."""
    metrics = runs.read_metrics(run, "evaluation")
    rows = [("arm", "reward", "ctr_lift [95 %]", *HEADLINE[2:])]
    for arm in runs.ARMS:
        value = {
            name: metrics[f"{arm}/{name}"] for name in (*HEADLINE, "ctr_lift_lo", "ctr_lift_hi")
        }
        lift = f"{value['ctr_lift']:.3f} [{value['ctr_lift_lo']:.3f}, {value['ctr_lift_hi']:.3f}]"
        shares = [f"{value[name]:.4f}" for name in HEADLINE[2:5]]
        rows.append(
            (arm, f"{value['reward']:.3f}", lift, *shares, f"{value['max_abs_score_delta']:.3g}")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows
    )


# ----------------------------------------------------------------------------------------------- publish


def publish(
    stages: tuple[Stage, ...] = STAGES, fresh: bool = True, out: TextIO | None = None
) -> int:
    """Execute the notebooks with their own defaults and write them back with outputs, without volatile metadata.

    ``fresh`` starts from an empty default run, as ``make test`` does. A notebook that fails, or writes to
    stderr, is not written back. Returns the exit code.
    """
    out = out or sys.stdout
    check_notebooks(stages)
    folder = runs.run_folder(Params().run)
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    for number, stage in enumerate(stages, 1):
        label = f"publish {number}/{len(stages)} {stage.name}"
        ticker = Ticker(label, out)
        output = folder / "notebooks" / stage.notebook
        try:
            execute(paths.NOTEBOOKS / stage.notebook, output, {}, ticker, quiet=True)
            notebook = runs.read_notebook(output)
            refuse_stderr(notebook)
        except StageFailure as failure:
            ticker.close(f"FAILED {label}, {failure} (notebook kept at {runs.display(output)})")
            return 1
        except KeyboardInterrupt:
            ticker.close(f"INTERRUPTED {label} after {clock(ticker.elapsed)}")
            return 130
        text = (
            json.dumps(clean_notebook(notebook), indent=1, ensure_ascii=False, sort_keys=True)
            + "\n"
        )
        write_atomic(paths.NOTEBOOKS / stage.notebook, text)
        ticker.close(f"{label}: done in {clock(ticker.elapsed)}")
    return 0


def refuse_stderr(notebook: dict) -> None:
    """``StageFailure`` naming the first cell that wrote to stderr: warnings have no place in a stored notebook."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                first = one_line("".join(output["text"]))[:200]
                raise StageFailure(f"cell {cell['execution_count']} wrote to stderr: {first}")


def clean_notebook(notebook: dict) -> dict:
    """``notebook`` with only what is stable from one execution to the next: ids from content, tags, plain metadata."""
    cells, seen = [], set()
    for cell in notebook["cells"]:
        identity = hashlib.sha256(f"{cell['cell_type']}\n{runs.source(cell)}".encode()).hexdigest()[
            :8
        ]
        while identity in seen:  # a cell that repeats an earlier one
            identity = hashlib.sha256(identity.encode()).hexdigest()[:8]
        seen.add(identity)
        metadata = {"tags": runs.tags(cell)} if runs.tags(cell) else {}
        cells.append(
            {
                **cell,
                "id": identity,
                "metadata": metadata,
                "source": runs.source(cell).splitlines(keepends=True),
            }
        )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


# ------------------------------------------------------------------------------------------ command line


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """``["shield_rank=128"]`` as typed values. Raises ``ValueError``."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"command line: --set {setting!r} must have the form name=value")
        if name in ("run", "seed"):
            raise ValueError(f"command line: give {name} as --{name} {text}, not with --set")
        values[name] = parse_value(name, text)
    return values


def default_profile(run: str | None = None) -> str:
    """The profile that ``run`` is named after (``make all RUN=smoke`` must not turn that run into another); else the machine's."""
    named = (run or "").partition("-seed")[0]  # as ``_all`` names a run of another seed
    if named in PROFILES:
        return named
    import torch

    return "pod" if torch.cuda.is_available() else "laptop"


def up_to(stage: str | None) -> tuple[Stage, ...]:
    """The pipeline, cut after ``stage`` if one is named."""
    names = [s.name for s in PIPELINE]
    if stage is not None and stage not in names:
        raise ValueError(f"command line: --to {stage!r}: choose one of {', '.join(names)}")
    return PIPELINE[: names.index(stage) + 1] if stage else PIPELINE


def _all(arguments: argparse.Namespace) -> int:
    profile = arguments.profile or default_profile(arguments.run)
    run = arguments.run or (profile if arguments.seed == 0 else f"{profile}-seed{arguments.seed}")
    overrides = parse_overrides(arguments.set)
    params = resolve(profile, run=run, seed=arguments.seed, **overrides)
    stages = up_to(arguments.to)
    print(f"profile {profile}, run {run}, seed {arguments.seed}", flush=True)
    return run_all(params, stages, force=arguments.force)


def _job(arguments: argparse.Namespace) -> int:
    """Stages of a run that a batch has prepared. Waits while another process executes the run, then keeps what it did."""
    params = runs.read_params(arguments.run)
    if params is None:
        raise ValueError(f"runs/{arguments.run} does not exist: jobs are prepared by make batch")
    if arguments.attended:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    with _alone(arguments.run):
        return run_all(params, tuple(stage_named(name) for name in arguments.stages))


def _end_with_parent() -> None:
    """Our standard input is a pipe that nobody writes to: when it ends, whoever started us is gone, so are we."""
    while os.read(0, 1):  # sys.stdin has a lock that a thread must not hold when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _alone(run: str) -> Iterator[None]:
    """Hold the run's lock. It ends with the process, so that none is ever left behind."""
    try:
        import fcntl
    except ImportError:  # Windows without WSL: nobody else is kept out
        yield
        return
    path = runs.run_folder(run) / ".lock"
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"run {run}: another process executes it, waiting", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish(arguments: argparse.Namespace) -> int:
    if arguments.only is None:
        return publish()
    stages = tuple(stage for stage in STAGES if stage.number == arguments.only)
    if not stages:
        raise ValueError(f"command line: no notebook has the number {arguments.only}")
    return publish(stages, fresh=False)


def _headline(arguments: argparse.Namespace) -> int:
    print(headline(arguments.run))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recrl_lib.pipeline.execute", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, function: Callable[[argparse.Namespace], int], help: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help)
        added.set_defaults(function=function)
        return added

    every = command("all", _all, "run the pipeline")
    every.add_argument(
        "--profile",
        choices=tuple(PROFILES),
        help="default: the one that the run is named after, else pod where CUDA is found, else laptop",
    )
    every.add_argument(
        "--run", help="name of the run folder; default: the profile, with the seed if it is not 0"
    )
    every.add_argument("--seed", type=int, default=0)
    every.add_argument(
        "--force", action="store_true", help="run every stage, also where nothing has changed"
    )
    every.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="override parameters",
    )
    every.add_argument("--to", metavar="STAGE", help="stop after this stage")
    store = command(
        "publish", _publish, "execute notebooks/ with their defaults and store the outputs"
    )
    store.add_argument(
        "--only",
        type=int,
        metavar="NN",
        help="this notebook only, on top of the present default run",
    )
    job = command("job", _job, "some stages of one run of a batch")
    job.add_argument("--run", required=True)
    job.add_argument(
        "--stages", nargs="+", required=True, choices=[s.name for s in PIPELINE], metavar="STAGE"
    )
    job.add_argument(
        "--attended", action="store_true", help="end when standard input ends, i.e. with the parent"
    )
    command("headline", _headline, "print the main table of a run").add_argument(
        "--run", required=True
    )
    return parser


def _terminated(signum, frame):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return arguments.function(arguments)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("INTERRUPTED between stages", flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
