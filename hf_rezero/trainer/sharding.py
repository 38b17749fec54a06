"""Models whose weights are sharded over processes by accelerate (FSDP2): what they are saved as, and what can be resumed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import str_to_bool
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers import Trainer
from transformers.utils import logging


logger = logging.get_logger(__name__)
SHARDED_WEIGHTS = "pytorch_model_fsdp*"  # what accelerate writes beside the model, whole or by process


class ShardedTrainer(Trainer):
    """The `Trainer`, whose sharded models are evaluated without training, and saved as those of one process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        asked = self.args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
        if asked and not self.is_fsdp_enabled and self.args.world_size > 1 and self.is_world_process_zero():
            logger.warning(
                f"got fsdp on {self.args.device.type}: accelerate shards models on accelerators only, and takes DDP here, "
                f"which keeps a whole copy of the model and of the optimizer in every process."
            )

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, once: accelerate finds the parameters of an optimizer by their addresses, and empty shards share one.

        Raises:
            ValueError: The model is sharded already.
        """
        if isinstance(self.model, FSDPModule):
            raise ValueError(
                "the model is sharded already, by an earlier call of train or evaluate, and cannot be sharded for another "
                "optimizer: make a new Trainer on a new model, and train before you evaluate."
            )
        return super().train(resume_from_checkpoint, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate; a model that was not trained before is sharded for it."""
        self._shard()
        return super().evaluation_loop(*args, **kwargs)

    def _shard(self) -> None:
        if self.accelerator.is_fsdp2 and not isinstance(self.model, FSDPModule):
            # accelerate takes a model with an optimizer only
            idle = torch.optim.SGD(self.model.parameters())
            self.model, _ = self.accelerator.prepare(self.model, idle)
            self.model_wrapped = self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, whole, also where `fsdp_state_dict_type` is SHARDED_STATE_DICT and accelerate saves only shards."""
        super().save_model(output_dir, _internal_call)
        if self.accelerator.is_fsdp2 and self._saves_shards():
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _saves_shards(self) -> bool:
        return self.accelerator.state.fsdp_plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict and isinstance(self.model, FSDPModule):
            tie(state_dict, self.model)
        with unsharded_class(self.model):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint that is sharded if the model is.

        Raises:
            ValueError: Only one of them is.
        """
        is_sharded = any(Path(resume_from_checkpoint).glob(SHARDED_WEIGHTS))
        if is_sharded != bool(self.is_fsdp_enabled):
            saved, now = ("with", "without") if is_sharded else ("without", "with")
            raise ValueError(
                f"{resume_from_checkpoint} was saved {saved} FSDP and this run is {now} it, so that the state of the "
                f"optimizer cannot be read: resume as the run was started, or start a new run from these weights with "
                f"--model_name_or_path {resume_from_checkpoint}."
            )
        if model is None:  # of a run that had finished, and is not trained again
            self._shard()
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def tie(state_dict: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Let parameters that are one in the model be one in its state too, of which gathering has made several."""
    first: dict[nn.Parameter, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state_dict:
            state_dict[name] = first.setdefault(parameter, state_dict[name])


@contextmanager
def unsharded_class(model: nn.Module | None) -> Iterator[None]:
    """Give a model the class that it had before `fully_shard`, which makes one of its own in a file of torch.

    `save_pretrained` writes the file and the name of the class of a model whose code is not in transformers.
    """
    made = type(model)
    if issubclass(made, FSDPModule):
        model.__class__ = next(base for base in made.__bases__ if base is not FSDPModule)
    try:
        yield
    finally:
        model.__class__ = made
