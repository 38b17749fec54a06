"""What `hf-rezero COMMAND` runs; each file is one command."""
