"""Put identity layers into a trained checkpoint, ready to be trained on as a deeper one.

    hf-rezero grow outputs/mine outputs/deeper --num_layers 6
    hf-rezero grow outputs/mine outputs/deeper --after 0 3 5

The grown checkpoint computes what the first one did; `hf-rezero clm --model_name_or_path outputs/deeper` trains it.
"""

import argparse
from pathlib import Path

from transformers import (
    AutoTokenizer,
    set_seed,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .. import grow_
from ..rewrite.grow import INITS
from . import summary
from .entry import run_command
from .running import load_as_saved


def main(argv: list[str] | None = None) -> list[int]:
    """Grow and save; returns the indices of the new layers."""
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("model", help="checkpoint folder or Hub name")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--num_layers", type=int, help="layers to add, evenly spread over the depth")
    parser.add_argument("--after", type=int, nargs="+", help="instead: layers behind each of which one is added")
    parser.add_argument("--stack", help="name of the list of layers, where there are several")
    parser.add_argument(
        "--init", choices=INITS, default="random", help="weights of new layers: fresh, or their neighbour's"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the new weights")
    parser.add_argument("--trust_remote_code", action="store_true", help="run modelling code of the Hub repository")
    args = parser.parse_args(argv)
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        raise ValueError(f"{args.output_dir} is not empty: choose another, or remove it.")
    set_seed(args.seed)
    model = load_as_saved(args.model, args.trust_remote_code)
    before = sum(p.numel() for p in model.parameters())
    new = grow_(model, args.num_layers, after=args.after, stack=args.stack, init=args.init)
    model.save_pretrained(args.output_dir)
    for processor in (AutoTokenizer, AutoImageProcessor):
        try:
            processor.from_pretrained(args.model, trust_remote_code=args.trust_remote_code).save_pretrained(
                args.output_dir
            )
        except (OSError, ValueError):
            continue  # a text model has no image processor, and a model may be without either
    after = sum(p.numel() for p in model.parameters())
    print(f"new layers {', '.join(map(str, new))}; {before:,} -> {after:,} parameters; saved to {args.output_dir}")
    return new


if __name__ == "__main__":
    run_command(main)
