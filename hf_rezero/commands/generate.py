"""Load a checkpoint with AutoModelForCausalLM and continue a prompt.

hf-rezero generate outputs/quickstart --prompt "def "
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_rezero  # noqa: F401  registers the model with the Auto classes

from . import summary
from .entry import run_command


def main(argv: list[str] | None = None) -> str:
    """Print the prompt and what the model makes of it."""
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("model", help="checkpoint folder or Hub name")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest byte")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, **sampling)
    text = tokenizer.decode(output[0])
    print(text)
    return text


if __name__ == "__main__":
    run_command(main)
