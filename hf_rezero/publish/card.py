"""Model cards of finished runs: every number is read from a file that the run left, and what is missing is left out."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..data.tokenizer import byte_tokenizer
from ..files import read_json, write_text
from ..pruning.report import PruningReport, from_ranges
from .metadata import AUTO_CLASSES, TASKS, check_metadata
from .record import RECORD, has_bytes, results_of_log


TEMPLATE = Path(__file__).with_name("model_card_template.md")
MARKER = (
    "<!-- Written by hf_rezero.model_card from the files of the run; without this line it is never overwritten. -->"
)
OF_THE_TRAINER = "generated automatically according to the information the Trainer had access to"

METRICS = {"bpb": ("bits_per_byte", "bits per byte"), "bits_per_token": ("bits_per_token", "bits per token")}
SPEEDS = ("runtime", "per_second", "preparation_time", "_samples", "num_input_tokens_seen", "mem_")
SPLITS = {"eval": "validation"}


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
    and `pruning/`, as far as they are there.

    Args:
        folder: With or without weights.
        name: Default: the last part of `repo_id`, or the name of the folder.
        repo_id: Where the folder goes on the Hub.
        dataset: Says better than the run what the data are.
        license: Of the weights, as the Hub names it.
        language: Codes of the languages of the data.
        tags: More of them.
        overwrite: Also a card that somebody wrote by hand.

    Raises:
        ValueError: There is no such folder, a card by hand is there, or the metadata are not what the Hub takes.

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
    content = _environment().from_string(TEMPLATE.read_text()).render(metadata=data.to_yaml(), **run.text(license))
    write_text(path, str(ModelCard(content)))
    return path


def is_generated(card: str) -> bool:
    """Whether a program wrote the card."""
    return MARKER in card or OF_THE_TRAINER in card


class Run:
    """What the files in a folder tell.

    Args:
        folder: Of the run.
        name: Of the model.
        repo_id: On the Hub.
        dataset: Name of the data, in place of the recorded one.
    """

    def __init__(self, folder: Path, name: str, repo_id: str | None = None, dataset: str | None = None):
        self.folder, self.name, self.repo_id = folder, name, repo_id
        self.record, self.config = read_json(folder / RECORD), read_json(folder / "config.json")
        self.state = read_json(folder / "trainer_state.json")
        self.gradinit, self.pruning = (
            read_json(folder / "gradinit/report.json"),
            read_json(folder / "pruning/report.json"),
        )
        self.all = read_json(folder / "all_results.json")
        self.data = [dataset] if dataset else self.record.get("datasets", [])
        self.task = next(iter(self.record.get("task", [])), None) or self._task()
        self.measured = self._from_state() | self.all | self.record.get("results", {})

    def _task(self) -> str | None:
        return next(
            (task for name in self._architectures() for end, task in TASKS.items() if name.endswith(end)), None
        )

    def _architectures(self) -> list[str]:
        return [*(self.config.get("architectures") or []), *self.record.get("architectures", [])]

    def _from_state(self) -> dict:
        """Of a run without record, which may have loaded its best weights, what is surely of the last ones."""
        step = self.state.get("global_step")
        best = self.state.get("best_global_step") if self.state.get("best_model_checkpoint") else step
        return results_of_log(self.state.get("log_history", []), step) if best == step and step is not None else {}

    @property
    def tokens_are_bytes(self) -> bool:
        """Whether bits per token are bits per byte."""
        tokenizer = read_json(self.folder / "tokenizer.json")
        if tokenizer:
            own = json.loads(byte_tokenizer().backend_tokenizer.to_str())
            return tokenizer.get("model", {}).get("vocab") == own["model"]["vocab"]
        return self.record.get("tokens_are_bytes", has_bytes(self.config.get("vocab_size")))

    def results(self) -> list[dict]:
        """One entry per metric: `prefix`, `key`, `type`, `metric`, `value`."""
        prefixes = sorted({"eval", "test", *self.record.get("evaluations", {})}, key=len, reverse=True)
        rows = []
        for key, value in self.measured.items():
            prefix = next((p for p in prefixes if key.startswith(f"{p}_") and p.startswith(("eval", "test"))), None)
            metric = key.removeprefix(f"{prefix}_")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if prefix and number and not any(speed in key for speed in SPEEDS):
                rows.append({"prefix": prefix, "key": key, "value": value} | self._named(metric))
        return sorted(rows, key=lambda row: (row["prefix"], row["type"] == "loss"))

    def _named(self, metric: str) -> dict:
        if metric == "bpb" and not self.tokens_are_bytes:
            metric = "bits_per_token"
        kind, words = METRICS.get(metric, (metric, metric.replace("_", " ")))
        return {"type": kind, "metric": words}

    def eval_results(self) -> list[EvalResult]:
        """The results as the Hub takes them; losses only where there is nothing else, and no data without name."""
        rows = [row for row in self.results() if row["type"] != "loss"] or self.results()
        if not self.task or not self.data:
            return []
        hub = self.record.get("hub_datasets", [])
        return [
            EvalResult(
                task_type=self.task,
                dataset_type=hub[0] if hub else _slug(self.data[0]),
                dataset_name=", ".join(self.data),
                dataset_config=" ".join(self.record.get("dataset_config", [])) or None,
                dataset_split=split_name(row["prefix"]),
                dataset_args=self.record.get("evaluations", {}).get(row["prefix"]) or None,
                metric_type=row["type"],
                metric_name=row["metric"],
                metric_value=row["value"],
            )
            for row in rows
            if math.isfinite(row["value"])
        ]

    def metadata(self, license: str | None, language, tags: Sequence[str]) -> ModelCardData:
        """The front matter."""
        rezero = [self.config["model_type"].replace("_", "-")] if "model_type" in self.config else []
        own = ["hf_rezero", *rezero, *(["byte-level"] if self._is_text() and self.tokens_are_bytes else [])]
        own += [tag for tag, report in (("gradinit", self.gradinit), ("pruning", self.pruning)) if report]
        results = self.eval_results()
        return ModelCardData(
            license=license,
            language=language,
            library_name="transformers",
            pipeline_tag=self.task,
            base_model=self.record.get("base_model"),
            datasets=self.record.get("hub_datasets"),
            metrics=sorted({result.metric_type for result in results}) or None,
            tags=list(dict.fromkeys([*own, *tags])),
            model_name=self.name,
            eval_results=results or None,
        )

    def _is_text(self) -> bool:
        return self.task != "image-classification" and self.task is not None

    def text(self, license: str | None) -> dict:
        """What the template shows."""
        return {
            "marker": MARKER,
            "name": self.name,
            "summary": self._summary(),
            "results": [self._row(row) for row in self.results()],
            "bits": self._bits(),
            "loading": list(self._loading()),
            "commands": "\n".join(self.record.get("commands", [])),
            "started_from": self.record.get("base_model") or self.record.get("started_from"),
            "facts": list(self._facts()),
            "arguments": list(self.record.get("arguments", {}).items()),
            "pictures": [(text, name) for name, text in PICTURES.items() if (self.folder / name).is_file()],
            "gradinit": self._gradinit(),
            "pruning": self._pruning(),
            "limits": list(self._limits()),
            "licence": self._licence(license),
        }

    def _summary(self) -> str:
        kind = next(iter(self._architectures()), "model")
        parts = [f"A `{kind}`"]
        if self.parameters():
            parts.append(f"of {self.parameters():,} parameters")
        if self.data:
            parts.append(f"trained on {_md(', '.join(self.data))}" if self._steps() else f"for {_md(self.data[0])}")
        init = self.config.get("resweight_init") if self.config.get("resweight_trainable") else None
        end = "" if init is None else f" Its residual connections are x + `resweight` F(x), learned from {init} on."
        return f"{' '.join(parts)}, made with hf_rezero.{end}"

    def parameters(self) -> int | None:
        """How many the weight files hold, or else the model had."""
        return _count(self.folder.glob("*.safetensors")) or self.record.get("parameters")

    def _steps(self) -> int | None:
        return self.record.get("steps") or self.state.get("global_step")

    def _row(self, row: dict) -> dict:
        scored = self.record.get("evaluations", {}).get(row["prefix"], {})
        data = ", ".join([*self.data, *self.record.get("dataset_config", [])])
        return row | {
            "value": _number(row["value"]),
            "data": data,
            "split": split_name(row["prefix"]),
            "scored": scored_words(scored),
        }

    def _bits(self) -> str | None:
        kinds = {row["type"] for row in self.results()}
        if "bits_per_byte" in kinds:
            return (
                "Bits per byte are the summed negative log-likelihood / ln 2 / the number of predicted bytes; losses are "
                "in nats. The figures are rounded to five digits, the metadata above have them all."
            )
        return "Bits per token cannot be compared across tokenizers." if "bits_per_token" in kinds else None

    def _loading(self) -> Iterable[tuple[str, str]]:
        auto = AUTO_CLASSES.get(self.task or "", "AutoModel")
        name, own = repr(self.repo_id or self.name), "auto_map" in self.config
        classes = [auto, *([reader[0]] if (reader := self._reader()) else [])]
        if not own and self.config.get("pruning"):
            yield "The layers were cut, so the stock class has to be cut alike:", _pruned_code(auto, name)
            return
        load = [
            f"from transformers import {', '.join(sorted(classes))}",
            "",
            f"model = {auto}.from_pretrained({name}@)",
        ]
        load += [f"{reader[1]} = {reader[0]}.from_pretrained({name}@)"] if reader else []
        if own:
            code = "\n".join(["import hf_rezero  # registers the classes", *load])
            yield f"With this library (`{self.name}` is this folder or repository):", code.replace("@", "")
            yield (
                "Without it, by the code in this repository:",
                "\n".join(load).replace("@", ", trust_remote_code=True"),
            )
        else:
            yield f"`{self.name}` is this folder or repository:", "\n".join(load).replace("@", "")

    def _reader(self) -> tuple[str, str] | None:
        if (self.folder / "tokenizer_config.json").is_file():
            return "AutoTokenizer", "tokenizer"
        return ("AutoImageProcessor", "processor") if (self.folder / "preprocessor_config.json").is_file() else None

    def _facts(self) -> list[tuple[str, object]]:
        record, sizes = self.record, self.record.get("resweights", {})
        versions = ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
        found = {
            "layers": self.config.get("num_hidden_layers"),
            "width": self.config.get("hidden_size"),
            "heads of a layer": self.config.get("num_attention_heads"),
            "optimizer steps": self._steps() or None,
            "training loss, mean over the run": self.all.get("train_loss"),
            "seconds of training": self.all.get("train_runtime"),
            "size of the residual weights in the last log, mean": sizes.get("mean_abs"),
            "size of the residual weights in the last log, largest": sizes.get("max_abs"),
            "seed": record.get("arguments", {}).get("seed"),
            "hardware": record.get("hardware"),
            "versions": versions or None,
        }
        return [(label, _number(value)) for label, value in found.items() if value is not None]

    def _gradinit(self) -> dict | None:
        report, picture = self.gradinit, "gradinit/report.png"
        if not report:
            return None
        history = report["history"]
        text = (
            f"Initial scales were learned for {report['algorithm']}, eta = {report['eta']:g}, gamma = {report['gamma']:g}, in "
            f"{len(history)} steps and {_number(report['seconds'])} seconds; the constraint was active in "
            f"{report['constrained_steps']}."
        )
        for key, words in (("loss", "Loss"), ("grad_norm", "Norm of the gradient")):
            text += (
                f" {words}: {_number(history[0][key])} in the first step, {_number(history[-1][key])} in the last."
                if history
                else ""
            )
        found = picture if (self.folder / picture).is_file() else None
        return {
            "text": text,
            "scales": [(name, _number(scale)) for name, scale in report["scales"].items()],
            "picture": found,
        }

    def _pruning(self) -> dict | None:
        if not self.pruning:
            return None
        kept = {name: from_ranges(ranges) for name, ranges in self.pruning["kept"].items()}
        known = {key: value for key, value in self.pruning.items() if key in PruningReport.__dataclass_fields__}
        stages, metric = {"before": "before", "pruned": "right after pruning", "eval": "at the end"}, self._quality()
        rows = [
            (words, _number(self.measured[key]))
            for stage, words in stages.items()
            if (key := f"{stage}_{metric}") in self.measured
        ]
        sizes = [self.all.get(f"pruning_bytes_{when}") for when in ("before", "after")]
        text = str(PruningReport(**known | {"kept": kept})).replace("\n", "; ") + "."
        if known.get("max_difference") is None:
            text += " That the pruned model equals the masked one was not measured."
        text += f" Weight files: {sizes[0]:,} -> {sizes[1]:,} bytes." if all(sizes) else ""
        found = "pruning/report.png" if (self.folder / "pruning/report.png").is_file() else None
        return {"text": text, "metric": self._named(metric)["metric"], "stages": rows, "picture": found}

    def _quality(self) -> str:
        return next(
            (name for name in ("bpb", "bits_per_token", "accuracy") if f"eval_{name}" in self.measured), "loss"
        )

    def _limits(self) -> Iterable[str]:
        if not self.results():
            yield "No evaluation of these weights was recorded."
        elif not any(row["prefix"].startswith("test") for row in self.results()):
            yield "Only validation data were scored; they may have guided choices."
        subsets = [scored for scored in self.record.get("evaluations", {}).values() if "of" in scored]
        if subsets:
            yield "Not all of the evaluation data were scored; the table says how much."
        if (self.record.get("arguments") or {}).get("seed") is not None:
            yield "One run, one seed: other seeds give other numbers."
        if self.task == "text-generation":
            yield (
                "It continues texts like those it was trained on, says what is false or offensive as readily as they, and "
                "was not tuned to follow instructions."
            )
        yield "Nothing was measured of bias, safety or other data."

    def _licence(self, license: str | None) -> str:
        code = " The code files in this repository are Apache-2.0." if "auto_map" in self.config else ""
        return (f"Weights: {_md(license)}." if license else "No licence was named for the weights.") + code


PICTURES = {"training.png": "Loss by step", "resweights.png": "Residual weights by depth"}


def split_name(prefix: str) -> str:
    """The split that a prefix of metrics stands for.

    Example:
        >>> split_name("eval"), split_name("test"), split_name("eval_wiki")
        ('validation', 'test', 'validation: wiki')
    """
    first, _, rest = prefix.partition("_")
    return SPLITS.get(first, first) + (f": {rest}" if rest else "")


def scored_words(facts: Mapping) -> str:
    """What `describe_data` found, in words.

    Example:
        >>> scored_words({"examples": 2, "of": 9, "bytes": 40, "block_size": 8, "stride": 4})
        'the first 2 of 9 windows of 8 bytes, stride 4, of 40 bytes'
        >>> scored_words({"examples": 872})
        '872 examples'
    """
    if not facts:
        return ""
    count = f"the first {facts['examples']} of {facts['of']}" if "of" in facts else str(facts["examples"])
    if "block_size" not in facts:
        return f"{count} examples"
    return f"{count} windows of {facts['block_size']} bytes, stride {facts['stride']}, of {facts['bytes']} bytes"


def _pruned_code(auto: str, name: str) -> str:
    return (
        "from hf_rezero.pruning import load_pruned\n"
        f"from transformers import AutoConfig, {auto}\n\n"
        f"model = load_pruned({name}, {auto}.from_config(AutoConfig.from_pretrained({name})))"
    )


def _count(files: Iterable[Path]) -> int:
    count = 0
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def _number(value) -> str:
    """Floats to five digits, all else as it is.

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
    environment.filters |= {"md": _md, "fence": _fence}
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
