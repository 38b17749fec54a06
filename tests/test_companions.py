"""What people use beside the Trainer: optuna, TRL, TensorBoard, W&B, lm-evaluation-harness, early stopping.

The packages are in the extra `companions`; without one its test is skipped.
"""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainer, ReZeroTrainingArguments
from hf_rezero.data import ByteDataset, collate_bytes, evaluation_windows, train_bpe


TEXT = np.frombuffer(b"to be or not to be, that is the question. " * 60, np.uint8)
SENTENCES = ["the rain in Spain falls mainly on the plain. " * 3] * 50
SHOWN = {"eval/bpb": "eval_bpb", "train/resweight_mean_abs": "resweight_mean_abs"}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "resweight_init": 0.5}


def installed(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'hf_rezero[companions]'")


def make_trainer(folder, model=None, callbacks=(), model_init=None, **options):
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", **options}
    args = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2, **options}
    return ReZeroTrainer(
        model if model_init else model or ReZeroForCausalLM(ReZeroConfig(**SHAPE)),
        ReZeroTrainingArguments(str(folder), **args),
        train_dataset=ByteDataset(TEXT[:2000], 32),
        eval_dataset=evaluation_windows(TEXT[2000:], 32),
        data_collator=collate_bytes,
        callbacks=list(callbacks),
        model_init=model_init,
    )


def test_a_search_of_optuna_tries_a_new_model_each_time_and_finds_the_best(tmp_path):
    installed("optuna")
    scores = []
    trainer = make_trainer(tmp_path, model_init=lambda trial: ReZeroForCausalLM(ReZeroConfig(**SHAPE)))
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-5, 1e-2])},
        compute_objective=lambda metrics: scores.append(metrics["eval_bpb"]) or metrics["eval_bpb"],
        direction="minimize",
        n_trials=4,
        backend="optuna",
    )
    assert (
        len(scores) >= 4
        and best.objective == pytest.approx(min(scores))
        and best.hyperparameters["learning_rate"] in (1e-5, 1e-2)
    )


def test_tensorboard_shows_bits_per_byte_and_residual_weights(tmp_path):
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"logging_steps": 2, "gradient_accumulation_steps": 2, "auto_find_batch_size": True}
    trainer = make_trainer(tmp_path / "run", report_to=["tensorboard"], **options)
    trainer.train()
    (file,) = (tmp_path / "run").rglob("events*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    for tag, name in SHOWN.items():
        expected = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(expected, rel=1e-6) and expected


def records(data):
    """The records of an offline run of W&B: LevelDB's log format, 7 bytes of its own in front."""
    position, record = 7, b""
    while position + 7 <= len(data):
        size, kind = struct.unpack_from("<HB", data, position + 4)  # behind a checksum
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
        left = 32768 - position % 32768
        position += left if left < 7 else 0  # no header crosses the end of a block


def test_wandb_shows_bits_per_byte_and_residual_weights(tmp_path, monkeypatch):
    wandb = installed("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(tmp_path / "run", report_to=["wandb"], logging_steps=2)
    trainer.train()
    wandb.finish()
    wandb.teardown()  # waits for the process that writes the file
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [Record.FromString(record).history.item for record in records(file.read_bytes())]
    rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
    for tag, name in SHOWN.items():
        expected = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert [row[tag] for row in rows if tag in row] == pytest.approx(expected) and expected


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path):
    options = {"learning_rate": 1e-9, "max_steps": 60, "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"metric_for_best_model": "bpb", "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, callbacks=[EarlyStoppingCallback(2, 0.5)], **options)
    trainer.train()
    assert 4 <= trainer.state.global_step <= 8 and trainer.state.best_metric == pytest.approx(
        trainer.evaluate()["eval_bpb"]
    )


@pytest.fixture
def on_tokens():
    tokenizer = train_bpe(SENTENCES, 300)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ReZeroForCausalLM(ReZeroConfig(vocab_size=304, **SHAPE, **special)), tokenizer


def test_sft_trainer_of_trl_trains_our_model(tmp_path, on_tokens):
    trl = installed("trl")
    from datasets import Dataset

    model, tokenizer = on_tokens
    options = {
        "max_steps": 12,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "max_length": 32,
        "logging_steps": 1,
    }
    args = trl.SFTConfig(str(tmp_path), report_to=[], save_strategy="no", disable_tqdm=True, **options)
    trainer = trl.SFTTrainer(
        model, args=args, train_dataset=Dataset.from_dict({"text": SENTENCES}), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_lm_evaluation_harness_scores_as_a_computation_by_hand(tmp_path, on_tokens):
    lm_eval = installed("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = on_tokens
    model.eval()
    rows = [
        {"q": q, "choices": [" Spain", " falls", " plain. the"], "answer": n % 3}
        for n, q in enumerate(["the rain in", "on"] * 6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "local_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    }
    task |= {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    Path(tmp_path, "local.yaml").write_text(json.dumps(task | {"metric_list": [{"metric": "acc"}]}))
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4),
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )

    def log_likelihood(context, continuation):
        ids = tokenizer(context + continuation).input_ids
        first = len(tokenizer(context).input_ids)
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(log_p[i - 1, ids[i]].item() for i in range(first, len(ids)))

    right = [np.argmax([log_likelihood(row["q"], c) for c in row["choices"]]) == row["answer"] for row in rows]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
