"""The arguments of a training run."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..data.units import BITS_PER_BYTE, BITS_PER_TOKEN, PERPLEXITY
from ..optim.registry import BASES, parse_optimizer
from .distillation import DistillationConfig
from .flags import flags_of
from .gradinit import GradInitConfig
from .processes import join_on_cpus
from .pruning import PruningConfig


LOWER_IS_BETTER = (BITS_PER_BYTE.key, BITS_PER_TOKEN.key, PERPLEXITY)


@dataclass
class ReZeroTrainingArguments(
    flags_of(PruningConfig, "prune_", method=None),
    flags_of(DistillationConfig, "distill_", teacher=None),
    flags_of(GradInitConfig, "gradinit_", num_steps=0),
    TrainingArguments,
):
    """`TrainingArguments` with more optimizers, a learning rate for the residual weights, and defaults that suit them.

    `optim` is `[gc+][lookahead+|snoo+]NAME`: any name that transformers knows, or one of `hf_rezero.optim.registry.BASES`.
    `optim_args` is `name=value,...` with tuples allowed, for the optimizer of that name;
    `lookahead_k`, `lookahead_alpha`, `lookahead_momentum`, `lookahead_evaluate_slow` and `gc_conv_only` are for the
    prefixes. Our own optimizers keep their own betas and eps unless `adam_beta1`, `adam_beta2` or `adam_epsilon`
    differ from the defaults of transformers or `optim_args` names them.

    `lr_scheduler_kwargs={"points": [[0, 0.1], [0.4, 1], [1, 0]]}` is a schedule of straight lines between shares of
    the training and factors of `learning_rate`, whatever `lr_scheduler_type` says; `"momentum"` takes points too.

    `torch_compile` compiles one layer and reuses it for all, unless ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=false.

    Every field of `GradInitConfig` is an argument `gradinit_*`, of which `gradinit_steps` turns GradInit on, every field of
    `PruningConfig` one `prune_*`, of which `prune_method` turns pruning on, and every field of `DistillationConfig` one
    `distill_*`, of which `distill_from` names the teacher.

    `bpb`, `bits_per_token` and `perplexity` as `metric_for_best_model` are better when lower. `ddp_find_unused_parameters` is False, because every
    parameter takes part in every step.
    """

    optim: str = field(
        default=TrainingArguments.__dataclass_fields__["optim"].default,
        metadata={
            "help": f"[gc+][lookahead+ or snoo+]NAME, where NAME is {', '.join(BASES)}, or any optimizer that "
            "transformers knows."
        },
    )
    resweight_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the residual weights, scheduled like the other; default: --learning_rate."
        },
    )
    resweight_constant_lr: bool = field(
        default=False,
        metadata={"help": "Do not schedule the learning rate of the residual weights, as suits one-cycle schedules."},
    )
    resume_weights_only: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint without optimizer or scheduler, which then start anew."},
    )
    save_on_signal: bool = field(
        default=True,
        metadata={
            "help": "At SIGTERM, SIGINT (Ctrl-C) and SIGHUP finish the step, save a checkpoint, and exit with status 143, "
            "130 or 129."
        },
    )
    take_over: bool = field(
        default=False,
        metadata={"help": "Use an output_dir whose lock is of a run on another machine, if that run has ended."},
    )
    max_bad_steps: int = field(
        default=10,
        metadata={
            "help": "End the run after so many steps in a row whose gradient is infinite or NaN; each is left out."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without gradient in every distributed step."}
    )

    def __post_init__(self):
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False
        join_on_cpus(self)
        chosen = _check_optimizer(self.optim, self.optim_args)
        self.optim = OptimizerNames.ADAMW_TORCH  # whatever the parent accepts
        if self.save_on_signal:
            self.enable_jit_checkpoint = False  # transformers' own, which knows SIGTERM alone, after 3 seconds
        super().__post_init__()
        self.optim = chosen
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "got fp16 on a CPU, where no gradient scaler keeps small gradients: give --bf16 true, or none."
            )
        if self.torch_compile:  # one layer, reused for all: 128 of them in seconds
            os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")

    def set_optimizer(self, name: str = "adamw_torch", *args, **kwargs):
        """As in `TrainingArguments`, for all names."""
        super().set_optimizer("adamw_torch", *args, **kwargs)
        self.optim = _check_optimizer(name, self.optim_args)
        return self


def _check_optimizer(optim: str, optim_args: str | None) -> str:
    """The name, as transformers has it where it has it.

    Raises:
        ValueError: The name or the arguments have no meaning.
    """
    optim = getattr(optim, "value", optim)
    base = parse_optimizer(optim, optim_args).name.base
    if optim in list(OptimizerNames):
        return OptimizerNames(optim)
    if base not in [*BASES, *OptimizerNames]:
        known = ", ".join([*BASES, *(known.value for known in OptimizerNames)])
        raise ValueError(f"got the optimizer {optim!r}: expected [gc+][lookahead+ or snoo+] and one of {known}.")
    return optim
