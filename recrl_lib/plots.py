"""Every figure of the study, in one style, readable without colour.

Each arm has its own colour (a colour-blind-safe palette), marker, line style and hatch, the same in all
figures. Functions take tables or a flat dict of metrics and return a ``Figure`` sized for a notebook;
they compute nothing that a table should hold. SVG files carry no date and no random ids, so equal
numbers give equal bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    ScalarFormatter,
)

from recrl_lib import paths
from recrl_lib.runs import write_atomic


class Look(NamedTuple):
    colour: str
    marker: str
    line: str
    hatch: str


_PALETTE = sns.color_palette("colorblind").as_hex()
LOOKS = {
    "base": Look(_PALETTE[7], "s", ":", ""),
    "separate": Look(_PALETTE[0], "^", "-.", "//"),
    "unshielded": Look(_PALETTE[3], "X", "--", "\\\\"),
    "shielded": Look(_PALETTE[2], "o", "-", "xx"),
}
_OTHERS = [
    Look(_PALETTE[i], m, s, h)
    for i, m, s, h in (
        (0, "o", "-", ""),
        (1, "s", "--", "//"),
        (4, "D", "-.", ".."),
        (8, "v", ":", "\\\\"),
        (9, "P", "-", "++"),
    )
]
STYLE = {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.framealpha": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "shielded-recrl",  # else the ids in an SVG are random
    "svg.fonttype": "none",  # text stays text: small files, searchable, read aloud
}


def style() -> None:
    """Set the study's style; every figure function does so itself, a notebook does for figures of its own."""
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", rc=STYLE)


def plain(text: str) -> str:
    """``text`` as matplotlib shows it literally: it would read dollar signs as a formula's ends."""
    return text.replace("$", r"\$")


def dot(arm: str) -> dict[str, str]:
    """Colour and marker of an arm, as keywords of ``Axes.errorbar``."""
    return {"color": LOOKS[arm].colour, "fmt": LOOKS[arm].marker}


def bar(arm: str) -> dict[str, str]:
    """Colour and hatch of an arm's bars, as keywords of ``Axes.bar``."""
    return {"facecolor": LOOKS[arm].colour, "hatch": LOOKS[arm].hatch}


def save(fig: Figure, run: str, name: str, alt: str) -> Image:
    """Write ``figures/<run>/<name>.svg`` and return the figure as an image with alternative text.

    Equal numbers give an equal SVG file: it carries no date and no random ids.
    """
    drawn, shown = io.StringIO(), io.BytesIO()
    with mpl.rc_context({key: STYLE[key] for key in ("svg.hashsalt", "svg.fonttype")}):
        fig.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Title": alt})
    fig.savefig(shown, format="png", dpi=120)
    plt.close(fig)  # or a notebook would show it a second time
    write_atomic(paths.FIGURES / run / f"{name}.svg", drawn.getvalue())
    return Image(shown.getvalue(), alt=alt)


def _axes(rows: int, columns: int, width: float, height: float, **kwargs) -> tuple[Figure, Any]:
    style()
    return plt.subplots(rows, columns, figsize=(width, height), **kwargs)


def _looks(names: Sequence[str]) -> list[Look]:
    """The arms' own looks; anything else takes the others in turn."""
    free = iter(range(len(names)))
    return [LOOKS[n] if n in LOOKS else _OTHERS[next(free) % len(_OTHERS)] for n in names]


def _columns(table: pd.DataFrame, name: str, *needed: str) -> pd.DataFrame:
    table = pd.DataFrame(table)
    if missing := [c for c in needed if c not in table]:
        raise ValueError(
            f"{name}: no column {', '.join(missing)}; run the notebook that writes this table again"
        )
    if table.empty:
        raise ValueError(f"{name}: no rows to draw; run the notebook that writes this table again")
    return table


def _errors(value: float, lo: float | None, hi: float | None) -> np.ndarray | None:
    """Lengths (2, 1) below and above ``value``; percentile intervals need not contain it, lengths are >= 0."""
    return None if lo is None or hi is None else np.maximum([[value - lo], [hi - value]], 0.0)


def _whole_ticks(axis: mpl.axis.Axis) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, nbins="auto"))


def _dots(ax: Axes, rows: Sequence[Mapping[str, Any]], value: str, xlabel: str) -> None:
    """One horizontal dot with interval a row (name, ``value``, lo, hi), first row on top."""
    for y, (row, look) in enumerate(zip(rows, _looks([r["name"] for r in rows]))):
        ax.errorbar(
            row[value],
            y,
            xerr=_errors(row[value], row.get("lo"), row.get("hi")),
            fmt=look.marker,
            color=look.colour,
            capsize=4,
            markersize=8,
        )
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(xlabel)
    ax.grid(axis="y", visible=False)


def _bars(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    ylabel: str,
    reference: float | None,
    digits: int = 3,
) -> None:
    for x, (row, look) in enumerate(zip(rows, _looks([r["name"] for r in rows]))):
        ax.bar(
            x,
            row["value"],
            0.6,
            color=look.colour,
            hatch=look.hatch,
            edgecolor="black",
            linewidth=0.8,
            yerr=_errors(row["value"], row.get("lo"), row.get("hi")),
            capsize=4,
        )
        ax.annotate(
            f"{row['value']:.{digits}g}",
            (x, max(row["value"], row.get("hi") or row["value"], 0)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    if reference is not None:
        ax.axhline(reference, color="black", linestyle="--", linewidth=1)
    ax.margins(y=0.12)
    ax.set_xticks(range(len(rows)), [textwrap.fill(str(row["name"]), 16) for row in rows])
    ax.set_ylabel(ylabel)
    ax.grid(axis="x", visible=False)


def bars(
    rows: Sequence[Mapping[str, Any]], ylabel: str, title: str, reference: float | None = None
) -> Figure:
    """One bar a row: name, value and, where given, the ends lo and hi of an interval.

    ``reference``: a dashed line, for example at chance.
    """
    if not rows:
        raise ValueError("bars: no rows to draw")
    fig, ax = _axes(1, 1, max(4.5, 1.3 * len(rows)), 3.4)
    _bars(ax, rows, ylabel, reference)
    ax.set_title(title)
    return fig


# --- 01 data, 02 ranker -----------------------------------------------------------------------------


def data_overview(interactions: pd.DataFrame, items: pd.DataFrame) -> Figure:
    """Popularity curve, history lengths, and each genre's share of items beside its share of ratings.

    An item of several genres counts in each.
    """
    interactions = _columns(interactions, "interactions", "user", "item")
    fig, (popularity, length, genre) = _axes(1, 3, 11, 3.8, width_ratios=(1, 1, 1.3))
    counts = interactions["item"].value_counts().to_numpy()
    popularity.loglog(np.arange(1, len(counts) + 1), counts, color=_PALETTE[0])
    popularity.set(title="Popularity", xlabel="item, by rank of popularity", ylabel="ratings")

    lengths = interactions["user"].value_counts().to_numpy()
    length.hist(
        lengths,
        bins=np.geomspace(lengths.min(), lengths.max() + 1, 25),
        color=_PALETTE[0],
        edgecolor="black",
    )
    length.axvline(
        np.median(lengths), color="black", linestyle="--", label=f"median {np.median(lengths):g}"
    )
    length.set(title="History length", xlabel="ratings of a user", ylabel="users", xscale="log")
    length.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    length.xaxis.set_major_formatter(ScalarFormatter())
    length.xaxis.set_minor_formatter(NullFormatter())
    length.legend()

    shares = genre_shares(interactions, items)
    y = np.arange(len(shares))
    genre.barh(
        y - 0.2,
        shares["items"],
        0.4,
        color=_PALETTE[7],
        edgecolor="black",
        linewidth=0.5,
        label="of items",
    )
    genre.barh(
        y + 0.2,
        shares["ratings"],
        0.4,
        color=_PALETTE[0],
        edgecolor="black",
        linewidth=0.5,
        hatch="///",
        label="of ratings",
    )
    genre.set_yticks(y, shares.index, fontsize=8)
    genre.set_ylim(len(shares) - 0.4, -0.6)
    genre.set(title="Genres", xlabel="share")
    genre.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    genre.grid(axis="y", visible=False)
    genre.legend(loc="lower right")
    return fig


def genre_shares(interactions: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Share of items and of ratings of each genre (columns items, ratings), largest share of ratings first."""
    pairs = items[["item", "genres"]].assign(genre=items["genres"].str.split("|")).explode("genre")
    pairs = pairs[pairs["genre"].fillna("") != ""]
    rated = interactions["item"].value_counts()
    among = pairs["genre"].value_counts() / len(items)
    ratings = pairs["item"].map(rated).fillna(0).groupby(pairs["genre"]).sum() / len(interactions)
    table = pd.DataFrame({"items": among, "ratings": ratings}).rename_axis("genre").reset_index()
    return table.sort_values(["ratings", "genre"], ascending=[False, True]).set_index("genre")


# --- 04 shield ---------------------------------------------------------------------------------------


def outside_energy(spectrum: Sequence[float]) -> np.ndarray:
    """Share (d + 1,) of the trace outside the top k eigenvectors, for k = 0..d, from eigenvalues, largest first."""
    values = np.asarray(spectrum, np.float64)
    tail = values[::-1].cumsum()[
        ::-1
    ]  # summed from the small end: 1 - cumsum would drown in rounding
    return np.append(tail, 0.0) / tail[0]


def _layer(name: str) -> tuple[int, str]:
    number, _, kind = name.partition(".")
    return int(number), kind


def spectrum(protected: Mapping[str, Any]) -> Figure:
    """Energy left outside the top k directions against k, a line a layer, a dot at the k that the shield protects.

    ``protected``: ``{"<layer>.<attention|output>": shield.Subspace}``.
    """
    kinds = sorted({_layer(name)[1] for name in protected})
    fig, axes = _axes(1, len(kinds), 4.8 * len(kinds), 3.8, sharey=True, squeeze=False)
    numbers = sorted({_layer(name)[0] for name in protected})
    colours = sns.color_palette("viridis", len(numbers)).as_hex()
    named = {numbers[i] for i in np.linspace(0, len(numbers) - 1, 6).round().astype(int)}
    lines = ("-", "--", "-.", ":")
    for ax, kind in zip(axes[0], kinds):
        for i, number in enumerate(numbers):
            if (space := protected.get(f"{number}.{kind}")) is None:
                continue
            left = outside_energy(space.spectrum)[: space.width]
            k = np.unique(
                np.r_[0:8, np.linspace(0, space.width - 1, 60).astype(int)].clip(
                    max=space.width - 1
                )
            )
            ax.plot(
                k,
                left[k],
                lines[i % 4],
                color=colours[i],
                linewidth=1.3,
                label=number if number in named else None,
            )
            ax.plot(
                space.rank,
                max(left[min(space.rank, space.width - 1)], 1e-12),
                "o",
                color=colours[i],
                markeredgecolor="black",
            )
        ax.set(title=f"{kind} input", xlabel="protected directions k", yscale="log")
        ax.set_ylim(1e-7, 1.5)
        ax.legend(title="layer", ncols=2, loc="upper right")
    axes[0, 0].set_ylabel("share of energy outside")
    fig.suptitle(
        "What item texts leave outside the protected directions (dot: where the shield stops)"
    )
    return fig


def one_layer() -> Figure:
    """A drawing, not data: inputs of one layer in two of its dimensions, and a row of A before and after it is projected off Q."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(40, 2)) * (1.0, 0.06)
    said = rng.normal(size=(40, 2)) * (0.8, 0.5)
    fig, axes = _axes(1, 2, 9, 3.4, sharex=True, sharey=True)
    for ax, row, title in zip(
        axes,
        ((0.9, 1.1), (0.0, 1.1)),
        ("A row a of A, as tuning leaves it", "The same row off Q: a − (a·Q)Qᵀ"),
    ):
        ax.axhline(0, color="black", linewidth=0.8, linestyle="--")
        ax.text(2.35, 0.1, "Q", fontsize=11)
        ax.scatter(
            *items.T,
            s=16,
            marker="s",
            color=_PALETTE[0],
            label="inputs of item texts: along Q, nearly",
        )
        ax.scatter(
            *said.T,
            s=20,
            marker="^",
            facecolors="none",
            edgecolors=_PALETTE[1],
            label="inputs of explanations: everywhere",
        )
        ax.annotate(
            "", row, (0, 0), arrowprops={"arrowstyle": "-|>", "linewidth": 2, "color": "black"}
        )
        ax.text(row[0] + 0.1, row[1], "a", fontsize=11)
        ax.set(
            title=title,
            xlim=(-2.5, 2.7),
            ylim=(-1.5, 1.6),
            xlabel="a direction in Q",
            ylabel="a direction outside Q",
        )
        ax.set_aspect("equal")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.suptitle("What a row hears of an input x is a·x (a drawing, without units)")
    return fig


def overlap_by_layer(table: pd.DataFrame) -> Figure:
    """Share of the prompts' energy inside the protected subspace, beside what as many random directions would hold."""
    table = _columns(table, "overlap", "input", "rank", "width", "overlap")
    table = table.assign(
        layer=[_layer(n)[0] for n in table["input"]], kind=[_layer(n)[1] for n in table["input"]]
    )
    kinds = sorted(table["kind"].unique())
    fig, axes = _axes(1, len(kinds), 4.8 * len(kinds), 3.2, sharey=True, squeeze=False)
    for ax, kind in zip(axes[0], kinds):
        part = table[table["kind"] == kind].sort_values("layer")
        ax.plot(
            part["layer"], part["overlap"], "o-", color=_PALETTE[3], label="prompts' energy held"
        )
        ax.plot(
            part["layer"],
            part["rank"] / part["width"],
            "s:",
            color=_PALETTE[7],
            label="random subspace of that size",
        )
        ax.set(title=f"{kind} input", xlabel="layer", ylim=(0, 1.03))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _whole_ticks(ax.xaxis)
    axes[0, 0].set_ylabel("share inside the protected subspace")
    axes[0, 0].legend(loc="best")
    fig.suptitle("How much of the explanation prompts lies where the shield forbids learning")
    return fig


_MARKERS = "oXDsPv^<>*hpd"
_LINES = ("-", "--", "-.", ":")


def frontier(points: pd.DataFrame) -> Figure:
    """Gain kept against top-10 places lost, a line a mode and basis; ``points`` from ``frontier.summarise``.

    Up and to the left is better. Bars run from the least to the most of the seeds. Places lost are on a scale that is
    linear below 1 %, so that an exact method has its place at 0.
    """
    points = _columns(
        points,
        "frontier",
        "curve",
        "overlap",
        "overlap_lo",
        "overlap_hi",
        "gain_loss",
        "gain_reward",
        "steps",
        "penalty",
        "energy",
        "rank",
    )
    fig, axes = _axes(1, 2, 11, 5.2, sharex=True)
    curves = list(points["curve"].unique())
    for ax, measure, title in zip(
        axes,
        ("gain_loss", "gain_reward"),
        ("likelihood of unseen explanations", "reward of greedy texts"),
    ):
        for n, curve in enumerate(curves):
            part = points[points["curve"] == curve].sort_values(
                ["steps", "penalty", "energy", "rank"]
            )
            lost = 1 - part["overlap"]
            ax.errorbar(
                lost,
                part[measure],
                xerr=np.maximum(
                    [part["overlap_hi"] - part["overlap"], part["overlap"] - part["overlap_lo"]], 0
                ),
                yerr=np.maximum(
                    [part[measure] - part[f"{measure}_lo"], part[f"{measure}_hi"] - part[measure]],
                    0,
                ),
                fmt=_MARKERS[n % len(_MARKERS)] + _LINES[n % len(_LINES)],
                color=_PALETTE[n % len(_PALETTE)],
                capsize=2,
                linewidth=1.2,
                elinewidth=0.8,
                label=curve,
            )
        ax.plot(
            0,
            1,
            "k*",
            markersize=11,
            linestyle="none",
            label="separate: a second copy, by construction",
        )
        ax.axvline(0.01, color="black", linewidth=0.8, linestyle=":")
        ax.axhline(0.9, color="black", linewidth=0.8, linestyle=":")
        ax.set(
            title=f"Measured by the {title}",
            xlabel="places of the base top 10 lost",
            ylabel="share of the unshielded gain kept",
        )
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_xlim(-0.0005, 1.1)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    fig.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7.5
    )
    fig.suptitle(
        "Learning kept against ranking moved (dotted: the target, 90 % of the gain and 1 % of the places)"
    )
    return fig


def ideas(table: pd.DataFrame) -> Figure:
    """What each idea changed against its twin without it (``frontier.compare``); a bar from the least to the most of the seeds."""
    measures = {
        "gain_loss": "Gain kept, by likelihood",
        "overlap": "Places of the top 10 kept",
        "overlap_held": "Places of unseen items kept",
    }
    table = _columns(
        table,
        "frontier.compare",
        "idea",
        "seeds",
        *(f"{m}{end}" for m in measures for end in ("", "_lo", "_hi")),
    )
    fig, axes = _axes(1, 3, 11, 1.4 + 0.3 * len(table), sharey=True)
    rows = np.arange(len(table))
    for n, (ax, (measure, label)) in enumerate(zip(axes, measures.items())):
        value, lo, hi = (100 * table[f"{measure}{end}"].to_numpy() for end in ("", "_lo", "_hi"))
        ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
        ax.errorbar(
            value,
            rows,
            xerr=[value - lo, hi - value],
            fmt=_MARKERS[n],
            color=_PALETTE[n],
            capsize=3,
            linewidth=1.2,
        )
        ax.set_xscale(
            "symlog", linthresh=1
        )  # one idea changes twenty points, another a fifth of one
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=label, xlabel="difference in percentage points")
    axes[0].set_yticks(
        rows, [f"{idea} ({seeds})" for idea, seeds in zip(table["idea"], table["seeds"])]
    )
    axes[0].invert_yaxis()
    fig.suptitle("Each idea against its twin without it (in brackets: seeds)")
    return fig


def foretold(rows: pd.DataFrame, correlations: Mapping[str, tuple[float, float, float]]) -> Figure:
    """What protected directions hold, against what training then kept: what ``frontier.foretold`` returns; a marker a basis."""
    rows = _columns(
        rows,
        "frontier.foretold",
        "curve",
        "explanations_inside",
        "items_outside",
        "gain_loss",
        "lost",
    )
    fig, axes = _axes(1, 2, 11, 4.6)
    panels = (
        (
            "learning",
            "explanations_inside",
            "gain_loss",
            "explanations' energy held",
            "share of the unshielded gain kept",
        ),
        (
            "ranking",
            "items_outside",
            "lost",
            "item texts' energy left free",
            "places of the base top 10 lost",
        ),
    )
    for ax, (name, x, y, xlabel, ylabel) in zip(axes, panels):
        for n, (curve, part) in enumerate(rows.groupby("curve", sort=False)):
            look = {"marker": _MARKERS[n % len(_MARKERS)], "color": _PALETTE[n % len(_PALETTE)]}
            ax.plot(part[x], part[y], **look, linestyle="none", label=curve)
        ax.set(
            xlabel=xlabel,
            ylabel=ylabel,
            title="Rank correlation {:.2f} ({:.2f} to {:.2f})".format(*correlations[name]),
        )
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes[0].xaxis, axes[0].yaxis, axes[1].xaxis, axes[1].yaxis):
        axis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    fig.suptitle(
        "What the directions hold before training, against what training does (95 % intervals, as if the settings were independent)"
    )
    return fig


# --- 05 PPO ------------------------------------------------------------------------------------------

_PPO_PANELS = (
    ("reward", "Reward", "mean reward, in [0, 1]"),
    ("kl", "KL to the reference", "nats per explanation"),
    ("length", "Length", "tokens per explanation"),
    ("eos_rate", "Finished explanations", "share with an end token"),
    ("entropy", "Entropy of the policy", "nats per token"),
    ("clip_fraction", "Clipped ratios", "share of tokens"),
    ("explained_variance", "Explained by the values", "share of the variance"),
    ("step_seconds", "Time of a step", "seconds"),
)
_PPO_NEEDED = (
    "reward",
    "kl",
    "length",
    "eos_rate",
    "step_seconds",
)  # the other panels are PPO's own: TRL's trainers lack them


def ppo_curves(curve: pd.DataFrame | list[dict]) -> Figure:
    """Statistics of the rollouts and updates by step, a line an arm; the last panel also shows the shield's own time."""
    curve = _columns(
        curve, "curves/shielded_ppo.csv", "arm", "step", "shield_seconds", *_PPO_NEEDED
    )
    panels = [p for p in _PPO_PANELS if p[0] in curve]
    columns = (len(panels) + 1) // 2
    fig, axes = _axes(2, columns, 2.7 * columns, 4.4, sharex=True)
    for ax, (column, title, label) in zip(axes.flat, panels):
        _arm_lines(ax, curve, column)
        ax.set(title=title, ylabel=label)
        if column in ("clip_fraction", "eos_rate"):
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        elif column == "explained_variance":
            ax.set_ylim(
                bottom=max(ax.get_ylim()[0], -2)
            )  # a value head that knows nothing yet may be far below
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    last = axes.flat[len(panels) - 1]
    guarded = curve[curve["shield_seconds"] > 0]
    if len(guarded):
        last.plot(
            guarded["step"], guarded["shield_seconds"], ":", color="black", label="shield alone"
        )
    last.set_ylim(bottom=0)
    axes[0, 0].legend(loc="best")
    last.legend(loc="best")
    for ax in axes[1]:
        ax.set_xlabel("PPO step")
    return fig


def _arm_lines(ax, curve: pd.DataFrame, column: str) -> None:
    """``column`` by step, a line an arm."""
    every = 1 + curve["step"].nunique() // 8  # a marker on every point of a long run hides the line
    arms = list(dict.fromkeys(curve["arm"]))
    for arm, look in zip(arms, _looks(arms)):
        part = curve[curve["arm"] == arm]
        ax.plot(
            part["step"],
            part[column],
            look.line,
            marker=look.marker,
            markevery=every,
            color=look.colour,
            markersize=5,
            linewidth=1.3,
            label=arm,
        )
    _whole_ticks(ax.xaxis)


def ppo_statistics(curve: pd.DataFrame | list[dict], units: Mapping[str, str]) -> Figure:
    """Every statistic that ``ppo_curves`` leaves out, in small (``episodes`` apart, a count); ``units``: by column, "" where it has none."""
    curve = _columns(curve, "curves/shielded_ppo.csv", "arm", "step")
    drawn = {column for column, *_ in _PPO_PANELS} | {"arm", "step", "episodes", "shield_seconds"}
    panels = [c for c in curve if c not in drawn and curve[c].notna().any()]
    if not panels:
        raise ValueError(
            "curves/shielded_ppo.csv: no further statistic to draw; run notebooks/05_shielded_ppo.ipynb again"
        )
    rows = -(-len(panels) // 4)
    fig, axes = _axes(rows, 4, 10.8, 1.7 * rows, sharex=True, squeeze=False)
    for ax, column in zip(axes.flat, panels):
        _arm_lines(ax, curve, column)
        ax.set_title(column, fontsize=9)
        ax.set_ylabel(units.get(column, ""), fontsize=8)
        ax.tick_params(labelsize=8)
        ax.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax in axes.flat[max(len(panels) - 4, 0) : len(panels)]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("PPO step", fontsize=8)
    axes[0, 0].legend(loc="best", fontsize=8)
    return fig


# --- 06 evaluation -----------------------------------------------------------------------------------


# --- 07 ablations ------------------------------------------------------------------------------------


# --- 08 audit ----------------------------------------------------------------------------------------


# --- files -------------------------------------------------------------------------------------------
