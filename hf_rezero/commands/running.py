"""What the command-line scripts share: arguments from a file, the model to train, and what a finished run leaves."""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import distributed as dist
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from ..data.tokenizer import byte_tokenizer
from ..data.units import tokens_are_bytes
from ..diagnostics.resweights import resweight_profile
from ..files import write_text
from ..optim.registry import split_items
from ..plots import plot_resweights, plot_training
from ..rewrite import rezero_
from ..structure.states import check_finite
from ..trainer.arguments import ReZeroTrainingArguments
from ..trainer.checkpoints import check_model_files, resume_point
from ..trainer.distillation import DistillationConfig, load_teacher
from ..trainer.folder import check_unlocked, check_writable, locked
from ..trainer.stopping import Interrupted, ended_by_signals
from .argument_file import read_argument_file, unknown_argument


@dataclass
class ModelArguments:
    """The model to train."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to go on from."})
    model_type: str = field(
        default="rezero", metadata={"help": "Architecture of a new model: rezero, gpt2, llama ..."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Folder or Hub name of a config for a new model."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Config of a new model: name=value,name=value. Derived fields follow."}
    )
    rezero: bool = field(
        default=False,
        metadata={"help": "Residual weights in place of norms, in a model of any --model_type that transformers has."},
    )
    rezero_args: str | None = field(
        default=None,
        metadata={"help": "For --rezero: norm=keep,resweight_sharing=layer ... as rezero_ takes them."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flex_attention ...; eager is the fastest for bf16 on a CPU."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights, auto, float32, bfloat16 or float16; auto: the checkpoint's. --bf16 keeps fp32."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and unpacked corpora are kept."})
    model_revision: str = field(default="main", metadata={"help": "Revision of the Hub repository."})
    token: str | None = field(default=None, metadata={"help": "Hub token; default: the stored one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run modelling code of the Hub repository."})


@dataclass
class TextModelArguments(ModelArguments):
    """The model to train, and whose tokens it reads."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a tokenizer; default: the checkpoint's, or the bytes of the text."},
    )
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "Use a tokenizer of the `tokenizers` library, where there is one."}
    )


def parse_arguments(dataclass_types: Sequence[type], description: str, argv: Sequence[str] | None = None) -> tuple:
    """Parse the command line, with a YAML or JSON file as first argument for the values that it does not give.

    Raises:
        ValueError: The line names an argument that does not exist, and the nearest that does is named; of the file,
            whatever `read_argument_file` refuses; a number that is NaN.

    Example:
        >>> from hf_rezero.trainer import ReZeroTrainingArguments
        >>> parse_arguments([ReZeroTrainingArguments], "", ["--learning_rate", "1e-3"])[0].learning_rate
        0.001
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclass_types, description=description)
    parser.usage = "%(prog)s [config.yaml | config.json] [--argument value ...]"
    if argv and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        # of a flag with a negative, such as --no_use_cache, the one that takes a value
        actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
        parser.set_defaults(**read_argument_file(Path(argv.pop(0)), actions))
    *parsed, left = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if left:
        first = next((word for word in left if word.startswith("--")), left[0]).partition("=")[0]
        raise ValueError(unknown_argument(first, parser._option_string_actions))
    _refuse_nan(parsed)
    return tuple(parsed)


def _refuse_nan(parsed: Sequence[Any]) -> None:
    """Refuse what the command line reads as a number and what is none."""
    for arguments in parsed:
        for name, value in vars(arguments).items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"got --{name} {value}: expected a number.")


def check_files_of(name: str) -> None:
    """Refuse a folder of this machine whose config or weights are damaged; what is on the Hub is checked there.

    Raises:
        ValueError: It names the file.
    """
    if Path(name).is_dir():
        check_model_files(name)


def build_config(model_type: str, overrides: str | None = None, **defaults) -> PreTrainedConfig:
    """Build a config of `model_type` from `name=value,name=value`; derived fields follow from the given ones.

    Args:
        model_type: A model type that transformers or this library knows, such as `rezero` or `gpt2`.
        overrides: Values in YAML notation; they win over `defaults`.
        defaults: Values where the config class has others.

    Raises:
        ValueError: An unknown model type, an override without `=`, or a name that the config does not have.

    Example:
        >>> build_config("rezero", "hidden_size=64,num_attention_heads=4,resweight_init=null")
        Traceback (most recent call last):
        ...
        huggingface_hub.errors.StrictDataclassFieldValidationError: Validation error for field 'resweight_init':
            TypeError: Field 'resweight_init' with value None doesn't match any type in (<class 'float'>, <class 'int'>). Errors: Field 'resweight_init' expected float, got NoneType (value: None); Field 'resweight_init' expected int, got NoneType (value: None)
        >>> build_config("rezero", "hidden_size=64,num_attention_heads=4").intermediate_size
        256
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type={model_type!r} is unknown: use 'rezero', or a type that transformers knows.")
    config_class = CONFIG_MAPPING[model_type]
    standard = config_class()
    values = dict(defaults)
    for item in split_items(overrides or ""):
        name, equals, value = (part.strip() for part in item.partition("="))
        if item.strip() and not equals:
            raise ValueError(f"config_overrides has {item!r}: write name=value,name=value.")
        if name and not hasattr(standard, name):
            raise ValueError(f"config_overrides has {name!r}, which {config_class.__name__} does not have.")
        if name:
            values[name] = _yaml_value(name, value)
    return _made(config_class, values)


def _yaml_value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"config_overrides has {name}={text!r:.80}, which is no value in YAML ({reason}).") from None


def _made(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    """The config; classes of transformers fail in their own ways at values that they did not expect."""
    try:
        return config_class(**values)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{config_class.__name__} cannot be made of {values!r:.200} ({error}).") from None


def load_model(
    args: ModelArguments,
    auto_class: type,
    length: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    is_causal: bool,
    ignore_mismatched_sizes: bool = False,
    **config_values,
) -> PreTrainedModel:
    """Load a checkpoint, or make a new model, that reads `length` tokens in the class that `auto_class` finds.

    Args:
        args: Which checkpoint, or which shape.
        auto_class: `AutoModelForCausalLM` or another.
        length: Tokens of the longest input.
        tokenizer: Whose tokens it reads; the vocabulary of a new model follows it. Default: that of bytes.
        is_causal: Whether a new model is a decoder; a checkpoint knows what it is.
        ignore_mismatched_sizes: Start with new tensors where those of a checkpoint have other sizes.
        config_values: Values for the config of either, such as the names of labels.

    Raises:
        ValueError: Overrides for a checkpoint, a vocabulary without some of the tokens, or too few positions.
    """
    tokenizer = tokenizer or byte_tokenizer()
    # the special tokens of a foreign model type would be other tokens, or beyond the table
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if not args.model_name_or_path:
        config_values["is_causal"] = is_causal
    shape = {"vocab_size": math.ceil(_vocabulary(tokenizer) / 8) * 8, **special}
    options = {"ignore_mismatched_sizes": ignore_mismatched_sizes}
    model = load_any_model(args, auto_class, shape, load_options=options, **config_values)
    check_sizes(model.config, tokenizer, length)
    return model


def choose_tokenizer(args: TextModelArguments, length: int) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer_name`, else the one beside the checkpoint, else that of bytes.

    Raises:
        ValueError: Overrides for a checkpoint, no tokenizer of that name, or none beside a checkpoint that reads no bytes.
    """
    check_overrides(args)
    if args.tokenizer_name:
        tokenizer = load_tokenizer(args, args.tokenizer_name)
        if tokenizer is None:
            raise ValueError(
                f"there is no tokenizer in --tokenizer_name {args.tokenizer_name}: name a folder that "
                f"`hf-rezero tokenizer` or `save_pretrained` wrote, or a repository on the Hub."
            )
    elif not args.model_name_or_path:
        return byte_tokenizer(model_max_length=length)
    else:
        tokenizer = load_tokenizer(args, args.model_name_or_path)
        vocab_size = getattr(AutoConfig.from_pretrained(args.model_name_or_path, **_hub(args)), "vocab_size", None)
        if not tokens_are_bytes(tokenizer, vocab_size) and tokenizer is None:
            raise ValueError(
                f"{args.model_name_or_path} has no tokenizer, and vocab_size={vocab_size} is not that of a byte model: "
                f"save its tokenizer beside it, or name one with --tokenizer_name."
            )
    return byte_tokenizer(model_max_length=length) if tokenizer is None or tokens_are_bytes(tokenizer) else tokenizer


def names_in_checkpoint(args: ModelArguments) -> list[str]:
    """The names of the labels of a checkpoint in the order of their ids, or none for a new model."""
    if not args.model_name_or_path:
        return []
    names = AutoConfig.from_pretrained(args.model_name_or_path, **_hub(args)).id2label or {}
    return [names[i] for i in sorted(names)]


def check_overrides(args: ModelArguments) -> None:
    """Refuse overrides for a model that has its shape.

    Raises:
        ValueError: There are some.
    """
    if args.config_overrides and (args.config_name or args.model_name_or_path):
        raise ValueError("--config_overrides shapes a new model: leave out --config_name and --model_name_or_path.")


def load_tokenizer(args: TextModelArguments, name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder or repository, or None where there is none.

    Raises:
        ValueError: There is one that cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=args.use_fast_tokenizer, **_hub(args))
    except Exception as error:  # `tokenizers` raises nothing more special for a damaged file
        is_missing = isinstance(error, (OSError, ValueError)) and not any(Path(name).glob("tokenizer*.json"))
        if is_missing:
            return None
        raise ValueError(
            f"the tokenizer in {name} cannot be read ({error}): save it again, or name another."
        ) from None
    # some classes, such as GPT-2's, come without vocabulary where there is no file
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def _hub(args: ModelArguments) -> dict[str, Any]:
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    return hub | {"trust_remote_code": args.trust_remote_code}


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows that a table of embeddings needs; numbers may be left out among the ids."""
    return max(tokenizer.get_vocab().values()) + 1


def load_any_model(
    args: ModelArguments, auto_class: type, shape: dict[str, Any], *, load_options: dict | None = None, **config_values
) -> PreTrainedModel:
    """Load a checkpoint, or make a new model of `model_type` or of a config, in the class that `auto_class` finds.

    Args:
        args: Which checkpoint, or which shape.
        auto_class: `AutoModelForCausalLM` or another.
        shape: Values for the config of a new model of `model_type`; `config_overrides` win over them.
        load_options: Arguments for loading a checkpoint.
        config_values: Values for the config of either, such as the names of labels.

    Raises:
        ValueError: Overrides for a checkpoint, or a model that `rezero_` refuses.
    """
    hub = _hub(args)
    options = {"attn_implementation": args.attn_implementation, "dtype": weight_type(args.dtype)}
    check_overrides(args)
    if args.model_name_or_path:
        check_files_of(args.model_name_or_path)
        options |= load_options or {}
        model = auto_class.from_pretrained(args.model_name_or_path, **hub, **options, **config_values)
        return _with_residual_weights(check_finite(model, args.model_name_or_path), args)
    if args.config_name:
        config = AutoConfig.from_pretrained(args.config_name, **hub, **config_values)
    else:
        config = build_config(args.model_type, args.config_overrides, **shape, **config_values)
    model = auto_class.from_config(config, trust_remote_code=args.trust_remote_code, **options)
    return _with_residual_weights(model, args)


REZERO_ARGUMENTS = ("norm", "resweight_init", "resweight_sharing", "final_norm", "qk_norm", "init")


def _with_residual_weights(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel:
    """The model after `rezero_` where the arguments ask for it.

    Raises:
        ValueError: `rezero_args` without `rezero`, an argument that `rezero_` does not take, or what that raises.
    """
    given = [
        tuple(part.strip() for part in item.partition("=")) for item in split_items(args.rezero_args or "") if item
    ]
    wrong = next(("".join(item) for item in given if item[0] not in REZERO_ARGUMENTS or not item[1]), None)
    if wrong or given and not args.rezero:
        raise ValueError(
            f"got --rezero_args {args.rezero_args}: expected --rezero with name=value,name=value of "
            f"{', '.join(REZERO_ARGUMENTS)}."
        )
    if args.rezero:
        values = {name: float(value) if name == "resweight_init" else value for name, _, value in given}
        report = rezero_(model, pretrained=bool(args.model_name_or_path), **values)
        if not (dist.is_initialized() and dist.get_rank()):
            print(report)
    return model


def load_teacher_of(
    student: PreTrainedModel, args: ModelArguments, training_args: ReZeroTrainingArguments
) -> DistillationConfig | None:
    """What `--distill_*` asks for, if anything, with the teacher loaded; its code is run if that of the model may be."""
    config = DistillationConfig.from_arguments(training_args)
    if config is not None and isinstance(config.teacher, str):
        options = {name: value for name, value in _hub(args).items() if name != "revision"}
        config.teacher = load_teacher(config.teacher, student, **options)
    return config


def weight_type(name: str) -> torch.dtype | str:
    """The type of that name; "auto" is the checkpoint's, and that of transformers for a new model.

    Raises:
        ValueError: There is none.

    Example:
        >>> weight_type("auto"), weight_type("bfloat16")
        ('auto', torch.bfloat16)
    """
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"got --dtype {name}: expected auto, float32, bfloat16 or float16.")
    return "auto" if name == "auto" else getattr(torch, name)


def check_sizes(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Refuse a model that does not know some tokens, or reads fewer of them than an input has.

    Raises:
        ValueError: So it is.
    """
    needed = _vocabulary(tokenizer)
    if config.vocab_size < needed:
        what = "bytes and special tokens need" if tokens_are_bytes(tokenizer) else "the tokenizer has"
        raise ValueError(f"the model knows {config.vocab_size} tokens: {what} {needed}. Use a tokenizer that fits.")
    positions = getattr(config, "max_position_embeddings", None)
    has_table = getattr(config, "position_embedding_type", "learned") in ("learned", "absolute")
    if has_table and positions is not None and length > positions:
        raise ValueError(
            f"inputs of {length} {'bytes' if tokens_are_bytes(tokenizer) else 'tokens'} are longer than the position "
            f"table, max_position_embeddings={positions}: use a smaller --block_size or --max_seq_length, or a larger "
            f"table."
        )


def check_purpose(args: ReZeroTrainingArguments, model_args: ModelArguments) -> None:
    """Refuse a run that would do nothing, arguments that nothing would read, and GradInit of trained weights.

    Raises:
        ValueError: A checkpoint and --gradinit_steps, none of --do_train, --do_eval and --do_predict, or --prune_*, --distill_* or --gradinit_* without what
            turns it on.
    """
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("there is nothing to do: give some of --do_train, --do_eval and --do_predict.")
    if args.gradinit_steps and model_args.model_name_or_path:
        raise ValueError(
            f"GradInit finds the scales that new weights start from, and those of {model_args.model_name_or_path} are "
            f"trained: leave out --gradinit_steps, or start a new model with --config_name."
        )
    for prefix, switch, is_on in (
        ("prune_", "--prune_method l1 or l0", args.prune_method),
        ("distill_", "--distill_from", args.distill_from),
        ("gradinit_", "--gradinit_steps", args.gradinit_steps),
    ):
        group = [f for f in fields(args) if f.name.startswith(prefix)]
        given = [f"--{f.name}" for f in group if getattr(args, f.name) != f.default]
        if given and not is_on:
            raise ValueError(f"got {', '.join(given)}, which have no effect without {switch}: give it too, or none.")


def check_output_dir(args: ReZeroTrainingArguments) -> str | bool | None:
    """Refuse to overwrite an earlier run, and return what to resume from, if that was asked for.

    Raises:
        ValueError: `output_dir` holds files and no resumption was asked for, there is nothing to resume from, another run
            is in it, or it cannot be written to.
    """
    resume = args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    folder = Path(args.output_dir)
    if args.process_index == 0 and folder.is_dir():
        check_unlocked(folder, args.take_over)
    if resume is True:
        resume = resume_point(folder) or True
    elif not resume and args.do_train and args.process_index == 0 and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir={args.output_dir} is not empty: choose another, remove it, "
            f"or go on with --resume_from_checkpoint true."
        )
    if args.process_index == 0:
        check_writable(folder)
    return resume or None


def run_and_publish(
    trainer: Trainer, checkpoint: str | bool | None, predict: Callable[[], dict[str, float]], **card
) -> dict[str, float]:
    """Train, evaluate, predict, and push or write the model card, for which `card` is, as the arguments ask.

    Raises:
        Interrupted: A signal ended the run: in the training with a checkpoint, after it at once.
        ValueError: Another run is in the folder.
    """
    args = trainer.args
    with ended_by_signals(), nullcontext() if args.process_index else locked(args.output_dir, args.take_over):
        try:
            return _run_and_publish(trainer, checkpoint, predict, **card)
        except Interrupted:  # on all processes
            _leave_group(trainer)
            raise


def _run_and_publish(trainer: Trainer, checkpoint: str | bool | None, predict: Callable, **card) -> dict[str, float]:
    args, metrics = trainer.args, {}
    if args.do_train:
        train_and_save(trainer, checkpoint)
    if args.do_eval:
        metrics |= evaluate_and_save(trainer, trainer.eval_dataset, "eval")
    if args.do_predict:
        metrics |= predict()
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    _leave_group(trainer)
    return metrics


def _leave_group(trainer: Trainer) -> None:
    """Without this, a process may abort at exit, when a thread of gloo still holds a tensor of Python.

    The wrapped model goes first: destroyed by it, the group would be waited for with the interpreter locked, for ever.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def train_and_save(trainer: Trainer, checkpoint: str | bool | None) -> None:
    """Train, then save the model, the metrics, the Trainer's state, and the pictures of the run."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # `run_and_publish` pushes all at its end, in one commit
    if result.metrics:  # none when a run that had finished is taken up: those it saved then stay
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    _draw(trainer)


def evaluate_and_save(trainer: Trainer, dataset, split: str) -> dict[str, float]:
    """Evaluate on `dataset`, then print and save the metrics under the name of the split."""
    metrics = trainer.evaluate(dataset, metric_key_prefix=split)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    _draw(trainer)
    return metrics


def _draw(trainer: Trainer) -> None:
    """Drawn anew after an evaluation, which adds its point to the curve."""
    log = trainer.state.log_history
    profile = resweight_profile(trainer.accelerator.unwrap_model(trainer.model))  # of all processes, if it is sharded
    if not trainer.is_world_process_zero():
        return
    if any("loss" in entry or "train_loss" in entry for entry in log):
        plot_training(log, Path(trainer.args.output_dir, "training.png"))
    if profile and trainer.args.do_train:
        plot_resweights(profile, Path(trainer.args.output_dir, "resweights.png"))


AUTO_CLASSES = {
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForImageClassification": AutoModelForImageClassification,
}


def load_as_saved(name: str, trust_remote_code: bool):
    """The model in the class that it was saved as."""
    check_files_of(name)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    architecture = (config.architectures or [""])[0]
    for ending, auto_class in AUTO_CLASSES.items():
        if architecture.endswith(ending):
            return check_finite(auto_class.from_pretrained(name, trust_remote_code=trust_remote_code), name)
    raise ValueError(
        f"{name} holds a {architecture or 'model of unknown class'}: expected one of {', '.join(AUTO_CLASSES)}."
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of examples whose likeliest label is the right one."""
    return {"accuracy": float(np.mean(likeliest(prediction.predictions) == prediction.label_ids))}


def likeliest(predictions) -> np.ndarray:
    """The label ids (N,) of logits (N, C), which some models return as the first of several outputs."""
    return (predictions[0] if isinstance(predictions, tuple) else predictions).argmax(-1)


def predict_and_save(
    trainer: Trainer, dataset, decode: Callable[[np.ndarray], Sequence[str]], *, has_labels: bool
) -> dict[str, float]:
    """Write the label of every example, by what `decode` makes of logits, and return the metrics if labels are known."""
    output = trainer.predict(dataset)
    if trainer.is_world_process_zero():
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        rows = [f"{index}\t{word}\n" for index, word in enumerate(decode(logits))]
        write_text(Path(trainer.args.output_dir, "predict_results.txt"), "index\tprediction\n" + "".join(rows))
    if not has_labels:
        return {}
    metrics = output.metrics or {}
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics)
    return metrics
