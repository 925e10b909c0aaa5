"""Batches: many runs derived from one base run, on this machine or on a Ray cluster.

``python -m recrl_lib.pipeline.batch --grid ablations --base laptop --jobs 2``

A grid is a YAML file with the fields of ``Grid``, checked whole before anything starts. A job is
one run folder ``<base>-<grid>-<arm>-seed<n>`` and one process. It shares with the base run
(``<base>-seed<n>`` for another seed) every stage that has the same key in both (``stage_key``) and
executes the others. A batch that was stopped goes on; a job whose process died is tried once more.
Exit codes: 0 all done, 1 some jobs failed (listed), 2 wrong grid or arguments, 130 interrupted.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from tqdm import tqdm

from recrl_lib import paths, runs
from recrl_lib.params import PIPELINE, Params, stage_named
from recrl_lib.pipeline import publish
from recrl_lib.pipeline.execute import KERNEL_DIED, last_line, one_line
from recrl_lib.pipeline.tasks import MakeParser, parse_setting, run_all, run_command, with_needs

GRIDS = paths.LIBRARY / "batches"


class Grid(BaseModel):
    """A grid file. A value ``x0.5`` is half the base run's, so that a grid serves every profile."""

    model_config = ConfigDict(extra="forbid", strict=True)

    base: str  # the finished run that the jobs share stages with
    stages: list[Annotated[str, AfterValidator(stage_named)]]  # what every job must reach
    seeds: list[NonNegativeInt] = Field([0], min_length=1)
    fixed: dict[str, Any] = {}  # parameters of every job
    arms: dict[Annotated[str, Field(pattern=r"^\w+$")], dict[str, Any]] = {}  # one job each
    cross: dict[str, list[Any]] = {}  # lists of values to cross, also with the arms
    skip: list[dict[str, Any]] = []  # what to leave out: {arm: a, seed: 2}

    def combinations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(label, parameters) of every arm and every combination of the crossed lists."""
        arms = self.arms or ({"": {}} if self.cross else {})
        for values in itertools.product(arms, *self.cross.values()):
            label = "-".join(str(value) for value in values if value != "")
            yield label, self.fixed | dict(zip(self.cross, values[1:])) | arms[values[0]]


@dataclass(frozen=True)
class Job:
    """One run: ``changes`` against the grid's base run, ``base`` the run that it shares with."""

    run: str
    arm: str
    base: str
    changes: dict[str, Any]
    params: Params
    targets: tuple[str, ...]

    @property
    def log(self) -> Path:
        return runs.run_folder(self.run) / "logs" / "job.log"

    def left(self) -> list[str]:
        """The stages that are not up to date."""
        stages = with_needs(*self.targets)
        return [stage.name for stage in stages if not runs.up_to_date(stage.name, self.params)]

    def shared(self) -> list[str]:
        """The stages that the base run has finished with the key that they have here."""
        if (base := runs.read_params(self.base)) is None:
            return []
        names, key = [stage.name for stage in with_needs(*self.targets)], runs.stage_key
        equal = [name for name in names if key(name, self.params) == key(name, base)]
        return [name for name in equal if runs.up_to_date(name, base)]

    def prepare(self) -> None:
        """Make or refresh the run folder: its parameters and what it shares with the base run."""
        base, present = runs.read_manifest(self.base), runs.read_manifest(self.run)
        shared = {stage: base["stages"][stage] for stage in self.shared()}
        for entry in shared.values():
            for file in runs.changed_files(self.run, entry["outputs"]):
                _link(runs.run_folder(self.base) / file, runs.run_folder(self.run) / file)
        made = present if present["stages"] else base
        own = {"run": self.run, "seed": self.params.seed, "derived_from": {"run": self.base}}
        manifest = made | own | {"stages": present["stages"] | shared}
        runs.write_params(self.params)
        if manifest != present:
            text = json.dumps(manifest, indent=1) + "\n"
            runs.write_atomic(runs.run_folder(self.run) / "manifest.json", text)


def _link(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy.

    A link is safe: a file of a run is always replaced as a whole, never written into.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def read_grid(path: Path) -> Grid:
    """The grid file ``path``, checked. ``ValueError`` lists every field that is wrong."""
    where = runs.display(path)
    try:
        return Grid.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {one_line(error)}") from None
    except ValidationError as error:
        faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
        problems = [f"{where}: {at}: {text.removeprefix('Value error, ')}" for at, text in faults]
        raise ValueError("\n".join(problems)) from None


def load(name: str, base: str | None = None, seeds: list[int] | None = None) -> list[Job]:
    """The jobs of a grid, with its base and seeds or others. ``ValueError`` lists all faults."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else GRIDS / f"{name}.yaml"
    where = runs.display(path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in GRIDS.glob("*.yaml")))
        raise ValueError(f"GRID={name}: no file {where}; give a .yaml file, or one of {known}")
    grid = read_grid(path)
    base = base or grid.base
    source = runs.read_params(base)
    if source is None:
        raise ValueError(f"{where}: base: runs/{base} does not exist; make all RUN={base} first")
    targets = tuple(stage.name for stage in grid.stages)
    jobs, problems, unused = {}, [], list(grid.skip)
    for (arm, changes), seed in itertools.product(grid.combinations(), seeds or grid.seeds):
        facts = changes | {"arm": arm, "seed": seed}
        if hits := [skip for skip in grid.skip if skip.items() <= facts.items()]:
            unused = [skip for skip in unused if skip not in hits]
            continue
        run = f"{base}-{path.stem}-{arm}-seed{seed}"
        if run in jobs:
            problems.append(f"several jobs would be called {run}; rename an arm")
        try:
            values = {"seed": seed} | _scaled(changes, source)
            params = source.replace(run=run, **values)
        except ValueError as error:
            problems.append(f"arm {arm!r}: {error}")
            continue
        of_seed = base if seed == source.seed else f"{base}-seed{seed}"
        jobs[run] = Job(run, arm, of_seed, values, params, targets)
    problems += [f"skip: {skip} matches no job" for skip in unused]
    if not jobs and not problems:
        problems.append("there is no job in it; give arms or lists to cross")
    if problems := problems or _unfinished(list(jobs.values())):
        raise ValueError("\n".join(f"{where}: {problem}" for problem in dict.fromkeys(problems)))
    return list(jobs.values())


def _scaled(changes: dict[str, Any], source: Params) -> dict[str, Any]:
    """``changes``; a value ``x<factor>`` becomes the base run's times the factor."""
    if {"run", "seed"} & changes.keys():
        raise ValueError("run and seed are not set here; seeds have a field of their own")
    values, known = dict(changes), source.as_dict()
    for name, value in changes.items():
        kind = type(known.get(name))
        if isinstance(value, str) and kind in (int, float):
            if not (factor := re.fullmatch(r"x(\d+(\.\d+)?)", value)):
                remedy = "write 3, 0.0001, 1.0e-4, or x2 for twice the base run's"
                raise ValueError(f"parameter {name}={value!r}: is text; {remedy}")
            scaled = known[name] * float(factor[1])
            values[name] = round(scaled) if kind is int else scaled
    return values


def _unfinished(jobs: list[Job]) -> list[str]:
    """What base runs lack, since every job would execute it: a line for each of them."""
    problems = []
    for job in {job.base: job for job in jobs}.values():
        base = runs.read_params(job.base)
        needed = [s.name for s in with_needs(*job.targets) if s.name not in job.targets]
        if lacking := [s for s in needed if base is None or not runs.up_to_date(s, base)]:
            remedy = f"make all RUN={job.base} SEED={job.params.seed} first, with its profile"
            what = f"stages {', '.join(lacking)} are missing or out of date"
            problems.append(f"base run {job.base!r}: {what}; {remedy}")
    return problems


def run_process(argv: list[str], log: Path, environment: dict[str, str], active: list) -> int:
    """Run a job's process, which prints into ``log`` and is put into ``active``; its exit code.

    It is started again, once, if its kernel died or a signal ended it. It exits when its stdin is
    closed: a pipe that this process holds, so that it does not outlive it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    code = KERNEL_DIED
    for _ in range(2):
        with open(log, "ab") as file:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=file, stderr=file, cwd=paths.ROOT,
                env=os.environ | environment, start_new_session=True,
            )  # fmt: skip
        active.append(process)
        code = process.wait()
        if process.stdin is None or process.stdin.closed or 0 <= code != KERNEL_DIED:
            break
    return code


@contextlib.contextmanager
def local(workers: int) -> Iterator[Callable[..., Future]]:
    """Processes on this machine, ``workers`` at a time. All have ended when the context is left."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if workers > 1 else {}
    active, pool = [], ThreadPoolExecutor(workers)
    try:
        yield lambda argv, log, env: pool.submit(run_process, argv, log, env | threads, active)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active:
            process.stdin.close()
        pool.shutdown()


@contextlib.contextmanager
def on_ray(address: str | None, gpus: float, cpus: float) -> Iterator[Callable[..., Future]]:
    """The cluster at ``address``, or a Ray of this machine's own.

    The repository, its environment and ``runs/`` must lie at one path on every node, on a shared
    folder. Ray places a job whose node is lost again; it keeps what was finished.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("ENGINE=ray: not installed; see 'optional' in environment.yml") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where = address or os.environ.get("RAY_ADDRESS")
    try:
        if where and re.fullmatch(r"[^/]+:\d+", where):  # Ray itself tries for over ten minutes
            host, _, port = where.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        dashboard = False if address is None else None
        ray.init(address=address, log_to_driver=False, include_dashboard=dashboard)
    except OSError as error:
        without = "leave ADDRESS out" if address else "unset RAY_ADDRESS"
        remedy = f"start one with ray start --head, or {without} for a Ray of this machine's own"
        text = f"ENGINE=ray: no cluster at {where!r}: {remedy} ({one_line(error)})"
        raise ValueError(text) from None
    task = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=5)(run_process)
    placed = []

    def submit(*arguments: Any) -> Future:
        placed.append(task.remote(*arguments, []))
        return placed[-1].future()

    try:
        yield submit
    finally:
        for reference in placed:
            ray.cancel(reference, force=True)  # the worker dies, its pipe closes, the job exits
        ray.shutdown()


def command(job: Job) -> list[str]:
    """What a job's process executes."""
    module = [sys.executable, "-m", "recrl_lib.pipeline.tasks", "job"]
    return [*module, "--run", job.run, "--stages", *job.targets]


def run_jobs(name: str, jobs: list[Job], submit: Callable[..., Future]) -> dict[str, str]:
    """Run ``jobs``, started by what ``local`` or ``on_ray`` yields; why jobs failed, by run."""
    failed, tracked = {}, {job.run: {"RECRL_BATCH": name, "RECRL_ARM": job.arm} for job in jobs}
    waiting = {submit(command(job), job.log, tracked[job.run]): job for job in jobs}
    out, hidden = sys.stdout, not sys.stdout.isatty()
    with tqdm(total=len(jobs), desc=name, unit="job", file=out, disable=hidden) as bar:
        while waiting:
            for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                job, state = waiting.pop(future), "done"
                if future.exception() or future.result() or job.left():  # the manifest decides
                    reason = one_line(future.exception() or last_line(job.log))[:300]
                    failed[job.run] = f"{reason}; see {runs.display(job.log)}"
                    state = f"FAILED ({failed[job.run]})"
                bar.update()
                bar.write(f"{job.run}: {state}, {len(waiting)} of {len(jobs)} left", file=out)
            states = {job.arm: last_line(job.log) for job in waiting.values()}
            bar.set_postfix_str("; ".join(f"{arm}: {line}" for arm, line in states.items() if line))
    return failed


def _try(given: argparse.Namespace) -> int:
    """One run ``<base>-try`` with some parameters of the base run changed; both main tables."""
    if (source := runs.read_params(given.base or "")) is None:
        raise ValueError(f"FROM={given.base}: no such run; give a finished one, see runs/")
    changes = dict(map(parse_setting, given.set))
    params = source.replace(run=f"{given.base}-try", **changes)
    job = Job(params.run, "try", given.base, changes, params, (PIPELINE[-1].name,))
    if problems := _unfinished([job]):
        raise ValueError("\n".join(problems))
    job.prepare()
    if code := run_all(params, with_needs(*job.targets)):
        return code
    tables = {run: publish.main_table(run) for run in (given.base, params.run)}
    beside = pd.concat(tables).swaplevel().loc[list(tables[params.run].index)]
    print(f"\n{beside.to_string()}\n\nchanged: {', '.join(given.set)}")
    return 0


def _batch(given: argparse.Namespace) -> int:
    if given.set:
        return _try(given)
    if given.jobs < 1:
        raise ValueError(f"JOBS={given.jobs}: must be at least 1")
    jobs, name = load(given.grid, given.base, given.seeds), Path(given.grid).stem
    if given.list:
        for job in jobs:
            changes = ", ".join(f"{key}={value}" for key, value in job.changes.items())
            todo = [stage for stage in job.left() if stage not in job.shared()]
            print(f"{job.run}: changes {changes}; runs {', '.join(todo) or 'nothing'}")
        return 0
    for job in jobs:
        job.prepare()
    left = [job for job in jobs if job.left()]
    print(f"batch {name}: {len(jobs)} jobs, {len(jobs) - len(left)} done before", flush=True)
    ray = given.engine == "ray"
    with on_ray(given.address, given.gpus, given.cpus) if ray else local(given.jobs) as submit:
        failed = run_jobs(name, left, submit)
    print(f"batch {name}: {len(jobs) - len(failed)} of {len(jobs)} jobs done")
    for run, reason in failed.items():
        print(f"FAILED {run}: {reason}")
    if failed:
        return 1
    base = runs.read_params(jobs[0].base)
    chosen = "" if base and base.batch == name else f' SET="batch={name}"'
    print(f"compare them in notebook 07: make all RUN={jobs[0].base}{chosen}, with its profile")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line of ``make batch``; returns the exit code."""
    parser = MakeParser(prog="recrl_lib.pipeline.batch", description=Grid.__doc__)
    parser.set_defaults(function=_batch)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--grid", help="name in recrl_lib/batches, or a .yaml file")
    work.add_argument("--set", nargs="+", metavar="NAME=VALUE", help="one run: the base, changed")
    parser.add_argument("--base", help="another base run than the grid's")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the grid's")
    parser.add_argument("--jobs", type=int, default=1, help="at a time, on this machine")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--address", help="of the Ray cluster: auto, or host:port; default: none")
    parser.add_argument("--gpus", type=float, default=0.0, help="of a job on Ray; .5: two on one")
    parser.add_argument("--cpus", type=float, default=1.0, help="of a job on Ray")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
