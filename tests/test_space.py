"""The functions of the Space, without gradio."""

import runpy
import sys

import pytest
import yaml
from support.launch import SCRIPTS


SPACE = SCRIPTS.parent / "spaces" / "compare"


@pytest.fixture(scope="module")
def app():
    return runpy.run_path(str(SPACE / "app.py"))


def test_gradio_is_needed_by_the_page_alone(app):
    assert "gradio" not in sys.modules and {"build", "compare_at_start", "compare_training"} <= app.keys()


@pytest.mark.parametrize("norm", ["post-norm, N(x + F(x))", "pre-norm, x + F(N(x))"])
def test_the_two_nets_have_the_same_size_but_for_gates_and_norms(app, norm):
    gated, normed = app["models"](4, norm).values()
    matrices = [{name: p.shape for name, p in net.named_parameters() if p.ndim > 1} for net in (gated, normed)]
    assert matrices[0] == matrices[1]
    assert abs(gated.num_parameters() / normed.num_parameters() - 1) < 0.02


def test_the_picture_before_training_shows_both(app):
    picture, told = app["compare_at_start"](8, "post-norm, N(x + F(x))")
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["ReZero", "post-norm"]
    assert told.startswith("**ReZero**: the median singular value is 1;")


def test_training_shows_both_as_it_goes_on(app):
    shown = list(app["compare_training"](4, "pre-norm, x + F(N(x))", 5e-3, 12))
    assert [len(picture.axes[0].lines[0].get_xdata()) for picture, _ in shown] == [10, 12]
    picture, said = shown[-1]
    assert {text.get_text() for text in picture.axes[0].texts} == {"ReZero", "pre-norm"}
    assert "**ReZero**, " in said and "**pre-norm**, " in said
    first, last = (picture.axes[0].lines[0].get_ydata()[i] for i in (0, -1))
    assert last < first < 9


def test_the_space_names_its_file_and_its_packages():
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).is_file()
    assert (SPACE / "requirements.txt").read_text().split() == ["hf_rezero"]
