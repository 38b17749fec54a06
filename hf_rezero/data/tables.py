"""Tables of rows, as `datasets` reads them, with one kind of error for all that can be wrong with one."""

from pathlib import Path
from typing import Any

from .addresses import shown


_LOOKED_AT = 1 << 20


def load_table(
    name: str, config_name: str | None = None, *, data_files: dict[str, str] | None = None, **options
) -> Any:
    """What `datasets.load_dataset` gives for the same arguments.

    Args:
        name: A data set on the Hub, a folder, or a reader such as `json` or `imagefolder`.
        config_name: A configuration of the data set.
        data_files: The file of a reader, `{"train": path}`.
        options: Other arguments.

    Raises:
        ValueError: There is no such data set, or a file is empty, damaged or of another kind.

    Example:
        >>> path = Path("rows.jsonl")
        >>> _ = path.write_text('{"text": "one row"}')
        >>> load_table("json", data_files={"train": str(path)})["train"][0]
        {'text': 'one row'}
    """
    import datasets  # slow to import, and few need it

    if name == "json" and data_files:
        _check_json(Path(data_files["train"]))
    try:
        return datasets.load_dataset(name, config_name, data_files=data_files, **options)
    # an empty JSON file is a StopIteration, a script on the Hub a RuntimeError
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"{_failure(name, data_files)}: {shown(reason)}") from None


def _failure(name: str, data_files: dict[str, str] | None) -> str:
    if data_files is None:
        return f"{shown(name)!r} is neither bytes nor a data set that can be loaded"
    path = data_files["train"]
    return f"{path} is empty, or cannot be read as {Path(path).suffix or name}"


def _check_json(path: Path) -> None:
    """The reader of `datasets` ends the process at a file that is a lone `null`."""
    if path.suffix in (".json", ".jsonl") and path.is_file():  # compressed ones are left to it
        with path.open("rb") as file:
            if not file.read(_LOOKED_AT).lstrip().startswith((b"{", b"[")):
                raise ValueError(
                    f"{path} is empty, or cannot be read as {path.suffix}: JSON objects are needed, one a line or in a list"
                )
