"""What a step of 10,000 fully connected layers costs: seconds, memory, and seconds for each layer against 100 layers.

    python scripts/reproduce/run.py depth_cost

A step is forward, backward and Adagrad on 100 pictures at width 150, with gradient checkpointing. Steps of the two depths
alternate in one process, many of the shallow one for each of the deep one; the ratio is of medians. Memory is the peak of
the process.
"""

import argparse
import resource
import time
from pathlib import Path
from statistics import median

import torch

from common.record import RESULTS, save
from hf_rezero import ReZeroMLPConfig, ReZeroMLPForImageClassification


def stepper(layers: int, width: int):
    """A function that takes one training step and returns its seconds."""
    torch.manual_seed(0)
    config = ReZeroMLPConfig(num_hidden_layers=layers, hidden_size=width, num_labels=10)
    model = ReZeroMLPForImageClassification(config).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-4)
    images, labels = torch.randn(100, 3, 32, 32), torch.randint(10, (100,))

    def step() -> float:
        start = time.perf_counter()
        model(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return time.perf_counter() - start

    step()
    return step


def table(results: dict) -> list[list[str]]:
    """One row."""
    costs = results["results"]
    seconds = [f"{costs['seconds_per_step'][layers]:.2f}" for layers in ("100", "10000")]
    return [
        ["a step of 100 pictures", "100 layers, s", "10,000 layers, s", "time per layer, 10,000 to 100", "memory, GB"],
        ["ReZero x 150, Adagrad", *seconds, f"{costs['per_layer_against_100']:.2f}", f"{costs['peak_gb']:.1f}"],
    ]


def main() -> None:
    """Time both depths and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "depth_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    depths = (100, args.layers)
    steps = {layers: stepper(layers, args.width) for layers in depths}
    seconds: dict[int, list[float]] = {layers: [] for layers in depths}
    for _ in range(args.rounds):
        seconds[100] += [steps[100]() for _ in range(10)]
        seconds[args.layers].append(steps[args.layers]())
    medians = {layers: median(times) for layers, times in seconds.items()}
    per_layer = [medians[layers] / layers for layers in depths]
    results = {
        "seconds_per_step": {str(layers): round(t, 4) for layers, t in medians.items()},
        "per_layer_against_100": round(per_layer[1] / per_layer[0], 3),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    save(args.output, {"results": results})
    print(results)
