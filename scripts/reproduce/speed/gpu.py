"""Every figure that needs a device, in one command of at most ten minutes.

    make gpu TRAIN_FILE=text.xz     # or: python scripts/reproduce/run.py gpu --train_file text.xz

Training in bf16 against the device's own measured peak and against GPT-2 and Llama, eager and compiled by layer; CUDA graphs;
steps of optimizers against fused AdamW; what GradInit costs; what pruning gains; bits per byte in the time that is left.
Sections stand in the order of their worth. Each is written as soon as it is done, and those that do not fit into the minutes
are named in the result file. Without a device everything runs in small on the CPU (`--tiny`), to try the script.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from common import byte_lm
from common.equal_models import VOCABULARY, builders, loss_of
from common.record import RESULTS, save
from hf_rezero import LAMB, Muon, RAdam, Ranger, gradinit_, param_groups
from hf_rezero.pruning import find_groups, magnitude, prune_, select


ARMS = ("GPT-2", "Llama", "ReZero, learned positions")
REZERO = ARMS[2]


@dataclass(frozen=True)
class Sizes:
    """What is measured: models as (layers, width, heads, tokens, batch), the side of the product that gives the peak, steps."""

    models: dict[str, tuple[int, int, int, int, int]]
    launch_bound: tuple[int, int, int, int, int]
    matrix: int
    steps: int
    evaluation_windows: int


FULL = Sizes(
    {"12 x 512": (12, 512, 8, 512, 128), "128 x 256": (128, 256, 4, 512, 64)}, (128, 256, 4, 128, 16), 8192, 20, 2048
)
TINY = Sizes({"2 x 32": (2, 32, 2, 32, 4)}, (2, 32, 2, 16, 4), 128, 2, 16)


@dataclass
class Run:
    """What the sections share: the device, the sizes, the clock and what was found so far."""

    device: torch.device
    sizes: Sizes
    deadline: float
    args: argparse.Namespace
    results: dict

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], object]) -> float:
        """Median time of a step, three of which warm up."""
        times = []
        for _ in range(3 + self.sizes.steps):
            start = time.perf_counter()
            step()
            self.wait()
            times.append(time.perf_counter() - start)
        return median(times[3:])

    def model(self, arm: str, size: tuple, compiled: bool = False) -> nn.Module:
        """A new model on the device."""
        torch.manual_seed(0)
        model = builders(*size[:4])[arm]().to(self.device)
        for module in model.modules():
            if compiled and isinstance(module, GradientCheckpointingLayer):
                module.compile()
        return model

    def ids(self, size: tuple) -> torch.Tensor:
        """(B, T)."""
        return torch.randint(0, 256, (size[4], size[3]), device=self.device)

    def training_step(self, model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
        """Forward, backward and fused AdamW in bf16 autocast, without waiting for the device."""
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True, capturable=self.device.type == "cuda")

        def step():
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        return step


def flops_per_token(model: nn.Module, size: tuple) -> float:
    """Of forward and backward: six for each weight of a product, and of causal attention 6 T for each layer and width."""
    layers, width, _, tokens, _ = size
    products = sum(p.numel() for p in model.parameters() if p.ndim == 2) - sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings != VOCABULARY
    )
    tied = any(p is model.get_input_embeddings().weight for p in model.get_output_embeddings().parameters())
    products -= 0 if tied else model.get_input_embeddings().weight.numel()
    return 6.0 * products + 6.0 * layers * tokens * width


def peak(run: Run) -> dict:
    """Operations a second of one square product in bf16: what the device can do, not what its maker says."""
    side = run.sizes.matrix
    a, b = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    return {"teraflops": 2 * side**3 / run.seconds(lambda: a @ b) / 1e12}


def training(run: Run) -> dict:
    """Tokens a second, share of the peak, and memory of each model, eager and compiled."""
    found = {}
    for name, size in run.sizes.models.items():
        for arm in ARMS:
            for form in ("eager", "compiled"):
                model, ids = run.model(arm, size, form == "compiled"), run.ids(size)
                if run.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                rate = ids.numel() / run.seconds(run.training_step(model, ids))
                share = rate * flops_per_token(model, size) / run.results["peak"]["teraflops"] / 1e12
                memory = torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else None
                found[f"{name} | {arm} | {form}"] = {"tokens_per_second": rate, "share": share, "gigabytes": memory}
    return found


def graphs(run: Run) -> dict:
    """A step of few tokens, where the device waits for Python: eager against one CUDA graph of all of it."""
    model, ids = run.model(REZERO, run.sizes.launch_bound), run.ids(run.sizes.launch_bound)
    step = run.training_step(model, ids)
    found = {"eager": run.seconds(step)}
    if run.device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        found["graph"] = run.seconds(graph.replay)
    return found


def optimizers(run: Run) -> dict:
    """Milliseconds of one step on the parameters of the first model."""
    size = next(iter(run.sizes.models.values()))
    made = {
        "AdamW, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
        "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
        **{cls.__name__: cls for cls in (RAdam, Ranger, LAMB, Muon)},
    }
    found = {}
    for name, make in made.items():
        model = run.model(REZERO, size)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = make(param_groups(model, weight_decay=0.01))
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        found[name] = 1000 * run.seconds(optimizer.step)
    return found


def gradinit(run: Run) -> dict:
    """Seconds of a step of GradInit against one of training, both eager in fp32 without autocast."""
    size = next(iter(run.sizes.models.values()))
    size = (*size[:4], max(4, size[4] // 4))
    model, steps = run.model(REZERO, size), 4
    batches = [{"input_ids": ids, "labels": ids} for ids in (run.ids(size) for _ in range(2 * steps))]
    report = gradinit_(model, batches, eta=1e-3, num_steps=steps)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step():
        loss_of(model, batches[0]["input_ids"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"training": run.seconds(step), "gradinit": report.seconds / steps}


def pruning(run: Run) -> dict:
    """Inference of the first model and of itself without half of its heads and neurons."""
    size = next(iter(run.sizes.models.values()))
    model, ids = run.model(REZERO, size).eval().to(torch.bfloat16), run.ids(size)

    @torch.inference_mode()
    def step():
        model(ids, use_cache=False)

    found = {"dense": run.seconds(step)}
    groups = find_groups(model, ("heads", "neurons"))
    prune_(model, groups, select(model, groups, magnitude(model, groups), 0.5))
    return found | {"half": run.seconds(step)}


def quality(run: Run) -> dict:
    """Bits per byte against seconds, in the time that is left, at a rate that falls to 0 with it."""
    args, size = run.args, next(iter(run.sizes.models.values()))
    args.block_size, args.batch_size, args.device, args.windows = (
        size[3],
        size[4],
        run.device,
        run.sizes.evaluation_windows,
    )
    byte_lm.load_text(args)
    model = run.model(REZERO, size, compiled=run.device.type == "cuda")
    optimizer, start = byte_lm.adamw(model, args.learning_rate), time.perf_counter()
    budget, curve, tokens = args.quality_seconds or run.deadline - start - 20, [], 0
    for rows in byte_lm.row_batches(args, 10**6, 0):
        left = 1 - (time.perf_counter() - start) / budget
        if left <= 0:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, left / 0.3)
        loss = byte_lm.step(model, optimizer, rows, args)
        tokens += rows.size * size[3]
        if not curve or time.perf_counter() - start > curve[-1][0] + budget / 20:
            curve.append([round(time.perf_counter() - start, 1), round(loss.item() / math.log(2), 4)])
    return {"seconds": budget, "bytes": tokens, "test": byte_lm.evaluate(model, args), "curve": curve}


SECTIONS = (peak, training, graphs, optimizers, gradinit, pruning, quality)


def measure(run: Run, output: Path) -> None:
    """All sections that start before the deadline, each written when it is done."""
    for section in SECTIONS:
        name = section.__name__
        if time.perf_counter() > run.deadline:
            run.results["not reached"] = [*run.results.get("not reached", []), name]
            continue
        start = time.perf_counter()
        run.results[name] = section(run)
        run.results["took"] = run.results.get("took", {}) | {name: round(time.perf_counter() - start, 1)}
        save(output, run.results)
        print(f"{name}: {run.results[name]}", flush=True)
    save(output, run.results)


def table(results: dict) -> list[list[str]]:
    """One row for each figure, with the goal where there was one."""
    rows = [["figure", "goal on a GPU", f"measured on {results['device']}"]]
    rows.append(["one bf16 product, teraflops", "", f"{results['peak']['teraflops']:.2f}"])
    for name, found in results.get("training", {}).items():
        size, arm, form = name.split(" | ")
        goal = {"12 x 512": "40 %", "128 x 256": "30 %"}.get(size, "") if (arm, form) == (REZERO, "compiled") else ""
        memory = "" if found["gigabytes"] is None else f", {found['gigabytes']:.1f} GB"
        shown = f"{found['tokens_per_second']:,.0f} tokens a second, {found['share']:.1%} of the peak{memory}"
        rows.append([f"training {size}, {arm}, {form}", goal, shown])
    if "graphs" in results:
        eager, graph = results["graphs"]["eager"], results["graphs"].get("graph")
        rows.append(
            ["step of few tokens: CUDA graph against eager", "3", f"{eager / graph:.2f}" if graph else "no CUDA"]
        )
    for name, milliseconds in results.get("optimizers", {}).items():
        ratio = milliseconds / results["optimizers"]["AdamW, fused"]
        rows.append([f"step of {name} against fused AdamW", "1.3" if name == "Ranger" else "", f"{ratio:.2f}"])
    if "gradinit" in results:
        rows.append(
            [
                "step of GradInit against training",
                "",
                f"{results['gradinit']['gradinit'] / results['gradinit']['training']:.1f}",
            ]
        )
    if "pruning" in results:
        rows.append(
            [
                "inference with half of the heads and neurons, speed",
                "",
                f"{results['pruning']['dense'] / results['pruning']['half']:.2f}",
            ]
        )
    if "quality" in results:
        found = results["quality"]
        rows.append([f"test bpb after {found['seconds']:.0f} s", "1.2 in 15 minutes", f"{found['test']:.3f}"])
    return rows


def main() -> None:
    """Measure everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no section starts")
    parser.add_argument("--quality_seconds", type=float, help="of the last section; by default what is left")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of the last section")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script; always on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    args.threads, args.bf16 = 1, True
    torch.set_num_threads(1)
    device = torch.device(args.device)
    tiny = args.tiny or device.type == "cpu"
    label = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU, tiny sizes"
    results = {"device": label, "corpus": Path(args.train_file).name}
    run = Run(device, TINY if tiny else FULL, time.perf_counter() + 60 * args.minutes, args, results)
    measure(run, args.output)
