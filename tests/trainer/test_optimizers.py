"""Optimizers by name in the Trainer: what is built, what is saved, and how a run resumes."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.training import make_trainer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, TrainerCallback
from transformers.training_args import OptimizerNames

from hf_rezero import (
    LARS,
    RAdam,
    ReZeroForCausalLM,
    ReZeroTrainingArguments,
    centralize_gradients,
    lookahead,
    param_groups,
)
from hf_rezero.commands import clm as run_clm


# name -> a learning rate at which it learns, and arguments
NAMES = {
    "radam": (1e-2, None),
    "ranger": (1e-2, "k=5,betas=(0.9,0.99)"),
    "lars": (3.0, "momentum=0.8,trust_coefficient=0.01"),
    "larc": (3e-2, "trust_coefficient=0.1"),
    "ranger_lars": (1e-1, None),
    "lamb": (3e-2, None),
    "muon": (1e-2, "momentum=0.9,num_iterations=4"),
    "lookahead+muon": (1e-2, "lookahead_k=4"),
    "lookahead+adamw_torch_fused": (1e-2, "lookahead_k=4"),
    "gc+lookahead+sgd": (0.3, "momentum=0.9,lookahead_alpha=0.8,nesterov=True"),
    "snoo+adamw_torch": (1e-2, "lookahead_k=6"),
    "gc+adafactor": (1e-2, None),
    "adamw_torch": (1e-2, "betas=(0.9,0.99)"),
}


@pytest.fixture
def trained(make_config, arguments):
    """Train the same model with the same data, whole or resumed."""
    state = ReZeroForCausalLM(make_config()).state_dict()

    def train(resume=None, callbacks=None, **values):
        model = ReZeroForCausalLM(make_config())
        model.load_state_dict(state)
        trainer = make_trainer(model, arguments(**values), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


@pytest.mark.parametrize("name", NAMES)
def test_every_name_trains_and_resumes_in_mid_cycle_bit_for_bit(trained, name):
    rate, optim_args = NAMES[name]
    options = {"optim": name, "learning_rate": rate, "optim_args": optim_args, "max_steps": 25, "weight_decay": 0.01}
    # 14 and 7 are a multiple of none of the k but one
    whole = trained(**options, save_strategy="steps", save_steps=14)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    resumed = trained(f"{whole.args.output_dir}/checkpoint-14", **options, save_strategy="no")
    for (key, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), key
    for mine, theirs in zip(whole.optimizer.param_groups, resumed.optimizer.param_groups, strict=True):
        assert {**mine, "params": 0} == {**theirs, "params": 0}


def test_what_a_name_builds(make_config, arguments):
    def build(**values):
        return make_trainer(ReZeroForCausalLM(make_config()), arguments(**values)).create_optimizer()

    group = build(optim="ranger", optim_args="k=3,alpha=0.25").param_groups[0]
    assert (group["lookahead_k"], group["lookahead_alpha"], group["betas"], group["eps"]) == (
        3,
        0.25,
        (0.95, 0.999),
        1e-5,
    )
    assert build(optim="ranger", adam_beta1=0.8).param_groups[0]["betas"] == (0.8, 0.999)
    assert build(optim="ranger", adam_epsilon=1e-7).param_groups[0]["eps"] == 1e-7
    assert build(optim="larc").param_groups[0]["clip"] and not build(optim="lars").param_groups[0]["clip"]
    snoo = build(optim="gc+snoo+sgd", optim_args="lookahead_momentum=0.25,momentum=0.5,gc_conv_only=True")
    keys = ("lookahead_k", "lookahead_alpha", "lookahead_momentum", "momentum", "gc_conv_only")
    assert type(snoo) is torch.optim.SGD
    assert [snoo.param_groups[0][key] for key in keys] == [20, 0.7, 0.25, 0.5, True]
    assert "lookahead_k" not in build(optim="gc+sgd").param_groups[0]
    evaluating = build(optim="lookahead+sgd", optim_args="lookahead_evaluate_slow=True")
    assert callable(evaluating.eval) and not hasattr(build(optim="lookahead+sgd"), "eval")


def test_trainer_and_plain_loop_give_the_same_weights(make_config, arguments):
    model, twin = ReZeroForCausalLM(make_config()), ReZeroForCausalLM(make_config())
    twin.load_state_dict(model.state_dict())
    args = arguments(
        optim="gc+lookahead+sgd", optim_args="lookahead_k=2", lr_scheduler_type="constant", weight_decay=0.1
    )
    trainer = make_trainer(model, args)
    batches = [batch for _, batch in zip(range(4), trainer.get_train_dataloader(), strict=False)]
    trainer.train()
    optimizer = torch.optim.SGD(param_groups(twin, weight_decay=0.1), lr=1e-2)
    lookahead(centralize_gradients(optimizer), k=2)
    for batch in batches:
        twin(**batch).loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected, msg=name)


def test_gpt2_is_centralised_along_its_output_axis_and_never_in_its_embeddings(arguments):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    trainer = make_trainer(model, arguments(optim="ranger", max_steps=1, learning_rate=1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    by_output = {name: m.mean(0).abs().max().item() for name, m in moved.items() if name.endswith("c_fc.weight")}
    assert by_output and all(mean < 1e-6 for mean in by_output.values())
    assert moved["transformer.h.0.mlp.c_fc.weight"].mean(1).abs().max() > 1e-5
    assert moved["transformer.wte.weight"].mean(1).abs().max() > 1e-5


def test_arguments_survive_json_pickle_replace_and_the_command_line(arguments):
    args = arguments(optim="gc+lookahead+adamw_torch_fused", optim_args="lookahead_k=3")
    for other in (
        ReZeroTrainingArguments(**json.loads(args.to_json_string())),
        pickle.loads(pickle.dumps(args)),
        replace(args, seed=1),
        HfArgumentParser(ReZeroTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", "x", "--optim", "gc+lookahead+adamw_torch_fused", "--optim_args", "lookahead_k=3"]
        )[0],
    ):
        assert (other.optim, other.optim_args) == ("gc+lookahead+adamw_torch_fused", "lookahead_k=3")
    assert arguments(optim="sgd").optim is OptimizerNames.SGD
    assert arguments().set_optimizer("ranger", learning_rate=0.5, args="k=4").optim == "ranger"
    changed = arguments().set_optimizer("ranger", learning_rate=0.5, args="k=4")
    assert (changed.learning_rate, changed.optim_args) == (0.5, "k=4")
    assert arguments(optim="ranger").set_optimizer("sgd").optim is OptimizerNames.SGD


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"optim": "rangr"},
            r"'rangr': expected \[gc\+\].* radam, ranger, lars, larc, ranger_lars, lamb, muon, adamw_torch",
        ),
        ({"optim": "lookahead+gc+sgd"}, "'lookahead\\+gc\\+sgd': expected"),
        ({"optim": "gc+ranger"}, "ranger has Lookahead and centralised gradients already"),
        ({"optim": "sgd", "optim_args": "lookahead_k=3"}, "with lookahead_k"),
        ({"optim": "ranger", "optim_args": "k"}, "expected name=value"),
    ],
)
def test_bad_names_and_arguments_are_refused_at_once(arguments, values, message):
    with pytest.raises(ValueError, match=message):
        arguments(**values)


def test_unknown_arguments_of_an_optimizer_are_named(make_config, arguments):
    for optim in ("ranger", "sgd"):
        trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(optim=optim, optim_args="kk=3"))
        with pytest.raises(ValueError, match=f"optim_args='kk=3': expected, for {optim}, any of params, lr"):
            trainer.create_optimizer()


def test_deepspeed_is_refused_where_it_would_change_the_optimizer(make_config, arguments):
    for optim, refused in (
        ("ranger", True),
        ("gc+sgd", True),
        ("lamb", True),
        ("muon", True),
        ("radam", False),
        ("lookahead+sgd", False),
    ):
        trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(optim=optim))
        trainer.is_deepspeed_enabled = True
        if refused:
            with pytest.raises(ValueError, match="DeepSpeed ZeRO flattens"):
                trainer.create_optimizer()
        else:
            trainer.create_optimizer()


def test_an_optimizer_of_the_caller_gets_the_right_groups_and_no_wrapper(make_config, arguments):
    model = ReZeroForCausalLM(make_config())
    args = arguments(optim="lookahead+sgd", weight_decay=0.1, resweight_learning_rate=0.5)
    trainer = make_trainer(model, args, optimizer_cls_and_kwargs=(LARS, {"lr": 0.25}))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is LARS and "lookahead_k" not in optimizer.param_groups[0]
    assert [group["lr"] for group in optimizer.param_groups] == [*[0.25] * (len(optimizer.param_groups) - 1), 0.5]
    own = RAdam(model.parameters())
    assert make_trainer(model, args, optimizers=(own, None)).create_optimizer() is own


def test_the_model_card_names_the_optimizer(trained):
    trainer = trained(optim="gc+lookahead+sgd", optim_args="lookahead_k=3", max_steps=1)
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "gc+lookahead+sgd" in card and "lookahead_k=3" in card


class _Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.seen.append((state.global_step, model.lm_head.weight.detach().clone()))


def test_evaluation_on_the_slow_weights(trained):
    watch = _Watch()
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    options |= {"optim": "ranger", "optim_args": "evaluate_slow=True,k=3"}
    whole = trained(callbacks=[watch], **options)
    saved = torch.load(Path(whole.args.output_dir, "checkpoint-4", "optimizer.pt"), weights_only=True)["state"]
    evaluated = next(weight for step, weight in watch.seen if step == 4)
    (entry,) = [entry for entry in saved.values() if torch.equal(entry["slow"], evaluated)]
    assert not torch.equal(entry["fast"], evaluated)
    resumed = trained(f"{whole.args.output_dir}/checkpoint-4", **options)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_yaml_file_names_the_optimizer(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 120)) * 40)
    (tmp_path / "run.yaml").write_text(
        f"train_file: {tmp_path}/text.txt\noutput_dir: {tmp_path}/run\ndo_train: true\nuse_cpu: true\nblock_size: 32\n"
        f"config_overrides: hidden_size=16,num_hidden_layers=2,num_attention_heads=2\nmax_steps: 9\nsave_steps: 5\n"
        f"optim: ranger\noptim_args: k=4,betas=(0.9,0.99)\nlearning_rate: 0.01\ndisable_tqdm: true\n"
    )
    run_clm.main([str(tmp_path / "run.yaml")])
    group = torch.load(tmp_path / "run" / "checkpoint-5" / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert (group["lookahead_k"], group["lookahead_step"], group["betas"]) == (4, 5, (0.9, 0.99))
