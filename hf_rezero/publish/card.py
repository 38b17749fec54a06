"""Model cards of finished runs: every number comes from a file that the run left, and missing facts are left out."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..data.description import DataDescription
from ..data.units import BITS_PER_BYTE, BITS_PER_TOKEN, Unit, is_byte_vocabulary, saved_vocabulary, tokens_are_bytes
from ..files import read_json, write_text
from ..pruning.report import AT_THE_END, PruningReport
from .metadata import AUTO_CLASSES, TASKS, check_metadata
from .record import RECORD, SPLITS, TEST, RunRecord, results_of_log


TEMPLATE = Path(__file__).with_name("model_card_template.md")
MARKER = (
    "<!-- Written by hf_rezero.model_card from the files of the run; without this line it is never overwritten. -->"
)
OF_THE_TRAINER = "generated automatically according to the information the Trainer had access to"

QUALITIES = (BITS_PER_BYTE.key, BITS_PER_TOKEN.key, "accuracy")  # pruning is judged by the first that was measured
SPEEDS = ("runtime", "per_second", "preparation_time", "_samples", "num_input_tokens_seen", "mem_")


def write_model_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write `README.md`, the model card, into a folder that a run left, and return its path.

    It is filled from `run.json`, `all_results.json`, `trainer_state.json`, `config.json` and the reports in `gradinit/`
    and `pruning/`, as far as these files exist.

    Args:
        folder: The folder, with or without weights.
        name: Default: the last part of `repo_id`, or the name of the folder.
        repo_id: Where the folder goes on the Hub.
        dataset: Name of the data, in place of the one that the run recorded.
        license: Licence of the weights, by its name on the Hub.
        language: Codes of the languages of the data.
        tags: Further tags.
        overwrite: Replace even a card that somebody wrote by hand.

    Raises:
        ValueError: There is no such folder, it has a card written by hand, or the Hub would not accept the metadata.

    Example:
        >>> import json
        >>> folder = Path("outputs/card")
        >>> folder.mkdir(parents=True)
        >>> _ = (folder / "config.json").write_text('{"architectures": ["ReZeroForCausalLM"], "vocab_size": 264}')
        >>> _ = (folder / "all_results.json").write_text('{"eval_bpb": 2.5}')
        >>> card = write_model_card(folder, dataset="enwik8").read_text()
        >>> "| enwik8 | validation |  | bits per byte | 2.5 |" in card
        True
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name one that training or `save_pretrained` wrote.")
    path = folder / "README.md"
    if not overwrite and path.exists() and not is_generated(path.read_text()):
        raise ValueError(f"{path} was written by hand: move it away, or give overwrite=True.")
    run = Run(folder, name or (repo_id or folder.resolve().name).split("/")[-1], repo_id, dataset)
    data = run.metadata(license, language, tags)
    check_metadata(data.to_dict())
    template = _environment().from_string(TEMPLATE.read_text())
    content = template.render(run=run, metadata=data.to_yaml(), marker=MARKER, license=license)
    write_text(path, str(ModelCard(content)))
    return path


def is_generated(card: str) -> bool:
    """Whether a program wrote the card."""
    return MARKER in card or OF_THE_TRAINER in card


@dataclass
class Result:
    """A metric of the saved weights: its prefix, its names on the Hub and in words, and the data that were scored."""

    prefix: str
    value: float
    type: str
    metric: str
    scored: DataDescription

    @property
    def split(self) -> str:
        """The split that the prefix stands for."""
        return split_name(self.prefix)


class Reader(NamedTuple):
    """A tokenizer or processor, which makes the inputs of a model: the class that loads it, and the name of its variable."""

    auto_class: str
    variable: str


READERS = {
    "tokenizer_config.json": Reader("AutoTokenizer", "tokenizer"),
    "preprocessor_config.json": Reader("AutoImageProcessor", "processor"),
}


class Run:
    """The facts in the files of a run; the template turns them into sentences.

    Args:
        folder: Folder of the run.
        name: Name of the model.
        repo_id: Its repository on the Hub.
        dataset: Name of the data, in place of the recorded one.
    """

    def __init__(self, folder: Path, name: str, repo_id: str | None = None, dataset: str | None = None):
        self.folder, self.name = folder, name
        self.record = RunRecord.from_dict(read_json(folder / RECORD))
        self.config, self.gradinit = read_json(folder / "config.json"), read_json(folder / "gradinit/report.json")
        self.all_results = read_json(folder / "all_results.json")
        state = read_json(folder / "trainer_state.json")
        self.measured = _from_state(state) | self.all_results | self.record.measured.results
        self.steps = self.record.training.steps or state.get("global_step") or None
        self.seed = self.record.training.arguments.get("seed")
        self.data = [dataset] if dataset else self.record.data.datasets
        architectures = [*(self.config.get("architectures") or []), *self.record.model.architectures]
        self.architecture = next(iter(architectures), None)
        self.task = next(iter([*self.record.data.task, *_tasks_of(architectures)]), None)
        self.auto_model = AUTO_CLASSES.get(self.task or "", "AutoModel")
        self.source = repr(repo_id or name)
        self.has_own_code = "auto_map" in self.config

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).is_file()

    @cached_property
    def tokens_are_bytes(self) -> bool:
        """Whether bits per token are bits per byte."""
        tokenizer, recorded = read_json(self.folder / "tokenizer.json"), self.record.model.tokens_are_bytes
        if tokenizer:
            return is_byte_vocabulary(saved_vocabulary(tokenizer))
        return tokens_are_bytes(vocab_size=self.config.get("vocab_size")) if recorded is None else recorded

    @cached_property
    def parameters(self) -> int | None:
        """The number of parameters in the weight files, or else in the record of the run."""
        return _count(self.folder.glob("*.safetensors")) or self.record.model.parameters

    @cached_property
    def results(self) -> list[Result]:
        """The metrics of the saved weights, losses last."""
        prefixes = sorted({*SPLITS, *self.record.measured.evaluations}, key=len, reverse=True)
        prefixes = [prefix for prefix in prefixes if prefix.startswith(tuple(SPLITS))]
        found = []
        for key, value in self.measured.items():
            prefix = next((prefix for prefix in prefixes if key.startswith(f"{prefix}_")), None)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if prefix and is_number and not any(speed in key for speed in SPEEDS):
                _, kind, words = self.unit_of(key.removeprefix(f"{prefix}_"))
                scored = self.record.measured.evaluations.get(prefix, DataDescription())
                found.append(Result(prefix, value, kind, words, scored))
        return sorted(found, key=lambda result: (result.prefix, result.type == "loss"))

    def unit_of(self, metric: str) -> Unit:
        """The names of a metric; runs of earlier releases recorded bits per token under the name of bits per byte."""
        if metric == BITS_PER_BYTE.key:
            counted = any(data.tokens and data.bytes for data in self.record.measured.evaluations.values())
            return BITS_PER_BYTE if self.tokens_are_bytes or counted else BITS_PER_TOKEN
        return Unit(metric, metric, metric.replace("_", " "))

    @property
    def was_tested(self) -> bool:
        """Whether data were scored on which no choice was based."""
        return any(result.prefix.startswith(TEST) for result in self.results)

    @cached_property
    def pruning(self) -> PruningReport | None:
        """What was removed, and the quality at each stage."""
        saved = read_json(self.folder / "pruning/report.json")
        if not saved:
            return None
        report = PruningReport.from_dict(saved)
        metrics = (metric for metric in QUALITIES if f"{AT_THE_END}_{metric}" in self.measured)
        report.complete(self.measured, next(metrics, "loss"))
        return report

    @property
    def reader(self) -> Reader | None:
        """The tokenizer or processor, if it is saved beside the model."""
        return next((reader for name, reader in READERS.items() if self.has(name)), None)

    @property
    def auto_classes(self) -> list[str]:
        """The classes of transformers that load what is in the folder."""
        return sorted([self.auto_model, *([self.reader.auto_class] if self.reader else [])])

    def eval_results(self) -> list[EvalResult]:
        """The results in the form of the Hub: losses only if there is nothing else, and no data without a name."""
        if not self.task or not self.data:
            return []
        record = self.record.data
        return [
            EvalResult(
                task_type=self.task,
                dataset_type=record.hub_datasets[0] if record.hub_datasets else _slug(self.data[0]),
                dataset_name=", ".join(self.data),
                dataset_config=" ".join(record.dataset_config) or None,
                dataset_split=result.split,
                dataset_args=result.scored.to_dict() or None,
                metric_type=result.type,
                metric_name=result.metric,
                metric_value=result.value,
            )
            for result in [result for result in self.results if result.type != "loss"] or self.results
            if math.isfinite(result.value)
        ]

    def metadata(self, license: str | None, language, tags: Sequence[str]) -> ModelCardData:
        """The front matter."""
        is_text = self.task not in (None, "image-classification")
        facts = {
            "hf_rezero": True,
            self.config.get("model_type", "").replace("_", "-"): "model_type" in self.config,
            "byte-level": is_text and self.tokens_are_bytes,
            "gradinit": self.gradinit,
            "pruning": self.pruning,
        }
        own = [tag for tag, is_so in facts.items() if is_so]
        results = self.eval_results()
        return ModelCardData(
            license=license,
            language=language,
            library_name="transformers",
            pipeline_tag=self.task,
            base_model=self.record.model.base_model,
            datasets=self.record.data.hub_datasets or None,
            metrics=sorted({result.metric_type for result in results}) or None,
            tags=list(dict.fromkeys([*own, *tags])),
            model_name=self.name,
            eval_results=results or None,
        )


def _from_state(state: Mapping) -> dict[str, float]:
    """Metrics of the last weights in a run without a record, unless it may have loaded its best weights at the end."""
    step = state.get("global_step")
    best = state.get("best_global_step") if state.get("best_model_checkpoint") else step
    return results_of_log(state.get("log_history", []), step) if best == step and step is not None else {}


def _tasks_of(architectures: Iterable[str]) -> Iterable[str]:
    return (task for name in architectures for end, task in TASKS.items() if name.endswith(end))


def split_name(prefix: str) -> str:
    """The split that a prefix of metrics stands for.

    Example:
        >>> split_name("eval"), split_name("test"), split_name("eval_wiki")
        ('validation', 'test', 'validation: wiki')
    """
    first, _, rest = prefix.partition("_")
    return SPLITS.get(first, first) + (f": {rest}" if rest else "")


def _count(files: Iterable[Path]) -> int:
    count = 0
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def _number(value) -> str:
    """Floats to five digits, everything else unchanged.

    Example:
        >>> _number(2.456789), _number(1234567), _number(1e-9), _number("cpu")
        ('2.4568', '1234567', '1e-09', 'cpu')
    """
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "unnamed"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"md": _md, "fence": _fence, "number": _number, "commas": "{:,}".format}
    environment.globals |= {"BITS_PER_BYTE": BITS_PER_BYTE, "BITS_PER_TOKEN": BITS_PER_TOKEN}
    return environment


def _md(text) -> str:
    """Any value as plain text of a line or table cell.

    Example:
        >>> _md("a|b *c* <d>")
        'a\\\\|b \\\\*c\\\\* &lt;d>'
    """
    text = re.sub(r"\s+", " ", str(text)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*|\[\]])|(?<!\w)(_)|(_)(?!\w)", lambda found: f"\\{found.group()}", text)


def _fence(text: str) -> str:
    """A block of code, whatever backticks are in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}bash\n{text}\n{mark}"
