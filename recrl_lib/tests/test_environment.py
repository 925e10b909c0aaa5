"""The environment check: each line can fail, and says what to do."""

import shutil

import psutil
import pytest
import torch

from recrl_lib import environment, progress
from recrl_lib.environment import FAIL, GIB, OK, WARN
from recrl_lib.provenance import package_version


def test_there_is_a_line_for_each_check_and_a_remedy_for_all_that_is_not_ok():
    checks = environment.check_environment("cpu")
    needed = {"python", "packages", "CPU cores", "free memory", "disk of the runs", "git", "matmul"}
    assert needed <= {check.name for check in checks}
    assert all((check.status == OK) == (check.remedy == "") for check in checks)
    assert str(environment.Check("x", "1 GiB")) == "[OK] x: 1 GiB"
    assert str(environment.Check("x", "1 GiB", FAIL, "free space")) == "[FAIL] x: 1 GiB; free space"


def test_packages_are_compared_with_their_pins():
    pins = {"numpy": package_version("numpy"), "pandas": "0.1", "no-such-package": "1"}
    summary, *bad = environment.check_packages({**pins, "pytest": ""})
    assert summary.found == "2 of 4 as pinned"
    assert [(row.name, row.status) for row in bad] == [("pandas", WARN), ("no-such-package", FAIL)]
    assert all("make env" in row.remedy for row in bad)
    listed = environment.pinned_packages()
    assert listed["papermill"] == "2.7.0" and not any(name.startswith("-") for name in listed)


@pytest.mark.parametrize(
    "version, status",
    [("2.10.2", FAIL), ("2.11.0+cu128", OK), ("2.13.1", OK), ("2.14.0", FAIL), ("3.0", FAIL)],
)
def test_a_range_of_torch_is_accepted(monkeypatch, version, status):
    monkeypatch.setattr(environment, "package_version", lambda name: version)
    rows = environment.check_packages({"torch": "2.13.0"})
    assert [row.status for row in rows[1:]] == ([] if status == OK else [FAIL])


def test_an_old_python_and_a_full_disk_fail(monkeypatch):
    monkeypatch.setattr(environment.platform, "python_version_tuple", lambda: ("3", "9", "1"))
    usage = shutil.disk_usage("/")._replace(free=GIB)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    failed = [str(row) for row in environment.check_environment("cpu") if row.status == FAIL]
    assert failed[0].startswith("[FAIL] python: 3.9.1; make env PYTHON")
    assert failed[-1] == "[FAIL] disk of the runs: 1 GiB free; free 2 GiB there"


def test_the_matrix_product_can_fail(monkeypatch):
    assert environment.check_matmul("cpu", size=64).status == OK
    assert environment.check_matmul("cpu", size=64, tolerance=1e-12).status == FAIL
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = environment.check_matmul("cuda", size=64)
    assert row.status == FAIL and "no CUDA device" in row.found


def test_peak_memory_is_in_bytes_and_no_less_than_what_is_held():
    held = psutil.Process().memory_info().rss
    assert held <= environment.peak_rss() < 100 * held


def test_progress_goes_where_it_is_sent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for sink, shown in ((str(tmp_path / "log"), ""), ("off", ""), ("", "loop")):
        monkeypatch.setenv("RECRL_PROGRESS", sink)
        assert list(progress.track(iter("abc"), "loop", 3)) == ["a", "b", "c"]
        assert shown in capsys.readouterr().err
    assert (tmp_path / "log").read_text().split()[-1] == "3/3"
