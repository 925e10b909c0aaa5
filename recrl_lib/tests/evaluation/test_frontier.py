"""The frontier on a tiny random model: its signal, its measures, and its going on after a stop."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib.evaluation import frontier, supervised
from recrl_lib.evaluation.frontier import Point, run_point
from recrl_lib.explainer import sampling
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.shield import GramMatrices, protect, subspaces
from recrl_lib.tests.evaluation.toy import toy_study


@pytest.fixture
def shared():
    study, explainer = toy_study()
    items = ItemTexts(explainer, study.items["text"].tolist())
    held = {2, 5, 9, 11, 28}
    seen = set(range(1, items.n_items + 1)) - held
    taught = supervised.Demonstrations(explainer, study.training_records()[:12])
    grams = GramMatrices(subspaces.item_grams(explainer, items, seen)[0], taught.grams())
    asked = study.heldout_records(5, np.random.default_rng(1))
    asked = supervised.Demonstrations(explainer, asked)
    return frontier.Comparison(explainer, study, items, held, grams, taught, asked)


def test_loss_and_grams_are_those_of_whole_sequences_whatever_the_padding(shared):
    taught, explainer = shared.taught, shared.explainer
    logps, states = [], []
    for ids, labels in zip(taught.ids, taught.labels):
        answer = (labels != -100).nonzero()[:, 0]
        logp = explainer.lm(ids[None]).logits.log_softmax(-1)[0].detach()
        logps += logp[answer - 1, ids[answer]].tolist()
        mask = torch.ones(1, len(ids))
        states.append((explainer.trunk(ids[None], mask), mask))
    assert taught.mean_loss() == pytest.approx(-np.mean(logps), rel=1e-4)
    whole, _ = subspaces.state_grams(explainer, states)
    for name, gram in taught.grams().items():
        torch.testing.assert_close(gram, whole[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mode", ["none", "gradient", "update", "frozen_a", "restart"])
def test_modes_learn_and_their_leak_is_what_they_promise(mode, shared):
    row = run_point(shared, Point(mode, rank=8, steps=10))
    assert row["loss"] < row["loss_base"]
    assert (row["leak"] <= 1e-6) == (mode not in ("none", "gradient"))
    spaces = {} if mode == "none" else protect(shared.grams, rank=8)
    inside = [s.holds(shared.grams.prompts[name]) for name, s in spaces.items()] or [0]
    assert row["explanations_inside"] == pytest.approx(np.mean(inside))
    assert row["rank_mean"] == (8 if spaces else 0)


def test_penalty_replay_and_map_move_less_than_no_shield(shared):
    free = run_point(shared, Point("none", steps=10))
    pulled = run_point(shared, Point("penalty", penalty=1000.0, steps=10))
    mapped = run_point(shared, Point("align", steps=10))
    assert free["leak"] > 0.1 and pulled["item_change_held"] < free["item_change_held"]
    assert mapped["loss"] == free["loss"] and mapped["item_change_seen"] < free["item_change_seen"]
    point = Point("update", rank=8, steps=10, penalty=10.0)
    before, after = run_point(shared, point), run_point(shared, replace(point, replay_steps=20))
    assert after["item_change_seen"] < before["item_change_seen"] and after["leak"] <= 1e-6


def test_the_linear_map_undoes_a_linear_drift_and_noise_does_not_mislead_it():
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    old = torch.cat([torch.zeros(1, 8), random(200, 8)])
    drift = old @ (torch.eye(8) + 0.2 * random(8, 8)) + 0.3
    noise = old + torch.cat([torch.zeros(1, 8), random(200, 8)])
    fitted, held = np.arange(1, 101), np.arange(101, 201)
    for new, left in ((drift, 0.01), (noise, 0.9)):
        back = supervised.aligned(new, old, fitted, rng)
        assert (back[held] - old[held]).norm() < left * (new[held] - old[held]).norm()
        assert back[0].abs().max() == 0


def test_activated_lora_learns_and_moves_no_item_at_all(shared):
    row = run_point(shared, Point("alora", steps=10))
    assert row["loss"] < row["loss_base"]
    assert row["max_abs_score_delta"] == 0 and row["exact"] == 1 and row["item_change_held"] == 0
    assert all("alora" not in name for name, _ in shared.explainer.lm.named_parameters())
    # it acts from the turn header on
    explainer, asked = shared.explainer, shared.asked
    with supervised.activated_lora(explainer), torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in explainer.adapter_parameters():
            parameter.normal_(generator=generator)
        found = asked.greedy()
        for prompt, text in zip(asked.prompts[:2], found):
            said: list[int] = []
            while len(said) < supervised.TEXT_TOKENS and explainer.eos_id not in said:
                logits = explainer.peft(torch.tensor([prompt + said])).logits
                said.append(int(logits[0, -1].argmax()))
            assert text == sampling.decode(explainer, torch.tensor(said))
        ids = next(ids for _, ids in shared.items.batches)
        tuned = explainer.peft(ids).logits
        with explainer.reference():
            assert torch.equal(tuned, explainer.lm(ids).logits)  # an item text has no header
            assert found != asked.greedy()


def test_a_stopped_frontier_goes_on_and_stale_rows_are_run_again(shared, tmp_path):
    points = [Point("none", steps=1), Point(rank=4, steps=1), Point(rank=4, steps=1, seed=1)]
    path = tmp_path / "frontier.csv"
    first = frontier.sweep(shared, points[1:2], path, "k")
    every = frontier.sweep(shared, points, path, "k")
    seconds = "train_cpu_seconds"  # of another run they would differ
    assert every[["mode", "seed"]].values.tolist() == [["none", 0], ["update", 0], ["update", 1]]
    assert every["loss"].nunique() == 3 and every["loss_base"].nunique() == 1
    assert every[seconds].iloc[1] == first[seconds].iloc[0] and len(pd.read_csv(path)) == 3
    again = frontier.sweep(shared, points[1:2], path, "another")
    assert len(pd.read_csv(path)) == 1 and again[seconds].iloc[0] != first[seconds].iloc[0]


def test_named_sets_are_distinct_and_complete():
    full = frontier.named("full", 2, 20)
    assert len(set(full)) == len(full) and frontier.named("none", 3, 20) == []
    assert {p.mode for p in full} == set(frontier.MODES)
    assert {p.basis for p in full} == set(subspaces.BASES)
    half = len(full) // 2
    assert [replace(p, seed=1) for p in full[:half]] == full[half:]
    assert set(frontier.named("small", 1, 20)) <= set(full)
    assert min(p.steps for p in frontier.named("full", 1, 2)) == 1
    with pytest.raises(ValueError, match="frontier_points='huge'"):
        frontier.named("huge", 1, 1)
    for wrong in ({"mode": "nothing"}, {"replay_steps": 2}, {"mode": "none", "replay_steps": 2}):
        with pytest.raises(ValueError, match="frontier: (mode|replay_steps)"):
            Point(**wrong)


def test_summary_by_hand():
    shown = [  # mode, steps, seed, loss, reward, overlap
        ("none", 20, 0, 1.0, 0.9, 0.1),
        ("none", 20, 1, 1.5, 0.7, 0.3),
        ("none", 5, 0, 1.5, 0.9, 0.6),
        ("none", 5, 1, 1.75, 0.7, 0.6),
        ("update", 20, 0, 1.2, 0.7, 0.9),
        ("update", 20, 1, 1.5, 0.8, 1.0),
    ]
    names = ["mode", "steps", "seed", "loss", "reward", "overlap"]
    rows = [asdict(Point()) | {"curve": "c"} | dict(zip(names, row)) for row in shown]
    table = pd.DataFrame(rows).assign(loss_base=2.0, reward_base=0.5, set_same=1.0, top1_same=1.0)
    free, early, shielded = frontier.summarise(table).to_dict("records")
    shares = [free[name] for name in ("gain_loss", "gain_reward", "seeds")]
    assert shares == pytest.approx([1, 1, 2])
    assert early["gain_loss"] == pytest.approx(0.5) and early["stopped_early"] == pytest.approx(0.6)
    expected = {"gain_reward": 1.0, "gain_reward_lo": 0.5, "gain_reward_hi": 1.5, "overlap": 0.95}
    expected |= {"overlap_lo": 0.9, "overlap_hi": 1.0, "gain_loss": (0.8 + 1.0) / 2}
    expected |= {"stopped_early": 0.6 - 0.8 * (0.6 - 0.2)}
    assert {name: shielded[name] for name in expected} == pytest.approx(expected)


def test_the_published_rows_are_whole():
    rows = frontier.published()
    ran = {tuple(map(str, row)) for row in rows[frontier.SETTING].itertuples(index=False)}
    for point in frontier.named("full", 3, 16):
        assert tuple(map(str, asdict(point).values())) in ran
    assert frontier.summarise(rows)["seeds"].sum() == len(rows)
    settled = frontier.published("settle").query("penalty == 1000")
    assert all(settled[name].is_monotonic_increasing for name in ("replay_steps", "overlap"))
