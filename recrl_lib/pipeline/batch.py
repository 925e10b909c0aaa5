"""Batches: many runs derived from one base run, on this machine or on a Ray cluster.

::

    python -m recrl_lib.pipeline.batch --grid ablations --base laptop --jobs 2          # make batch GRID=ablations ...
    python -m recrl_lib.pipeline.batch --grid ablations --engine ray --address auto --gpus 0.5

A grid is a YAML file, in ``recrl_lib/batches/`` or anywhere, with these fields::

    base: laptop                        the finished run that all jobs share their early stages with (see derive)
    stages: [evaluation, audit]         what every job must reach; whatever they need and do not share is run too
    seeds: [0, 1, 2]
    fixed: {eval_users: 64}             parameters of every job
    arms: {kl0: {kl_coef: 0.0}}         named sets of parameters, one job each
    cross: {shield_energy: [.9, .99]}   lists to cross, with every arm if there are arms
    skip: [{arm: kl0, seed: 2}]         combinations to leave out

It is checked whole before anything starts. A job is one run folder ``<base>-<grid>-<arm>-seed<n>`` and one process,
``runner job``, which executes its notebooks with papermill. It is done when the manifest says so: a batch that was
stopped goes on, and a job that was done is not done again. A job whose kernel or process died is tried once more.
Exit codes: 0 all done, 1 some jobs failed (listed), 2 wrong grid or arguments, 130 interrupted.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from recrl_lib import paths, runs
from recrl_lib.params import Params, check_names, kind_of
from recrl_lib.pipeline import derive
from recrl_lib.pipeline.execute import KernelDied, clock

GRIDS = paths.LIBRARY / "batches"
FIELDS = ("base", "stages", "seeds", "fixed", "arms", "cross", "skip")
TRIES = 2  # a job whose kernel or process died is started again, once
GRACE = 15.0  # seconds that a job has to end its kernel before it is killed


@dataclass(frozen=True)
class Job:
    """One run of a batch: ``changes`` against the base run, and the ``stages`` that are its own to execute."""

    run: str
    arm: str
    changes: dict[str, Any]
    params: Params
    stages: tuple[str, ...]

    def done(self) -> bool:
        return all(runs.up_to_date(stage, self.params) for stage in self.stages)


@dataclass(frozen=True)
class Grid:
    """A batch, checked."""

    name: str
    base: str
    jobs: tuple[Job, ...]


# ------------------------------------------------------------------------------------------------ grids


def grid_file(grid: str) -> Path:
    """``ablations`` -> ``recrl_lib/batches/ablations.yaml``; anything with a suffix is a path."""
    path = Path(grid) if grid.endswith((".yaml", ".yml")) else GRIDS / f"{grid}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in GRIDS.glob("*.yaml")))
        raise ValueError(
            f"grid {grid!r}: {runs.display(path)} does not exist; give a path ending in .yaml, or one of {known}"
        )
    return path


def load(grid: str, base: str | None = None, seeds: Iterable[int] | None = None) -> Grid:
    """The grid with its base run and seeds, or others. ``ValueError`` lists everything that is wrong with it."""
    path = grid_file(grid)
    where = runs.display(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    given = _checked_fields(content, where)
    base = base or given["base"]
    seeds = list(seeds) if seeds is not None else given["seeds"]
    try:
        source, ready = derive.base_run(base)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    problems: list[str] = []
    jobs: list[Job] = []
    skipped: set[int] = set()
    for arm, changes in _combinations(given):
        for seed in seeds:
            facts = {**changes, "arm": arm, "seed": seed}
            hits = {
                i
                for i, skip in enumerate(given["skip"])
                if all(facts.get(key) == value for key, value in skip.items())
            }
            skipped |= hits
            if hits:
                continue
            run = f"{base}-{path.stem}-{arm}-seed{seed}"
            try:
                values = {"seed": seed} | {
                    name: _value(name, value, source) for name, value in changes.items()
                }
                params = derive.changed(source, run, values)
            except ValueError as error:
                problems.append(f"{where}: arm {arm!r}: {error}")
                continue
            shared = derive.shareable(source, params, ready)
            own = tuple(s for s in derive.with_needs(*given["stages"]) if s not in shared)
            jobs.append(Job(run, arm, values, params, own))
    problems += [
        f"{where}: skip: {given['skip'][i]} matches no job"
        for i in range(len(given["skip"]))
        if i not in skipped
    ]
    twice = {job.run for job in jobs if sum(other.run == job.run for other in jobs) > 1}
    problems += [
        f"{where}: several jobs would be called {run}; rename an arm, or cross other values"
        for run in sorted(twice)
    ]
    if not jobs and not problems:
        problems.append(f"{where}: there is no job in it; give arms or lists to cross")
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return Grid(path.stem, base, tuple(jobs))


def _checked_fields(content: Any, where: str) -> dict[str, Any]:
    """The file's fields with defaults. ``ValueError`` lists all whose name or kind is wrong."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be a mapping with the fields {', '.join(FIELDS)}")
    problems = [
        f"{where}: unknown field {name!r}; fields: {', '.join(FIELDS)}"
        for name in content
        if name not in FIELDS
    ]
    given = {"seeds": [0], "fixed": {}, "arms": {}, "cross": {}, "skip": []} | content
    stages = [stage.name for stage in derive.SHAREABLE]

    def check(name: str, good: bool, remedy: str) -> None:
        if not good:
            problems.append(f"{where}: {name}: {remedy}")

    def parameters(name: str, values: Any) -> None:
        if not isinstance(values, dict):
            problems.append(f"{where}: {name}: must be a mapping of parameters to values")
            return
        for key in values:
            if key in ("run", "seed"):
                problems.append(
                    f"{where}: {name}: {key} is not set here; seeds have a field of their own"
                )
                continue
            try:
                check_names({key: 0}, f"{where}: {name}")
            except ValueError as error:
                problems.append(str(error))

    check("base", isinstance(given.get("base"), str), "give the name of a finished run")
    targets = given.get("stages")
    known = isinstance(targets, list) and bool(targets) and all(t in stages for t in targets)
    check("stages", known, f"give a list of {', '.join(stages)}")
    seeds = given["seeds"]
    whole = (
        isinstance(seeds, list) and bool(seeds) and all(type(s) is int and s >= 0 for s in seeds)
    )
    check("seeds", whole, "give a list of integers from 0")
    parameters("fixed", given["fixed"])
    check(
        "arms", isinstance(given["arms"], dict), "must map the name of each arm to its parameters"
    )
    for arm, values in (given["arms"] if isinstance(given["arms"], dict) else {}).items():
        check(
            "arms",
            isinstance(arm, str) and re.fullmatch(r"\w+", arm) is not None,
            f"{arm!r}: use letters, digits and '_'",
        )
        parameters(f"arms: {arm}", values)
    parameters("cross", given["cross"])
    for name, values in (given["cross"] if isinstance(given["cross"], dict) else {}).items():
        check(f"cross: {name}", isinstance(values, list) and bool(values), "give a list of values")
    skip = given["skip"]
    mappings = isinstance(skip, list) and all(isinstance(s, dict) and s for s in skip)
    check("skip", mappings, "must be a list of mappings, e.g. - {arm: kl0, seed: 2}")
    if problems:
        raise ValueError("\n".join(problems))
    return given


def _combinations(given: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, parameters) of every arm x every combination of the crossed lists; an arm wins over ``fixed``."""
    names, lists = list(given["cross"]), list(given["cross"].values())
    combined = []
    arms = given["arms"] or {"": {}} if lists else given["arms"]
    for arm, changes in arms.items():
        for values in itertools.product(*lists):
            label = "-".join(filter(None, [arm, *map(str, values)]))
            combined.append((label, {**given["fixed"], **dict(zip(names, values)), **changes}))
    return combined


def _value(name: str, value: Any, source: Params) -> Any:
    """``value``, or the base run's times a factor where it reads ``x<factor>``. ``ValueError``."""
    kind = kind_of(name)
    if not isinstance(value, str) or kind not in (int, float):
        return value
    if factor := re.fullmatch(r"x(\d+(\.\d+)?)", value):
        scaled = getattr(source, name) * float(factor[1])
        return round(scaled) if kind is int else scaled
    raise ValueError(
        f"parameter {name}={value!r}: is text; write numbers as 3, 0.0001 or 1.0e-4, or x2 for twice the base run's"
    )


# ---------------------------------------------------------------------------------------------- the table


class Board:
    """State of every job: a table redrawn in place on a terminal, else one line for each change of state."""

    def __init__(self, jobs: Iterable[Job], workers: int, out: TextIO):
        self.out, self.workers, self.tty = out, max(workers, 1), out.isatty()
        self.state = {job.run: "queued" for job in jobs}
        self.reason: dict[str, str] = {}
        self.started: dict[str, float] = {}
        self.seconds: list[float] = []  # of jobs that were executed to their end
        self.begun = time.monotonic()
        self._drawn = 0

    def set(self, run: str, state: str, note: str = "") -> None:
        now = time.monotonic()
        if state == "running":
            self.started[run] = now
        elif state == "done" and run in self.started:
            self.seconds.append(now - self.started[run])
        self.state[run], self.reason[run] = state, note
        if not self.tty:
            spent = (
                f" in {clock(now - self.started[run])}"
                if run in self.started and state != "running"
                else ""
            )
            print(
                f"{run}: {state}{spent}{f' ({note})' if note else ''} | {self.summary()}",
                file=self.out,
                flush=True,
            )

    def count(self, state: str) -> int:
        return sum(s == state for s in self.state.values())

    def summary(self) -> str:
        counts = ", ".join(
            f"{self.count(state)} {state}" for state in ("queued", "running", "done", "failed")
        )
        left = self.left()
        return f"{counts}, {clock(time.monotonic() - self.begun)}" + (
            f", about {clock(left)} left" if left else ""
        )

    def left(self) -> float | None:
        """Seconds, from the mean of the jobs that ended; ``None`` before the first has."""
        if not self.seconds:
            return None
        mean, now = sum(self.seconds) / len(self.seconds), time.monotonic()
        begun = sum(
            max(mean - (now - self.started[run]), 0)
            for run, state in self.state.items()
            if state == "running"
        )
        return (self.count("queued") * mean + begun) / self.workers

    def draw(self) -> None:
        """The table, on a terminal: running and failed jobs first, as many rows as fit."""
        if not self.tty:
            return
        size = shutil.get_terminal_size()
        order = ("running", "failed", "queued", "done")
        rows = sorted(self.state, key=lambda run: order.index(self.state[run]))
        lines = []
        for run in rows[: max(size.lines - 3, 1)]:
            spent = (
                clock(time.monotonic() - self.started[run]) if self.state[run] == "running" else ""
            )
            note = last_line(run) if self.state[run] == "running" else self.reason.get(run, "")
            lines.append(f"{self.state[run]:8}{run}  {spent}  {note}"[: size.columns - 1])
        if len(rows) > len(lines):
            lines.append(f"... and {len(rows) - len(lines)} more")
        lines.append(self.summary()[: size.columns - 1])
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self.out.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[0J")
        self.out.flush()
        self._drawn = len(lines)


def log_file(run: str) -> Path:
    return runs.run_folder(run) / "logs" / "job.log"


def last_line(run: str) -> str:
    """The newest line that a job printed, e.g. the stage that it is at."""
    try:
        with open(log_file(run), "rb") as file:
            file.seek(max(0, log_file(run).stat().st_size - 2048))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# -------------------------------------------------------------------------------------------- the engines

Command = Callable[[Job], list[str]]


def command(job: Job) -> list[str]:
    return [
        sys.executable,
        "-m",
        "recrl_lib.pipeline.execute",
        "job",
        "--attended",
        "--run",
        job.run,
        "--stages",
        *job.stages,
    ]


def launch(log: Path, argv: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Start a job's process, which prints into ``log``. It ends when this one does, whatever way: its standard input is a pipe held here."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, cwd=paths.ROOT,
            env=os.environ | environment, start_new_session=True,
        )  # fmt: skip


def environment(grid: str, arm: str, threads: int | None) -> dict[str, str]:
    """``RECRL_BATCH`` and ``RECRL_ARM`` are what a tracker groups by. ``threads`` of each of several jobs at a time."""
    limit = (
        {}
        if threads is None
        else {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    )
    return {"RECRL_BATCH": grid, "RECRL_ARM": arm, **limit}


def lost(code: int) -> bool:
    """Whether a job ended for no fault of its notebook: its kernel died, or a signal killed its process."""
    return code == KernelDied.exit_code or code < 0


def run_local(
    grid: Grid, workers: int, out: TextIO, argv: Command = command, poll: float = 0.3
) -> dict[str, str]:
    """Run the jobs of ``grid`` that are not done, ``workers`` at a time. Returns why each failed one did, by run.

    On ``KeyboardInterrupt`` every job is ended, kernel included, before it is passed on.
    """
    board = Board(grid.jobs, workers, out)
    queue, active, tries = _pending(grid, board), {}, {}
    threads = 1 if workers > 1 else None
    try:
        while queue or active:
            while queue and len(active) < workers:
                job = queue.pop(0)
                tries[job.run] = tries.get(job.run, 0) + 1
                active[job.run] = (
                    job,
                    launch(log_file(job.run), argv(job), environment(grid.name, job.arm, threads)),
                )
                board.set(job.run, "running")
            for run, (job, process) in list(active.items()):
                if (code := process.poll()) is None:
                    continue
                del active[run]
                process.stdin.close()
                if lost(code) and tries[run] < TRIES:
                    board.set(run, "queued", f"lost, exit code {code}: once more")
                    queue.append(job)
                else:
                    _close(board, job, code)
            board.draw()
            time.sleep(poll)
    finally:
        end([process for _, process in active.values()])
    return {run: board.reason[run] for run, state in board.state.items() if state == "failed"}


def _pending(grid: Grid, board: Board) -> list[Job]:
    """The jobs that are not done; the others are shown as done."""
    pending = [job for job in grid.jobs if not job.done()]
    for job in grid.jobs:
        if job not in pending:
            board.set(
                job.run, "done", "before, kept" if job.stages else "all of it shared with the base"
            )
    return pending


def _close(board: Board, job: Job, code: int) -> None:
    """Done is what the manifest says, not the exit code."""
    if code == 0 and job.done():
        board.set(job.run, "done")
    else:
        reason = last_line(job.run) or f"exit code {code}"
        board.set(job.run, "failed", f"{reason}; see {runs.display(log_file(job.run))}")


def end(processes: list[subprocess.Popen]) -> None:
    """Ask the jobs to end their kernels and themselves; kill what has not after ``GRACE`` seconds."""
    for process in processes:
        process.terminate()
    limit = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdin.close()


def run_ray(
    grid: Grid,
    address: str | None,
    gpus: float,
    cpus: float,
    out: TextIO,
    argv: Command = command,
    poll: float = 0.5,
) -> dict[str, str]:
    """As ``run_local``, with Ray placing the jobs on the nodes of the cluster at ``address``.

    The repository, its environment and ``runs/`` must lie at the same path on every node, on a shared folder. A task
    whose node is lost is placed again by Ray; it waits for the run's lock and finds whatever was finished kept.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(
            "engine ray: the package is not installed; see 'optional' in environment.yml"
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started_here = not ray.is_initialized()
    if started_here:
        where = address or os.environ.get("RAY_ADDRESS")
        try:
            if where and re.fullmatch(
                r"[^/]+:\d+", where
            ):  # where nobody answers, Ray itself tries for more than ten minutes
                host, _, port = where.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=False if address is None else None,
            )
        except OSError as error:
            if not where:
                raise
            reason = " ".join(str(error).split())
            without = "leave ADDRESS out" if address else "unset RAY_ADDRESS"
            remedy = (
                f"start one with ray start --head, or {without} for a Ray of this machine's own"
            )
            raise ValueError(
                f"engine ray: no cluster at address {where!r}: {remedy} ({reason})"
            ) from None
    board = Board(
        grid.jobs,
        int(
            sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
            // max(cpus, 1)
        ),
        out,
    )
    task = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=5, retry_exceptions=False)(
        _ray_task
    )
    begun = time.time()
    waiting = {}
    try:
        for job in _pending(grid, board):
            waiting[
                task.remote(log_file(job.run), argv(job), environment(grid.name, job.arm, None))
            ] = job
        while waiting:
            for done in ray.wait(list(waiting), num_returns=len(waiting), timeout=poll)[0]:
                job = waiting.pop(done)
                try:
                    code = ray.get(done)
                except ray.exceptions.RayError as error:
                    board.set(
                        job.run,
                        "failed",
                        f"Ray gave up on it: {' '.join(str(error).split())[:200]}",
                    )
                else:
                    _close(board, job, code)
            for job in waiting.values():
                if board.state[job.run] == "queued" and _touched(log_file(job.run), begun):
                    board.set(job.run, "running")
            board.draw()
    finally:
        for left in waiting:
            ray.cancel(left, force=True)  # the worker goes, its pipe closes, the job ends itself
        if started_here:
            ray.shutdown()
    return {run: board.reason[run] for run, state in board.state.items() if state == "failed"}


def _ray_task(log: Path, argv: list[str], environment: dict[str, str]) -> int:
    """What a worker does: the job's process, as on one machine, and once more if it died under a living worker."""
    for _ in range(TRIES):
        process = launch(log, argv, environment)
        code = process.wait()
        if not lost(code):
            break
    return code


def _touched(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime >= since
    except OSError:
        return False


# ------------------------------------------------------------------------------------------- command line


def listing(grid: Grid) -> str:
    """One line a job: its run, what it changes, what it executes."""
    lines = []
    for job in grid.jobs:
        changes = ", ".join(f"{name}={value}" for name, value in job.changes.items()) or "nothing"
        state = "done" if job.done() else "runs " + ", ".join(s for s in job.stages)
        lines.append(f"{job.run}: changes {changes}; {state}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recrl_lib.pipeline.batch", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--grid", required=True, help="name in recrl_lib/batches, or a path ending in .yaml"
    )
    parser.add_argument("--base", help="another base run than the grid's")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the grid's")
    parser.add_argument(
        "--jobs", type=int, default=1, help="at a time, on this machine (default 1)"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument(
        "--address",
        help="of the Ray cluster: auto, or host:port; default: a Ray of this machine's own",
    )
    parser.add_argument(
        "--gpus", type=float, default=0.0, help="GPUs of a job on Ray; .5 puts two jobs on one"
    )
    parser.add_argument("--cpus", type=float, default=1.0, help="CPUs of a job on Ray")
    parser.add_argument(
        "--list", action="store_true", help="check the grid, say what would run, and stop"
    )
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if arguments.jobs < 1:
            raise ValueError(f"--jobs {arguments.jobs}: must be at least 1")
        grid = load(arguments.grid, arguments.base, arguments.seeds)
        if arguments.list:
            print(listing(grid))
            return 0
        for job in grid.jobs:
            derive.derive(grid.base, job.run, **job.changes)
        if arguments.engine == "ray":
            failed = run_ray(grid, arguments.address, arguments.gpus, arguments.cpus, sys.stdout)
        else:
            failed = run_local(grid, arguments.jobs, sys.stdout)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "INTERRUPTED (finished stages are kept, the same command goes on from here)", flush=True
        )
        return 130
    print(f"batch {grid.name}: {len(grid.jobs) - len(failed)} of {len(grid.jobs)} jobs done")
    for run, reason in failed.items():
        print(f"FAILED {run}: {reason}")
    if not failed:
        print(
            f"compare them in notebook 07: make all RUN={grid.base}{_chosen(grid)}, with its profile and seed"
        )
    return 1 if failed else 0


def _chosen(grid: Grid) -> str:
    """What makes the base run's notebook 07 compare this grid, where its parameters name another one."""
    return "" if runs.read_params(grid.base).batch == grid.name else f' SET="batch={grid.name}"'


def _terminated(signum, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
