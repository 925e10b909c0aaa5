import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib.data.splits import Split
from recrl_lib.params import Params
from recrl_lib.pipeline import bench_ranker
from recrl_lib.ranker import baselines, metrics, ranking, training


def test_the_table_of_seeds(monkeypatch):
    """On 30 users who walk round 12 items: means are of the rows above, differences from EASE^R as ranked here."""
    monkeypatch.setenv("RECRL_PROGRESS", "off")
    rng = np.random.default_rng(0)
    walks = [(rng.integers(12) + np.arange(6)) % 12 + 1 for _ in range(30)]
    split = Split(
        [w[:-2] for w in walks], np.array([w[-2] for w in walks]), np.array([w[-1] for w in walks])
    )
    params = Params(ranker_dim=8, ranker_layers=1, ranker_max_len=6, ranker_epochs=2)
    text = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(bench_ranker, "_laptop", lambda: (params, split, 12, text))
    table = bench_ranker.seeds(2)
    assert table["text"].tolist() == ["llm"] * 3 + ["none"] * 3 + ["ease", "ease_chain"]
    assert table["seed"].tolist()[:6] == [0, 1, "mean of 2"] * 2
    history = split.with_valid
    rivals = {"ease": baselines.ease_chunks, "ease_chain": baselines.ease_chain_chunks}
    for n, (name, chunks) in enumerate(rivals.items()):
        rival = metrics.ndcg_at(
            ranking.ranks_of(chunks(split.train, 12, history), history, split.test), 10
        ).mean()
        rows = table.iloc[:6]
        assert table["ndcg@10"].iloc[6 + n] == pytest.approx(rival)
        np.testing.assert_allclose(rows[f"over_{name}"], rows["ndcg@10"] - rival, atol=1e-12)
        assert (rows[f"over_{name}_lo"] <= rows[f"over_{name}"]).all() and (
            rows[f"over_{name}"] <= rows[f"over_{name}_hi"]
        ).all()
    difference = (
        table["ndcg@10"].to_numpy()[:3] - table["ndcg@10"].to_numpy()[3:6]
    )  # with text less without, seed by seed and of the means
    np.testing.assert_allclose(table["over_plain"][:3], difference, atol=1e-12)
    assert table["over_plain"][3:].isna().all()
    for arm in ("llm", "none"):
        rows = table[table["text"] == arm]
        numbers = rows[
            ["ndcg@10", "hr@10", "mrr@10", "over_ease", "valid_ndcg@10", "best_epoch"]
        ].astype(float)
        pd.testing.assert_series_equal(numbers.iloc[:2].mean(), numbers.iloc[2], check_names=False)
    model, _ = training.fit(params, split, 12, text, seed=1)
    expected = metrics.ndcg_at(ranking.target_ranks(model, history, split.test, text), 10).mean()
    assert table["ndcg@10"][1] == pytest.approx(expected)
