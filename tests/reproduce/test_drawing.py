"""Figures are drawn twice, small, and both are in the repository."""

from PIL import Image

import render
from common.drawing import light_and_dark, plot_arm
from common.record import FIGURES
from hf_rezero.picture import Picture


@light_and_dark
def draw(results: dict) -> Picture:
    picture = Picture(figsize=(3, 2))
    picture.subplots().plot(results["y"])
    return picture


def test_a_figure_and_its_dark_twin_are_written(tmp_path):
    draw({"y": [1, 2, 3]}, tmp_path / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a_dark.png"]
    light, black = (Image.open(tmp_path / name) for name in ("a.png", "a_dark.png"))
    assert light.mode == "P" and light.size == black.size
    assert light.convert("L").getpixel((0, 0)) == 255 and black.convert("L").getpixel((0, 0)) < 50


def test_every_figure_of_the_repository_has_its_twin():
    names = {path.name for path in FIGURES.glob("*.png")}
    assert names == {f"{name}{look}.png" for name in render.drawings() for look in ("", "_dark")}


def test_the_seeds_of_an_arm_are_a_mean_and_a_band_and_a_diverged_one_is_left_out():
    runs = {f"a | lr=0.1 | seed={seed}": {"curve": [[0, 1.0 + seed]] * 9} for seed in (0, 1)}
    runs["b | lr=0.1 | seed=0"] = {"curve": []}
    best = {"a": {"learning_rate": 0.1, "test": [1, 2]}, "b": {"learning_rate": 0.1, "test": [1]}}
    axes = Picture().subplots()
    line = plot_arm(axes, {"runs": runs, "best": best}, "a")
    assert set(line.get_ydata()) == {1.5} and len(axes.collections) == 1
    assert plot_arm(axes, {"runs": runs, "best": best}, "b") is None
