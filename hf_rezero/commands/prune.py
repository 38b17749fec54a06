"""Prune a causal language model: by scores in one shot, or by masks learned while it trains.

    hf-rezero prune --model_name_or_path outputs/quickstart --train_file text.xz --output_dir outputs/pruned \
        --score taylor --prune_targets heads,neurons --prune_target_sparsity 0.5 --max_steps 200
    hf-rezero prune --model_name_or_path outputs/quickstart --train_file text.xz --output_dir outputs/learned \
        --prune_method l1 --prune_targets heads,neurons --prune_target_sparsity 0.5 --max_steps 1000 \
        --weight_decay 0.01
    hf-rezero prune --model_name_or_path outputs/quickstart --train_file text.xz --output_dir outputs/curve \
        --score magnitude --sparsities 0.3,0.5,0.7

`--score` removes the units of the lowest score at once, then fine-tunes if `--max_steps` or `--do_train` is given;
`--prune_method` learns masks. While it trains, the model also learns from the dense one, see `--distill_from`, which may
name another teacher, or none. A checkpoint with the byte tokenizer, or with none, reads the bytes of the corpus; one
with another tokenizer reads its tokens. The quality is in bits per byte. Beside the smaller checkpoint a
run leaves `pruning/report.json`, `pruning/report.png` and `all_results.json`; `--sparsities` leaves `curve.json` and
`curve.png`.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from .. import PruningConfig, ReZeroTrainer, ReZeroTrainingArguments
from ..data.units import BITS_PER_BYTE, BITS_PER_TOKEN, Unit, tokens_are_bytes
from ..data.windows import collate_bytes
from ..files import read_json, write_json
from ..plots import plot_sparsity_curve
from ..pruning import (
    PruningReport,
    apoz,
    attach_masks,
    find_groups,
    first_k,
    load_pruned,
    magnitude,
    output_of,
    prune_,
    random,
    select,
    taylor,
)
from ..pruning.report import BEFORE, PRUNED
from ..publish.card import write_model_card
from ..publish.record import TEST
from ..trainer import DistillationConfig
from ..trainer.distillation import NO_TEACHER
from ..trainer.flags import read_flags
from . import summary
from .entry import run_command
from .running import (
    TextModelArguments,
    check_output_dir,
    check_sizes,
    choose_tokenizer,
    evaluate_and_save,
    load_any_model,
    load_teacher_of,
    parse_arguments,
    run_and_publish,
    weight_type,
)
from .texts import DataArguments, load_texts, scored_windows, source_of, training_windows


SCORES = ("first_k", "random", "magnitude", "apoz", "taylor")
SCOPES = ("group", "global")


@dataclass
class PruneArguments:
    """Pruning without training; the `--prune_*` arguments say what, and how to learn masks instead."""

    score: str | None = field(
        default=None,
        metadata={"help": f"Prune in one shot the units of the lowest {', '.join(SCORES)}; excludes --prune_method."},
    )
    score_scope: str = field(
        default="group",
        metadata={"help": "group: the same fraction everywhere; global: compare scores across groups."},
    )
    score_windows: int = field(
        default=64, metadata={"help": "Training windows, evenly spaced, for the scores apoz and taylor."}
    )
    apoz_eps: float = field(
        default=0.0, metadata={"help": "What apoz counts as zero, |x| <= eps; smooth activations need more than 0."}
    )
    sparsities: str | None = field(
        default=None, metadata={"help": "0.3,0.5,0.7: quality of the pruned model at each, for --score, no training."}
    )


@dataclass
class Data:
    """What the model reads, and in which tokens."""

    train: Dataset
    validation: Dataset
    test: Dataset
    tokenizer: object
    unit: Unit


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, prune_args, args = parse_arguments(
        (TextModelArguments, DataArguments, PruneArguments, ReZeroTrainingArguments), summary(__doc__), argv
    )
    sparsities = check_arguments(model_args, prune_args, args)
    trains = args.do_train or args.max_steps > 0 or args.prune_method is not None
    args.do_train = args.do_eval = True  # something is written in any case, and never over an earlier run
    checkpoint, args.do_train = check_output_dir(args), trains
    set_seed(args.seed)
    model = load_checkpoint(model_args)
    with args.main_process_first(desc="reading the corpus"):
        data = load_data(data_args, model_args, model.config, not args.disable_tqdm)
    if sparsities:
        draw_curve(model, data, prune_args, args, sparsities)
    if args.prune_method is None and args.prune_target_sparsity is None:
        return {}
    size = weights_size(model_args.model_name_or_path) or model.get_memory_footprint()
    trainer = make_trainer(model, args, data, teacher_of(model, model_args, args, trains))
    metrics = prune(trainer, data, prune_args, checkpoint, source_of(data_args))
    report = trainer.pruning_report
    report.take_quality(metrics, data.unit.key)
    report.bytes_before, report.bytes_after = size, weights_size(args.output_dir)
    save_report(trainer, report)
    if trainer.is_world_process_zero():
        print_summary(trainer, report, data.unit)
    return metrics | report.sizes()


def prune(
    trainer: ReZeroTrainer, data: Data, prune_args: PruneArguments, checkpoint: str | bool | None, dataset: str
) -> dict[str, float]:
    """Evaluate, prune and train in the order of the method, and save the model."""
    args = trainer.args
    metrics = evaluate_and_save(trainer, data.validation, BEFORE)
    if prune_args.score is not None:
        trainer.pruning_report = prune_at_once(trainer.model, data, prune_args, args)
        if args.do_train:
            metrics |= evaluate_and_save(trainer, data.validation, PRUNED)
        else:
            trainer.save_model()
    card = {"tasks": "text-generation", "dataset": dataset}
    return metrics | run_and_publish(trainer, checkpoint, lambda: evaluate_and_save(trainer, data.test, TEST), **card)


def check_arguments(model_args: TextModelArguments, prune_args: PruneArguments, args) -> list[float]:
    """Refuse what does not go together, and return the sparsities of the curve."""
    if not model_args.model_name_or_path:
        raise ValueError("there is nothing to prune: name a checkpoint with --model_name_or_path.")
    if (prune_args.score is None) == (args.prune_method is None):
        raise ValueError(
            f"got --score {prune_args.score} and --prune_method {args.prune_method}: expected exactly one, --score "
            f"{', '.join(SCORES)} to prune in one shot, or --prune_method l1 or l0 to learn masks."
        )
    for name, value, choices in (
        ("score", prune_args.score or SCORES[0], SCORES),
        ("score_scope", prune_args.score_scope, SCOPES),
    ):
        if value not in choices:
            raise ValueError(f"got --{name} {value}: expected one of {', '.join(choices)}.")
    if prune_args.score_windows < 1:
        raise ValueError(f"got --score_windows {prune_args.score_windows}: expected at least 1.")
    return check_sparsities(prune_args, args)


def check_sparsities(prune_args: PruneArguments, args) -> list[float]:
    """The sparsities of the curve; one-shot pruning needs these or a target."""
    if prune_args.sparsities is None:
        if prune_args.score and args.prune_target_sparsity is None:
            raise ValueError("--score needs --prune_target_sparsity, or --sparsities for a curve.")
        return []
    if args.prune_method is not None:
        raise ValueError("--sparsities draws the curve of a --score: leave it out with --prune_method.")
    try:
        sparsities = [float(value) for value in prune_args.sparsities.split(",")]
    except ValueError:
        sparsities = [-1.0]
    if not all(0 <= value < 1 for value in sparsities):
        raise ValueError(
            f"got --sparsities {prune_args.sparsities}: expected fractions of at least 0 and below 1, as 0.3,0.5."
        )
    return sorted(sparsities)


def load_checkpoint(args: TextModelArguments) -> PreTrainedModel:
    """The model to prune, also one that was pruned before."""
    folder = Path(args.model_name_or_path)
    own = read_json(folder / "config.json")
    if own.get("pruning") and "auto_map" not in own:  # of stock models, by earlier versions too, which cut no class
        config = AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, dtype=weight_type(args.dtype))
        load_pruned(folder, model)
    else:
        model = load_any_model(args, AutoModelForCausalLM, {})
    architectures: list[str] = getattr(model.config, "architectures", None) or [type(model).__name__]
    if not {c.__name__ for c in type(model).__mro__} & set(architectures):  # --rezero makes subclasses
        raise ValueError(
            f"{folder} holds a {architectures[0]}: this script prunes causal language models. Prune others in Python "
            f"with hf_rezero.pruning, or while they train, with the --prune_* arguments of the other scripts."
        )
    return model


def load_data(args: DataArguments, model_args: TextModelArguments, config, progress: bool) -> Data:
    """The windows of the corpus, in the tokens of the checkpoint."""
    tokenizer = choose_tokenizer(model_args, args.block_size)
    check_sizes(config, tokenizer, args.block_size)
    texts = load_texts(args, model_args, tokenizer, ("train", "validation", "test"), progress=progress)
    train, validation, test = texts.values()
    is_per_byte = tokens_are_bytes(tokenizer) or validation.num_bytes is not None
    return Data(
        training_windows(train, args),
        scored_windows(validation, args),
        scored_windows(test, args),
        tokenizer,
        BITS_PER_BYTE if is_per_byte else BITS_PER_TOKEN,
    )


def teacher_of(
    student: PreTrainedModel, model_args: TextModelArguments, args: ReZeroTrainingArguments, trains: bool
) -> DistillationConfig | None:
    """Whom the model learns from while it trains: the dense model, unless `--distill_from` names another or none."""
    if not trains:
        args.distill_from = NO_TEACHER
    dense = model_args.model_name_or_path
    args.distill_from = args.distill_from or dense
    config = DistillationConfig.from_arguments(args)
    if config is None or config.teacher != dense:
        return load_teacher_of(student, model_args, args)
    # what reads models that were pruned before; residual weights of 1 would change nothing
    config.teacher = load_checkpoint(replace(model_args, rezero=False, rezero_args=None))
    return config


def make_trainer(
    model: PreTrainedModel, args: ReZeroTrainingArguments, data: Data, teacher: DistillationConfig | None = None
) -> ReZeroTrainer:
    """A Trainer that evaluates and trains on the windows."""
    return ReZeroTrainer(
        model,
        args,
        data_collator=collate_bytes,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        distillation=teacher,
    )


def prune_at_once(model: PreTrainedModel, data: Data, prune_args: PruneArguments, args) -> PruningReport:
    """Remove the units of the lowest scores, and compare with the model that has them masked."""
    groups = find_groups(model, wanted(args)["targets"])
    scores = score(model, groups, data, prune_args, args)
    return remove(model, groups, scores, args.prune_target_sparsity, data, prune_args, args)


def wanted(args: ReZeroTrainingArguments) -> dict[str, Any]:
    """What `--prune_*` asks for, by the names of `PruningConfig`."""
    return read_flags(PruningConfig, "prune_", args)


def score(model, groups, data: Data, prune_args: PruneArguments, args) -> dict[str, torch.Tensor]:
    """How useful each unit is by `--score`, the same on every process."""
    batches = score_batches(model, data.train, prune_args.score_windows, args.per_device_train_batch_size)
    if prune_args.score == "apoz":
        scores = apoz(model, groups, batches, eps=prune_args.apoz_eps)
        check_zeros(groups, scores)
        return scores
    return {
        "first_k": lambda: first_k(groups),
        "random": lambda: random(groups, generator=torch.Generator().manual_seed(args.seed)),
        "magnitude": lambda: magnitude(model, groups),
        "taylor": lambda: taylor(model, groups, batches),
    }[prune_args.score]()


def check_zeros(groups, scores: dict[str, torch.Tensor]) -> None:
    """Refuse scores that tell no unit from another."""
    for group in groups:
        if group.num_units > 1 and (scores[group.name] == scores[group.name][0]).all():
            raise ValueError(
                f"apoz found the {group.num_units} {group.kind} of {group.name!r} equally often zero, so that nothing "
                f"is known of them: raise --apoz_eps, leave out {group.kind} in --prune_targets, or use another --score."
            )


def score_batches(model, windows: Dataset, count: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of evenly spaced windows."""
    count = min(count, len(windows))
    chosen = Subset(windows, [i * len(windows) // count for i in range(count)])
    for batch in DataLoader(chosen, batch_size, collate_fn=collate_bytes):
        yield {key: value.to(model.device) for key, value in batch.items()}


def remove(model, groups, scores, sparsity: float, data: Data, prune_args: PruneArguments, args) -> PruningReport:
    """Prune to the sparsity in place."""
    kept = select(
        model,
        groups,
        scores,
        sparsity,
        scope=prune_args.score_scope,
        min_keep=wanted(args)["min_keep"],
        round_to=wanted(args)["round_to"],
    )
    batch = next(score_batches(model, data.train, 4, 4))
    masked = masked_logits(model, groups, kept, batch)
    report = prune_(model, groups, kept, method=prune_args.score, target_sparsity=sparsity)
    report.compare(masked, output_of(model, batch))
    return report


@torch.no_grad()
def masked_logits(model, groups, kept: dict[str, torch.Tensor], batch) -> torch.Tensor:
    """What the model says when units are multiplied by 0 that are still there."""
    masks = attach_masks(model, groups, "l1")
    for name, values in masks.split(masks.layer.mask).items():
        values.zero_().index_fill_(0, kept[name].to(values.device), 1.0)
    masked = output_of(model, batch)
    masks.detach_()
    return masked


def draw_curve(model, data: Data, prune_args: PruneArguments, args, sparsities: list[float]) -> None:
    """Prune and evaluate a copy at each sparsity, without training."""
    groups = find_groups(model, wanted(args)["targets"])
    scores = score(model.to(args.device), groups, data, prune_args, args)
    points = []
    for sparsity in [0.0, *(value for value in sparsities if value)]:
        pruned, reached = copy.deepcopy(model), 0.0
        if sparsity:
            reached = remove(pruned, groups, scores, sparsity, data, prune_args, args).sparsity
        quality = make_trainer(pruned, args, data).evaluate()
        point = {"score": prune_args.score, "target": sparsity, "sparsity": reached}
        point["parameters"] = sum(p.numel() for p in pruned.parameters())
        point |= {name: quality[f"eval_{name}"] for name in ("loss", data.unit.key)}
        points.append(point)
    if args.process_index == 0:
        save_curve(points, Path(args.output_dir), data.unit)


def save_curve(points: list[dict], folder: Path, unit: Unit) -> None:
    """Write the numbers and their picture, and print them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "curve.json", points)
    plot_sparsity_curve(points, folder / "curve.png")
    for point in points:
        print(
            f"sparsity {point['sparsity']:.3f}: {point['parameters']:,} parameters, {point[unit.key]:.4f} {unit.words}"
        )


def weights_size(folder: str | Path) -> int:
    """Bytes of the weight files in a folder; 0 where there are none."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def save_report(trainer: ReZeroTrainer, report: PruningReport) -> None:
    """Write the report, its picture and the sizes."""
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        report.save(folder / "pruning" / "report.json")
        report.plot(folder / "pruning" / "report.png")
    trainer.save_metrics("pruning", report.sizes())
    if trainer.is_world_process_zero():
        write_model_card(folder)  # again, with stages and sizes


def print_summary(trainer: ReZeroTrainer, report: PruningReport, unit: Unit) -> None:
    """What was removed, what it cost, and how to load the rest."""
    print(report)
    print(f"weight files: {report.bytes_before:,} -> {report.bytes_after:,} bytes")
    print(f"{unit.words}: " + ", ".join(f"{quality:.4f} {stage}" for stage, quality in report.stages().items()))
    print(f"load it with:\n{load_lines(trainer.model, trainer.args.output_dir)}")


def load_lines(model: PreTrainedModel, folder: str) -> str:
    """The Python that loads the pruned checkpoint."""
    needs_code = "import hf_rezero; " if hasattr(model.config, "auto_map") else ""
    return (
        f"{needs_code}from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})"
    )


if __name__ == "__main__":
    run_command(main)
