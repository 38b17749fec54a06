"""`scripts/reproduce/optim/optimizers.py`: a run in small from end to end, and its parts."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from optim import optimizers


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The arguments of a run of a few steps."""
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_bytes(rng.integers(97, 105, 20_000).astype(np.uint8).tobytes())
    images = {
        f"{part}_x": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for part, n in (("train", 96), ("test", 16))
    }
    labels = {f"{part}_y": rng.integers(0, 10, n, dtype=np.uint8) for part, n in (("train", 96), ("test", 16))}
    np.savez(tmp_path / "images.npz", **images, **labels)
    values = {"train_file": tmp_path / "text.txt", "image_file": tmp_path / "images.npz", "layers": 1, "shorten": 40}
    values |= {"points": 1, "seeds": 1, "large_batch_seeds": 1, "output": tmp_path / "out.json", "figures": tmp_path}
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    words += ["--arms", "AdamW", "AdamW, warmup", "RAdam", "SNOO(Muon)"]
    monkeypatch.setattr(sys, "argv", ["optimizers.py", *words])
    monkeypatch.setattr(optimizers, "EVALUATED_WINDOWS", 8)
    monkeypatch.setattr(optimizers, "tune", lambda lowest, score, points: score(lowest) and lowest)
    return tmp_path


def test_a_run_leaves_results_and_figures_and_a_second_one_has_nothing_to_do(command, monkeypatch):
    optimizers.main()
    results = json.loads((command / "out.json").read_text())
    assert results["provenance"]["versions"]["torch"] == torch.__version__
    assert set(results["best"]["conv net, batch 512"]) == {"AdamW", "AdamW, warmup", "RAdam"}
    assert set(results["best"]["conv net, batch 32"]) == {"AdamW", "AdamW, warmup", "RAdam", "SNOO(Muon)"}
    assert set(results["best"]["post-norm LM, init 0.02, batch 4"]) == {"AdamW", "AdamW, warmup", "RAdam"}
    records = results["first_steps"].values()
    assert len(records) == 9 and all(math.isclose(sum(r["histogram"][0]), 1, abs_tol=0.01) for r in records)
    for name in ("optimizers.png", "optimizers_gradient_distribution.png"):
        assert (command / name).stat().st_size > 10_000
    monkeypatch.setattr(optimizers, "train", None)
    optimizers.main()


@pytest.mark.parametrize(("optimum", "expected"), [(1, 1), (7, 7), (-3, -3), (99, 8)])
def test_the_grid_grows_until_the_best_is_inside(optimum, expected):
    tried = []

    def score(index):
        tried.append(index)
        return abs(index - optimum)

    assert optimizers.tune(0, score, points=4) == expected
    assert len(tried) == len(set(tried)) <= 9


def test_learning_rates_and_schedule():
    assert [optimizers.rate(i) for i in (-3, -2, -1, 0, 1)] == [0.03, 0.1, 0.3, 1.0, 3.0]
    factors = [optimizers.schedule(step, 100, 0.1) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[60] == 1.0 and 0 < factors[99] < factors[98]
    assert optimizers.schedule(0, 100, 0.0) == 1.0


def test_every_arm_moves_every_parameter_of_the_conv_net(command):
    images = optimizers.Images(str(command / "images.npz"))
    for name, arm in optimizers.ARMS.items():
        model = images.model()
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        made = arm.make(model, 0.01)
        for step in range(7):  # RangerLARS only collects moments in the first five
            images.loss(model, np.arange(16) + step, np.random.default_rng(step)).backward()
            optimizers.update(model, made, 0.01)
        still = [key for key, p in model.named_parameters() if torch.equal(p, before[key])]
        assert not still, f"{name} leaves {still} where they are"
