"""Claims about runs that things happen to."""
