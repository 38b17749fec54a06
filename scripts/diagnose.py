"""`hf-rezero diagnose` from a checkout, for python, torchrun and accelerate launch; see --help."""

from hf_rezero.commands.diagnose import main


if __name__ == "__main__":
    main()
