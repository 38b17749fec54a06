"""Draw what a checkpoint tells about its depth: the spectrum of its Jacobian, its gradients, its residual weights.

    hf-rezero diagnose outputs/mine --output_dir outputs/mine/diagnostics
    hf-rezero diagnose openai-community/gpt2 --output_dir outputs/gpt2 --train_file text.xz --length 2
    hf-rezero diagnose outputs/cifar --output_dir outputs/cifar/diagnostics --train_file cifar10.npz

Reads language models, classifiers of texts and tokens, and classifiers of images. The Jacobian goes from the token
embeddings to the last hidden state, or from the pixels to the logits. Leaves `spectrum.png`, `gradients.png`,
`resweights.png` where there are residual weights, and `diagnostics.json`.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .. import load_corpus
from ..data.units import tokens_are_bytes
from ..diagnostics.gradients import gradient_profile
from ..diagnostics.jacobian import jacobian_bounds, jacobian_moments, jacobian_spectrum
from ..diagnostics.resweights import resweight_profile
from ..files import write_json
from ..plots import plot_gradients, plot_jacobian, plot_resweights
from . import summary
from .entry import run_command
from .running import load_as_saved


BYTES = 1_000_000  # of the text are read
MASK = 261  # of the byte tokenizer


def main(argv: list[str] | None = None) -> dict:
    """Measure, draw and save; returns what is in `diagnostics.json`."""
    args = parse(argv)
    set_seed(args.seed)
    model = load_as_saved(args.model, args.trust_remote_code).to(args.device).eval()
    is_image = type(model).__name__.endswith("ForImageClassification")
    example, batches, inputs = (image_data if is_image else text_data)(model, args)
    name, architecture = Path(args.model).name, type(model).__name__
    found: dict = {"checkpoint": name, "architecture": architecture, "inputs": inputs}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tqdm(total=args.examples + len(batches), desc="Jacobian", disable=args.disable_tqdm) as bar:
        found["jacobian"] = measure_jacobian(model, example, inputs["size"], args, bar)
        bar.set_description("gradients")
        profile = gradient_profile(model, batches, loss_fn=lambda m, batch: (m(**batch).loss, bar.update())[0])
    found["gradients"] = {part: statistics._asdict() for part, statistics in profile.items()}
    found["resweights"] = resweight_profile(model)
    write_json(args.output_dir / "diagnostics.json", found)
    plot_gradients(profile, args.output_dir / "gradients.png")
    if "singular_values" in found["jacobian"]:
        values = [value for row in found["jacobian"]["singular_values"] for value in row]
        plot_jacobian({name: {architecture: values}}, args.output_dir / "spectrum.png")
    if found["resweights"]:
        plot_resweights(found["resweights"], args.output_dir / "resweights.png")
    print_summary(found, args.output_dir)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("model", help="checkpoint folder or Hub name")
    parser.add_argument("--output_dir", type=Path, required=True, help="earlier results in it are replaced")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--text", help="the text itself")
    data.add_argument(
        "--train_file",
        help="a text (.xz .gz .bz2 .zip too), or for images an .npz of uint8 train_x [N, H, W(, C)] and train_y; "
        "default: python-stdlib, and for images noise with random labels",
    )
    parser.add_argument("--examples", type=int, default=4, help="inputs at which the Jacobian is taken")
    parser.add_argument("--length", type=int, help="tokens of each; default: what --max_size allows, 2 to 64")
    parser.add_argument(
        "--max_size", type=int, default=1024, help="above so many singular values only moments and bounds are computed"
    )
    parser.add_argument("--batches", type=int, default=4, help="for the gradients and their variance")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128, help="tokens of an input for the gradients")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=42, help="of masks, noise and random labels")
    parser.add_argument("--disable_tqdm", action="store_true", help="no progress bar")
    parser.add_argument("--trust_remote_code", action="store_true", help="run modelling code of the Hub repository")
    args = parser.parse_args(argv)
    for name in ("examples", "length", "max_size", "batches", "batch_size", "block_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"got --{name} {value}: expected at least 1.")
    return args


def measure_jacobian(model, batch: dict, size: int, args: argparse.Namespace, bar: tqdm) -> dict:
    """All singular values of each example, or moments and bounds where there are too many of them."""
    rows = []
    for i in range(args.examples):
        example = {key: value[i : i + 1] for key, value in batch.items()}
        if size <= args.max_size:
            rows.append(jacobian_spectrum(model, example))
        else:
            moments, bounds = jacobian_moments(model, example), jacobian_bounds(model, example)
            rows.append(torch.cat((*moments, *bounds))[None])
        bar.update()
    found = torch.cat(rows).cpu()
    if size > args.max_size:
        names = ("mean_square", "mean_square_standard_error", "largest_at_least", "largest_residual")
        names += ("smallest_at_most", "smallest_residual")
        return dict(zip(names, found.T.tolist(), strict=True))
    at_zero = found <= torch.finfo(torch.float64).eps * found[:, :1]
    return {
        "mean": found.mean().item(),
        "mean_square": found.square().mean().item(),
        "min": found.min().item(),
        "max": found.max().item(),
        "share_at_zero": at_zero.double().mean().item(),
        "singular_values": found.tolist(),
    }


def text_data(model, args: argparse.Namespace) -> tuple[dict, list[dict], dict]:
    """A batch for the Jacobian, batches with labels, and what they are."""
    ids, mask = read_ids(model, args)
    width = model.get_input_embeddings().embedding_dim
    limit = min(getattr(model.config, "max_position_embeddings", None) or math.inf, len(ids))
    length = args.length or max(2, min(64, args.max_size // width, limit))
    block = min(args.block_size, limit)
    if length > limit:
        raise ValueError(
            f"got --length {length}: the text has {len(ids)} tokens, and the model reads {limit} of them."
        )
    example = {"input_ids": windows(ids, args.examples, length).to(args.device)}
    blocks = windows(ids, args.batches * args.batch_size, block)
    batches, labels = [], ""
    for rows in blocks.split(args.batch_size):
        inputs, targets, labels = label(type(model).__name__, rows, mask, model.config)
        batches.append({"input_ids": inputs.to(args.device), "labels": targets.to(args.device)})
    source = "text" if args.text is not None else Path(args.train_file or "python-stdlib").name
    return example, batches, {"source": source, "length": length, "size": length * width, "labels": labels}


def read_ids(model, args: argparse.Namespace) -> tuple[torch.Tensor, int | None]:
    """The beginning of the text in the tokens of the model, and its mask token."""
    if args.text is not None:
        data = args.text.encode()
    else:
        data = bytes(load_corpus(args.train_file or "python-stdlib", split=(1, 0, 0)).train[:BYTES])
    tokenizer = load_tokenizer(args)
    if tokenizer is not None:
        ids = tokenizer(data.decode(errors="replace"), verbose=False, add_special_tokens=False).input_ids
        mask = tokenizer.mask_token_id
    elif tokens_are_bytes(vocab_size=model.config.vocab_size):
        ids, mask = list(data), MASK
    else:
        raise ValueError(
            f"{args.model} has no tokenizer, and vocab_size={model.config.vocab_size} is not that of a byte model: "
            "save its tokenizer beside it."
        )
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: expected at least 2.")
    return torch.tensor(ids), mask


def load_tokenizer(args: argparse.Namespace):
    """The tokenizer beside the checkpoint, or None."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError):
        return None
    # some classes, such as GPT-2's, come without vocabulary where there is no file
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def windows(ids: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Evenly spaced windows, which overlap where the text is short."""
    starts = [i * (len(ids) - length) // max(count - 1, 1) for i in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def label(architecture: str, ids: torch.Tensor, mask: int | None, config) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Inputs, labels for the loss that the model was made for, and what they are in words."""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return ids, ids, "the next token"
    if architecture.endswith("ForMaskedLM"):
        if mask is None:
            raise ValueError(f"the tokenizer has no mask token, which a {architecture} needs.")
        hidden = torch.rand(ids.shape) < 0.15
        hidden[:, 0] = True  # at least one
        return ids.masked_fill(hidden, mask), ids.masked_fill(~hidden, -100), "15 % masked tokens"
    shape = ids.shape if architecture.endswith("ForTokenClassification") else ids.shape[:1]
    return ids, torch.randint(0, config.num_labels, shape), "random"


def image_data(model, args: argparse.Namespace) -> tuple[dict, list[dict], dict]:
    """As `text_data`, from pictures of a file or of noise."""
    if args.text is not None:
        raise ValueError(f"got --text for a {type(model).__name__}: pass pictures as --train_file, or nothing.")
    count = max(args.examples, args.batches * args.batch_size)
    if args.train_file is None:
        size = getattr(model.config, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(count, getattr(model.config, "num_channels", 3), height, width)
        labels, source, kind = torch.randint(0, model.config.num_labels, (count,)), "noise", "random"
    else:
        pixels, labels = read_images(args, count)
        source, kind = Path(args.train_file).name, "classes"
        if labels.max() >= model.config.num_labels:
            raise ValueError(f"{source} has the label {labels.max()}, the model {model.config.num_labels} classes.")
    pixels, labels = pixels.to(args.device), labels.to(args.device)
    batches = [
        {"pixel_values": x, "labels": y}
        for x, y in zip(pixels.split(args.batch_size), labels.split(args.batch_size), strict=True)
    ][: args.batches]
    size = min(model.config.num_labels, pixels[0].numel())
    inputs = {"source": source, "shape": list(pixels.shape[1:]), "size": size, "labels": kind}
    return {"pixel_values": pixels[: args.examples]}, batches, inputs


def read_images(args: argparse.Namespace, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pictures as the checkpoint's image processor makes them, or (x / 255 - 0.5) / 0.25."""
    with np.load(args.train_file) as file:
        if not {"train_x", "train_y"} <= set(file):
            raise ValueError(f"{args.train_file} holds {', '.join(file)}: expected train_x and train_y.")
        images, labels = file["train_x"][:count], torch.from_numpy(file["train_y"][:count]).long()
    if len(images) < count:
        raise ValueError(f"{args.train_file} holds {len(images)} pictures, {count} are needed: ask for fewer batches.")
    try:
        processor = AutoImageProcessor.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError):
        pixels = torch.from_numpy(images).float().div(255).sub(0.5).div(0.25)
        return (pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)), labels
    return processor(list(images), return_tensors="pt")["pixel_values"], labels


def print_summary(found: dict, folder: Path) -> None:
    """The figures in a few lines."""
    jacobian, norms = found["jacobian"], [statistics["norm"] for statistics in found["gradients"].values()]
    if "singular_values" in jacobian:
        print(
            f"singular values: mean {jacobian['mean']:.3g}, mean square {jacobian['mean_square']:.3g}, "
            f"{jacobian['min']:.2g} to {jacobian['max']:.3g}, {jacobian['share_at_zero']:.1%} at zero"
        )
    else:
        print(
            f"{found['inputs']['size']} singular values, more than --max_size: mean square "
            f"{np.mean(jacobian['mean_square']):.3g}, the largest at least {max(jacobian['largest_at_least']):.3g}, the "
            f"smallest at most {min(jacobian['smallest_at_most']):.2g}; no spectrum.png, shorten --length for one"
        )
    print(f"gradient norms of {len(norms)} parts: {min(norms):.2g} to {max(norms):.2g}")
    if found["resweights"]:
        values = [abs(value) for value in found["resweights"].values()]
        print(f"{len(values)} residual weights: {np.mean(values):.3g} on average, without their signs")
    print(f"saved to {folder}")


if __name__ == "__main__":
    run_command(main)
