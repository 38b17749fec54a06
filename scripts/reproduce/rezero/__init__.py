"""Claims about residual weights."""
