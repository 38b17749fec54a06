"""Optimizers on a 12-layer byte model and a small conv net, each at its own learning rate, at small and large batches.

    python scripts/reproduce/run.py optimizers --train_file enwik8_prefix.xz --image_file cifar10_subset.npz

The learning rate is constant, then falls linearly to 0 over the last 40 % of the steps; it rises over the first 10 % in
arms with warmup, over the first half with long warmup. It is tuned for each arm, task and batch on seed 0 by the
validation loss, over 1, 3, 10, ... and on until the best is inside the grid; then come more seeds at the best. Small
and large batches see as many samples.
Gradients are clipped to norm 1. Other settings are the defaults of the classes, but for the weight decay and the trust
coefficient of LARS: with 0.001 the learning rate that moves a matrix is too much for the vectors, which have no ratio.
The post-norm Transformer is there for the claims about warmup, with the initial weights of this library and with those
of BERT. `first_steps` in the results is about RAdam's argument: what gradients look like without warmup, and how far
two runs that start alike agree on where to go.

A plain torch loop: nothing here needs the Trainer. Results are written after every run and a repeated call goes on where
it stopped.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from common.byte_lm import bits_per_byte
from common.drawing import GRAY, light_and_dark
from common.images import HELP, endless_rows, floats, read_images
from common.record import FIGURES, RESULTS, once, read_json, write_json
from common.rules import PLAIN
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, load_corpus, param_groups
from hf_rezero.data.windows import ByteDataset, collate_bytes, evaluation_windows
from hf_rezero.optim import LAMB, LARS, RAdam, Ranger, RangerLARS, lookahead
from hf_rezero.picture import Picture, label_lines, plot_seeds


TASKS = (
    "ReZero LM, batch 4",
    "post-norm LM, fan-in init, batch 4",
    "post-norm LM, init 0.02, batch 4",
    "conv net, batch 32",
    "conv net, batch 512",
    "ReZero LM, batch 24",
)
ADAMS = ("AdamW", "AdamW, warmup", "RAdam", "RAdam, warmup")
Make = Callable[[nn.Module, float], list[Optimizer]]
WEIGHT_DECAY = 0.01
BLOCK = 64
EVALUATED_WINDOWS = 128
VALIDATION_IMAGES = 1000
CURVE_POINTS = 30
EDGES = [-12 + i / 4 for i in range(53)]  # of the bins of log10 |gradient|


# --- optimizers


def plain(optimizer: Callable, weight_decay: float = WEIGHT_DECAY, **options) -> Make:
    """One optimizer for all parameters."""
    return lambda model, lr: [optimizer(param_groups(model, weight_decay=weight_decay), lr=lr, **options)]


def muon(model: nn.Module, lr: float) -> list[Optimizer]:
    """Muon for the hidden matrices, with steps as long as those of AdamW, which takes the rest."""
    hidden = dict(hidden_weights(model))
    # Muon takes matrices only: a convolution is one from all its inputs to its outputs
    views = {p: nn.Parameter(p.detach().flatten(1)) for p in hidden.values()}
    matrices = Muon(views.values(), lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")

    def give_gradients(*_):
        for p, view in views.items():
            view.grad = p.grad.flatten(1)

    matrices.register_step_pre_hook(give_gradients)
    groups = param_groups(model, weight_decay=WEIGHT_DECAY)
    rest = [group | {"params": [p for p in group["params"] if p not in views]} for group in groups]
    return [matrices, AdamW([group for group in rest if group["params"]], lr=lr, fused=True)]


def outer(make: Make, **options) -> Make:
    """Lookahead or SNOO around what `make` makes."""
    return lambda model, lr: [lookahead(inner, evaluate_slow=True, **options) for inner in make(model, lr)]


def hidden_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weight matrices and filters between the first and the last layer."""
    return [(name, p) for name, p in model.named_parameters() if "layers." in name and p.ndim >= 2]


@dataclass(frozen=True)
class Arm:
    """How the optimizer is made, the lowest of the four learning rates by index, and the look of its curve."""

    make: Make
    grid: int
    color: str
    style: str = "-"
    warmup: float = 0.0


adamw = plain(AdamW, fused=True)
LOOKAHEAD = {"k": 5, "alpha": 0.5}
SNOO = {"k": 10, "alpha": 0.7, "momentum": 0.5}
ARMS = {
    "AdamW": Arm(adamw, -6, "C0"),
    "AdamW, warmup": Arm(adamw, -6, "C0", "--", warmup=0.1),
    "AdamW, long warmup": Arm(adamw, -6, GRAY, warmup=0.5),
    "RAdam": Arm(plain(RAdam), -5, "C1"),
    "RAdam, warmup": Arm(plain(RAdam), -5, "C1", "--", warmup=0.1),
    "Ranger": Arm(plain(Ranger, evaluate_slow=True), -5, "C2"),
    "LARS": Arm(plain(LARS, 1e-4, trust_coefficient=0.02), -4, "C3"),
    "RangerLARS": Arm(plain(RangerLARS, evaluate_slow=True), -4, "C4"),
    "LAMB": Arm(plain(LAMB), -5, "C5"),
    "Muon": Arm(muon, -6, "C6"),
    "Lookahead(AdamW)": Arm(outer(adamw, **LOOKAHEAD), -6, "C0", ":"),
    "SNOO(AdamW)": Arm(outer(adamw, **SNOO), -6, "C0", "-."),
    "Lookahead(Muon)": Arm(outer(muon, **LOOKAHEAD), -6, "C6", ":"),
    "SNOO(Muon)": Arm(outer(muon, **SNOO), -6, "C6", "-."),
}


def rate(index: int) -> float:
    """..., 0.1, 0.3, 1 at index 0, 3, 10, ..."""
    return float(f"{(1, 3)[index % 2]}e{index // 2}")


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate that step 0, 1, ... takes."""
    rise = (step + 1) / (warmup * steps) if warmup else 1.0
    return min(1.0, rise, (steps - step) / (0.4 * steps))


# --- tasks


class Text:
    """Next bytes; losses in bits per byte."""

    def __init__(self, train_file: str, hidden_std: float | None = None, **config):
        corpus = load_corpus(train_file)
        self.hidden_std, self.config = hidden_std, config
        self.train = ByteDataset(corpus.train, BLOCK)
        parts = {"validation": corpus.validation, "test": corpus.test}
        self.held_out = {name: evaluation_windows(data, BLOCK, BLOCK - 1) for name, data in parts.items()}

    def model(self) -> nn.Module:
        """Width 64, with hidden weights from N(0, 1 / sqrt(fan-in)) as of the library, or from N(0, hidden_std)."""
        shape = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": BLOCK, "use_cache": False}
        model = ReZeroForCausalLM(ReZeroConfig(**shape, **self.config))
        if self.hidden_std is not None:
            for _, p in hidden_weights(model):
                nn.init.normal_(p, std=self.hidden_std)
        return model

    def loss(self, model: nn.Module, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Mean over the bytes of a batch."""
        return model(**collate_bytes(self.train.__getitems__(rows))).loss / math.log(2)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte, of windows from all over the text: `validation` is tuned, `test` reported."""
        return {name: self._bits_per_byte(model, windows) for name, windows in self.held_out.items()}

    def _bits_per_byte(self, model: nn.Module, windows: ByteDataset) -> float:
        return bits_per_byte(lambda batch: model(**batch).loss, windows, EVALUATED_WINDOWS, 4)


class Images:
    """Classes of images; losses in nats, `test` in per cent of images classified rightly."""

    def __init__(self, image_file: str):
        data = read_images(image_file)
        x, y = floats(data["train_x"]), data["train_y"].long()
        held_out = min(VALIDATION_IMAGES, len(x) // 2)
        self.train, self.validation = (x[:-held_out], y[:-held_out]), (x[-held_out:], y[-held_out:])
        self.test = floats(data["test_x"]), data["test_y"].long()

    def model(self) -> nn.Module:
        """Four convolutions with batch norm, 98,970 parameters."""
        layers = nn.Sequential()
        for inputs, outputs, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 128, 1)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers.extend([convolution, nn.BatchNorm2d(outputs), nn.ReLU()])
        model = nn.Sequential()
        model.add_module("layers", layers)
        model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)))
        return model

    def loss(self, model: nn.Module, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Mean over a batch, of which a random half is mirrored."""
        x, y = (part[torch.from_numpy(rows)] for part in self.train)
        mirrored = torch.from_numpy(rng.random(len(rows)) < 0.5)[:, None, None, None]
        return nn.functional.cross_entropy(model(torch.where(mirrored, x.flip(3), x)), y)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`validation` is the loss that is tuned, `test` the accuracy that is reported."""
        x, y = self.validation
        validation = nn.functional.cross_entropy(model(x), y).item()
        x, y = self.test
        return {"validation": validation, "test": 100 * (model(x).argmax(1) == y).float().mean().item()}


@dataclass(frozen=True)
class Task:
    """What is trained, on which batches, by which arms."""

    data: Text | Images
    batch_size: int
    steps: int
    seeds: int
    arms: tuple[str, ...] = tuple(arm for arm in ARMS if arm != "AdamW, long warmup")
    shift: int = 0  # of the grids


def tasks(args: argparse.Namespace) -> dict[str, Task]:
    """All tasks, with fewer steps where `--shorten` asks for it."""
    text = Text(args.train_file, num_hidden_layers=args.layers)
    images = Images(args.image_file)
    post = {"num_hidden_layers": args.layers, "norm_position": "post", **PLAIN}
    few = tuple(arm for arm in Task.arms if arm not in ("RAdam, warmup", "Lookahead(Muon)", "SNOO(Muon)"))
    adams = (*ADAMS, "AdamW, long warmup")
    made = {
        "ReZero LM, batch 4": Task(text, 4, 240, args.seeds),
        "post-norm LM, fan-in init, batch 4": Task(Text(args.train_file, **post), 4, 240, args.seeds, ADAMS),
        "post-norm LM, init 0.02, batch 4": Task(Text(args.train_file, 0.02, **post), 4, 240, args.seeds, adams, -1),
        "conv net, batch 32": Task(images, 32, 640, args.seeds),
        "conv net, batch 512": Task(images, 512, 40, args.large_batch_seeds, few),
        "ReZero LM, batch 24": Task(text, 24, 40, args.large_batch_seeds, few),
    }
    return {
        name: replace(task, steps=task.steps // args.shorten, arms=tuple(arm for arm in args.arms if arm in task.arms))
        for name, task in made.items()
        if name in args.tasks
    }


# --- runs


def rows_of(task: Task, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The batches of a run."""
    length = len(task.data.train) if isinstance(task.data, Text) else len(task.data.train[0])
    return endless_rows(length, task.batch_size, rng)


def train(task: Task, arm: Arm, learning_rate: float, seed: int) -> dict:
    """Train one model; a run whose loss is not finite any more ends with infinite figures."""
    torch.manual_seed(seed)
    rng, start = np.random.default_rng(seed), time.perf_counter()
    model = task.data.model()
    optimizers = arm.make(model, learning_rate)
    curve = []
    for step, rows in zip(range(task.steps), rows_of(task, rng), strict=False):
        loss = task.data.loss(model, rows, rng)
        curve.append(loss.item())
        if not math.isfinite(curve[-1]):
            return {"validation": math.inf, "test": math.inf, "curve": []}
        loss.backward()
        update(model, optimizers, learning_rate * schedule(step, task.steps, arm.warmup))
    for optimizer in optimizers:
        getattr(optimizer, "eval", bool)()  # the slow weights of Lookahead
    model.eval()
    with torch.no_grad():
        figures = task.data.evaluate(model)
    if not math.isfinite(figures["validation"]):
        figures["validation"] = math.inf
    points = [part.mean().item() for part in np.array_split(np.array(curve), min(CURVE_POINTS, len(curve)))]
    return figures | {"curve": [round(x, 4) for x in points], "seconds": round(time.perf_counter() - start, 1)}


def update(model: nn.Module, optimizers: list[Optimizer], learning_rate: float) -> None:
    """One step of every optimizer along the clipped gradients."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    model.zero_grad()


def tune(lowest: int, score: Callable[[int], float], points: int, most: int = 9) -> int:
    """The best index of a grid, which grows until the best is not at its edge or it has `most` points."""
    scores = {index: score(index) for index in range(lowest, lowest + points)}
    while True:
        best = min(scores, key=scores.__getitem__)
        beyond = best - 1 if best == min(scores) else best + 1
        if beyond in scores or len(scores) >= most:
            return best
        scores[beyond] = score(beyond)


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet: for each task and arm the grid, then the other seeds at its best."""
    results = read_json(args.output) or {"runs": {}, "best": {}}
    todo = tasks(args)
    files = {"corpus": Path(args.train_file).name, "images": Path(args.image_file).name}
    results["settings"] = files | {"layers": args.layers, "weight_decay": WEIGHT_DECAY}
    results.setdefault("steps", {}).update({name: task.steps for name, task in todo.items()})

    def run(name: str, arm: str, learning_rate: float, seed: int) -> dict:
        key = f"{name} | {arm} | lr={learning_rate:g} | seed={seed}"
        return once(args.output, results, key, lambda: train(todo[name], ARMS[arm], learning_rate, seed))

    for name, task in todo.items():
        for arm in task.arms:

            def score(index: int, name: str = name, arm: str = arm) -> float:
                return run(name, arm, rate(index), 0)["validation"]

            learning_rate = rate(tune(ARMS[arm].grid + task.shift, score, args.points))
            finals = [run(name, arm, learning_rate, seed) for seed in range(task.seeds)]
            values = {key: [final[key] for final in finals] for key in ("validation", "test")}
            figures = {"learning_rate": learning_rate, **values, "mean": mean(values["test"])}
            figures["spread"] = stdev(values["test"]) if len(finals) > 1 else None
            results["best"].setdefault(name, {})[arm] = figures
            write_json(args.output, results)
    return results


# --- the first steps without warmup


def twins(task: Task, arm: Arm, learning_rate: float, seed: int, steps: int) -> dict:
    """Two models that start alike and see other batches: how alike their steps are, and the gradients of the first.

    Returns:
        By step: `update_cosine` between their steps, `travel_cosine` between the ways they have gone so far, and the
        `loss` of the first. The shares of log10 |gradient| of its hidden weights in the bins of `EDGES` are means
        over a few steps, `histogram`.
    """
    torch.manual_seed(seed)
    first, second = task.data.model(), task.data.model()
    second.load_state_dict(first.state_dict())
    start = flat(first)
    runs = [(model, arm.make(model, learning_rate)) for model in (first, second)]
    rngs = [np.random.default_rng(seed), np.random.default_rng(seed + 1000)]
    rows = [rows_of(task, rng) for rng in rngs]
    record, histograms = {"update_cosine": [], "travel_cosine": [], "loss": []}, []
    for step in range(steps):
        before = [flat(model) for model, _ in runs]
        losses = [task.data.loss(runs[i][0], next(rows[i]), rngs[i]) for i in range(2)]
        torch.stack(losses).sum().backward()
        record["loss"].append(round(losses[0].item(), 4))
        histograms.append(histogram(first))
        for model, optimizers in runs:
            update(model, optimizers, learning_rate * schedule(step, task.steps, arm.warmup))
        after = [flat(model) for model, _ in runs]
        record["update_cosine"].append(cosine(after[0] - before[0], after[1] - before[1]))
        record["travel_cosine"].append(cosine(after[0] - start, after[1] - start))
    parts = np.array_split(np.array(histograms), min(CURVE_POINTS, steps))
    return record | {"histogram": [[round(x, 3) for x in part.mean(0).tolist()] for part in parts]}


def histogram(model: nn.Module) -> list[float]:
    """Shares of log10 |gradient| of the hidden weights between `EDGES`, zeros in the lowest."""
    sizes = torch.cat([p.grad.flatten() for _, p in hidden_weights(model)]).abs().log10()
    counts = torch.histc(sizes.clamp(EDGES[0], EDGES[-1]), len(EDGES) - 1, EDGES[0], EDGES[-1])
    return (counts / len(sizes)).tolist()


def flat(model: nn.Module) -> Tensor:
    """A copy of the hidden weights as one vector."""
    return torch.cat([p.detach().flatten() for _, p in hidden_weights(model)])


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two vectors, 0 if one of them is 0."""
    return round(nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item(), 4)


def first_steps(args: argparse.Namespace, results: dict) -> None:
    """The twins of AdamW with and without warmup and of RAdam: at the best rate of the second, 3 times and 10 times it."""
    name, studied = "post-norm LM, init 0.02, batch 4", ("AdamW", "AdamW, warmup", "RAdam")
    task = tasks(args).get(name)
    if task is None or not set(studied) <= set(task.arms):
        return
    records = results.setdefault("first_steps", {})
    tuned = results["best"][name]["AdamW, warmup"]["learning_rate"]
    for seed in range(min(2, task.seeds)):
        for learning_rate in (tuned, 3 * tuned, 10 * tuned):
            for arm in studied:
                key = f"{arm} | lr={learning_rate:g} | seed={seed}"
                if key not in records:
                    records[key] = twins(task, ARMS[arm], learning_rate, seed, 100 // args.shorten)
                    if seed:
                        del records[key]["histogram"]  # only those of the first are drawn
                    write_json(args.output, results)
                    print(key, "cosines of the updates:", records[key]["update_cosine"][:10], flush=True)


# --- figures


@light_and_dark
def draw(results: dict) -> Picture:
    """Training loss of every arm at its best learning rate, mean over the seeds."""
    names = [name for name in TASKS if name in results["best"]]
    figure = Picture(figsize=(13, 8.2))
    panels = figure.subplots(2, 3).flatten()
    for axes, name in zip(panels, names, strict=False):
        for arm, best in results["best"][name].items():
            keys = [f"{name} | {arm} | lr={best['learning_rate']:g} | seed={s}" for s in range(len(best["test"]))]
            curves = [curve for key in keys if (curve := results["runs"][key]["curve"])]
            if curves:
                look = {"color": ARMS[arm].color, "linestyle": ARMS[arm].style, "linewidth": 1.2}
                steps = np.linspace(0, results["steps"][name], len(curves[0]) + 1)[1:]
                plot_seeds(axes, steps, curves, shade=0.08, label=arm, **look)
        unit = "nats" if name.startswith("conv") else "bits per byte"
        axes.set(title=name, xlabel="optimiser step", ylabel=f"training loss ({unit})")
        if not name.startswith("conv"):
            axes.set_ylim(min([min(line.get_ydata()) for line in axes.lines], default=3) - 0.1, 6)
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(handles=[lines[arm] for arm in ARMS if arm in lines], loc="outside lower center", ncols=7)
    return figure


@light_and_dark
def draw_first_steps(results: dict) -> Picture:
    """Histograms of the gradients by step, as in the paper of RAdam, and the cosines between the twins."""
    studied = {key: record for key, record in results["first_steps"].items() if key.endswith("seed=0")}
    rates = list(dict.fromkeys(key.split(" | ")[1] for key in studied))
    figure = Picture(figsize=(14, 3 * len(rates)))
    grid = figure.subplots(len(rates), 4, squeeze=False)
    for row, lr in zip(grid, rates, strict=True):
        shown = {key.split(" | ")[0]: record for key, record in studied.items() if f" | {lr} | " in key}
        for axes, (arm, record) in zip(row, shown.items(), strict=False):
            shares = np.array(record["histogram"]).T
            extent = (0, len(record["loss"]), EDGES[0], EDGES[-1])
            axes.imshow(shares, origin="lower", aspect="auto", extent=extent, vmax=0.12, cmap="magma")
            axes.grid(visible=False)
            axes.set(title=f"{arm}, {lr}", xlabel="optimiser step", ylabel="log10 |gradient|", ylim=(-10, 0))
            look = {"color": ARMS[arm].color, "linestyle": ARMS[arm].style}
            row[3].plot(np.arange(1, len(record["loss"]) + 1), record["travel_cosine"], label=arm, **look)
        row[3].set(title="two runs on other batches", xlabel="optimiser step", ylabel="cosine of the ways gone")
        row[3].set_ylim(0, 1)
        label_lines(row[3])
    return figure


def table(results: dict) -> list[list[str]]:
    """One row for each optimizer, one column for each task: mean and spread of the seeds, and the best rate."""
    tasks = {
        "ReZero LM, batch 4": ("bpb", 3),
        "ReZero LM, batch 24": ("bpb", 3),
        "post-norm LM, init 0.02, batch 4": ("bpb", 3),
        "conv net, batch 32": ("%", 1),
        "conv net, batch 512": ("%", 1),
    }
    rows = [["test, mean ± spread of 3 seeds (lr)", *(f"{task}, {unit}" for task, (unit, _) in tasks.items())]]
    for arm in dict.fromkeys(arm for task in tasks for arm in results["best"][task]):
        best = [(results["best"][task].get(arm), digits) for task, (_, digits) in tasks.items()]
        text = "{mean:.{digits}f} ± {spread:.{digits}f} ({learning_rate:g})"
        rows.append([arm, *(text.format(**run, digits=digits) if run else "" for run, digits in best)])
    return rows


DRAWINGS = {"optimizers": draw, "optimizers_gradient_distribution": draw_first_steps}


def main() -> None:
    """Run the comparison, write the result file and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    parser.add_argument("--image_file", required=True, help=HELP)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large_batch_seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=4, help="learning rates in a grid, before it grows")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shorten", type=int, default=1, help="divides the numbers of steps")
    parser.add_argument("--output", type=Path, default=RESULTS / "optimizers.json")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = run_all(args)
    first_steps(args, results)
    draw(results, args.figures / "optimizers.png")
    if "first_steps" in results:
        draw_first_steps(results, args.figures / "optimizers_gradient_distribution.png")
    for name, arms in results["best"].items():
        for arm, best in arms.items():
            values = ", ".join(f"{value:.3f}" for value in best["test"])
            print(f"{name:24s} {arm:18s} lr {best['learning_rate']:<6g} {best['mean']:.3f} of {values}")
