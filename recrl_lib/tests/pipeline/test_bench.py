"""That ``make bench`` keeps what it could measure."""

import pandas as pd
import pytest

from recrl_lib import paths
from recrl_lib.pipeline import bench
from recrl_lib.pipeline.bench import Row


def test_a_section_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def broken(_):
        raise ValueError("no peer here")

    def fine(_):
        yield Row("speed", "peer", 3.0)

    monkeypatch.setattr(bench, "SECTIONS", {"broken": broken, "fine": fine})
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    assert bench.main([]) == 1
    assert "broken: FAILED: ValueError: no peer here" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "bench" / "bench.csv")
    assert table.to_dict("records") == [
        {"work": "speed", "against": "peer", "value": 3.0, "unit": "ratio"}
    ]
    with pytest.raises(SystemExit):
        bench.main(["unknown"])
