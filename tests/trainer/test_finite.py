"""NaN and infinity in a run: no weight is lost to them, and nobody has to guess where they came from."""

import json
from pathlib import Path

import pytest
import torch
from support.training import make_trainer
from torch import nn
from transformers import TrainerCallback

from hf_rezero import GradInitConfig, PruningConfig, ReZeroForCausalLM
from hf_rezero.pruning import attach_masks, finalize_masks, find_groups, scores, select
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_scaler_leaves_the_bad_step_out(make_config, arguments, value):
    trainer = trained(make_config, arguments, {4}, value, optim="adamw_torch")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # what fp16 has on a GPU
    before = {}
    trainer.add_callback(Watch(before, trainer.model, {3, 4, 5}))
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before[3], before[4], strict=True)), "step 4 moved the weights"
    assert not any(torch.equal(a, b) for a, b in zip(before[4], before[5], strict=True)), "step 5 did not"
    assert trainer.skipped_steps == 1 and trainer.accelerator.scaler.get_scale() == 512
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", ["l1", "l0"])
def test_masks_live_through_a_bad_step(make_config, arguments, method, scaled):
    pruning = PruningConfig(method, target_sparsity=0.3, start_step=1, end_step=8)
    trainer = trained(make_config, arguments, {5}, pruning=pruning)
    if scaled:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    masks = {}

    class WatchMasks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if trainer.pruner.masks is not None:
                masks[state.global_step] = [p.detach().clone() for p in trainer.pruner.masks.parameters()]

    trainer.add_callback(WatchMasks())
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(masks[4], masks[5], strict=True)), "step 5 moved the masks"
    assert not all(torch.equal(a, b) for a, b in zip(masks[5], masks[6], strict=True))
    assert all(torch.isfinite(p).all() for step in masks.values() for p in step)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_remove_nothing(value):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].weight.data[2, 1] = value
    groups, batches = find_groups(net), [torch.rand(5, 4) + 0.1]

    def loss(model, batch):
        return model(batch).square().mean()

    for scored in (scores.magnitude(net, groups), scores.taylor(net, groups, batches, loss)):
        with pytest.raises(ValueError, match="expected finite values"):
            select(net, groups, scored, 0.5)


def spoiled_losses(trainer, calls):
    """Let some calls of `compute_loss`, counted from 0, give NaN."""
    honest, count = trainer.compute_loss, iter(range(10**6))

    def compute_loss(*args, **kwargs):
        loss = honest(*args, **kwargs)
        return loss * float("nan") if next(count) in calls else loss

    trainer.compute_loss = compute_loss


def test_gradinit_leaves_a_bad_batch_out(make_config, arguments, caplog):
    losses = []
    for bad in ((), (2,)):  # a step is two calls
        torch.manual_seed(0)
        trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(max_steps=1, gradinit_steps=5))
        spoiled_losses(trainer, bad)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.gradinit_report.history])
        assert all(0 < scale < 10 for scale in trainer.gradinit_report.scales.values())
    assert len(losses[0]) == len(losses[1]) == 5 and losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    assert "GradInit step 1: loss is nan" in caplog.text and "The batch is left out." in caplog.text


def test_gradinit_ends_after_bad_batches_in_a_row(make_config, arguments):
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(gradinit_steps=5, max_bad_steps=3))
    before = [p.clone() for p in trainer.model.parameters()]
    spoiled_losses(trainer, range(2, 100))
    with pytest.raises(
        NonFiniteError, match=r"3 batches in a row, the last in nonfinite_batch.pt: GradInit step 1: loss"
    ):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert torch.load(Path(trainer.args.output_dir, BATCH))["input_ids"].shape[1] == 16


def test_gradinit_resumes_behind_the_batches_that_it_left_out(make_config, arguments, tmp_path):
    def train(name, *, killed_at=None, bad=(), resume=None):
        torch.manual_seed(0)
        config = GradInitConfig(num_steps=6, save_steps=2)
        args = arguments(max_steps=1, output_dir=str(tmp_path / name))
        trainer = make_trainer(ReZeroForCausalLM(make_config()), args, gradinit=config)
        spoiled_losses(trainer, bad)
        if killed_at:
            spoiled = trainer.compute_loss
            calls = iter(range(10**6))

            def compute_loss(*args, **kwargs):
                if next(calls) == killed_at:
                    raise KeyboardInterrupt
                return spoiled(*args, **kwargs)

            trainer.compute_loss = compute_loss
        trainer.train(resume_from_checkpoint=resume)
        return trainer.gradinit_report.scales

    whole = train("whole", bad={2})
    with pytest.raises(KeyboardInterrupt):
        train("killed", bad={2}, killed_at=11)  # two calls a step and one of the bad batch: in the sixth step
    assert train("killed", resume=True) == whole


def read_strictly(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_an_evaluation_that_is_nan_is_said_in_valid_json(make_config, arguments, caplog):
    values = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "bpb"}
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(max_steps=4, **values, **best))
    nll, folder = trainer.prediction_step, Path(trainer.args.output_dir)

    def prediction_step(*args, **kwargs):
        loss, logits, labels = nll(*args, **kwargs)
        if trainer.state.global_step == 2:
            trainer._sums.nll = trainer._sums.loss = float("nan")
        return loss, logits, labels

    trainer.prediction_step = prediction_step
    trainer.train()
    # 2, of NaN, is not the best
    assert trainer.state.best_global_step == 4
    for path in folder.rglob("trainer_state.json"):
        read_strictly(path)
    evaluations = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert [entry.get("not_finite") for entry in evaluations] == [2, None]
    assert "eval_bpb" not in evaluations[0] and evaluations[1]["eval_bpb"] > 0
    trainer.save_metrics("eval", {"eval_bpb": float("nan"), "eval_loss": 2.5})
    assert "the metrics eval_bpb are not finite" in caplog.text
    expected = {"eval_bpb": None, "eval_loss": 2.5, "not_finite": ["eval_bpb"]}
    assert read_strictly(folder / "eval_results.json") == read_strictly(folder / "all_results.json") == expected
    trainer.create_model_card()
    trainer.save_metrics("test", {"test_bpb": 3.0})
    assert read_strictly(folder / "all_results.json") == {**expected, "test_bpb": 3.0}
    trainer.save_metrics("eval", {"eval_bpb": 2.0})
    assert read_strictly(folder / "all_results.json") == {"eval_bpb": 2.0, "eval_loss": 2.5, "test_bpb": 3.0}


@pytest.mark.parametrize("content", [b"", b"\xff", b"null", b"[]", b'{"eval_bpb": '])
def test_damaged_results_of_an_earlier_run_do_not_stop_the_metrics_of_this_one(
    make_config, arguments, content, caplog
):
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments())
    path = Path(trainer.args.output_dir, "all_results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    trainer.save_metrics("test", {"test_bpb": 3.0})
    assert read_strictly(path) == {"test_bpb": 3.0} and "all_results.json" in caplog.text
