"""The private methods of the Trainer of transformers that ours override, each with the signature that we wrote them for."""

import inspect

import pytest
import transformers
from transformers import Trainer

from hf_rezero import ReZeroTrainer


# checked with transformers 5.17, 5.23 and 5.24: a change upstream may have changed who calls them and what they must do
OVERRIDDEN = {
    "_clip_grad_norm": ["self", "model"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_set_signature_columns_if_needed": ["self"],
}


def test_no_other_private_method_is_overridden():
    ours = [c for c in ReZeroTrainer.__mro__ if c.__module__.startswith("hf_rezero")]
    private = {name for c in ours for name in vars(c) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(Trainer, name)} == OVERRIDDEN.keys()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_is_what_it_was(name):
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers {transformers.__version__} has no Trainer.{name}: who does its work now?"
    assert list(inspect.signature(method).parameters) == OVERRIDDEN[name], f"transformers {transformers.__version__}"
