"""Figures drawn from small tables: what they show, that they are readable without colour, and stable bytes."""

import io
import re
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from recrl_lib import paths, plots

ARMS = ("base", "separate", "unshielded", "shielded")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def interactions_and_items(
    n_users: int = 60, n_items: int = 80
) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(n_users), rng.integers(5, 60, n_users))
    item = np.minimum(rng.zipf(1.4, len(user)), n_items)
    genres = ["Drama", "Comedy|Romance", "Sci-Fi|Action", "", "Film-Noir|Drama"]
    items = pd.DataFrame(
        {"item": np.arange(1, n_items + 1), "genres": [genres[i % 5] for i in range(n_items)]}
    )
    return pd.DataFrame({"user": user, "item": item, "time": np.arange(len(user))}), items


def evaluation() -> dict[str, float]:
    numbers = {  # reward, lift, NDCG, overlap, same set, exact
        "base": (0.62, 1.0, 0.0691, 1.0, 1.0, 1.0),
        "separate": (0.74, 1.031, 0.0691, 1.0, 1.0, 1.0),
        "unshielded": (0.74, 1.031, 0.0312, 0.38, 0.01, 0.0),
        "shielded": (0.72, 1.024, 0.0688, 0.957, 0.71, 0.33),
    }
    out = {}
    for arm, (reward, lift, ndcg, overlap, same, exact) in numbers.items():
        wide = 0.0 if arm == "base" else 0.012
        out |= {
            f"{arm}/reward": reward,
            f"{arm}/reward_lo": reward - 0.02,
            f"{arm}/reward_hi": reward + 0.02,
            f"{arm}/ctr_lift": lift,
            f"{arm}/ctr_lift_lo": lift - wide,
            f"{arm}/ctr_lift_hi": lift + wide,
            f"{arm}/ndcg@10": ndcg,
            f"{arm}/ndcg@10_lo": ndcg - 0.01,
            f"{arm}/ndcg@10_hi": ndcg + 0.011,
            f"{arm}/top10_overlap": overlap,
            f"{arm}/top10_set_same": same,
            f"{arm}/top10_exact": exact,
        }
    return out


def ppo_curve(steps: int = 12) -> pd.DataFrame:
    rng, rows = np.random.default_rng(1), []
    for arm in ("unshielded", "shielded"):
        for step in range(1, steps + 1):
            rows.append(
                {
                    "arm": arm,
                    "step": step,
                    "reward": 0.6 + 0.01 * step + rng.normal(0, 0.01),
                    "score": 0.5 + 0.01 * step,
                    "kl": 0.05 * step**1.5,
                    "length": 30 + rng.normal(),
                    "clip_fraction": 0.02 + 0.01 * rng.random(),
                    "eos_rate": 0.5 + 0.02 * step,
                    "entropy": 1.2 - 0.05 * step,
                    "explained_variance": -20 / step,
                    "step_seconds": 9 + rng.random(),
                    "shield_seconds": 0.2 if arm == "shielded" else 0.0,
                }
            )
    return pd.DataFrame(rows)


def explanations(n: int = 30) -> pd.DataFrame:
    rng, parts = np.random.default_rng(2), []
    for arm, gain in (("base", 0.0), ("unshielded", 0.2), ("shielded", 0.15)):
        parts.append(
            pd.DataFrame(
                {
                    "arm": arm,
                    **{
                        c: rng.uniform(0.3, 0.6, n) + gain
                        for c in (
                            "reward",
                            "reward_length",
                            "reward_relevance",
                            "reward_coherence",
                            "quality",
                        )
                    },
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def subspaces(layers=range(20, 30), width: int = 64) -> dict[str, SimpleNamespace]:
    spectrum = 0.7 ** np.arange(width)
    return {
        f"{n}.{kind}": SimpleNamespace(
            spectrum=spectrum ** (1 + 0.02 * n), rank=6 + n % 5, width=width
        )
        for n in layers
        for kind in ("attention", "output")
    }


def overlap() -> pd.DataFrame:
    names = [f"{n}.{kind}" for n in range(20, 30) for kind in ("attention", "output")]
    return pd.DataFrame(
        {
            "input": names,
            "rank": 128,
            "width": 576,
            "energy": 0.99,
            "overlap": np.linspace(0.7, 0.95, len(names)),
        }
    )


def rankers() -> list[dict]:
    return [
        {"name": n, "ndcg": v, "lo": v - 0.01, "hi": v + 0.01}
        for n, v in (("popularity", 0.044), ("Markov chain", 0.077), ("SASRec", 0.071))
    ]


def tops() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return tuple(np.minimum(rng.zipf(a, (40, 10)), 80) for a in (1.3, 1.4))


def ideas() -> pd.DataFrame:
    measures = [
        f"{m}{end}" for m in ("gain_loss", "overlap", "overlap_held") for end in ("_lo", "", "_hi")
    ]
    return pd.DataFrame(
        [("replay", 3, *np.linspace(-0.02, 0.02, 9)), ("few inputs", 1, *[0.01] * 9)],
        columns=["idea", "seeds", *measures],
    )


def frontier_points() -> pd.DataFrame:
    rows = [
        ("no shield, stopped early", 20, 0.0, 0.99, 0.1, 1.0),
        ("no shield, stopped early", 5, 0.0, 0.99, 0.5, 0.4),
    ]
    rows += [("update, contrastive", 20, 0.0, e, 0.9 + e / 10, 1.9 - e) for e in (0.99, 0.999)] + [
        ("alora", 20, 0.0, 0.99, 1.0, 0.6)
    ]
    table = pd.DataFrame(
        rows, columns=["curve", "steps", "penalty", "energy", "overlap", "gain_loss"]
    ).assign(rank=0)
    table["gain_reward"] = table["gain_loss"] ** 2
    for name in ("overlap", "gain_loss", "gain_reward"):
        table[f"{name}_lo"], table[f"{name}_hi"] = table[name] - 0.02, table[name] + 0.02
    return table


def foretold() -> tuple[pd.DataFrame, dict]:
    rows = [
        ("update, activation", 0.9, 0.1, 0.9, 0.05),
        ("update, activation", 0.95, 0.01, 0.8, 0.02),
        ("update, contrastive", 0.7, 0.05, 1.0, 0.03),
    ]
    table = pd.DataFrame(
        rows, columns=["curve", "explanations_inside", "items_outside", "gain_loss", "lost"]
    )
    return table, {"learning": (-0.9, -1.0, -0.5), "ranking": (0.8, 0.3, 0.9)}


def every_figure(steps: int = 12) -> dict:
    interactions, items = interactions_and_items()
    training = [
        {"epoch": e, "loss": 7 - 0.1 * e, "valid_ndcg@10": 0.08 - 0.001 * (e - 8) ** 2}
        for e in range(1, 13)
    ]
    rows = [
        {"name": "no shield", "value": 0.21, "lo": 0.2, "hi": 0.23},
        {"name": "a shield with a long name", "value": 0.013},
    ]
    return {
        "data_overview": plots.data_overview(interactions, items),
        "ranker_training": plots.ranker_training(training),
        "ranker_comparison": plots.ranker_comparison(rankers()),
        "ranker_spread": plots.ranker_spread(
            {"with text": [0.1, 0.11], "plain": [0.1]}, {"EASE^R": 0.097, "Markov chain": 0.077}
        ),
        "spectrum": plots.spectrum(subspaces()),
        "overlap_by_layer": plots.overlap_by_layer(overlap()),
        "one_layer": plots.one_layer(),
        "frontier": plots.frontier(frontier_points()),
        "ideas": plots.ideas(ideas()),
        "foretold": plots.foretold(*foretold()),
        "bars": plots.bars(rows, "relative change", "What a few steps do", reference=0.1),
        "ppo_curves": plots.ppo_curves(ppo_curve(steps)),
        "ppo_statistics": plots.ppo_statistics(ppo_curve(steps), {"score": "reward"}),
        "reward_parts": plots.reward_parts(explanations()),
        "ctr_lift": plots.ctr_lift(evaluation(), ceiling=1.245),
        "ranking_moved": plots.ranking_moved(evaluation()),
        "tradeoff": plots.tradeoff(evaluation()),
        "ablations": plots.ablations(ablation_rows()),
        "recommendation_concentration": plots.recommendation_concentration(*tops(), 80),
    }


def ablation_rows():
    reward = {"reward": 0.9, "reward_lo": 0.85, "reward_hi": 0.95}
    arms = ("main", "no_projection", "kl0", "lora4", "long_expl", "more_steps", "low_lr", "rloo")
    return pd.DataFrame(
        [
            {"arm": a, **reward, "kl": k, "kl_lo": k - 0.5, "kl_hi": k + 0.5, "top10_overlap": 0.9}
            for k, a in enumerate(arms, 1)
        ]
    )


def test_ablations_show_every_arm_in_both_panels():
    for ax in plots.ablations(ablation_rows()).axes:
        assert [t.get_text() for t in ax.texts] == ablation_rows()["arm"].tolist()
    with pytest.raises(ValueError, match="no column reward_lo"):
        plots.ablations(ablation_rows().drop(columns="reward_lo"))


def test_every_figure_is_labelled_and_small_in_a_notebook():
    for name, fig in every_figure(steps=2).items():  # what notebooks store is the smoke profile
        for ax in fig.axes:
            assert ax.get_title() or len(fig.axes) == 1, name
            ticked = [t.get_text() for t in ax.get_xticklabels()]
            assert (
                ax.get_xlabel()
                or any(re.search("[a-z]", t) for t in ticked)
                or ax.get_subplotspec().rowspan.stop < 2
            ), name
        png = io.BytesIO()
        fig.savefig(png, format="png", bbox_inches="tight")
        assert png.tell() < 75_000, f"{name}: {png.tell()} bytes"


def test_equal_numbers_give_equal_bytes_and_other_numbers_do_not():
    first, again = plots.svg(plots.tradeoff(evaluation())), plots.svg(plots.tradeoff(evaluation()))
    moved = plots.svg(plots.tradeoff(evaluation() | {"shielded/reward": 0.5}))
    assert first == again != moved
    assert "<dc:date>" not in first
    hatched = [
        plots.svg(plots.bars([{"name": "shielded", "value": 1.0}], "y", "t")) for _ in range(2)
    ]
    assert hatched[0] == hatched[1] and "url(#" in hatched[0]  # hatches and clips have ids


def test_arms_differ_in_marker_line_and_hatch_not_only_in_colour():
    for part in ("colour", "marker", "line", "hatch"):
        assert len({getattr(look, part) for look in plots.LOOKS.values()}) == len(ARMS)
    lines = {line.get_label(): line for line in plots.ppo_curves(ppo_curve()).axes[0].get_lines()}
    a, b = lines["unshielded"], lines["shielded"]
    assert (a.get_linestyle(), a.get_marker()) != (b.get_linestyle(), b.get_marker())


def test_between_them_the_two_figures_draw_every_statistic_of_a_step():
    curve = pd.DataFrame(ppo_curve()).assign(kl_coef=0.02, never_logged=np.nan)
    main, rest = plots.ppo_curves(curve), plots.ppo_statistics(curve, {"kl_coef": "reward per nat"})
    titles = [ax.get_title() for ax in rest.axes]
    assert len(main.axes) + len(titles) == len(curve.columns) - len(
        ["arm", "step", "shield_seconds", "never_logged"]
    )
    assert titles == ["score", "kl_coef"]
    panel = rest.axes[titles.index("kl_coef")]
    assert panel.get_ylabel() == "reward per nat" and [
        line.get_label() for line in panel.get_lines()
    ] == ["unshielded", "shielded"]


def test_genre_shares_by_hand():
    items = pd.DataFrame({"item": [1, 2, 3, 4], "genres": ["A|B", "B", "", "C"]})
    interactions = pd.DataFrame({"user": [0, 0, 1, 1], "item": [1, 2, 2, 3]})
    table = plots.genre_shares(interactions, items)
    assert table.index.tolist() == ["B", "A", "C"]
    assert table["items"].tolist() == [0.5, 0.25, 0.25] and table["ratings"].tolist() == [
        0.75,
        0.25,
        0.0,
    ]


def test_outside_energy_by_hand_and_without_rounding_noise():
    assert plots.outside_energy([3.0, 1.0]).tolist() == [1.0, 0.25, 0.0]
    tiny = plots.outside_energy([1.0, 1e-20])  # 1 - cumsum would say 0
    assert tiny[1] == pytest.approx(1e-20)


def test_spectrum_marks_the_chosen_rank():
    spaces = {
        "3.attention": SimpleNamespace(spectrum=np.array([8.0, 4.0, 2.0, 2.0]), rank=2, width=4)
    }
    dot = plots.spectrum(spaces).axes[0].get_lines()[-1]
    assert dot.get_xydata().tolist() == [[2.0, 0.25]]


def test_ctr_lift_draws_the_interval_and_leaves_the_base_out():
    ax = plots.ctr_lift(evaluation()).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["separate", "unshielded", "shielded"]
    ends = ax.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert ends == pytest.approx([1.019, 1.043])


def test_an_interval_that_misses_its_value_is_still_drawn():
    plots.bars(
        [{"name": "a", "value": 1.0, "lo": 1.1, "hi": 1.2}], "y", "t"
    )  # matplotlib refuses negative lengths


def test_ranker_training_marks_the_best_epoch():
    curve = [
        {"epoch": e, "loss": 1.0, "valid_ndcg@10": v} for e, v in ((1, 0.1), (2, 0.3), (3, 0.2))
    ]
    assert (
        plots.ranker_training(curve).axes[1].get_legend().get_texts()[0].get_text()
        == "best: epoch 2"
    )


@pytest.mark.parametrize(
    "share, text", [(1.0, "100"), (0.0, "0"), (0.997, "99.7"), (0.0004, "0.0"), (0.5, "50")]
)
def test_percent_never_rounds_to_all_or_nothing(share, text):
    assert plots._percent(share) == text


def test_missing_input_is_named_with_its_remedy():
    broken = evaluation()
    del broken["shielded/ctr_lift_hi"]
    with pytest.raises(
        ValueError, match=r"evaluation.json lacks 'shielded/ctr_lift_hi': run notebooks/06"
    ):
        plots.ctr_lift(broken)
    with pytest.raises(ValueError, match="curves/shielded_ppo.csv: no column kl"):
        plots.ppo_curves(ppo_curve().drop(columns="kl"))
    with pytest.raises(ValueError, match="no rows"):
        plots.reward_parts(explanations().iloc[:0])
    with pytest.raises(ValueError, match="no rows"):
        plots.bars([], "y", "t")


def test_save_writes_the_svg_below_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    fig = plots.bars([{"name": "a", "value": 1.0}], "y", "t")
    path = plots.save(fig, "toy", "bars")
    assert path == tmp_path / "toy" / "bars.svg" and path.read_text(encoding="utf-8") == plots.svg(
        fig
    )
    assert [p.name for p in path.parent.iterdir()] == ["bars.svg"]


def test_sensitivity_outlines_what_changes_sign():
    rows = [
        {
            "arm": "shielded",
            "first": a,
            "second": b,
            "first_factor": f,
            "second_factor": g,
            "lift": 0.97 if f == g == 2 else 1.1,
        }
        for a, b in (("alpha", "beta"), ("beta", "user_std"))
        for f in (0.5, 2)
        for g in (0.5, 2)
    ]
    fig = plots.sensitivity(pd.DataFrame(rows))
    assert [len(ax.texts) for ax in fig.axes] == [4, 4]
    assert [sum(t.get_bbox_patch() is not None for t in ax.texts) for ax in fig.axes] == [1, 1]
    with pytest.raises(ValueError, match="lift"):
        plots.sensitivity(pd.DataFrame([{"arm": "shielded"}]))


def test_controls_are_shown_below_the_line():
    found = {
        f"{a}/{m}": 0.4
        for a in ("control_empty", "control_keywords", "reference")
        for m in ("reward", "quality", "ctr_lift")
    }
    fig = plots.controls(
        found | {f"shielded/control_users_{m}": 0.8 for m in ("reward", "quality", "ctr_lift")}
    )
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [
        "empty",
        "keywords",
        "reference",
    ]
    with pytest.raises(ValueError, match="no controls"):
        plots.controls({})
