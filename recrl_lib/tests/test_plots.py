"""Figures: they draw the numbers they are given, files are repeatable, and no title breaks them."""

from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest

from recrl_lib import paths, plots

NASTY = r"$x$ <b>\alpha</b> {0} %s $1 & _y^"


@pytest.fixture(autouse=True)
def closed(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    plots.style()
    yield
    plt.close("all")


def line(title: str = "a title") -> plt.Figure:
    fig, ax = plt.subplots()
    ax.plot([0, 1], [1, 2], label=plots.plain(title))
    ax.set_title(plots.plain(title))
    ax.legend()
    return fig


@pytest.mark.parametrize("title", [NASTY, "$", "$$", r"\$5", r"a\b{c}", "{", "$unclosed {"])
def test_titles_are_shown_as_they_are(title):
    assert plots.save(line(title), "r", "nasty", "words").data.startswith(b"\x89PNG")
    root = ElementTree.parse(paths.FIGURES / "r" / "nasty.svg").getroot()
    assert title in [element.text for element in root.iter() if element.tag.endswith("}text")]


def test_saved_figures_are_repeatable_and_carry_words():
    image = plots.save(line(), "r", "one", "A line that rises")
    first = (paths.FIGURES / "r" / "one.svg").read_bytes()
    plots.save(line(), "r", "two", "A line that rises")
    assert (paths.FIGURES / "r" / "two.svg").read_bytes() == first
    assert b"A line that rises" in first and b"<dc:date>" not in first
    assert image._repr_mimebundle_()[1]["image/png"]["alt"] == "A line that rises"
    assert not plt.get_fignums()  # or a notebook would show it twice
