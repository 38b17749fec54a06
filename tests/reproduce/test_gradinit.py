"""`scripts/reproduce/gradinit/`: a run in small from end to end."""

import json
import sys

import numpy as np
import pytest
import torch

from gradinit import gradinit_images, gradinit_post_norm


def start(monkeypatch, module, **values):
    """Run the script with these arguments and return its result file."""
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value) if word is not True]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    module.main()
    return json.loads(values["output"].read_text())


@pytest.mark.filterwarnings("ignore:the gradient norm", "ignore:frozen parameters")
def test_images_leave_results_and_figures_and_a_second_run_has_nothing_to_do(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = {"train": 24, "test": 16}
    images = {f"{part}_x": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for part, n in sizes.items()}
    labels = {f"{part}_y": rng.integers(0, 10, n, dtype=np.uint8) for part, n in sizes.items()}
    np.savez(tmp_path / "images.npz", **images, **labels)
    small = {
        "shallow": True,
        "faster": True,
        "vgg_divisor": 32,
        "resnet_divisor": 8,
        "resnet_image_size": 8,
        "batch_size": 8,
    }
    small |= {"epochs": 1, "init_steps": 2, "metainit_steps": 2, "seeds": 1, "device": "cpu"}
    small |= {"image_file": tmp_path / "images.npz", "output": tmp_path / "out.json", "figures": tmp_path}
    results = start(monkeypatch, gradinit_images, **small)
    assert results["provenance"]["versions"]["torch"] == torch.__version__
    assert len(results["table"]) == 4 * len(gradinit_images.STARTS) + len(gradinit_images.ABLATIONS) + 1
    assert all(len(run["accuracies"]) in (1, 2) for run in results["runs"].values() if run["finished"])
    for name in ("gradinit_variance.png", "gradinit_scales.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    monkeypatch.setattr(gradinit_images, "train", None)
    start(monkeypatch, gradinit_images, **small)


@pytest.mark.filterwarnings("ignore:the gradient norm")
def test_post_norm_leaves_results_and_a_figure_and_a_second_run_has_nothing_to_do(tmp_path, monkeypatch):
    text = np.random.default_rng(0).integers(97, 105, 20_000).astype(np.uint8)
    (tmp_path / "text.txt").write_bytes(text.tobytes())
    small = {"train_file": tmp_path / "text.txt", "layers": 1, "hidden_size": 16, "block_size": 16, "steps": 4}
    small |= {
        "init_steps": 2,
        "seeds": 1,
        "learning_rates": 1e-3,
        "output": tmp_path / "out.json",
        "figures": tmp_path,
    }
    results = start(monkeypatch, gradinit_post_norm, **small)
    assert set(results["best"]) == set(gradinit_post_norm.ARMS)
    assert "scales" in results["runs"]["ReZero, GradInit | lr=0.001 | seed=0"]
    assert (tmp_path / "gradinit_post_norm.png").stat().st_size > 10_000
    monkeypatch.setattr(gradinit_post_norm, "train", None)
    start(monkeypatch, gradinit_post_norm, **small)


def test_the_crops_move_whole_images():
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8) + 1
    seen = {
        tuple(gradinit_images.augment(x, np.random.default_rng(seed))[0, 0, 4, 3:5].tolist()) for seed in range(40)
    }
    whole = {(a.item(), b.item()) for row in x[0, 0] for a, b in zip(row[:-1], row[1:], strict=True)}
    assert len(seen) > 10 and seen <= whole | {(b, a) for a, b in whole}


def test_the_networks_have_the_sizes_of_the_paper():
    args = type("Arguments", (), {"vgg_divisor": 1, "resnet_divisor": 1, "shallow": False, "device": "cpu"})
    for name, millions in {"VGG-19": 20.03, "VGG-19 BN": 20.03, "ResNet-110": 1.73, "ResNet-110 BN": 1.73}.items():
        parameters = sum(p.numel() for p in gradinit_images.build(name, 0, args).parameters())
        assert round(parameters / 1e6, 1) == round(millions, 1)
