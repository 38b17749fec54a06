"""`scripts/prune.py` as its users start it."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.launch import run_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_rezero import ReZeroForCausalLM, ReZeroForMaskedLM, byte_tokenizer
from hf_rezero.commands import clm as run_clm
from hf_rezero.commands import prune
from hf_rezero.data import evaluation_windows
from hf_rezero.plots import plot_kept, plot_sparsity_curve
from hf_rezero.pruning import PruningReport, load_pruned


SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 259}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 105, 3050).astype(np.uint8).tobytes())
    return path


@pytest.fixture
def checkpoint(make_config, tmp_path):
    """A ReZero model whose outputs are large enough that what is removed is missed."""
    config = make_config(hidden_size=16, num_hidden_layers=2, initializer_range=0.3, hidden_act="relu")
    ReZeroForCausalLM(config).save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def gpt2(tmp_path):
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(vocab_size=264, **shape, **SPECIAL)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def arguments(text, model, output_dir, **extra):
    values = {
        "model_name_or_path": model,
        "train_file": text,
        "output_dir": output_dir,
        "block_size": 32,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "prune_targets": "heads,neurons",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **extra,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def one_shot(text, model, output_dir, **extra):
    return arguments(text, model, output_dir, **{"score": "magnitude", "prune_target_sparsity": 0.5, **extra})


@pytest.mark.parametrize("score", prune.SCORES)
def test_each_score_leaves_a_smaller_checkpoint_with_the_reported_quality(text, checkpoint, tmp_path, score):
    out = tmp_path / "run"
    targets = {"prune_targets": "neurons"} if score == "apoz" else {}
    metrics = prune.main(one_shot(text, checkpoint, out, score=score, do_predict=True, **targets))
    report = json.loads((out / "pruning" / "report.json").read_text())
    assert (report["method"], report["target_sparsity"]) == (score, 0.5)
    assert report["sparsity"] >= 0.5 and report["max_difference"] < 1e-5 < 0.1 < report["max_output"]
    model = AutoModelForCausalLM.from_pretrained(out)
    after = sum(p.numel() for p in model.parameters())
    assert after == report["parameters_after"] == metrics["pruning_parameters_after"] < report["parameters_before"]
    size = (out / "model.safetensors").stat().st_size
    assert size == metrics["pruning_bytes_after"] < (checkpoint / "model.safetensors").stat().st_size
    saved = json.loads((out / "all_results.json").read_text())
    assert saved["eval_bpb"] == metrics["eval_bpb"] != saved["before_bpb"] and "pruned_bpb" not in saved
    assert saved["pruning_sparsity"] == report["sparsity"] and (out / "pruning" / "report.png").stat().st_size > 5000
    again = run_clm.main([*arguments(text, out, tmp_path / "again")[:8], "--use_cpu", "true", "--do_eval", "true"])
    assert again["eval_bpb"] == pytest.approx(metrics["eval_bpb"], rel=1e-5)


def test_fine_tuning_follows_and_the_summary_tells_all(text, checkpoint, tmp_path, capsys):
    out = tmp_path / "run"
    metrics = prune.main(one_shot(text, checkpoint, out, score="taylor", max_steps=20, logging_steps=5))
    assert metrics["eval_bpb"] < metrics["pruned_bpb"] and (out / "training.png").exists()
    printed = capsys.readouterr().out
    before, after = (f"{metrics[f'pruning_parameters_{when}']:,}" for when in ("before", "after"))
    assert f"taylor: {before} -> {after} parameters" in printed and "masked and pruned model differ by" in printed
    assert f"{metrics['pruning_bytes_before']:,} -> {metrics['pruning_bytes_after']:,} bytes" in printed
    assert f"{metrics['pruned_bpb']:.4f} right after pruning, {metrics['eval_bpb']:.4f} at the end" in printed
    assert AutoConfig.from_pretrained(out).pruning["method"] == "taylor"
    report = PruningReport.from_dict(json.loads((out / "pruning" / "report.json").read_text()))
    assert (report.metric, report.quality_before, report.quality_pruned) == (
        "bpb",
        metrics["before_bpb"],
        metrics["pruned_bpb"],
    )
    assert report.quality_at_the_end == metrics["eval_bpb"]
    assert report.sizes() == {name: value for name, value in metrics.items() if name.startswith("pruning_")}
    rows = [f"| {words} | {quality:.5g} |" for words, quality in report.stages().items()]
    assert len(rows) == 3 and "\n".join(rows) in (out / "README.md").read_text()


def test_the_printed_lines_load_a_foreign_model_that_was_pruned_twice(text, gpt2, tmp_path, capsys):
    once, twice = tmp_path / "once", tmp_path / "twice"
    prune.main(one_shot(text, gpt2, once, prune_target_sparsity=0.3, max_steps=2))
    prune.main(one_shot(text, once, twice, prune_target_sparsity=0.3, score="random"))
    lines = re.search(r"load it with:\n(.*\nmodel = .*)\n", capsys.readouterr().out[-600:])[1]
    names = {}
    exec(lines, names)
    model = names["model"].eval()
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((twice / "pruning" / "report.json").read_text())["parameters_after"]
    )
    assert model.config.pruning["parameters_before"] == GPT2LMHeadModel.from_pretrained(gpt2).num_parameters()
    metrics = json.loads((twice / "all_results.json").read_text())
    assert metrics["before_bpb"] == json.loads((once / "all_results.json").read_text())["eval_bpb"]
    windows = evaluation_windows(np.fromfile(text, dtype=np.uint8)[2745:2897], 32)
    with torch.no_grad():
        nats = [
            model(**{k: v[None] for k, v in window.items()}).loss * (window["labels"] != -100).sum()
            for window in windows
        ]
    assert float(sum(nats)) / 151 / np.log(2) == pytest.approx(metrics["eval_bpb"], rel=1e-5)


def test_a_pruned_gpt2_computes_what_its_masked_parent_computes(text, gpt2, tmp_path):
    out = tmp_path / "run"
    prune.main(one_shot(text, gpt2, out))
    config = AutoConfig.from_pretrained(out)
    model = load_pruned(out, AutoModelForCausalLM.from_config(config)).eval()
    parent = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    kept = json.loads((out / "pruning" / "report.json").read_text())["kept"]
    for name, ranges in kept.items():
        module = parent.get_submodule(name)
        left = [
            i for a, _, b in (run.partition("-") for run in ranges.split(",")) for i in range(int(a), int(b or a) + 1)
        ]
        size = 4 if name.endswith("attn") else 1
        gone = sorted(set(range(module.c_proj.nx)) - {i * size + j for i in left for j in range(size)})
        module.c_proj.weight.data[gone] = 0
    ids = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, parent(ids).logits, atol=1e-5, rtol=1e-5)
        assert (model(ids).logits - GPT2LMHeadModel.from_pretrained(gpt2)(ids).logits).abs().max() > 0.01


def test_a_checkpoint_with_its_own_tokenizer_is_measured_in_its_tokens(text, tmp_path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(use_regex=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet, max_token_length=3)
    backend.train([str(text)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "llama")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, **shape, **SPECIAL)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    metrics = prune.main(one_shot(text, tmp_path / "llama", tmp_path / "run", block_size=16, sparsities="0.3"))
    assert np.log2(metrics["eval_perplexity"]) == pytest.approx(np.log2(300), abs=0.5)
    assert 3 < metrics["eval_bpb"] < 6  # of tokens of one to three bytes
    point = json.loads((tmp_path / "run" / "curve.json").read_text())[0]
    assert point["bpb"] == pytest.approx(metrics["before_bpb"])
    assert "tokens, stride 8, of 152 bytes" in (tmp_path / "run" / "README.md").read_text()
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "run")) == 300


def test_the_curve_shows_each_sparsity_and_leaves_the_checkpoint_alone(text, checkpoint, tmp_path, capsys):
    out, before = tmp_path / "curve", (checkpoint / "model.safetensors").read_bytes()
    assert prune.main(arguments(text, checkpoint, out, score="magnitude", sparsities="0.7,0.3")) == {}
    points = json.loads((out / "curve.json").read_text())
    assert [point["target"] for point in points] == [0, 0.3, 0.7]
    assert all(point["target"] <= point["sparsity"] < point["target"] + 0.2 for point in points)
    assert points[0]["parameters"] > points[1]["parameters"] > points[2]["parameters"]
    assert len({point["bpb"] for point in points}) == 3 and points[0]["score"] == "magnitude"
    assert {path.name for path in out.iterdir()} == {"curve.json", "curve.png"}
    assert (out / "curve.png").stat().st_size > 5000 and "sparsity 0.000:" in capsys.readouterr().out
    assert (checkpoint / "model.safetensors").read_bytes() == before
    whole = prune.main(one_shot(text, checkpoint, tmp_path / "run", prune_target_sparsity=0.3))
    assert whole["eval_bpb"] == points[1]["bpb"] and whole["before_bpb"] == points[0]["bpb"]


def test_learned_masks_end_in_a_smaller_checkpoint(text, checkpoint, tmp_path):
    out, steps = tmp_path / "run", {"max_steps": 60, "prune_end_step": 40, "weight_decay": 0.01}
    learned = {"prune_method": "l1", "prune_target_sparsity": 0.4, "logging_steps": 10, **steps}
    metrics = prune.main(arguments(text, checkpoint, out, **learned))
    report = json.loads((out / "pruning" / "report.json").read_text())
    assert report["method"] == "l1" and report["sparsity"] >= 0.4 and report["max_difference"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == report["parameters_after"]
    assert not [name for name in load_file(out / "model.safetensors") if "mask" in name]
    assert metrics["eval_bpb"] < metrics["before_bpb"] and (out / "pruning" / "report.png").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"score": "size"}, "--score size: expected one of first_k, random"),
        ({"prune_method": "l1"}, "--score magnitude and --prune_method l1: expected exactly one"),
        ({"score_scope": "layer"}, "--score_scope layer: expected one of group, global"),
        ({"score_windows": 0}, "--score_windows 0: expected at least 1"),
        ({"sparsities": "0.3,most"}, "--sparsities 0.3,most: expected fractions"),
        ({"sparsities": "1"}, "--sparsities 1: expected fractions of at least 0 and below 1"),
        ({"prune_targets": "tails"}, "expected some of heads, neurons"),
        ({"prune_target_sparsity": 0.99}, "at most 0.* of the prunable parameters can go"),
        ({"score": "apoz"}, "apoz found the 4 heads of 'model.layers.0.self_attn' equally often zero"),
        ({"train_file": "/nowhere/text.txt"}, "no file '/nowhere/text.txt'"),
    ],
)
def test_bad_input_gets_one_clear_error(text, checkpoint, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        prune.main(one_shot(text, checkpoint, tmp_path / "run", **extra))
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_what_is_missing_is_named(text, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="--score needs --prune_target_sparsity, or --sparsities"):
        prune.main(arguments(text, checkpoint, tmp_path / "run", score="magnitude"))
    with pytest.raises(ValueError, match="--score None and --prune_method None"):
        prune.main(arguments(text, checkpoint, tmp_path / "run"))
    with pytest.raises(ValueError, match="nothing to prune: name a checkpoint with --model_name_or_path"):
        prune.main(one_shot(text, checkpoint, tmp_path / "run")[2:])


def test_checkpoints_that_are_no_byte_or_token_language_models_are_refused(text, gpt2, make_config, tmp_path):
    ReZeroForMaskedLM(make_config(is_causal=False)).save_pretrained(tmp_path / "mlm")
    with pytest.raises(ValueError, match="holds a ReZeroForMaskedLM: this script prunes causal language models"):
        prune.main(one_shot(text, tmp_path / "mlm", tmp_path / "run"))
    ReZeroForCausalLM(make_config(vocab_size=600)).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="has no tokenizer, and vocab_size=600 is not that of a byte model"):
        prune.main(one_shot(text, tmp_path / "large", tmp_path / "run"))
    with pytest.raises(
        ValueError, match="inputs of 64 bytes are longer than the position table, max_position_embeddings=32"
    ):
        prune.main(one_shot(text, gpt2, tmp_path / "run", block_size=64))


def test_an_earlier_run_is_never_overwritten(text, checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("results of a week")
    with pytest.raises(ValueError, match="is not empty: choose another, remove it"):
        prune.main(one_shot(text, checkpoint, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_the_script_explains_itself():
    shown = run_script("prune.py", "--help").stdout
    for name in ("--score", "--sparsities", "--prune_method", "--prune_target_sparsity", "--block_size"):
        assert name in shown


@pytest.mark.parametrize("as_json", [False, True])
def test_pictures_of_hundreds_of_layers_and_units_are_drawn(tmp_path, as_json):
    units = {f"model.layers.{i}.mlp": ("neurons", 300 + 10 * i) for i in range(100)}
    units |= {"model.layers": ("layers", 100), "model.layers.3.self_attn": ("heads", 4)}
    kept = {name: list(range(0, count, 3)) for name, (_, count) in units.items()} | {"model.layers.3.self_attn": []}
    report = PruningReport("given", None, 0.5, 100, 50, units, kept)
    plot_kept(json.loads(json.dumps(report.to_dict())) if as_json else report, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 20_000
    points = [{"score": score, "sparsity": s, "loss": s} for score in ("random", "taylor") for s in (0.0, 0.5)]
    plot_sparsity_curve(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
