"""Records of runs, their model cards, and pushing to the Hub."""

from .card import write_model_card
from .metadata import check_metadata
from .push import PushError, files_to_push, push_folder
from .record import record_run


__all__ = ["PushError", "check_metadata", "files_to_push", "push_folder", "record_run", "write_model_card"]
