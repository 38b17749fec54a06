"""The reproductions of the paper beyond text: each script in small from end to end, and their parts."""

import json
import sys

import numpy as np
import pytest
import torch

from common import images
from rezero import (
    deep_without_warmup,
    defaults,
    fully_connected,
    gated_products,
    growing,
    norm_variants,
    resnets,
    superconvergence,
)
from speed import depth_cost, fold_speed


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures whose class is in their colour, and a text."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 256), ("test", 128)):
        labels = rng.integers(0, 10, count)
        pictures = rng.integers(0, 60, (count, 32, 32, 3)) + 19 * labels[:, None, None, None]
        arrays |= {f"{part}_x": pictures.astype(np.uint8), f"{part}_y": labels.astype(np.uint8)}
    np.savez(folder / "images.npz", **arrays)
    (folder / "text.txt").write_bytes(rng.integers(97, 105, 20_000).astype(np.uint8).tobytes())
    return folder


def run(module, monkeypatch, output, *words):
    monkeypatch.setattr(sys, "argv", ["script.py", "--output", str(output), *map(str, words)])
    module.main()
    return json.loads(output.read_text())


def test_resnets_go_from_data_to_figure_and_are_not_run_twice(files, tmp_path, monkeypatch):
    words = ["--image_file", files / "images.npz", "--nets", "ResNet-20", "--arms", "ReZero", "plain"]
    words += ["--epochs", 2, "--seeds", 2, "--figure", tmp_path / "a.png"]
    results = run(resnets, monkeypatch, tmp_path / "out.json", *words)
    assert len(results["runs"]) == 2 * (5 + 1) and (tmp_path / "a.png").exists()
    best = results["best"]["ResNet-20 | ReZero"]
    curves = [
        results["runs"][f"ResNet-20 | ReZero | lr={rate:g} | seed=0"]["accuracy"]
        for rate in resnets.NETS["ResNet-20"][2]
    ]
    assert best["error"][0] == pytest.approx(min(100 - sum(curve[-2:]) / 2 for curve in curves), abs=0.01)
    monkeypatch.setattr(resnets, "train", None)
    assert run(resnets, monkeypatch, tmp_path / "out.json", *words)["runs"] == results["runs"]


def test_one_cycle_moves_all_rates_but_the_constant_one(files, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *args):
        rates.append([group["lr"] for group in self.param_groups] + [self.param_groups[0]["momentum"]])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    words = ["--image_file", files / "images.npz", "--epochs", 5, "--seeds", 1, "--rates", 0.3]
    arm = "one cycle, ReZero, constant rate 0.1 of resweights"
    results = run(superconvergence, monkeypatch, tmp_path / "out.json", *words, "--arms", arm)
    weights, resweights, momentum = (sorted({rate[i] for rate in rates}) for i in (0, 2, 3))
    assert len(rates) == 10 and weights[-1] == pytest.approx(0.3) and weights[0] == pytest.approx(0.3 * 0.027)
    assert resweights == [0.1] and momentum[0] == pytest.approx(0.85)
    assert results["best"][arm]["error"] == [
        100 - sum(results["runs"][f"{arm} | lr=0.3 | seed=0"]["accuracy"][-2:]) / 2
    ]


def test_pictures_are_shifted_and_flipped_one_by_one():
    x = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16) + 1
    y = images.augment(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    candidates = [
        (flip, i, j)
        for picture in range(2)
        for flip in (False, True)
        for i in range(5)
        for j in range(5)
        if torch.equal(
            y[picture],
            torch.nn.functional.pad(x.flip(3), (2, 2, 2, 2))[picture, :, i : i + 16, j : j + 16]
            if flip
            else padded[picture, :, i : i + 16, j : j + 16],
        )
    ]
    assert len(candidates) == 2


def test_epochs_to_an_accuracy_are_read_between_epochs():
    assert resnets.epochs_to([20.0, 40.0, 50.0], 45.0) == 2.5
    assert resnets.epochs_to([60.0], 35.0) == 0.5
    assert resnets.epochs_to([20.0, 30.0], 45.0) is None


def test_fully_connected_nets_of_all_rules_and_depths(files, tmp_path, monkeypatch):
    words = ["--image_file", files / "images.npz", "--steps", 20, "--deep_steps", 6, "--depths", 8, 400]
    words += ["--rates", 0.003, 0.01, "--seeds", 1, "--figure", tmp_path / "a.png"]
    monkeypatch.setattr(fully_connected, "STRIDE", 2)
    results = run(fully_connected, monkeypatch, tmp_path / "out.json", *words)
    assert set(results["best"]) == set(fully_connected.RULES) and len(results["runs"]) == 4 * 2 + 2 + 3
    assert results["runs"]["400 | ReZero | lr=0.003 | seed=0"]["steps"] == 6
    assert results["runs"]["400 | residual | lr=0.003 | seed=0"]["steps"] < 4
    monkeypatch.setattr(fully_connected, "train", None)
    assert run(fully_connected, monkeypatch, tmp_path / "out.json", *words)["runs"] == results["runs"]


def test_how_many_times_faster_is_the_ratio_of_steps():
    curves = {"ReZero": [2.0] * 10 + [0.5] * 30, "deep net": list(np.linspace(2.0, 1.0, 40))}
    results = {
        "best": {rule: {"learning_rate": 1} for rule in curves},
        "runs": {f"32 | {rule} | lr=1 | seed=0": {"loss": curve} for rule, curve in curves.items()},
    }
    (ratio,) = fully_connected.times_faster(results, "deep net", 400, 1)
    assert ratio == pytest.approx(400 / 130, abs=0.01)  # the mean of 4 points falls below 1.04 behind the 13th


def test_all_arms_of_growing_have_the_same_layer_passes(files, tmp_path, monkeypatch):
    assert {sum(a * b for a, b in parts) for parts in growing.stages(4800, 24).values()} == {4800}
    words = [
        "--train_file",
        files / "text.txt",
        "--passes",
        640,
        "--depth",
        8,
        "--hidden_size",
        16,
        "--block_size",
        16,
    ]
    words += ["--windows", 16, "--seeds", 1, "--learning_rates", 0.01, "--figure", tmp_path / "a.png"]
    results = run(growing, monkeypatch, tmp_path / "out.json", *words)
    grown = results["runs"]["2 to 4 to 8 | lr=0.01 | seed=0"]["curve"]
    assert [point[0] for point in grown[:8]] == [20, 40, 60, 80, 100, 120, 140, 160] and grown[8][0] == 200
    assert grown[-1][0] == 640 and 2.9 < results["best"]["2 to 4 to 8"]["mean"] < 4  # 8 letters at random: 3 bits


def test_norm_variants_train_and_are_scored_on_the_test_text(files, tmp_path, monkeypatch):
    words = ["--train_file", files / "text.txt", "--layers", 2, "--steps", 20, "--hidden_size", 16, "--block_size", 16]
    words += ["--windows", 16, "--seeds", 2, "--learning_rates", 0.003, 0.01]
    words += ["--variants", "ReZero, x + w F(x)", "post-norm, N(x + F(x))"]
    results = run(norm_variants, monkeypatch, tmp_path / "out.json", *words)
    assert len(results["runs"]) == 6 and all(2.9 < best["mean"] < 6 for best in results["best"].values())
    monkeypatch.setattr(norm_variants, "train", None)
    assert run(norm_variants, monkeypatch, tmp_path / "out.json", *words)["runs"] == results["runs"]


def test_a_run_that_diverges_is_recorded_and_never_the_best(files, tmp_path, monkeypatch):
    words = [
        "--train_file",
        files / "text.txt",
        "--layers",
        64,
        "--steps",
        20,
        "--hidden_size",
        16,
        "--block_size",
        16,
    ]
    words += ["--windows", 16, "--seeds", 1, "--learning_rates", 1e30, 0.003, "--variants", "pre-norm, x + F(N(x))"]
    results = run(norm_variants, monkeypatch, tmp_path / "out.json", *words)
    assert results["runs"]["pre-norm, x + F(N(x)) | lr=1e+30 | seed=0"]["test"] == float("inf")
    assert results["best"]["pre-norm, x + F(N(x))"]["learning_rate"] == 0.003


def test_the_cost_of_depth_is_a_ratio_of_medians(tmp_path, monkeypatch):
    results = run(
        depth_cost, monkeypatch, tmp_path / "o.json", "--layers", 200, "--width", 16, "--rounds", 1, "--threads", 1
    )
    costs = results["results"]
    expected = costs["seconds_per_step"]["200"] / 200 / (costs["seconds_per_step"]["100"] / 100)
    assert costs["per_layer_against_100"] == pytest.approx(expected, rel=0.02)


def test_a_folded_model_is_timed_beside_the_other(tmp_path, monkeypatch):
    monkeypatch.setitem(fold_speed.CASES, "128 x 64, 1 token", (16, 4, 2, 1, 8))
    results = run(fold_speed, monkeypatch, tmp_path / "o.json", "--rounds", 5, "--cases", "128 x 64, 1 token")[
        "results"
    ]
    figures = results["128 x 64, 1 token"]
    assert figures["ratio"] == figures["after"] / figures["before"] and 0 < figures["difference"] < 1e-5


@pytest.fixture
def small(files):
    """The words of a claim about the first steps, for a model of seconds."""
    sizes = {"layers": 2, "hidden_size": 16, "block_size": 16, "batch_size": 4, "steps": 20, "seeds": 2}
    words = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    return ["--train_file", files / "text.txt", *words]


def test_deep_models_without_warmup_are_compared_at_their_best_rates(small, tmp_path, monkeypatch):
    words = [*small, "--learning_rates", 1e30, 0.003, "--figure", tmp_path / "a.png"]
    results = run(deep_without_warmup, monkeypatch, tmp_path / "out.json", *words)
    assert set(results["best"]) == {"ReZero", "post-norm"} and (tmp_path / "a.png").stat().st_size > 10_000
    assert all(best["learning_rate"] == 0.003 and 2.9 < best["mean"] < 9 for best in results["best"].values())
    assert 2.9 < results["unigram_bpb"] < 3 and results["settings"]["corpus"] == "text.txt"
    assert len(results["runs"]["ReZero lr=0.003 seed=1"]["curve"]) == 20
    assert results["runs"]["ReZero lr=1e+30 seed=0"]["final"] == float("inf")
    monkeypatch.setattr(deep_without_warmup, "train", None)
    assert run(deep_without_warmup, monkeypatch, tmp_path / "out.json", *words)["runs"] == results["runs"]


def test_defaults_are_held_against_the_default_of_the_same_seed(small, tmp_path, monkeypatch):
    results = run(defaults, monkeypatch, tmp_path / "out.json", *small)
    assert set(results["table"]) == set(defaults.VARIANTS) and len(results["runs"]) == 2 * len(defaults.VARIANTS)
    finals = [results["runs"][f"ReLU seed={seed}"]["final"] for seed in (0, 1)]
    base = [results["runs"][f"default seed={seed}"]["final"] for seed in (0, 1)]
    assert results["table"]["ReLU"]["against_default_by_seed"] == [finals[0] - base[0], finals[1] - base[1]]
    monkeypatch.setattr(defaults, "train", None)
    assert run(defaults, monkeypatch, tmp_path / "out.json", *small)["runs"] == results["runs"]


def test_gated_products_tell_which_runs_diverge_and_go_on_where_they_stopped(files, tmp_path, monkeypatch):
    words = ["--train_file", files / "text.txt", "--layers", 4, "--steps", 5, "--hidden_size", 16, "--block_size", 16]
    words += ["--seeds", 1, "--learning_rates", 0.001, 10]
    results = run(gated_products, monkeypatch, tmp_path / "out.json", *words)
    by_rate = {rate: [a["runs"][0]["diverged"] for a in results["arms"] if a["rate"] == rate] for rate in (0.001, 10)}
    assert by_rate[0.001] == [None] * 18 and all(step is not None for step in by_rate[10])
    degrees = {arm["model"]: arm["runs"][0]["degree"] for arm in results["arms"]}
    assert degrees["Llama"] > 1.8 and degrees["GPT-2"] < 1.4
    monkeypatch.setattr(gated_products, "train", None)
    assert run(gated_products, monkeypatch, tmp_path / "out.json", *words)["arms"] == results["arms"]
