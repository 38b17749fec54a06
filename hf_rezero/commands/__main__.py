"""`hf-rezero COMMAND ...`: the commands by name.

For several processes each is a module of its own: `torchrun --nproc_per_node 2 -m hf_rezero.commands.clm ...`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from .entry import run_command


COMMANDS = {
    "clm": "train or evaluate a causal language model",
    "mlm": "train or evaluate a masked language model",
    "classify-texts": "train or evaluate a classifier of texts",
    "classify-tokens": "train or evaluate a model that tags the words of a text",
    "classify-images": "train or evaluate a classifier of images",
    "tokenizer": "train a byte-level BPE tokenizer on a text",
    "prune": "make a trained language model smaller",
    "grow": "put new layers into a trained model",
    "diagnose": "draw the Jacobian, the gradients and the residual weights of a model",
    "generate": "continue a prompt",
    "push": "publish the folder of a run on the Hub",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names with the arguments behind it."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name not in COMMANDS:
        sys.exit(f"hf-rezero got {name!r}: expected one of {', '.join(COMMANDS)}.")
    sys.argv[:] = [f"hf-rezero {name}", *arguments]  # the name in the usage, and in the record of the run
    run_command(import_module(f".{name.replace('-', '_')}", __package__).main)


def overview() -> str:
    """The commands with what they do, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    more = "hf-rezero COMMAND --help says more; --debug shows where an error came from."
    return "\n".join(["usage: hf-rezero COMMAND [arguments]", "", *lines, "", more])


if __name__ == "__main__":
    main()
