"""The fields of the config classes are the arguments of a run."""

from dataclasses import fields

import pytest
import torch
from support.training import make_trainer
from transformers import HfArgumentParser

from hf_rezero import GradInitConfig, PruningConfig, RAdam, ReZeroForCausalLM, ReZeroTrainingArguments
from hf_rezero.optim.registry import BASES, Base


def parse(*words):
    return HfArgumentParser(ReZeroTrainingArguments).parse_args_into_dataclasses(["--output_dir", "x", *words])[0]


@pytest.mark.parametrize(("config", "words"), [
    (PruningConfig(lambda_=1e-3), ["--prune_method", "l1", "--prune_lambda", "1e-3"]),
    (GradInitConfig(num_steps=3), ["--gradinit_steps", "3"]),
])  # fmt: skip
def test_the_arguments_have_the_defaults_of_the_config(config, words):
    assert type(config).from_arguments(parse(*words)) == config
    assert type(config).from_arguments(parse()) is None


def test_every_field_can_be_given():
    pruning = PruningConfig.from_arguments(parse(
        *"--prune_method l0 --prune_targets heads,neurons --prune_target_sparsity 0.5 --prune_lambda 0.1".split(),
        *"--prune_start_step 2 --prune_end_step 8 --prune_warmup_steps 3 --prune_mask_learning_rate 0.1".split(),
        *"--prune_beta 0.5 --prune_beta_end 0.2 --prune_log_alpha 1.0 --prune_penalty hard_sigmoid".split(),
        *"--prune_estimator threshold --prune_per_example true --prune_capture 0.3".split(),
        *"--prune_min_keep heads=1,neurons=8 --prune_round_to 8 --prune_sphere true --prune_alternate_steps 4".split(),
        *"--prune_hold_resweight false --prune_branch_lambda heads=2,*.0.*=0.5 --prune_cost params".split(),
    ))  # fmt: skip
    assert pruning == PruningConfig(
        "l0", ("heads", "neurons"), 0.5, 0.1, 2, 8, 3, 0.1, 0.5, 0.2, 1.0, "hard_sigmoid", "threshold", True, 0.3,
        {"heads": 1, "neurons": 8}, 8, True, 4, False, {"heads": 2, "*.0.*": 0.5}, "params",
    )  # fmt: skip
    untouched = PruningConfig(lambda_=1.0)
    assert not [f.name for f in fields(pruning) if getattr(pruning, f.name) == getattr(untouched, f.name)]
    gradinit = GradInitConfig.from_arguments(parse(
        *"--gradinit_steps 5 --gradinit_eta 0.1 --gradinit_algorithm sgd --gradinit_gamma 2 --gradinit_scale_lr 0.5".split(),
        *"--gradinit_min_scale 0.1 --gradinit_max_scale 3 --gradinit_scale_clip 2 --gradinit_second_order exact".split(),
        *"--gradinit_probe_resweight 0.3 --gradinit_save_steps 7".split(),
    ))  # fmt: skip
    assert gradinit == GradInitConfig(5, 0.1, "sgd", 2.0, 0.5, 0.1, 3.0, 2.0, "exact", 0.3, 7)


@pytest.mark.parametrize(("words", "message"), [
    (["--prune_min_keep", "heads"], "got 'heads': expected name=number"),
    (["--prune_branch_lambda", "heads=much"], "got 'heads=much': expected name=number"),
    (["--prune_cost", "flops"], "cost='flops': expected 'units', 'params'"),
])  # fmt: skip
def test_a_malformed_argument_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig.from_arguments(parse("--prune_method", "l1", "--prune_lambda", "1", *words))


def test_an_optimizer_from_outside_is_one_line_in_the_registry(make_config, arguments, monkeypatch):
    class Halved(RAdam):
        """RAdam at half the rate."""

        def __init__(self, params, lr=1e-3, **kwargs):
            super().__init__(params, lr=lr / 2, **kwargs)

    monkeypatch.setitem(BASES, "halved", Base(Halved, trial_step="adam"))
    args = arguments(optim="gc+halved", gradinit_steps=2, max_steps=2, lr_scheduler_type="constant")
    trainer = make_trainer(ReZeroForCausalLM(make_config()), args)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is Halved and trainer.gradinit_report.algorithm == "adam"
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(args.learning_rate / 2)
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))
