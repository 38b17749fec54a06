"""`scripts/reproduce/rezero/jacobian.py`: a run in small from end to end, its parts, and the figures that were recorded."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from support.launch import SCRIPTS

from rezero import jacobian


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the results of a run of a few steps."""
    folder, rng = tmp_path_factory.mktemp("jacobian"), np.random.default_rng(0)
    (folder / "text.txt").write_bytes(rng.integers(97, 105, 20_000).astype(np.uint8).tobytes())
    values = {"train_file": folder / "text.txt", "output": folder / "out.json", "figures": folder, "repetitions": 2}
    values |= {"layers": 3, "hidden_size": 8, "block_size": 16, "batch_size": 2}
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    words += ["--depths", "2", "6", "--at_steps", "0", "2", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jacobian.py", *words])
        jacobian.main()
        yield folder, json.loads((folder / "out.json").read_text())


def test_a_run_leaves_results_and_a_figure_and_a_second_one_has_nothing_to_do(finished, monkeypatch):
    folder, results = finished
    assert results["provenance"]["versions"]["torch"] == torch.__version__
    assert set(results["initial"]) == {f"{arm} | {d}" for arm in jacobian.INITIAL for d in (2, 6)}
    assert {arm: list(steps) for arm, steps in results["training"].items()} == {
        arm: ["0", "2", "5"] for arm in jacobian.TRAINED
    }
    assert results["settings"]["corpus"] == "text.txt" and str(folder) not in json.dumps(results)
    assert (folder / "jacobian.png").stat().st_size > 20_000
    monkeypatch.setattr(jacobian, "train", None)
    monkeypatch.setattr(jacobian, "measure_initial", None)
    jacobian.main()


def test_models_start_as_they_should_and_learn(finished):
    _, results = finished
    for record in (results["initial"]["ReZero | 6"], results["training"]["ReZero"]["0"]):
        assert record["min"] == record["max"] == record["mean"] == 1
    steps = results["training"]["ReZero"]
    assert steps["0"]["mean_abs_resweight"] == 0 < steps["2"]["mean_abs_resweight"]
    assert steps["0"]["loss"] is None and steps["5"]["max"] != 1
    for arm in ("post-norm", "pre-norm"):
        assert results["training"][arm]["5"]["mean_abs_resweight"] == 1
        assert results["training"][arm]["5"]["mean"] != results["training"][arm]["0"]["mean"]
    assert 0.9 < results["initial"]["ReZero, resweight 0.1 | 2"]["mean"] < 1.1


def test_the_summary_of_known_singular_values():
    sigma = torch.tensor([[2.0, 1.0, 1e-8, 0.0], [4.0, 4.0, 4.0, 4.0]], dtype=torch.float64)
    found = jacobian.summary(sigma)
    assert (found["min"], found["max"], found["mean"]) == (0.0, 4.0, pytest.approx(19 / 8))
    assert found["mean_square"] == pytest.approx((5 / 4 + 16) / 2)
    assert found["mean_square_standard_error"] == pytest.approx(abs(16 - 5 / 4) / 2)
    assert found["share_at_zero"] == {"float32": 2 / 8, "float64": 1 / 8}
    kept = found["order_statistics"]
    assert len(kept) == 128 and kept == sorted(kept) and set(kept) == {0.0, 1e-8, 1.0, 2.0, 4.0}


def recorded():
    return json.loads((SCRIPTS / "reproduce" / "results" / "jacobian.json").read_text())


def test_the_recorded_figures_are_those_of_the_paper_and_of_the_official_code():
    results = recorded()
    assert results["verdicts"] == json.loads(json.dumps(jacobian.verdicts(results)))
    published = {"post-norm": (0.810, 0.000), "pre-norm": (10.242, 66.281), "ReZero, resweight 0.1": (1.059, 2.142)}
    for arm, values in published.items():
        for depth, value in zip((12, 128), values, strict=True):
            found = results["initial"][f"{arm} | {depth}"]
            assert abs(found["mean_square"] - value) < 3 * found["mean_square_standard_error"]


def test_verdicts_follow_the_figures():
    results, claims = recorded(), {}
    for name, change in {
        "post-norm: most": lambda r: r["initial"]["post-norm | 64"]["share_at_zero"].update(float32=0.4),
        "pre-norm": lambda r: r["initial"]["pre-norm | 64"].update(mean_square=1.0),
        "ReZero: all": lambda r: r["initial"]["ReZero | 128"].update(max=1.1),
        "ReZero: the mean": lambda r: r["training"]["ReZero"]["500"].update(mean=2.5),
        "post-norm: the zeros": lambda r: r["training"]["post-norm"]["20"]["share_at_zero"].update(float32=0.1),
    }.items():
        changed = copy.deepcopy(results)
        change(changed)
        claims[name] = [claim for claim, verdict in jacobian.verdicts(changed).items() if not verdict["holds"]]
    assert all(len(failed) == 1 and failed[0].startswith(name) for name, failed in claims.items())
