"""What the defaults of the text model are worth: one change at a time, early training loss, several seeds.

    python scripts/reproduce/run.py defaults --train_file enwik8_prefix.xz

All variants of a seed take the same batches at the same constant learning rate, without warmup. Differences are given
against the default of the same seed; their spread over the seeds is the noise. Results are written after every run
and a repeated call goes on where it stopped.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch

from common.record import RESULTS, provenance, read_json, write_json
from hf_rezero import load_corpus
from rezero.deep_without_warmup import final, train


VARIANTS = {
    "default": {},
    "embedding_std 0.02 (the GPT-2 habit)": {"embedding_std": 0.02},
    "final norm": {"final_norm": True},
    "resweight_init 0.125 (1/sqrt(2 layers))": {"resweight_init": 0.125},
    "ReZero + pre-norm": {"norm_position": "pre", "final_norm": False},
    "ReLU": {"hidden_act": "relu"},
    "GELU by erf": {"hidden_act": "gelu"},
    "learned positions": {"position_embedding_type": "learned"},
}


def main() -> None:
    """Run every variant for every seed, then print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "defaults.json"
    results = read_json(path) or {"settings": vars(args) | {"train_file": Path(args.train_file).name}, "runs": {}}
    args.corpus = load_corpus(args.train_file)
    for seed in range(args.seeds):
        for variant, values in VARIANTS.items():
            key = f"{variant} seed={seed}"
            if key not in results["runs"]:
                curve = train(values, args.learning_rate, seed, args)
                results["runs"][key] = {"final": final(curve, args.steps), "curve": [round(x, 4) for x in curve]}
                results["provenance"] = provenance()
                write_json(path, results)
                print(f"{key}: {results['runs'][key]['final']:.3f}", flush=True)
    finals = {v: [results["runs"][f"{v} seed={s}"]["final"] for s in range(args.seeds)] for v in VARIANTS}
    results["table"] = {
        variant: {
            "bits_per_byte": mean(values),
            "against_default_by_seed": [a - b for a, b in zip(values, finals["default"], strict=True)],
        }
        for variant, values in finals.items()
    }
    write_json(path, results)
