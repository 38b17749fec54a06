"""What the labels of texts are, classes, numbers, sets of classes or tags of words, and how predictions are scored."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import EvalPrediction


IGNORED = -100  # in place of the label where none is to be learnt
NO_LABEL = {-1, None, ""}  # -1 is what GLUE writes in place of the labels of its test sets


@dataclass
class Labels(ABC):
    """The labels of a column.

    Attributes:
        names: Of the classes, in the order of their ids.
        problem_type: What the config calls it.
    """

    names: list[str]
    problem_type: ClassVar[str | None]

    @abstractmethod
    def encode(self, feature, value) -> Any:
        """The label that a model learns, from what the column holds."""

    @abstractmethod
    def decode(self, logits: np.ndarray) -> list[str]:
        """The labels that logits (N, C) stand for, in words."""

    @abstractmethod
    def answers(self, logits: np.ndarray) -> np.ndarray:
        """The labels that logits (N, C) stand for, as the right ones are given."""

    @abstractmethod
    def score(self, answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics of the answers."""

    def config(self) -> dict[str, Any]:
        """What the config of a model says of them."""
        names = {"id2label": dict(enumerate(self.names)), "label2id": {name: i for i, name in enumerate(self.names)}}
        return names | {"problem_type": self.problem_type}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics that the Trainer asks for."""
        return self.score(self.answers(first(prediction.predictions)), prediction.label_ids)

    def as_lists(self, answers: np.ndarray, labels: np.ndarray, nested: bool) -> tuple[list, list]:
        """Answers and labels as a module of `evaluate` reads them; `nested` if it reads sequences."""
        return answers.tolist(), np.asarray(labels).tolist()


class Classes(Labels):
    """One class for each text: accuracy."""

    problem_type = "single_label_classification"

    def encode(self, feature, value) -> int:
        return self.names.index(label_name(feature, value))

    def answers(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(-1)

    def decode(self, logits: np.ndarray) -> list[str]:
        return [self.names[i] for i in self.answers(logits)]

    def score(self, answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.mean(answers == labels))}


class Numbers(Labels):
    """One number for each text: mean squared error, and Pearson's correlation."""

    problem_type = "regression"

    def encode(self, feature, value) -> float:
        return float(value)

    def answers(self, logits: np.ndarray) -> np.ndarray:
        return logits.reshape(-1)

    def decode(self, logits: np.ndarray) -> list[str]:
        return [f"{value:.6g}" for value in self.answers(logits)]

    def score(self, answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        answers, labels = answers.astype(np.float64), np.asarray(labels, np.float64).reshape(-1)
        spread = answers.std() * labels.std()
        correlation = np.mean((answers - answers.mean()) * (labels - labels.mean())) / spread if spread else 0.0
        return {"mse": float(np.mean((answers - labels) ** 2)), "pearson": float(correlation)}


class Sets(Labels):
    """Any number of classes for each text: share of texts with all classes right, and F1 over all of them (micro)."""

    problem_type = "multi_label_classification"

    def encode(self, feature, value) -> list[float]:
        present = {label_name(getattr(feature, "feature", feature), item) for item in value}
        return [float(name in present) for name in self.names]

    def answers(self, logits: np.ndarray) -> np.ndarray:
        return (logits > 0).astype(np.int64)

    def decode(self, logits: np.ndarray) -> list[str]:
        return [",".join(self.names[i] for i in np.flatnonzero(row)) for row in self.answers(logits)]

    def score(self, answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        labels = np.asarray(labels).astype(np.int64)
        right, named = int((answers * labels).sum()), int(answers.sum() + labels.sum())
        return {"accuracy": float((answers == labels).all(-1).mean()), "f1": 2 * right / named if named else 1.0}


class Tags(Labels):
    """One class for each word of a text: accuracy over the words, and F1 of the tags, averaged over those that occur.

    Words of one entity are not put together: that is what `seqeval` does, a module of `evaluate`.
    """

    problem_type = None

    def encode(self, feature, value) -> list[int]:
        inner = getattr(feature, "feature", feature)
        return [self.names.index(label_name(inner, item)) for item in items_of(value)]

    def answers(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(-1)

    def decode(self, logits: np.ndarray) -> list[str]:
        return [" ".join(self.names[i] for i in row) for row in self.answers(logits)]

    def score(self, answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        answers, labels = answers[labels != IGNORED], labels[labels != IGNORED]
        ids = np.arange(len(self.names))
        right = np.bincount(labels[answers == labels], minlength=len(ids))
        named = np.bincount(answers, minlength=len(ids)) + np.bincount(labels, minlength=len(ids))
        f1 = 2 * right[named > 0] / named[named > 0]
        return {"accuracy": float(np.mean(answers == labels)), "macro_f1": float(f1.mean())}

    def as_lists(self, answers: np.ndarray, labels: np.ndarray, nested: bool) -> tuple[list, list]:
        known = labels != IGNORED
        if not nested:
            return answers[known].tolist(), labels[known].tolist()
        return self._names_of(answers, known), self._names_of(labels, known)

    def _names_of(self, ids: np.ndarray, known: np.ndarray) -> list[list[str]]:
        return [[self.names[i] for i in row[kept]] for row, kept in zip(ids, known, strict=True)]


def items_of(value) -> list:
    """The items of a cell: those of a list, or the words of a text, as .csv has them.

    Example:
        >>> items_of("B-PER O"), items_of(["B-PER", "O"])
        (['B-PER', 'O'], ['B-PER', 'O'])
    """
    return value.split() if isinstance(value, str) else list(value)


def first(predictions) -> np.ndarray:
    """The logits, which some models return as the first of several outputs."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def label_name(feature, value) -> str:
    """The name of one label, by which parts of different origin understand each other."""
    named = isinstance(feature, ClassLabel) and value not in NO_LABEL
    return str(feature.int2str(value) if named else value)


def labels_of(table: Dataset, column: str) -> Labels:
    """What a column holds: fractions are numbers to predict, lists are sets of classes, all else is classes.

    Raises:
        ValueError: Some rows have no label, or there are fewer than two classes.

    Example:
        >>> table = Dataset.from_dict({"a": [0.5, 1.5], "b": [["x"], ["x", "y"]], "c": ["no", "yes"]})
        >>> [type(labels_of(table, column)).__name__ for column in "abc"]
        ['Numbers', 'Sets', 'Classes']
        >>> labels_of(table, "b").encode(table.features["b"], ["y"])
        [0.0, 1.0]
    """
    feature = table.features[column]
    if table.data.column(column).null_count:
        raise ValueError(f"some training rows have no label in column {column!r}: remove or fill them.")
    if getattr(feature, "dtype", "").startswith("float"):
        return Numbers(["value"])
    if getattr(feature, "feature", None) is not None or isinstance(feature, list):
        inner = getattr(feature, "feature", feature)
        return Sets(_names(inner, {item for row in table[column] for item in row}, column))
    if not getattr(feature, "dtype", "").startswith(("int", "uint", "bool", "string", "large_string")):
        raise ValueError(f"column {column!r} holds {feature}: labels are numbers, names, or lists of these.")
    return Classes(_names(feature, set(table.unique(column)), column))


def tags_of(table: Dataset, column: str) -> Tags:
    """The tags of the words in a column of lists, or of texts with a space between two tags.

    Those of a `ClassLabel` keep its order, whether the rows have them or not; others are sorted.

    Raises:
        ValueError: Some rows have no tags, the column holds something else, or there are fewer than two tags.

    Example:
        >>> table = Dataset.from_dict({"tags": [["O", "B"], ["O"]], "text": ["O B", "O"]})
        >>> tags_of(table, "tags").names, tags_of(table, "text").names
        (['B', 'O'], ['B', 'O'])
    """
    feature = table.features[column]
    if table.data.column(column).null_count:
        raise ValueError(f"some training rows have no label in column {column!r}: remove or fill them.")
    inner = getattr(feature, "feature", feature)
    is_text = getattr(feature, "dtype", None) in ("string", "large_string")
    if not is_text and (
        inner is feature or not getattr(inner, "dtype", "").startswith(("int", "uint", "bool", "str"))
    ):
        raise ValueError(f"column {column!r} holds {feature}: tags are lists of names or numbers, one for each word.")
    if isinstance(inner, ClassLabel):
        return Tags(list(inner.names))
    return Tags(_names(inner, {item for row in table[column] for item in items_of(row)}, column))


def with_names_of(labels: Labels, names: list[str]) -> Labels:
    """The labels in the order of a checkpoint, if it has the same ones, so that its classifier means what it meant.

    Example:
        >>> with_names_of(Classes(["no", "yes"]), ["yes", "no"]).names
        ['yes', 'no']
    """
    return replace(labels, names=names) if sorted(names) == sorted(labels.names) else labels


def _names(feature, values: set, column: str) -> list[str]:
    """The names of the classes, in the order of their ids: the sorted order of what the column holds."""
    if None in values or "" in values:
        raise ValueError(f"some training rows have no label in column {column!r}: remove or fill them.")
    if len(values) < 2:
        raise ValueError(f"column {column!r} holds {len(values)} label, {list(values)}: two are needed to tell apart.")
    return [label_name(feature, value) for value in sorted(values)]


def has_labels(table: Dataset, part: str, column: str, labels: Labels) -> bool:
    """Whether the rows have labels; those of a test part may be missing or hidden.

    Raises:
        ValueError: Some rows have none, or one that no training row has.
    """
    if column not in table.column_names:
        return False
    feature, values = table.features[column], table[column]
    if isinstance(labels, Numbers):
        missing = table.data.column(column).null_count
        if missing == len(table) and part == "test":
            return False
        if missing:
            raise ValueError(f"{missing} rows of the {part} part have no label in column {column!r}.")
        return True
    if isinstance(labels, (Sets, Tags)):
        inner, items = getattr(feature, "feature", feature), {item for row in values for item in items_of(row or [])}
    else:
        inner, items = feature, set(table.unique(column))
    unknown = {label_name(inner, value) for value in items} - set(labels.names)
    if unknown and part == "test" and NO_LABEL.issuperset(items):
        return False
    if unknown:
        raise ValueError(
            f"the {part} part has the labels {', '.join(sorted(unknown))}, which the training rows do not have: "
            f"those are {', '.join(labels.names)}."
        )
    return True


def with_metric(labels: Labels, name: str | None, *, each_entity: bool = False):
    """What scores predictions: a module of `evaluate` beside our metrics, or these alone.

    Args:
        labels: Of the texts.
        name: A folder or file of a module, the name of one of `hf_rezero.metrics`, or one on the Hub.
        each_entity: Keep what a module finds for each kind of entity, as `seqeval` does, and not over all of them alone.

    Raises:
        ValueError: There is no such module.
    """
    if name is None:
        return labels.compute_metrics
    import evaluate  # slow to import, and few need it

    try:
        metric = evaluate.load(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"--metric_name {name} is no module that `evaluate` can load: {error}") from None
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    nested = not isinstance(features["predictions"], Value)

    def compute(prediction: EvalPrediction) -> Mapping[str, float]:
        answers, right = labels.answers(first(prediction.predictions)), np.asarray(prediction.label_ids)
        predictions, references = labels.as_lists(answers, right, nested)
        found = metric.compute(predictions=predictions, references=references) or {}
        return labels.compute_metrics(prediction) | _flat(found, each_entity)

    return compute


def _flat(found: Mapping[str, Any], each_entity: bool) -> dict[str, Any]:
    """The numbers of a module under the names that run_ner.py gives them."""
    if not each_entity:
        return {key.removeprefix("overall_"): value for key, value in found.items() if not isinstance(value, Mapping)}
    parts = {key: value if isinstance(value, Mapping) else {"": value} for key, value in found.items()}
    return {f"{key}_{name}".rstrip("_"): value for key, part in parts.items() for name, value in part.items()}
