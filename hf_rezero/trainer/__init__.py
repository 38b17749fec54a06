"""The Trainer of transformers with the parts of this library."""

from .gradinit import GradInitConfig
from .pruning import PruningConfig
from .trainer import ReZeroTrainer, ReZeroTrainingArguments, last_checkpoint


__all__ = ["GradInitConfig", "PruningConfig", "ReZeroTrainer", "ReZeroTrainingArguments", "last_checkpoint"]
