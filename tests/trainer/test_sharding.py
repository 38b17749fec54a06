"""Under FSDP2 two processes train, log, evaluate, save, resume and publish what one process does."""

import json
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from support.launch import run_function
from support.sharding import sharded
from support.training import TEXT, make_trainer
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from hf_rezero import PruningConfig, ReZeroConfig, ReZeroForCausalLM, ReZeroTrainingArguments
from hf_rezero.data.windows import evaluation_windows
from hf_rezero.publish.push import files_to_push
from hf_rezero.trainer import pushing
from hf_rezero.trainer.finite import NonFiniteError


STEPS, STOP = 4, 2
SHAPE = {"hidden_size": 12, "intermediate_size": 33, "num_hidden_layers": 3, "num_attention_heads": 2}
CASES = {
    "adamw": {"optim": "adamw_torch"},
    "ranger": {"optim": "ranger", "optim_args": "k=3"},
    "muon": {"optim": "muon"},
    "gradinit": {"optim": "adamw_torch", "gradinit_steps": 3},
    "shards": {"optim": "adamw_torch", "load_best_model_at_end": True},  # and saved as shards
}


def make(folder, processes, name="adamw", model=None, **more):
    """A Trainer of one of so many processes, that see 4 sequences in a step together; several are sharded."""
    options = {
        "max_steps": STEPS,
        "ddp_timeout": 60,
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": STOP,
        "save_steps": STOP,
        "learning_rate": 1e-2,
        "resweight_learning_rate": 2e-2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        **CASES[name],
        **more,
    }
    if processes > 1:
        kind = "SHARDED_STATE_DICT" if name == "shards" else "FULL_STATE_DICT"
        options |= {"fsdp": True, "fsdp_config": {"state_dict_type": kind}}
    args = ReZeroTrainingArguments(str(folder), **options)
    torch.manual_seed(0)
    model = model or ReZeroForCausalLM(ReZeroConfig(**SHAPE, resweight_init=0.5, tie_word_embeddings=name == "muon"))
    return make_trainer(
        model, sharded(args) if processes > 1 else args, eval_dataset=evaluation_windows(TEXT[:60], 16)
    )


def train(folder, processes, name):
    """Train, evaluate and save; returns what was logged."""
    trainer = make(folder, processes, name)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    if processes > 1:
        assert isinstance(trainer.model, FSDPModule) and type(trainer.model).__name__ == "FSDPReZeroForCausalLM"
    return trainer.state.log_history


def resume(folder, name):
    """Train again from the checkpoint in the middle; the weights are the same to the bit."""
    again = folder.with_name(f"{name} again")
    trainer = make(again, 2, name)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}"))
    trainer.save_model()
    torch.distributed.barrier()
    one, two = (load_file(path / "model.safetensors") for path in (folder, again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def take_up(folder):
    """A finished run is taken up, and evaluated without training."""
    trainer = make(folder, 2)
    trainer.train(resume_from_checkpoint=True)
    loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    with pytest.raises(ValueError, match="sharded already, by an earlier call"):
        trainer.train()


def evaluate_alone(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = make(folder.with_name("alone"), 2, model=model)
    trained = json.loads(folder.with_name("adamw.json").read_text())
    losses = [entry["eval_loss"] for entry in trained if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[-1], rel=1e-6) != losses[0]
    assert isinstance(trainer.model, FSDPModule)


def publish(folder):
    """One process sends the files, the others help to gather them."""
    sent = []
    trainer = make(folder / "published", 2)
    with mock.patch.multiple(
        pushing,
        open_api=mock.DEFAULT,
        open_repository=lambda *_: "me/run",
        push_folder=lambda files, name, **_: sent.append((name, sorted(files_to_push(files)))),
    ):
        trainer.train()
        trainer.push_to_hub()
    expected = ("me/run", [*sorted(files_to_push(folder / "one" / "adamw")), "resweights.png"])
    assert sent == ([] if trainer.args.process_index else [(expected[0], sorted(set(expected[1])))])
    assert "FSDP" not in (folder / "published" / "config.json").read_text()


def refuse_masks(folder):
    args = sharded(ReZeroTrainingArguments(str(folder), max_steps=9, use_cpu=True, fsdp=True, report_to=[]))
    model = ReZeroForCausalLM(ReZeroConfig(**SHAPE))
    with pytest.raises(ValueError, match="got pruning with fsdp.*prune first and train the smaller model with it"):
        make_trainer(model, args, pruning=PruningConfig(target_sparsity=0.5))


def refuse_another_kind(folder):
    """The checkpoint of one process holds its states under other names."""
    trainer = make(folder / "other", 2)
    with pytest.raises(ValueError, match="was saved without FSDP and this run is with it"):
        trainer.train(resume_from_checkpoint=str(folder / "one" / "adamw" / f"checkpoint-{STOP}"))


def refuse_nan(folder):
    """All processes refuse to save weights of which only one holds the NaN."""
    trainer = make(folder / "nan", 2)
    trainer.evaluate()
    if trainer.args.process_index == 1:
        with torch.no_grad():
            trainer.model.model.embed_tokens.weight.to_local().fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="the weights are not finite, first model.embed_tokens.weight"):
        trainer.save_model()


def worker(folder):
    """All checks in one start of the processes; what failed is in a file of each."""
    checks = {}
    for name in CASES:
        checks[f"train {name}"] = lambda name=name: train(folder / name, 2, name)
        checks[f"resume {name}"] = lambda name=name: resume(folder / name, name)
    checks |= {"take up": lambda: take_up(folder / "adamw"), "evaluate": lambda: evaluate_alone(folder / "adamw")}
    checks |= {check.__name__: lambda check=check: check(folder) for check in OTHERS}
    failures = {}
    for name, check in checks.items():
        try:
            found = check()
            failures[name] = None
            if name.startswith("train") and torch.distributed.get_rank() == 0:
                (folder / f"{name[6:]}.json").write_text(json.dumps(found))
        except BaseException:
            failures[name] = traceback.format_exc()
        torch.distributed.barrier()
    (folder / f"failures{torch.distributed.get_rank()}.json").write_text(json.dumps(failures))


OTHERS = (publish, refuse_masks, refuse_another_kind, refuse_nan)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in CASES:
        (folder / f"{name}1.json").write_text(json.dumps(train(folder / "one" / name, 1, name)))
    run_function(worker, folder, processes=2)
    return folder


def failures(folder, name):
    return [json.loads((folder / f"failures{rank}.json").read_text())[name] for rank in range(2)]


CHECKS = [f"{what} {name}" for name in CASES for what in ("train", "resume")]


@pytest.mark.parametrize("name", [*CHECKS, "take up", "evaluate", *(check.__name__ for check in OTHERS)])
def test_every_process_did_what_it_should(name, ranks):
    assert failures(ranks, name) == [None, None], "\n".join(filter(None, failures(ranks, name)))


@pytest.mark.parametrize("name", CASES)
def test_the_logs_are_those_of_one_process(name, ranks):
    one, two = (json.loads((ranks / f"{name}{processes}.json").read_text()) for processes in ("1", ""))
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() & {
            "loss",
            "grad_norm",
            "resweight_mean_abs",
            "resweight_max_abs",
            "eval_loss",
            "eval_bpb",
        }:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), (key, mine, theirs)


@pytest.mark.parametrize("name", CASES)
def test_the_saved_folder_is_that_of_one_process(name, ranks):
    one, two = ranks / "one" / name, ranks / name
    assert sorted(files_to_push(one)) == sorted(files_to_push(two))
    files = [{path.name for path in folder.iterdir() if path.is_file()} for folder in (one, two)]
    assert files[0] == files[1]
    assert (one / "config.json").read_text() == (two / "config.json").read_text()
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_loads_as_one_of_one_process(ranks):
    folders = [Path(ranks, *parts, "shards", f"checkpoint-{STOP}") for parts in (["one"], [])]
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
