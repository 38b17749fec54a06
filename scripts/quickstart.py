"""Train a byte model on the sources of your own Python, and say how good it is and where to go on.

    python scripts/quickstart.py

Trains by `scripts/configs/quickstart.yaml`; arguments of `hf-rezero clm` are passed on to it. Replaces `outputs/quickstart`.
"""

import contextlib
import io
import platform
import shutil
import time
from pathlib import Path

import yaml

from hf_rezero import load_corpus
from hf_rezero.commands import clm, generate
from hf_rezero.commands.entry import run_command
from hf_rezero.data.baselines import bigram_bits, xz_bits
from hf_rezero.files import read_json
from hf_rezero.publish.record import RunRecord


CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
OUTPUT = Path("outputs/quickstart")
PROMPT = "    def __init__(self, "


def main(argv: list[str]) -> None:
    """Train, measure, sample, and print a screenful."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    start = time.perf_counter()
    precision = ["--bf16"] if has_bf16_units() else []
    metrics = clm.main([str(CONFIG), "--output_dir", str(OUTPUT), *precision, *argv])
    minutes = (time.perf_counter() - start) / 60
    print(report(metrics["test_bpb"], minutes))


def has_bf16_units() -> bool:
    """Whether the processor multiplies bf16 numbers by itself; elsewhere bf16 is slower than fp32."""
    with contextlib.suppress(OSError):
        return "bf16" in Path("/proc/cpuinfo").read_text()
    return False


def report(bits: float, minutes: float) -> str:
    """What was trained, how good it is, what it writes, where the pictures are and what to try next."""
    run, settings = RunRecord.from_dict(read_json(OUTPUT / "run.json")), yaml.safe_load(CONFIG.read_text())
    read = (run.training.steps or 0) * settings["per_device_train_batch_size"] * settings["block_size"]
    found = {"this model": bits, **baselines(read, settings["block_size"], settings["max_eval_samples"])}
    lines = [
        "",
        f"Trained   {run.model.parameters:,} parameters on {read:,} bytes of the sources of Python "
        f"{platform.python_version()}, in {minutes:.1f} minutes",
        "Quality   bits per byte of files that it has not seen (8 is knowing nothing, less is better):",
        *(f"    {value:.2f}  {name}" for name, value in sorted(found.items(), key=lambda item: -item[1])),
        "Writes    (the beginning of the first line is given)",
        *(f"    {line[:100]}" for line in sample().splitlines()[:12]),
        f"Pictures  {OUTPUT}/training.png, {OUTPUT}/resweights.png; card {OUTPUT}/README.md",
        "Next      (`source .venv/bin/activate` first, after `make`)",
        f"    hf-rezero generate {OUTPUT} --prompt 'import '",
        f"    hf-rezero diagnose {OUTPUT} --output_dir {OUTPUT}/diagnostics    how signals pass through it",
        f"    hf-rezero grow {OUTPUT} outputs/deeper --num_layers 6            twice as deep, the same outputs",
        "    hf-rezero clm --help                                                   train on a text of your own",
        "    docs/tutorials/first-model.md                                          the same in Python, step by step",
    ]
    return "\n".join(lines)


def baselines(read: int, block: int, windows: int) -> dict[str, float]:
    """Bits per byte of two others on the text that the model was tested on: so many windows, which overlap by half."""
    corpus = load_corpus("python-stdlib")
    text = corpus.test[: block + (windows - 1) * (block // 2)]
    return {
        "a bigram model": bigram_bits(corpus.train, text),
        "xz -9, behind as much text as the model has read": xz_bits(corpus.train[-read:], text),
    }


def sample() -> str:
    """What the saved model makes of the prompt."""
    with contextlib.redirect_stdout(io.StringIO()):
        return generate.main([str(OUTPUT), "--prompt", PROMPT, "--max_new_tokens", "220", "--temperature", "0.6"])


if __name__ == "__main__":
    run_command(main)
