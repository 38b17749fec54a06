"""Checkpoints that are whole."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open


def last_checkpoint(output_dir: str | os.PathLike, or_none: bool = False) -> str | None:
    """The newest checkpoint below `output_dir` that was written to its end.

    Raises:
        ValueError: There is none, and None was not allowed.
    """

    def step(folder: Path) -> int:
        return int(folder.name.rpartition("-")[2])

    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    for folder in sorted(folders, key=step, reverse=True):
        if _is_complete(folder):
            return str(folder)
    if or_none:
        return None
    raise ValueError(
        f"{output_dir} holds {len(folders)} checkpoints and none of them is complete: nothing to resume from. "
        f"Start without --resume_from_checkpoint, or name a checkpoint folder."
    )


def _is_complete(checkpoint: Path) -> bool:
    """The Trainer writes `trainer_state.json` after all other files."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


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
