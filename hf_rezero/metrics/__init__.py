"""Metrics for `evaluate`. Each is a folder that needs nothing else of this library, and can be pushed as a Space."""

from pathlib import Path


def load(name: str, **kwargs):
    """Load the metric of this name, offline; `kwargs` go to `evaluate.load`.

    Raises:
        ValueError: There is no such metric.

    Example:
        >>> from hf_rezero import metrics
        >>> metrics.load("bits_per_byte").compute(predictions=[4.0], references=["text"])["bytes"]
        4
    """
    import evaluate  # not for those who only train

    folder = Path(__file__).parent / name
    if not (folder / f"{name}.py").is_file():
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/app.py")))
        raise ValueError(f"got the metric {name!r}: expected one of {known}.")
    return evaluate.load(str(folder), **kwargs)
