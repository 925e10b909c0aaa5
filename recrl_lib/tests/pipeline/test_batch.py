"""Batches: grids checked whole; what jobs share; jobs kept, tried again and ended; Ray's nodes."""

import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from recrl_lib import paths, runs
from recrl_lib.pipeline import batch, tasks
from recrl_lib.runs import write_atomic
from recrl_lib.tests.conftest import BASE, derived, finish
from recrl_lib.tests.pipeline.test_execute import Terminal
from recrl_lib.tests.pipeline.test_tasks import TOY, moved_script, sleeper, until

HEAD = "base: base\nstages: [evaluation]\nseeds: [4]\n"


def grid_of(tmp_path: Path, text: str, name: str = "g") -> str:
    path = tmp_path / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_arms_seeds_and_lists_are_crossed_and_skipped(base, tmp_path):
    for stage in tasks.with_needs("shielded_ppo"):
        finish(stage.name, BASE.replace(run="base-seed5", seed=5))
    text = """
        base: base
        stages: [evaluation]
        seeds: [4, 5]
        fixed: {eval_users: 12}
        arms: {main: {}, lora4: {lora_rank: 3, eval_users: x0.5, ppo_steps: x2, kl_coef: x0.2}}
        cross: {sim_beta: [0.0, 0.1]}
        skip: [{arm: main-0.1, seed: 5}, {arm: lora4-0.0}]
    """
    jobs = batch.load(grid_of(tmp_path, text))
    names = "main-0.0-seed4 main-0.0-seed5 main-0.1-seed4 lora4-0.1-seed4 lora4-0.1-seed5".split()
    assert [job.run for job in jobs] == [f"base-g-{name}" for name in names]
    assert jobs[1].changes == {"seed": 5, "eval_users": 12, "sim_beta": 0.0}
    assert [job.base for job in jobs] == ["base", "base-seed5", "base", "base", "base-seed5"]
    own = {"run": jobs[-1].run, "seed": 5, "lora_rank": 3, "sim_beta": 0.1}
    own |= {"eval_users": BASE.eval_users // 2, "ppo_steps": 2 * BASE.ppo_steps}
    assert jobs[-1].params == BASE.replace(**own, kl_coef=BASE.kl_coef * 0.2)
    assert jobs[1].shared() == ["data", "ranker", "explainer", "shield", "shielded_ppo"]
    assert jobs[-1].shared() == ["data", "ranker"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "not valid YAML"),
        (HEAD + "arm: {a: {}}", "arm: Extra inputs are not permitted"),
        ("base: base\nstages: [all]\narms: {a: {}}", "stages.0: no stage is called 'all'"),
        (HEAD.replace("4", "a") + "arms: {a: {}}", "seeds.0: Input should be a valid integer"),
        (HEAD + "arms: {a: {kl_coeff: 0.0}}", "unknown parameter 'kl_coeff'; did you mean kl_coef"),
        (HEAD + "arms: {a: {kl_coef: -1.0}}", "arm 'a': parameter kl_coef=-1.0: must be greater"),
        (HEAD + "arms: {a: {kl_coef: 1e-4}}", "is text; write 3, 0.0001, 1.0e-4"),
        (HEAD + "arms: {a: {reward: x2}}", "parameter reward='x2': must be 'faithful', "),
        (HEAD + "arms: {a: {seed: 3}}", "arm 'a': run and seed are not set here"),
        (HEAD + "arms: {a: {}}\nskip: [{arm: b}]", "skip: {'arm': 'b'} matches no job"),
        (HEAD + "cross: {kl_coef: [0.1, 0.1]}", "several jobs would be called base-g-0.1-seed4"),
        (HEAD + "arms: {a: {seed: 3}, b: {clip_range: 2.0}}", "clip_range=2.0"),  # all are listed
        (HEAD, "there is no job in it"),
        (HEAD.replace("base: base", "base: none"), "runs/none does not exist; make all RUN=none"),
    ],
)  # fmt: skip
def test_a_grid_that_is_wrong_is_refused_with_file_and_field(base, tmp_path, text, words, capsys):
    assert batch.main(["--grid", grid_of(tmp_path, text)]) == 2
    message = capsys.readouterr().err
    assert words in message and "g.yaml" in message
    assert sorted(p.name for p in paths.RUNS.iterdir()) == ["base"]


def test_a_base_that_lacks_what_every_job_needs_is_refused(base, tmp_path, capsys):
    path = grid_of(tmp_path, HEAD + "arms: {a: {}}")
    assert batch.main(["--grid", path, "--seeds", "5"]) == 2
    assert "base run 'base-seed5': stages data, ranker" in capsys.readouterr().err
    (runs.run_folder("base") / "artifacts/ranker.safetensors").unlink()
    assert batch.main(["--grid", path]) == 2
    message = capsys.readouterr().err
    assert "base run 'base': stages ranker, explainer, shield, shielded_ppo are" in message
    assert "make all RUN=base SEED=4 first" in message


def test_the_grids_of_the_study_are_valid_and_repeat_no_early_stage(base):
    names = sorted(path.stem for path in batch.GRIDS.glob("*.yaml"))
    assert names == ["ablations", "frontier", "smoke"]
    for job in [job for name in names for job in batch.load(name, "base", [4])]:
        assert "ranker" in job.shared()
    with pytest.raises(ValueError, match="GRID=ablation: .* one of ablations, frontier, smoke"):
        batch.load("ablation")


@pytest.mark.parametrize(
    "changes, left",
    [
        ({}, []),
        ({"sim_beta": 1.0}, ["evaluation"]),
        ({"kl_coef": 0.0}, ["shielded_ppo", "evaluation"]),
        ({"shield_energy": 0.5}, ["shield", "shielded_ppo", "evaluation"]),
        ({"lora_rank": 3}, ["explainer", "shield", "shielded_ppo", "evaluation"]),
        ({"seed": 5}, ["data", "ranker", "explainer", "shield", "shielded_ppo", "evaluation"]),
    ],
)
def test_what_a_change_does_not_reach_is_the_base_runs_own_file(base, changes, left):
    params, before = derived("d", **changes), runs.read_manifest("base")
    manifest = runs.read_manifest("d")
    assert runs.read_params("d") == params and manifest["seed"] == params.seed
    for stage in tasks.with_needs("evaluation"):
        name = stage.name
        assert runs.up_to_date(name, params) == (name not in left)
        if name not in left:
            assert manifest["stages"][name] == before["stages"][name]
            for file in before["stages"][name]["outputs"]:
                assert (runs.run_folder("d") / file).samefile(runs.run_folder("base") / file)
    for name in left:
        finish(name, params)
    assert derived("d", **changes) == params and runs.up_to_date("evaluation", params)


def test_neither_run_can_reach_into_the_other(base):
    params = derived("d", kl_coef=0.0)
    finish("shield", base, value=2.0)  # writes whole files
    assert runs.up_to_date("shield", params) and not runs.up_to_date("shielded_ppo", base)
    finish("shielded_ppo", params)
    derived("d", kl_coef=0.0)  # the base's new files are taken over, and what was made of the old
    assert runs.up_to_date("shield", params) and not runs.up_to_date("shielded_ppo", params)
    write_atomic(runs.run_folder("d") / "manifest.json", "{")
    with pytest.raises(RuntimeError, match="not valid JSON"):
        derived("d", kl_coef=0.0)


def test_across_file_systems_files_are_copied(base, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    params = derived("d", kl_coef=0.0)
    ours, theirs = (runs.run_folder(r) / "artifacts/ranker.safetensors" for r in ("d", "base"))
    assert not ours.samefile(theirs) and runs.up_to_date("ranker", params)


# What a toy job does, by arm: its trace is one line a start, its marker makes it done.
TOY_JOB = """
import os, sys, time
from pathlib import Path
folder, arm = Path(sys.argv[1]), sys.argv[2]
names = ["OMP_NUM_THREADS", "RECRL_BATCH", "RECRL_ARM"]
with open(folder / "trace", "a") as trace:
    trace.write(" ".join([arm, str(os.getpid()), *(os.environ.get(n, "-") for n in names)]) + "\\n")
starts = (folder / "trace").read_text().count(f"{arm} ")
print(f"{arm}: at work", flush=True)
if arm == "fails":
    print("FAILED stage 1/1, cell 3: ValueError: bad"); sys.exit(1)
if arm == "lost" and starts == 1 or arm == "hopeless":
    sys.exit(3)
if arm == "killed" and starts == 1:
    os.kill(os.getpid(), 9)
if arm == "long":
    sys.stdin.read()
if arm != "idle":
    (folder / f"{arm}.done").touch()
"""


@pytest.fixture
def toys(house, monkeypatch):
    """``toys(workers, *arms)`` runs toy jobs; it returns why some failed, and a row a start."""
    job_command = [sys.executable, "-c", TOY_JOB, str(house.root)]
    monkeypatch.setattr(batch, "command", lambda job: [*job_command, job.arm])
    monkeypatch.setattr(
        batch.Job, "left", lambda job: [] if (house.root / f"{job.arm}.done").exists() else ["x"]
    )

    def call(workers, *arms):
        jobs = [batch.Job(f"b-{a}", a, "base", {}, BASE, ("evaluation",)) for a in arms]
        with batch.local(workers) as submit:
            failed = batch.run_jobs("toys", jobs, submit)
        trace = (house.root / "trace").read_text()
        return failed, [line.split() for line in trace.splitlines()]

    return call


def test_a_failure_stops_no_other_job_and_is_told(toys, capsys):
    failed, trace = toys(2, "fails", "a", "idle")
    assert sorted(failed) == ["b-fails", "b-idle"]  # done is what the manifest says
    out = capsys.readouterr().out
    assert "cell 3: ValueError: bad; see" in failed["b-fails"] and "b-a: done, " in out
    assert out.splitlines()[-1].endswith("0 of 3 left")
    assert len(trace) == 3 and {(row[2], row[3]) for row in trace} == {("1", "toys")}
    assert all(row[0] == row[4] for row in trace)


def test_jobs_side_by_side_have_one_thread_each_and_a_job_alone_has_all(toys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [row[2] for row in toys(1, "a")[1]] == ["-"]
    assert [row[2] for row in toys(2, "b")[1]] == ["-", "1"]


def test_a_lost_kernel_or_process_is_tried_once_more_and_only_once(toys):
    failed, trace = toys(3, "lost", "killed", "hopeless")
    assert list(failed) == ["b-hopeless"]
    assert sorted(row[0] for row in trace) == sorted(["lost", "killed", "hopeless"] * 2)


def test_an_interrupt_ends_the_jobs_and_a_terminal_shows_what_they_are_at(toys, house, monkeypatch):
    class Interrupted(Terminal):
        def write(self, text):
            if "long: long: at work" in text:
                raise KeyboardInterrupt
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        toys(1, "long", "a")
    (line,) = (house.root / "trace").read_text().splitlines()
    with pytest.raises(ProcessLookupError):
        os.kill(int(line.split()[1]), 0)


@pytest.fixture
def moved(house, monkeypatch):
    """Jobs' processes have the notebooks and runs of this house."""
    real, script = batch.command, moved_script(house)
    monkeypatch.setattr(batch, "command", lambda job: [*script, *real(job)[3:]])


def test_a_batch_of_real_notebooks(base, house, moved, tmp_path, capsys):
    """Two runs through papermill; what is done is not run again."""
    house.write("evaluation", "assert sim_beta < 2, 'too much'\n" + TOY.format("evaluation"))
    finish("evaluation", BASE)
    path = grid_of(tmp_path, HEAD + "arms: {low: {sim_beta: 1.0}, high: {sim_beta: 3.0}}", "mine")
    assert batch.main(["--grid", path, "--list"]) == 0
    listed = "base-mine-low-seed4: changes seed=4, sim_beta=1.0; runs evaluation"
    assert capsys.readouterr().out.splitlines()[0] == listed
    assert batch.main(["--grid", path, "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert "2 jobs, 0 done before" in out and "batch mine: 1 of 2 jobs done" in out
    assert "FAILED base-mine-high-seed4: FAILED stage 6/6 evaluation, cell 4: AssertionError" in out
    low, own = (runs.read_manifest(run)["stages"] for run in ("base-mine-low-seed4", "base"))
    assert low["shielded_ppo"] == own["shielded_ppo"] and low["evaluation"] != own["evaluation"]
    path = grid_of(tmp_path, HEAD + "arms: {low: {sim_beta: 1.0}}", "mine")
    assert batch.main(["--grid", path]) == 0
    out = capsys.readouterr().out
    assert "1 jobs, 1 done before" in out
    assert 'make all RUN=base SET="batch=mine", with its profile' in out


def test_a_job_ends_with_its_parent_and_its_run_is_executed_by_one_process_at_a_time(
    base, house, moved, tmp_path
):
    marker = house.root / "pid"
    house.write("evaluation", sleeper(marker))
    (job,) = batch.load(grid_of(tmp_path, HEAD + "arms: {a: {}}"))
    job.prepare()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(batch.command(job), **pipes)
    until(lambda: marker.exists() and marker.read_text())
    second = subprocess.Popen(batch.command(job), **pipes)
    assert "another process executes it, waiting" in second.stdout.readline()
    for process in (second, first):
        process.stdin.close()
        assert process.wait(30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
    assert tasks.main(["job", "--run", "unknown", "--stages", "evaluation"]) == 2


def test_a_ray_cluster_that_is_not_there_is_one_clear_line(base, tmp_path, monkeypatch, capsys):
    def no_cluster(**options):
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify one.")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=no_cluster))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # nobody answers at port 9
    path = grid_of(tmp_path, HEAD + "arms: {main: {kl_coef: 0.0}}")
    for address, where, without in (
        (["--address", "auto"], "auto", "leave ADDRESS out"),
        ([], "127.0.0.1:9", "unset RAY_ADDRESS"),
    ):
        assert batch.main(["--grid", path, "--engine", "ray", *address]) == 2
        message = capsys.readouterr().err
        start = f"error: ENGINE=ray: no cluster at '{where}': start one with ray start --head"
        assert message.startswith(f"{start}, or {without} ") and message.count("\n") == 1
        assert ("Could not find any running Ray instance" in message) == bool(address)


def test_two_ray_nodes_and_one_is_lost(base, house, moved, tmp_path):
    """Four jobs of one CPU on two nodes of one; a node is lost. Nothing is lost or done twice."""
    pytest.importorskip("ray", reason="Ray is optional, see environment.yml")
    from ray.cluster_utils import Cluster

    trace = tmp_path / "trace"
    note = f"open({str(trace)!r}, 'a').write('%s ' + run + '\\n')"
    body = ["import time", note % "start", "time.sleep(6)", TOY.format("evaluation")]
    house.write("evaluation", "\n".join([*body, note % "finish"]))
    jobs = batch.load(grid_of(tmp_path, HEAD + "cross: {sim_beta: [1.0, 1.1, 1.2, 1.3]}"))
    for job in jobs:
        job.prepare()

    def count(kind):
        return trace.read_text().count(kind) if trace.exists() else 0

    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster()
    try:
        cluster.add_node(wait=False, num_cpus=0, **small)  # the head
        nodes = [cluster.add_node(wait=False, num_cpus=1, **small) for _ in range(2)]
        cluster.wait_for_nodes(300)

        def lose_one():
            until(lambda: count("start") >= 2, 300)
            cluster.remove_node(nodes[1], allow_graceful=False)

        killer = threading.Thread(target=lose_one)
        killer.start()
        with batch.on_ray(cluster.address, gpus=0, cpus=1) as submit:
            failed = batch.run_jobs("g", jobs, submit)
        killer.join()
    finally:
        cluster.shutdown()
    assert failed == {} and not any(job.left() for job in jobs)
    assert all(count(f"finish {job.run}\n") == 1 for job in jobs)
    assert count("start") == len(jobs) + 1  # the lost one began again


def test_trying_one_change_runs_what_it_touches_and_shows_both_tables(base, monkeypatch, capsys):
    for stage in tasks.with_needs("report"):
        if not runs.up_to_date(stage.name, BASE):
            finish(stage.name, BASE)
    ran = []

    def run_all(params, stages):
        for stage in stages:
            if not runs.up_to_date(stage.name, params):
                ran.append(stage.name)
                finish(stage.name, params, 2.0)
        return 0

    monkeypatch.setattr(batch, "run_all", run_all)
    tables = lambda run: batch.pd.DataFrame({"reward": [run]}, index=["shielded"])  # noqa: E731
    monkeypatch.setattr(batch.publish, "main_table", tables)
    before = runs.read_manifest("base")
    assert batch.main(["--base", "base", "--set", "sim_beta=1.0"]) == 0
    assert ran == [s.name for s in tasks.with_needs("report") if "evaluation" in (s.name, *s.needs)]
    shown = capsys.readouterr().out
    assert shown.index("base") < shown.index("base-try") and "changed: sim_beta=1.0" in shown
    assert runs.read_manifest("base") == before
    assert batch.main(["--base", "nothing", "--set", "sim_beta=1.0"]) == 2
    assert "FROM=nothing: no such run" in capsys.readouterr().err
