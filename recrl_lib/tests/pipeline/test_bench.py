"""That ``make bench`` keeps what it could measure."""

import pandas as pd

from recrl_lib import paths
from recrl_lib.pipeline import bench


def test_a_section_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    sections = {"broken": lambda _: 1 / 0, "fine": lambda _: [bench.Row("speed", "peer", 3.0)]}
    monkeypatch.setattr(bench, "SECTIONS", sections)
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    assert bench.main([]) == 1
    assert "broken: FAILED: ZeroDivisionError" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "bench" / "bench.csv")
    assert table.to_numpy().tolist() == [["speed", "peer", 3.0, "ratio"]]
