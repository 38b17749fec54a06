"""The Trainer of transformers with the parts of this library."""

from .arguments import ReZeroTrainingArguments
from .checkpoints import last_checkpoint
from .distillation import DistillationConfig
from .gradinit import GradInitConfig
from .pruning import PruningConfig
from .trainer import ReZeroTrainer


__all__ = [
    "DistillationConfig",
    "GradInitConfig",
    "PruningConfig",
    "ReZeroTrainer",
    "ReZeroTrainingArguments",
    "last_checkpoint",
]
