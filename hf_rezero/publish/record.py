"""The record of a run: command, machine, versions and data, without secrets and without paths of the machine."""

import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..data.description import DataDescription, from_known
from ..data.units import tokens_are_bytes
from ..files import read_json, write_json
from ..structure.modules import config_of
from .redact import UNLISTED, clean_name, command_line, is_hub_name, redact


RECORD = "run.json"
LIBRARIES = ("hf_rezero", "transformers", "torch", "accelerate", "datasets", "tokenizers", "huggingface_hub")
ALWAYS_LISTED = ("learning_rate", "per_device_train_batch_size", "optim", "lr_scheduler_type", "weight_decay", "seed")
VALIDATION, TEST = "eval", "test"  # the Trainer's prefixes of metrics
SPLITS = {VALIDATION: "validation", TEST: "test"}


@dataclass
class DataRecord:
    """The task, by its name on the Hub, and its data, by their local names and their names on the Hub."""

    task: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    hub_datasets: list[str] = field(default_factory=list)
    dataset_config: list[str] = field(default_factory=list)


@dataclass
class ModelRecord:
    """The model, and what it started from: a repository on the Hub, or a folder."""

    architectures: list[str] = field(default_factory=list)
    parameters: int | None = None
    tokens_are_bytes: bool | None = None
    base_model: str | None = None
    started_from: str | None = None


@dataclass
class MachineRecord:
    """The commands, the machine they ran on, and the versions installed there."""

    commands: list[str] = field(default_factory=list)
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class ResweightSizes:
    """The residual weights without their signs: mean and largest."""

    mean_abs: float | None = None
    max_abs: float | None = None


@dataclass
class TrainingRecord:
    """The arguments that were given, and where the training ended."""

    arguments: dict[str, str | int | float] = field(default_factory=dict)
    steps: int | None = None
    resweights: ResweightSizes = field(default_factory=ResweightSizes)


@dataclass
class MeasuredRecord:
    """The metrics of the saved weights, and the data behind each prefix of their names."""

    results: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, DataDescription] = field(default_factory=dict)


@dataclass
class RunRecord:
    """The facts for a card that no other file of the run holds; `run.json` has the fields of all parts side by side."""

    data: DataRecord = field(default_factory=DataRecord)
    model: ModelRecord = field(default_factory=ModelRecord)
    machine: MachineRecord = field(default_factory=MachineRecord)
    training: TrainingRecord = field(default_factory=TrainingRecord)
    measured: MeasuredRecord = field(default_factory=MeasuredRecord)

    @classmethod
    def from_dict(cls, saved: Mapping) -> "RunRecord":
        """Read the content of a `run.json`, also of an earlier release.

        Example:
            >>> record = RunRecord.from_dict({"steps": 3, "evaluations": {"eval": {"examples": 2}}, "mood": "good"})
            >>> record.training.steps, record.measured.evaluations["eval"].examples, record.model.parameters
            (3, 2, None)
        """
        record = cls(**{part.name: from_known(part.default_factory, saved) for part in fields(cls)})
        record.training.resweights = from_known(ResweightSizes, saved.get("resweights") or {})
        evaluations = saved.get("evaluations") or {}
        record.measured.evaluations = {name: from_known(DataDescription, data) for name, data in evaluations.items()}
        return record

    def to_dict(self) -> dict:
        """Return the content of `run.json`, without what is not known."""
        everything: dict = {}
        for part in asdict(self).values():
            everything |= part
        return _without_empty(everything)

    def with_evaluation(self, later: "RunRecord") -> "RunRecord":
        """Return this record of a training run, with the metrics that a later run measured on its weights."""
        merged = RunRecord.from_dict(later.to_dict() | self.to_dict())
        merged.measured.results = self.measured.results | later.measured.results
        merged.measured.evaluations = self.measured.evaluations | later.measured.evaluations
        merged.machine.commands = list(dict.fromkeys([*self.machine.commands, *later.machine.commands]))
        return merged


def record_run(
    trainer,
    *,
    resweights: Mapping[str, float],
    tasks=None,
    dataset=None,
    dataset_tags=None,
    dataset_args=None,
    finetuned_from=None,
) -> RunRecord:
    """Write `run.json` into the folder of a run: the facts for its card that no other file holds.

    It contains neither secrets nor paths of this machine. A run that only evaluates adds to what the training wrote.

    Args:
        trainer: The Trainer, after training or evaluation.
        resweights: `resweight_profile` of its model.
        tasks: The task, by its name on the Hub; default: what the class of the model is for.
        dataset: Name of the data.
        dataset_tags: Its name on the Hub; default: `dataset` where it looks like one and is no file.
        dataset_args: Its configuration.
        finetuned_from: Default: what the model was loaded from.
    """
    folder, report = Path(trainer.args.output_dir), trainer.pruning_report
    model = trainer.accelerator.unwrap_model(trainer.model)
    record = RunRecord(
        _of_the_data(tasks, dataset, dataset_tags, dataset_args),
        _of_the_model(model, trainer.processing_class, finetuned_from),
        _of_the_machine(trainer.args),
        _of_the_training(trainer),
        _of_the_evaluations(trainer),
    )
    saved = read_json(folder / RECORD)
    if saved and not record.training.steps:
        record = RunRecord.from_dict(saved).with_evaluation(record)
    write_json(folder / RECORD, record.to_dict())
    if report is not None:
        report.save(folder / "pruning" / "report.json")
    if resweights:
        from ..plots import plot_resweights  # matplotlib is slow to import: only who draws waits for it

        plot_resweights(resweights, folder / "resweights.png")
    return record


def _without_empty(content: Mapping) -> dict:
    """Numbers stay, also 0 and False."""
    known = {name: _without_empty(value) if isinstance(value, dict) else value for name, value in content.items()}
    return {name: value for name, value in known.items() if value or isinstance(value, int | float)}


def _of_the_data(tasks, dataset, dataset_tags, dataset_args) -> DataRecord:
    named = [name for name in as_list(dataset_tags) if is_hub_name(name, or_bare=True)]
    return DataRecord(
        task=as_list(tasks)[:1],
        datasets=[clean_name(name) for name in as_list(dataset)],
        hub_datasets=named or [name for name in as_list(dataset) if is_hub_name(name)],
        dataset_config=as_list(dataset_args),
    )


def _of_the_model(model, processing_class, finetuned_from: str | None) -> ModelRecord:
    config = config_of(model)
    record = ModelRecord(
        architectures=[type(model).__name__],
        parameters=sum(p.numel() for p in model.parameters()),
        tokens_are_bytes=tokens_are_bytes(processing_class, getattr(config, "vocab_size", None)),
    )
    origin = finetuned_from or getattr(config, "_name_or_path", None)
    if origin and is_hub_name(origin, or_bare=True):
        record.base_model = origin
    elif origin:
        record.started_from = clean_name(origin)
    return record


def _of_the_machine(args) -> MachineRecord:
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else _processor()
    count = args.world_size
    return MachineRecord(
        commands=[command] if (command := command_line(count)) else [],
        hardware=f"{count} process{'es' if count > 1 else ''}, {device}",
        versions={"python": platform.python_version(), **_versions()},
    )


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
            own_version = getattr(sys.modules.get(name), "__version__", None)
            found |= {name: own_version} if own_version else {}
    return found


def _of_the_arguments(args) -> dict:
    """The arguments that differ from their defaults, and a few that are always listed."""
    values = {f.name: (getattr(args, f.name), f.default) for f in fields(args) if f.init}
    shown = {}
    for name, (value, default) in values.items():
        value = getattr(value, "value", value)
        default = getattr(default, "value", default) or False  # a default of None that becomes False is no change
        differs = isinstance(value, str | int | float) and value != default
        if (differs or name in ALWAYS_LISTED) and not UNLISTED.search(name):
            shown[name] = redact(value) if isinstance(value, str) else value
    return shown


def _of_the_training(trainer) -> TrainingRecord:
    record = TrainingRecord(_of_the_arguments(trainer.args), trainer.state.global_step)
    sizes = [entry for entry in trainer.state.log_history if "resweight_mean_abs" in entry]
    if sizes:
        record.resweights = ResweightSizes(sizes[-1]["resweight_mean_abs"], sizes[-1]["resweight_max_abs"])
    return record


def _of_the_evaluations(trainer) -> MeasuredRecord:
    state, is_best = trainer.state, trainer.args.load_best_model_at_end and trainer.state.best_global_step
    step = state.best_global_step if is_best else state.global_step
    return MeasuredRecord(results_of_log(state.log_history, step), trainer.evaluated)


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
            results |= {name: value for name, value in entry.items() if name.startswith(tuple(SPLITS))}
    return results


def as_list(value: str | Iterable[str] | None) -> list[str]:
    """None, one or several as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)
