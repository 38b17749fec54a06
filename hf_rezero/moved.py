"""Modules under the names that they had before they moved into folders; importing one warns."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader


MOVED = {
    "cli": "commands.running",
    "convert": "rewrite",
    "dead_branches": "diagnostics",
    "fold": "rewrite",
    "gradinit": "initialization",
    "grow": "rewrite",
    "hub": "publish",
    "images": "data",
    "metainit": "initialization",
    "model_card": "publish",
    "run_record": "publish",
    "schedules": "optim.schedules",
    "tokenization": "data",
    "trainer_gradinit": "trainer",
    "trainer_pruning": "trainer",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return spec_from_loader(fullname, self) if package == __package__ and name in MOVED else None

    def exec_module(self, module) -> None:
        new = f"{__package__}.{MOVED[module.__name__.rpartition('.')[2]]}"
        warnings.warn(f"{module.__name__} has moved: import from {new}.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)


def find_moved_modules() -> None:
    """Let `import hf_rezero.hub` and its like find what they name."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
