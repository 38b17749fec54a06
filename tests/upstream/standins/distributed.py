"""Stands in for the helper of transformers that runs a function on several ranks, which its source archive lacks."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp


def run_rank(rank: int, function: Callable, arguments: tuple, world_size: int, store: str) -> None:
    """Join the other ranks over gloo and call `function(rank, *arguments)`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable:
    """Decorate a function so that it runs on `world_size` ranks of this machine, with its rank in front."""

    def decorate(function: Callable) -> Callable:
        def run(*arguments) -> None:
            with tempfile.TemporaryDirectory() as folder:
                store = str(Path(folder, "store"))
                mp.spawn(run_rank, (function, arguments, world_size, store), nprocs=world_size)

        return run

    return decorate
