import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib import study
from recrl_lib.evaluation import clicks, ranking_change, results
from recrl_lib.evaluation.results import Comparison
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.params import resolve
from recrl_lib.ranker.ranking import score_chunks
from recrl_lib.scoring import judge
from recrl_lib.tests.evaluation.toy import ITEMS, rng, toy_study
from recrl_lib.tests.tiny import BagOfWords, tune_randomly

PARAMS = resolve("smoke", lora_layers=1, max_new_tokens=8, temperature=1.0)
CLICKS = clicks.ClickModel.of(PARAMS)


def test_an_untuned_model_moves_nothing():
    made, explainer = toy_study()
    text = ItemTexts(explainer, made.items["text"].tolist()).vectors()
    table, top = ranking_change.ranking_table(made, text)
    assert np.array_equal(top, made.top)
    found = ranking_change.change_by_group(made, text, top, {"all": range(1, ITEMS + 1)})["all"]
    assert found.pop("overlap") == 1 and set(found.values()) == {0.0}
    assert (table[["overlap", "set_same", "exact", "rbo", "kendall_tau"]] == 1).all(axis=None)


def test_score_changes_are_those_of_the_full_matrix():
    made, explainer = toy_study()
    tune_randomly(explainer, 0.3)
    text = ItemTexts(explainer, made.items["text"].tolist()).vectors()
    top = ranking_change.ranking_table(made, text)[1]
    held, every = {3, 7, 8, 20}, set(range(1, ITEMS + 1))
    groups = {"held_out_items": held, "subspace_items": every - held, "all": every}
    before, after = (
        torch.cat([s for _, s in score_chunks(made.ranker, made.split.with_valid, vectors)])
        for vectors in (made.text, text)
    )
    delta = (after - before).abs()
    for name, found in ranking_change.change_by_group(made, text, top, groups).items():
        items = sorted(groups[name])
        assert found["max_abs_score_delta"] == pytest.approx(float(delta[:, items].max())) != 0
        mean = float(delta[:, items].mean())
        assert found["mean_abs_score_delta"] == pytest.approx(mean, rel=1e-5)
        places = [i in top[u] for u in range(len(top)) for i in made.top[u] if i in groups[name]]
        assert found["overlap"] == pytest.approx(np.mean(places))
        wanted = (text[items] - made.text[items]).norm() / made.text[items].norm()
        assert found["item_change"] == pytest.approx(float(wanted))


def test_records_are_of_their_group_and_bounded():
    made, _ = toy_study()
    records = made.heldout_records(12, rng())
    assert {r["user"] for r in records} == set(range(6, 18))
    assert all(r["item"] == made.top[r["user"], r["position"] - 1] for r in records)
    shown = [(u, i) for u in range(6) for i in made.top[u] if i not in made.heldout_items]
    assert sorted((r["user"], r["item"]) for r in made.training_records()) == sorted(shown)
    assert {r["user"] for r in made.validation_records(2, rng())} == {18, 19}
    with pytest.raises(ValueError, match="13 users asked for, but the group has only 12"):
        made.heldout_records(13, rng())
    drawn = study.held_out(50, 0.2, 3)
    assert len(set(drawn)) == 10 and drawn.min() >= 1 and drawn.max() <= 50
    assert not np.array_equal(drawn, study.held_out(50, 0.2, 4))


def test_records_hold_what_moved_the_ranker_film_by_film():
    made, _ = toy_study()
    asked = made.records([7, 3, 7], [2, 1, 1])
    table = made.ranker.item_table(made.text).detach()

    def logp(history, item):
        ((_, scores),) = score_chunks(made.ranker, [np.array(history)], made.text)
        return float(torch.log_softmax(scores.double(), -1)[0, item])

    for record in asked:
        history, item = made.split.with_valid[record["user"]].tolist(), record["item"]
        for j, (weight, near) in enumerate(
            zip(record["history_weights"], record["history_similarity"], strict=True)
        ):
            seen = history[len(history) - 3 + j]
            assert record["history_titles"][j] == made.items["title"][seen - 1]
            rest = [x for x in history if x != seen]
            assert weight == pytest.approx(logp(history, item) - logp(rest, item), abs=1e-5)
            cosine = torch.cosine_similarity(table[seen], table[item], dim=0)
            assert near == pytest.approx(float(cosine), abs=1e-5)


def test_a_films_rivals_are_the_nine_others_of_its_users_list():
    made, _ = toy_study()
    records = made.heldout_records(12, rng(1))
    scorer = results.Scorer(made, records, None, BagOfWords(), 3)
    for record, cards in zip(records, scorer.judge.cards["specificity_same_user"], strict=True):
        shown = made.items.loc[made.top[record["user"]] - 1].to_dict("records")
        lists = [judge.card(film | {"genres": film["genres"].split("|")}, False) for film in shown]
        assert cards[0] == lists[record["position"] - 1] and sorted(cards) == sorted(lists)


@pytest.mark.parametrize("split", [True, False])
def test_given_texts_get_the_log_probabilities_of_a_plain_forward(split):
    made, explainer = toy_study()
    tune_randomly(explainer, 0.3)  # the base model is asked, whatever the adapters are
    if not split:
        explainer.split, explainer.cut = False, 0
    record = made.heldout_records(1, rng())[0]
    texts = ["a good red film", "", "short", "you watched a long film and a blue film", "good"]
    got = results.base_logprobs(explainer, record, texts, 0.7)
    assert got[1].size == 0 and results.base_logprobs(explainer, record, [""], 0.7)[0].size == 0
    for text, found in zip(texts, got, strict=True):
        if text:
            prompt = prompt_ids(explainer, messages(record))
            said = explainer.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt, *said, explainer.eos_id]])
            with torch.no_grad(), explainer.reference():
                logp = torch.log_softmax(explainer.lm(ids).logits[0, :-1] / 0.7, -1)
            wanted = logp.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def arms_table(**arms) -> pd.DataFrame:
    """By arm, values by user: the same for every headline measure."""
    return pd.concat(
        pd.DataFrame({"arm": arm, "user": range(len(v))} | dict.fromkeys(results.HEADLINE, v))
        for arm, v in arms.items()
    )


def test_arms_are_compared_over_the_users_that_both_have():
    table = arms_table(base=[0.2, 0.4, 0.5], few=[0.3, 0.3])
    compared = Comparison(table, ["reward"], 300, rng())
    (row,) = compared.rows("few", "base").to_dict("records")
    assert (row["value"], row["n"]) == (pytest.approx(0), 2)
    assert compared.rows("few", "base", "none", np.zeros(3, bool)).empty
    table.loc[table["arm"] == "few", "user"] = [1, 0]
    with pytest.raises(ValueError, match="few against base: not the same users"):
        compared.rows("few", "base")


def test_a_control_has_lost_only_where_the_whole_interval_says_so():
    table = arms_table(shielded=[0.6, 0.4, 0.6, 0.4], control_low=[0.25] * 4,
                       control_near=[0.1, 0.5, 0.45, 0.5], control_clicked=[0.25] * 4)  # fmt: skip
    table.loc[table["arm"] == "control_clicked", "ctr"] = 0.9
    compared = Comparison(table, results.HEADLINE, 500, rng())
    controls = ("control_low", "control_near", "control_clicked")
    rows = pd.concat([compared.rows("shielded", control) for control in controls])
    beaten = {"clicked": False, "low": True, "near": False}
    assert results.beaten_controls(rows, "shielded") == beaten
    assert results.beaten_controls(compared.rows("shielded"), "shielded") == {}


def test_the_share_of_the_gain_that_was_kept():
    base, gain = rng(3).random(40), 0.2
    kept = gain * rng(1).normal(0.9, 0.3, 40)

    def share(free, held):
        scored = arms_table(base=base, unshielded=base + free, shielded=base + held)
        arms = "shielded", "base", "unshielded"
        return results.share(scored, arms, "reward", "gain_kept", 500, rng())

    found = share(gain, kept).iloc[0]
    assert found["value"] == pytest.approx(kept.mean() / gain)
    assert found["low"] < found["value"] < found["high"]
    assert (found["arm"], found["against"], found["n"]) == ("shielded", "unshielded", 40)
    assert share(-gain, gain).empty and share(rng(1).normal(0.01, 1, 40), gain).empty


def test_a_pivot_is_ordered_as_asked_and_empty_where_nothing_is():
    rows = [("a", "x", 1.0, 0.5, 1.5), ("b", "x", 2.0, np.nan, np.nan), ("b", "y", -1.0, -2.0, 0.0)]
    table = pd.DataFrame(rows, columns=["arm", "measure", "value", "low", "high"])
    shown = results.pivot(table, spec="+.1f", measure=["y", "x"])
    wanted = {"b": ["-1.0 [-2.0, +0.0]", "+2.0"], "a": ["", "+1.0 [+0.5, +1.5]"]}
    assert shown.to_dict("list") == wanted
    assert list(results.pivot(table, index="arm", columns="measure", arm="b").columns) == ["x", "y"]
