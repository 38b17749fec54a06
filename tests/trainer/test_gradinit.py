"""GradInit in the Trainer: the same scales however it is reached, and no trace of it in the training that follows."""

import json
import math
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.launch import run_script
from support.training import TEXT, make_trainer, same, weights
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.training_args import OptimizerNames

from hf_rezero import GradInitConfig, ReZeroForCausalLM
from hf_rezero.data.windows import ByteDataset
from hf_rezero.initialization.gradinit import GradInit, gradinit_
from hf_rezero.optim.registry import BASES, TRIAL_STEPS_ELSEWHERE, parse_optimizer
from hf_rezero.trainer.finite import NonFiniteError
from hf_rezero.trainer.gradinit import run_gradinit, state_file


@pytest.fixture
def make_model(make_config):
    """Twins of one model with norms."""
    config = make_config(norm_position="pre", resweight_init=1.0, hidden_dropout=0.1)
    state = ReZeroForCausalLM(config).state_dict()

    def make():
        model = ReZeroForCausalLM(config)
        model.load_state_dict(state)
        return model

    return make


def test_it_scales_the_weights_before_training_and_reports(make_model, arguments):
    args = arguments(gradinit_steps=6, gradinit_gamma=30.0, max_steps=2)
    trainer = make_trainer(make_model(), args)
    trainer.train()
    report, folder = trainer.gradinit_report, Path(args.output_dir, "gradinit")
    assert len(report.history) == 6 and any(scale != 1 for scale in report.scales.values())
    assert json.loads((folder / "report.json").read_text())["scales"] == report.scales
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    first = trainer.state.log_history[0]
    assert (first["step"], first["gradinit_steps"]) == (1, 6)
    assert "gradinit_steps" not in trainer.state.log_history[1]
    trainer.create_model_card()
    assert "### GradInit" in Path(args.output_dir, "README.md").read_text()


def test_training_goes_on_as_it_does_from_weights_that_were_scaled_by_hand(make_model, arguments, tmp_path):
    trainer = make_trainer(make_model(), arguments(gradinit_steps=4, output_dir=str(tmp_path / "a")))
    torch.manual_seed(5)
    trainer.train()
    by_hand = make_model()
    with torch.no_grad():
        for name, p in by_hand.named_parameters():
            p.mul_(trainer.gradinit_report.scales.get(name, 1.0))
    other = make_trainer(by_hand, arguments(output_dir=str(tmp_path / "b")))
    torch.manual_seed(5)
    other.train()
    assert same(weights(trainer.model), weights(by_hand))


def random_states():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2:],
    )


class Unreadable(ByteDataset):
    def __getitem__(self, index):
        raise OSError("no such file")

    __getitems__ = __getitem__


@pytest.mark.parametrize("fails", [None, "loss", "data"])
def test_random_numbers_are_left_as_they_were(make_model, arguments, fails):
    data = {"train_dataset": Unreadable(TEXT, 16)} if fails == "data" else {}
    trainer = make_trainer(make_model(), arguments(gradinit_steps=2), **data)
    if fails == "loss":
        trainer.model.lm_head.weight.data.fill_(math.nan)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = random_states()
    with pytest.raises((NonFiniteError, OSError), match="loss is nan|no such file") if fails else nullcontext():
        run_gradinit(trainer, trainer.gradinit, resume=False)
    assert random_states() == states


def test_it_is_the_gradinit_of_the_plain_loop(make_model, arguments):
    trainer = make_trainer(make_model(), arguments(gradinit_steps=5, learning_rate=2e-3, max_steps=1))
    torch.manual_seed(trainer.args.seed)
    batches = [batch for _, batch in zip(range(6), trainer.get_train_dataloader(), strict=False)]
    trainer.train()
    report = gradinit_(make_model(), batches, eta=2e-3, num_steps=5)
    assert trainer.gradinit_report.scales == pytest.approx(report.scales, rel=1e-6)


@pytest.mark.parametrize(
    "name, algorithm",
    [("sgd", "sgd_normalized"), ("lookahead+sgd", "sgd_normalized"), ("larc", "lars"), ("gc+snoo+muon", "muon")],
)
def test_the_trial_step_is_that_of_the_optimizer(make_model, arguments, name, algorithm):
    trainer = make_trainer(make_model(), arguments(gradinit_steps=1, optim=name, max_steps=1, learning_rate=0.01))
    trainer.train()
    assert (trainer.gradinit_report.algorithm, trainer.gradinit_report.eta) == (algorithm, 0.01)
    config = GradInitConfig(num_steps=1, algorithm="lamb", eta=0.5)
    trainer = make_trainer(make_model(), arguments(optim=name, max_steps=1), gradinit=config)
    trainer.train()
    assert (trainer.gradinit_report.algorithm, trainer.gradinit_report.eta) == ("lamb", 0.5)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "lars", "lamb", "muon"])
def test_the_first_step_of_the_optimizer_goes_where_the_trial_step_went(make_model, arguments, name):
    args, seen = arguments(optim=name, lr_scheduler_type="constant"), []

    def loss_fn(model, batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return model(**batch).loss

    model, ids = make_model().eval(), torch.randint(0, 256, (4, 16))
    batch = {"input_ids": ids, "labels": ids}
    options = GradInitConfig(num_steps=1, gamma=1e9).options(args)
    GradInit(model, loss_fn=loss_fn, **options).step(batch, [batch])
    optimizer = make_trainer(model, args).create_optimizer()
    loss_fn(model, batch).backward()
    optimizer.step()
    for start, trial, p in zip(seen[0], seen[1], model.parameters(), strict=True):
        steps = [(weight - start).flatten() for weight in (trial, p.detach())]
        assert torch.cosine_similarity(*steps, 0) > 0.98  # the eps of LAMB is no trifle beside small gradients


def test_an_optimizer_without_a_trial_step_is_refused_before_training(make_model, arguments):
    names = {name.value for name in OptimizerNames}
    known = BASES.keys() | TRIAL_STEPS_ELSEWHERE.keys()
    assert TRIAL_STEPS_ELSEWHERE.keys() <= names and all(base.trial_step for base in BASES.values())
    for name in names - known:
        with pytest.raises(ValueError, match=f"the optimiser '{name}', for which GradInit has no trial step"):
            parse_optimizer(f"gc+lookahead+{name}").trial_step  # noqa: B018
    assert {
        "adafactor",
        "adagrad",
        "rmsprop",
        "lion_32bit",
        "galore_adamw",
        "schedule_free_adamw",
    } < names - known
    trainer = make_trainer(make_model(), arguments(optim="adafactor", gradinit_steps=2))
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=r"it has one for radam, .*, sgd\. .*GradInitConfig\(algorithm=\.\.\.\)"):
        trainer.train()
    assert same(weights(trainer.model), before)
    trainer.gradinit = GradInitConfig(num_steps=2, algorithm="adam")
    trainer.train()
    assert trainer.gradinit_report.algorithm == "adam"


def test_a_run_that_was_killed_inside_it_ends_with_the_same_weights(make_model, arguments, monkeypatch, tmp_path):
    config = GradInitConfig(num_steps=30, save_steps=8)  # 43 windows are 11 batches: into the third pass over the data
    whole = make_trainer(make_model(), arguments(output_dir=str(tmp_path / "whole")), gradinit=config)
    whole.train()

    step, killed_at = GradInit.step, 21

    def killed(self, *args):
        if len(self.history) == killed_at:
            raise KeyboardInterrupt
        step(self, *args)

    args = arguments(output_dir=str(tmp_path / "killed"), save_strategy="steps", save_steps=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GradInit, "step", killed)
        make_trainer(make_model(), args, gradinit=config).train()
    assert len(torch.load(state_file(args.output_dir))["gradinit"]["history"]) == 16
    random_weights = make_model()
    random_weights.lm_head.weight.data.normal_()
    with pytest.raises(ValueError, match="the weights are not those from which .*state.pt was learned"):
        make_trainer(random_weights, args, gradinit=config).train(resume_from_checkpoint=True)
    for changed, message in (
        ({"eta": 0.5}, r"state.pt was learned with eta=.*, now 0.5: give the arguments of the interrupted run"),
        ({"algorithm": "sgd"}, "algorithm=adam, now sgd"),
    ):
        other = make_trainer(make_model(), args, gradinit=replace(config, **changed))
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is of an interrupted GradInit, and this run has none"):
        make_trainer(make_model(), args).train(resume_from_checkpoint=True)
    resumed = make_trainer(make_model(), args, gradinit=config)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.gradinit_report.scales == whole.gradinit_report.scales
    assert same(weights(whole.model), weights(resumed.model))
    again = make_trainer(make_model(), args, gradinit=config)
    again.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-3")
    assert again.gradinit_report is None and same(weights(whole.model), weights(again.model))


def test_without_resumption_an_old_state_is_not_used(make_model, arguments):
    trainers = [make_trainer(make_model(), arguments(gradinit_steps=n, max_steps=1)) for n in (9, 4)]
    for trainer in trainers:
        trainer.train()
    assert [len(trainer.gradinit_report.history) for trainer in trainers] == [9, 4]


def test_the_gradient_norm_of_a_stock_model_falls_below_gamma(arguments):
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=16, n_embd=16, n_layer=4, n_head=2))
    trainer = make_trainer(model, arguments(learning_rate=3e-3), gradinit=GradInitConfig(60, scale_lr=0.05))
    trainer.train()
    history = trainer.gradinit_report.history
    assert history[0]["grad_norm"] > 1.2 * trainer.gradinit_report.gamma
    assert not all(entry["constrained"] for entry in history[-10:])


def test_two_processes_learn_the_scales_of_one(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.tobytes() * 4)
    options = ["--train_file", tmp_path / "text.txt", "--block_size", "32", "--max_steps", "3", "--use_cpu", "True"]
    options += ["--config_overrides", "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,norm_position=pre"]
    options += ["--gradinit_steps", "12", "--gradinit_probe_resweight", "0.5", "--do_train", "True"]
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        rows = ["--per_device_train_batch_size", batch, "--output_dir", folder]
        run_script("run_clm.py", *options, *rows, processes=processes)
    one, two = (json.loads((tmp_path / n / "gradinit" / "report.json").read_text()) for n in "12")
    assert max(abs(scale - 1) for scale in one["scales"].values()) > 0.05
    assert two["scales"] == pytest.approx(one["scales"], rel=1e-3)
    final = [load_file(tmp_path / n / "model.safetensors") for n in "12"]
    for name in final[0]:
        torch.testing.assert_close(final[0][name], final[1][name], rtol=1e-2, atol=1e-3)


def test_the_trial_step_of_an_optimizer_of_the_caller_must_be_named(make_model, arguments):
    model = make_model()
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(ValueError, match="got an optimizer, whose trial step GradInit cannot know"):
        make_trainer(model, arguments(gradinit_steps=2), optimizers=optimizers)
    trainer = make_trainer(model, arguments(), optimizers=optimizers, gradinit=GradInitConfig(2, algorithm="sgd"))
    trainer.train()
    assert trainer.gradinit_report.algorithm == "sgd"
