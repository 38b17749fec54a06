"""Claims about pruning."""
