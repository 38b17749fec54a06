"""One token at a time: what the layout of the weights, bf16 and int8 weights are worth, for ReZero, GPT-2 and Llama alike.

    python scripts/reproduce/run.py generation_speed

Ratios within one round, medians over the rounds of several fresh processes, one thread and its processor time; GPT-2 as
transformers ships it is 1. `Conv1D` of GPT-2 becomes `nn.Linear` where its weights are quantised, since torch quantises that
alone. What bf16 and int8 cost in quality is measured on a model that is trained here for some minutes: bits per byte of the
same test text.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from common import byte_lm
from common.equal_models import CASES, builders, deployed, inference
from common.record import RESULTS, read_json, save
from common.timing import against, in_fresh_processes, take_turns
from hf_rezero import fold_resweight_, layout_


SIZES = {"12 x 512": CASES["12 x 512"], "12 x 768": (12, 768, 12, 512, 2, 1), **CASES}
ARMS = ("GPT-2", "Llama", "ReZero, learned positions", "ReZero")
MEASURES = {"one_token": "one token", "generate": "32 tokens"}


def as_linear(module: nn.Module) -> nn.Linear:
    """`Conv1D` as the `nn.Linear` that computes the same."""
    linear = nn.Linear(*module.weight.shape)
    linear.weight.data, linear.bias.data = module.weight.data.t().contiguous(), module.bias.data
    return linear


def in_int8(model: nn.Module) -> nn.Module:
    """Weights in int8 with one scale each, inputs quantised as they come, by torch."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, Conv1D):
                setattr(parent, name, as_linear(module))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names torchao as its successor, which gains nothing here uncompiled
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def laid_out(model: nn.Module) -> nn.Module:
    """With each weight in its faster order."""
    layout_(model)
    return model


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fp32": lambda model: model,
    "fp32, laid out": laid_out,
    "bf16": lambda model: model.to(torch.bfloat16),
    "bf16, laid out": lambda model: laid_out(model.to(torch.bfloat16)),
    "int8": in_int8,
}


def seconds_of(case: Sequence[int], measure: str, rounds: int) -> dict[str, list[float]]:
    """Processor time of every arm in every form in each round."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers, width, heads, tokens, *_ = case
    ids, models = torch.randint(0, 256, (1, tokens)), builders(layers, width, heads, tokens)
    steps = {
        f"{arm} | {form}": inference(change(deployed(models[arm]())), ids, measure)
        for arm in ARMS
        for form, change in FORMS.items()
    }
    return take_turns(steps, rounds)


def quality(args: argparse.Namespace) -> dict[str, float]:
    """Bits per byte of the same text, for a model trained here, in every form."""
    torch.manual_seed(0)
    model = byte_lm.build_model({}, args.layers, args)
    optimizer = byte_lm.adamw(model, 3e-3)
    for rows in byte_lm.row_batches(args, args.steps, 0):
        byte_lm.step(model, optimizer, rows, args)
    state = fold_resweight_(model).eval().state_dict()
    found = {}
    for form, change in FORMS.items():
        again = fold_resweight_(byte_lm.build_model({}, args.layers, args)).eval()
        again.load_state_dict(state)
        found[form] = round(byte_lm.evaluate(change(again), args), 4)
    return found


def table(results: dict) -> list[list[str]]:
    """One row for each model in each form."""
    cases = results["speeds"]
    heads = [f"{label}, {case}" for label in MEASURES.values() for case in cases]
    rows = [["speed against GPT-2 as shipped", *heads, "bits per byte"]]
    for arm in ARMS:
        for form in FORMS:
            speeds = [f"{cases[case][m][f'{arm} | {form}']['speed']:.2f}" for m in MEASURES for case in cases]
            bits = f"{results['bits_per_byte'][form]:.4f}" if arm == "ReZero" else ""
            rows.append([f"{arm}, {form}", *speeds, bits])
    return rows


def goals(results: dict) -> list[list[str]]:
    """Goals of one token at a time against GPT-2 as shipped."""
    arm = "ReZero, learned positions | fp32, laid out"
    sizes = {"12 x 512": "1.2", "12 x 768": "1.2", "128 x 64": "2.5"}
    return [
        [f"{case}, one token, fp32, laid out", goal, f"{results['speeds'][case]['one_token'][arm]['speed']:.2f}", ""]
        for case, goal in sizes.items()
    ]


def main() -> None:
    """Measure what the result file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    byte_lm.add_arguments(parser, hidden_size=128, block_size=128, batch_size=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600, help="of the model whose quality is measured")
    parser.add_argument("--rounds", type=int, default=15, help="in each process")
    parser.add_argument("--processes", type=int, default=2, help="fresh ones, one after the other")
    parser.add_argument("--cases", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", type=Path, default=RESULTS / "generation_speed.json")
    args = parser.parse_args()
    byte_lm.load_text(args)
    results = read_json(args.output) or {"speeds": {}}
    if "bits_per_byte" not in results:
        results["bits_per_byte"] = quality(args)
        save(args.output, results)
        print(results["bits_per_byte"], flush=True)
    for case in args.cases:
        for measure in MEASURES:
            found = results["speeds"].setdefault(case, {})
            if measure not in found:
                times = in_fresh_processes(args.processes, seconds_of, SIZES[case], measure, args.rounds)
                found[measure] = against(times, f"{ARMS[0]} | fp32")
                save(args.output, results)
            print(case, measure, {arm: row["speed"] for arm, row in found[measure].items()}, flush=True)
