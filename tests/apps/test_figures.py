"""A confusion matrix as it is drawn, PNGs that another decoder reads, tables that TensorBoard itself renders."""

import html
import io
import re
import sys
import warnings

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard import plugin_util

from apps import figures

COUNTS = np.array([[8, 2, 0], [0, 0, 0], [1, 3, 6]])


def texts_of(figure: Figure) -> dict[tuple[int, int], tuple[str, str]]:
    """(row, column) to (number, colour)."""
    (axes,) = figure.axes
    return {
        (text.get_position()[1], text.get_position()[0]): (text.get_text(), text.get_color()) for text in axes.texts
    }


def test_numbers_are_where_they_belong():
    figure = figures.confusion_matrix(COUNTS, ["earn", "acq", "crude"], "texts")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "is")
    assert axes.get_title() == "Test part: number of texts"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["earn", "acq", "crude"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["earn", "acq", "crude"]
    numbers = {at: int(number) for at, (number, _) in texts_of(figure).items()}
    assert numbers == {at: COUNTS[at] for at in zip(*np.nonzero(COUNTS), strict=True)}
    (image,) = axes.images
    expected = [[0.8, 0.2, 0], [0, 0, 0], [0.1, 0.3, 0.6]]  # of the true class; none of a class that isn't there
    np.testing.assert_allclose(image.get_array(), expected)
    assert image.get_clim() == (0, 1)
    # imshow draws row 0 on top: the axis runs down.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_numbers_can_be_read_on_their_ground():
    figure = figures.confusion_matrix(COUNTS, ["a", "b", "c"], "texts")
    (image,) = figure.axes[0].images
    for at, (_, colour) in texts_of(figure).items():
        ground = np.array(image.cmap(image.norm(image.get_array()[at]))[:3]) @ [0.299, 0.587, 0.114]
        assert abs(ground - np.mean(matplotlib.colors.to_rgb(colour))) > 0.4


@pytest.mark.parametrize(("num", "drawn"), [(1, True), (40, True), (41, False), (300, False)])
def test_many_classes_are_drawn_without_numbers_and_not_larger(num, drawn):
    counts = np.eye(num, dtype=int)
    figure = figures.confusion_matrix(counts, [f"class {i}" for i in range(num)], "pictures")
    assert len(figure.axes[0].texts) == (num if drawn else 0)
    assert max(figure.get_size_inches()) <= 2 + 0.32 * 40
    shown = {label.get_text() for label in figure.axes[0].get_xticklabels()}
    assert ("class 0" in shown) is drawn


def test_png():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a class that the test part doesn't have is no division by 0
        png = figures.to_png(figures.confusion_matrix(COUNTS, ["a", "b", "c"], "texts"))
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    assert picture.size == pytest.approx((296, 296), abs=1)  # 2.96 inches
    pixels = np.asarray(picture.convert("L"))
    assert pixels.min() < 60
    assert pixels.max() == 255
    assert png == figures.to_png(figures.confusion_matrix(COUNTS, ["a", "b", "c"], "texts"))


def test_no_figure_is_kept():
    # pyplot keeps every figure it makes: a long run would fill the memory.
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = pyplot.get_fignums() if pyplot else []
    figures.to_png(figures.confusion_matrix(COUNTS, ["a", "b", "c"], "texts"))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert (pyplot.get_fignums() if pyplot else []) == before


# Tables

HAZARDS = [
    "plain", "a|b", "|", "a\\|b", "\\", "ends with \\", "a\nb", "a\r\n\r\n| b | c |\n", "<script>alert(1)</script>",
    "<table>", "</td></tr></table>", "&lt;b&gt;", "***", "`", "a`b|c", "---|---", "# x", "", " ", "\x00\x1b[31m",
    "ünï|côde 世界",    "[x](javascript:alert(1))", "<img src=x onerror=alert(1)>",
]  # fmt: skip


def cells_of(rendered: str) -> list[list[str]]:
    """What a browser shows of the only table."""
    assert len(re.findall("<table>", rendered)) == 1
    (table,) = re.findall(r"^\s*<table>(.*)</table>\s*$", rendered, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(cell) for cell in row] for row in cells]


@pytest.mark.parametrize("hazard", HAZARDS)
def test_no_text_breaks_a_table(hazard):
    rows = [[hazard, "is", "predicted"], ["the", "next", "row"], ["x", hazard, hazard]]
    rendered = plugin_util.markdown_to_safe_html(figures.to_table(["text", "a", "b"], rows))
    cells = cells_of(rendered)
    assert [len(row) for row in cells] == [3, 3, 3, 3]
    assert cells[0] == ["text", "a", "b"]
    assert cells[1][1:] == ["is", "predicted"]
    assert cells[2] == ["the", "next", "row"]
    assert not re.search(r"<(script|img|table[^>])", rendered)
    if hazard in ("plain", "a|b", "|", "a\\|b", "ends with \\", "<script>alert(1)</script>", "</td></tr></table>"):
        assert cells[1][0] == cells[3][1] == cells[3][2] == hazard
    if hazard == "a\nb":
        assert cells[1][0] == "a b"
