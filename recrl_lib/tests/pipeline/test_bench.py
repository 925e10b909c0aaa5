"""What ``make bench`` makes of two measurements."""

import json

import pandas as pd

from recrl_lib import paths
from recrl_lib.pipeline import bench


def test_the_table_compares_ours_with_theirs(monkeypatch, tmp_path, capsys):
    def last_line(*command):
        ours = {"cpu_seconds": bench.EPISODES / 4, "peak_gb": 1.0}
        theirs = {"cpu_seconds": bench.EPISODES / 2, "peak_gb": 4.0}
        return json.dumps(theirs if command[-1].endswith("bench_trl") else ours)

    monkeypatch.setattr(bench, "last_line", last_line)
    monkeypatch.setattr(bench, "peer_environment", lambda folder: "python")
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    bench.main()
    table = pd.read_csv(tmp_path / "bench" / "bench.csv").fillna("")
    assert table[["against", "value"]].to_numpy().tolist() == [
        ["", 4.0], ["trl_1.12", 2.0], ["trl_1.12", 0.25],
    ]  # fmt: skip
    assert "episodes/s" in capsys.readouterr().out
