"""The environment check: each row can fail, and says what to do."""

import shutil

import pytest
import torch

from recrl_lib import environment, provenance
from recrl_lib.environment import FAIL, GIB, OK, WARN


def test_the_table_has_a_row_per_check_and_a_remedy_for_all_that_is_not_ok():
    table = environment.check_environment("cpu")
    assert list(table.columns) == ["check", "found", "needed", "ok", "remedy"]
    assert {
        "python",
        "packages",
        "CPU cores",
        "memory, free",
        "disk, runs",
        "GPU",
        "git",
        "matmul",
    } <= set(table.check)
    assert ((table.ok == OK) == (table.remedy == "")).all()


def test_pins_come_from_the_one_list():
    pins = environment.pinned_packages()
    assert pins["papermill"] == "2.7.0" and pins["torch"].startswith("2.")
    assert not any(name.startswith("-") for name in pins)


def test_packages_are_compared_with_their_pins():
    numpy = provenance.package_version("numpy")
    summary, *bad = environment.check_packages(
        {"numpy": numpy, "pandas": "0.1", "no-such-package": "1", "pytest": None}
    )
    assert summary.found == "2 of 4 as pinned"
    assert [(row.check, row.ok) for row in bad] == [("pandas", WARN), ("no-such-package", FAIL)]
    assert all("make env" in row.remedy for row in bad)


@pytest.mark.parametrize(
    "version, ok",
    [("2.10.2", FAIL), ("2.11.0+cu128", OK), ("2.13.1", OK), ("2.14.0", FAIL), ("3.0", FAIL)],
)
def test_a_range_of_torch_is_accepted(monkeypatch, version, ok):
    monkeypatch.setattr(provenance, "package_version", lambda name: version)
    rows = environment.check_packages({"torch": "2.13.0"})
    assert [row.ok for row in rows[1:]] == ([] if ok == OK else [FAIL])


def test_an_old_python_and_a_full_disk_fail(monkeypatch):
    monkeypatch.setattr(environment.platform, "python_version_tuple", lambda: ("3", "9", "1"))
    assert environment.check_python().ok == FAIL
    usage = shutil.disk_usage("/")._replace(free=GIB)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    rows = environment.check_disk()
    assert [row.ok for row in rows] == [FAIL, FAIL] and "RECRL_HOME" in rows[0].remedy


def test_matmul_error_and_its_limit(monkeypatch):
    a = torch.eye(4) * 3
    assert environment._matmul_error(a, a, torch.device("cpu")) == 0.0
    assert environment.check_matmul("cpu", size=64).ok == OK
    assert environment.check_matmul("cpu", size=64, tolerance=1e-12).ok == FAIL
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = environment.check_matmul("cuda", size=64)
    assert row.ok == FAIL and "no CUDA device" in row.found
