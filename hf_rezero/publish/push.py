"""Publishing on the Hugging Face Hub: a finished folder in one commit, checked before anything is sent.

`HfApi.upload_folder` commits in batches, and `Trainer.push_to_hub` sends everything in the folder, including pickles with
the arguments of the run. Here a push is one commit of files that belong to a model, or an error that says what to do.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .card import write_model_card


logger = logging.get_logger(__name__)

REPORTS = (".json", ".md", ".txt", ".csv", ".yaml", ".png", ".svg", ".jinja")
# transformers leaves out `_*` too; the others serve to resume a run, or are hidden files such as those of notebooks
PRIVATE = ("_*", ".*", "checkpoint-*", "last-checkpoint", "runs", "trainer_state.json", "optimizer*", "scheduler*")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT: its folders have no weights but those of the adapter
TOKEN = re.compile(rb"\b(hf|api_org)_[A-Za-z0-9]{30,}")

ADVICE = {
    401: "the token is not valid, or there is none: run `hf auth login`, or set HF_TOKEN",
    403: "the token gives no write access: take one with the role `write`, ask the owner, or propose a pull request",
    404: "it does not exist, or the token does not give access: check the name, and who is logged in (`hf auth whoami`)",
    409: "somebody else is changing it: run the same command again",
    412: "somebody else is changing it: run the same command again",
    413: "the Hub does not accept a file or commit of this size: save the model in smaller shards, with `max_shard_size`",
    429: "there were too many requests: wait some minutes and run the same command again",
}


class PushError(RuntimeError):
    """The Hub refused a push, or could not be reached; the message says what to do."""


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload model",
    with_card: bool = True,
) -> CommitInfo:
    """Publish what a run or `save_pretrained` left in `folder`, in one commit; see `files_to_push` for what goes up.

    A repository that does not exist is created, and so is a model card if neither the folder nor the repository has
    one. The same commit removes weights from the repository that the folder does not have, since they might be loaded
    instead. A push that is refused or interrupted changes nothing, and can be repeated.

    Args:
        folder: Config, safetensors and, for the models of this library, the files of code.
        repo_id: `owner/name`, or `name` for a repository of your own.
        private: Create a private repository; one that exists already must be private.
        revision: Branch to push to, created if needed. Default: `main`.
        create_pr: Propose the files as a pull request instead; needs no write access.
        token: Default: that of `hf auth login` or HF_TOKEN.
        commit_message: First line of the commit.
        with_card: Whether to create a missing model card.

    Raises:
        ValueError: The folder holds no complete model, or a file that must not be published.
        PushError: Not logged in, no write access, or the connection broke.

    Example:
        >>> from hf_rezero import ReZeroMLPConfig, ReZeroMLPForImageClassification
        >>> model = ReZeroMLPForImageClassification(ReZeroMLPConfig(hidden_size=8, num_hidden_layers=2))
        >>> model.save_pretrained("outputs/mine")
        >>> push_folder("outputs/mine", "me/mine", token=False)
        Traceback (most recent call last):
        ...
        hf_rezero.publish.push.PushError: me/mine: nobody is logged in: run `hf auth login`, or set HF_TOKEN.
    """
    files = files_to_push(folder)
    api = open_api(repo_id, token)
    with one_clear_error(repo_id):
        repo_id = open_repository(api, repo_id, private)
        if revision and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
    if with_card and "README.md" not in [*files, *there]:
        write_model_card(folder, repo_id=repo_id)
        files.append("README.md")
    operations = [CommitOperationAdd(name, str(Path(folder, name))) for name in files]
    stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
    operations += [CommitOperationDelete(name) for name in stale]
    with one_clear_error(repo_id):
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )


# what goes up


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """The files of a folder that belong on the Hub, after checking that they make a complete model.

    These are config, safetensors, tokenizer, processors, the code that the configs name, the card, reports and
    pictures. Checkpoints, optimiser states, logs of TensorBoard and whatever is pickled are left out.

    Raises:
        ValueError: No config, weights missing or damaged, code missing, or a Hub token in one of the files.

    Example:
        >>> from hf_rezero import ReZeroMLPConfig, ReZeroMLPForImageClassification
        >>> model = ReZeroMLPForImageClassification(ReZeroMLPConfig(hidden_size=8, num_hidden_layers=2))
        >>> model.save_pretrained("outputs/mine")
        >>> files_to_push("outputs/mine")
        ['config.json', 'configuration_rezero_mlp.py', 'model.safetensors', 'modeling_rezero_mlp.py']
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise ValueError(f"{folder} has no config.json: name a folder that a finished run or `save_pretrained` left.")
    wanted = [*weight_files(folder), *code_files(folder), *report_files(folder)]
    for name in wanted:
        path = folder / name
        if path.suffix != ".safetensors" and TOKEN.search(path.read_bytes()):
            raise ValueError(
                f"{path} holds what looks like a Hub token: remove it, and revoke the token if it is one."
            )
    return sorted(wanted)


def weight_files(folder: Path) -> list[str]:
    """The safetensors at the top of the folder, whole and complete."""
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors") if not is_private(path.name)}
    needed = {"adapter_model.safetensors" if (folder / ADAPTER_CONFIG).is_file() else "model.safetensors"}
    if index.is_file() and "model.safetensors" not in names:
        needed = set(json.loads(index.read_text())["weight_map"].values())
    if needed - names:
        pickled = ", ".join(sorted(path.name for path in folder.glob("pytorch_model*.bin")))
        advice = f"{pickled} is pickled: load the model and save it again" if pickled else "save the model again"
        raise ValueError(f"{folder} lacks {', '.join(sorted(needed - names))}: {advice}.")
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or cut short ({error}): save the model again.") from None
    return list(names)


def code_files(folder: Path) -> list[str]:
    """The modules that `auto_map` of the config and of the processors names, and what these import of each other."""
    configs = {path.name: json.loads(path.read_text()) for path in folder.glob("*config.json")}
    model_type = configs.get("config.json", {}).get("model_type") or ""
    names = set()
    for reference in (item for config in configs.values() for item in (config.get("auto_map") or {}).values()):
        # a tokenizer has a pair of classes, one of which may be None; `--` refers to another repository
        for item in reference if isinstance(reference, list) else [reference]:
            if item and "--" not in item:
                names.add(item.split(".")[0] + ".py")
    if model_type.startswith("rezero") and not names:
        raise ValueError(f"{folder}/config.json names no code for {model_type}: save the model with this library.")
    names |= {other for name in names for other in imported_modules(folder / name)}
    missing = {name for name in names if not (folder / name).is_file()}
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(sorted(missing))}, named in its config: save the model again.")
    return list(names)


def imported_modules(path: Path) -> set[str]:
    """The files beside a module that it imports, directly or through others; or the first of them that is missing."""
    try:
        return {Path(imported).name for imported in get_relative_import_files(path)}
    except FileNotFoundError as error:
        return {Path(error.filename).name}


def report_files(folder: Path) -> list[str]:
    """Text files and pictures, also in subfolders, but not in checkpoints."""
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        in_checkpoint = any(Path(folder, parent, "trainer_state.json").exists() for parent in name.parents[:-1])
        if path.suffix in REPORTS and path.is_file() and not in_checkpoint and not any(map(is_private, name.parts)):
            names.append(name.as_posix())
    return names


def is_private(part: str) -> bool:
    """Whether a part of a path is of no use to those who load the model, or not meant for them."""
    return any(fnmatch(part, pattern) for pattern in PRIVATE)


# how it goes up


def open_api(repo_id: str, token: str | bool | None) -> HfApi:
    """The client of the Hub with this token or the stored one."""
    token = get_token() if token in (None, True) else token
    if not token:
        raise PushError(f"{repo_id}: nobody is logged in: run `hf auth login`, or set HF_TOKEN.")
    return HfApi(token=token)


def open_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Create the repository if needed, and return its full name."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise PushError(
            f"{repo_id} exists and is public. Nothing was published: choose another name, or make it private "
            f"in its settings."
        )
    return repo_id


@contextmanager
def one_clear_error(repo_id: str) -> Iterator[None]:
    """Turn what the client of the Hub raises, often from several layers, into one `PushError`."""
    try:
        yield
    except PushError:
        raise
    except Exception as error:
        status, said = next(((status_of(e), said_by(e)) for e in causes(error) if status_of(e)), (None, ""))
        said = " ".join((str(error) if isinstance(error, ValueError) else said).split())
        if status and status < 500:
            advice = ADVICE.get(status, "the Hub refused it")
            raise PushError(f"{repo_id}: {advice}. Nothing was published. The Hub said: {said}") from None
        network = next((f"{type(e).__name__}: {e}" for e in causes(error) if is_network(e)), None)
        if status or network:
            raise PushError(
                f"{repo_id}: the connection broke ({said or network}). A push is one commit, so all of it was "
                f"published or nothing: run the same command again."
            ) from None
        raise


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for; the errors of hf_xet have it only in their text."""
    in_text = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    return getattr(getattr(error, "response", None), "status_code", None) or (int(in_text[1]) if in_text else None)


def said_by(error: BaseException) -> str:
    """The reason that the Hub gave, without the advice that its client adds."""
    return getattr(error, "server_message", None) or f"HTTP {status_of(error)}"


def is_network(error: BaseException) -> bool:
    """Whether the connection failed, and not what was asked over it."""
    # huggingface_hub 1 raises the errors of httpx, 2 those of httpx2; neither is a dependency of ours
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(
        ("httpx", "httpcore")
    )


# from the Trainer
