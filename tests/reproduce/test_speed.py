"""The reproductions of the paper's tables and the benchmark of the models: each script in small, and their parts."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import byte_lm, curves, equal_models, timing
from hf_rezero import ReZeroTrainer
from rezero import convergence, depth, norm_gap, recipe
from speed import (
    compiled_speed,
    data_speed,
    generation_speed,
    gpu,
    import_time,
    model_speed,
    rewrite_speed,
    training_profile,
)


@pytest.fixture
def words(tmp_path):
    text = np.random.default_rng(0).integers(97, 105, 20_000).astype(np.uint8).tobytes()
    (tmp_path / "text.txt").write_bytes(text)
    sizes = {"steps": 100, "hidden_size": 16, "num_attention_heads": 2, "block_size": 16, "windows": 16, "seeds": 1}
    paths = {"train_file": tmp_path / "text.txt", "figure": tmp_path / "a.png", "output": tmp_path / "out.json"}
    return [word for name, value in (sizes | paths).items() for word in (f"--{name}", str(value))]


def without(words, name):
    place = words.index(name)
    return words[:place] + words[place + 2 :]


def run(module, monkeypatch, words, *more):
    monkeypatch.setattr(sys, "argv", ["script.py", *words, *map(str, more)])
    module.main()
    return json.loads(Path(words[words.index("--output") + 1]).read_text())


def test_every_rule_trains_and_is_timed(words, monkeypatch):
    results = run(convergence, monkeypatch, words, "--layers", 2, "--learning_rates", 0.003, "--rounds", 2)
    assert set(results["best"]) == set(results["step_seconds"]) == set(convergence.ARMS)
    assert results["best"]["ReZero, w = 0"]["mean"] < 4 and all(
        best["mean"] > 2.9 for best in results["best"].values()
    )


def test_bytes_and_token_ids_are_read_and_a_text_is_tokenized(words, monkeypatch, tmp_path):
    """The last rows are not in older result files, which are shown as before."""
    out = words[words.index("--output") :]
    sizes = {"file": tmp_path / "text.txt", "block_size": 16, "batch_size": 4, "rounds": 2, "per_item_bytes": 2000}
    sizes |= {"tokenizer_bytes": 500, "token_bytes": 5000, "bpe_bytes": 4000, "vocab_size": 280}
    results = run(data_speed, monkeypatch, [word for n, v in sizes.items() for word in (f"--{n}", str(v))] + out)
    assert all(len(speeds) == 2 for speeds in results["rounds"].values()) and results["median"]["gathered"] > 0
    assert list(results["median"])[3:] == list(data_speed.IN_WORDS)
    rows = data_speed.table(results)
    assert [row[0] for row in rows[1:4]] == ["gathered", "per item", "tokenizer"] and len(rows) == 7
    old = {"median": {name: results["median"][name] for name in ("gathered", "per item", "tokenizer")}}
    assert data_speed.table(old) == rows[:4]


def test_the_bytes_that_a_path_reads_are_those_of_its_windows(tmp_path):
    ids = data_speed.repeated(np.arange(7, dtype=np.uint16), 100, tmp_path / "ids.npy")
    assert ids.tolist() == [n % 7 for n in range(50)] and isinstance(ids, np.memmap)
    windows = data_speed.ByteDataset(ids, 8)
    assert data_speed.batches(windows, data_speed.collate_bytes, 4) == len(windows) * 8 * 2 and len(windows) >= 5
    text = np.frombuffer(b"a text of two words. " * 9, np.uint8)
    timed = {"read": lambda: 3_000_000}
    assert [len(speeds) for speeds in data_speed.measure(timed, 2).values()] == [2]
    encoder = data_speed.Encoder(data_speed.train_bpe(text, 270))
    assert data_speed.tokenizers_alone(encoder, text) == len(text)


def test_depths_are_compared_and_a_second_run_has_nothing_to_do(words, monkeypatch):
    results = run(depth, monkeypatch, words, "--depths", 2, 3, "--learning_rates", 0.003)
    assert set(results["best"]) == {f"{layers} {rule}" for layers in (2, 3) for rule in depth.RULES}
    monkeypatch.setattr(depth, "train", None)
    assert run(depth, monkeypatch, words, "--depths", 2, 3, "--learning_rates", 0.003)["runs"] == results["runs"]


def test_the_recipe_is_compared_in_equal_time_and_its_rates_are_used_again(words, monkeypatch, tmp_path):
    words = without(without(words, "--steps"), "--figure")
    more = ["--layers", 2, "--seconds", 0.5, "--rounds", 2, "--arms", *list(recipe.ARMS)[::2]]
    results = run(recipe, monkeypatch, words, *more)
    assert set(results["best"]) == set(results["step_seconds"]) == set(list(recipe.ARMS)[::2])
    for arm, seconds in results["step_seconds"].items():
        runs = {key: found["steps"] for key, found in results["runs"].items() if key.startswith(arm)}
        assert len(runs) >= 3 and set(runs.values()) == {math.ceil(0.5 / seconds)}
    again = run(
        recipe, monkeypatch, words, *more, "--rates_of", tmp_path / "out.json", "--output", tmp_path / "b.json"
    )
    assert again == results  # `run` reads the first file, which stays as it is
    second = json.loads((tmp_path / "b.json").read_text())
    assert len(second["runs"]) == 3
    assert all(best["learning_rate"] == results["best"][arm]["learning_rate"] for arm, best in second["best"].items())


# one arm with states on the way
RESUMED = [
    "--layers",
    2,
    "--learning_rates",
    0.003,
    "--rounds",
    0,
    "--arms",
    "ReZero, w = 0",
    "--checkpoint_steps",
    20,
]


def test_a_killed_run_goes_on_to_the_same_result(words, monkeypatch, tmp_path):
    expected = run(convergence, monkeypatch, words, *RESUMED)
    (tmp_path / "out.json").unlink()
    real, steps = byte_lm.step, []
    monkeypatch.setattr(byte_lm, "step", lambda *args: (steps.append(1), real(*args))[1] if len(steps) < 50 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(convergence, monkeypatch, words, *RESUMED)
    steps.clear()
    monkeypatch.setattr(byte_lm, "step", lambda *args: (steps.append(1), real(*args))[1])
    found = run(convergence, monkeypatch, words, *RESUMED)
    assert len(steps) == 60 and not (tmp_path / "out.pt").exists()
    (a,), (b,) = expected["runs"].values(), found["runs"].values()
    assert a["test"] == b["test"] and [loss for *_, loss in a["curve"]] == [loss for *_, loss in b["curve"]]
    with pytest.raises(SystemExit, match="layers=2, now it is 3"):
        run(convergence, monkeypatch, words, *RESUMED, "--layers", 3)


def test_a_state_of_other_settings_is_not_gone_on_from(words, monkeypatch, tmp_path):
    real, steps = byte_lm.step, []
    monkeypatch.setattr(byte_lm, "step", lambda *args: (steps.append(1), real(*args))[1] if len(steps) < 25 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(convergence, monkeypatch, words, *RESUMED)
    steps.clear()
    assert (tmp_path / "out.pt").exists()
    monkeypatch.setattr(byte_lm, "step", lambda *args: (steps.append(1), real(*args))[1])
    run(convergence, monkeypatch, words, *RESUMED, "--batch_size", 2)
    assert len(steps) == 100


def test_changes_to_rezero_are_compared_with_the_sizes_of_their_streams(words, monkeypatch):
    words = without(words, "--figure")
    arms = ["ReZero", "ReZero, rate of w x 0.1", "ReZero + pre-norm, x + wF(N(x))", "ReZero, bf16"]
    runs = run(norm_gap, monkeypatch, words, "--layers", 2, "--arms", *arms)["runs"]
    found = {key.split(" | ")[0]: values for key, values in runs.items()}
    assert list(found) == arms and len({values["test"] for values in found.values()}) == 4
    assert all(values["stream"] > 0.5 and values["logit"] > 1 for values in found.values())


def test_imports_are_timed_in_fresh_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(import_time, "STATEMENTS", {"little": "import json", "more": "import time; time.sleep(0.2)"})
    monkeypatch.setattr(sys, "argv", ["script.py", "--rounds", "1", "--output", str(tmp_path / "out.json")])
    import_time.main()
    found = json.loads((tmp_path / "out.json").read_text())["seconds"]
    assert found["little"] < 0.2 <= found["more"]


def test_the_rate_is_found_down_the_ladder():
    tried = []
    losses = dict(zip((1, 2, 3, 4, 5, 6), (9, 4, 5, 6, 7, 8), strict=True))
    assert byte_lm.walk_down(list(losses), lambda rate: tried.append(rate) or losses[rate], start=4) == 2
    assert set(tried) == {1, 2, 3, 4, 5}
    assert byte_lm.walk_down([0.1], lambda rate: float("inf"), start=3e-3) == 0.1


def test_steps_to_a_loss_are_those_of_the_running_mean():
    curve = [[0, 0, loss] for loss in (5, 5, 4, 4, 4, 3, 3, 2)]
    assert curves.steps_to(curve, 4.4) == 50 and curves.steps_to(curve, 3.2) == 80
    assert curves.steps_to(curve, 1.0) is None


def test_models_of_equal_dimensions_are_measured_against_the_first(tmp_path, monkeypatch):
    small = (2, 16, 2, 64, 2, 1)
    for name, value in timing.KEEP_MEMORY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(model_speed.CASES, "128 x 64", small)
    words = ["--output", str(tmp_path / "o.json"), "--rounds", "2", "--processes", "2", "--cases", "128 x 64"]
    results = run(model_speed, monkeypatch, [*words, "--measures", "one_token", "saved"])["results"]["128 x 64"]
    assert results["one_token"]["GPT-2"]["speed"] == 1 and results["one_token"]["ReZero"]["ms"] > 0
    for measure in set(model_speed.MEASURES) - {"saved"}:
        rounds = 2 if measure.startswith("train") else 10
        assert len(model_speed.seconds_of(small, measure, 2)["ReZero"]) == rounds
    saved = {arm: row["saved"] for arm, row in results["saved"].items()}
    assert saved["ReZero, relu"] < saved["ReZero"] < saved["GPT-2, fused gelu"] < saved["GPT-2"]


def test_the_models_of_the_benchmark_have_the_same_products():
    """Equal dimensions: the weights that multiply activations, per layer, are those of GPT-2 or within 1 %."""
    models = {name: build() for name, build in equal_models.builders(2, 96, 2, 16).items()}
    sizes = {
        name: sum(p.numel() for p in m.parameters() if p.ndim == 2 and 264 not in p.shape)
        for name, m in models.items()
    }
    sizes = {name: size - (16 * 96 if name not in ("Llama", "ReZero") else 0) for name, size in sizes.items()}
    assert all(size == pytest.approx(sizes["GPT-2"], rel=0.01) for size in sizes.values()), sizes


def test_bfloat16_and_compiled_layers_train(words, monkeypatch):
    more = ["--layers", 2, "--learning_rates", 0.003, "--rounds", 0, "--arms", "ReZero, w = 0", "--bf16"]
    results = run(convergence, monkeypatch, words, *more)
    assert 2.9 < results["best"]["ReZero, w = 0"]["mean"] < 4
    args = argparse.Namespace(hidden_size=16, num_attention_heads=2, block_size=16, device="cpu", compile=True)
    model = byte_lm.build_model({}, 3, args)
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)


def test_the_parts_of_a_run_are_measured(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_bytes(b"abcdefgh" * 4000)
    config = {"config_overrides": "hidden_size=16,num_hidden_layers=2,num_attention_heads=2", "block_size": 16}
    config |= {"per_device_train_batch_size": 4, "max_steps": 100, "save_steps": 50, "use_cpu": True}
    config |= {"do_train": True, "do_eval": True, "do_predict": True, "output_dir": "unused"}
    (tmp_path / "run.json").write_text(json.dumps(config))
    words = ["--train_file", str(tmp_path / "text.txt"), "--configs", str(tmp_path / "run.json"), "--steps", "6"]
    methods = {name: getattr(ReZeroTrainer, name) for name in training_profile.PARTS}
    results = run(training_profile, monkeypatch, [*words, "--output", str(tmp_path / "o.json")])["configs"]["run"]
    assert {name: getattr(ReZeroTrainer, name) for name in methods} == methods
    assert sum(results["shares"].values()) == pytest.approx(1, abs=1e-3) and min(results["shares"].values()) > 0
    assert set(results["median_seconds"]) == set(training_profile.PARTS.values())


@pytest.fixture
def small_sizes(monkeypatch):
    """Two layers, and nothing compiled: whether compiled layers train is tested above."""
    for name, value in timing.KEEP_MEMORY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return (2, 32, 2, 64, 2, 1)


def in_this_process(processes, measure, *args):
    """Fresh processes would not know what the test has changed."""
    return measure(*args)


def test_generation_is_timed_and_scored_in_every_form(words, monkeypatch, small_sizes):
    monkeypatch.setattr(generation_speed, "SIZES", {"12 x 512": small_sizes})
    monkeypatch.setattr(generation_speed, "in_fresh_processes", in_this_process)
    words = without(without(words, "--seeds"), "--figure")
    results = run(generation_speed, monkeypatch, words, "--layers", 2, "--rounds", 3, "--cases", "12 x 512")
    assert results["speeds"]["12 x 512"]["one_token"]["GPT-2 | fp32"]["speed"] == 1
    bits = results["bits_per_byte"]
    assert set(bits) == set(generation_speed.FORMS) and 2.5 < bits["fp32"] < 6
    assert bits["fp32, laid out"] == pytest.approx(bits["fp32"], abs=1e-3)
    assert bits["bf16"] != bits["fp32"] != bits["int8"] and bits["int8"] == pytest.approx(bits["fp32"], abs=0.2)
    rows = generation_speed.table(results)
    assert len(rows) == 1 + 20 and len({len(row) for row in rows}) == 1


def test_quantised_gpt2_computes_what_it_did():
    model = equal_models.deployed(equal_models.builders(2, 64, 2, 32)["GPT-2"]())
    ids = torch.randint(0, 256, (1, 16))
    before = model(ids).logits
    after = generation_speed.in_int8(model)
    assert sum(type(m).__name__ == "Linear" and "quantized" in type(m).__module__ for m in after.modules()) == 9
    assert (after(ids).logits - before).norm() < 0.05 * before.norm()


def test_compiled_layers_are_timed_against_eager_ones(monkeypatch, tmp_path, small_sizes):
    monkeypatch.setitem(compiled_speed.CASES, "128 x 64", small_sizes)
    monkeypatch.setattr(compiled_speed, "in_fresh_processes", in_this_process)
    words = ["--output", str(tmp_path / "o.json"), "--rounds", "2", "--processes", "1", "--cases", "128 x 64"]
    results = run(compiled_speed, monkeypatch, words)
    for measure in compiled_speed.MEASURES:
        found = results["results"]["128 x 64"][measure]
        assert found["speeds"]["GPT-2 | eager"]["speed"] == 1 and found["start"]["compiled"]["gigabytes"] > 0
    rows = compiled_speed.table(results)
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1


def test_rewritten_models_are_timed_against_stock_ones(monkeypatch, tmp_path, small_sizes):
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(rewrite_speed, "LLAMA", {**rewrite_speed.LLAMA, **tiny, "intermediate_size": 24})
    monkeypatch.setattr(rewrite_speed, "SIZE", small_sizes)
    monkeypatch.setattr(rewrite_speed, "in_fresh_processes", in_this_process)
    words = ["--output", str(tmp_path / "o.json"), "--rounds", "1", "--processes", "1"]
    results = run(rewrite_speed, monkeypatch, words)["results"]
    for family in rewrite_speed.FAMILIES:
        for measure in rewrite_speed.MEASURES.values():
            found = results[f"{measure}, {family}"]
            assert set(found) == set(rewrite_speed.REWRITES) and found["stock"]["speed"] == 1
    assert set(results["surgery"]) == set(rewrite_speed.SURGERY) and min(results["surgery"].values()) > 0
    assert set(results["loading"]) == {*rewrite_speed.REWRITES, "cut"}
    rows = rewrite_speed.table({"results": results})
    assert len(rows) == 1 + 4 * 2 + 3 + 3 and len({len(row) for row in rows}) == 1


def test_the_arms_differ_in_residual_weights_and_norms_alone():
    kinds = {}
    for arm in rewrite_speed.REWRITES:
        model = rewrite_speed.rewritten(equal_models.builders(2, 32, 2, 16)["Llama"](), arm)
        names = [name for name, _ in model.named_parameters()]
        kinds[arm] = (sum(n.endswith("resweight") for n in names), sum("norm" in n for n in names), len(names))
    assert list(kinds.values()) == [(0, 5, 21), (4, 5, 25), (4, 0, 20)]


def test_every_figure_of_a_device_is_made_on_a_cpu_in_small(monkeypatch, tmp_path, small_sizes):
    (tmp_path / "text.txt").write_bytes(b"abcdefgh" * 4000)
    words = [
        "--train_file",
        str(tmp_path / "text.txt"),
        "--quality_seconds",
        "1",
        "--output",
        str(tmp_path / "o.json"),
    ]
    results = run(gpu, monkeypatch, words)
    assert results["device"] == "a CPU, tiny sizes" and "not reached" not in results
    assert results["quality"]["test"] < 8 and results["quality"]["bytes"] > 0
    assert results["pruning"]["half"] > 0 and results["optimizers"]["Ranger"] > 0 and "graph" not in results["graphs"]
    assert len(gpu.table(results)) == 1 + 1 + 6 + 1 + 6 + 1 + 1 + 1


def test_sections_behind_the_deadline_are_named(monkeypatch, tmp_path):
    results = run(gpu, monkeypatch, ["--minutes", "-1", "--output", str(tmp_path / "o.json")])
    assert results["not reached"] == [section.__name__ for section in gpu.SECTIONS]


def test_operations_of_a_token_are_counted_by_hand():
    size = (3, 32, 2, 16, 4)
    model = equal_models.builders(*size[:4])[gpu.REZERO]()
    weights = 3 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * equal_models.VOCABULARY
    assert gpu.flops_per_token(model, size) == 6 * weights + 6 * 3 * 16 * 32
