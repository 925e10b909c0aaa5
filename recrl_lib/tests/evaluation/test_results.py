from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib import study
from recrl_lib.data.splits import Split
from recrl_lib.evaluation import clicks, demonstration, ranking_change
from recrl_lib.evaluation.results import (
    JUDGED,
    NAMES,
    TEXT_ARMS,
    added_by_ppo,
    arm_metrics,
    base_logprobs,
    click_table,
    control_metrics,
    control_table,
    detectable,
    gain_kept,
    gain_table,
    group_metrics,
    held_overlap,
    judge_metrics,
    judge_table,
    judged_gain_table,
    judged_gains,
    losers,
    ndcg_by_group,
)
from recrl_lib.evaluation.results import panel as panel_results
from recrl_lib.evaluation.results import (
    tests as holm_tests,
)
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import explain
from recrl_lib.params import resolve
from recrl_lib.ranker import sasrec
from recrl_lib.ranker.ranking import score_chunks, top_k
from recrl_lib.scoring import reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.tiny import WORDS, BagOfWords, tiny_explainer, tune_randomly

PARAMS = resolve("smoke", lora_layers=1, max_new_tokens=8, temperature=1.0)
N_USERS, N_ITEMS = 20, 30


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, 3, replace=False)).title() for _ in range(N_ITEMS)]
    items = pd.DataFrame(
        {
            "item": np.arange(1, N_ITEMS + 1),
            "title": titles,
            "year": 1990,
            "genres": "Drama|Comedy",
            "text": [t.lower() for t in titles],
        }
    )
    sequences = [rng.permutation(np.arange(1, N_ITEMS + 1))[:10] for _ in range(N_USERS)]
    split = Split(
        [s[:-2] for s in sequences],
        np.array([s[-2] for s in sequences]),
        np.array([s[-1] for s in sequences]),
    )
    explainer = tiny_explainer(lora_layers=1)
    text = ItemTexts(explainer, items["text"].tolist()).base_vectors()
    model = sasrec.SASRec(N_ITEMS, 16, 1, 2, 10, 0.0, text_dim=text.shape[1])
    model.fit_text(text)
    sasrec.freeze(model)
    made = study.Study(
        items=items,
        users=pd.DataFrame({"user": range(N_USERS)}),
        split=split,
        ppo_users=np.arange(6),
        validation_users=np.arange(18, N_USERS),
        heldout_users=np.arange(6, 18),
        heldout_items=study.held_out(N_ITEMS, 0.2, 0),
        ranker=model,
        text=text,
        top=top_k(model, split.with_valid, text, 10),
        catalogue=study.catalogue_of(items),
        history_length=3,
    )
    return made, explainer


def panel_of(world):
    records = world.heldout_records(12, np.random.default_rng(1))
    return panel_results(
        world, records, reward.Reward("grounded", world.catalogue), BagOfWords(), 3
    )


def tables(world, explainer):
    panel = panel_of(world)
    with explainer.reference():
        base = panel.explain("base", explainer, PARAMS)
    said = [panel.explain(arm, explainer, PARAMS) for arm in ("unshielded", "shielded")]
    return pd.concat([base, *said], ignore_index=True)


def clicked(made, explanations):
    return click_table(made, explanations, clicks.ClickModel(), np.random.default_rng(2))[0]


def test_an_untuned_model_moves_nothing(world):
    made, explainer = world
    text = ItemTexts(explainer, made.items["text"].tolist()).vectors()
    assert ranking_change.score_change(made, text) == {
        "max_abs_score_delta": 0.0,
        "mean_abs_score_delta": 0.0,
        "item_vector_change": 0.0,
    }
    table, top = ranking_change.ranking_table(made, text)
    assert np.array_equal(top, made.top) and (
        table[["overlap", "set_same", "exact", "rbo", "kendall_tau"]] == 1
    ).all(axis=None)


def test_score_change_equals_the_full_matrix(world):
    made, explainer = world
    tune_randomly(explainer, 0.3)
    text = ItemTexts(explainer, made.items["text"].tolist()).vectors()
    full = [
        torch.cat([s for _, s in score_chunks(made.ranker, made.split.with_valid, t)])[:, 1:]
        for t in (made.text, text)
    ]
    delta = (full[1] - full[0]).abs()
    got = ranking_change.score_change(made, text)
    assert (
        got["max_abs_score_delta"] == pytest.approx(float(delta.max()))
        and got["max_abs_score_delta"] > 0
    )
    assert got["mean_abs_score_delta"] == pytest.approx(float(delta.mean()), rel=1e-5)
    assert got["item_vector_change"] > 0


def test_untuned_arms_have_no_lift_no_kl_and_equal_texts(world):
    made, explainer = world
    explanations = clicked(made, tables(made, explainer))
    table, _ = ranking_change.ranking_table(made, made.text)
    ranking = pd.concat(
        [table.assign(arm=a) for a in ("base", "separate", "unshielded", "shielded")]
    )
    for arm in ("base", "separate", "shielded"):
        m = arm_metrics(
            arm,
            explanations,
            ranking,
            ranking_change.score_change(made, made.text),
            200,
            np.random.default_rng(3),
        )
        # the base's log-probabilities come from the sampler, an arm's from a second reading: equal up to rounding
        assert [m[f"{arm}/ctr_lift{end}"] for end in ("", "_lo", "_hi")] == pytest.approx(
            [1.0] * 3, abs=1e-6
        )
        assert (
            m[f"{arm}/kl"] == 0.0
            and m[f"{arm}/reward_change"] == 0.0
            and m[f"{arm}/top10_overlap"] == 1.0
        )


def test_separate_speaks_like_unshielded_and_ranks_like_base(world):
    made, explainer = world
    tune_randomly(explainer, 0.3)
    text = ItemTexts(explainer, made.items["text"].tolist()).vectors()
    explanations = clicked(made, tables(made, explainer))
    moved, _ = ranking_change.ranking_table(made, text)
    same, _ = ranking_change.ranking_table(made, made.text)
    ranking = pd.concat(
        [same.assign(arm="base"), same.assign(arm="separate"), moved.assign(arm="unshielded")]
    )
    change = {
        "separate": ranking_change.score_change(made, made.text),
        "unshielded": ranking_change.score_change(made, text),
    }
    got = {
        a: arm_metrics(a, explanations, ranking, change[a], 200, np.random.default_rng(3))
        for a in change
    }
    for name in ("ctr", "ctr_lift", "reward", "kl", "mean_tokens"):
        assert got["separate"][f"separate/{name}"] == got["unshielded"][f"unshielded/{name}"]
    assert got["separate"]["separate/kl"] > 0
    assert (
        got["separate"]["separate/max_abs_score_delta"]
        == 0
        < got["unshielded"]["unshielded/max_abs_score_delta"]
    )


def test_click_table_refuses_arms_about_other_items(world):
    made, explainer = world
    explanations = tables(made, explainer)
    explanations.loc[explanations["arm"] == "shielded", "item"] = explanations["item"].to_numpy()[0]
    with pytest.raises(ValueError, match="shielded"):
        clicked(made, explanations)


def test_records_are_of_their_group_and_bounded(world):
    made, _ = world
    records = made.heldout_records(12, np.random.default_rng(0))
    assert {r["user"] for r in records} == set(range(6, 18))
    assert all(r["item"] == made.top[r["user"], r["position"] - 1] for r in records)
    shown = [(u, i) for u in range(6) for i in made.top[u] if i not in made.heldout_items]
    assert (
        sorted((r["user"], r["item"]) for r in made.training_records()) == sorted(shown)
        and len(shown) < 60
    )
    assert {r["user"] for r in made.validation_records(2, np.random.default_rng(0))} == {18, 19}
    with pytest.raises(ValueError, match="13 users asked for, but only 12 are held out"):
        made.heldout_records(13, np.random.default_rng(0))
    with pytest.raises(ValueError, match="only 2 are kept for validation"):
        made.validation_records(3, np.random.default_rng(0))


def test_held_out_items_are_drawn_by_seed():
    drawn = study.held_out(50, 0.2, 3)
    assert (
        len(set(drawn)) == 10
        and drawn.min() >= 1
        and drawn.max() <= 50
        and (np.diff(drawn) > 0).all()
    )
    assert np.array_equal(drawn, study.held_out(50, 0.2, 3)) and not np.array_equal(
        drawn, study.held_out(50, 0.2, 4)
    )
    assert study.held_out(50, 0.0, 3).size == 0


def test_given_texts_get_the_log_probabilities_of_a_plain_forward(world):
    made, explainer = world
    tune_randomly(explainer, 0.3)  # the base model is asked, whatever the adapters are
    records = panel_of(made).records[:5]
    texts = ["a good red film", "", "short", "you watched a long film and a blue film", "good"]
    got = base_logprobs(explainer, records, texts, 0.7, batch=2)
    for record, text, found in zip(records, texts, got, strict=True):
        if not text:
            assert found.size == 0
            continue
        prompt = prompt_ids(explainer, messages(record))
        ids = torch.tensor(
            [
                prompt
                + explainer.tokenizer(text, add_special_tokens=False)["input_ids"]
                + [explainer.eos_id]
            ]
        )
        with torch.no_grad(), explainer.reference():
            logp = torch.log_softmax(explainer.lm(ids).logits[0, :-1] / 0.7, -1)
        wanted = logp.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_the_base_is_asked_once_and_says_the_same(world):
    made, explainer = world
    records = panel_of(made).records
    tune_randomly(explainer, 0.3)
    with explainer.reference():
        once = explain(explainer, records, 8, 1.0, 3)
    for p in explainer.adapter_parameters():
        p.data.zero_()
    twice = explain(explainer, records, 8, 1.0, 3)  # adapters on, but zero: both passes are made
    assert once.texts == twice.texts and (once.kl == 0).all() and twice.kl.max() < 1e-5
    for a, b in zip(once.reference, twice.reference, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_controls_warm_arms_and_groups(world):
    made, explainer = world
    panel = panel_of(made)
    said = [
        tables(made, explainer),
        panel.explain("shielded_warm", explainer, PARAMS, 5),
        panel.controls(explainer, 1.0, 4),
    ]
    scored = clicked(made, pd.concat(said, ignore_index=True))
    found = control_metrics(scored, 200, np.random.default_rng(0))
    assert found["control_empty/reward"] == found["control_empty/quality"] == 0
    assert found["reference/quality"] > max(
        v for k, v in found.items() if k.startswith("control_") and k.endswith("/quality")
    )
    assert set(losers(found, "shielded")) == {
        "empty",
        "constant",
        "longest",
        "keywords",
        "another_item",
        "copied_prompt",
    }
    by_ppo = added_by_ppo("shielded", scored, 200, np.random.default_rng(0))
    assert (
        by_ppo["shielded/users_by_ppo"] == 5 and by_ppo["shielded/reward_by_ppo"] == 0
    )  # untuned: the same texts
    assert added_by_ppo("unshielded", scored, 200, np.random.default_rng(0)) == {}
    groups = group_metrics("shielded", scored, 200, np.random.default_rng(0))
    new = scored.loc[scored["arm"] == "base", "new_item"]
    assert (
        groups.get("shielded/users_new_items", 0) == new.sum()
        and groups["shielded/users_seen_items"] == (~new).sum()
    )
    shuffled = panel.shuffled("base", scored.loc[scored["arm"] == "base", "text"].tolist())
    results = found | shuffled | by_ppo | groups | {"eval_users": 12}
    for arm in (*TEXT_ARMS, "reference"):
        results |= judge_metrics(arm, scored[scored["arm"] == arm], panel.records, made.catalogue)
    table = judge_table(results)
    assert table.loc["usr", "base"] == results["base/usr"] and np.isnan(
        table.loc["usr", "base, shuffled"]
    )
    assert set(control_table(results).index) >= {"empty", "reference", "base"}
    assert list(gain_table(results)["gain"][:1]) == ["over base, items of the training"]


def test_a_control_has_lost_only_where_the_whole_interval_says_so():
    """Four users by hand: what the policy has over each control is .25 and twice the clicks for sure, or
    is above it on the mean, with users on both sides."""
    said = {"base": [0.2] * 4, "unshielded": [0.5, 0.5, 0.5, 0.5], "shielded": [0.6, 0.4, 0.6, 0.4],
            "control_low": [0.25] * 4, "control_near": [0.1, 0.5, 0.45, 0.5], "reference": [1.0] * 4}  # fmt: skip
    said["control_clicked"] = said["control_low"]
    rows = [
        {"arm": arm, "reward": v, "quality": v, "click": 0.9 if arm == "control_clicked" else v}
        for arm, values in said.items()
        for v in values
    ]
    rows += [
        {"arm": "base", "reward": 9.0, "quality": 9.0, "click": 9.0}
    ]  # a fifth user, whom no control speaks to
    found = control_metrics(pd.DataFrame(rows), 500, np.random.default_rng(0))
    assert [found[f"unshielded/reward_over_control_low{end}"] for end in ("", "_lo", "_hi")] == [
        0.25
    ] * 3
    assert [found[f"unshielded/clicks_over_control_low{end}"] for end in ("", "_lo", "_hi")] == [
        2.0
    ] * 3
    assert found["shielded/control_users_ctr_lift"] == pytest.approx(2.5) and found[
        "control_low/ctr_lift"
    ] == pytest.approx(1.25)
    assert found["shielded/reward_over_control_near"] == pytest.approx((0.5 - 0.1 + 0.15 - 0.1) / 4)
    lost = {
        "clicked": False,
        "low": True,
        "near": False,
    }  # near: .5 against .5 for two of the four users
    assert (
        losers(found, "unshielded") == losers(found, "shielded") == lost
        and found["users_controls"] == 4
    )
    assert (
        losers({"control_low/reward": 0.5}, "shielded") == {}
    )  # a run of before there were intervals
    table = control_table(found)
    assert (
        table.loc["low", "reward above, unshielded"] == "0.25 [0.25, 0.25]"
        and table.loc["reference", "clicks over, shielded"] == ""
    )


def test_questions_and_detectable_effects(world):
    made, explainer = world
    explanations = clicked(made, tables(made, explainer))
    table, _ = ranking_change.ranking_table(made, made.text)
    ranking = pd.concat([table.assign(arm=a) for a in TEXT_ARMS])
    questions = holm_tests(explanations, ranking, 200, np.random.default_rng(0))
    untuned = questions[questions["measure"].isin(["reward", "ndcg"])]
    assert (
        len(questions) == 8
        and (untuned["p"] == 1).all()
        and (questions["difference"].abs() < 1e-6).all()
    )
    assert (detectable(explanations)["reward"] == 0).all()
    noisy = explanations.assign(reward=np.random.default_rng(0).random(len(explanations)))
    found = detectable(noisy).set_index("profile")["reward"]
    assert found["smoke"] / found["laptop"] == pytest.approx(np.sqrt(128 / 24))


def test_top_lists_survive_the_table():
    top = np.arange(40).reshape(4, 10)
    frame = ranking_change.top_frame({"base": top, "shielded": top + 1}).sample(
        frac=1, random_state=0
    )
    assert np.array_equal(study.top_array(frame, "shielded"), top + 1)


def test_the_demonstration_learns_with_and_without_the_shield_and_moves_less_with(world):
    made, explainer = world
    items = ItemTexts(explainer, made.items["text"].tolist())
    protected = subspaces.subspaces(subspaces.item_grams(explainer, items)[0], 0.99)
    said = study.explanation_frame(
        made.heldout_records(4, np.random.default_rng(0)),
        ["red film", "good", "a b", "long"],
        np.zeros(4),
        {},
    )
    data = demonstration.targets(explainer, made, said)
    free = demonstration.tune(explainer, data, 5, 1e-2)
    free_leak, free_change = (
        projection.leak(explainer, protected),
        demonstration.item_change(explainer, items),
    )
    held = demonstration.tune(explainer, data, 5, 1e-2, projection.Shield(explainer, protected))
    assert free[0] == held[0] and free[-1] < free[0] and held[-1] < held[0]
    assert projection.leak(explainer, protected) < 1e-6 < 0.1 < free_leak
    assert demonstration.item_change(explainer, items) < free_change
    rows = {
        r["name"]: r["value"]
        for r in demonstration.one_layer(
            explainer, items, [[1, 5, 6, 2, 1], [1, 7, 8, 2, 1]], protected
        )
    }
    assert rows["prompts, part inside Q"] < 1e-5 < rows["prompts, part outside Q"]


def test_loss_of_the_demonstration_is_on_the_explanation_alone(world):
    made, explainer = world
    said = study.explanation_frame(
        made.heldout_records(2, np.random.default_rng(0)), ["red film", "good"], np.zeros(2), {}
    )
    _, mask, labels = demonstration.targets(explainer, made, said)
    assert (labels >= 0).sum(-1).tolist() == [3, 2]  # words and the end token
    assert (labels[mask.logical_not()] == -100).all()


def moved(world):
    """(study, tuned item vectors, the top lists that they give, some items to hold out)."""
    study_, explainer = world
    tune_randomly(explainer)
    text = ItemTexts(explainer, study_.items["text"].tolist()).vectors()
    return study_, text, ranking_change.ranking_table(study_, text)[1], {3, 7, 8, 20}


def test_change_by_group_is_the_naive_one(world):
    study_, text, top, held = moved(world)
    found = ranking_change.change_by_group(study_, text, top, held)
    before, after = (
        torch.cat([s for _, s in score_chunks(study_.ranker, study_.split.with_valid, t)])
        for t in (study_.text, text)
    )
    for name, numbers in (
        ("held", sorted(held)),
        ("seen", [i for i in range(1, N_ITEMS + 1) if i not in held]),
    ):
        delta = (after - before)[:, numbers].abs()
        assert found[f"max_abs_score_delta_{name}"] == pytest.approx(float(delta.max()))
        assert found[f"mean_abs_score_delta_{name}"] == pytest.approx(float(delta.mean()), rel=1e-5)
        places = [(u, i) for u, row in enumerate(study_.top) for i in row if i in numbers]
        assert found[f"overlap_{name}"] == pytest.approx(np.mean([i in top[u] for u, i in places]))
    same = ranking_change.change_by_group(study_, study_.text, study_.top, held)
    assert (
        same["overlap_held"] == same["overlap_seen"] == 1
        and same["item_change_held"] == same["max_abs_score_delta_seen"] == 0
    )


def test_the_places_of_held_out_items_and_their_interval(world):
    study_, text, top, held = moved(world)
    found = held_overlap(study_, top, held, 400, np.random.default_rng(0))
    assert found["overlap_held"] == pytest.approx(
        ranking_change.change_by_group(study_, text, top, held)["overlap_held"]
    )
    assert found["overlap_held_lo"] < found["overlap_held"] < found["overlap_held_hi"]
    same = held_overlap(study_, study_.top, held, 50, np.random.default_rng(0))
    assert list(same.values()) == [1.0] * 3
    assert held_overlap(study_, top, {N_ITEMS + 5}, 50, np.random.default_rng(0)) == {}


def test_ndcg_of_users_whose_film_was_held_out(world):
    """By hand: five users, the films of two of them held out; what one group gained is not the other's."""
    study_ = SimpleNamespace(split=SimpleNamespace(test=np.array([3, 1, 7, 2, 9])))
    base = pd.DataFrame({"ndcg": [0.5, 0.5, 0.0, 1.0, 0.2]})
    after = pd.DataFrame({"ndcg": [0.6, 0.5, 0.2, 0.7, 0.2]})
    found = ndcg_by_group(study_, after, base, {3, 7}, 400, np.random.default_rng(0))
    assert found["ndcg@10_change_held"] == pytest.approx(0.15) and found[
        "ndcg@10_change_seen"
    ] == pytest.approx(-0.1)
    assert found["ndcg@10_change_held_lo"] == pytest.approx(0.1) and found[
        "ndcg@10_change_held_hi"
    ] == pytest.approx(0.2)
    alone = ndcg_by_group(study_, base, base, {4}, 50, np.random.default_rng(0))
    assert alone == {
        "ndcg@10_change_seen": 0.0,
        "ndcg@10_change_seen_lo": 0.0,
        "ndcg@10_change_seen_hi": 0.0,
    }


def judged(**changes) -> pd.DataFrame:
    """Texts of 40 users by three arms, all alike but for ``changes``: column -> (unshielded, shielded) added to the base's."""
    rng = np.random.default_rng(0)
    base = pd.DataFrame(
        {m: rng.random(40) for m in (*JUDGED, "reward")} | {"new_item": np.arange(40) >= 30}
    )
    arms = [base.assign(arm="base")]
    for n, arm in enumerate(TEXT_ARMS[1:]):
        arms.append(
            base.assign(
                arm=arm, **{column: base[column] + both[n] for column, both in changes.items()}
            )
        )
    return pd.concat(arms, ignore_index=True)


def test_every_measure_of_the_judge_is_compared_user_by_user():
    table = judged(own_item=(0.1, -0.2), fluency=(0.0, np.where(np.arange(40) >= 30, 0.3, 0.0)))
    table.loc[[40, 85], "grounding_precision"] = (
        np.nan
    )  # users 0 and 5 claim nothing in one arm each
    found = {arm: judged_gains(arm, table, 300, np.random.default_rng(0)) for arm in TEXT_ARMS[1:]}
    assert found["unshielded"]["unshielded/own_item_retrieval@10_change"] == pytest.approx(0.1)
    shielded = found["shielded"]
    assert [
        shielded[f"shielded/own_item_retrieval@10_change{end}"] for end in ("", "_lo", "_hi")
    ] == pytest.approx([-0.2] * 3)
    assert shielded["shielded/fluency_change"] == pytest.approx(0.075) and shielded[
        "shielded/fluency_new_items"
    ] == pytest.approx(0.3)
    assert shielded["shielded/fluency_change_lo"] > 0 and shielded[
        "shielded/grounding_precision_change"
    ] == pytest.approx(0, abs=1e-12)
    means = {f"base/{NAMES.get(m, m)}": 0.5 for m in JUDGED}
    shown = judged_gain_table(means | found["unshielded"] | shielded)
    assert (
        shown.loc["fluency", "shielded, new items"] == "+0.300 [+0.300, +0.300]"
        and "quality" not in shown.index
    )


def test_the_share_of_the_gain_that_was_kept():
    rng = np.random.default_rng(1)
    table = judged(reward=(0.2, 0.2 * rng.normal(0.9, 0.3, 40)))
    found = gain_kept(table, 2000, np.random.default_rng(0))
    held, free = (table.loc[table["arm"] == arm, "reward"].mean() - table.loc[table["arm"] == "base", "reward"].mean()
                  for arm in ("shielded", "unshielded"))  # fmt: skip
    assert found["shielded/gain_kept"] == pytest.approx(held / free)
    assert (
        found["shielded/gain_kept_lo"]
        < found["shielded/gain_kept"]
        < found["shielded/gain_kept_hi"]
    )
    equal = gain_kept(judged(reward=(0.2, 0.2)), 50, np.random.default_rng(0))
    assert list(equal.values()) == pytest.approx([1.0] * 3)
    assert gain_kept(judged(reward=(-0.2, 0.2)), 50, np.random.default_rng(0)) == {}
    assert (
        gain_kept(judged(reward=(rng.normal(0.01, 1, 40), 0.2)), 50, np.random.default_rng(0)) == {}
    )  # may be a loss


def test_served_vectors_are_those_of_the_adapter(world):
    study_, explainer = world
    tune_randomly(explainer)
    items = ItemTexts(explainer, study_.items["text"].tolist())
    fresh = tiny_explainer()
    served = ranking_change.served_vectors(explainer, fresh, items)
    torch.testing.assert_close(served, items.vectors(), atol=1e-4, rtol=1e-4)
    assert (
        served - study_.text
    ).norm() > 0.01 * study_.text.norm()  # it is the tuned model that was read
    assert items.explainer is explainer
