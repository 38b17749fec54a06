"""Checkpoints that are whole: a manifest of their files, and what is wrong with one."""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ..files import write_json


logger = logging.get_logger(__name__)
MANIFEST, STATE = "manifest.json", "trainer_state.json"
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json", STATE)
# sharded ones are folders; adapters may lie in folders of their own
WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model*", "*/adapter_model*", "global_step*")
# what a run has written that has got further than to its first checkpoint
FINISHED = (f"checkpoint-*/{MANIFEST}", "*.safetensors", "pytorch_model*", "*_results.json")
TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")
# the states without which training goes on otherwise
STATES = {
    "optimizer": ("optimizer*", "global_step*", "pytorch_model_fsdp*"),
    "scheduler": ("scheduler.pt",),
    "random numbers": ("rng_state*",),
}


def last_checkpoint(output_dir: str | os.PathLike, or_none: bool = False) -> str | None:
    """The newest checkpoint below `output_dir` that is whole; a warning names each that is passed over, and why.

    Raises:
        ValueError: There is none, and None was not allowed.
    """

    def step(folder: Path) -> int:
        return int(folder.name.rpartition("-")[2])

    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    reasons = []
    for folder in sorted(folders, key=step, reverse=True):
        reason = fault_of(folder) or missing_states(folder)
        if reason is None:
            return str(folder)
        reasons.append(f"{folder.name} {reason}")
        logger.warning(f"{folder} is passed over: it {reason}.")
    if or_none:
        return None
    raise ValueError(
        f"{output_dir} holds {len(folders)} checkpoints and none of them is complete: nothing to resume from"
        f"{''.join(f'; {reason}' for reason in reasons)}. Start without --resume_from_checkpoint, or name a checkpoint "
        f"folder."
    )


def resume_point(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint; None in the folder of a run that ended before its first one, and so starts over.

    Raises:
        ValueError: There is none, and starting over would write over a checkpoint or a result.
    """
    folder = Path(output_dir)
    begun = folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in FINISHED)
    checkpoint = last_checkpoint(output_dir, or_none=begun)
    if checkpoint is None:
        logger.warning(f"{output_dir} holds no checkpoint yet, so the run starts over.")
    return checkpoint


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, as the end of a sentence; None where nothing is.

    The manifest is written last, and tells of every bit. A checkpoint without one, which an earlier release wrote or
    whose run was killed just then, is read as far as its files can tell damage by themselves.
    """
    if not (checkpoint / STATE).is_file():
        return f"has no {STATE}, so it was not written to its end"
    if (checkpoint / MANIFEST).is_file():
        return _fault_by_manifest(checkpoint)
    found = {path.relative_to(checkpoint).as_posix(): damage_of(path) for path in _files(checkpoint)}
    damaged = [f"{name} {damage}" for name, damage in found.items() if damage]
    if damaged:
        return f"is damaged: {'; '.join(damaged)}"
    return None if any(any(checkpoint.glob(name)) for name in WEIGHTS) else "has no weights"


def _fault_by_manifest(checkpoint: Path) -> str | None:
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has a damaged {MANIFEST}"
    changed = [name for name, facts in files if _facts(checkpoint / name) != facts]
    return f"is damaged: {', '.join(changed)} is not what was written" if changed else None


def damage_of(path: Path) -> str | None:
    """What a file itself tells of its damage: JSON, safetensors by their header, states by the sums in their archive.

    Returns:
        The end of a sentence, or None for what is whole or of a kind that cannot tell.
    """
    size = f"holds {path.stat().st_size} bytes"
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return None if isinstance(content, dict) or path.name not in OBJECTS else f"{size} and no JSON object"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() and f"{size} and fails the check sum of its part {archive.testzip()}"
    except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{size} and is damaged or cut short ({error})"
    return None


def load_state(path: Path, advice: str) -> dict:
    """The tensors and plain values of a state that a run has saved; never pickled objects.

    Raises:
        ValueError: It is damaged; the message names the file and ends with the advice.
    """
    damage = damage_of(path)
    if damage is None:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            damage = f"is no state ({str(error).splitlines()[0]})"
    raise ValueError(f"{path} {damage}: {advice}.")


def missing_states(checkpoint: Path) -> str | None:
    """Which state a checkpoint lacks for training to go on as it would have, as the end of a sentence."""
    missing = [state for state, names in STATES.items() if not any(any(checkpoint.glob(name)) for name in names)]
    return f"has weights and no state of the {', the '.join(missing)}" if missing else None


def write_manifest(checkpoint: Path) -> None:
    """Write the size and the digest of every file of a checkpoint, after all of them."""
    files = {path.relative_to(checkpoint).as_posix(): _facts(path) for path in _files(checkpoint)}
    write_json(checkpoint / MANIFEST, {"files": files})


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]


def _facts(path: Path) -> dict | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_checkpoint(checkpoint: str, weights_only: bool) -> None:
    """Refuse to resume from a checkpoint that is damaged, or that lacks a state where only weights were not asked for.

    Raises:
        ValueError: It does; the message names the file.
    """
    check_model_files(checkpoint)
    reason = fault_of(Path(checkpoint))
    if reason is not None:
        raise ValueError(f"{checkpoint} {reason}: copy it again, or use an earlier checkpoint.")
    missing = missing_states(Path(checkpoint))
    if missing and not weights_only:
        raise ValueError(
            f"{checkpoint} {missing}, so that the run would go on to other weights: use an earlier checkpoint, or give "
            f"--resume_weights_only true if a fresh optimizer and schedule are wanted."
        )


def check_model_files(folder: str | os.PathLike) -> None:
    """Refuse a folder whose configs or weights are damaged.

    Raises:
        ValueError: The folder is missing, or names the damaged file.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is not a folder: name a checkpoint folder that `save_pretrained` or training wrote."
        )
    for path in sorted(path for pattern in (*OBJECTS, "*.safetensors*") for path in Path(folder).glob(pattern)):
        damage = damage_of(path)
        if damage:
            raise ValueError(f"{path} {damage}: copy or download it again, or use an earlier checkpoint.")


@contextmanager
def one_clear_error(target: str | os.PathLike) -> Iterator[None]:
    """Let torch, safetensors and Python say alike that something could not be written.

    Raises:
        OSError: It could not.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_CANNOT_WRITE):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{target} was not written ({reason}). The checkpoints from before are whole: make room, and go on with "
            f"--resume_from_checkpoint true."
        ) from None


class CheckedTrainer(Trainer):
    """The `Trainer`, whose checkpoints end with a manifest of their files, before any older one is removed."""

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint, its manifest once every process has written its part, and then remove the oldest ones."""
        limit, folder = self.args.save_total_limit, self._get_output_dir(trial)
        checkpoint = Path(folder, f"checkpoint-{self.state.global_step}")
        (checkpoint / MANIFEST).unlink(missing_ok=True)  # of an earlier run, which was passed over
        self.args.save_total_limit = None
        try:
            with one_clear_error(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save and checkpoint.is_dir():
            with one_clear_error(checkpoint):
                write_manifest(checkpoint)
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or say in one line why it could not be written."""
        with one_clear_error(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)
