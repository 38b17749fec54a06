"""Secrets and paths of this machine, taken out of what is published."""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..data.addresses import shown


UNLISTED = re.compile(
    r"_dir$|_file$|token$|password|secret|_key$|run_name|project|^trackio|^hub_|^push_to_hub|^do_|^logging_|^report_to|"
    r"^disable_tqdm|^log_level|pin_memory"
)


def command_line(processes: int = 1, argv: Sequence[str] | None = None) -> str | None:
    """The command that started this process, without secrets and paths of this machine; None in a notebook.

    Args:
        processes: How many there are, for the launcher before the script.
        argv: Default: that of this process.

    Example:
        >>> command_line(argv=["/home/me/train.py", "--token", "hf_abc", "--train_file", "/home/me/enwik8.xz"])
        'python train.py --train_file enwik8.xz'
        >>> command_line(argv=["hf-rezero clm", "--do_eval"])
        'hf-rezero clm --do_eval'
    """
    program, *arguments = sys.argv if argv is None else argv
    if "kernel_launcher" in program:
        return None
    start = ["hf-rezero", program.split()[1]] if program.startswith("hf-rezero ") else _python_command(program)
    if start is None:
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ and processes > 1:
        start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(processes)), *start[1:]]
    return shlex.join([*start, *(redact(value) for value in _without_secrets(arguments))])


def _python_command(program: str) -> list[str] | None:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None) if getattr(main, "__file__", None) == program else None
    if not program.endswith(".py"):
        return None
    name = program if not _is_absolute(program) else _below_here(program)
    return ["python", "-m", spec.name.removesuffix(".__main__")] if spec else ["python", name]


def _below_here(path: str) -> str:
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else Path(path).name


def _without_secrets(arguments: Sequence[str]) -> Iterable[str]:
    secret = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith("-"):
            secret = _is_secret(name.lstrip("-"))
            if not secret:
                yield argument
            secret = secret and not equals
        elif secret:
            secret = False
        else:
            yield argument


def _is_secret(option: str) -> bool:
    parts = option.lower().replace("-", "_").split("_")
    if len(parts) > 1 and parts[-2] in ("bos", "eos", "sep", "pad", "cls", "mask", "unk"):
        return False
    # argparse accepts the beginning of an option for the whole
    shortened = len(option) > 2 and any(name.startswith(option) for name in ("token", "hub_token"))
    return shortened or parts[-1] in ("token", "password", "passwd", "secret", "key", "credentials", "auth")


def redact(text: str) -> str:
    """Remove tokens, user names in addresses and folders of this machine from a value.

    Example:
        >>> redact("a=/home/me/x.txt,b=hf_0123456789abcdefghij,c=https://me:pw@example.org/x?token=1")
        'a=x.txt,b=***,c=https://example.org/x'
    """
    text = re.sub(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[bp]-)[A-Za-z0-9_.-]{16,}", "***", text)
    text = shown(text)
    return "".join(_clean_part(part) for part in re.split(r"([=,\s\[\]{}'\"]+)", text))


def _clean_part(part: str) -> str:
    return clean_name(part) if _is_absolute(part) or part.startswith("file://") else part


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]|\\\\", name) is not None


def clean_name(name: str) -> str:
    """The name of data or of a model: of a path only its last part, of an address what may be shown.

    Example:
        >>> clean_name("/home/me/enwik8.xz"), clean_name("stanfordnlp/sst2"), clean_name("enwik8, first 4.15 MB")
        ('enwik8.xz', 'stanfordnlp/sst2', 'enwik8, first 4.15 MB')
    """
    name = shown(name)
    if _is_absolute(name) or name.startswith((".", "file://")) or Path(name).exists():
        return re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return name


def is_hub_name(name: str, or_bare: bool = False) -> bool:
    """Whether a name looks like owner/name of a repository on the Hub, or like a bare name where that will do."""
    pattern = r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*" if or_bare else r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
    return re.fullmatch(pattern, name) is not None and not Path(name).exists()
