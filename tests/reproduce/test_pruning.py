"""`scripts/reproduce/pruning/pruning_curve.py`: a run in small from end to end, and its parts."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch

from pruning import pruning_curve
from pruning.pruning_curve import Images, Text


SCRATCH = ("unpruned from scratch", "L1 from scratch", "first k from scratch")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the results of a run of a few steps, and how to start it again."""
    folder, rng = tmp_path_factory.mktemp("curve"), np.random.default_rng(0)
    (folder / "text.txt").write_bytes(rng.integers(97, 105, 20_000).astype(np.uint8).tobytes())
    sizes = {"train": 64, "test": 16}
    images = {f"{part}_x": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for part, n in sizes.items()}
    labels = {f"{part}_y": rng.integers(0, 10, n, dtype=np.uint8) for part, n in sizes.items()}
    np.savez(folder / "images.npz", **images, **labels)
    values = {"train_file": folder / "text.txt", "image_file": folder / "images.npz", "output": folder / "out.json"}
    values |= {"figures": folder, "bases": folder / "bases", "layers": 2, "deep_layers": 4, "shorten": 200}
    words = [
        str(word) for name, value in (values | {"points": 2, "seeds": 1}).items() for word in (f"--{name}", value)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pruning_curve.py", *words])
        patch.setattr(pruning_curve, "EVALUATED_WINDOWS", 16)
        patch.setattr(pruning_curve, "SCORE_BATCHES", 2)
        pruning_curve.main()
        yield folder, json.loads((folder / "out.json").read_text())


def test_a_run_leaves_results_and_a_figure_and_a_second_one_has_nothing_to_do(finished, monkeypatch):
    folder, results = finished
    assert results["provenance"]["versions"]["torch"] == torch.__version__
    methods = {t: {key.split(" | ")[1] for key in results["runs"] if key.startswith(t)} for t in results["tasks"]}
    assert methods["images"] == {"unpruned", *pruning_curve.LEARNED, *pruning_curve.SCORED, *SCRATCH}
    assert {"unpruned", "L1", "L0", "first k", "APoZ", "L1 from scratch"} <= methods["text"]
    assert {"L1, taught", "magnitude, taught", "L1 from scratch, taught"} <= methods["text"]
    assert {"unpruned", "L1", "L0", "first k", "magnitude"} <= methods["depth"]
    assert results["verdicts"]["images"] and all("holds" in v for v in results["verdicts"]["images"].values())
    assert (folder / "pruning_curve.png").stat().st_size > 10_000
    for table in pruning_curve.TABLES.values():
        assert len({len(row) for row in table(results)}) == 1
    monkeypatch.setattr(pruning_curve, "train", None)
    pruning_curve.main()


def test_what_is_removed_is_counted_in_the_net_that_is_left(finished):
    _, results = finished
    for key, run in results["runs"].items():
        task, method, _, seed = key.split(" | ")
        whole = results["base"][f"{task} | {seed}"]["parameters"]
        assert run["removed"] == pytest.approx(1 - run["parameters"] / whole, abs=1e-4)
        assert run["parameters"] < whole or method not in pruning_curve.SCORED
        assert (
            run["parameters"]
            == results["runs"][key.replace(" from scratch, taught", "").replace(" from scratch", "")]["parameters"]
        )
    run = results["runs"]["images | first k | 0.5 | seed=0"]
    a, b, c, d, e = (run["kept"][name] for name in ("0", "2", "5", "7", "12"))
    weights = 3 * 9 * a + 9 * a * b + 9 * b * c + 9 * c * d + 16 * d * e + e * 10
    assert run["parameters"] == weights + a + b + c + d + e + 10


def test_the_taught_learn_half_from_the_labels_and_half_from_the_net(finished):
    folder, _ = finished
    args = argparse.Namespace(train_file=folder / "text.txt")
    torch.manual_seed(0)
    data = Text(args, 2, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, resweight_init=0.5)
    model, teacher, rows = data.model(), data.model(), np.arange(2)
    torch.testing.assert_close(data.taught(model, model, rows), data.loss(model, rows) / 2)
    ids = data.batch(rows)["input_ids"]
    q, p = ((net(ids).logits[:, :-1] / 2).softmax(-1) for net in (teacher, model))
    distance = 4 * (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(data.taught(teacher, model, rows), (data.loss(model, rows) + distance) / 2)


def record(removed, quality):
    return {"removed": removed, "quality": quality, "after_removal": 57.0}


def test_verdicts_follow_the_figures():
    curves = {"L1": (60, 58), "L0": (59, 50), "first k": (55, 49), "L1 from scratch": (61, 59), "unpruned": (60,)}
    runs = {
        f"images | {method} | {i} | seed=0": record((0.5, 0.8)[i] if method != "unpruned" else 0.0, value)
        for method, values in curves.items()
        for i, value in enumerate(values)
    }
    found = pruning_curve.verdicts({"runs": runs}, "images", Images)
    assert found["a small lambda removes 30 % or more, free"]["holds"]
    assert found["L1 is not worse than L0"] == {"holds": True, "mean_gain": 4.5, "worst": 1.0}
    assert not found["L1 is better than first k, by < 7 points on average"]["holds"]
    assert not found["from scratch is worse than L1"]["holds"]
    assert not found["below 60 % masks make it better than the whole net trained on as long"]["holds"]
    assert found["below 60 % masks make it better than it was"] == {"holds": True, "mean": 2.5, "least": 2, "best": 3}
    worse = {key: record(run["removed"], 5 - run["quality"] / 100) for key, run in runs.items()}
    bits = {key.replace("images", "text"): run for key, run in worse.items()}
    assert pruning_curve.verdicts({"runs": bits}, "text", Text)["L1 is not worse than L0"]["holds"]
