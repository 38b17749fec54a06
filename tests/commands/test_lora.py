"""`--lora_r` trains adapters and leaves the weights alone; gates of 0, which would block them, are refused."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.launch import run_command
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_rezero import ReZeroConfig, ReZeroForCausalLM
from hf_rezero.commands import clm


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 90)
    return tmp_path / "text.txt"


def arguments(text, model, output_dir, **extra):
    values = {
        "train_file": text,
        "model_name_or_path": model,
        "output_dir": output_dir,
        "block_size": 32,
        "max_steps": 30,
        "save_steps": 20,
        "learning_rate": 1e-2,
        "do_train": True,
        "do_eval": True,
        "lora_r": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture
def gpt2(tmp_path):
    shape = {"vocab_size": 264, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def rezero(tmp_path):
    def save(resweight):
        config = ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, resweight_init=resweight)
        path = tmp_path / f"rezero-{resweight}"
        if not path.exists():
            ReZeroForCausalLM(config).save_pretrained(path)
        return path

    return save


def test_adapters_learn_and_the_weights_stay(text, gpt2, tmp_path):
    before = clm.main(arguments(text, gpt2, tmp_path / "before", lora_r=0, do_train=None))
    weights = load_file(gpt2 / "model.safetensors")
    metrics = clm.main(arguments(text, gpt2, tmp_path / "run"))
    assert metrics["eval_bpb"] < before["eval_bpb"] - 0.1
    assert (tmp_path / "run" / "adapter_config.json").exists() and not (
        tmp_path / "run" / "model.safetensors"
    ).exists()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    named = dict(adapted.get_base_model().named_parameters())
    kept = {name.replace(".base_layer", ""): value for name, value in named.items()}
    assert all(torch.equal(kept[name], value) for name, value in weights.items() if name in kept)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run") is not None


def test_a_run_of_adapters_resumes_to_the_same_adapters(text, gpt2, tmp_path):
    whole = clm.main(arguments(text, gpt2, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-20", tmp_path / "half" / "checkpoint-20")
    half = clm.main(arguments(text, gpt2, tmp_path / "half", resume_from_checkpoint="true"))
    assert half["eval_bpb"] == whole["eval_bpb"]


def test_adapters_of_gates_at_zero_are_refused_and_those_of_trained_gates_learn(text, rezero, tmp_path):
    with pytest.raises(ValueError, match="2 branches have a residual weight of exactly 0, frozen beside the adapters"):
        clm.main(arguments(text, rezero(0.0), tmp_path / "run"))
    for name, gate, extra in (("trained", 0.5, {}), ("free", 0.0, {"lora_modules_to_save": "residuals.layer"})):
        clm.main(arguments(text, rezero(gate), tmp_path / name, max_steps=5, **extra))
        assert (tmp_path / name / "adapter_model.safetensors").exists()


def test_gradinit_of_trained_weights_is_refused(text, gpt2, tmp_path):
    with pytest.raises(
        ValueError, match="GradInit finds the scales that new weights start from, and those of .* trained"
    ):
        clm.main(arguments(text, gpt2, tmp_path / "run", gradinit_steps=5))


def test_pruning_while_adapters_train_is_refused_at_once_and_a_merged_model_is_pruned(text, rezero, tmp_path):
    masks = {"prune_method": "l1", "prune_target_sparsity": 0.3, "weight_decay": 0.1}
    with pytest.raises(
        ValueError, match="got --lora_r 4 and --prune_method l1: train adapters of a model that was pruned"
    ):
        clm.main(arguments(text, rezero(0.5), tmp_path / "run", **masks))
    clm.main(arguments(text, rezero(0.5), tmp_path / "run", max_steps=5, do_eval=None))
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    clm.main(arguments(text, tmp_path / "merged", tmp_path / "pruned", lora_r=0, **masks))
    sizes = [
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / n).parameters())
        for n in ("merged", "pruned")
    ]
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_adapters_of_two_processes_learn_what_those_of_one_learn(text, rezero, tmp_path):
    """With the same batches the gradients are sums of the same terms, in another order."""
    options = {"max_steps": 10, "weight_decay": 0.1}
    clm.main(arguments(text, rezero(0.5), tmp_path / "one", per_device_train_batch_size=4, **options))
    both = arguments(text, rezero(0.5), tmp_path / "two", per_device_train_batch_size=2, ddp_backend="gloo", **options)
    run_command("clm", *both, processes=2)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    assert any(value.abs().max() > 1e-3 for name, value in one.items() if "lora_B" in name)  # they start from 0
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    assert two["eval_bpb"] == pytest.approx(one["eval_bpb"], rel=1e-5)
