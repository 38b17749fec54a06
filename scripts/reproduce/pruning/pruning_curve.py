"""Quality against the fraction of weights removed: learned masks, simple scores, and small nets from scratch.

    python scripts/reproduce/run.py pruning_curve --image_file cifar10_subset.npz --train_file enwik8_prefix.xz

- images: the net of four convolutions and two linear layers with a mask behind each but the last, Adam 1.5e-3, batches
  of 32, L1 5e-5 and L2 2.5e-4 on the weights, no augmentation; images averaged to 16 x 16 pixels; test accuracy
- text: a ReZero byte model of 12 layers x 64, heads and neurons; bits per byte of the test text
- depth: one of 128 layers x 32, whole layers

A net is trained, and all methods start from it and have as many further steps, `budget`: masks are learned in the first
half of them, scored nets are cut at once and train on. What is "from scratch" has the sizes that a method ended with and
trains for all steps that the method has seen, those of the net included. The learning rate is constant and falls linearly
to 0 over the last 40 % of the steps, of the net and again of the budget. "removed" counts parameters of the whole net.
What is "taught" learns from the trained net too, in all of its steps: soft targets with weight 0.5 at temperature 2. `unpruned` is the net with the budget and nothing removed.

Results are written after every run, and a repeated call goes on where it stopped. Nothing was tuned by the test set but
the strengths of the masks, which only place the points along the axis.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from common.byte_lm import bits_per_byte
from common.curves import mean_of
from common.drawing import GRAY, light_and_dark
from common.images import HELP, endless_rows, floats, read_images
from common.record import FIGURES, RESULTS, once, read_json, write_json
from common.teaching import taught_loss
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, load_corpus, param_groups, pruning
from hf_rezero.data.windows import ByteDataset, collate_bytes, evaluation_windows
from hf_rezero.picture import Picture, ink, label_lines
from hf_rezero.pruning import Masks, PruningGroup, attach_masks, find_groups, prune_, remove_pruned_, select


SPARSITIES = (0.3, 0.5, 0.6, 0.75, 0.9)
SCORE_BATCHES = 16
BLOCK = 64
EVALUATED_WINDOWS = 512
LOOKS = {
    "L1": ("C2", "-"),
    "L1, target": ("C2", "--"),
    "L0": ("C3", "-"),
    "L0, beta 0.05": ("C3", "--"),
    "first k": ("C4", "-"),
    "magnitude": ("C0", "-"),
    "APoZ": ("C5", "-"),
}
LOOKS |= {
    "random": (GRAY, "-"),
    "Taylor": ("C1", "-"),
    "L1 from scratch": ("C2", "none"),
    "first k from scratch": ("C4", "none"),
    "unpruned from scratch": ("none", "none"),
    "L1, taught": ("C2", ":"),
    "magnitude, taught": ("C0", ":"),
    "L1 from scratch, taught": ("C6", "none"),
}
TAUGHT = ", taught"


# --- data and models


class Images:
    """Classes of images; quality is per cent of the test images."""

    unit, digits, sign, tolerance = "test accuracy, %", 1, 1, 1.0
    learning_rate, weight_l1, weight_l2 = 1.5e-3, 5e-5, 2.5e-4

    def __init__(self, args: argparse.Namespace):
        data = read_images(args.image_file)
        self.train = self._small(data["train_x"]), data["train_y"].long()
        self.test = self._small(data["test_x"]), data["test_y"].long()
        self.length, self.batch_size = len(self.train[1]), 32

    @staticmethod
    def _small(pixels: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(floats(pixels), 16)
        return x.contiguous(memory_format=torch.channels_last)

    def model(self) -> nn.Module:
        """83,610 parameters, 65,536 of them behind the flattened picture."""
        layers, inputs = [], 3
        for outputs in (16, 16, 32, 32):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if len(layers) in (4, 9) else []
            inputs = outputs
        layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(inputs * 16, 128), nn.ReLU(), nn.Linear(128, 10)]
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam; the weights are regularised in their gradients."""
        return torch.optim.Adam(model.parameters(), self.learning_rate, fused=True)

    def batch(self, rows: np.ndarray) -> Tensor:
        """What the model reads."""
        return self.train[0][torch.from_numpy(rows)]

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Cross-entropy of a batch."""
        return nn.functional.cross_entropy(model(self.batch(rows)), self.train[1][torch.from_numpy(rows)])

    def prepare_step(self, model: nn.Module) -> None:
        """Gradients of l1 |w| + l2 w^2 for the matrices and filters."""
        for p in model.parameters():
            if p.ndim > 1 and p.grad is not None:
                p.grad.add_(p.detach().sign(), alpha=self.weight_l1).add_(p.detach(), alpha=2 * self.weight_l2)

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy."""
        return 100 * (model(self.test[0]).argmax(1) == self.test[1]).float().mean().item()


class Text:
    """Next bytes; quality is bits per byte."""

    unit, digits, sign, tolerance = "test bits per byte", 3, -1, 0.02
    learning_rate, weight_decay = 3e-3, 0.1

    def __init__(self, args: argparse.Namespace, batch_size: int, **config):
        corpus = load_corpus(args.train_file)
        self.train = ByteDataset(corpus.train, BLOCK)
        self.test = evaluation_windows(corpus.test, BLOCK, BLOCK - 1)
        self.length, self.batch_size, self.config = len(self.train), batch_size, config

    def model(self) -> nn.Module:
        """ReZero; ReLU, so that activations can be 0."""
        shape = {"hidden_act": "relu", "max_position_embeddings": BLOCK, "use_cache": False}
        return ReZeroForCausalLM(ReZeroConfig(**shape, **self.config))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(param_groups(model, weight_decay=self.weight_decay), self.learning_rate, fused=True)

    def batch(self, rows: np.ndarray) -> Mapping[str, Tensor]:
        """What the model reads."""
        return collate_bytes(self.train.__getitems__(rows))

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Mean over the bytes of a batch, in nats."""
        return model(**self.batch(rows)).loss

    def taught(self, teacher: nn.Module, model: nn.Module, rows: np.ndarray) -> Tensor:
        """On the labels and on the next bytes of the teacher."""
        return taught_loss(model, teacher, self.batch(rows))

    def prepare_step(self, model: nn.Module) -> None:
        """Clip the gradients of the weights."""
        weights = [p for name, p in model.named_parameters() if not name.startswith("pruning_masks")]
        nn.utils.clip_grad_norm_(weights, 1.0)

    def evaluate(self, model: nn.Module) -> float:
        """Bits per byte of windows from all over the text."""
        return bits_per_byte(lambda batch: model(**batch).loss, self.test, EVALUATED_WINDOWS, 8)


@dataclass(frozen=True)
class Task:
    """What is trained for how many steps, and the methods with their settings, some on the first seed only."""

    data: Images | Text
    title: str
    targets: tuple[str, ...]
    base_steps: int
    budget: int
    methods: dict[str, tuple[float, ...]]
    charge: str = "units"  # what a mask costs
    seeds: int = 1
    first_seed_only: tuple[str, ...] = ()


# kind, learning rate, which option the setting is, and the other options
LEARNED: dict[str, tuple[str, float, str, dict]] = {
    "L1": ("l1", 1e-2, "lambda_", {}),
    "L1, target": ("l1", 1e-2, "target_sparsity", {}),
    "L0": ("l0", 5e-2, "target_sparsity", {}),
    "L0, beta 0.05": (
        "l0",
        5e-2,
        "lambda_",
        {"beta": 0.05, "per_example": True, "penalty": "hard_sigmoid", "estimator": "threshold"},
    ),
}
SCORED: dict[str, Callable[[nn.Module, list[PruningGroup], "Task", np.random.Generator], dict[str, Tensor]]] = {
    "first k": lambda model, groups, task, rng: pruning.first_k(groups),
    "random": lambda model, groups, task, rng: pruning.random(groups),
    "magnitude": lambda model, groups, task, rng: pruning.magnitude(model, groups),
    "APoZ": lambda model, groups, task, rng: pruning.apoz(
        model, groups, [task.data.batch(rows) for rows in some_rows(task, rng)]
    ),
    "Taylor": lambda model, groups, task, rng: pruning.taylor(model, groups, some_rows(task, rng), task.data.loss),
}


def tasks(args: argparse.Namespace) -> dict[str, Task]:
    """The wanted tasks, with fewer steps where `--shorten` asks for it."""
    few = (0.3, 0.6, 0.9)
    images = {"unpruned": (0.0,), "L1": (1e-4, 4e-3, 1e-2, 2e-2, 3e-2), "L0": SPARSITIES, "first k": SPARSITIES}
    images |= {"magnitude": SPARSITIES, "APoZ": SPARSITIES, "L1 from scratch": images["L1"][::2]}
    images |= {
        "L0, beta 0.05": (1e-3, 1e-2, 3e-2, 4e-2, 6e-2),
        "L1, target": SPARSITIES,
        "first k from scratch": SPARSITIES,
    }
    images |= dict.fromkeys(("Taylor", "random"), SPARSITIES) | {"unpruned from scratch": (0.0,)}
    text = {"unpruned": (0.0,), "L1": (5e-5, 2e-4, 6e-4, 2e-3, 6e-3), "L0": SPARSITIES, "first k": SPARSITIES}
    text |= {"magnitude": few, "L1 from scratch": text["L1"][1::2], "APoZ": few, "Taylor": few}
    text |= {"unpruned from scratch": (0.0,), "L1, taught": text["L1"][1:4], "magnitude, taught": few}
    text |= {"L1 from scratch, taught": text["L1"][1::2]}
    depth = {"unpruned": (0.0,), "L1": (2e-3, 1e-2, 4e-2), "L0": few, "first k": few, "magnitude": few}
    depth |= {"L1 from scratch": depth["L1"][1:2]}
    once = (
        "unpruned from scratch",
        "L0, beta 0.05",
        "L1, target",
        "magnitude",
        "APoZ",
        "Taylor",
        "random",
        "first k from scratch",
    )
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": args.layers}
    deep = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": args.deep_layers}
    channels, heads = ("neurons", "channels"), ("heads", "neurons")
    titles = [
        "CIFAR-10, 8,068 / 1,017 subset",
        f"byte model, {args.layers} x 64",
        f"{args.deep_layers} x 32, whole layers",
    ]
    made: dict[str, Callable[[], Task]] = {
        "images": lambda: Task(
            Images(args), titles[0], channels, 24 * 252, 12 * 252, images, "units", args.seeds, once
        ),
        "text": lambda: Task(Text(args, 8, **sizes), titles[1], heads, 3000, 800, text, "params"),
        "depth": lambda: Task(Text(args, 4, **deep), titles[2], ("layers",), 800, 200, depth),
    }
    found = {name: made[name]() for name in args.tasks}
    return {name: shortened(task, args) for name, task in found.items()}


def shortened(task: Task, args: argparse.Namespace) -> Task:
    """Fewer steps and only the wanted methods and numbers of settings."""
    methods = {name: settings[: args.points] for name, settings in task.methods.items() if name in args.methods}
    steps = {"base_steps": task.base_steps // args.shorten, "budget": task.budget // args.shorten}
    return replace(task, methods=methods, **steps)


# --- training


def row_batches(task: Task, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The batches of a run."""
    return endless_rows(task.data.length, task.data.batch_size, rng)


def some_rows(task: Task, rng: np.random.Generator) -> list[np.ndarray]:
    """The batches that scores are computed on."""
    source = row_batches(task, rng)
    return [next(source) for _ in range(SCORE_BATCHES)]


def train(
    task: Task,
    model: nn.Module,
    steps: range,
    total: int,
    rng,
    optimizers=None,
    masks: Masks | None = None,
    teacher=None,
):
    """Some of `total` steps; the learning rate of the weights falls over the last 40 % of them."""
    loss_of = task.data.loss if teacher is None else partial(task.data.taught, teacher)
    optimizers = optimizers or [task.data.optimizer(model)]
    model.train()
    for step, rows in zip(steps, row_batches(task, rng), strict=False):
        for group in optimizers[0].param_groups:
            group["lr"] = task.data.learning_rate * min(1.0, (total - step) / (0.4 * total))
        loss = loss_of(model, rows)
        (loss if masks is None else loss + masks.penalty()).backward()
        task.data.prepare_step(model)
        if masks is not None:
            masks.before_step()
        for optimizer in optimizers:
            optimizer.step()
        if masks is not None:
            masks.after_step()
        model.zero_grad()


@torch.no_grad()
def quality(task: Task, model: nn.Module) -> float:
    """Of the model without noise on the test set."""
    model.eval()
    return round(task.data.evaluate(model), 4)


def count(model: nn.Module) -> int:
    """The parameters that are there."""
    return sum(p.numel() for p in model.parameters())


def base(task: Task, name: str, seed: int, folder: Path) -> nn.Module:
    """The net that all methods start from; trained once, then read from `folder`."""
    torch.manual_seed(seed)
    model, path = task.data.model(), folder / f"{name}-{task.base_steps}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        train(task, model, range(task.base_steps), task.base_steps, np.random.default_rng(seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


def cut_by_masks(task: Task, model: nn.Module, method: str, setting: float, rng, steps: range, teacher) -> dict:
    """Learn masks for these steps and remove what they close."""
    kind, rate, option, options = LEARNED[method]
    optimizers = [task.data.optimizer(model)]  # before the model has masks, which have a rate of their own
    options = options | {option: setting}
    rate = max(rate, min(0.1, 3 / max(1, len(steps))))  # or a mask could not fall from 1 to 0 in time
    options |= {"capture": 2 * rate} if kind == "l1" else {}
    if option == "target_sparsity":
        options["warmup_steps"] = len(steps) // 2
    masks = attach_masks(model, find_groups(model, task.targets), kind, module_costs=task.charge, **options)
    optimizers.append(torch.optim.Adam(masks.parameters(), rate))
    train(task, model, steps, task.budget, rng, optimizers, masks, teacher)
    report = remove_pruned_(model, masks, batch=task.data.batch(np.arange(8)))
    kept = {name: len(units) for name, units in report.kept.items()}
    difference = float(f"{report.max_difference:.1e}")
    return {"kept": kept, "undecided": round(report.undecided, 4), "max_difference": difference}


def cut_by_scores(task: Task, model: nn.Module, method: str, sparsity: float, rng) -> dict:
    """Remove the units that score lowest, the same fraction of each group."""
    groups = find_groups(model, task.targets)
    kept = select(model, groups, SCORED[method](model, groups, task, rng), sparsity)
    prune_(model, groups, kept, method=method)
    return {"kept": {name: len(units) for name, units in kept.items()}}


def cut_and_forget(task: Task, model: nn.Module, kept: dict[str, int]) -> None:
    """Fresh weights in the sizes that another method ended with."""
    groups = find_groups(model, task.targets)
    prune_(model, groups, {name: torch.arange(units) for name, units in kept.items()})
    pruning.reinitialize_(model)


def run(task: Task, method: str, setting: float, seed: int, model: nn.Module, kept: dict[str, int] | None) -> dict:
    """One arm, from the trained net to the quality of what is left of it."""
    start, before = time.perf_counter(), count(model)
    torch.manual_seed(1000 + seed)
    rng, half, steps = np.random.default_rng(1000 + seed), task.budget // 2, range(task.budget)
    record, teacher = {}, deepcopy(model).eval() if method.endswith(TAUGHT) else None
    how = method.removesuffix(TAUGHT)
    if how in LEARNED:
        record |= cut_by_masks(task, model, how, setting, rng, steps[:half], teacher)
        steps = steps[half:]
    elif how in SCORED:
        record |= cut_by_scores(task, model, how, setting, rng)
    elif kept is not None:
        cut_and_forget(task, model, kept)
        steps = range(task.base_steps + task.budget)
    record["after_removal"] = quality(task, model)
    train(task, model, steps, steps.stop, rng, teacher=teacher)
    sizes = {"parameters": count(model), "removed": round(1 - count(model) / before, 4)}
    return sizes | record | {"quality": quality(task, model), "seconds": round(time.perf_counter() - start, 1)}


def run_all(args: argparse.Namespace) -> dict:
    """Run what the result file does not hold yet, the first seed of all tasks first."""
    results = read_json(args.output) or {"runs": {}, "base": {}}
    todo = tasks(args)
    results["files"] = {"text": Path(args.train_file).name, "images": Path(args.image_file).name}
    for name, task in todo.items():
        steps = {"base_steps": task.base_steps, "budget": task.budget}
        results.setdefault("tasks", {})[name] = {"title": task.title, "unit": task.data.unit, **steps}
    for seed in range(max(task.seeds for task in todo.values())):
        for name, task in todo.items():
            if seed < task.seeds:
                run_seed(args, results, name, task, seed)
    return results


def run_seed(args: argparse.Namespace, results: dict, name: str, task: Task, seed: int) -> None:
    """All arms of a task on one seed."""
    trained = base(task, name, seed, args.bases)
    if f"{name} | seed={seed}" not in results["base"]:
        figures = {"quality": quality(task, trained), "parameters": count(trained)}
        results["base"][f"{name} | seed={seed}"] = figures
    for method, settings in task.methods.items():
        for setting in settings if not seed or method not in task.first_seed_only else ():
            key = f"{name} | {method} | {setting:g} | seed={seed}"
            scratch = " from scratch" in method
            source = results["runs"].get(key.replace(" from scratch", "").replace(TAUGHT, ""))
            if key in results["runs"] or scratch and source is None:
                continue
            kept = source.get("kept", {}) if scratch else None
            once(args.output, results, key, partial(run, task, method, setting, seed, deepcopy(trained), kept))


# --- conclusions


def curve(results: dict, name: str, method: str) -> np.ndarray:
    """Rows of fraction removed, quality, quality before training on, spread of the seeds; by setting, sorted."""
    found: dict[str, list[dict]] = {}
    for key, record in results["runs"].items():
        if key.startswith(f"{name} | {method} | "):
            found.setdefault(key.split(" | ")[2], []).append(record)
    fields = ("removed", "quality", "after_removal")
    rows = [[mean(r[field] for r in runs) for field in fields] for runs in found.values()]
    spreads = [stdev(r["quality"] for r in runs) if len(runs) > 1 else 0.0 for runs in found.values()]
    return np.array(sorted([*row, s] for row, s in zip(rows, spreads, strict=True))).reshape(-1, 4)


def verdict(holds: bool, **figures: float) -> dict:
    """One conclusion, with the figures behind it."""
    return {"holds": bool(holds)} | {name: round(float(value), 4) for name, value in figures.items()}


def verdicts(results: dict, name: str, data: type[Images] | type[Text]) -> dict[str, dict]:
    """What the article concludes, and whether it holds here; gains and losses are positive in the unit of the task."""
    curves = {method: curve(results, name, method) for method in ("unpruned", *LOOKS)}
    curves = {method: rows for method, rows in curves.items() if len(rows)}
    if not {"unpruned", "L1", "first k"} <= set(curves):
        return {}
    most = 7.0 if data is Images else math.inf
    return about_level(curves, data) | about_order(curves, data, most) | about_scratch(curves, data)


def about_level(curves: dict[str, np.ndarray], data: type[Images] | type[Text]) -> dict[str, dict]:
    """How much can go before quality does."""
    reference, tolerance = curves["unpruned"][0, 1], data.tolerance
    (removed, lost), masks = _lost(curves["L1"], reference, data), [m for m in LEARNED if m in curves]
    both = np.concatenate([np.stack(_lost(curves[m], reference, data), 1) for m in masks])
    gains = -both[both[:, 0] < 0.6, 1]
    knee = max(removed[lost <= 2 * tolerance], default=0.0)
    free = verdict(removed[0] >= 0.3 and lost[0] <= tolerance, removed=removed[0], lost=lost[0])
    found = {"a small lambda removes 30 % or more, free": free}
    if len(gains):
        longer = data.sign * (reference - curves["unpruned"][0, 2])  # what the budget alone is worth
        for claim, gain in (("than it was", gains + longer), ("than the whole net trained on as long", gains)):
            found[f"below 60 % masks make it better {claim}"] = verdict(
                gain.mean() > 0, mean=gain.mean(), least=gain.min(), best=gain.max()
            )
    within = verdict(0.6 <= knee <= 0.9, last_within_two_tolerances=knee, two_tolerances=2 * tolerance)
    return found | {"the decline starts at 60-90 %": within}


def _lost(rows: np.ndarray, reference: float, data: type[Images] | type[Text]) -> tuple[np.ndarray, np.ndarray]:
    return rows[:, 0], data.sign * (reference - rows[:, 1])


def about_order(curves: dict[str, np.ndarray], data: type[Images] | type[Text], most: float) -> dict[str, dict]:
    """Which method is better; means over the points that two curves share."""
    found = {}
    for other in ("L0", "L0, beta 0.05"):
        d = gap(curves, "L1", other, data)
        found[f"L1 is not worse than {other}"] = verdict(
            d.mean() >= -data.tolerance, mean_gain=d.mean(), worst=d.min()
        )
    for masks in ("L1", "L0"):
        d, claim = gap(curves, masks, "first k", data), f"{masks} is better than first k, by < 7 points on average"
        claim = claim if data is Images else claim.partition(",")[0]
        found[claim] = verdict(0 < d.mean() < most, mean_gain=d.mean(), most=d.max())
    for score in ("magnitude", "APoZ"):
        d, claim = gap(curves, score, "first k", data), f"{score} is barely better than first k"
        found[claim] = verdict(0 < d.mean() <= data.tolerance, mean_gain=d.mean(), most=d.max())
    return {claim: v for claim, v in found.items() if not math.isnan(v["mean_gain"])}


def about_scratch(curves: dict[str, np.ndarray], data: type[Images] | type[Text]) -> dict[str, dict]:
    """Whether the small net trained from scratch is worse, and what a cut costs without training on."""
    found = {}
    for method in ("unpruned", "L1", "first k"):
        d = gap(curves, method, f"{method} from scratch", data)
        if not np.isnan(d).any():
            found[f"from scratch is worse than {method}"] = verdict(d.mean() > 0, mean_gain=d.mean(), least=d.min())
    last = curves["first k"][-1]
    back, lost = data.sign * (last[1] - last[2]), data.sign * (curves["unpruned"][0, 1] - last[1])
    claim = "too much at once does not come back"
    return found | {claim: verdict(lost > 2 * data.tolerance, removed=last[0], came_back=back, still_lost=lost)}


def gap(curves: dict[str, np.ndarray], a: str, b: str, data: type[Images] | type[Text]) -> np.ndarray:
    """How much better `a` is than `b` at the points of `a` that lie between those of `b`; nan without any."""
    if a not in curves or b not in curves:
        return np.array([math.nan])
    x, y = curves[a][:, 0], curves[a][:, 1]
    inside = (x >= curves[b][0, 0] - 0.03) & (x <= curves[b][-1, 0] + 0.03)
    differences = data.sign * (y[inside] - np.interp(x[inside], curves[b][:, 0], curves[b][:, 1]))
    return differences if len(differences) else np.array([math.nan])


def images_table(results: dict) -> list[list[str]]:
    """One row for each method, accuracy and fraction removed at each setting."""
    return _table(results, ("images",), 1)


def text_table(results: dict) -> list[list[str]]:
    """One row for each method on the two byte models, bits per byte and fraction removed at each setting."""
    return _table(results, ("text", "depth"), 3)


def _table(results: dict, tasks: tuple[str, ...], digits: int) -> list[list[str]]:
    """Means over the seeds, in the order of the fraction removed."""
    cells: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for key, record in results["runs"].items():
        task, method, setting, _ = key.split(" | ")
        if task in tasks:
            cells.setdefault((task, method), {}).setdefault(setting, []).append(record)
    columns, unit = max(map(len, cells.values())), results["tasks"][tasks[0]]["unit"]
    rows = [[f"{unit} (weights removed)", "seeds", *[""] * columns]]
    for (task, method), by_setting in cells.items():
        found = sorted((mean_of(runs, "removed"), mean_of(runs, "quality")) for runs in by_setting.values())
        points = [f"{quality:.{digits}f} ({removed:.0%})" for removed, quality in found]
        name = method if len(tasks) == 1 else f"{results['tasks'][task]['title']}: {method}"
        seeds = max(map(len, by_setting.values()))
        rows.append([name, f"{seeds}", *points, *[""] * (columns - len(points))])
    return rows


# --- figure


@light_and_dark
def draw(results: dict) -> Picture:
    """Quality against the fraction removed, one panel for each task; triangles are nets from scratch."""
    todo = results["tasks"]
    figure = Picture(figsize=(5 * len(todo), 4.2))
    lines = {}
    for axes, (name, task) in zip(figure.subplots(1, len(todo), squeeze=False)[0], todo.items(), strict=True):
        bases = [record["quality"] for key, record in results["base"].items() if key.startswith(f"{name} | ")]
        band = [*bases, *curve(results, name, "unpruned")[:, 1]]
        lines["unpruned"] = axes.axhspan(min(band), max(band), color="C0", alpha=0.25, label="unpruned")
        for method, (color, style) in LOOKS.items():
            rows, scratch = curve(results, name, method), "scratch" in method
            if len(rows):
                look = (
                    {"linestyle": "none", "marker": "^", "ms": 6, "mec": ink()}
                    if scratch
                    else {"marker": "o", "linestyle": style}
                )
                look |= {"yerr": rows[:, 3], "capsize": 2, "linewidth": 1.3}
                drawn = axes.errorbar(100 * rows[:, 0], rows[:, 1], color=color, label=method, **look)
                if scratch:
                    lines[method] = drawn
                else:
                    drawn.lines[0].set_label(method)
        axes.set(title=task["title"], xlabel="weights removed, %", ylabel=task["unit"])
        label_lines(axes, [line for line in axes.lines if line.get_label() in LOOKS])
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=6)
    return figure


TABLES = {"pruning_curve_images": images_table, "pruning_curve_text": text_table}


def main() -> None:
    """Run the comparison, write the result file with its verdicts, and the figure."""
    methods = ("unpruned", *LOOKS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    parser.add_argument("--image_file", required=True, help=HELP)
    parser.add_argument("--tasks", nargs="+", choices=("images", "text", "depth"), default=["images", "text", "depth"])
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--seeds", type=int, default=3, help="of the images; the others have one")
    parser.add_argument("--points", type=int, default=99, help="settings of each method, at most")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--deep_layers", type=int, default=128)
    parser.add_argument("--shorten", type=int, default=1, help="divides the numbers of steps")
    parser.add_argument(
        "--bases", type=Path, default=Path("outputs/pruning_curve"), help="where trained nets are kept"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "pruning_curve.json")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results, todo = run_all(args), tasks(args)
    for name, task in todo.items():
        results.setdefault("verdicts", {})[name] = verdicts(results, name, type(task.data))
    write_json(args.output, results)
    draw(results, args.figures / "pruning_curve.png")
    for name, found in results["verdicts"].items():
        for claim, verdict in found.items():
            print(name, "|", claim, "|", "held" if verdict["holds"] else "did not hold", "|", verdict)
