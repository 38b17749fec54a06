"""The look of the pictures: light and dark, names at the ends of lines, and what a notebook gets."""

import math
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from hf_rezero.notebook import html_table
from hf_rezero.picture import DARK, LIGHT, Picture, dark, in_look, label_lines, plot_seeds, spread
from hf_rezero.plots import plot_training


LOG = [
    {"step": 10, "loss": 4 * math.log(2)},
    {"step": 20, "loss": 3 * math.log(2)},
    {"step": 20, "eval_loss": 3.5 * math.log(2), "eval_bpb": 3.5},
]


def pixels(picture):
    from io import BytesIO

    from PIL import Image

    return np.asarray(Image.open(BytesIO(picture._repr_png_())).convert("RGB"))


def test_a_picture_is_a_figure_that_a_notebook_shows_and_that_a_path_writes(tmp_path):
    picture = plot_training(LOG, tmp_path / "a.png")
    assert isinstance(picture, Figure) and not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "a.png").read_bytes() == picture._repr_png_()
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_a_picture_looks_the_same_whatever_the_settings_of_matplotlib_are():
    expected = pixels(plot_training(LOG))
    with matplotlib.rc_context({"axes.facecolor": "red", "xtick.color": "red", "lines.linewidth": 9}):
        assert np.array_equal(pixels(plot_training(LOG)), expected)
    assert np.array_equal(pixels(plot_training(LOG)), expected)


def test_light_and_dark_differ_in_colours_alone():
    light = plot_training(LOG)
    with dark():
        black = plot_training(LOG)
    grounds = [tuple(pixels(picture)[0, 0]) for picture in (light, black)]
    assert grounds == [(255, 255, 255), (0x1E, 0x21, 0x29)]
    assert [line.get_xydata().tolist() for line in light.axes[0].lines] == [
        line.get_xydata().tolist() for line in black.axes[0].lines
    ]
    assert LIGHT.keys() == DARK.keys()


def luminance(colour):
    """Of WCAG 2."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize(("look", "least"), [(LIGHT, 2.0), (DARK, 3.0)], ids=["light", "dark"])
def test_lines_and_text_stand_out_from_the_ground(look, least):
    def contrast(colour):
        a, b = sorted((luminance(colour), luminance(look["axes.facecolor"])))
        return (b + 0.05) / (a + 0.05)

    assert all(contrast(colour) >= least for colour in look["axes.prop_cycle"].by_key()["color"])
    assert contrast(look["text.color"]) > 7


@in_look
def three_lines():
    picture = Picture(figsize=(4, 3))
    axes = picture.subplots()
    for name, end in (("one", 1.0), ("two", 1.001), ("far", 3.0), ("_hidden", 2.0)):
        axes.plot([0, 1], [0, end], label=name)
    label_lines(axes)
    return picture


def test_names_stand_at_the_ends_of_the_lines_in_their_colours_and_apart():
    picture = three_lines()
    (axes,) = picture.axes
    picture.draw_without_rendering()
    texts = {text.get_text(): text for text in axes.texts}
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    assert texts.keys() == {"one", "two", "far"} and all(texts[name].get_color() == colours[name] for name in texts)
    boxes = {name: Text.get_window_extent(text) for name, text in texts.items()}  # without the thin line to the end
    ascending = sorted(boxes.values(), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in pairwise(ascending))
    assert all(axes.get_window_extent().x1 < box.x0 and box.x1 <= picture.bbox.x1 for box in ascending)
    end = axes.transData.transform((1, 3))[1]
    assert boxes["far"].y0 < end < boxes["far"].y1


def test_a_line_that_leaves_the_picture_is_named_where_it_leaves():
    picture = Picture()
    axes = picture.subplots()
    axes.plot([0, 1, 2, 3], [0, 1, 2, 50], label="diverges")
    axes.plot([0, 3], [99, 99], label="never seen")
    axes.set_ylim(0, 4)
    label_lines(axes)
    (text,) = axes.texts
    assert text.get_text() == "diverges" and text.get_position()[1] == pytest.approx(0.5)


def test_places_are_spread_about_what_they_wanted():
    rng = np.random.default_rng(0)
    for count in range(1, 9):
        wanted = sorted(rng.random(count).tolist())
        places = spread(wanted, 0.1)
        assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(places))
        assert sum(places) == pytest.approx(sum(wanted))


def test_seeds_are_a_mean_and_a_band():
    axes = Picture().subplots()
    line = plot_seeds(axes, [0, 1], [[1, 5], [3, 9]])
    assert list(line.get_ydata()) == [2, 7]
    (band,) = axes.collections
    assert sorted({tuple(point) for point in band.get_paths()[0].vertices.tolist()}) == [
        (0, 1),
        (0, 3),
        (1, 5),
        (1, 9),
    ]
    assert not (plot_seeds(other := Picture().subplots(), [0, 1], [[1, 5]]) is None or other.collections)


def test_training_losses_stand_in_the_middle_of_their_steps_and_evaluations_at_their_own():
    training, validation = plot_training(LOG).axes[0].lines
    assert training.get_xydata() == pytest.approx(np.array([(5.5, 4), (15.5, 3)]))
    assert validation.get_xydata() == pytest.approx(np.array([(20, 3.5)]))


def test_a_run_shorter_than_its_first_log_shows_the_mean_of_its_steps():
    (training,) = plot_training([{"step": 9, "train_loss": 2.0, "train_runtime": 1.0}]).axes[0].lines
    assert training.get_xydata().tolist() == [[5, 2]]


def test_html_escapes_what_it_is_given():
    assert "<b>" not in html_table("<b>", ["<b>"], [["<b>"]], "<b>")
