"""Pruning in the Trainer: masks that the loss never sees, a smaller model half-way, and the same end after a kill."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launch import SCRIPTS, run_script
from support.training import TEXT, make_trainer, same, weights
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_rezero import PruningConfig, ReZeroForCausalLM, ReZeroTrainingArguments
from hf_rezero.commands.running import parse_arguments
from hf_rezero.pruning import find_groups
from hf_rezero.pruning.select import Sizes, openness_of
from hf_rezero.trainer.pruning import _follow


@pytest.fixture
def make_model(make_config):
    """Twins of one model."""
    config = make_config(hidden_dropout=0.1)
    state = ReZeroForCausalLM(config).state_dict()

    def make():
        model = ReZeroForCausalLM(make_config(hidden_dropout=0.1))
        model.load_state_dict(state)
        return model

    return make


def pruning(**values):
    return PruningConfig(**{"target_sparsity": 0.3, "start_step": 3, "end_step": 9, "warmup_steps": 2, **values})


class Watch(TrainerCallback):
    """Calls `look(trainer)` at an event, after the other callbacks."""

    def __init__(self, trainer, event, look):
        def call(*args, **kwargs):
            look(trainer)

        setattr(self, event, call)


def watch(trainer, event, look):
    trainer.add_callback(Watch(trainer, event, look))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", ["l1", "l0"])
def test_the_gradient_of_the_penalty_comes_once_for_each_step(make_model, arguments, accumulation, method):
    config = pruning(method=method, target_sparsity=None, lambda_=0.5, start_step=0, end_step=4, warmup_steps=2)
    args = arguments(gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation)
    trainer = make_trainer(make_model(), args, pruning=config)
    seen = []

    def before(trainer):
        # the loop accumulates the data gradient; freed of it, what is left is the penalty
        (parameter,) = trainer.pruner.masks.parameters()
        parameter.grad = torch.zeros_like(parameter)

    pre_step = trainer.pruner.on_pre_optimizer_step

    def look(*args, **kwargs):
        before(trainer)
        pre_step(*args, **kwargs)
        (parameter,) = trainer.pruner.masks.parameters()
        seen.append((parameter.detach().clone(), parameter.grad.clone()))

    trainer.pruner.on_pre_optimizer_step = look
    trainer.train()
    for (values, gradient), warmup in zip(seen, (0.5, 1.0, 1.0, 1.0), strict=True):
        if method == "l1":
            expected = 0.5 * warmup * values.sign()
        else:
            p = torch.sigmoid(values - 2 / 3 * torch.tensor(0.1 / 1.1).log())
            expected = 0.5 * warmup * p * (1 - p)
        torch.testing.assert_close(gradient, expected)


def test_masks_are_not_decayed_not_scheduled_and_not_clipped(make_model, arguments):
    args = arguments(max_steps=10, weight_decay=0.1, max_grad_norm=0.05, optim="lookahead+larc", learning_rate=0.1)
    trainer = make_trainer(make_model(), args, pruning=pruning(lambda_=0.0, target_sparsity=None))
    norms = []

    def look(trainer):
        if trainer.pruner.masks is not None:
            own = {id(p) for p in trainer.pruner.masks.parameters()}
            rest = [p for n, p in trainer.model.named_parameters() if id(p) not in own and p.grad is not None]
            norms.append(nn.utils.get_total_norm([p.grad for p in rest]).item())
            (mask,) = trainer.pruner.masks.parameters()
            before.append(mask.grad.norm().item())
            groups.append(trainer.pruner.optimizer.param_groups[0])
            assert not any(p is mask for g in trainer.optimizer.param_groups for p in g["params"])

    before, groups, clip = [], [], trainer.accelerator.clip_grad_norm_

    def huge(parameters, *rest):
        if trainer.pruner.masks is not None:
            next(trainer.pruner.masks.parameters()).grad.fill_(100.0)
        return clip(parameters, *rest)

    trainer.accelerator.clip_grad_norm_ = huge
    watch(trainer, "on_pre_optimizer_step", look)
    trainer.train()
    assert len(norms) == 6 and all(norm == pytest.approx(0.05, rel=0.05) for norm in norms)
    assert all(norm == pytest.approx(100 * (3 * 4 + 3 * 128) ** 0.5) for norm in before)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.01, 0)}
    assert max(entry.get("grad_norm", 0) for entry in trainer.state.log_history) < 50


def test_attachment_changes_no_evaluation_and_the_penalty_enters_no_loss(make_model, arguments):
    args = arguments(max_steps=10, eval_strategy="steps", eval_steps=1, learning_rate=1e-9)
    trainer = make_trainer(make_model(), args, pruning=pruning(lambda_=1e3, mask_learning_rate=1e-9))
    trainer.train()
    log = trainer.state.log_history
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert all(losses[step] == pytest.approx(losses[1], rel=1e-5) for step in range(1, 9))
    trained = [entry["loss"] for entry in log if "prune_penalty" in entry]
    assert len(trained) == 6 and max(trained) < 10
    assert all(entry["prune_penalty"] > 300 for entry in log if "prune_penalty" in entry)


@pytest.mark.parametrize("method", ["l1", "l0"])
def test_a_run_ends_with_a_smaller_model_of_the_wanted_sparsity(make_model, arguments, method):
    args = arguments(max_steps=12, save_strategy="steps", save_steps=2, weight_decay=0.01)
    config = pruning(method=method, target_sparsity=0.5, round_to={"neurons": 8})
    trainer = make_trainer(make_model(), args, pruning=config)
    trainer.train()
    trainer.save_model()
    model, report, folder = trainer.model, trainer.pruning_report, Path(args.output_dir)
    old, groups = make_model(), find_groups(make_model())
    kept = {name: torch.tensor(indices) for name, indices in report.kept.items()}
    assert 0.5 <= float(Sizes(old, groups).sparsity(openness_of(kept, groups))) == pytest.approx(report.sparsity)
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after < report.parameters_before
    assert report.max_difference < 1e-4 < report.max_output
    assert all(layer.mlp.up_proj.out_features % 8 == 0 for layer in model.model.layers)
    assert json.loads((folder / "pruning" / "report.json").read_text())["method"] == method
    assert (folder / "pruning" / "report.png").read_bytes().startswith(b"\x89PNG")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert same(weights(loaded), weights(model))
    ids = torch.arange(16)[None]
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert not (folder / "pruning.pt").exists()
    for step in (2, 4, 8, 12):
        names = set(load_file(folder / f"checkpoint-{step}" / "model.safetensors"))
        assert names == set(load_file(folder / "model.safetensors"))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in log] == list(range(1, 13))
    keys = {"prune_penalty", "prune_expected_sparsity", "prune_sparsity", "prune_lambda"}
    assert [len(keys & entry.keys()) for entry in log] == [0] * 2 + [4] * 6 + [0] * 4
    assert [entry.get("parameters") for entry in log] == [None] * 8 + [report.parameters_after] * 4
    history = [json.loads(line) for line in (folder / "pruning" / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [3, 4, 5, 6, 7, 8] and len(history[0]["kept"]) == 6
    trainer.create_model_card()
    assert "### Pruning" in (folder / "README.md").read_text()


CASES = {
    "l1": {"sphere": True, "capture": 0.3},
    "l0": {"beta": 0.6, "beta_end": 0.3, "per_example": True, "mask_learning_rate": 0.5},
    "l1-layers": {"targets": ("sublayers", "neurons"), "target_sparsity": 0.4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("killed_at", [2, 4, 8, 10])  # before, at the start of, with, and at the end of the masks
def test_a_killed_run_ends_with_the_same_weights(make_model, arguments, tmp_path, case, killed_at):
    optim = {"l1": "adamw_torch", "l0": "lookahead+radam"}.get(case, "sgd")

    def train(resume=None, killed=False, model=None, folder="killed"):
        # 43 windows make 6 steps an epoch
        args = arguments(
            **{"max_steps": 14, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2},
            **{"output_dir": str(tmp_path / folder), "optim": optim, "weight_decay": 0.01},
        )
        config = pruning(method=case[:2], start_step=4, end_step=10, **CASES[case])
        trainer = make_trainer(model or make_model(), args, pruning=config)
        if killed:
            watch(trainer, "on_step_begin", lambda t: t.state.global_step == killed_at + 1 and interrupt())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def interrupt():
        raise KeyboardInterrupt

    whole = train(folder="whole")
    assert whole.pruning_report.parameters_after < whole.pruning_report.parameters_before
    with pytest.raises(KeyboardInterrupt):
        train(killed=True)
    checkpoint = tmp_path / "killed" / f"checkpoint-{killed_at}"
    shutil.copytree(checkpoint, tmp_path / "copy")
    resumed = [train(True), train(str(checkpoint), model=AutoModelForCausalLM.from_pretrained(tmp_path / "copy"))]
    for other in resumed:
        assert same(weights(whole.model), weights(other.model))
        assert other.model.config.pruning == whole.model.config.pruning
        assert other.pruning_report.kept == whole.pruning_report.kept
        assert [g["lr"] for g in other.optimizer.param_groups] == [g["lr"] for g in whole.optimizer.param_groups]
    logs = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (whole, resumed[0])]
    assert logs[0] == logs[1] and len(logs[0]) == 14
    histories = [(tmp_path / name / "pruning" / "history.jsonl").read_text() for name in ("whole", "killed")]
    assert histories[0] == histories[1]
    finished = train(True)
    assert same(weights(whole.model), weights(finished.model)) and finished.pruning_report is not None


def test_a_checkpoint_of_another_kind_of_pruning_is_refused(make_model, arguments):
    args = arguments(max_steps=12, save_strategy="steps", save_steps=6)
    make_trainer(make_model(), args, pruning=pruning()).train()
    checkpoint = f"{args.output_dir}/checkpoint-6"
    with pytest.raises(ValueError, match="checkpoint-6 prunes heads, neurons by l1, and this run heads by l1"):
        make_trainer(make_model(), args, pruning=pruning(targets=("heads",))).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="was saved while masks were trained: give its --prune"):
        make_trainer(make_model(), args).train(resume_from_checkpoint=checkpoint)
    Path(checkpoint, "pruning.pt").unlink()
    Path(checkpoint, "manifest.json").unlink()  # as an earlier release wrote it
    with pytest.raises(ValueError, match="is of step 6 and has no masks, and start_step=3: give a start_step from 6"):
        make_trainer(make_model(), args, pruning=pruning()).train(resume_from_checkpoint=checkpoint)
    plain = make_trainer(make_model(), args)
    plain.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-12")
    assert plain.model.config.pruning["method"] == "l1"


@pytest.mark.parametrize("method", ["l1", "l0"])
def test_removal_may_be_the_end_of_a_run_counted_in_epochs(make_model, arguments, method):
    options = {"gradient_checkpointing": True, "bf16": True, "learning_rate": 1e-3}
    args = arguments(max_steps=-1, num_train_epochs=1, **options)
    trainer = make_trainer(make_model(), args, pruning=pruning(method=method, end_step=11))
    assert trainer.train().global_step == 11
    assert trainer.pruning_report.sparsity >= 0.3 and trainer.model.config.pruning is not None
    assert trainer.evaluate()["eval_bpb"] > 0


def test_a_stock_model_resumes_though_its_config_cannot_say_its_shape(arguments):
    def make():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=16, n_embd=16, n_layer=2, n_head=2))

    args = arguments(max_steps=12, save_strategy="steps", save_steps=11)
    trainers = [make_trainer(make(), args, pruning=pruning(targets=("neurons",))) for _ in range(2)]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-11")
    assert same(weights(trainers[0].model), weights(trainers[1].model))
    assert trainers[0].model.transformer.h[0].mlp.c_fc.weight.shape[1] < 64


def test_the_slow_weights_of_lookahead_forget_the_masks(make_model, arguments):
    args = arguments(max_steps=12, optim="lookahead+sgd", learning_rate=1e-12)
    model = make_model()
    config = pruning(mask_learning_rate=1e-9, lambda_=0.0, target_sparsity=None)
    trainer = make_trainer(model, args, pruning=config)
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()

    def halve(trainer):
        if trainer.state.global_step == 8:
            trainer.pruner.masks.layer.mask.data.fill_(0.5)

    watch(trainer, "on_pre_optimizer_step", halve)
    trainer.train()
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.weight.detach(), before / 2)


def test_a_scheduler_follows_groups_that_are_gone():
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 2.0}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    groups = list(optimizer.param_groups)
    del optimizer.param_groups[0]
    _follow(scheduler, groups, optimizer.param_groups)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1.0 and scheduler.base_lrs == [2.0]


def test_arguments_of_the_command_line():
    argv = "--output_dir x --prune_method l0 --prune_targets neurons,layers --prune_target_sparsity 0.6"
    argv += " --prune_start_step 10 --prune_end_step 50 --prune_beta_end 0.1 --prune_round_to 8"
    (args,) = parse_arguments([ReZeroTrainingArguments], "", argv.split())
    config = PruningConfig.from_arguments(args)
    assert config == PruningConfig(
        "l0", ("neurons", "layers"), 0.6, start_step=10, end_step=50, beta_end=0.1, round_to=8
    )
    assert config.mask_learning_rate == 0.05 and config.steps(100) == (10, 50, 20)
    (args,) = parse_arguments([ReZeroTrainingArguments], "", ["--prune_method", "l1", "--prune_lambda", "0.1"])
    assert PruningConfig.from_arguments(args) == PruningConfig(lambda_=0.1)
    assert PruningConfig(lambda_=0.1).steps(100) == (0, 50, 0)
    assert PruningConfig.from_arguments(ReZeroTrainingArguments("x")) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_sparsity": None}, "neither target_sparsity nor lambda_"),
        ({"method": "l2"}, "method='l2': expected 'l1' or 'l0'"),
        ({"capture": 0.01}, "capture=0.01 with mask_learning_rate=0.01: a mask would step over"),
        ({"end_step": 21}, "start_step=3, end_step=21 for a run of 20 steps: expected"),
        ({"start_step": 9}, "start_step=9, end_step=9"),
        ({"target_sparsity": 0.99}, "at start_step=3: got sparsity=0.99, but at most"),
        ({"targets": ("channels",)}, "at start_step=3: no rule finds channels"),
    ],
)
def test_configs_without_meaning_are_refused(make_model, arguments, values, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model(), arguments(max_steps=20), pruning=pruning(**values)).train()


@pytest.mark.parametrize(
    "values",
    [
        {"torch_compile": True},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        {"auto_find_batch_size": True},
    ],
)
def test_what_cannot_bear_new_shapes_is_refused(make_model, arguments, values):
    args = arguments(max_steps=20, **{"save_strategy": "steps"} | values)
    with pytest.raises(ValueError, match=f"pruning with {next(iter(values))}: the shapes of the model change"):
        make_trainer(make_model(), args, pruning=pruning())


def test_residual_weights_that_are_still_zero_are_named(make_config, arguments):
    model = ReZeroForCausalLM(make_config(resweight_init=0.0))
    with pytest.raises(ValueError, match="at start_step=0: 3 residual weights are still 0"):
        make_trainer(model, arguments(max_steps=20), pruning=pruning(start_step=0)).train()


def test_tied_weights_are_refused_before_the_masks_are_trained(make_config, arguments):
    model = ReZeroForCausalLM(make_config(tie_word_embeddings=True))
    config = pruning(targets=("width",), start_step=0)
    with pytest.raises(ValueError, match="lm_head.weight is tied, so it can only take masks that end as 0 or 1"):
        make_trainer(model, arguments(max_steps=20), pruning=config).train()
    config = pruning(targets=("width",), method="l0", estimator="threshold")
    trainer = make_trainer(model, arguments(max_steps=12), pruning=config)
    trainer.train()
    assert trainer.model.config.hidden_size < 32


@pytest.mark.parametrize(
    ("decay", "values", "warns"),
    [(0.0, {}, True), (0.1, {}, False), (0.0, {"sphere": True}, False), (0.0, {"method": "l0"}, False)],
)
def test_l1_without_decay_warns(make_model, arguments, monkeypatch, decay, values, warns):
    told = []
    monkeypatch.setattr("hf_rezero.trainer.pruning.logger.warning", told.append)
    make_trainer(make_model(), arguments(max_steps=20, weight_decay=decay), pruning=pruning(**values))
    assert [text.startswith("L1 masks without weight_decay: the weights can grow") for text in told] == [True] * warns


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_scaled_gradients_train_the_same_masks_and_an_overflow_moves_none(make_model, arguments, optim):
    def train(scaler, overflow):
        args = arguments(max_steps=12, max_grad_norm=0, optim=optim)
        trainer, masks = make_trainer(make_model(), args, pruning=pruning(end_step=11, target_sparsity=0.1)), []
        trainer.accelerator.scaler = scaler

        def look(trainer):
            if trainer.pruner.masks is not None:
                masks.append(trainer.pruner.masks.layer.mask.detach().clone())
                if trainer.state.global_step == overflow:
                    trainer.model.model.layers[0].mlp.down_proj.weight.grad.fill_(torch.inf)
                    # a fused optimizer skips the step by itself, and accelerate does not see it
                    trainer.pruner.masks.layer.mask.grad.fill_(torch.inf if "fused" in optim else 1.0)

        watch(trainer, "on_pre_optimizer_step", look)
        trainer.train()
        return masks

    plain = train(None, None)
    scaled = train(torch.amp.GradScaler("cpu", init_scale=1024.0), None)
    assert len(plain) == 8 and all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    assert not torch.equal(plain[3], plain[4])
    skipped = train(torch.amp.GradScaler("cpu", init_scale=1024.0), 6)
    assert torch.equal(skipped[3], plain[3]) and torch.equal(skipped[4], plain[3])


def test_two_processes_prune_like_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import run_clm

    (tmp_path / "text.txt").write_bytes(TEXT.tobytes() * 7)  # no epoch ends within the run
    options = ["--train_file", tmp_path / "text.txt", "--block_size", "32", "--max_steps", "14", "--use_cpu", "True"]
    options += ["--config_overrides", "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,resweight_init=0.5"]
    options += ["--prune_method", "l1", "--prune_target_sparsity", "0.4", "--prune_start_step", "2"]
    options += ["--prune_end_step", "8", "--prune_warmup_steps", "2", "--do_train", "True", "--logging_steps", "1"]
    options += ["--optim", "sgd", "--learning_rate", "0.1", "--weight_decay", "0.01", "--save_steps", "5"]
    options += ["--gradient_accumulation_steps", "2"]
    rows = ["--per_device_train_batch_size", 4, "--output_dir", tmp_path / "1"]
    run_clm.main([str(option) for option in options + rows])
    rows = ["--per_device_train_batch_size", 2, "--output_dir", tmp_path / "2"]
    run_script("run_clm.py", *options, *rows, processes=2)

    one, two = (json.loads((tmp_path / n / "pruning" / "report.json").read_text()) for n in "12")
    assert one["kept"] == two["kept"] and one["parameters_after"] < one["parameters_before"]
    logs = [json.loads((tmp_path / n / "trainer_state.json").read_text())["log_history"] for n in "12"]
    for mine, theirs in zip(*logs, strict=True):
        for key in ("loss", "prune_penalty", "prune_sparsity", "parameters"):
            assert (key in mine) == (key in theirs) and mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-4)
    final = [load_file(tmp_path / n / "model.safetensors") for n in "12"]
    for name in final[0]:
        torch.testing.assert_close(final[0][name], final[1][name], rtol=1e-3, atol=1e-4)
    for step in (10, 14):
        shutil.rmtree(tmp_path / "2" / f"checkpoint-{step}")
    run_script("run_clm.py", *options, *rows, "--resume_from_checkpoint", "true", processes=2)
    resumed = load_file(tmp_path / "2" / "model.safetensors")
    assert all(torch.equal(resumed[name], final[1][name]) for name in final[1])
