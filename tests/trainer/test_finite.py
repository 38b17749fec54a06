"""NaN and infinity in a run: no weight is lost to them, and nobody has to guess where they came from."""

import json
from pathlib import Path

import pytest
import torch
from support.training import make_trainer
from torch import nn
from transformers import TrainerCallback

from hf_rezero import PruningConfig, ReZeroForCausalLM
from hf_rezero.pruning import attach_masks, finalize_masks, find_groups
from hf_rezero.trainer.finite import BATCH, NonFiniteError


class Poison(TrainerCallback):
    """Gives the gradients of some steps an entry that is not finite."""

    def __init__(self, model, steps, value=float("nan")):
        self.model, self.steps, self.value, self.step = model, set(steps), value, 0
        self.weight = next(p for name, p in model.named_parameters() if name.endswith("down_proj.weight"))
        self.weight.register_hook(self.poisoned)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def poisoned(self, gradient):
        return gradient.index_fill(0, torch.tensor([0]), self.value) if self.step in self.steps else gradient


def trained(make_config, arguments, steps, value=float("nan"), pruning=None, **values):
    model = ReZeroForCausalLM(make_config())
    trainer = make_trainer(model, arguments(**{"max_steps": 12, **values}), pruning=pruning)
    trainer.add_callback(Poison(model, steps, value))
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "ranger", "lookahead+muon", "sgd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_left_out_and_counted(make_config, arguments, optim, value):
    trainer = trained(make_config, arguments, {4}, value, optim=optim, bf16=optim == "ranger")
    before = {}
    trainer.add_callback(Watch(before, trainer.model, {3, 4}))
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before[3], before[4], strict=True)), "step 4 moved the weights"
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "skipped_steps" not in log[2] and log[-1]["skipped_steps"] == 1
    assert log[-1]["loss"] < log[0]["loss"]


class Watch(TrainerCallback):
    """Copies the weights after some steps."""

    def __init__(self, into, model, steps):
        self.into, self.model, self.steps = into, model, steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.into[state.global_step] = [p.detach().clone() for p in self.model.parameters()]


def test_masks_live_through_a_bad_step(make_config, arguments):
    pruning = PruningConfig("l1", target_sparsity=0.3, start_step=1, end_step=8)
    trainer = trained(make_config, arguments, {5}, pruning=pruning)
    trainer.train()
    assert trainer.pruning_report.parameters_after < trainer.pruning_report.parameters_before
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_bad_steps_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(make_config, arguments):
    values = {"max_bad_steps": 3, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    trainer = trained(make_config, arguments, {2, 6, 7, 8}, **values)
    with pytest.raises(
        NonFiniteError,
        match=r"of 3 steps in a row are not finite, up to step 8, first of model.layers.0.mlp.down_proj.weight:",
    ):
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert torch.load(folder / BATCH)["input_ids"].shape[1] == 16
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    again = ReZeroForCausalLM.from_pretrained(folder / "checkpoint-4")
    assert all(torch.isfinite(p).all() for p in again.parameters())
    json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(), parse_constant=pytest.fail)


def test_weights_that_are_not_finite_are_never_saved(make_config, arguments):
    trainer = trained(make_config, arguments, set(), save_strategy="steps", save_steps=3, save_total_limit=1)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                model.lm_head.weight.data[0, 0] = float("inf")

    trainer.add_callback(Spoil())
    with pytest.raises(NonFiniteError, match=r"checkpoint-6 was not written: .* first lm_head.weight"):
        trainer.train()
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]
    with pytest.raises(NonFiniteError, match="was not written"):
        trainer.save_model()


def test_masks_that_are_not_finite_remove_nothing():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = attach_masks(net, find_groups(net), "l1")
    masks.layer.mask.data[2] = float("nan")
    with pytest.raises(ValueError, match="masks hold values that are not finite"):
        finalize_masks(masks)
