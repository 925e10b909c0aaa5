"""Ablations: which runs are compared, and pairing by user and seed."""

import json

import numpy as np
import pandas as pd
import pytest

from recrl_lib import paths, runs
from recrl_lib.evaluation import ablations
from recrl_lib.evaluation.findings import rows_of
from recrl_lib.params import Params
from recrl_lib.runs import write_atomic


def policy(arm, seed=0, shift=0.0, overlap=0.9, items=0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Texts and results of one policy; users of one seed have the same luck in every arm."""
    luck = np.random.default_rng(seed).random(40)
    texts = {"user": np.arange(40), "item": np.arange(40) + items}
    texts |= {"faithfulness": luck + shift, "rank_drop": luck, "quality": luck, "kl": 2.0 + luck}
    results = pd.DataFrame(ablations.OF_RUN, columns=["measure", "against"])
    results = results.assign(group="all", value=0.5).set_index("measure")
    results.loc["top10_overlap", "value"] = overlap
    tables = pd.DataFrame(texts), results.reset_index()
    return tuple(table.assign(arm=arm, seed=seed) for table in tables)


def compare(*found: tuple[pd.DataFrame, pd.DataFrame]) -> pd.DataFrame:
    texts, results = (pd.concat(tables) for tables in zip(*found))
    return ablations.compare(texts, results, 500, np.random.default_rng(0))


def ends(table, measure, arm, against=""):
    return rows_of(table, measure, arm, against).iloc[0][["value", "low", "high"]].tolist()


def test_the_difference_is_paired_by_user():
    """Users differ by far more than arms do: unpaired, a shift of .01 would drown."""
    table = compare(policy("main"), policy("a", shift=0.01))
    assert ends(table, "faithfulness", "a", "main") == pytest.approx([0.01] * 3)
    _, low, high = ends(table, "faithfulness", "a")
    assert high - low > 0.1
    assert all(ends(table, measure, "main", "main") == [0, 0, 0] for measure in ablations.PAIRED)


def test_seeds_are_averaged_and_their_spread_is_told():
    table = compare(
        *(policy("main", seed) for seed in (0, 1)),
        *(policy("a", seed, shift=0.1 + 0.2 * seed) for seed in (0, 1)),
    )
    assert ends(table, "faithfulness", "a", "main")[0] == pytest.approx(0.2)
    row = rows_of(table, "faithfulness", "a").iloc[0]
    assert (row["n"], row["seeds"]) == (80, 2)
    means = sorted(policy("a", s, shift=0.1 + 0.2 * s)[0]["faithfulness"].mean() for s in (0, 1))
    groups = ("lowest_seed", "highest_seed")
    spread = [runs.value(table, "faithfulness", "a", group=group) for group in groups]
    assert spread == pytest.approx(means)


def test_what_does_not_pair_has_no_difference():
    table = compare(policy("main"), policy("other_seed", 1), policy("other_items", items=5))
    for arm in ("other_seed", "other_items"):
        assert rows_of(table, "faithfulness", arm, "main").empty
        assert ends(table, "faithfulness", arm)[0] > 0


def test_rows_are_results_in_the_order_of_the_arms():
    table = compare(policy("b"), policy("no_projection", overlap=0.5), policy("main"))
    assert table["arm"].unique().tolist() == ["main", "no_projection", "b"]
    assert runs.value(table, "top10_overlap", "no_projection") == 0.5
    assert runs.value(table, "ctr_lift", "b", "base") == 0.5
    assert not table.duplicated(["arm", "against", "group", "measure"]).any()


def test_finished_runs_are_collected_and_the_base_run_stands_in_for_main(tmp_path, monkeypatch):
    """The base run ``r`` and runs of its batch: one of them ``main`` at another seed, one stale."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    monkeypatch.setattr(runs, "up_to_date", lambda stage, params: params.run != "r-b-stale-seed0")
    seeds = {"r": 0, "r-b-kl0-seed0": 0, "r-b-main-seed1": 1, "r-b-stale-seed0": 0}
    for run, seed in seeds.items():
        runs.write_params(Params(run=run, seed=seed))
        texts = pd.DataFrame({"arm": ["shielded", "unshielded", "base"], "user": 1, "item": 1})
        texts = texts.assign(reward=9.0, quality=0.1, kl=1.0, reward_length=1.0)
        texts = texts.assign(reward_relevance=0.5, reward_coherence=0.0)
        rows = [(arm, *key, 0.5) for arm in ("shielded", "unshielded") for key in ablations.OF_RUN]
        table = pd.DataFrame(rows, columns=["arm", "measure", "against", "value"])
        table = table.assign(group="all", **dict.fromkeys(("low", "high", "n", "seeds")))
        folder = tmp_path / run
        for name in ("artifacts", "metrics"):
            (folder / name).mkdir()
        texts.to_parquet(folder / "artifacts" / "explanations.parquet")
        table.to_csv(folder / "metrics" / "evaluation.csv", index=False)
    write_atomic(tmp_path / "r-b-odd-seed0" / "metrics" / "evaluation.csv", "")  # of no parameters
    texts, results, left_out = ablations.collect(Params(run="r", batch="b"))
    expected = [("r", "main", 0), ("r", "no_projection", 0), ("r-b-kl0-seed0", "kl0", 0)]
    expected += [("r-b-main-seed1", arm, 1) for arm in ("main", "no_projection")]
    for table in (texts, results):
        assert sorted(set(zip(table["run"], table["arm"], table["seed"]))) == expected
    assert left_out == ["r-b-odd-seed0", "r-b-stale-seed0"]


def shielded_run(tmp_path, run, seed, kept, reward=1.0):
    """The artifacts of a run with six users, whose shield keeps ``kept`` of gains and places."""
    folder = tmp_path / run / "artifacts"
    folder.mkdir(parents=True)
    users, gain = np.arange(6), np.array([0.2, 0.4, 0.6, 0.4, 0.2, 0.6]) + 0.1 * seed
    tables = {"explanations": [], "ranking": [], "top10": []}
    for arm, share in (("base", 0.0), ("unshielded", 1.0), ("shielded", kept)):
        one = pd.DataFrame({"user": users, "arm": arm, "new_item": users < 2})
        gains = {"faithfulness": 0.1 + share * gain, "reward": reward * share * gain}
        places = {"overlap": 1 - share, "top1_same": 1.0, "ndcg": -0.1 * share}
        item = {"base": 2, "unshielded": 9}.get(arm, np.where(users < 4, 2, 9))
        for table, values in zip(tables.values(), (gains, places, {"item": item})):
            table.append(one.assign(**values))
    for name, parts in tables.items():
        pd.concat(parts).to_parquet(folder / f"{name}.parquet")
    (folder / "held_out_items.json").write_text(json.dumps([2, 9]))


def test_the_price_is_a_share_of_the_same_runs_unshielded_gain(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    chosen = [("a0", "a", 0), ("a1", "a", 1), ("b0", "b", 0)]
    for run, arm, seed in chosen:
        signs = np.array([1, -1] * 3)  # a gain in reward that is none
        shielded_run(tmp_path, run, seed, {"a": 0.75, "b": 0.25}[arm], signs)
    table = ablations.price(chosen, 500, np.random.default_rng(0))
    for arm, share in (("a", 0.75), ("b", 0.25), ("unshielded", 1.0)):
        for group, users in (("all", 6), ("new_items", 2)):
            kept = rows_of(table, "faithfulness_kept", arm, "unshielded", group).iloc[0]
            assert kept[["value", "low", "high"]].tolist() == pytest.approx([share] * 3)
            assert kept["n"] == users * kept["seeds"] == users * (1 if arm == "b" else 2)
        assert ends(table, "top10_overlap", arm, "base")[0] == pytest.approx(1 - share)
        assert ends(table, "ndcg@10", arm, "base")[0] == pytest.approx(-0.1 * share)
        held = rows_of(table, "top10_overlap", arm, "base", "held_out_items")["value"].item()
        assert held == pytest.approx(0 if arm == "unshielded" else 4 / 6)
    assert rows_of(table, "reward_kept", "a", "unshielded").empty  # a share of nothing
