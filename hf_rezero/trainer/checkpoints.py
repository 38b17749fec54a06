"""Checkpoints that are whole: a manifest of their files, and what is wrong with one."""

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.utils import logging

from ..files import write_json


logger = logging.get_logger(__name__)
MANIFEST = "manifest.json"
# the states without which training goes on otherwise; sharded ones are folders of other names
STATES = {"optimizer": ("optimizer*", "global_step*", "pytorch_model_fsdp*"), "scheduler": ("scheduler.pt",)}


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


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, as the end of a sentence; None where nothing is.

    The manifest is written last. A checkpoint without one, which an earlier release wrote or whose run was killed just
    then, counts by `trainer_state.json`, which the Trainer writes after its other files.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return "has no trainer_state.json that can be read, so it was not written to its end"
    if not (checkpoint / MANIFEST).is_file():
        return None
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"].items()
    except (ValueError, KeyError, AttributeError):
        return f"has a damaged {MANIFEST}"
    changed = [name for name, facts in files if _facts(checkpoint / name) != facts]
    return f"is damaged: {', '.join(changed)} is not what was written" if changed else None


def missing_states(checkpoint: Path) -> str | None:
    """Which state a checkpoint lacks for training to go on as it would have, as the end of a sentence."""
    missing = [state for state, names in STATES.items() if not any(any(checkpoint.glob(name)) for name in names)]
    return f"has weights and no state of the {' and the '.join(missing)}" if missing else None


def write_manifest(checkpoint: Path) -> None:
    """Write the size and the digest of every file of a checkpoint, after all of them."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    write_json(
        checkpoint / MANIFEST, {"files": {path.relative_to(checkpoint).as_posix(): _facts(path) for path in files}}
    )


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
    check_safetensors(checkpoint)
    reason = fault_of(Path(checkpoint))
    if reason is not None:
        raise ValueError(f"{checkpoint} {reason}: copy it again, or use an earlier checkpoint.")
    missing = missing_states(Path(checkpoint))
    if missing and not weights_only:
        raise ValueError(
            f"{checkpoint} {missing}, so that the run would go on to other weights: use an earlier checkpoint, or give "
            f"--resume_weights_only true if a fresh optimizer and schedule are wanted."
        )


def check_safetensors(folder: str | os.PathLike) -> None:
    """Refuse a folder whose weight files are cut short.

    Raises:
        ValueError: The folder is missing, or names the damaged file.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is not a folder: name a checkpoint folder that `save_pretrained` or training wrote."
        )
    for path in Path(folder).glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(
                f"{path} holds {path.stat().st_size} bytes and is damaged or cut short ({error}): "
                f"copy or download it again, or use an earlier checkpoint."
            ) from None


class CheckedTrainer(Trainer):
    """The `Trainer`, whose checkpoints end with a manifest of their files."""

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint, and its manifest once every process has written its part."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save and folder.is_dir():
            write_manifest(folder)
