"""What the training curves of `byte_lm` say: losses without their noise, the steps to a loss, and tables of both."""

import numpy as np


STRIDE = 10  # steps between two records of a curve


def smooth(curve: list, window: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean loss of the `window` records that end there."""
    losses = np.array([loss for *_, loss in curve])
    kernel = np.ones(window) / window
    return STRIDE * np.arange(window, len(losses) + 1), np.convolve(losses, kernel, mode="valid")


def steps_to(curve: list, target: float) -> int | None:
    """The first step at which the smoothed loss is at the target, None if it never is."""
    steps, losses = smooth(curve)
    return int(steps[np.argmax(losses <= target)]) if (losses <= target).any() else None


def runs_of(results: dict, arm: str) -> list[dict]:
    """The runs of all seeds at the best learning rate."""
    best = results["best"][arm]
    return [
        results["runs"][f"{arm} | lr={best['learning_rate']:g} | seed={seed}"] for seed in range(len(best["test"]))
    ]


def mean_steps_to(results: dict, arm: str, target: float) -> float | None:
    """The mean over the seeds of the steps to the target, None if one of them never gets there."""
    steps = [steps_to(run["curve"], target) for run in runs_of(results, arm)]
    return None if None in steps else float(np.mean(steps))


def by_seed(best: dict) -> str:
    """The test losses of the seeds, in one cell."""
    return ", ".join(f"{test:.3f}" for test in best["test"])


def byte_models(results: dict, head: str) -> list[list[str]]:
    """One row for each arm: its learning rate, the mean of its test losses, and each of them."""
    rows = [[head, "best lr", "test bits per byte, mean", "by seed"]]
    for arm, best in results["best"].items():
        rows.append([arm, f"{best['learning_rate']:g}", f"{best['mean']:.3f}", by_seed(best)])
    return rows


def steps_to_losses(results: dict, head: str, targets: tuple[float, ...]) -> list[list[str]]:
    """The rows of `byte_models`, each with its steps to the targets."""
    rows = byte_models(results, head)
    rows[0] += [f"steps to {target} bpb" for target in targets]
    for row, arm in zip(rows[1:], results["best"], strict=True):
        for target in targets:
            steps = mean_steps_to(results, arm, target)
            row.append("not reached" if steps is None else f"{steps:.0f}")
    return rows


def mean_of(runs: list[dict], field: str) -> float:
    """The mean of one figure of several runs."""
    return sum(run[field] for run in runs) / len(runs)
