"""Honest ratios of times: arms that take turns, in fresh processes that keep their memory."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median


# glibc reads them when a process starts: memory is kept, as the price of page faults is the host's
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)}


def take_turns(
    steps: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of every arm in each round but a first one, which warms up."""
    times = {arm: [] for arm in steps}
    for _ in range(1 + rounds):
        for arm, step in steps.items():
            start = clock()
            step()
            times[arm].append(clock() - start)
    return {arm: taken[1:] for arm, taken in times.items()}


def in_fresh_processes(
    processes: int, measure: Callable[..., dict[str, list[float]]], *args
) -> dict[str, list[float]]:
    """The times of every arm that `measure(*args)` takes in each of several new processes, one after the other."""
    os.environ.update(KEEP_MEMORY)
    times = defaultdict(list)
    for _ in range(processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            for arm, taken in fresh.submit(measure, *args).result().items():
                times[arm] += taken
    return dict(times)


def against(times: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of every arm, and its speed against the reference: the median of the ratios of the rounds."""
    ratios = {arm: median(a / b for a, b in zip(times[reference], times[arm], strict=True)) for arm in times}
    return {arm: {"ms": round(1000 * median(times[arm]), 2), "speed": round(ratios[arm], 3)} for arm in times}
