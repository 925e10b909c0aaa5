"""Batches: grids checked whole, jobs run once, kept going, tried again, ended; on this machine and on two Ray nodes."""

import io
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from recrl_lib import paths, runs
from recrl_lib.pipeline import batch, derive, execute
from recrl_lib.tests.conftest import BASE

FINISH = (
    "from recrl_lib import runs\nstage = runs.start({0!r}, globals())\n"
    "stage.metrics({{key: .5 for key in runs.REQUIRED_METRICS.get(runs.metrics_name({0!r}), ())}})\nstage.finish()"
)


def grid_of(tmp_path: Path, text: str, name: str = "g") -> str:
    path = tmp_path / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ------------------------------------------------------------------------------------------------ grids


def test_arms_seeds_and_lists_are_crossed_and_what_is_to_be_skipped_is_not_there(base, tmp_path):
    grid = batch.load(grid_of(tmp_path, """
        base: base
        stages: [evaluation]
        seeds: [4, 5]
        fixed: {eval_users: 12}
        arms: {main: {}, lora4: {lora_rank: 3, eval_users: 13}}
        cross: {kl_coef: [0.0, 0.1]}
        skip: [{arm: main-0.1, seed: 5}, {arm: lora4-0.0}]
    """))  # fmt: skip
    assert [job.run for job in grid.jobs] == [
        "base-g-main-0.0-seed4", "base-g-main-0.0-seed5", "base-g-main-0.1-seed4", "base-g-lora4-0.1-seed4", "base-g-lora4-0.1-seed5",
    ]  # fmt: skip
    assert grid.jobs[1].changes == {"seed": 5, "eval_users": 12, "kl_coef": 0.0}
    assert grid.jobs[-1].changes == {"seed": 5, "eval_users": 13, "kl_coef": 0.1, "lora_rank": 3}
    assert grid.jobs[-1].params == BASE.replace(
        run="base-g-lora4-0.1-seed5", **grid.jobs[-1].changes
    )
    assert all(job.stages == ("shielded_ppo", "evaluation") for job in grid.jobs)


def test_factors_multiply_the_base_runs_values(base, tmp_path):
    text = "base: base\nstages: [evaluation]\narms: {a: {ppo_steps: x2, learning_rate: x0.5, lora_rank: x0.2}}"
    (job,) = batch.load(grid_of(tmp_path, text)).jobs
    assert (job.params.ppo_steps, job.params.learning_rate, job.params.lora_rank) == (
        2 * BASE.ppo_steps,
        BASE.learning_rate / 2,
        3,
    )


def test_a_job_that_changes_nothing_has_nothing_to_run(base, tmp_path):
    (job,) = batch.load(
        grid_of(tmp_path, "base: base\nstages: [evaluation]\nseeds: [4]\narms: {main: {}}")
    ).jobs
    assert job.stages == ()
    assert batch.load(
        grid_of(tmp_path, "base: base\nstages: [audit]\nseeds: [4]\narms: {main: {}}")
    ).jobs[0].stages == ("audit",)


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a", "must be a mapping with the fields base, stages"),
        ("a: [", "not valid YAML"),
        ("base: base\nstages: [evaluation]\narm: {a: {}}", "unknown field 'arm'; fields: base"),
        ("stages: [evaluation]\narms: {a: {}}", "base: give the name of a finished run"),
        (
            "base: base\nstages: [everything]\narms: {a: {}}",
            "stages: give a list of environment, data",
        ),
        (
            "base: base\nstages: [evaluation]\nseeds: [a]\narms: {a: {}}",
            "seeds: give a list of integers from 0",
        ),
        (
            "base: base\nstages: [evaluation]\narms: {a: {kl_coeff: 0.0}}",
            "arms: a: unknown parameter 'kl_coeff'; did you mean kl_coef",
        ),
        (
            "base: base\nstages: [evaluation]\narms: {a: {kl_coef: -1.0}}",
            "arm 'a': parameter kl_coef=-1.0: must be at least 0",
        ),
        (
            "base: base\nstages: [evaluation]\narms: {a: {kl_coef: 1e-4}}",
            "is text; write numbers as 3, 0.0001 or 1.0e-4",
        ),
        (
            "base: base\nstages: [evaluation]\narms: {a: {reward: x2}}",
            "parameter reward='x2': choose one of",
        ),
        (
            "base: base\nstages: [evaluation]\narms: {a: {seed: 3}}",
            "seeds have a field of their own",
        ),
        ("base: base\nstages: [evaluation]\narms: {a b: {}}", "'a b': use letters"),
        ("base: base\nstages: [evaluation]\ncross: {kl_coef: 0.1}", "cross: kl_coef: give a list"),
        (
            "base: base\nstages: [evaluation]\narms: {a: {}}\nskip: [{arm: b}]",
            "skip: {'arm': 'b'} matches no job",
        ),
        (
            "base: base\nstages: [evaluation]\ncross: {kl_coef: [0.1, 0.1]}",
            "several jobs would be called base-g-0.1-seed0",
        ),
        ("base: base\nstages: [evaluation]", "there is no job in it"),
        (
            "base: none\nstages: [evaluation]\narms: {a: {}}",
            "runs/none does not exist; make all RUN=none",
        ),
    ],
)
def test_a_grid_that_is_wrong_is_refused_with_file_and_field(base, tmp_path, text, words, capsys):
    assert batch.main(["--grid", grid_of(tmp_path, text)]) == 2
    message = capsys.readouterr().err
    assert words in message and "g.yaml" in message
    assert sorted(p.name for p in paths.RUNS.iterdir()) == ["base"]


def test_all_that_is_wrong_is_listed_at_once(base, tmp_path):
    text = "base: base\nstages: [evaluation]\narms: {a: {kl_coef: -1.0}, b: {clip_range: 2.0}, c: {}}\nskip: [{arm: d}]"
    with pytest.raises(ValueError) as error:
        batch.load(grid_of(tmp_path, text))
    assert len(str(error.value).splitlines()) == 3


def test_the_grids_of_the_study_are_valid(base):
    names = sorted(p.stem for p in batch.GRIDS.glob("*.yaml"))
    assert {"ablations", "frontier", "smoke"} <= set(names)
    for name in names:
        assert batch.load(name, "base").jobs
    with pytest.raises(ValueError, match="one of ablations, frontier"):
        batch.load("ablation")
    main, *others = batch.load("ablations", "base", [0, 1]).jobs
    assert main.arm == "main" and {job.params.seed for job in others} == {0, 1}
    assert not {"data", "ranker", "explainer", "shield"} & {
        stage for job in others for stage in job.stages
    }


@pytest.mark.parametrize("name, chosen", [("smoke", ""), ("mine", ' SET="batch=mine"')])
def test_the_closing_hint_names_the_grid_where_the_base_run_does_not(
    base, tmp_path, capsys, name, chosen
):
    assert BASE.batch == "smoke"
    assert (
        batch.main(
            [
                "--grid",
                grid_of(
                    tmp_path, "base: base\nstages: [evaluation]\nseeds: [4]\narms: {main: {}}", name
                ),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.endswith(
        f"compare them in notebook 07: make all RUN=base{chosen}, with its profile and seed\n"
    )


def test_a_ray_cluster_that_is_not_there_is_one_clear_line(base, tmp_path, monkeypatch, capsys):
    def no_cluster(**options):
        raise ConnectionError(
            "Could not find any running Ray instance.\nPlease specify the one to connect to."
        )

    monkeypatch.setitem(
        sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False, init=no_cluster)
    )
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # nobody answers at port 9
    path = grid_of(tmp_path, "base: base\nstages: [evaluation]\nseeds: [4]\narms: {main: {}}")
    for address, where, without in (
        (["--address", "auto"], "auto", "leave ADDRESS out"),
        ([], "127.0.0.1:9", "unset RAY_ADDRESS"),
    ):
        assert batch.main(["--grid", path, "--engine", "ray", *address]) == 2
        message = capsys.readouterr().err
        assert message.startswith(
            f"error: engine ray: no cluster at address '{where}': start one with ray start --head, or {without} "
        )
        assert message.count("\n") == 1 and (
            "Could not find any running Ray instance" in message
        ) == bool(address)
    monkeypatch.setattr(
        sys.modules["ray"], "init", lambda **options: pytest.fail("Ray was asked to wait for it")
    )
    assert batch.main(["--grid", path, "--engine", "ray", "--address", "127.0.0.1:9"]) == 2
    assert "no cluster at address '127.0.0.1:9': start one" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- one machine, toy jobs

# What a toy job does, by arm: its trace is one line a start, its marker makes it done.
TOY = """
import os, sys, time
from pathlib import Path
folder, arm = Path(sys.argv[1]), sys.argv[2]
with open(folder / "trace", "a") as trace:
    trace.write(f"{arm} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {os.environ['RECRL_BATCH']} {os.environ['RECRL_ARM']}\\n")
starts = (folder / "trace").read_text().count(f"{arm} ")
print(f"{arm}: at work", flush=True)
if arm == "fails":
    print("FAILED stage 1/1, cell 3: ValueError: bad"); sys.exit(1)
if arm == "lost" and starts == 1 or arm == "always_lost":
    sys.exit(3)
if arm == "killed" and starts == 1:
    os.kill(os.getpid(), 9)
time.sleep(60 if arm == "long" else 0.2)
(folder / f"{arm}.done").touch()
"""


@pytest.fixture
def toys(house, monkeypatch):
    """``toys(*arms)``: a grid of toy jobs; ``toys.argv`` starts one; ``toys.starts()`` lists the arms started."""
    monkeypatch.setattr(batch.Job, "done", lambda job: (house.root / f"{job.arm}.done").exists())

    class Toys:
        def __call__(self, *arms):
            jobs = tuple(
                batch.Job(f"b-{arm}", arm, {}, BASE.replace(run=f"b-{arm}"), ("evaluation",))
                for arm in arms
            )
            return batch.Grid("toys", "base", jobs)

        def argv(self, job):
            return [sys.executable, "-c", TOY, str(house.root), job.arm]

        def trace(self):
            return [line.split() for line in (house.root / "trace").read_text().splitlines()]

    return Toys()


def test_a_failure_does_not_stop_the_others_and_is_told(toys):
    out = io.StringIO()
    failed = batch.run_local(toys("fails", "a", "b"), 2, out, toys.argv, poll=0.05)
    assert list(failed) == ["b-fails"] and "cell 3: ValueError: bad; see" in failed["b-fails"]
    lines = out.getvalue().splitlines()
    assert "b-fails: running | 2 queued, 1 running, 0 done, 0 failed, 00:00" in lines
    assert (
        any(line.startswith("b-a: done in 00:0") for line in lines)
        and "0 queued, 0 running, 2 done, 1 failed" in lines[-1]
    )
    assert "left" in lines[-2] or "left" in lines[-1]
    trace = toys.trace()
    assert (
        len(trace) == 3
        and {(row[2], row[3]) for row in trace} == {("1", "toys")}
        and all(row[0] == row[4] for row in trace)
    )


def test_a_second_batch_does_only_what_is_left(toys):
    grid = toys("fails", "a")
    batch.run_local(grid, 1, io.StringIO(), toys.argv, poll=0.05)
    out = io.StringIO()
    assert list(batch.run_local(grid, 1, out, toys.argv, poll=0.05)) == ["b-fails"]
    assert [row[0] for row in toys.trace()] == [
        "fails",
        "a",
        "fails",
    ] and "b-a: done (before, kept)" in out.getvalue()


def test_a_lost_kernel_or_process_is_tried_once_more_and_only_once(toys):
    failed = batch.run_local(
        toys("lost", "killed", "always_lost"), 1, io.StringIO(), toys.argv, poll=0.05
    )
    assert list(failed) == ["b-always_lost"]
    arms = [row[0] for row in toys.trace()]
    assert {arm: arms.count(arm) for arm in arms} == {"lost": 2, "killed": 2, "always_lost": 2}


def test_what_counts_as_lost():
    assert (
        batch.lost(execute.KernelDied.exit_code)
        and batch.lost(-9)
        and not any(map(batch.lost, (0, 1, 2, 130)))
    )


def test_exit_code_0_alone_does_not_make_a_job_done(toys, monkeypatch):
    monkeypatch.setattr(batch.Job, "done", lambda job: False)
    assert list(batch.run_local(toys("a"), 1, io.StringIO(), toys.argv, poll=0.05)) == ["b-a"]


def test_an_interrupt_ends_the_jobs(toys, monkeypatch):
    def interrupt(board):
        if (paths.RUNS.parent / "trace").exists() and toys.trace():
            raise KeyboardInterrupt

    monkeypatch.setattr(batch.Board, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        batch.run_local(toys("long", "a"), 1, io.StringIO(), toys.argv, poll=0.05)
    (row,) = toys.trace()
    with pytest.raises(ProcessLookupError):
        os.kill(int(row[1]), 0)


def test_a_terminal_shows_one_table_with_what_runs_first(toys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "5")
    out = Terminal()
    batch.run_local(toys("a", "b", "c"), 1, out, toys.argv, poll=0.05)
    first = out.getvalue().split("\x1b[0J")[0].replace("\x1b[2K", "").splitlines()
    assert (
        first[0].startswith("running b-a  00:0")
        and first[2] == "... and 1 more"
        and first[3].startswith("2 queued, 1 running")
    )
    shown = out.getvalue().split("\x1b[0J")
    assert any("a: at work" in frame for frame in shown) and "\x1b[4F" in shown[1]
    assert all(len(line) < 120 for line in out.getvalue().splitlines())


# ------------------------------------------------------------------------------- one machine, real jobs


@pytest.fixture
def argv(house):
    """Starts ``runner job`` in a process whose notebooks and runs are this house's."""
    moved = (
        "import sys; from pathlib import Path; from recrl_lib import paths, runner\n"
        f"paths.NOTEBOOKS, paths.RUNS = Path({str(house.notebooks)!r}), Path({str(house.runs)!r})\n"
        "sys.exit(runner.main(sys.argv[1:]))"
    )
    return lambda job: [sys.executable, "-c", moved, *batch.command(job)[3:]]


def test_a_batch_of_real_notebooks(base, house, argv, tmp_path):
    """Two derived runs through papermill, in processes of their own; the second time only the failed one runs."""
    house.write("evaluation", "assert sim_beta < 2, 'too much'\n" + FINISH.format("evaluation"))
    assert (
        "evaluation" not in derive.base_run("base")[1]
    )  # its notebook is another now, so it cannot be shared
    path = grid_of(
        tmp_path,
        "base: base\nstages: [evaluation]\nseeds: [4]\narms: {low: {sim_beta: 1.0}, high: {sim_beta: 3.0}}",
    )
    for _ in range(2):
        out, grid = io.StringIO(), batch.load(path)
        for job in grid.jobs:
            derive.derive(grid.base, job.run, **job.changes)
        failed = batch.run_local(grid, 2, out, argv)
        assert list(failed) == ["base-g-high-seed4"], failed
        assert "cell 4: AssertionError: too much" in failed["base-g-high-seed4"]
    assert "base-g-low-seed4: done (before, kept)" in out.getvalue()
    low = runs.read_manifest("base-g-low-seed4")
    assert low["stages"]["shielded_ppo"] == runs.read_manifest("base")["stages"]["shielded_ppo"]
    assert (
        low["stages"]["evaluation"]["status"] == "finished" and low["derived_from"]["run"] == "base"
    )
    assert (runs.run_folder("base-g-high-seed4") / "notebooks" / "06_evaluation.ipynb").is_file()


def test_a_job_whose_parent_is_gone_ends_with_its_kernel(base, house, argv, tmp_path):
    house.write(
        "evaluation",
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)",
    )
    (job,) = batch.load(
        grid_of(tmp_path, "base: base\nstages: [evaluation]\nseeds: [4]\narms: {a: {}}")
    ).jobs
    derive.derive("base", job.run)
    process = batch.launch(batch.log_file(job.run), argv(job), {})
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.stdin.close()
    assert process.wait(20) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_run_is_executed_by_one_process_at_a_time(base, house, tmp_path, monkeypatch, capfd):
    house.write("evaluation", FINISH.format("evaluation"))
    (job,) = batch.load(
        grid_of(tmp_path, "base: base\nstages: [evaluation]\nseeds: [4]\narms: {a: {}}")
    ).jobs
    derive.derive("base", job.run)
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1)"
    held = subprocess.Popen(
        [sys.executable, "-c", hold, str(runs.run_folder(job.run) / ".lock")],
        stdout=subprocess.PIPE,
    )
    assert held.stdout.readline() == b"held\n"
    monkeypatch.setattr(execute, "run_all", lambda params, stages: 0)
    assert execute.main(["job", "--run", job.run, "--stages", *job.stages]) == 0
    assert "another process executes it, waiting" in capfd.readouterr().out
    held.wait(5)
    assert execute.main(["job", "--run", "unknown", "--stages", "evaluation"]) == 2


def until(true, limit: float = 40.0):
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------ two Ray nodes


def test_two_ray_nodes_and_one_is_lost(base, house, argv, tmp_path, monkeypatch):
    """Four jobs, one GPU each, on two nodes of one GPU; a node goes while it works. Nothing is lost, nothing done twice.

    Skipped where Ray is not installed, as in the study's own environment (see 'optional' in environment.yml).
    """
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    trace = tmp_path / "trace"
    note = f"open({str(trace)!r}, 'a').write('%s ' + run + ' ' + os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')"
    house.write(
        "evaluation",
        "\n".join(
            [
                "import os, time",
                note % "start",
                "time.sleep(6)",
                FINISH.format("evaluation"),
                note % "finish",
            ]
        ),
    )
    path = grid_of(
        tmp_path,
        "base: base\nstages: [evaluation]\nseeds: [4]\ncross: {sim_beta: [1.0, 1.1, 1.2, 1.3]}",
    )
    grid = batch.load(path)
    for job in grid.jobs:
        derive.derive("base", job.run, **job.changes)

    def lines(kind):
        return (
            [line.split()[1] for line in trace.read_text().splitlines() if line.startswith(kind)]
            if trace.exists()
            else []
        )

    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster()
    try:
        cluster.add_node(
            wait=False, num_cpus=0, **small
        )  # the head; without waiting, since Ray waits 30 s only
        nodes = [cluster.add_node(wait=False, num_cpus=1, num_gpus=1, **small) for _ in range(2)]
        cluster.wait_for_nodes(300)

        def lose_one():
            until(lambda: len(lines("start")) >= 2, 300)
            cluster.remove_node(nodes[1], allow_graceful=False)

        killer = threading.Thread(target=lose_one)
        killer.start()
        out = io.StringIO()
        failed = batch.run_ray(grid, cluster.address, gpus=1, cpus=1, out=out, argv=argv)
        killer.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    runs_ = sorted(job.run for job in grid.jobs)
    assert failed == {} and all(job.done() for job in grid.jobs), out.getvalue()
    assert sorted(lines("finish")) == runs_  # each once
    assert (
        sorted(set(lines("start"))) == runs_ and len(lines("start")) == len(runs_) + 1
    )  # the lost one began again
    assert all(
        line.split()[2] == "0" for line in trace.read_text().splitlines()
    )  # Ray gave each its GPU
    started = len(lines("start"))
    assert batch.run_local(grid, 1, io.StringIO(), argv) == {} and len(lines("start")) == started
