"""`hf-rezero classify-texts` from a checkout, for python, torchrun and accelerate launch; see --help."""

from hf_rezero.commands.classify_texts import main


if __name__ == "__main__":
    main()
