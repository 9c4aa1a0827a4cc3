"""A user's text is shown as it is, wherever it would be read as markup."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
import yaml
from matplotlib.figure import Figure

from data_prep.report.plots import plot_all
from flexlora_ds.terminal.plain_text import PLOT_TEXT, legend_label, markdown_text, printable
from launch.options.train_options import TrainOptions


def test_markdown_shows_what_stands_there() -> None:
    assert markdown_text("social_i_qa") == "social_i_qa"
    assert markdown_text("a|b `c` [d](e) <b> $x$ *y*\nz") == (r"a\|b \`c\` \[d\](e) \<b\> \$x\$ \*y\* z")
    assert markdown_text("_run_ # &lt;") == r"\_run\_ \# \&lt;"


def test_text_is_made_printable() -> None:
    assert printable("a\nb\x1b[0m\udce9") == "a b\\x1b[0m\\udce9"
    assert len(printable("x" * 500)) < 130
    assert legend_label("_run") == " _run" and legend_label("run_") == "run_"


@pytest.mark.parametrize("text", ["cost_$5_to_$9", "$\\frac$", "$$", "_a $b$"])
def test_no_text_of_a_plot_is_mathematics(tmp_path: Path, text: str) -> None:
    with matplotlib.rc_context(PLOT_TEXT):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([1], label=legend_label(text))
        axes.set_title(text)
        axes.set_xticks([0], [text])
        legend = axes.legend()
        figure.savefig(tmp_path / "plot.png")
    assert legend.get_texts()[0].get_text().strip() == text
    plot_all({}, tmp_path, text, 1)


def test_a_recipes_name_cannot_end_its_comment() -> None:
    text = TrainOptions(recipe="x\nlr: 1").to_yaml()
    assert text.startswith("# Made from x lr: 1;") and yaml.safe_load(text)["lr"] != 1
