"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) in place of training all weights, through PEFT."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..diagnostics.resweights import blocked_branches
from ..trainer.arguments import ReZeroTrainingArguments
from .running import TextModelArguments


@dataclass
class AdaptedModelArguments(TextModelArguments):
    """The model to train, all of it or by adapters."""

    lora_r: int = field(
        default=0, metadata={"help": "Train adapters of this rank in place of the weights, through PEFT; 0: none."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters; default: twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the matrices that get adapters; default: all but the head."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full, such as residuals.layer of a ReZero model."}
    )


def check_adapters(args: AdaptedModelArguments, training_args: ReZeroTrainingArguments) -> None:
    """Refuse to prune while adapters are trained: they change no weight, and the masks would have to cut them too.

    Raises:
        ValueError: Both are asked for.
    """
    if args.lora_r and training_args.prune_method:
        raise ValueError(
            f"got --lora_r {args.lora_r} and --prune_method {training_args.prune_method}: train adapters of a model that "
            f"was pruned, or merge the adapters into the weights, `merge_and_unload()` of PEFT, and prune what was saved."
        )


def with_adapters(model: PreTrainedModel, args: AdaptedModelArguments, task: str | None) -> Any:
    """The model with adapters, if the arguments ask for some.

    In x + w F(x) no gradient reaches F where w is 0, and an adapter method freezes w: such adapters would never learn.

    Args:
        model: Any of transformers.
        args: The rank and the rest.
        task: As PEFT names it, such as `CAUSAL_LM`; None for masked models.

    Raises:
        ValueError: PEFT is not installed, a rank below 0, matrices that the model does not have, or residual weights
            that are 0 and frozen.
    """
    if not args.lora_r:
        return model
    try:
        import peft
    except ImportError:
        raise ValueError("--lora_r needs PEFT, which is not installed: pip install 'hf_rezero[lora]'.") from None
    alpha = 2 * args.lora_r if args.lora_alpha is None else args.lora_alpha
    config = peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or "all-linear",
        modules_to_save=args.lora_modules_to_save,
        task_type=task,
    )
    adapted = peft.get_peft_model(model, config)
    blocked = blocked_branches(adapted)
    if blocked:
        raise ValueError(
            f"{len(blocked)} branches have a residual weight of exactly 0, frozen beside the adapters, which therefore "
            f"would never learn: train the model first, or these weights too, --lora_modules_to_save residuals.layer."
        )
    return adapted
