"""Memory and communication of a training step over 1 to 1,024 GPUs, by formula, and what two and four processes measured.

    python scripts/reproduce/run.py scaling

The formulas count numbers of 4 bytes: weights, gradients and the states of the optimizer, which every process keeps, and
what it sends in one step. P are the parameters, N the processes, s the states of the optimizer per parameter. Activations
are not counted: they depend on the batch, and `gradient_checkpointing` trades them for time.

    DDP     keeps 4 P (2 + s),      sends 2 (N - 1) / N 4 P: one all-reduce of the gradients
    FSDP2   keeps 4 P (2 + s) / N,  sends (N - 1) / N 4 (3 P - H): all-gathers in both passes, a reduce-scatter; the head and
            the embeddings, H parameters, are gathered once where they stay gathered
    TP      keeps its share of the matrices, all residual weights and the whole gradient of the embeddings, sends 6 all-reduces
            of the activations per layer (2 forward; backward one each for q, k, v and the feed-forward layer), 2 for
            embeddings and head, and gathers the logits

The measured bytes are those of the collectives that torch dispatched in one step on small models over gloo.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from common.record import RESULTS, save
from hf_rezero import ReZeroConfig, ReZeroForCausalLM


BYTES, VOCABULARY = 4, 264
KINDS = ("DDP", "FSDP2", "TP")
GPUS = (1, 8, 64, 1024)
WIDTHS = (256, 1024, 4096)
NODE = 8  # tensor parallelism stays inside of a machine


@dataclass
class Shape:
    """A model of feed-forward layers four times as wide as it is, and the tokens of one process in a step."""

    layers: int
    width: int
    tokens: int

    @property
    def per_layer(self) -> int:
        """4 d^2 of attention, 8 d^2 of the feed-forward layer, and the residual weight."""
        return 12 * self.width**2 + 1

    @property
    def ends(self) -> int:
        """Embeddings and head."""
        return 2 * VOCABULARY * self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.per_layer + self.ends


def kept(kind: str, shape: Shape, processes: int, states: int = 2) -> float:
    """Bytes of weights, gradients and states of the optimizer in one process."""
    sharded = {"DDP": 0, "FSDP2": shape.parameters, "TP": shape.parameters - shape.layers}[kind]
    whole_gradient = shape.ends / 2 * (1 - 1 / processes) if kind == "TP" else 0
    return BYTES * ((2 + states) * (shape.parameters - sharded + sharded / processes) + whole_gradient)


def sent(kind: str, shape: Shape, processes: int) -> float:
    """Bytes that one process sends in a step, by rings."""
    once = (processes - 1) / processes * BYTES  # each number passes through all other processes
    if kind == "DDP":
        return 2 * once * shape.parameters
    if kind == "FSDP2":
        return once * (3 * shape.parameters - shape.ends // 2)
    return once * shape.tokens * (2 * (6 * shape.layers + 2) * shape.width + VOCABULARY)


class Counted(TorchDispatchMode):
    """Adds up the bytes that a process sends in the collectives that run inside."""

    def __init__(self, processes: int):
        super().__init__()
        self.processes, self.bytes = processes, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function):
            self.count(str(function), args)
        return function(*args, **(kwargs or {}))

    def count(self, name: str, args) -> None:
        tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if torch.is_tensor(t)]
        share = (self.processes - 1) / self.processes
        if "all_reduce" in name or "allreduce" in name:  # a ring goes round twice
            self.bytes += 2 * share * sum(t.nbytes for t in tensors)
        elif "_functional.all_gather" in name:  # is given its part alone
            self.bytes += share * self.processes * sum(t.nbytes for t in tensors)
        elif "gather" in name or "scatter" in name:  # is given the whole and the part
            self.bytes += share * max(t.nbytes for t in tensors)


def build(kind: str, folder: Path) -> nn.Module:
    """The small model of `folder`, spread in one of the three ways."""
    if kind == "TP":
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder)
    if kind == "DDP":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.model.embed_tokens)
    fully_shard(model.lm_head, reshard_after_forward=False)
    return fully_shard(model)


def local_bytes(tensors) -> int:
    """The bytes of what this process holds of tensors."""
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def step(model: nn.Module, ids: torch.Tensor, processes: int) -> tuple[int, float]:
    """Bytes kept and bytes sent in a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    counted = Counted(processes)
    if isinstance(model, DistributedDataParallel):  # its collectives run below the dispatcher

        def hook(state, bucket):
            counted.count("allreduce", [bucket.buffer()])
            return (
                dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / processes)
            )

        model.register_comm_hook(None, hook)
        model(ids, labels=ids).loss.backward()
    else:
        with counted:
            model(ids, labels=ids).loss.backward()
    optimizer.step()
    weights = list(model.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    return local_bytes([*weights, *(p.grad for p in weights), *states]), counted.bytes


def measure(rank: int, kind: str, processes: int, shape: Shape, folder: str) -> None:
    """One process of a measurement; the first one writes what it found."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}{processes}", rank=rank, world_size=processes)
    torch.manual_seed(rank if kind != "TP" else 0)
    ids = torch.randint(0, 256, (2, shape.tokens // 2))
    found = step(build(kind, Path(folder, "model")), ids, processes)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    os._exit(0)  # a thread of gloo may abort an interpreter that shuts down in an orderly way


def measured(kind: str, processes: int, shape: Shape) -> dict[str, float]:
    """A step of so many processes, and what the formulas say of it, per process."""
    with TemporaryDirectory() as folder:
        config = ReZeroConfig(hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=4)
        model = ReZeroForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
        model.save_pretrained(Path(folder, "model"))
        mp.spawn(measure, (kind, processes, shape, folder), nprocs=processes)
        bytes_kept, bytes_sent = torch.load(Path(folder, "found.pt"))
    return {
        "kept": bytes_kept,
        "kept_by_formula": kept(kind, shape, processes),
        "sent": bytes_sent,
        "sent_by_formula": sent(kind, shape, processes),
    }


def by_formula(width: int, gpus: int) -> dict[str, dict[str, float] | None]:
    """GB kept and sent of the 128-layer model with 16,384 tokens per GPU, by kind; no TP beyond a machine."""
    shape = Shape(layers=128, width=width, tokens=16_384)
    return {
        kind: {"kept": kept(kind, shape, gpus) / 1e9, "sent": sent(kind, shape, gpus) / 1e9}
        for kind in KINDS
        if kind != "TP" or gpus <= NODE
    }


def _scaling(results: dict) -> list[list[str]]:
    head = ["128 layers x width", "parameters", "GPUs"]
    rows = [head + [f"{kind}: GB {what}" for what in ("kept", "sent") for kind in KINDS]]
    for row in results["by_formula"]:
        cells = [
            f"{row['costs'][kind][what]:.2f}" if kind in row["costs"] else ""
            for what in ("kept", "sent")
            for kind in KINDS
        ]
        rows.append([str(row["width"]), f"{row['parameters'] / 1e6:,.0f} M", f"{row['gpus']:,}", *cells])
    return rows


def _measured(results: dict) -> list[list[str]]:
    rows = [["", "processes", "MB kept", "by formula", "MB sent", "by formula"]]
    for row in results["measured"]:
        numbers = [row[name] / 1e6 for name in ("kept", "kept_by_formula", "sent", "sent_by_formula")]
        rows.append([row["kind"], str(row["processes"]), *(f"{number:.3f}" for number in numbers)])
    return rows


TABLES = {"scaling": _scaling, "scaling_measured": _measured}


def main() -> None:
    """Compute, measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    args = parser.parse_args()
    small = Shape(layers=4, width=64, tokens=64)
    results = {
        "by_formula": [
            {
                "width": width,
                "parameters": Shape(128, width, 0).parameters,
                "gpus": gpus,
                "costs": by_formula(width, gpus),
            }
            for width in WIDTHS
            for gpus in GPUS
        ],
        "measured": [
            {"kind": kind, "processes": processes, **measured(kind, processes, small)}
            for kind in KINDS
            for processes in args.processes
        ],
    }
    save(args.output, results)
    for row in _measured(results):
        print(*row)


if __name__ == "__main__":
    main()
