"""`scripts/configs/accelerate`: accelerate reads each file as it is meant, and those that CPUs can run do."""

import subprocess
import sys

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from support.launch import SCRIPTS, free_port


FILES = sorted((SCRIPTS / "configs" / "accelerate").glob("*.yaml"))
# file: processes, what the launcher tells them
MEANING = {
    "one_gpu": (1, {"ACCELERATE_USE_FSDP": None}),
    "ddp": (8, {"ACCELERATE_USE_FSDP": None}),
    "fsdp2": (8, {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
    "tensor_parallel": (8, {"PARALLELISM_CONFIG_TP_SIZE": "8", "ACCELERATE_USE_FSDP": None}),
    "several_nodes": (32, {"FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "true"}),
}


def test_every_file_has_a_meaning():
    assert {path.stem for path in FILES} == MEANING.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file_as_it_is_meant(path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, defaults, _ = _validate_launch_command(args)
    processes, told = MEANING[path.stem]
    assert args.num_processes == processes == defaults.num_processes
    environment = prepare_multi_gpu_env(args)
    assert {name: environment.get(name) for name in told} == told


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_cpus_run_what_the_file_starts(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    text = tmp_path / "text.bin"
    text.write_bytes(bytes(range(97, 123)) * 40)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--config_file", str(SCRIPTS / "configs" / "accelerate" / f"{name}.yaml")]
    launcher += ["--main_process_port", str(free_port()), "-m", "hf_rezero.commands.clm"]
    options = {
        "train_file": text,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "block_size": 16,
        "report_to": "none",
    }
    options |= {"config_overrides": "num_hidden_layers=1,hidden_size=16,num_attention_heads=2", "do_train": True}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in (tmp_path / "run" / "README.md").read_text()
    assert ("accelerate shards models on accelerators only, and takes DDP here" in done.stderr) == (name == "fsdp2")
