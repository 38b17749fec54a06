"""A YAML or JSON file of arguments: each name once, with a value of the kind that the argument takes."""

import argparse
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import string_to_bool


MAX_VALUES = 10_000  # of all lists and mappings, references written out
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_KINDS = ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")


def read_argument_file(path: Path, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """The values of a file, converted as those of the command line are.

    Args:
        path: The file; JSON is YAML.
        actions: What the arguments take, by name.

    Raises:
        ValueError: There is no such file, it is damaged, or an argument is unknown, is there twice, or has a value of
            another kind; the message names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a YAML or JSON file of arguments first, or none.")
    root = _parsed(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}, line {_line(root)}: got no arguments, expected lines of the form `name: value`.")
    _check_size(root, path)
    lines = _lines_of_names(root, path)
    unknown = next((name for name in lines if name not in actions), None)
    if unknown:
        raise ValueError(f"{path}, line {lines[unknown]}: {unknown_argument(unknown, actions)}")
    values = {}
    for key, node in root.value:
        try:
            values[key.value] = _value(node, actions[key.value])
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{path}, line {lines[key.value]}: {key.value} {error}.") from None
    return values


def unknown_argument(name: str, known: Iterable[str]) -> str:
    """What an unknown argument is told by: the nearest one that there is.

    Example:
        >>> unknown_argument("blocksize", ["block_size", "do_train"])
        'unknown argument blocksize: did you mean block_size?'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"unknown argument {name}: {f'did you mean {near[0]}?' if near else 'see --help for the names.'}"


def _parsed(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}).") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: it is neither YAML nor JSON ({problem}).") from None


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _check_size(root: yaml.Node, path: Path) -> None:
    """References let a few lines stand for any number of values, also for themselves."""
    for count, _ in enumerate(_nodes(root)):
        if count > MAX_VALUES:
            raise ValueError(f"{path}: got more than {MAX_VALUES} values, references (*name) written out.")


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting.extend(each for pair in node.value for each in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _lines_of_names(root: yaml.MappingNode, path: Path) -> dict[str, int]:
    lines: dict[str, int] = {}
    for key, _ in root.value:
        if _kind(key) != "str":
            raise ValueError(f"{path}, line {_line(key)}: got the name {key.value!r:.40}, expected a text.")
        if key.value in lines:
            raise ValueError(f"{path}, line {_line(key)}: {key.value} stands in line {lines[key.value]} already.")
        lines[key.value] = _line(key)
    return lines


def _kind(node: yaml.Node) -> str:
    return node.tag.rpartition(":")[2]


def _value(node: yaml.Node, action: argparse.Action) -> Any:
    if _kind(node) not in _KINDS:
        raise ValueError(f"has a value with the tag {node.tag}, which is not read")
    takes_list, takes_text = action.nargs in ("+", "*"), action.type in (None, str)
    if isinstance(node, yaml.SequenceNode):
        if not (takes_list or takes_text):
            raise ValueError("has a list: expected one value")
        return [_converted(_text(each), action) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        if not takes_text:
            raise ValueError("has names with values: expected one value")
        return _as_json(node)
    if _kind(node) == "null":
        if action.default is not None:
            raise ValueError(f"is null: leave the line out for the default, {action.default!r}")
        return None
    value = _converted(_text(node), action)
    return [value] if takes_list else value


def _text(node: yaml.Node) -> str:
    """What stands in the file, where YAML and we read the same number in it."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("has a list of more than plain values")
    if _kind(node) == "int" and not _WHOLE.fullmatch(node.value):
        raise ValueError(f"is {node.value}, which YAML reads in another base: write a decimal number, or quotes")
    if _kind(node) == "float" and not math.isfinite(_float(node.value)):
        raise ValueError(f"is {node.value}: expected a finite number")
    return node.value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # .nan, .inf, and 1:30.5 to the base of 60
        return math.nan


def _converted(text: str, action: argparse.Action) -> Any:
    try:
        value = text if action.type is None else action.type(text)  # pyright: ignore[reportCallIssue] a callable here
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        kind = "true or false" if action.type is string_to_bool else getattr(action.type, "__name__", "value")
        options = f" of {', '.join(map(str, action.choices))}" if action.choices else ""
        raise ValueError(f"is {text!r:.80}: expected {kind}{options}") from None
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"is {text!r:.80}: expected one of {', '.join(map(str, action.choices))}")
    return value


def _as_json(node: yaml.MappingNode) -> str:
    """Such as the arguments of a schedule, which the Trainer takes as JSON."""
    content = yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper))
    try:
        return json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"has values that JSON does not know ({error})") from None
