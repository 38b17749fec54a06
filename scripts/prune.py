"""`hf-rezero prune` from a checkout, for python, torchrun and accelerate launch; see --help."""

from hf_rezero.commands.entry import run_command
from hf_rezero.commands.prune import main


if __name__ == "__main__":
    run_command(main)
