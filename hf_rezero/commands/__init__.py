"""What `hf-rezero COMMAND` runs; each file is one command."""


def summary(doc: str | None) -> str:
    """The first line of a docstring, for `--help`."""
    return (doc or "").partition("\n")[0]
