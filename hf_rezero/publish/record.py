"""What a run was: its command, machine, versions and data, without secrets and without paths of the machine."""

import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..data.tokenizer import byte_tokenizer
from ..diagnostics.resweights import resweight_profile
from ..files import read_json, write_json
from .redact import UNLISTED, clean_name, command_line, is_hub_name, redact


RECORD = "run.json"
LIBRARIES = ("hf_rezero", "transformers", "torch", "accelerate", "datasets", "tokenizers", "huggingface_hub")
LARGEST_BYTE_VOCABULARY = 512  # bytes and special tokens, rounded up by whoever made the table
ALWAYS_LISTED = ("learning_rate", "per_device_train_batch_size", "optim", "lr_scheduler_type", "weight_decay", "seed")


def record_run(
    trainer, *, tasks=None, dataset=None, dataset_tags=None, dataset_args=None, finetuned_from=None
) -> dict:
    """Write `run.json` into the folder of a run: what a card says of it that no other file holds.

    Neither paths of this machine nor secrets get into it. A run that only evaluated adds to what the training wrote.

    Args:
        trainer: After training or evaluation.
        tasks: The task, by its name on the Hub; default: what the class of the model is for.
        dataset: Name of the data.
        dataset_tags: Its name on the Hub; default: `dataset` where it looks like one and is no file.
        dataset_args: Its configuration.
        finetuned_from: Default: what the model was loaded from.
    """
    folder, report = Path(trainer.args.output_dir), trainer.pruning_report
    model = trainer.accelerator.unwrap_model(trainer.model)
    given = {
        "task": listed(tasks)[:1],
        "datasets": [clean_name(name) for name in listed(dataset)],
        "hub_datasets": [name for name in listed(dataset_tags) if is_hub_name(name, or_bare=True)]
        or [name for name in listed(dataset) if is_hub_name(name)],
        "dataset_config": listed(dataset_args),
    }
    record = {name: value for name, value in given.items() if value}
    record |= _of_the_model(model, trainer.processing_class) | _of_the_origin(model, finetuned_from)
    record |= _of_the_machine(trainer) | {"arguments": _of_the_arguments(trainer.args)}
    record |= _of_the_state(trainer)
    record = _added_to(read_json(folder / RECORD), record, trained=trainer.state.global_step > 0)
    write_json(folder / RECORD, record)
    if report is not None:
        report.save(folder / "pruning" / "report.json")
    if profile := resweight_profile(model):
        from ..plots import plot_resweights  # matplotlib is slow to import: only who draws waits for it

        plot_resweights(profile, folder / "resweights.png")
    return record


def describe_data(dataset) -> dict:
    """How many examples there are to score, and of bytes also the windows.

    Example:
        >>> from hf_rezero.data import evaluation_windows
        >>> describe_data(evaluation_windows(b"to be or not to be", block_size=8))
        {'examples': 4, 'bytes': 18, 'block_size': 8, 'stride': 4}
    """
    try:
        facts = {"examples": len(dataset)}
    except TypeError:
        return {}
    whole = dataset
    if isinstance(dataset, torch.utils.data.Subset):
        whole = dataset.dataset
        facts |= {"of": len(whole)} if len(whole) > len(dataset) else {}
    whole = getattr(whole, "windows", whole)
    if hasattr(whole, "block_size") and hasattr(whole, "stride"):
        facts |= {"bytes": len(whole.data), "block_size": whole.block_size, "stride": whole.stride or whole.block_size}
    return facts


def _of_the_model(model, processing_class) -> dict:
    names = [type(model).__name__]
    config = getattr(model, "config", None)
    vocabulary = getattr(processing_class, "get_vocab", dict)()
    is_bytes = (
        vocabulary == byte_tokenizer().get_vocab() if vocabulary else has_bytes(getattr(config, "vocab_size", 0))
    )
    return {
        "architectures": names,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_are_bytes": is_bytes,
    }


def has_bytes(vocab_size: int | None) -> bool:
    """Whether a vocabulary without tokenizer is one of bytes, by its size."""
    return 0 < (vocab_size or 0) <= LARGEST_BYTE_VOCABULARY


def _of_the_origin(model, finetuned_from: str | None) -> dict:
    origin = finetuned_from or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not origin:
        return {}
    return {"base_model": origin} if is_hub_name(origin, or_bare=True) else {"started_from": clean_name(origin)}


def _of_the_machine(trainer) -> dict:
    cuda = trainer.args.device.type == "cuda"
    device = torch.cuda.get_device_name(trainer.args.device) if cuda else _processor()
    count = trainer.args.world_size
    return {
        "commands": [command] if (command := command_line(trainer.args.world_size)) else [],
        "hardware": f"{count} process{'es' if count > 1 else ''}, {device}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found.group(1).strip() if found else platform.machine()
    return f"CPU {name}, {torch.get_num_threads()} threads each" if torch.get_num_threads() > 1 else f"CPU {name}"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            module = sys.modules.get(name)
            found |= {name: module.__version__} if hasattr(module, "__version__") else {}
    return found


def _of_the_arguments(args) -> dict:
    """Those that differ from their defaults, and the few that everybody asks for."""
    values = {f.name: (getattr(args, f.name), f.default) for f in fields(args) if f.init}
    shown = {}
    for name, (value, default) in values.items():
        value = getattr(value, "value", value)
        default = getattr(default, "value", default) or False  # None or False, as derived, say the same
        differs = isinstance(value, str | int | float) and value != default
        if (differs or name in ALWAYS_LISTED) and not UNLISTED.search(name):
            shown[name] = redact(value) if isinstance(value, str) else value
    return shown


def _of_the_state(trainer) -> dict:
    state, best = trainer.state, trainer.args.load_best_model_at_end
    log = state.log_history
    step = state.best_global_step if best and state.best_global_step else state.global_step
    facts = {"steps": state.global_step, "results": results_of_log(log, step), "evaluations": trainer.evaluated}
    sizes = [entry for entry in log if "resweight_mean_abs" in entry]
    if sizes:
        facts["resweights"] = {name: sizes[-1][f"resweight_{name}"] for name in ("mean_abs", "max_abs")}
    return facts


def _added_to(old: dict, new: dict, trained: bool) -> dict:
    if trained or not old:
        return new
    merged = new | old
    for name in ("results", "evaluations"):
        merged[name] = old.get(name, {}) | new[name]
    merged["commands"] = list(dict.fromkeys([*old.get("commands", []), *new["commands"]]))
    return merged


def results_of_log(log: Sequence[Mapping], step: int) -> dict[str, float]:
    """The last evaluations of the weights of `step`: those at this step, and all after the end of training.

    Example:
        >>> results_of_log([{"step": 5, "eval_bpb": 4.0}, {"step": 9, "train_runtime": 1.0}], step=9)
        {}
    """
    ends = [index for index, entry in enumerate(log) if "train_runtime" in entry]
    results = {}
    for index, entry in enumerate(log):
        if entry.get("step") == step or (ends and index > ends[-1]):
            results |= {name: value for name, value in entry.items() if name.startswith(("eval", "test"))}
    return results


def listed(value: str | Iterable[str] | None) -> list[str]:
    """None, one or several as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)
