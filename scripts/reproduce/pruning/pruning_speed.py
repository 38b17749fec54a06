"""What pruning is worth in time and bytes, and what training with masks costs: ratios of interleaved runs.

A byte LM with half of its heads and neurons, or half of its layers, removed against the whole one: forward pass, file,
and the products that each pass should take; a training step with L1 or L0 masks against one without.

    python scripts/reproduce/run.py pruning_speed
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import trange

from common.record import RESULTS, read_json, save
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, param_groups
from hf_rezero.pruning import attach_masks, find_groups, prune_, weight_uses


RESULT = RESULTS / "pruning_speed.json"
MODELS = {
    "12 layers x 256": {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 8},
    "64 layers x 128": {"hidden_size": 128, "num_hidden_layers": 64, "num_attention_heads": 4},
}
BATCH, LENGTH = 8, 256


def make_model(name: str) -> ReZeroForCausalLM:
    """A ReZero model whose residual weights have moved."""
    torch.manual_seed(0)
    model = ReZeroForCausalLM(ReZeroConfig(**MODELS[name]))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("resweight"):
            torch.nn.init.constant_(parameter, 0.1)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Bytes at random: speed does not depend on them."""
    ids = torch.randint(0, 256, (BATCH, LENGTH))
    return {"input_ids": ids, "labels": ids}


def products(model: ReZeroForCausalLM) -> float:
    """Multiplications of a forward pass: of all weights, and of queries with keys and weights with values."""
    weights = {name: module.weight.numel() for name, module in model.named_modules() if hasattr(module, "weight")}
    linear = sum(count * weights[name] for name, count in weight_uses(model, batch()).items())
    widths = [int(layer.self_attn.q_proj.out_features) for layer in model.model.layers if layer.self_attn is not None]
    return float(linear) + sum(2 * BATCH * LENGTH * LENGTH * width for width in widths)


def halved(model: ReZeroForCausalLM, targets: list[str]) -> ReZeroForCausalLM:
    """A copy without half of its units of each group."""
    model = copy.deepcopy(model)
    groups = find_groups(model, targets)
    prune_(model, groups, {group.name: torch.arange(group.num_units // 2) for group in groups})
    return model


def interleave(first, second, turns: int) -> float:
    """The median over the turns of the time of `second` over that of `first`, after two turns for warming up."""

    def seconds(function) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    ratios = [seconds(second) / seconds(first) for _ in trange(turns + 2)]
    return statistics.median(ratios[2:])


def file_size(model: ReZeroForCausalLM) -> int:
    """Bytes of its safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "model.safetensors").stat().st_size


@torch.inference_mode()
def compare_forward(model, small, turns: int) -> dict[str, float]:
    """The smaller model against the whole one, all as ratios."""
    inputs = batch()["input_ids"]
    count = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    return {
        "time": interleave(lambda: model.eval()(inputs), lambda: small.eval()(inputs), turns),
        "products": products(small) / products(model),
        "file": file_size(small) / file_size(model),
        "parameters": count[1] / count[0],
    }


def step_of(model, masks=None):
    """One training step as in the Trainer, with masks or without."""
    own = {id(p) for p in masks.parameters()} if masks is not None else set()
    groups = param_groups(model, weight_decay=0.1)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
    if masks is not None:
        groups.append({"params": list(masks.parameters()), "weight_decay": 0.0})
    optimizer, inputs = torch.optim.AdamW(groups, lr=1e-6), batch()
    model.train()

    def step():
        model(**inputs).loss.backward()
        if masks is not None:
            masks.penalty().backward()
            masks.before_step()
        optimizer.step()
        if masks is not None:
            masks.after_step()
        optimizer.zero_grad()

    return step


def compare_training(model, kind: str, options: dict, turns: int) -> float:
    """A step with masks over one without."""
    masked = copy.deepcopy(model)
    masks = attach_masks(masked, find_groups(masked, ["heads", "neurons"]), kind, **options)
    return interleave(step_of(copy.deepcopy(model)), step_of(masked, masks), turns)


STEPS = {
    "l1": ("l1", {"lambda_": 1e-9}),
    "l0": ("l0", {"lambda_": 1e-9}),
    "l1 with a target": ("l1", {"lambda_": 1e-9, "target_sparsity": 0.5, "warmup_steps": 10**6}),
    "l0 with a target": ("l0", {"target_sparsity": 0.5, "warmup_steps": 10**6}),
    "l0 per example": ("l0", {"lambda_": 1e-9, "per_example": True}),
}


def table(results: dict) -> list[list[str]]:
    """One row for each model and what went, then one for each kind of mask."""
    rows = [["", "forward pass, time", "products", "file", "parameters", "training step with masks"]]
    for name, ratios in results["forward"].items():
        cells = (f"{ratios[key]:.2f}" for key in ("time", "products", "file", "parameters"))
        rows.append([f"{name}: half removed", *cells, ""])
    return [
        *rows,
        *([f"masks: {name}", "", "", "", "", f"{ratio:.2f}"] for name, ratio in results["training"].items()),
    ]


def main() -> None:
    """Run what is not in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="interleaved pairs behind each ratio")
    parser.add_argument("--again", action="store_true", help="measure anew what the result file has")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {} if args.again else read_json(RESULT)
    results = {part: known.get(part, {}) for part in ("forward", "training")}
    forward, training = results.values()
    for name in MODELS:
        model = make_model(name)
        for title, targets in (("heads and neurons", ["heads", "neurons"]), ("layers", ["layers"])):
            if f"{name}, {title}" not in forward:
                forward[f"{name}, {title}"] = compare_forward(model, halved(model, targets), args.turns)
                save(RESULT, results)
        for title, (kind, options) in STEPS.items():
            if f"{name}, {title}" not in training:
                training[f"{name}, {title}"] = compare_training(model, kind, options, args.turns)
                save(RESULT, results)
    print(*forward.items(), *training.items(), sep="\n")
