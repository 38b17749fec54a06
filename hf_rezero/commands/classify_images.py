"""Train or evaluate a classifier of images.

    hf-rezero classify-images --dataset_name uoft-cs/cifar10 --image_column_name img \
        --output_dir outputs/cifar --do_train --do_eval --do_predict --random_crop_padding 4 --random_flip \
        --num_train_epochs 20 --per_device_train_batch_size 128 --learning_rate 0.1 --optim sgd --optim_args momentum=0.9
    hf-rezero classify-images --train_file mnist --model_type rezero_mlp --output_dir outputs/mnist \
        --do_train --do_eval --do_predict --config_overrides num_hidden_layers=32,hidden_size=128 --learning_rate 1e-3

Images are a `datasets` name, folders with one folder for each class, an .npz file, or a folder with MNIST's files. A
new model is a ReZero ResNet or, by `--model_type rezero_mlp`, fully connected; `--model_name_or_path` starts from what
this script left. Beside the checkpoint a finished run leaves an image processor, `all_results.json`, `training.png`
and `resweights.png`, and `--do_predict` leaves `predict_results.txt`, one `index<TAB>label` for every image.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .. import ReZeroTrainer, ReZeroTrainingArguments
from ..data.augmentation import Augmentation
from ..data.download import MAX_CORPUS_BYTES
from ..data.images import DecodedImages, ImageDataset, channel_statistics, collate_images, read_images
from ..data.tables import load_table
from ..models.image_processing_gray import GrayImageProcessorPil
from . import summary
from .entry import run_command
from .running import (
    ModelArguments,
    accuracy,
    check_output_dir,
    check_purpose,
    load_any_model,
    load_teacher_of,
    parse_arguments,
    predict_and_save,
    run_and_publish,
)


logger = logging.getLogger(__name__)

SPLIT_SEED = 0
KEPT_IN_MEMORY = 2**31  # bytes of a part up to which its images are decoded once, not in every epoch
NO_LABEL = (-1, None)  # what `datasets` has in place of the labels of hidden test sets


@dataclass
class ImageModelArguments(ModelArguments):
    """The model to train."""

    model_type: str = field(
        default="rezero_resnet",
        metadata={"help": "Architecture of a new model: rezero_resnet, rezero_mlp, resnet ..."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new classifier where a checkpoint has other classes."}
    )


@dataclass
class DataArguments:
    """The images, their labels, and what training does to them."""

    dataset_name: str | None = field(default=None, metadata={"help": "A `datasets` name or folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Default: cut from the training images."})
    test_dir: str | None = field(default=None, metadata={"help": "Images for --do_predict; classes are optional."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "An .npz of uint8 train_x [N, H, W(, C)], train_y, test_x, test_y, or a folder of MNIST's files."
        },
    )
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": f"Part of the training images cut off if there are no others for validation, by the fixed seed "
            f"{SPLIT_SEED}; 0: validate on the test images."
        },
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    image_size: int | None = field(
        default=None, metadata={"help": "Resize to this height and width; default: the model's, or the first image's."}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each channel; default: the checkpoint's, or the training images'."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Standard deviation, likewise."})
    random_crop_padding: int = field(default=0, metadata={"help": "Shift by up to so many pixels; usual: 4."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the images."})
    brightness: float = field(default=0.0, metadata={"help": "Random factor within 1 +- this."})
    contrast: float = field(default=0.0, metadata={"help": "Random factor within 1 +- this."})
    saturation: float = field(default=0.0, metadata={"help": "Random factor within 1 +- this."})
    random_rotation: float = field(default=0.0, metadata={"help": "Rotate by up to so many degrees."})
    max_corpus_bytes: int = field(
        default=MAX_CORPUS_BYTES, metadata={"help": "Refuse a --train_file whose images need more memory."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use the first so many test images."})


class Part(NamedTuple):
    """The images of a part, as uint8 [N, H, W, C] or a table of files, and the names of their classes, if known."""

    images: np.ndarray | Dataset
    labels: np.ndarray | None

    def select(self, rows: np.ndarray) -> "Part":
        images = self.images.select(rows) if isinstance(self.images, Dataset) else self.images[rows]
        return Part(images, None if self.labels is None else self.labels[rows])


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (ImageModelArguments, DataArguments, ReZeroTrainingArguments), summary(__doc__), argv
    )
    check_purpose(training_args, model_args)
    checkpoint = check_output_dir(training_args)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="reading the images"):
        parts, names = load_parts(data_args, model_args)
        parts = shortened_parts(
            needed_parts(training_args, cut_validation(parts, data_args.train_val_split)), data_args
        )
        classes = class_names(parts, names, model_args)
        model = make_model(model_args, data_args, parts, classes)
        processor = make_processor(model_args, data_args, model, parts)
        datasets = make_datasets(parts, classes, processor, data_args, training_args)
    trainer = ReZeroTrainer(
        model,
        training_args,
        data_collator=collate_images,
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("validation"),
        processing_class=processor,
        compute_metrics=accuracy,
        distillation=load_teacher_of(model, model_args, training_args),
    )
    return run_and_publish(
        trainer,
        checkpoint,
        predict=lambda: predict_and_save(
            trainer,
            datasets["test"],
            lambda logits: [classes[i] for i in logits.argmax(-1)],
            has_labels=datasets["test"].labels is not None,
        ),
        tasks="image-classification",
        dataset=data_args.dataset_name or data_args.train_dir or data_args.train_file,
    )


def load_parts(args: DataArguments, model_args: ModelArguments) -> tuple[dict[str, Part], list[str] | None]:
    """Train, validation and test, as far as there are any, and the names of the classes, where the data has an order."""
    folders = {"train": args.train_dir, "validation": args.validation_dir, "test": args.test_dir}
    folders = {part: folder for part, folder in folders.items() if folder}
    if sum(map(bool, (args.dataset_name, args.train_file, folders))) != 1:
        raise ValueError("give exactly one of --dataset_name, --train_file, and folders such as --train_dir.")
    if args.train_file:
        arrays = read_images(args.train_file, args.max_corpus_bytes)
        return {part: Part(images, labels.astype(str)) for part, (images, labels) in arrays.items()}, None
    if folders:
        tables = {part: read_folder(folder, model_args.cache_dir) for part, folder in folders.items()}
    else:
        options: dict[str, Any] = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        tables = dict(load_table(str(args.dataset_name), args.dataset_config_name, **options))
    parts = {part: read_table(tables[part], part, args) for part in ("train", "validation", "test") if part in tables}
    if not parts:
        raise ValueError(
            f"{args.dataset_name} has the parts {', '.join(tables)}: train, validation or test is needed."
        )
    feature = next(iter(tables.values())).features.get(args.label_column_name)
    return parts, feature.names if isinstance(feature, ClassLabel) else None


def read_folder(folder: str, cache_dir: str | None) -> Dataset:
    """The images below a folder."""
    path = Path(folder)
    if not path.is_dir() or not any(file.suffix.lower() in Image.registered_extensions() for file in path.rglob("*")):
        raise ValueError(f"{folder} {'holds no images' if path.is_dir() else 'is not a folder'}: name one that does.")
    return load_table("imagefolder", data_files={"train": str(path / "**")}, split="train", cache_dir=cache_dir)


def read_table(table: Dataset, part: str, args: DataArguments) -> Part:
    """The images of a table and the names of their classes."""
    image, label = args.image_column_name, args.label_column_name
    for option, column in (("image", image), ("label", label)):
        if column not in table.column_names and (part, option) != ("test", "label"):
            raise ValueError(
                f"the {part} part has no column {column!r}, only {', '.join(table.column_names)}: "
                f"name the right one with --{option}_column_name."
            )
    if not isinstance(table.features[image], ImageFeature):
        raise ValueError(f"column {image!r} of the {part} part holds no images but {table.features[image]}.")
    if label not in table.column_names:
        return Part(table, None)
    values, feature = table.select_columns([label])[:][label], table.features[label]
    if any(value in NO_LABEL for value in values):
        if part == "test":
            return Part(table, None)
        raise ValueError(f"some images of the {part} part have no label in column {label!r}: remove or label them.")
    names = feature.int2str(values) if isinstance(feature, ClassLabel) else values
    return Part(table, np.array([str(name) for name in names]))


def cut_validation(parts: dict[str, Part], share: float) -> dict[str, Part]:
    """Cut a validation part from the training images if there is none, the same for every `--seed`."""
    if "validation" in parts or "train" not in parts:
        return parts
    if not 0 <= share < 1:
        raise ValueError(f"got train_val_split={share}: expected a share of 0 ... 1 of the training images.")
    if share == 0:
        return {**parts, "validation": parts["test"]} if "test" in parts else parts
    train = parts["train"]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train.images))
    cut = max(1, round(share * len(order)))
    return {**parts, "train": train.select(np.sort(order[cut:])), "validation": train.select(np.sort(order[:cut]))}


def needed_parts(args: ReZeroTrainingArguments, parts: dict[str, Part]) -> dict[str, Part]:
    """The parts that the run needs; that of training also where it only has the names of the classes."""
    evaluates = args.do_eval or args.eval_strategy != "no"
    needs = {"train": args.do_train, "validation": evaluates, "test": args.do_predict}
    for part, needed in needs.items():
        if needed and part not in parts:
            raise ValueError(f"there are no images for {part}, only for {', '.join(parts)}: give --{part}_dir.")
    return {part: parts[part] for part, needed in needs.items() if needed or (part == "train" and part in parts)}


def shortened_parts(parts: dict[str, Part], args: DataArguments) -> dict[str, Part]:
    """The parts, cut to as many images as are asked for.

    Of a part that is sorted by class, as folders are, the first images would be of one class: training images are
    drawn, by the fixed seed.
    """
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    for name, part in parts.items():
        limit = limits[name]
        if limit is not None and limit < len(part.images):
            order = np.random.default_rng(SPLIT_SEED).permutation(len(part.images))[:limit]
            parts[name] = part.select(np.arange(limit) if name == "test" else np.sort(order))
    return parts


def class_names(parts: dict[str, Part], names: list[str] | None, args: ModelArguments) -> list[str]:
    """The classes in the order of their ids: the checkpoint's if it knows them all, the data's, or sorted."""
    labels = parts["train"].labels if "train" in parts else None
    present = set() if labels is None else set(labels.tolist())
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **hub_options(args))
        known = [name for _, name in sorted((config.id2label or {}).items())]
        if present <= set(known):
            return known
    if not present:
        raise ValueError("there are no training images to tell the classes: give them, or --model_name_or_path.")
    if names is None:
        numbers = all(name.lstrip("-").isdecimal() for name in present)
        names = sorted(present, key=int if numbers else str)
    if len(names) < 2:
        raise ValueError(f"the training images are all of the class {names[0]!r}: two are needed to tell apart.")
    return names


def hub_options(args: ModelArguments) -> dict[str, Any]:
    """What loading from the Hub needs."""
    names = ("cache_dir", "token", "trust_remote_code")
    return {"revision": args.model_revision, **{name: getattr(args, name) for name in names}}


def make_model(
    args: ImageModelArguments, data_args: DataArguments, parts: dict[str, Part], classes: list[str]
) -> PreTrainedModel:
    """Load the checkpoint, or make a new model for images such as the first one."""
    height, width, channels = first_shape(next(iter(parts.values())).images, data_args.image_column_name)
    shape = {"num_channels": channels}
    if args.model_type in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[args.model_type](), "image_size"):
        shape["image_size"] = data_args.image_size or height
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    options = {"ignore_mismatched_sizes": args.ignore_mismatched_sizes}
    return load_any_model(args, AutoModelForImageClassification, shape, load_options=options, **names)


def first_shape(images: np.ndarray | Dataset, column: str) -> tuple[int, int, int]:
    """Height, width and channels of the first image."""
    if isinstance(images, np.ndarray):
        return images.shape[1:]
    first = images[0][column]
    return first.height, first.width, 1 if first.mode in ("1", "L", "LA") else 3


def make_processor(
    args: ModelArguments, data_args: DataArguments, model: PreTrainedModel, parts: dict[str, Part]
) -> ViTImageProcessorPil:
    """What turns an image into `pixel_values` where the model is used: as it was evaluated."""
    saved = saved_processor(args)
    size = image_size(data_args, model, parts, saved)
    mean, std = data_args.image_mean, data_args.image_std
    if (mean is None) != (std is None):
        raise ValueError("--image_mean and --image_std belong together: give both or none.")
    if mean is None and saved is not None:
        mean, std = saved.image_mean, saved.image_std
    if mean is None:
        pixels = as_pixels(next(iter(parts.values())).images, size, model.config.num_channels, data_args)
        mean, std = channel_statistics(pixels, max_images=100_000 if isinstance(pixels, np.ndarray) else 2_000)
    cls = GrayImageProcessorPil if model.config.num_channels == 1 else ViTImageProcessorPil
    rgb = {"do_convert_rgb": True} if model.config.num_channels == 3 else {}
    return cls(size={"height": size[0], "width": size[1]}, image_mean=mean, image_std=std, **rgb)


def saved_processor(args: ModelArguments):
    """The image processor of the checkpoint, or None."""
    if not args.model_name_or_path:
        return None
    try:
        return AutoImageProcessor.from_pretrained(args.model_name_or_path, **hub_options(args))
    except (OSError, ValueError):
        logger.warning("%s has no image processor: mean and std are those of the images.", args.model_name_or_path)
        return None


def image_size(args: DataArguments, model: PreTrainedModel, parts: dict[str, Part], saved) -> tuple[int, int]:
    """Height and width that the model gets; arrays keep theirs."""
    images = next(iter(parts.values())).images
    height, width, _ = first_shape(images, args.image_column_name)
    if isinstance(images, np.ndarray):
        if args.image_size not in (None, height) or args.image_size not in (None, width):
            raise ValueError(f"got --image_size {args.image_size} for arrays of {height} x {width}: leave it out.")
        return height, width
    if args.image_size:
        return args.image_size, args.image_size
    if getattr(model.config, "image_size", None):
        return model.config.image_size, model.config.image_size
    size = getattr(saved, "size", None)
    return (size["height"], size["width"]) if size and size.get("height") else (height, width)


def as_pixels(
    images: np.ndarray | Dataset, size: tuple[int, int], channels: int, args: DataArguments
) -> np.ndarray | DecodedImages:
    """Images as arrays, or as what makes arrays of files when asked."""
    if isinstance(images, Dataset):
        return DecodedImages(images, args.image_column_name, size, channels)
    if images.shape[-1] != channels:
        raise ValueError(f"the images have {images.shape[-1]} channels and the model num_channels={channels}.")
    return images


def make_datasets(
    parts: dict[str, Part],
    classes: list[str],
    processor: ViTImageProcessorPil,
    args: DataArguments,
    training_args: ReZeroTrainingArguments,
) -> dict[str, ImageDataset]:
    """Batches of each part, with the ids of the labels; augmented for training."""
    mean, std, size = processor.image_mean, processor.image_std, (processor.size["height"], processor.size["width"])
    augmentation = Augmentation(
        crop_padding=args.random_crop_padding,
        flip=args.random_flip,
        brightness=args.brightness,
        contrast=args.contrast,
        saturation=args.saturation,
        rotation=args.random_rotation,
    )
    datasets = {}
    for name, part in parts.items():
        if name == "train" and not training_args.do_train:
            continue
        pixels = as_pixels(part.images, size, len(mean), args)
        if isinstance(pixels, DecodedImages) and np.prod(pixels.shape) <= KEPT_IN_MEMORY:
            pixels = pixels[:]
        changes = augmentation if name == "train" and augmentation != Augmentation() else None
        labels = None if part.labels is None else label_ids(part.labels, classes, name)
        datasets[name] = ImageDataset(pixels, labels, mean, std, changes, seed=training_args.seed)
    return datasets


def label_ids(labels: np.ndarray, classes: list[str], part: str) -> np.ndarray:
    """The ids of named labels."""
    names, inverse = np.unique(labels, return_inverse=True)
    unknown = set(names.tolist()) - set(classes)
    if unknown:
        raise ValueError(
            f"the {part} part has the classes {', '.join(sorted(unknown))}, which the model does not know: "
            f"those are {', '.join(classes)}."
        )
    return np.array([classes.index(name) for name in names])[inverse]


if __name__ == "__main__":
    run_command(main)
