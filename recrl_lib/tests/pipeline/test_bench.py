"""What ``make bench`` makes of two measurements."""

import json

import pandas as pd

from recrl_lib import paths
from recrl_lib.pipeline import bench


def test_the_table_compares_ours_with_theirs(monkeypatch, tmp_path, capsys):
    def last_line(*command):
        own = {"flops": 6e9, "rate": 1e9, "shield": 0.01}  # of 12 CPU-seconds
        ours = {"cpu_seconds": 12.0, "peak_gb": 1.0} | own
        theirs = {"cpu_seconds": 120.0, "peak_gb": 4.0}
        return json.dumps(theirs if command[-1].endswith("bench_trl") else ours)

    monkeypatch.setattr(bench, "last_line", last_line)
    monkeypatch.setattr(bench, "peer_environment", lambda folder: "python")
    first = json.dumps({"cpu_seconds": 36.0, "peak_gb": 2.0})
    monkeypatch.setattr(bench, "first_edition", lambda folder: first)
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    bench.main()
    table = pd.read_csv(tmp_path / "bench" / "bench.csv").fillna("")
    ratios = table[table["against"] != ""].set_index(["work", "against"])["value"]
    assert ratios.to_dict() == {
        ("ppo_episodes_per_cpu_second", "trl_1.12"): 10.0,
        ("ppo_episodes_per_cpu_second", "first_edition"): 3.0,
        ("ppo_peak_memory", "trl_1.12"): 0.25,
        ("ppo_step_flops", "gemm_bound"): 0.5,
        ("shield_seconds", "ppo_step"): 0.01,
    }
    assert "episodes/s" in capsys.readouterr().out
