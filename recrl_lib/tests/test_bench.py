"""The bench itself: what it prints is measured by ``make bench``; here, that one part which cannot run does not hide the others."""

import json

import pytest

from recrl_lib import bench
from recrl_lib.bench import Row


def test_a_section_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def broken(_):
        raise ValueError("no peer here")

    monkeypatch.setattr(bench, "SECTIONS", {"broken": broken, "fine": lambda _: [Row("speed", "x / s", 6.0, 2.0, "peer")]})
    monkeypatch.setattr(bench, "ELSEWHERE", {"last": lambda: print("last table")})
    assert bench.main(["--json", str(tmp_path / "b.json")]) == 1
    printed = capsys.readouterr().out
    assert "broken: FAILED: ValueError: no peer here" in printed and "3.00 x" in printed and printed.endswith("last table\n")
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert (row["section"], row["ratio"]) == ("fine", 3.0)
    assert bench.main(["last"]) == 0
    with pytest.raises(SystemExit):
        bench.main(["unknown"])
