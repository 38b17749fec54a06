"""Claims about GradInit."""
