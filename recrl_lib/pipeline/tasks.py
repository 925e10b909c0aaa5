"""The stages of a run as doit tasks, and the command lines of ``make all`` and ``make notebooks``.

``python -m recrl_lib.pipeline.tasks all --profile laptop --run mine --set shield_rank=128``

doit orders the stages, skips those that are up to date and stops at the first that fails. The run's
manifest is the record of what is done, not a database of doit's: a stage that was executed in
JupyterLab, or taken over from the base run of a batch, is done too.
Exit codes: 0 done, 1 a stage failed, 2 wrong arguments, 3 a kernel died, 130 interrupted.
"""

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from doit import api
from doit.cmd_base import ModuleTaskLoader
from doit.exceptions import TaskFailed
from filelock import FileLock, Timeout

from recrl_lib import paths, provenance, runs
from recrl_lib.params import PIPELINE, PROFILES, Params, Stage, owned_by, parse_value, resolve
from recrl_lib.pipeline import execute, publish

NAMES = [stage.name for stage in PIPELINE]


def run_all(params: Params, stages: tuple[Stage, ...], force: bool = False) -> int:
    """Run those of ``stages`` that are not up to date, then show the results; the exit code."""
    runs.write_params(params)
    begun, kept, codes = time.monotonic(), [], [0]

    def unchanged(stage: Stage, label: str) -> bool:
        if force or not runs.up_to_date(stage.name, params):
            return False
        kept.append(stage)
        print(f"{label}: unchanged, kept", flush=True)
        return True

    def run(stage: Stage, label: str) -> TaskFailed | None:
        values = {name: getattr(params, name) for name in owned_by(stage.name)}
        codes.append(execute.execute(stage, values, params.run, label))
        return TaskFailed("the notebook says why", report=False) if codes[-1] else None

    def tasks() -> Iterator[dict[str, Any]]:
        names = [stage.name for stage in stages]
        for number, stage in enumerate(stages, 1):
            arguments = [stage, f"stage {number}/{len(names)} {stage.name}"]
            yield {
                "basename": stage.name,
                "actions": [(run, arguments)],
                "uptodate": [(unchanged, arguments)],
                "task_dep": [need for need in stage.needs if need in names],
                "io": {"capture": False},
            }

    settings = {"backend": "sqlite3", "dep_file": ":memory:", "reporter": "error-only"}
    loader, wanted = ModuleTaskLoader({"task_stages": tasks}), {s.name: {} for s in stages}
    if failed := api.run_tasks(loader, wanted, {"GLOBAL": settings}):
        return codes[-1] or failed
    spent = execute.clock(time.monotonic() - begun)
    summary = f"{len(stages)} stages ({len(kept)} kept) in {spent}"
    if len(kept) == len(stages):
        summary = f"all {len(kept)} stages unchanged, nothing to do"
    shown = results(params.run) if stages[-1] is PIPELINE[-1] else ""  # else they may be older
    print(f"\nrun {params.run}: {summary}\n\n{shown}".rstrip(), flush=True)
    return 0


def with_needs(*targets: str) -> tuple[Stage, ...]:
    """``targets`` and all stages that they need, in the order of the pipeline."""
    wanted = set(targets)
    for stage in reversed(PIPELINE):  # a stage needs earlier ones only
        wanted |= set(stage.needs) if stage.name in wanted else set()
    return tuple(stage for stage in PIPELINE if stage.name in wanted)


def results(run: str) -> str:
    """The main table and the report's path; a report older than its notebook is rendered."""
    folder = runs.run_folder(run)
    page, executed = folder / "report.html", folder / "notebooks" / PIPELINE[-1].notebook
    times = [path.stat().st_mtime if path.is_file() else 0.0 for path in (page, executed)]
    if times[0] < times[1]:
        publish.render_report(run)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    known = f"report: {runs.display(page)}" if page.is_file() else "report: none"
    more = f"make lab opens the notebooks; run = {run!r} in notebook 10 talks to this run"
    table = publish.main_table(run).to_string()
    return f"{table}\n\n{known}\n{runs.display(folder)}: {size / 1e6:.0f} MB\nnext: {more}"


class MakeParser(argparse.ArgumentParser):
    """A parser whose errors name the options as ``make`` does: PROFILE for ``--profile``."""

    def error(self, message: str) -> NoReturn:
        named = re.sub(r"(?:argument )?--([a-z]+)", lambda match: match[1].upper(), message)
        raise ValueError(f"{named}; make help lists the options")


def run_command(parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Run the function of the parsed command; return the exit code, 2 for what a user can mend."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt  # as Ctrl-C does, so that kernels are ended

    signal.signal(signal.SIGTERM, interrupt)
    try:
        given = parser.parse_args(argv)
        return given.function(given)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("INTERRUPTED (what is finished is kept, the same command goes on)", flush=True)
        return execute.INTERRUPTED


def parse_setting(setting: str) -> tuple[str, Any]:
    """``"shield_rank=128"`` as a name and a typed value. Raises ``ValueError``."""
    name, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"SET {setting!r}: must have the form name=value")
    if name in ("run", "seed"):
        raise ValueError(f"SET {setting!r}: give {name.upper()}={text} beside it instead")
    return name, parse_value(name, text)


def default_profile(run: str | None = None) -> str:
    """The profile that ``run`` is named after, so that RUN=smoke stays one; else the machine's."""
    named = (run or "").partition("-seed")[0]  # as ``_all`` names a run of another seed
    if named in PROFILES:
        return named
    import torch

    return "pod" if torch.cuda.is_available() else "laptop"


def _all(given: argparse.Namespace) -> int:
    profile = given.profile or default_profile(given.run)
    run = given.run or (profile if given.seed == 0 else f"{profile}-seed{given.seed}")
    stages = PIPELINE[: NAMES.index(given.to) + 1]
    params = resolve(profile, run=run, seed=given.seed, **dict(map(parse_setting, given.set)))
    print(f"profile {profile}, run {run}, seed {given.seed}", flush=True)
    if not given.list:
        return run_all(params, stages, given.force)
    print("U: unchanged, kept; R: would run")
    for stage in stages:
        title = provenance.source(
            provenance.read_notebook(paths.NOTEBOOKS / stage.notebook)["cells"][0]
        )
        state = "U" if runs.up_to_date(stage.name, params) else "R"
        print(f"{state} {stage.name:<14}" + title.lstrip("# ").partition("\n")[0])
    return 0


def _job(given: argparse.Namespace) -> int:
    """A run that a batch has prepared, up to ``--stages``; waits while another process has it."""
    params = runs.read_params(given.run)
    if params is None:
        raise ValueError(f"runs/{given.run} does not exist: jobs are prepared by make batch")
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    lock = FileLock(runs.run_folder(given.run) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"run {given.run}: another process executes it, waiting", flush=True)
        lock.acquire()
    with lock:
        return run_all(params, with_needs(*given.stages))


def _exit_with_parent() -> None:
    """Exit when the parent process closes our stdin, which also happens when it dies."""
    while os.read(0, 1):  # sys.stdin has a lock that a thread must not hold when Python exits
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = MakeParser(prog="recrl_lib.pipeline.tasks")
    commands = parser.add_subparsers(required=True)
    every = commands.add_parser("all", help="run the pipeline")
    every.set_defaults(function=_all)
    every.add_argument("--profile", choices=PROFILES, help="default: the run's, or the machine's")
    every.add_argument("--run", help="name of the run folder; default: the profile, with the seed")
    every.add_argument("--seed", type=int, default=0)
    every.add_argument("--force", action="store_true", help="run stages that are unchanged, too")
    every.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    every.add_argument("--to", choices=NAMES, default=NAMES[-1], help="stop after this stage")
    every.add_argument("--list", action="store_true", help="say what would run, and stop")
    store = commands.add_parser("publish", help="execute the notebooks as they are, store them")
    store.set_defaults(function=lambda given: execute.publish(given.only))
    store.add_argument("--only", type=int, metavar="NN", help="one, on the present default run")
    job = commands.add_parser("job", help="one run of a batch, until stdin is closed")
    job.set_defaults(function=_job)
    job.add_argument("--run", required=True)
    job.add_argument("--stages", nargs="+", required=True, choices=NAMES)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
