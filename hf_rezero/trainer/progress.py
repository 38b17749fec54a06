"""The progress bar of a byte model, in bits per byte."""

import math

from transformers import ProgressCallback, Trainer

from ..data.units import BITS_PER_BYTE, tokens_are_bytes
from ..structure.modules import config_of


class BitsBar(ProgressCallback):
    """The bar of transformers, which says of each logged loss how many bits per byte it is, and keeps the last at its end."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print the log with the bits per byte in front."""
        if logs and "loss" in logs:
            bits = logs["loss"] / math.log(2)
            logs = {BITS_PER_BYTE.key: bits, **logs}
            if self.training_bar is not None:
                self.training_bar.set_postfix({BITS_PER_BYTE.key: f"{bits:.3f}"}, refresh=False)
        super().on_log(args, state, control, logs=logs, **kwargs)


def show_bits(trainer: Trainer) -> None:
    """Exchange the bar of transformers for a `BitsBar` where the loss is the mean nats of a byte."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    bars = [bar for bar in trainer.callback_handler.callbacks if type(bar) is ProgressCallback]
    is_other_loss = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    reads_bytes = tokens_are_bytes(trainer.processing_class, getattr(config_of(model), "vocab_size", None))
    if bars and reads_bytes and not is_other_loss:
        trainer.remove_callback(bars[0])
        trainer.add_callback(BitsBar)
