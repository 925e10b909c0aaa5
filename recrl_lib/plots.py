"""The style of the study's figures, which the notebooks draw: readable without colour.

Each arm has its own colour (of a colour-blind-safe palette), marker and hatch.
"""

import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure

from recrl_lib import paths
from recrl_lib.runs import write_atomic

PALETTE = sns.color_palette("colorblind").as_hex()
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
