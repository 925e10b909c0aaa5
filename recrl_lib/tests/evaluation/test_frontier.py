"""The frontier on a tiny random model: its signal, its measures, activated LoRA, and its going on after a stop."""

import os
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib.evaluation import frontier
from recrl_lib.explainer import sampling
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.params import resolve
from recrl_lib.ranker import ranking
from recrl_lib.shield import subspaces
from recrl_lib.shield.replay import replay_for
from recrl_lib.tests.evaluation.test_results import world  # noqa: F401  (a fixture)


@pytest.fixture
def lab(world):  # noqa: F811
    study, explainer = world
    items = ItemTexts(explainer, study.items["text"].tolist())
    held = {2, 5, 9, 11, 28}
    seen = set(range(1, items.n_items + 1)) - held
    taught = frontier.lesson(explainer, study.training_records()[:12])
    grams, _ = subspaces.item_grams(explainer, items, seen)
    evidence = frontier.gather(
        explainer,
        study,
        items,
        seen,
        grams,
        taught,
        set(subspaces.BASES),
        np.random.default_rng(0),
        0,
    )
    return frontier.prepare(
        explainer,
        study,
        items,
        held,
        evidence,
        taught,
        study.heldout_records(5, np.random.default_rng(1)),
    )


def test_answer_loss_is_the_mean_over_answer_tokens_whatever_the_padding(lab):
    rows = [0, 3, 5]
    together = float(
        frontier.answer_loss(
            lab.explainer, lab.taught.batch(rows, lab.explainer.pad_id, "cpu")
        ).detach()
    )
    total = count = 0.0
    for r in rows:
        ids, n = lab.taught.ids[r], lab.taught.answers[r]
        logp = lab.explainer.lm(torch.tensor([ids])).logits.log_softmax(-1)[0]
        total -= sum(float(logp[t - 1, ids[t]].detach()) for t in range(len(ids) - n, len(ids)))
        count += n
    assert together == pytest.approx(total / count, rel=1e-4)


def test_lesson_grams_are_those_of_the_whole_sequences(lab):
    found = frontier.lesson_grams(lab.explainer, lab.taught, batch=5)
    expected, _ = subspaces.prompt_grams(lab.explainer, lab.taught.ids)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-5)


def test_equal_points_give_equal_rows_and_seeds_differ(lab):
    point = frontier.Point(rank=8, steps=3)
    first, again = (
        {k: v for k, v in frontier.run_point(lab, point).items() if "seconds" not in k}
        for _ in range(2)
    )
    assert first == again
    other = frontier.run_point(lab, frontier.Point(rank=8, steps=3, seed=1))
    assert other["loss"] != first["loss"] and other["loss_base"] == first["loss_base"]


def test_no_steps_move_nothing(lab):
    row = frontier.run_point(lab, frontier.Point("none", steps=0))
    assert row["loss"] == pytest.approx(row["loss_base"]) and row["reward"] == row["reward_base"]
    assert (
        row["overlap"] == 1
        and row["max_abs_score_delta"] == 0
        and row["item_change_held"] == 0
        and row["ndcg_change"] == 0
    )


@pytest.mark.parametrize(
    "mode", [m for m in frontier.MODES if m not in ("none", "align", "penalty", "alora")]
)
def test_modes_learn_and_their_leak_is_what_they_promise(mode, lab):
    row = frontier.run_point(lab, frontier.Point(mode, rank=8, steps=10))
    assert row["loss"] < row["loss_base"]
    assert (row["leak"] <= 1e-6) == (mode != "gradient")


def test_a_row_says_how_much_of_either_energy_its_directions_hold(lab):
    point = frontier.Point(basis="contrastive", rank=8, steps=1)
    row, protected = (
        frontier.run_point(lab, point),
        subspaces.protect(lab.evidence, "contrastive", 0.99, 8),
    )
    assert row["items_inside"] == pytest.approx(np.mean([s.energy for s in protected.values()]))
    assert row["explanations_inside"] == pytest.approx(
        np.mean([s.holds(lab.evidence.prompts[n]) for n, s in protected.items()])
    )
    assert 0 < row["explanations_inside"] < row["items_inside"] < 1 and row["rank_mean"] == 8
    free = frontier.run_point(lab, frontier.Point("none", steps=1))
    assert free["items_inside"] == free["explanations_inside"] == free["rank_mean"] == 0


def test_a_penalty_moves_less_than_none_and_a_map_leaves_held_out_items_in_place(lab):
    free = frontier.run_point(lab, frontier.Point("none", steps=10))
    pulled = frontier.run_point(lab, frontier.Point("penalty", penalty=1000.0, steps=10))
    assert pulled["item_change_held"] < free["item_change_held"] and free["leak"] > 0.1
    mapped = frontier.run_point(lab, frontier.Point("align", steps=10))
    assert mapped["loss"] == free["loss"] and mapped["item_change_seen"] < free["item_change_seen"]


def test_a_settled_point_starts_from_the_same_training_and_moves_less(lab):
    point = frontier.Point("update", rank=8, steps=10, penalty=10.0)
    before, after = (
        frontier.run_point(lab, point),
        frontier.run_point(lab, replace(point, settle=20)),
    )
    assert after["item_change_seen"] < before["item_change_seen"] and after["leak"] <= 1e-6
    assert after["curve"].endswith("with replay, settled")
    for wrong in (replace(point, penalty=0.0), replace(point, mode="none")):
        with pytest.raises(ValueError, match="settle=20"):
            frontier.run_point(lab, replace(wrong, settle=20))


def test_items_around_the_tenth_place_by_hand_sorting(lab):
    study = lab.study
    items, users = frontier.around_tenth(study, lab.seen)
    expected = set()
    scores = torch.cat(
        [s for _, s in ranking.score_chunks(study.ranker, study.split.with_valid, study.text)]
    )
    for user, history in enumerate(study.split.with_valid):
        ranked = [
            i
            for i in scores[user].argsort(descending=True, stable=True).tolist()
            if i and i not in set(history)
        ]
        expected |= {(i, user) for i in ranked[5:15] if i in lab.seen}
    assert set(zip(items.tolist(), users.tolist())) == expected and len(items) == len(expected)


def test_probes_are_states_of_paired_users_and_the_oftener_paired_come_sooner(lab):
    states = frontier.user_states(lab.study)
    pairs = (np.array([7] * 60 + [3, 4, 8]), np.array([*[0, 1, 2] * 20, 3, 4, 5]))
    allowed = {7: {0, 1, 2}, 3: {3}, 4: {4}, 8: {5}}
    firsts, users_of_7 = [], set()
    for seed in range(40):
        found = frontier.probes(lab.study, pairs, np.random.default_rng(seed), n=2)
        assert len(found) == 2
        for item, state in found.items():
            whose = {u for u in allowed[item] if torch.equal(states[u], state)}
            assert len(whose) == 1
            users_of_7 |= whose if item == 7 else set()
        firsts.append(7 in found)
    assert sum(firsts) >= 38 and users_of_7 == {0, 1, 2}


def test_a_refreshed_basis_is_sealed_and_trains_otherwise(lab):
    point = frontier.Point(rank=8, steps=6)
    fixed, fresh = (
        frontier.run_point(lab, point),
        frontier.run_point(lab, replace(point, refresh=2)),
    )
    assert (
        fresh["leak"] <= 1e-6
        and fresh["loss"] < fresh["loss_base"]
        and fresh["loss"] != fixed["loss"]
    )


def test_a_replay_of_the_boundary_reads_each_item_as_often_as_users_have_it_there_and_once_more(
    lab,
):
    point = frontier.Point(rank=8, steps=2, penalty=10.0, replay="boundary")
    items, _ = frontier.around_tenth(lab.study, lab.seen)
    found = torch.cat(frontier.replay_of(lab, point)._often)
    assert (
        len(found) == len(lab.seen)
        and float(found.sum()) == len(items) + len(lab.seen)
        and found.max() > 2
    )
    assert (torch.cat(frontier.replay_of(lab, replace(point, replay="all"))._often) == 1).all()
    assert (
        frontier.run_point(lab, point)["curve"]
        == "update, activation 0.99, with replay, of the boundary"
    )


def test_few_inputs_are_the_most_sensitive_and_the_rest_is_free(lab):
    protected = subspaces.protect(lab.evidence, "activation", 0.9)
    found = frontier.most_sensitive(protected, lab.evidence.sensitivity, 1)
    traces = {name: float(gram.trace()) for name, gram in lab.evidence.sensitivity.items()}
    assert [name for name, s in found.items() if s.rank] == [max(traces, key=traces.get)]
    row = frontier.run_point(lab, frontier.Point(rank=8, steps=6, inputs=1))
    assert (
        row["leak"] <= 1e-6
        and row["loss"] < row["loss_base"]
        and row["item_change_seen"]
        > frontier.run_point(lab, frontier.Point(rank=8, steps=6))["item_change_seen"]
    )


@pytest.mark.parametrize("wrong", [dict(mode="none", refresh=2), dict(replay="some", penalty=1.0)])
def test_points_that_make_no_sense_are_refused(wrong, lab):
    with pytest.raises(ValueError, match="frontier: re"):
        frontier.run_point(lab, frontier.Point(steps=1, **wrong))
    with pytest.raises(ValueError, match="inputs=1 needs"):
        frontier.run_point(
            replace(lab, evidence=replace(lab.evidence, sensitivity=None)),
            frontier.Point(steps=1, inputs=1),
        )


def test_activated_lora_learns_and_moves_no_item_at_all(lab):
    row = frontier.run_point(lab, frontier.Point("alora", steps=10))
    assert row["loss"] < row["loss_base"]
    assert row["max_abs_score_delta"] == 0 and row["exact"] == 1 and row["item_change_held"] == 0
    frontier.restart_adapters(lab.explainer, 0)
    before = lab.items.vectors()  # outside, the same layers are plain LoRA again
    with torch.no_grad():
        for p in lab.explainer.adapter_parameters():
            p.add_(0.1)
    assert (lab.items.vectors() - before).abs().max() > 1e-3


def test_greedy_texts_of_activated_lora_are_those_of_whole_forwards(lab):
    explainer, prompts = (
        lab.explainer,
        [prompt_ids(lab.explainer, messages(r)) for r in lab.records],
    )
    frontier.restart_adapters(explainer, 0)
    with torch.no_grad():
        for name, p in explainer.lm.named_parameters():
            if "lora_B" in name:
                p.normal_(std=5.0, generator=torch.Generator().manual_seed(1))
    plain = sampling.sample(explainer, prompts, 1, frontier.TEXT_TOKENS, 1.0, None).texts
    with frontier.activated(explainer) as invoke, torch.no_grad():
        found = frontier.greedy_activated(explainer, prompts, invoke)
        for prompt, text in zip(prompts, found):
            said: list[int] = []
            while len(said) < frontier.TEXT_TOKENS and explainer.eos_id not in said:
                invoke(len(said))  # every token after the header, and none before it
                ids = torch.tensor([prompt + said])
                hidden = explainer.top(
                    explainer.trunk(ids, torch.ones_like(ids)), torch.ones_like(ids)
                )[:, -1]
                said.append(int(explainer.log_softmax(hidden, 1.0).argmax()))
            assert text == sampling.decode(explainer, torch.tensor(said))
    assert found != plain  # which heard the whole prompt


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(
    sys.platform != "linux", reason="points run side by side where processes can be forked safely"
)
def test_points_side_by_side_give_the_rows_of_one_after_the_other(
    lab, one_thread, monkeypatch, tmp_path
):
    points = [
        frontier.Point("none", steps=2),
        frontier.Point(rank=4, steps=2),
        frontier.Point("alora", steps=2),
    ]

    def rows(cores: int) -> pd.DataFrame:
        monkeypatch.setattr(frontier, "cores", lambda: cores)
        return frontier.sweep(lab, points, tmp_path / f"{cores}.csv", "k").drop(
            columns="train_cpu_seconds"
        )

    pd.testing.assert_frame_equal(rows(2), rows(1), check_exact=True)
    assert rows(2)["mode"].tolist() == [
        "none",
        "update",
        "alora",
    ]  # read back, in the order asked for
    monkeypatch.setattr(frontier, "cores", lambda: 2)
    with pytest.raises(ValueError, match="frontier: mode 'nothing'"):
        list(frontier.run_points(lab, [frontier.Point("nothing"), *points]))


def test_a_job_of_a_batch_leaves_the_cores_to_its_like(monkeypatch):
    monkeypatch.delenv("RECRL_BATCH", raising=False)
    if sys.platform == "linux":
        assert frontier.cores() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("RECRL_BATCH", "ablations")
    assert frontier.cores() == 1


def test_a_stopped_frontier_goes_on_and_stale_rows_are_run_again(lab, tmp_path, monkeypatch):
    points = [frontier.Point("none", steps=1), frontier.Point(rank=4, steps=1)]
    path = tmp_path / "frontier.csv"
    ran = []
    whole = frontier.run_points
    monkeypatch.setattr(
        frontier, "run_points", lambda lab, points: ran.extend(points) or whole(lab, points)
    )
    first = frontier.sweep(lab, points[:1], path, "k")
    both = frontier.sweep(lab, points, path, "k")
    assert ran == points and len(first) == 1 and len(both) == 2
    assert both["loss"].tolist() == pd.read_csv(path)["loss"].tolist()
    frontier.sweep(lab, points[:1], path, "another")
    assert ran == [*points, points[0]] and len(pd.read_csv(path)) == 1


def test_the_runs_replay_is_the_one_its_parameters_ask_for(lab):
    params = resolve("smoke", shield_penalty=10.0)
    replay = replay_for(lab.explainer, lab.study, params, lab.held)
    assert replay.weight == 10.0 and sum(
        len(states) for states, _ in replay._parts
    ) == lab.items.n_items - len(lab.held)
    assert replay_for(lab.explainer, lab.study, resolve("smoke"), lab.held) is None
    with pytest.raises(ValueError, match="text='none'"):
        replay_for(lab.explainer, replace(lab.study, text=None), params, lab.held)


def test_named_sets_are_distinct_and_complete():
    full = frontier.named("full", 2, 20)
    assert len(set(full)) == len(full) and frontier.named("none", 3, 20) == []
    assert {p.mode for p in full} == set(frontier.MODES) and {p.basis for p in full} == set(
        subspaces.BASES
    )
    half = len(full) // 2
    assert [asdict(p) | {"seed": 1} for p in full[:half]] == [asdict(p) for p in full[half:]]
    assert (
        set(frontier.named("small", 1, 20)) <= set(full)
        and min(p.steps for p in frontier.named("full", 1, 2)) == 1
    )
    with pytest.raises(ValueError, match="frontier_points='huge'"):
        frontier.named("huge", 1, 1)


def test_summary_by_hand():
    setting = asdict(frontier.Point("none")) | {"curve": "no shield"}
    columns = dict(setting, loss_base=2.0, reward_base=0.5, key="k")
    measures = dict(set_same=1.0, top1_same=1.0)
    table = pd.DataFrame(
        [
            {
                **columns,
                **measures,
                "steps": 20,
                "seed": 0,
                "loss": 1.0,
                "reward": 0.9,
                "overlap": 0.1,
            },
            {
                **columns,
                **measures,
                "steps": 20,
                "seed": 1,
                "loss": 1.5,
                "reward": 0.7,
                "overlap": 0.3,
            },
            {
                **columns,
                **measures,
                "mode": "update",
                "steps": 20,
                "seed": 0,
                "loss": 1.2,
                "reward": 0.7,
                "overlap": 0.9,
            },
            {
                **columns,
                **measures,
                "mode": "update",
                "steps": 20,
                "seed": 1,
                "loss": 1.5,
                "reward": 0.8,
                "overlap": 1.0,
            },
        ]
    )
    out = frontier.summarise(table).set_index("mode")
    assert out.loc["none", ["gain_loss", "gain_reward", "seeds"]].tolist() == [1, 1, 2]
    assert out.loc["update", "gain_loss"] == pytest.approx((0.8 + 1.0) / 2)
    assert out.loc[
        "update", ["gain_reward", "gain_reward_lo", "gain_reward_hi"]
    ].tolist() == pytest.approx([1.0, 0.5, 1.5])
    assert out.loc["update", ["overlap", "overlap_lo", "overlap_hi"]].tolist() == pytest.approx(
        [0.95, 0.9, 1.0]
    )


def test_ideas_are_compared_seed_by_seed():
    def row(setting: dict, seed: int, loss: float, reward: float, overlap: float) -> dict:
        return {**asdict(frontier.Point(**setting, steps=20, seed=seed)), "loss_base": 2.0, "reward_base": 0.5, "loss": loss, "reward": reward,
                "overlap": overlap, "overlap_held": overlap - 0.1, "top1_same": 1.0}  # fmt: skip

    point, twin = frontier.IDEAS["basis contrastive, not activation"]
    table = pd.DataFrame(
        [
            row({"mode": "none"}, 0, 1.0, 0.9, 0.1),
            row({"mode": "none"}, 1, 1.5, 0.7, 0.1),
            row({"mode": "none"}, 2, 1.5, 0.7, 0.1),
            row(twin, 0, 1.5, 0.7, 0.90),
            row(point, 0, 1.2, 0.6, 0.95),
            row(twin, 1, 1.75, 0.6, 0.90),
            row(point, 1, 1.7, 0.7, 0.91),
            row(point, 2, 1.6, 0.6, 0.99),  # its twin was not run
            {**row(twin, 0, 1.9, 0.5, 0.99), "steps": 5},
        ]
    )
    found = frontier.compare(table)
    assert found["idea"].tolist() == ["basis contrastive, not activation"] and found[
        "seeds"
    ].tolist() == [2]
    assert found.loc[0, ["gain_loss", "gain_loss_lo", "gain_loss_hi"]].tolist() == pytest.approx(
        [0.2, 0.1, 0.3]
    )
    assert found.loc[
        0, ["gain_reward", "gain_reward_lo", "gain_reward_hi"]
    ].tolist() == pytest.approx([0.125, -0.25, 0.5])
    assert found.loc[0, ["overlap", "overlap_lo", "overlap_hi"]].tolist() == pytest.approx(
        [0.03, 0.01, 0.05]
    )
    settings = [frontier.Point(**s, steps=9) for pair in frontier.IDEAS.values() for s in pair]
    assert set(settings) <= {replace(p, steps=9, seed=0) for p in frontier.named("full", 1, 9)}


def test_what_was_foretold_by_hand():
    def row(
        setting: dict,
        loss: float,
        overlap: float,
        items: float,
        explanations: float,
        rank: int,
        seed: int = 0,
    ) -> dict:
        return {**asdict(frontier.Point(**setting, steps=20, seed=seed)), "curve": frontier.Point(**setting).curve, "loss_base": 2.0, "reward_base": 0.5,
                "reward": 0.7, "loss": loss, "overlap": overlap, "items_inside": items, "explanations_inside": explanations,
                "rank_mean": rank, "set_same": 1.0, "top1_same": 1.0}  # fmt: skip

    others = [
        {"mode": "gradient"},
        {"mode": "frozen_a"},
        {"penalty": 1.0},
        {"penalty": 1.0, "settle": 3},
        {"refresh": 4},
    ]
    table = pd.DataFrame(
        [
            row({"mode": "none"}, 1.0, 0.1, 0.0, 0.0, 0),
            row({"mode": "none"}, 1.0, 0.1, 0.0, 0.0, 0, seed=1),
            row({"energy": 0.9}, 1.1, 0.90, 0.90, 0.80, 20),
            row({"energy": 0.9}, 1.3, 0.92, 0.90, 0.80, 20, seed=1),
            row({"energy": 0.99}, 1.4, 0.97, 0.99, 0.95, 30),
            row({"basis": "contrastive"}, 1.25, 0.95, 0.98, 0.70, 40),
            row({"basis": "contrastive", "inputs": 10}, 1.05, 0.80, 0.50, 0.40, 10),
            *(row(setting, 1.5, 0.5, 0.99, 0.1, 50) for setting in others),
        ]
    )
    rows, found = frontier.foretold(table)
    assert rows["curve"].tolist() == [
        "update, activation",
        "update, activation",
        "update, contrastive",
        "update, contrastive, 10 inputs",
    ]
    assert rows["gain_loss"].tolist() == pytest.approx([0.8, 0.6, 0.75, 0.95]) and rows[
        "lost"
    ].tolist() == pytest.approx([0.09, 0.03, 0.05, 0.2])
    assert rows["items_outside"].tolist() == pytest.approx([0.1, 0.01, 0.02, 0.5]) and rows[
        "seeds"
    ].tolist() == [2, 1, 1, 1]
    # ranks of the explanations' shares 3 4 2 1, of the gains 3 1 2 4: squared differences 0 + 9 + 0 + 9, 1 - 6 * 18 / (4 * 15)
    assert found["learning"][0] == pytest.approx(-0.8) and found["ranking"] == (1, 1, 1)
    # of the mean ranks 2 3 4 1: squared differences 1 + 4 + 4 + 9, 1 - 6 * 18 / (4 * 15)
    assert found["learning, by count"][0] == pytest.approx(-0.8)


def test_training_stopped_early_by_hand():
    points = pd.DataFrame([("none", 1.0, 0.1), ("none", 0.5, 0.6), ("none", -0.1, 0.9), ("update", 0.75, 0.95), ("penalty", 0.25, 0.9), ("alora", 1.1, 1.0)],
                          columns=["mode", "gain_loss", "overlap"])  # fmt: skip
    assert frontier.stopped_early(points).tolist() == pytest.approx([0.1, 0.6, 1.0, 0.35, 0.8, 0.1])


def test_the_published_frontier_is_whole():
    rows = frontier.published()
    settings = [f.name for f in fields(frontier.Point)]
    assert [tuple(row) for row in rows[settings].itertuples(index=False)] == [
        tuple(asdict(p).values()) for p in frontier.named("full", 3, 16)
    ]
    assert (rows.loc[rows["mode"].isin(["update", "frozen_a", "restart"]), "leak"] < 1e-6).all()
    assert (rows.loc[rows["mode"] == "alora", "max_abs_score_delta"] == 0).all()
    points = frontier.summarise(rows)
    assert points["seeds"].sum() == len(rows) and points["gain_loss"].notna().all()
    free = points[(points["mode"] == "none") & (points["steps"] == points["steps"].max())]
    assert free["gain_loss"].tolist() == pytest.approx([1.0])


def test_the_published_settling_is_in_order_and_compares_equal_users():
    table = frontier.settled()
    same = table[table["penalty"] == 1000.0]
    assert same["settle"].is_monotonic_increasing and same["overlap"].is_monotonic_increasing
    assert np.allclose(
        same["reward"] - same["reward_unsettled"], same["reward_change"], atol=2e-4
    )  # four digits each
