"""The bench itself: what it prints is measured by ``make bench``; here, that one part which cannot run does not hide the others."""

import json
import subprocess
import sys

import pytest

from recrl_lib import memory, paths
from recrl_lib.pipeline import bench
from recrl_lib.pipeline.bench import Row


def test_a_section_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def broken(_):
        raise ValueError("no peer here")

    monkeypatch.setattr(
        bench,
        "SECTIONS",
        {"broken": broken, "fine": lambda _: [Row("speed", "x / s", 6.0, 2.0, "peer")]},
    )
    monkeypatch.setattr(bench, "ELSEWHERE", {"last": lambda: print("last table")})
    assert bench.main(["--json", str(tmp_path / "b.json")]) == 1
    printed = capsys.readouterr().out
    assert (
        "broken: FAILED: ValueError: no peer here" in printed
        and "3.00 x" in printed
        and printed.endswith("last table\n")
    )
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert (row["section"], row["ratio"]) == ("fine", 3.0)
    assert bench.main(["last"]) == 0
    with pytest.raises(SystemExit):
        bench.main(["unknown"])


def test_peak_memory_is_this_programs_own_and_not_that_of_the_one_that_started_it():
    before, held = memory.peak_rss(), bytearray(2**20)
    assert before > 2**24 and memory.peak_rss() >= before and len(held) == 2**20
    child = "from recrl_lib import memory; print(memory.peak_rss())"
    large = f"import subprocess, sys; held = b'x' * 2**29; print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True).stdout)"
    found = subprocess.run(
        [sys.executable, "-c", large], capture_output=True, text=True, cwd=paths.ROOT, check=True
    ).stdout
    assert 2**22 < int(found) < 2**28  # of a parent with 2**29
