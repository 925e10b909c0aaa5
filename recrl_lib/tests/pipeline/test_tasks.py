"""The stages of a run: refused before they start, skipped, resumed; and the words of make."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from recrl_lib import provenance, runs
from recrl_lib.params import PIPELINE, PROFILES, STAGES, Params, resolve
from recrl_lib.pipeline import publish, tasks
from recrl_lib.runs import write_atomic
from recrl_lib.tests.conftest import BASE

ENVIRONMENT, DATA = STAGES[:2]
TOY = """
from recrl_lib import measures, runs
stage = runs.start({!r}, globals())
names = measures.REQUIRED_MEASURES.get(stage.name, ["n"])
stage.results([dict(measure=name, value=0.5) for name in names])
stage.finish()
"""


def until(true, limit: float = 60.0):
    end = time.monotonic() + limit
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def moved_script(house) -> list[str]:
    """Start of a command: ``tasks.main`` with the notebooks and runs of this house."""
    main = "import sys\nfrom recrl_lib.pipeline import tasks\nsys.exit(tasks.main(sys.argv[1:]))"
    return [sys.executable, "-c", f"{house.move}\n{main}"]


def sleeper(marker) -> str:
    """A cell that writes its process's number to ``marker`` and sleeps."""
    note = f"open({str(marker)!r}, 'w').write(str(os.getpid()))"
    return f"import os, time\n{note}\ntime.sleep(60)"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "sheild_rank=3"], "did you mean shield_rank"),
        (["--set", "ranker_dim=wide"], "ranker_dim='wide' is not of type int"),
        (["--set", "ranker_dim"], "SET 'ranker_dim': must have the form name=value"),
        (["--set", "seed=3"], "SET 'seed=3': give SEED=3 beside it"),
        (["--set", "ppo_users=7"], "ppo_users=7.0: must be less than or equal"),
        (["--run", "a/b"], "parameter run"),
        (["--to", "end"], "TO: invalid choice: 'end'"),
        (["--profile", "big"], "PROFILE: invalid choice: 'big'"),
        (["--seed", "one"], "SEED: invalid int value: 'one'"),
        (["--sed", "1"], "unrecognized arguments: SED 1; make help"),
    ],
)
def test_wrong_arguments_exit_2_in_makes_words_and_write_nothing(house, capsys, arguments, words):
    assert tasks.main(["all", "--profile", "smoke", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message
    assert not house.runs.exists()


def test_a_run_named_after_a_profile_has_it(monkeypatch):
    for cuda, machine in ((False, "laptop"), (True, "pod")):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        wanted = {None: machine, "mine": machine, "smoke-main-seed0": machine}
        wanted |= {name: name for name in PROFILES} | {"paper-seed1": "paper"}
        assert {run: tasks.default_profile(run) for run in wanted} == wanted


def test_settings_get_their_types_and_reach_the_run(house, monkeypatch):
    given = []
    monkeypatch.setattr(tasks, "run_all", lambda *all_given: given.append(all_given) or 0)
    settings = ["ppo_steps=3", "kl_coef=1e-3", "llm=a=b"]
    assert tasks.main(["all", "--profile", "smoke", "--seed", "2", "--set", *settings]) == 0
    assert tasks.main(["all", "--run", "smoke", "--to", "ranker", "--force"]) == 0
    expected = resolve("smoke", run="smoke-seed2", seed=2, ppo_steps=3, kl_coef=1e-3, llm="a=b")
    assert given == [(expected, PIPELINE, False), (resolve("smoke", run="smoke"), STAGES[:3], True)]


def test_a_stage_is_kept_until_something_changes_and_a_failure_stops_the_rest(house, capfd):
    """In real kernels; what is listed, said, stored and returned on the way."""
    house.write("environment", TOY.format("environment"), "print(device)")
    failing = "import sys\nprint('noise', file=sys.stderr)\nraise ValueError('no\\nluck')"
    house.write("data", failing)
    house.write("ranker")
    params = Params(run="r", seed=3, device="cpu")

    def run(stages=STAGES[:3], **options):
        code = tasks.run_all(params, stages, **options)
        out, err = capfd.readouterr()
        assert err == ""
        return code, out.splitlines()

    code, lines = run()
    kept = house.runs / "r" / "notebooks" / "01_data.ipynb"
    assert code == 1 and lines[0] == "stage 1/3 environment 00:00"
    assert lines[-3].startswith("stage 1/3 environment: done in 00:")
    failure = "FAILED stage 2/3 data, cell 4: ValueError: no luck"
    assert lines[-1] == f"{failure} (notebook kept at {kept})"
    stored = provenance.read_notebook(house.runs / "r" / "notebooks" / "00_environment.ipynb")
    assert "".join(stored["cells"][-1]["outputs"][0]["text"]) == "cpu\n"
    assert "ValueError" in kept.read_text() and runs.read_params("r") == params
    assert len(os.listdir(house.notebooks)) == 3  # nothing is written there
    assert list(runs.read_manifest("r")["stages"]) == ["environment"]

    house.write("data", TOY.format("data"))
    code, lines = run((ENVIRONMENT, DATA))
    assert code == 0 and lines[0] == "stage 1/2 environment: unchanged, kept"
    assert any(line.startswith("run r: 2 stages (1 kept) in 0") for line in lines)
    listing = ["all", "--profile", "smoke", "--run", "r", "--seed", "3", "--to", "data", "--list"]
    assert tasks.main([*listing, "--set", "device=cpu", "ppo_users=0.4"]) == 0
    shown = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert shown[-2:] == [["U", "environment", "environment"], ["R", "data", "data"]]
    code, lines = run((ENVIRONMENT,), force=True)
    assert code == 0 and lines[0] == "stage 1/1 environment 00:00"


def test_a_stage_that_finished_elsewhere_is_done(base, house, capsys):
    """As in JupyterLab: the manifest is the record. A damaged output is made again."""
    stages = tasks.with_needs("evaluation")
    assert [stage.number for stage in stages] == [1, 2, 3, 4, 5, 6]
    assert tasks.run_all(BASE, stages) == 0
    assert capsys.readouterr().out.endswith("run base: all 6 stages unchanged, nothing to do\n")
    (house.runs / "base" / "artifacts" / "said.safetensors").write_text("damaged")
    house.write("evaluation", "1 / 0")
    assert tasks.run_all(BASE, stages) == 1
    out = capsys.readouterr().out
    assert "stage 5/6 shielded_ppo: unchanged, kept\nstage 6/6 evaluation 00:" in out


def test_being_stopped_ends_the_kernel_and_says_where(house):
    marker = house.root / "pid"
    house.write("environment", sleeper(marker))
    command = [*moved_script(house), "all", "--run", "smoke", "--to", "environment"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    try:
        until(lambda: marker.is_file() and marker.read_text())
        process.send_signal(signal.SIGTERM)  # becomes a KeyboardInterrupt, as Ctrl-C does
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and err == ""
    assert out.splitlines()[-1].startswith("INTERRUPTED stage 1/1 environment after 00:")
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_the_report_is_rendered_when_it_is_older_than_its_notebook(house, monkeypatch):
    rendered = []

    def render(run):
        rendered.append(run)
        write_atomic(house.runs / run / "report.html", "")

    monkeypatch.setattr(publish, "render_report", render)
    monkeypatch.setattr(publish, "main_table", lambda run: pd.DataFrame({"reward": ["0.5"]}))
    write_atomic(house.runs / "r" / "notebooks" / "09_report.ipynb", "{}")
    for _ in range(2):
        first, *_, report, size, last = tasks.results("r").splitlines()
        assert "reward" in first and report.startswith("report: ") and size.endswith(": 0 MB")
        assert last.startswith("next: make lab") and "'r'" in last
    assert rendered == ["r"]
