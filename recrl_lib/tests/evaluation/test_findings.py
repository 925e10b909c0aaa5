"""The report from a small finished run: its verdicts against hand-set numbers, and the page as a file."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from recrl_lib import paths, runs
from recrl_lib.evaluation import findings, frontier, results
from recrl_lib.params import PIPELINE, PROFILES, STAGES, Params, owned_by
from recrl_lib.params import names as names_params
from recrl_lib.shield.subspaces import Subspace, to_tensors
from recrl_lib.tests.test_plots import ARMS, overlap, ppo_curve
from recrl_lib.tests.test_plots import evaluation as arm_numbers

HOSTILE = '</td><script>alert("x")</script> & "Quoted", The'
N_USERS, N_ITEMS = 12, 40


def evaluation(**changes) -> dict:
    """A full ``metrics/evaluation.json``: gains of .12 and .10, the shield keeps 95.7 % of the top 10."""
    found = {
        f"{arm}/{name}": 0.5
        for arm in ARMS
        for name in (
            "ctr",
            "kl",
            "hr@10",
            "kendall_tau",
            "rbo",
            "grounding_precision",
            "grounding_recall",
            "own_item_retrieval@10",
            "distinct_2",
            "usr",
            "mean_tokens",
        )
    }
    found |= arm_numbers()
    for arm, moved in zip(ARMS, (0.0, 0.0, 3.1, 0.042)):
        found[f"{arm}/max_abs_score_delta"] = moved
        gain, drop = found[f"{arm}/reward"] - 0.62, found[f"{arm}/ndcg@10"] - 0.0691
        for name, value, width in (
            ("reward_change", gain, 0.03),
            ("ndcg@10_change", drop, 0.004),
            ("quality_change", gain / 2, 0.02),
        ):
            found |= {
                f"{arm}/{name}": value,
                f"{arm}/{name}_lo": value - width,
                f"{arm}/{name}_hi": value + width,
            }
        found |= {
            f"{arm}/quality": 0.4 + gain / 2,
            f"{arm}/quality_lo": 0.38,
            f"{arm}/quality_hi": 0.5,
        }
    return found | {"separate/scores_sha256_equal": True} | changes


OTHER_METRICS = {
    "environment": {"checks": 10},
    "data": {
        "n_users": N_USERS,
        "n_items": N_ITEMS,
        "n_interactions": 120,
        "source": "toy",
        "sha256": "0",
    },
    "ranker": {
        "ndcg@10": 0.0691,
        "hr@10": 0.14,
        "mrr@10": 0.05,
        "valid_ndcg@10": 0.08,
        "epochs": 3,
        "train_seconds": 1.0,
        "text_free_ndcg@10": 0.017,
    },
    "explainer": {"trainable_params": 1, "total_params": 2, "trainable_fraction": 0.5},
    "shield": {
        "energy": 0.99,
        "rank_mean": 7.0,
        "rank_max": 9,
        "capacity_left_mean": 0.9,
        "leak_before": 0.5,
        "leak_after": 1e-9,
        "overlap_mean": 0.8,
    },
    "shielded_ppo": {
        **{
            f"{arm}/{name}": value
            for arm in ("unshielded", "shielded")
            for name, value in (("reward_first", 0.8), ("reward_last", 0.9))
        },
        "steps": 12,
        "episodes": 384,
        "reward_first": 0.6,
        "reward_last": 0.7,
        "kl_last": 1.0,
        "kl_max": 1.1,
        "clip_fraction_last": 0.02,
        "ratio_first_minibatch_max_dev": 1e-6,
        "shield_seconds": 0.2,
        "step_seconds": 9.0,
        "generated_tokens_per_second": 100.0,
        "peak_memory_gb": 2.0,
        "shielded/leak": 1e-9,
    },
    "audit": {
        "toxicity_mean": 0.02,
        "toxicity_p95": 0.1,
        "gini_base": 0.8,
        "gini_after": 0.81,
        "parity_gap": 0.05,
        "privacy_leak_rate": 0.0,
        **{f"{name}_ok": True for name in runs.AUDITED},
    },
}


def tables() -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    user, item = (
        np.repeat(np.arange(N_USERS), 10),
        np.concatenate([rng.permutation(N_ITEMS)[:10] + 1 for _ in range(N_USERS)]),
    )
    interactions = pd.DataFrame(
        {"user": user, "item": item, "time": np.tile(np.arange(10), N_USERS), "rating": 4.0}
    )
    items = pd.DataFrame(
        {
            "item": np.arange(1, N_ITEMS + 1),
            "title": [f"Film {i}" for i in range(1, N_ITEMS + 1)],
            "year": 1994,
            "genres": "Drama|Comedy",
            "text": "t",
        }
    )
    said = []
    for arm in ("base", "unshielded", "shielded"):
        gain = 0.0 if arm == "base" else np.arange(N_USERS) / 100
        said.append(
            pd.DataFrame(
                {
                    "arm": arm,
                    "user": np.arange(N_USERS),
                    "item": 1 + np.arange(N_USERS),
                    "position": 3,
                    "title": "Film",
                    "text": f"The {arm} text. {HOSTILE}",
                    "quality": 0.4 + gain,
                    **{
                        c: 0.5
                        for c in (
                            "reward",
                            "reward_length",
                            "reward_relevance",
                            "reward_coherence",
                            "kl",
                        )
                    },
                }
            )
        )
    top = np.stack([rng.permutation(N_ITEMS)[:10] + 1 for _ in range(N_USERS)])
    top10 = pd.concat(
        [
            pd.DataFrame(
                {
                    "arm": arm,
                    "user": np.repeat(np.arange(N_USERS), 10),
                    "position": np.tile(np.arange(1, 11), N_USERS),
                    "item": top.ravel(),
                }
            )
            for arm in ARMS
        ]
    )
    return {
        "interactions": interactions,
        "items": items,
        "users": pd.DataFrame({"user": np.arange(N_USERS)}),
        "explanations": pd.concat(said, ignore_index=True),
        "overlap": overlap(),
        "top10": top10.reset_index(drop=True),
    }


RANKER_CURVE = [{"epoch": e, "loss": 7.0 - e, "valid_ndcg@10": 0.05 + e / 100} for e in range(3)]


def subspaces() -> dict[str, Subspace]:
    names = [f"{n}.{kind}" for n in (1, 2) for kind in ("attention", "output")]
    return {
        n: Subspace(torch.eye(16)[:, :4].clone(), torch.tensor(0.7 ** np.arange(16))) for n in names
    }


def evidence(metrics: dict[str, dict] | None = None, **params) -> findings.Evidence:
    """As ``report.gather`` gives it, from a clean commit; ``metrics``: changes by name of the file."""
    found = {runs.metrics_name(name): values for name, values in OTHER_METRICS.items()} | {
        "evaluation": evaluation()
    }
    manifest = {
        "git_commit": "c0ffee",
        "git_dirty": False,
        "versions": {"torch": "2"},
        "device": "cpu",
        "cpu": "toy",
        "threads": 1,
        "stages": {"data": {"seconds": 1.0, "finished_at": "now", "outputs": {}}},
    }
    return findings.Evidence(
        params=Params(**params),
        manifest=manifest,
        metrics={name: values | (metrics or {}).get(name, {}) for name, values in found.items()},
        curves={"ranker": pd.DataFrame(RANKER_CURVE), "ppo": ppo_curve(3)},
        protected=subspaces(),
        **tables(),
    )


# --- a whole run, through the real run folder -----------------------------------------------------------

WRITTEN_BY = {
    "data": ("interactions", "items", "users"),
    "shield": ("overlap",),
    "evaluation": ("explanations", "top10"),
}
CURVES = {"ranker": RANKER_CURVE, "shielded_ppo": ppo_curve(3).to_dict("records")}


def namespace(stage: str, **values) -> dict:
    return {name: values.get(name, getattr(Params(), name)) for name in owned_by(stage)}


@pytest.fixture
def stage(house, monkeypatch) -> runs.StageRun:
    """The report's stage, after every stage before it has finished."""
    monkeypatch.setattr(paths, "FIGURES", house.root / "figures")
    for spec in STAGES:
        house.write(spec.name, "from recrl_lib import runs")
    for spec in PIPELINE[:-1]:
        done = runs.start(spec.name, namespace(spec.name))
        for name in WRITTEN_BY.get(spec.name, ()):
            done.save_table(name, tables()[name])
        if spec.name in CURVES:
            done.curve(CURVES[spec.name])
        if spec.name == "shield":
            done.save_tensors("subspaces", to_tensors(subspaces()))
        done.metrics(OTHER_METRICS.get(spec.name) or evaluation())
        done.finish()
    yield runs.start("report", namespace("report"))
    plt.close("all")


class Page(HTMLParser):
    """Tags, ids, table captions and text of a page; fails on a tag closed out of order."""

    VOID = {"meta", "br", "img", "link", "input", "path", "use"}

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], ""
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_self_contained_escaped_and_repeatable(stage):
    there = set(findings.CAPTIONS) - {
        "sensitivity",
        "controls",
        "ablations",
    }  # the toy run has no numbers for these
    path = findings.build(stage)
    assert path == stage.folder / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == page.tags.count("figure") == len(there)
    assert page.tags.count("caption") == page.tags.count("table")
    assert (
        page.text.count("Not measured in this run") == 2 and findings.PUBLISHED in page.text
    )  # it has no frontier of its own
    assert "script" not in page.tags and HOSTILE in page.text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import""", source)
    assert {name for name in re.findall(r'(?:href="|url\()#([^")]+)', source)} <= set(page.ids)

    pictures = {p.stem: p.read_text(encoding="utf-8") for p in (paths.FIGURES / "smoke").iterdir()}
    assert set(pictures) == there
    assert (
        findings.render(findings.gather(stage), pictures) == source
    )  # the page shows the figures that were saved
    assert not plt.get_fignums()
    stage.finish()
    assert "report.html" in runs.read_manifest("smoke")["stages"]["report"]["outputs"]


def test_the_price_of_the_shield_is_a_doubt_until_a_setting_meets_the_target():
    def doubts(**settings):
        points = pd.DataFrame(
            [
                {
                    "mode": m,
                    "curve": m,
                    "gain_loss": g,
                    "gain_reward": 0.7,
                    "overlap": o,
                    "top1_same": 0.5,
                }
                for m, (g, o) in settings.items()
            ]
        )
        return [
            d.text for d in findings._doubts_about_price(replace(evidence({}), frontier=points))
        ]

    assert doubts(none=(1.0, 0.1), alora=(1.0, 1.0), update=(0.95, 0.99)) == []
    (text,) = doubts(
        none=(1.0, 0.1),
        alora=(1.0, 1.0),
        update=(0.95, 0.98),
        penalty=(0.5, 1.0),
        restart=(0.9, 0.7),
    )
    assert (
        "(update) keeps 98.0 %" in text
        and "50.0 % of the first" in text
        and "in reward it has 70.0 %" in text
    )
    (text,) = doubts(none=(1.0, 0.1), update=(0.8, 0.99))
    assert "no setting of the frontier did" in text
    assert findings._doubts_about_price(evidence({})) == []


def test_the_price_of_the_shield_is_shown_beside_its_target():
    """ "yes" asks for the whole interval; where only the mean is good enough, the table says so."""
    assert findings.price_tables(evidence({})) == []  # a run without the numbers
    names = ("top10_overlap", "overlap_held", "top1_same", "top10_set_same", "top10_exact")
    numbers = {
        f"{arm}/{name}": v
        for arm in findings.SHARED
        for name, v in zip(names, (0.99, 0.985, 0.98, 0.9, 0.5))
    }
    numbers |= {"shielded/gain_kept": 0.95, "shielded/gain_kept_lo": 0.8, "shielded/gain_kept_hi": 1.1, "shielded/top1_same_lo": 0.97,
                "shielded/top1_same_hi": 0.99, "shielded/top10_overlap_lo": 0.99, "shielded/top10_overlap_hi": 0.995}  # fmt: skip
    numbers |= {
        f"{arm}/ndcg@10_change{end}": v
        for arm in findings.SHARED
        for end, v in zip(("", "_lo", "_hi"), (-0.0004, -0.0016, 0.0002))
    }
    e = evidence({"evaluation": numbers | {"base/ndcg@10": 0.1}})
    ((_, target, source),) = findings.price_tables(e)
    assert (
        target["met"].tolist()
        == ["by its mean", "yes", "no", "by its mean", "by its mean", "no", "no"]
        and source == findings.EVALUATION
    )
    assert target["shielded"].tolist() == [
        "95.0 % [80.0 %, 110.0 %]",
        "99.0 % [99.0 %, 99.5 %]",
        "98.5 %",
        "98.0 % [97.0 %, 99.0 %]",
        "−0.4 % [−1.6 %, +0.2 %]",
        "90.0 %",
        "50.0 %",
    ]
    assert target["unshielded"].iloc[0] == "100 %"
    kept = next(
        c
        for c in findings.claims(e.evaluation)
        if c.question.startswith("How much of the reward gain")
    )
    assert kept.answer.endswith("[80.0 %, 110.0 %]")
    ends = {
        f"unshielded/reward_change{end}": v for end, v in zip(("", "_lo", "_hi"), (0.2, 0.1, 0.3))
    }
    older = (
        {k: v for k, v in e.evaluation.items() if "gain_kept" not in k}
        | ends
        | {"shielded/reward_change": 0.19}
    )
    for unshielded_lo, kept in (
        (0.1, ["100 %", "95.0 %", "yes"]),
        (-0.1, ["no gain", "no gain", "no"]),
    ):
        m = older | {"unshielded/reward_change_lo": unshielded_lo}
        ((_, target, _),) = findings.price_tables(replace(e, metrics=e.metrics | {"evaluation": m}))
        assert target.iloc[0][["unshielded", "shielded", "met"]].tolist() == kept

    cost = dict(
        build_seconds=11.0,
        gram_seconds=19.0,
        basis_mb=33.0,
        second_copy_mb=515.0,
        second_copy_adapted_mb=33.75,
        encode_seconds=19.0,
    )
    metrics = e.metrics | {
        "shield": e.metrics["shield"] | cost,
        "ppo": e.metrics["ppo"] | {"shielded/settle_seconds": 99.0},
    }
    points = frontier.summarise(frontier.published())
    _, _, unsettled = findings.price_tables(replace(e, metrics=metrics, frontier=points))
    assert not unsettled[1]["cost"].str.contains("settling").any()
    settled = e.params.replace(shield_penalty=1.0, shield_replay_steps=9)
    _, early, spent = findings.price_tables(
        replace(e, metrics=metrics, frontier=points, params=settled)
    )
    assert early[1]["top 10 kept"].iloc[0] == "100 %" and len(early[1]) == len(points)
    assert ["settling after the training", "99.0 s"] in spent[1].to_numpy().tolist() and spent[1][
        "measured"
    ].str.contains("2.2 %").any()


def test_a_run_on_other_data_is_not_given_the_published_frontier(stage, monkeypatch):
    assert findings.gather(stage).frontier_source == findings.PUBLISHED
    monkeypatch.setattr(stage, "params", stage.params.replace(dataset="csv"))
    assert findings.gather(stage).frontier is None
    own = frontier.published()
    own[own["seed"] == 0].to_csv(stage.folder / "curves" / "frontier.csv", index=False)
    e = findings.gather(stage)
    assert e.frontier_source == "curves/frontier.csv" and (e.frontier["seeds"] == 1).all()
    assert findings._elsewhere(e) == ""


def test_missing_file_is_named_with_its_remedy(stage):
    (stage.folder / "curves" / "shielded_ppo.csv").unlink()
    with pytest.raises(RuntimeError, match=r"curves/shielded_ppo.csv is missing"):
        findings.gather(stage)


def rendered(e: findings.Evidence) -> str:
    blank = '<svg viewBox="0 0 9 9"></svg>'
    return findings.render(e, dict.fromkeys(findings.CAPTIONS, blank))


def test_numbers_on_the_page_are_those_of_the_metrics_files():
    text = Page(rendered(evidence({"evaluation": {"shielded/reward": 0.7391}}))).text.replace(
        "\u00a0", " "
    )
    assert (
        "0.739 [0.700, 0.740]" in text and "95.7 %" in text and "lift 1.024 [1.012, 1.036]" in text
    )
    assert "0.7391" not in text and "0.720 [0.700" not in text


@pytest.mark.parametrize(
    "values, smoke",
    [({}, True), ({"ppo_steps": 12}, True), ({"ppo_steps": 12, "eval_users": 200}, False)],
)
def test_a_smoke_run_says_so_at_the_top(values, smoke):
    source = rendered(evidence(**values))
    assert ("proves nothing but that the code runs" in source) == smoke
    if smoke:
        assert source.index("proves nothing") < source.index("What this run shows")


# --- verdicts -------------------------------------------------------------------------------------------


def answers(**changes) -> dict[str, str]:
    return {claim.question: claim.answer for claim in findings.claims(evaluation(**changes))}


def answer(part: str, **changes) -> str:
    (found,) = (a for q, a in answers(**changes).items() if part in q)
    return found


def test_claims_of_the_toy_numbers():
    assert answer("bit-identical") == "yes"
    assert answer("without a shield move") == "yes"
    assert answer("hold the ranking") == "in part"
    assert answer("reward of held-out users (shielded)") == "yes"
    assert answer("kept under the shield") == "83.3 %"  # .10 of .12
    assert answer("exclude 1 (shielded)") == "yes, a gain"


@pytest.mark.parametrize("changes, part, expected", [
    ({"separate/scores_sha256_equal": False}, "bit-identical", "no"),
    ({"unshielded/max_abs_score_delta": 0.0}, "without a shield move", "no"),
    ({"shielded/max_abs_score_delta": 0.0}, "hold the ranking", "yes, exactly"),
    ({"shielded/top10_exact": 1.0}, "hold the ranking", "yes, every top 10 is the same"),
    ({"shielded/top10_overlap": 0.995}, "hold the ranking", "nearly"),
    ({"shielded/top10_overlap": 0.38}, "hold the ranking", "no"),
    ({"shielded/ctr_lift_lo": 0.999}, "exclude 1 (shielded)", "no"),
    ({"shielded/ctr_lift_lo": 0.9, "shielded/ctr_lift_hi": 0.99}, "exclude 1 (shielded)", "yes, a loss"),
    ({"unshielded/reward_change_lo": -0.01}, "kept under the shield", "cannot be said"),
    ({"shielded/reward_change": -0.02}, "kept under the shield", "nothing: it lost reward"),
    ({"shielded/quality_change_lo": -0.01}, "never saw, agree (shielded)", "not shown"),
    ({"shielded/quality_change_lo": -0.3, "shielded/quality_change_hi": -0.1}, "agree (shielded)", "no, it fell"),
])  # fmt: skip
def test_a_claim_follows_its_number(changes, part, expected):
    assert answer(part, **changes) == expected


def test_an_interval_that_touches_the_null_shows_nothing():
    assert findings.verdict({"a_lo": 1.0, "a_hi": 1.2}, "a", 1.0) == "undecided"
    assert findings.verdict({"a_lo": 0.8, "a_hi": 1.0}, "a", 1.0) == "undecided"


def test_summary_agrees_with_the_claims():
    text = findings.summary(evaluation())
    assert (
        "are bit-identical" in text
        and "62.0 %" in text
        and "in part: 4.3 % replaced" in text
        and "83.3 %" in text
    )
    assert "NOT identical" in findings.summary(
        evaluation(**{"separate/scores_sha256_equal": False})
    )
    none = findings.summary(evaluation(**{f"{arm}/ctr_lift_lo": 0.9 for arm in findings.TUNED}))
    assert "lies above 1 for no arm" in none


HELD = {"shielded/top10_overlap": 1.0, "shielded/top10_exact": 1.0}


def doubts(e: findings.Evidence) -> list[str]:
    return [doubt.text for doubt in findings.not_shown(e)]


def test_a_run_without_faults_still_lists_its_limits():
    texts = doubts(evidence({"evaluation": HELD}, warm_start=False))
    assert (
        len(texts) == 5
        and "another seed" in texts[0]
        and "12 held-out users were judged, which is few" in texts[2]
    )


def test_a_warm_start_shares_the_credit():
    assert any(
        "shielded 0.800 before PPO's first step, 0.900 at its last" in text
        for text in doubts(evidence())
    )
    assert not any("warm start" in text for text in doubts(evidence(warm_start=False)))


@pytest.mark.parametrize("file, changes, words", [
    ("evaluation", {"separate/scores_sha256_equal": False}, "something that must not change did"),
    ("evaluation", {"shielded/top10_overlap": 0.957}, "4.3 % of top-10 entries differ"),
    ("evaluation", {"shielded/top10_overlap": 0.995, "shielded/top10_exact": 0.9}, "10.0 % of users see another list"),
    ("evaluation", {"shielded/ndcg@10_change_hi": -0.001}, "went down"),
    ("evaluation", {"shielded/ctr_lift_lo": 0.99}, "simulated clicks (shielded)"),
    ("evaluation", {"unshielded/reward_change_lo": -0.1}, "(unshielded) raised the reward"),
    ("evaluation", {"shielded/quality_change_lo": -0.1}, "(shielded) raised the judged quality"),
    ("evaluation", {"base/own_item_retrieval@10": 0.1}, "(base) are about their own item"),
    ("evaluation", {"shielded/beats_controls": False}, "composed by rule scores as well as the tuned policy (shielded)"),
    ("ppo", {"shielded/leak": 0.03}, "0.03 of the shielded update"),
    ("ppo", {"ratio_first_minibatch_max_dev": 0.2}, "sampling and training agree"),
    ("audit", {"toxicity_p95_ok": False}, "audit failed on toxicity_p95"),
    ("ranker", {"text_free_ndcg@10": 0.068}, "much to protect"),
])  # fmt: skip
def test_each_rule_of_doubt_fires_on_its_number_alone(file, changes, words):
    quiet = doubts(evidence({"evaluation": HELD}))
    loud = doubts(
        evidence({"evaluation": HELD} | {file: (HELD if file == "evaluation" else {}) | changes})
    )
    (new,) = set(loud) - set(quiet)
    assert words in new


@pytest.mark.parametrize(
    "manifest", [{"git_dirty": True}, {"git_dirty": None}, {"git_commit": None}]
)
def test_a_tree_that_is_not_its_commit_is_a_doubt(manifest):
    e = evidence()
    assert not any("commit" in text for text in doubts(e))
    assert any("commit" in text for text in doubts(replace(e, manifest=e.manifest | manifest)))


# --- pieces -----------------------------------------------------------------------------------------------


def test_chosen_users_by_hand(monkeypatch):
    monkeypatch.setattr(findings, "PERCENTILES", (10, 50, 90))
    gains = [
        0.5,
        0.1,
        0.2,
        0.3,
        0.4,
        0.0,
        0.6,
        0.7,
        0.8,
        0.9,
        1.0,
    ]  # percentiles 10, 50, 90 are .1, .5, .9
    frame = pd.concat(
        [
            pd.DataFrame({"arm": "base", "user": range(11), "quality": 0.0}),
            pd.DataFrame({"arm": "shielded", "user": range(11), "quality": gains}),
        ]
    )
    assert findings.chosen_users(frame) == [(10, 1), (50, 0), (90, 9)]
    same = frame.assign(quality=0.5)
    assert findings.chosen_users(same) == [
        (10, 0),
        (50, 1),
        (90, 2),
    ]  # ties: lowest number, nobody twice


def test_twelve_users_are_chosen():
    assert (
        len(findings.PERCENTILES) == 12
        and len({e["user"] for e in findings.examples(evidence())}) == 12
    )


def test_marked_escapes_and_marks():
    assert findings.marked("a <b> Heat", [(6, 10, True)]) == (
        'a &lt;b&gt; <mark class="true" title="true by the metadata">Heat</mark>'
    )
    assert findings.marked("<i>", [(0, 3, False)]).count("<") == 2 and findings.marked("", []) == ""


def more_evaluation() -> dict:
    """What a run of today adds to ``evaluation()``: controls, judge, gains, tests, detectable effects."""
    found = {
        f"{a}/{m}": 0.3
        for a in ("control_empty", "control_copied_prompt", "reference")
        for m in ("reward", "quality", "ctr_lift")
    }
    for arm in (*results.TEXT_ARMS, "reference"):
        found |= {
            f"{arm}/{results.NAMES.get(m, m)}": 0.5
            for m in (*results.JUDGED, "fcr", "div", "distinct_1", "distinct_2", "usr")
        }
        found |= {f"{arm}/control_users_{m}": 0.6 for m in ("reward", "quality", "ctr_lift")}
    for arm in findings.SHARED:
        for what in ("by_ppo", "new_items", "seen_items"):
            found |= {
                f"{arm}/{m}_{what}{end}": 0.2
                for m in ("reward", "quality", "ctr_lift")
                for end in ("", "_lo", "_hi")
            }
            found[f"{arm}/users_{what}"] = 20.0
        for control in ("control_empty", "control_copied_prompt"):
            found |= {
                f"{arm}/{m}_over_{control}{end}": 1.5
                for m in ("reward", "clicks")
                for end in ("", "_lo", "_hi")
            }
        found |= {
            f"{arm}/lift_lowest": 1.01,
            f"{arm}/lift_highest": 1.2,
            f"{arm}/lift_sign_survives": True,
        }
        found |= {
            f"{arm}/{m}_{p}": 0.04
            for m in ("reward", "quality", "click", "ndcg")
            for p in ("p", "p_holm")
        }
    found["users_controls"] = 20.0
    found |= {
        f"mde/{profile}/{m}": 0.02
        for profile in PROFILES
        for m in ("reward", "quality", "ctr_lift")
    }
    return evaluation(**found, eval_users=24)


def test_a_full_run_shows_its_measures_and_answers_more_questions():
    m = more_evaluation()
    shown = findings.evidence_tables(m)
    assert len(shown) == 5 and findings.evidence_tables(evaluation()) == []
    assert all(isinstance(cell, str) for _, frame in shown for cell in frame.to_numpy().ravel())
    extra = {c.question: c.answer for c in findings.claims(m)[len(findings.claims(evaluation())) :]}
    assert len(extra) == 8 and all(answer == "yes" for answer in extra.values())
    few = findings.claims(m | {"shielded/users_by_ppo": 1.0})
    assert [c.answer for c in few if c.answer.startswith("too few")] == ["too few users to say"]
    fooled = findings.claims(
        m | {f"{arm}/reward_over_control_empty_lo": 0.0 for arm in findings.SHARED}
    )
    asked = [(c.answer, c.evidence) for c in fooled if c.question.startswith("Do all texts")]
    assert asked == [("not shown", "not below it by a whole interval: empty, users: 20")] * 2
    assert "too few users to say" in [
        c.answer
        for c in findings.claims(m | {"users_controls": 6.0})
        if c.question.startswith("Do all texts")
    ]
    assert not any(
        "gain is PPO's" in d.text for d in findings.not_shown(evidence({"evaluation": m}))
    )
    page = findings.render(evidence({"evaluation": m}), {})
    assert "The measures themselves" in page and "<figure>" not in page


def test_examples_show_the_history_of_the_prompt():
    e = evidence()
    example = findings.examples(e)[0]
    seen = e.interactions[e.interactions["user"] == example["user"]]["item"].tolist()
    assert example["history"] == [f"Film {i}" for i in seen[-6:-1]]  # five, the test item left out
    assert [t["arm"] for t in example["texts"]] == ["base", "unshielded", "shielded"]
    assert (
        example["film"] == f"Film {example['user'] + 1} (1994)"
        and example["genres"] == "Drama, Comedy"
    )


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0 %"), (1.0, "100 %"), (0.9999, "> 99.9 %"), (0.0001, "< 0.1 %"), (0.125, "12.5 %")],
)
def test_share_never_rounds_to_all_or_nothing(value, text):
    assert findings.share(value) == text


@pytest.mark.parametrize(
    "value, text", [(0.12345, "0.123"), (-0.5, "−0.500"), (-0.0, "0.000"), (0.00004, "4.0e−05")]
)
def test_number_never_reads_as_zero_unless_it_is(value, text):
    assert findings.number(value) == text


def test_headline_has_a_row_an_arm_and_an_interval_where_there_is_one():
    table = findings.headline(evaluation()).set_index("arm")
    assert table.index.tolist() == list(ARMS)
    assert table.loc["base", "CTR lift"] == "1 (reference)"
    assert table.loc["shielded", "NDCG@10"] == "0.0688 [0.0588, 0.0798]"
    broken = evaluation()
    del broken["shielded/kl"]
    with pytest.raises(ValueError, match=r"lacks 'shielded/kl': run the notebook"):
        findings.headline(broken)


def test_audit_table_shows_thresholds_and_failures():
    table = findings.audit_table(
        OTHER_METRICS["audit"] | {"parity_gap": 0.2, "parity_gap_ok": False}
    ).set_index("measure")
    assert (
        table.loc["parity_gap", "verdict"] == "FAIL"
        and table.loc["parity_gap", "passes if"] == "at most 0.1"
    )
    assert (
        table.loc["gini_base", "verdict"] == "shown only"
        and table.loc["toxicity_mean", "verdict"] == "pass"
    )


def test_parameter_table_marks_what_differs_from_smoke():
    table = findings.parameter_table(Params(ppo_steps=7)).set_index("parameter")
    assert table.index[table["changed"]].tolist() == ["ppo_steps"]
    assert (
        table.loc["ppo_steps", "stage"] == "shielded_ppo" and table.loc["seed", "stage"] == "common"
    )
    assert table["stage"].notna().all() and len(table) == len(names_params())


def test_inline_svg_keeps_two_documents_apart():
    doc = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg width="9pt" height="9pt" viewBox="0 0 9 9"><metadata>m</metadata>'
        '<path id="a" clip-path="url(#b)"/><use xlink:href="#a"/></svg>'
    )
    out = str(findings.inline_svg(doc, "one", 'a "label"'))
    assert 'id="one-a"' in out and "url(#one-b)" in out and 'xlink:href="#one-a"' in out
    assert "metadata" not in out and "xml" not in out and 'width="9pt"' not in out
    assert html.unescape(re.search('aria-label="(.*?)"', out)[1]) == 'a "label"'
