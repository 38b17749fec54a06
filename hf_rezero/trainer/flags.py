"""Command-line arguments made from a config class: one for each field, with its help and its default."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Any


def option(default: Any = MISSING, *, help: str, flag: str | None = None, read: Callable[[str], Any] | None = None):
    """A field of a config class.

    Args:
        default: None by default: the field is required.
        help: What `--help` says.
        flag: The name of the argument behind the prefix; default: that of the field.
        read: Makes the value of the text of the argument, where it is no plain number, text or truth value.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "read": read})


def flags_of(config_class: type, prefix: str, **off: Any) -> type:
    """A dataclass with the arguments `prefix` + name for the fields of a config class.

    Args:
        config_class: Its fields are `option`s.
        prefix: Of the names of the arguments.
        off: The field that turns everything on, with the value of the argument at which nothing is.
    """
    arguments = []
    for f in fields(config_class):
        default = off.get(f.name, f.default)
        kind: Any = str if f.metadata["read"] else f.type
        kind = kind | None if default is None else kind
        arguments.append((_name(f, prefix), kind, field(default=default, metadata={"help": f.metadata["help"]})))
    return make_dataclass(f"FlagsOf{config_class.__name__}", arguments)


def read_flags(config_class: type, prefix: str, arguments: Any) -> dict[str, Any]:
    """The values for the fields of a config class from such arguments."""
    return {f.name: _value(f, getattr(arguments, _name(f, prefix))) for f in fields(config_class)}


def _name(f: Field, prefix: str) -> str:
    return prefix + (f.metadata["flag"] or f.name)


def _value(f: Field, value: Any) -> Any:
    read = f.metadata["read"]
    return read(value) if read and isinstance(value, str) else value


def names(text: str) -> tuple[str, ...]:
    """Read `heads,neurons`.

    Example:
        >>> names("heads, neurons")
        ('heads', 'neurons')
    """
    return tuple(name.strip() for name in text.split(","))


def numbers_by_name(text: str) -> Mapping[str, float]:
    """Read `heads=2,*.layers.0.*=0.5`.

    Raises:
        ValueError: The text is not of this form.

    Example:
        >>> numbers_by_name("heads=2,*.layers.0.*=0.5")
        {'heads': 2, '*.layers.0.*': 0.5}
    """
    numbers = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        try:
            numbers[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"got {text!r}: expected name=number,name=number, such as heads=1,neurons=8.")
    return numbers


def number_or_by_name(text: str) -> int | Mapping[str, float]:
    """Read `4`, or `heads=1,neurons=8`.

    Example:
        >>> number_or_by_name("4"), number_or_by_name("heads=1,neurons=8")
        (4, {'heads': 1, 'neurons': 8})
    """
    return int(text) if text.strip().isdigit() else numbers_by_name(text)
