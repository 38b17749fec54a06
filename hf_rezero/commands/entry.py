"""How a shell calls a command: an error that its user can mend ends it in one line, and `--debug` shows the traceback."""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from transformers.debug_utils import DebugOption

from ..data.addresses import shown


def run_command(main: Callable[[list[str]], object]) -> None:
    """Call the `main` of a command with the arguments of the process.

    Errors in the arguments, the files, the network and the numbers of a run are told in one line on stderr, with exit
    status 1; argparse's own have status 2. Any other exception is a defect and keeps its traceback.

    Args:
        main: Takes the arguments behind the name of the command.
    """
    arguments, debug = take_debug(sys.argv[1:])
    try:
        main(arguments)
    except Exception as error:
        if debug or not isinstance(error, errors_of_users()):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line(error)}")


def take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without a bare `--debug`, and whether there was one; the Trainer's own `--debug VALUE` stays.

    Example:
        >>> take_debug(["outputs/mine", "--debug"])
        (['outputs/mine'], True)
        >>> take_debug(["--debug", "underflow_overflow"])
        (['--debug', 'underflow_overflow'], False)
    """
    of_the_trainer = {option.value for option in DebugOption}
    bare = [a == "--debug" and b not in of_the_trainer for a, b in pairwise([*arguments, ""])]
    return [a for a, is_bare in zip(arguments, bare, strict=True) if not is_bare], any(bare)


def errors_of_users() -> tuple[type[Exception], ...]:
    """What the documentation of the commands says that they raise; imported late, since few commands need the Trainer."""
    from huggingface_hub.errors import StrictDataclassError

    from ..publish.push import PushError
    from ..trainer.finite import NonFiniteError

    return ValueError, OSError, NonFiniteError, PushError, StrictDataclassError


def one_line(error: Exception) -> str:
    """The message of an error, or its class where there is none, without line breaks and without secrets in addresses.

    Example:
        >>> one_line(ValueError("got 3 layers:\\n    expected 4"))
        'got 3 layers: expected 4'
    """
    return shown(" ".join(str(error).split())) or type(error).__name__
