"""The study's figures: one style, readable without colour, and the one long figure.

Each arm has its own colour (of a colour-blind-safe palette), marker and hatch, the same in every
figure. Short figures are drawn by the notebook that discusses them.
"""

import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from recrl_lib import paths
from recrl_lib.runs import write_atomic

PALETTE = sns.color_palette("colorblind").as_hex()
MARKERS, LINES = "oXDsPv^<>*hpd", ("-", "--", "-.", ":")
LOOKS = {  # arm: colour, marker, hatch
    "base": (PALETTE[7], "s", ""),
    "separate": (PALETTE[0], "^", "//"),
    "unshielded": (PALETTE[3], "X", "\\\\"),
    "shielded": (PALETTE[2], "o", "xx"),
}
STYLE = {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "shielded-recrl",  # else the ids in an SVG are random
    "svg.fonttype": "none",  # text stays text: small files, searchable, read aloud
}


def style() -> None:
    """Set the study's style; each notebook does so once."""
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", rc=STYLE)


def plain(text: str) -> str:
    """``text`` as matplotlib shows it literally: it would read dollar signs as a formula's ends."""
    return text.replace("$", r"\$")


def dot(arm: str) -> dict[str, str]:
    """Colour and marker of an arm, as keywords of ``Axes.errorbar``."""
    return dict(zip(("color", "fmt"), LOOKS[arm]))


def bar(arm: str) -> dict[str, str]:
    """Colour and hatch of an arm's bars, as keywords of ``Axes.bar``."""
    return dict(zip(("facecolor", "hatch"), LOOKS[arm][::2]))


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


def frontier(points: pd.DataFrame) -> Figure:
    """Gain kept against top-10 places lost, a line a curve; ``points``: ``frontier.summarise``.

    Up and to the left is better. Bars run from the least to the most of the seeds. Places lost are
    on a scale that is linear below 1 %, so that an exact method has its place at 0.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharex=True)
    panels = {"gain_loss": "likelihood of unseen explanations", "gain_reward": "reward"}
    for ax, (measure, title) in zip(axes, panels.items()):
        for n, (curve, part) in enumerate(points.groupby("curve", sort=False)):
            part = part.sort_values(["steps", "penalty", "energy", "rank"])
            kept, lost = (
                np.maximum([part[name] - part[f"{name}_lo"], part[f"{name}_hi"] - part[name]], 0)
                for name in (measure, "overlap")
            )
            ax.errorbar(
                1 - part["overlap"], part[measure], xerr=lost[::-1], yerr=kept,
                fmt=MARKERS[n % len(MARKERS)] + LINES[n % len(LINES)],
                color=PALETTE[n % len(PALETTE)], capsize=2, linewidth=1.2, elinewidth=0.8,
                label=plain(curve),
            )  # fmt: skip
        ax.plot(0, 1, "k*", markersize=11, linestyle="none", label="separate: a second copy")
        ax.axvline(0.01, color="black", linewidth=0.8, linestyle=":")
        ax.axhline(0.9, color="black", linewidth=0.8, linestyle=":")
        ax.set(title=f"Measured by the {title}", xlabel="places of the base top 10 lost")
        ax.set_ylabel("share of the unshielded gain kept")
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_xlim(-0.0005, 1.1)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=3, fontsize=7.5)
    fig.suptitle("Learning kept against ranking moved (dotted: the target)")
    return fig
