"""`--rezero`: any model of transformers with residual weights, from training to every command that opens its folder."""

import numpy as np
import pytest
from safetensors.torch import load_file
from support.launch import run_command
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_rezero.commands import clm, diagnose, generate, grow, mlm, prune


SHAPE = "hidden_size=16,intermediate_size=24,num_hidden_layers=3,num_attention_heads=2"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 105, 3050).astype(np.uint8).tobytes())
    return path


def arguments(text, output_dir, **extra):
    values = {
        "train_file": text,
        "output_dir": output_dir,
        "block_size": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def new(text, output_dir, model_type, **extra):
    values = {"do_train": True, "do_eval": True, "model_type": model_type, "config_overrides": SHAPE, "rezero": True}
    return arguments(text, output_dir, **values | extra)


@pytest.fixture(scope="module")
def checkpoint(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "llama"
    clm.main(new(text, folder, "llama", rezero_args="resweight_sharing=layer,final_norm=remove"))
    return folder


def test_a_run_leaves_a_checkpoint_with_its_code_and_a_card_that_says_how_to_load_it(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "RewrittenLlamaForCausalLM"
    weights = load_file(checkpoint / "model.safetensors")
    assert {n for n in weights if "norm" in n} == set()
    moved = [weight for name, weight in weights.items() if name.endswith("resweight")]
    assert len(moved) == 3 and all(weight.any() for weight in moved)
    assert (checkpoint / "modeling_rewritten.py").exists() and (checkpoint / "resweights.png").exists()
    card = (checkpoint / "README.md").read_text()
    assert "import hf_rezero" in card and "trust_remote_code=True" in card


def test_every_command_opens_it(text, checkpoint, tmp_path, capsys):
    assert generate.main([str(checkpoint), "--max_new_tokens", "4"]).startswith("def ")
    diagnose.main([str(checkpoint), "--text", text.read_text()[:200], "--output_dir", str(tmp_path / "look")])
    assert grow.main([str(checkpoint), str(tmp_path / "deeper"), "--num_layers", "1"])
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "deeper").model.layers) == 4
    prune.main(
        arguments(
            text,
            tmp_path / "small",
            model_name_or_path=checkpoint,
            score="magnitude",
            prune_target_sparsity=0.3,
        )
    )
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.num_parameters() < AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters()
    metrics = clm.main(
        arguments(text, tmp_path / "on", model_name_or_path=tmp_path / "small", do_train=True, do_eval=True)
    )
    assert metrics["eval_bpb"] > 0
    assert "import hf_rezero; from transformers import AutoModelForCausalLM" in capsys.readouterr().out


def test_two_processes_report_once(text, tmp_path):
    values = {"max_steps": 2, "per_device_train_batch_size": 2, "do_eval": False}
    done = run_command("clm", *new(text, tmp_path / "run", "llama", **values), processes=2)
    report = "3 layers, 6 residual weights on 6 projections, 7 norms removed, weights new"
    assert done.stdout.count(report) == 1
    assert "2 processes" in (tmp_path / "run" / "README.md").read_text()


def test_masked_language_models_too(text, tmp_path):
    metrics = mlm.main(new(text, tmp_path / "bert", "bert"))
    assert metrics["eval_loss"] > 0 and (tmp_path / "bert" / "modeling_rewritten.py").exists()


def test_a_checkpoint_gets_residual_weights_of_1_and_keeps_what_it_computes(text, tmp_path):
    plain = new(text, tmp_path / "plain", "llama", rezero=False)
    before = clm.main(plain)
    values = {"model_name_or_path": tmp_path / "plain", "rezero": True, "do_eval": True}
    assert clm.main(arguments(text, tmp_path / "gated", **values))["eval_loss"] == pytest.approx(
        before["eval_loss"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rezero": False, "rezero_args": "norm=keep"}, "got --rezero_args norm=keep: expected --rezero with"),
        ({"rezero_args": "nrom=keep"}, "got --rezero_args nrom=keep"),
        ({"rezero_args": "norm=drop"}, "got norm='drop': expected 'remove' or 'keep'"),
        ({"model_type": "rezero"}, "ReZeroForCausalLM is no model of transformers"),
    ],
)
def test_bad_arguments_get_one_clear_error(text, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        clm.main(new(text, tmp_path / "run", **{"model_type": "llama", **extra}))
