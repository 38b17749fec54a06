"""The time of an optimizer step on the 1,536 tensors of a 128-layer net, as a ratio to AdamW.

Each optimizer is timed in turns with `torch.optim.AdamW(foreach=True)` on the same tensors: a turn is 6 steps, so
that Lookahead moves its slow weights once in it; a ratio is the median over the turns. Peers that are installed take
part: `pip install pytorch_optimizer`, `pip install --no-deps timm`.

    python scripts/reproduce/run.py optimizer_speed
"""

import argparse
import importlib.util
import statistics
import sys
import time
import types

import torch
from torch import optim
from tqdm import tqdm

from common.record import RESULTS, read_json, save
from hf_rezero import LAMB, LARS, Muon, RAdam, Ranger, RangerLARS, centralize_gradients, lookahead


LAYERS, TURN = 128, 6


def tensors(width: int, device: str) -> list[torch.nn.Parameter]:
    """Weights and biases of 128 layers, with gradients: four square projections and two of four times the width."""
    shapes = [(width, width), (width,)] * 4 + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for _ in range(LAYERS) for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)
    return params


def groups(params, weight_decay: float = 0.01) -> list[dict]:
    """Matrices with decay, vectors without."""
    matrices = {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay}
    return [matrices, {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}]


def ours() -> dict:
    """Name -> how to build it from groups."""
    return {
        "RAdam": RAdam,
        "RAdam, foreach path": lambda g: RAdam(g, fused=False),
        "Ranger": Ranger,
        "LARS": lambda g: LARS(g, lr=1e-3),
        "RangerLARS": RangerLARS,
        "LAMB": LAMB,
        "Muon": Muon,
        "AdamW fused + lookahead, k=5": lambda g: lookahead(optim.AdamW(g, fused=True), k=5),
        "AdamW foreach + lookahead, k=5": lambda g: lookahead(optim.AdamW(g, foreach=True), k=5),
        "AdamW fused + SNOO, k=20": lambda g: lookahead(optim.AdamW(g, fused=True), k=20, alpha=0.7, momentum=0.5),
        "AdamW fused + centralisation": lambda g: centralize_gradients(optim.AdamW(g, fused=True)),
    }


def peers() -> dict:
    """Those of torch, and of the libraries that are installed."""
    found = {
        "torch AdamW fused": lambda g: optim.AdamW(g, fused=True),
        "torch AdamW foreach": lambda g: optim.AdamW(g, foreach=True),
        "torch RAdam foreach": lambda g: optim.RAdam(g, foreach=True, decoupled_weight_decay=True),
        "torch Muon, matrices alone": lambda g: optim.Muon(g[:1]),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer as po

        found |= {
            "pytorch_optimizer RAdam": po.RAdam,
            "pytorch_optimizer Ranger": po.Ranger,
            "pytorch_optimizer LARS": lambda g: po.LARS(g, lr=1e-3),
            "pytorch_optimizer Lamb": po.Lamb,
        }
    return found | timm_peers()


def timm_peers() -> dict:
    """The optimizers of timm, whose package as a whole cannot be imported without torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        return {}
    for name, folder in (("timm", ""), ("timm.optim", "/optim")):
        package = types.ModuleType(name)
        package.__path__ = [path + folder for path in spec.submodule_search_locations]
        sys.modules[name] = package
    lars, lamb = importlib.import_module("timm.optim.lars"), importlib.import_module("timm.optim.lamb")
    outer = importlib.import_module("timm.optim.lookahead")
    return {
        "timm Lars": lambda g: lars.Lars(g, lr=1e-3, momentum=0.9, foreach=True),
        "timm Lamb": lambda g: lamb.Lamb(g, max_grad_norm=None, foreach=True),
        "timm Lookahead over AdamW fused": lambda g: outer.Lookahead(optim.AdamW(g, fused=True), k=6),
    }


def seconds(optimizer, device: str) -> float:
    """One turn."""
    start = time.perf_counter()
    for _ in range(TURN):
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(build, params, turns: int, device: str) -> dict:
    """Medians over interleaved turns, after two for warming up, and the memory of the state."""
    base, candidate = optim.AdamW(groups(params), lr=1e-5, foreach=True), build(groups(params))
    for group in candidate.param_groups:
        group["lr"] = 1e-5
    pairs = [(seconds(base, device), seconds(candidate, device)) for _ in range(turns + 2)][2:]
    ratios = sorted(mine / theirs for theirs, mine in pairs)
    state = sum(v.numel() for entry in candidate.state.values() for v in entry.values() if torch.is_tensor(v))
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        "ms": round(1000 * statistics.median(mine for _, mine in pairs) / TURN, 2),
        "state_per_parameter": round(state / sum(p.numel() for p in params), 2),
    }


def table(results: dict) -> list[list[str]]:
    """One row for each optimizer, one column for each width."""
    widths = list(next(iter(results["results"].values())))
    rows = [["step, as a ratio to torch AdamW foreach", *(f"width {w}" for w in widths), "state / parameters"]]
    for name, by_width in results["results"].items():
        ratios = (f"{by_width[width]['ratio']:.2f}" for width in widths)
        rows.append([name, *ratios, f"{by_width[widths[-1]]['state_per_parameter']:.0f}"])
    return rows


def main() -> None:
    """Time every optimizer at every width, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--only", help="Part of the names to time.", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="optimizer_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / args.output
    results = read_json(path).get("results", {})
    optimizers = ours() | peers()
    for width in args.widths:
        params = tensors(width, args.device)
        for name, build in tqdm(optimizers.items(), desc=f"width {width}"):
            if args.only in name:
                results.setdefault(name, {})[str(width)] = compare(build, params, args.turns, args.device)
                save(path, {"device": args.device, "turns": args.turns, "results": results})
    for name, by_width in results.items():
        print(f"{name:36}" + "".join(f"{r['ratio']:>8.2f}" for r in by_width.values()))
