"""`scripts/run_clm.py` and `scripts/generate.py` as their users start them."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.launch import SCRIPTS, run_command, run_script
from transformers import AutoModelForCausalLM

from hf_rezero.commands import clm as run_clm
from hf_rezero.commands import generate
from hf_rezero.trainer.arguments import ReZeroTrainingArguments


SHAPE = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,resweight_init=0.5"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 105, 3050).astype(np.uint8).tobytes())
    return path


def arguments(text, output_dir, **extra):
    values = {
        "train_file": text,
        "output_dir": output_dir,
        "config_overrides": SHAPE,
        "block_size": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "do_train": True,
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def losses(output_dir):
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_finished_run_leaves_everything_a_user_looks_for(text, tmp_path, capsys):
    out = tmp_path / "run"
    metrics = run_clm.main(arguments(text, out, do_eval=True, do_predict=True, logging_steps=2))
    names = {path.name for path in out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "modeling_rezero.py", "tokenizer.json", "all_results.json"}
    assert (out / "training.png").stat().st_size > 5000 and (out / "resweights.png").stat().st_size > 3000
    saved = json.loads((out / "all_results.json").read_text())
    assert saved["eval_bpb"] == metrics["eval_bpb"] and saved["test_bpb"] == metrics["test_bpb"]
    # eight equally likely letters: 3 bits, plus what six steps have not learned
    assert 2.9 < metrics["test_bpb"] < 8
    evaluate = {"do_train": False, "do_predict": True, "model_name_or_path": out}
    words = arguments(text, tmp_path / "again", **evaluate)
    shape = words.index("--config_overrides")
    again = run_clm.main(words[:shape] + words[shape + 2 :])
    assert again["test_bpb"] == pytest.approx(metrics["test_bpb"], rel=1e-6)
    sample = generate.main([str(out), "--prompt", "abc", "--max_new_tokens", "5"])
    assert sample.startswith("abc") and capsys.readouterr().out.strip().endswith(sample.strip())


def test_a_run_that_ends_before_its_first_log_has_its_picture_too(text, tmp_path):
    run_clm.main(arguments(text, tmp_path / "run", max_steps=2, logging_steps=100))
    assert not losses(tmp_path / "run") and (tmp_path / "run" / "training.png").stat().st_size > 5000


def test_a_yaml_file_gives_the_arguments_and_the_command_line_wins(text, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"train_file: {text}\nconfig_overrides: {SHAPE}\nblock_size: 32\nlearning_rate: 1e-3\nmax_steps: 9\n"
        "do_train: true\nuse_cpu: true\ndisable_tqdm: true\nlr_scheduler_kwargs: {}\nsave_strategy: 'no'\n"
    )
    run_clm.main([str(config), "--output_dir", str(tmp_path / "run"), "--max_steps", "2"])
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert isinstance(args, ReZeroTrainingArguments)
    assert (args.learning_rate, args.max_steps) == (1e-3, 2)
    config.write_text("lerning_rate: 1\n")
    with pytest.raises(ValueError, match="unknown argument lerning_rate: did you mean learning_rate"):
        run_clm.main([str(config)])
    with pytest.raises(ValueError, match="does not exist: name a YAML or JSON file"):
        run_clm.main([str(tmp_path / "none.yaml")])


def test_overrides_rebuild_derived_fields(text, tmp_path):
    overrides = "hidden_size=48,num_hidden_layers=1,num_attention_heads=3,norm_position=pre,norm_type=rmsnorm"
    run_clm.main(arguments(text, tmp_path / "run", max_steps=1, config_overrides=overrides))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert (config.head_dim, config.intermediate_size, config.final_norm) == (16, 192, True)


def test_other_architectures_train_on_the_same_bytes(text, tmp_path):
    shape = "n_embd=16,n_layer=1,n_head=2,n_positions=32"
    metrics = run_clm.main(
        arguments(text, tmp_path / "run", model_type="gpt2", config_overrides=shape, do_eval=True, max_steps=2)
    )
    assert metrics["eval_bpb"] > 0
    assert not (tmp_path / "run" / "resweights.png").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"config_overrides": "hidden_sizes=3"},
            "config_overrides has 'hidden_sizes', which ReZeroConfig does not have",
        ),
        ({"config_overrides": "hidden_size"}, "write name=value"),
        ({"model_type": "resnet9000"}, "model_type='resnet9000' is unknown"),
        ({"dataset_name": "enwik8"}, "exactly one of --dataset_name and --train_file"),
        ({"block_size": 5000}, "the training part has 2745 bytes, one block needs 5000"),
        (
            {"config_overrides": SHAPE + ",position_embedding_type=learned,max_position_embeddings=16"},
            "inputs of 32 bytes are longer than the position table, max_position_embeddings=16",
        ),
        (
            {"config_overrides": SHAPE + ",vocab_size=100"},
            "the model knows 100 tokens: bytes and special tokens need 262",
        ),
        ({"resume_from_checkpoint": "true"}, "holds 0 checkpoints"),
        ({"train_file": "/nowhere/text.txt"}, "no file '/nowhere/text.txt'"),
    ],
)
def test_bad_input_gets_one_clear_error(text, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        run_clm.main(arguments(text, tmp_path / "run", **extra))
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_an_earlier_run_is_never_overwritten(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("results of a week")
    with pytest.raises(ValueError, match="is not empty: choose another, remove it, or go on with"):
        run_clm.main(arguments(text, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


# dies in the middle of checkpoint-40, which has its weights but no optimizer
KILLED_RUN = """
import os, signal, sys
import torch
from hf_rezero.commands import clm as run_clm

save = torch.save

def save_or_die(value, file, **options):
    if "checkpoint-40" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    save(value, file, **options)

torch.save = save_or_die
run_clm.main(sys.argv[1:])
"""


@pytest.mark.parametrize("optim", [{}, {"optim": "gc+lookahead+adamw_torch", "optim_args": "lookahead_k=7"}])
def test_a_killed_run_resumes_to_the_same_weights(text, tmp_path, optim):
    options = {"max_steps": 90, "save_steps": 20, "save_total_limit": 2, "resweight_learning_rate": 0.02, **optim}
    run_clm.main(arguments(text, tmp_path / "whole", **options))
    command = [sys.executable, "-c", KILLED_RUN, *arguments(text, tmp_path / "killed", **options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
    assert subprocess.run(command, env=env).returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-40" / "model.safetensors").exists()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    run_clm.main(arguments(text, tmp_path / "killed", resume_from_checkpoint="true", **options))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = (tmp_path / "killed" / "train_results.json").read_text()
    run_clm.main(arguments(text, tmp_path / "killed", resume_from_checkpoint="true", **options))
    assert (tmp_path / "killed" / "train_results.json").read_text() == before


def test_two_processes_give_the_losses_of_one(text, tmp_path):
    options = {"max_steps": 30, "do_eval": True, "do_predict": True, "eval_stride": 7}
    run_script("run_clm.py", *arguments(text, tmp_path / "one", **options))
    # as the docs write it: torchrun -m hf_rezero.commands.clm, without --use_cpu, on a machine that may have no other device
    both = {**options, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "use_cpu": False}
    run_command("clm", *arguments(text, tmp_path / "two", **both), processes=2)
    assert (tmp_path / "two" / "checkpoint-30" / "rng_state_1.pth").exists(), "the second process did not take part"
    assert "2 processes" in (tmp_path / "two" / "README.md").read_text()
    # 84 windows make 21 steps an epoch: the second epoch has its own cuts on every process
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    for key in ("eval_bpb", "test_bpb"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)


def test_a_run_without_a_purpose_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="nothing to do: give some of --do_train, --do_eval and --do_predict"):
        run_clm.main(arguments(text, tmp_path / "run", do_train=False))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("given", "switch"), [
    ({"prune_target_sparsity": 0.5}, "--prune_target_sparsity, which have no effect without --prune_method"),
    ({"gradinit_eta": 0.1, "gradinit_scale_lr": 0.1}, "--gradinit_eta, --gradinit_scale_lr, which .* --gradinit_steps"),
])  # fmt: skip
def test_arguments_that_nothing_would_read_are_refused(text, tmp_path, given, switch):
    with pytest.raises(ValueError, match=switch):
        run_clm.main(arguments(text, tmp_path / "run", **given))
