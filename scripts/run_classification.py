"""`hf-rezero classify-texts` from a checkout, for python, torchrun and accelerate launch; see --help."""

from hf_rezero.commands.classify_texts import main
from hf_rezero.commands.entry import run_command


if __name__ == "__main__":
    run_command(main)
