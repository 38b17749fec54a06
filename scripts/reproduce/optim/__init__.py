"""Claims about the optimizers."""
