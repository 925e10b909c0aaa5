"""The table of results: written exactly, read back, and bad rows refused by name."""

import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib import measures, params, runs
from recrl_lib.measures import Result, as_csv, missing, parsed


def test_numbers_come_back_as_they_were(house):
    rows = [
        Result(measure="m", value=0.1 + 0.2, arm="a", against="b", group="new", low=-0.1, n=4),
        Result(measure="m", value=np.float32(0.1), arm="a,\n", seeds=3),
        Result(measure="NA", value=True, passed=True),
        Result(measure="t", value=torch.tensor(2), high=float("nan")),
    ]
    text = as_csv(rows)
    assert text.splitlines()[:2] == [
        "arm,against,group,measure,value,low,high,n,seeds",
        "a,b,new,m,0.30000000000000004,-0.1,,4,",
    ]
    lines = as_csv(rows, audit=True).splitlines()
    assert lines[0].endswith("seeds,passed") and lines[-1].endswith(",") and "1,,,,,1" in lines[-2]
    runs.write_atomic(house.runs / "r" / "metrics" / "data.csv", text)
    table = runs.read_results("r", "data")
    assert runs.value(table, "m", "a", "b", "new") == 0.1 + 0.2
    assert runs.value(table, "m", "a,\n") == float(np.float32(0.1))
    assert runs.value(table, "NA") == 1 and runs.value(table, "t") == 2
    assert table["seeds"][1] == 3 and table["against"][1] == "" and np.isnan(table["low"][1])


def test_one_value_is_taken_or_none():
    table = pd.DataFrame([Result(measure="m", value=1, arm="a").model_dump()] * 2)
    for arm, count in (("a", 2), ("b", 0)):
        with pytest.raises(ValueError, match=f"'arm': '{arm}', .*'measure': 'm'.*{count} results"):
            measures.value(table, "m", arm)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"value": float("nan")}, "value: .*finite"),
        ({}, "value: .*required"),
        ({"value": "much"}, "value: .*number"),
        ({"value": 1, "low": float("inf")}, "low: .*finite"),
        ({"value": 1, "n": 1.5}, "n: .*integer"),
        ({"value": 1, "lo": 0}, "lo: "),
        ({"value": 1, "arm": None}, "arm: .*string"),
    ],
)
def test_bad_rows_are_refused_by_name(row, words):
    with pytest.raises(ValueError, match=f"^result .*'bad'.*{words}") as error:
        parsed({"measure": "bad", **row})
    assert "\n" not in str(error.value)


def test_every_arm_needs_the_measures_of_its_stage():
    needed = [(arm, m) for arm in measures.ARMS for m in measures.REQUIRED_MEASURES["evaluation"]]
    rows = [Result(measure=m, value=0, arm=arm) for arm, m in needed]
    assert missing("evaluation", rows) == [] and missing("environment", []) == []
    assert missing("evaluation", rows[:-1]) == ["finished of shielded"]
    assert missing("data", rows) == ["n_users", "n_items", "n_interactions"]
    both = [Result(measure=m, value=0) for m in measures.REQUIRED_MEASURES["shielded_ppo"]]
    assert missing("shielded_ppo", both) == []  # about the stage as a whole
    assert set(measures.REQUIRED_MEASURES) <= {stage.name for stage in params.STAGES}


@pytest.mark.parametrize("text", [None, "arm,value\n"])
def test_a_missing_or_old_table_names_the_notebook(house, text):
    if text is not None:
        runs.write_atomic(house.runs / "r" / "metrics" / "data.csv", text)
    message = r"data.csv (is missing|lacks against, .*): run noteb.*01_"
    with pytest.raises(RuntimeError, match=message):
        measures.read_results("r", "data")
