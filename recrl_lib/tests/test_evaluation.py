import re
import zlib

import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib import demonstration, evaluation, ranker, rewards, shield as sh, simulator, study
from recrl_lib.config import resolve
from recrl_lib.datasets import Split
from recrl_lib.explainer import ItemTexts
from recrl_lib.tests.tiny import WORDS, tiny_explainer, tune_randomly

PARAMS = resolve("smoke", lora_layers=1, max_new_tokens=8, temperature=1.0)
N_USERS, N_ITEMS = 18, 30


class BagOfWords:
    """A sentence encoder of the plainest kind: normalised word counts."""

    def encode(self, texts):
        rows = [np.bincount([zlib.crc32(w.encode()) % 64 for w in re.findall(r"\w+", t.lower())], minlength=64) for t in texts]
        counts = np.array(rows, np.float32) + 1e-6
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, 3, replace=False)).title() for _ in range(N_ITEMS)]
    items = pd.DataFrame({"item": np.arange(1, N_ITEMS + 1), "title": titles, "year": 1990, "genres": "Drama|Comedy",
                          "text": [t.lower() for t in titles]})
    sequences = [rng.permutation(np.arange(1, N_ITEMS + 1))[:10] for _ in range(N_USERS)]
    split = Split([s[:-2] for s in sequences], np.array([s[-2] for s in sequences]), np.array([s[-1] for s in sequences]))
    explainer = tiny_explainer(lora_layers=1)
    text = ItemTexts(explainer, items["text"].tolist()).base_vectors()
    model = ranker.SASRec(N_ITEMS, 16, 1, 2, 10, 0.0, text_dim=text.shape[1])
    model.fit_text(text)
    ranker.freeze(model)
    made = study.Study(
        items=items, users=pd.DataFrame({"user": range(N_USERS)}), split=split, ppo_users=np.arange(6),
        heldout_users=np.arange(6, N_USERS), ranker=model, text=text, top=ranker.top_k(model, split.with_valid, text, 10),
        catalogue=study.catalogue_of(items), history_length=3,
    )
    return made, explainer


def tables(world, explainer):
    records = world.heldout_records(12, np.random.default_rng(1))
    reward = rewards.Reward("grounded", world.catalogue)

    def said(arm):
        return evaluation.explanation_table(arm, world, explainer, records, reward, BagOfWords(), PARAMS, 3)

    with explainer.reference():
        base = said("base")
    return pd.concat([base, said("unshielded"), said("shielded")], ignore_index=True)


def test_an_untuned_model_moves_nothing(world):
    made, explainer = world
    text = ItemTexts(explainer, made.items["text"].tolist()).vectors()
    assert evaluation.score_change(made, text) == {"max_abs_score_delta": 0.0, "mean_abs_score_delta": 0.0, "item_vector_change": 0.0}
    table, top = evaluation.ranking_table(made, text)
    assert np.array_equal(top, made.top) and (table[["overlap", "set_same", "exact", "rbo", "kendall_tau"]] == 1).all(axis=None)


def test_score_change_equals_the_full_matrix(world):
    made, explainer = world
    tune_randomly(explainer, 0.3)
    text = ItemTexts(explainer, made.items["text"].tolist()).vectors()
    full = [torch.cat([s for _, s in ranker.score_chunks(made.ranker, made.split.with_valid, t)])[:, 1:] for t in (made.text, text)]
    delta = (full[1] - full[0]).abs()
    got = evaluation.score_change(made, text)
    assert got["max_abs_score_delta"] == pytest.approx(float(delta.max())) and got["max_abs_score_delta"] > 0
    assert got["mean_abs_score_delta"] == pytest.approx(float(delta.mean()), rel=1e-5)
    assert got["item_vector_change"] > 0


def test_untuned_arms_have_no_lift_no_kl_and_equal_texts(world):
    made, explainer = world
    explanations = evaluation.click_table(made, tables(made, explainer), simulator.ClickModel(), np.random.default_rng(2))
    table, _ = evaluation.ranking_table(made, made.text)
    ranking = pd.concat([table.assign(arm=a) for a in ("base", "separate", "unshielded", "shielded")])
    for arm in ("base", "separate", "shielded"):
        m = evaluation.arm_metrics(arm, explanations, ranking, evaluation.score_change(made, made.text), 200, np.random.default_rng(3))
        assert m[f"{arm}/ctr_lift"] == m[f"{arm}/ctr_lift_lo"] == m[f"{arm}/ctr_lift_hi"] == 1.0
        assert m[f"{arm}/kl"] == 0.0 and m[f"{arm}/reward_change"] == 0.0 and m[f"{arm}/top10_overlap"] == 1.0


def test_separate_speaks_like_unshielded_and_ranks_like_base(world):
    made, explainer = world
    tune_randomly(explainer, 0.3)
    text = ItemTexts(explainer, made.items["text"].tolist()).vectors()
    explanations = evaluation.click_table(made, tables(made, explainer), simulator.ClickModel(), np.random.default_rng(2))
    moved, _ = evaluation.ranking_table(made, text)
    same, _ = evaluation.ranking_table(made, made.text)
    ranking = pd.concat([same.assign(arm="base"), same.assign(arm="separate"), moved.assign(arm="unshielded")])
    change = {"separate": evaluation.score_change(made, made.text), "unshielded": evaluation.score_change(made, text)}
    got = {a: evaluation.arm_metrics(a, explanations, ranking, change[a], 200, np.random.default_rng(3)) for a in change}
    for name in ("ctr", "ctr_lift", "reward", "kl", "usr"):
        assert got["separate"][f"separate/{name}"] == got["unshielded"][f"unshielded/{name}"]
    assert got["separate"]["separate/kl"] > 0
    assert got["separate"]["separate/max_abs_score_delta"] == 0 < got["unshielded"]["unshielded/max_abs_score_delta"]


def test_click_table_refuses_arms_about_other_items(world):
    made, explainer = world
    explanations = tables(made, explainer)
    explanations.loc[explanations["arm"] == "shielded", "item"] = explanations["item"].to_numpy()[0]
    with pytest.raises(ValueError, match="shielded"):
        evaluation.click_table(made, explanations, simulator.ClickModel(), np.random.default_rng(2))


def test_heldout_records_are_heldout_and_bounded(world):
    made, _ = world
    records = made.heldout_records(12, np.random.default_rng(0))
    assert {r["user"] for r in records} == set(range(6, 18))
    assert all(r["item"] == made.top[r["user"], r["position"] - 1] for r in records)
    assert {r["user"] for r in made.training_records()} == set(range(6)) and len(made.training_records()) == 60
    with pytest.raises(ValueError, match="eval_users=13"):
        made.heldout_records(13, np.random.default_rng(0))


def test_top_lists_survive_the_table():
    top = np.arange(40).reshape(4, 10)
    frame = evaluation.top_frame({"base": top, "shielded": top + 1}).sample(frac=1, random_state=0)
    assert np.array_equal(study.top_array(frame, "shielded"), top + 1)


def test_the_demonstration_learns_with_and_without_the_shield_and_moves_less_with(world):
    made, explainer = world
    items = ItemTexts(explainer, made.items["text"].tolist())
    protected = sh.subspaces(sh.item_grams(explainer, items)[0], 0.99)
    said = study.explanation_frame(made.heldout_records(4, np.random.default_rng(0)), ["red film", "good", "a b", "long"], np.zeros(4), {})
    data = demonstration.targets(explainer, made, said)
    free = demonstration.tune(explainer, data, 5, 1e-2)
    free_leak, free_change = sh.leak(explainer, protected), demonstration.item_change(explainer, items)
    held = demonstration.tune(explainer, data, 5, 1e-2, sh.Shield(explainer, protected))
    assert free[0] == held[0] and free[-1] < free[0] and held[-1] < held[0]
    assert sh.leak(explainer, protected) < 1e-6 < 0.1 < free_leak
    assert demonstration.item_change(explainer, items) < free_change
    rows = {r["name"]: r["value"] for r in demonstration.one_layer(explainer, items, [[1, 5, 6, 2, 1], [1, 7, 8, 2, 1]], protected)}
    assert rows["prompts, part inside Q"] < 1e-5 < rows["prompts, part outside Q"]


def test_loss_of_the_demonstration_is_on_the_explanation_alone(world):
    made, explainer = world
    said = study.explanation_frame(made.heldout_records(2, np.random.default_rng(0)), ["red film", "good"], np.zeros(2), {})
    _, mask, labels = demonstration.targets(explainer, made, said)
    assert (labels >= 0).sum(-1).tolist() == [3, 2]  # words and the end token
    assert (labels[mask.logical_not()] == -100).all()


def test_change_by_group_is_the_naive_one(world):
    study_, explainer = world
    tune_randomly(explainer)
    text = ItemTexts(explainer, study_.items["text"].tolist()).vectors()
    _, top = evaluation.ranking_table(study_, text)
    held = {3, 7, 8, 20}
    found = evaluation.change_by_group(study_, text, top, held)
    before, after = (torch.cat([s for _, s in ranker.score_chunks(study_.ranker, study_.split.with_valid, t)]) for t in (study_.text, text))
    for name, numbers in (("held", sorted(held)), ("seen", [i for i in range(1, N_ITEMS + 1) if i not in held])):
        delta = (after - before)[:, numbers].abs()
        assert found[f"max_abs_score_delta_{name}"] == pytest.approx(float(delta.max()))
        assert found[f"mean_abs_score_delta_{name}"] == pytest.approx(float(delta.mean()), rel=1e-5)
        places = [(u, i) for u, row in enumerate(study_.top) for i in row if i in numbers]
        assert found[f"overlap_{name}"] == pytest.approx(np.mean([i in top[u] for u, i in places]))
    same = evaluation.change_by_group(study_, study_.text, study_.top, held)
    assert same["overlap_held"] == same["overlap_seen"] == 1 and same["item_change_held"] == same["max_abs_score_delta_seen"] == 0


def test_served_vectors_are_those_of_the_adapter(world):
    study_, explainer = world
    tune_randomly(explainer)
    items = ItemTexts(explainer, study_.items["text"].tolist())
    fresh = tiny_explainer()
    served = evaluation.served_vectors(explainer, fresh, items)
    torch.testing.assert_close(served, items.vectors(), atol=1e-4, rtol=1e-4)
    assert (served - study_.text).norm() > 0.01 * study_.text.norm()  # it is the tuned model that was read
    assert items.explainer is explainer
