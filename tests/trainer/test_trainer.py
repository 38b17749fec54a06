"""`ReZeroTrainer` on one process, against plain loops."""

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.training import TEXT, make_trainer
from torch import nn
from torch.utils.data import Subset
from transformers import GPT2Config, GPT2LMHeadModel

from hf_rezero import (
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    param_groups,
)
from hf_rezero.data.windows import evaluation_windows
from hf_rezero.trainer.checkpoints import last_checkpoint


def test_weight_decay_goes_by_shape(make_config, arguments):
    model = ReZeroForCausalLM(make_config(norm_position="pre", mlp_bias=True))
    trainer = make_trainer(model, arguments(weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0), name


def test_residual_weights_have_their_own_scheduled_learning_rate(make_config, arguments):
    model = ReZeroForCausalLM(make_config(resweight_init=0.0))
    args = arguments(resweight_learning_rate=0.05, learning_rate=1e-3, weight_decay=0.1, max_steps=2, max_grad_norm=0)
    trainer = make_trainer(model, args)
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert (len(group["params"]), group["weight_decay"], group["initial_lr"]) == (3, 0.0, 0.05)
    # Adam's first step is the learning rate, the second, at half of it by the linear schedule, is at most that
    assert all(0.02 < abs(p.item()) < 0.08 for p in group["params"])
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(list(model.parameters()))


def test_a_branch_that_will_never_learn_is_warned_of_once(make_config, arguments):
    model = ReZeroForCausalLM(make_config(resweight_init=0.0))
    for layer in model.model.layers[:2]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.zeros_(projection.weight)
    with pytest.warns(
        UserWarning, match="2 residual branches will never learn: .*layers.0.*is 0 and its branch"
    ) as found:
        make_trainer(model, arguments(max_steps=3)).train()
    assert sum("never learn" in str(warning.message) for warning in found) == 1


COMPILED = """
import sys
import torch
from torch._dynamo.utils import counters
from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainer, ReZeroTrainingArguments

losses = []
for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 10, "num_attention_heads": 2, "max_position_embeddings": 16}
    rows = [{"input_ids": torch.arange(16) + i, "labels": torch.arange(16) + i} for i in range(8)]
    common = {"output_dir": sys.argv[1], "max_steps": 2, "logging_steps": 1, "use_cpu": True, "report_to": []}
    args = ReZeroTrainingArguments(**common, **options, per_device_train_batch_size=4, learning_rate=1e-2)
    trainer = ReZeroTrainer(model=ReZeroForCausalLM(ReZeroConfig(**sizes)), args=args, train_dataset=rows)
    trainer.train()
    losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
trainer.save_model()
print("RESULT", counters["stats"]["unique_graphs"], max(abs(a - b) for a, b in zip(*losses)) < 1e-4)
"""


def test_torch_compile_compiles_one_layer_for_all(tmp_path):
    # in a process of its own: accelerate keeps the choice in the environment and in its state
    command = [sys.executable, "-c", COMPILED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    _, graphs, same = run.stdout.split("RESULT")[1].split(" ")[:3]
    assert int(graphs) < 10 and same.startswith("True")
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")


def test_a_learning_rate_for_missing_residual_weights_is_refused(arguments):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=16, n_layer=1, n_head=2))
    trainer = make_trainer(model, arguments(resweight_learning_rate=0.05))
    with pytest.raises(ValueError, match="resweight_learning_rate=0.05, but GPT2LMHeadModel has no trainable"):
        trainer.create_optimizer()


def test_trainer_and_plain_loop_give_the_same_weights(make_config, arguments):
    config = make_config()
    torch.manual_seed(3)
    model, twin = ReZeroForCausalLM(config), ReZeroForCausalLM(config)
    twin.load_state_dict(model.state_dict())
    args = arguments(weight_decay=0.1, lr_scheduler_type="constant", optim="adamw_torch")
    trainer = make_trainer(model, args)
    batches = [batch for _, batch in zip(range(4), trainer.get_train_dataloader(), strict=False)]
    trainer.train()
    optimizer = torch.optim.AdamW(param_groups(twin, weight_decay=0.1), lr=1e-2)
    for batch in batches:
        twin(**batch).loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_bits_per_byte_is_exact_for_every_batch_size(make_config, arguments, batch_size):
    model = ReZeroForCausalLM(make_config()).eval()
    text = TEXT[:50]
    dataset = evaluation_windows(text, 16, stride=5)
    trainer = make_trainer(model, arguments(per_device_eval_batch_size=batch_size), eval_dataset=dataset)
    nll = []
    for window in dataset:
        log_p = model(window["input_ids"][None]).logits[0].double().log_softmax(-1)
        nll += [-log_p[t - 1, y].item() for t, y in enumerate(window["labels"]) if y >= 0]
    assert len(nll) == 49
    assert trainer.evaluate()["eval_bpb"] == pytest.approx(sum(nll) / 49 / math.log(2), rel=1e-6)
    assert trainer.evaluate(metric_key_prefix="test")["test_bpb"] == pytest.approx(
        sum(nll) / 49 / math.log(2), rel=1e-6
    )


def test_evaluation_keeps_no_logits_but_gives_them_to_compute_metrics(make_config, arguments):
    model = ReZeroForCausalLM(make_config())
    kept = []
    trainer = make_trainer(model, arguments())
    assert trainer.evaluation_loop(trainer.get_eval_dataloader(), "", prediction_loss_only=True).predictions is None
    trainer = make_trainer(
        model, arguments(), compute_metrics=lambda p: {"seen": kept.append(p.predictions.shape) or 1}
    )
    metrics = trainer.evaluate()
    assert kept == [(len(trainer.eval_dataset), 16, 264)]
    assert metrics["eval_seen"] == 1 and metrics["eval_bpb"] > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_holds_no_logits_unless_something_reads_them(make_config, arguments, smoothing):
    model, skipped = ReZeroForCausalLM(make_config()), []
    model.register_forward_hook(lambda module, args, output: skipped.append(output.logits is None))
    trainer = make_trainer(model, arguments(max_steps=2, save_strategy="no", label_smoothing_factor=smoothing))
    trainer.train()
    assert skipped == [smoothing == 0] * 2
    trainer.evaluate()
    assert not any(skipped[2:])


def test_label_smoothing_predicts_the_next_byte(make_config, arguments):
    model = ReZeroForCausalLM(make_config())
    trainer = make_trainer(model, arguments(label_smoothing_factor=0.2))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, dict(batch))
    logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


class Labelled:
    """Sixteen texts of unequal length with a label per text, or per token, of which some are left out."""

    def __init__(self, head):
        generator = torch.Generator().manual_seed(1)
        self.rows = []
        for i in range(16):
            ids = torch.randint(0, 256, (12,), generator=generator)
            masked = torch.rand(12, generator=generator) < (0.2 + 0.6 * (i % 2))
            masked[3] = True
            label = (
                torch.tensor(i % 3) if head is ReZeroForSequenceClassification else torch.where(masked, ids % 5, -100)
            )
            self.rows.append({"input_ids": ids, "labels": label})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "head",
    [ReZeroForCausalLM, ReZeroForMaskedLM, ReZeroForSequenceClassification, ReZeroForTokenClassification],
)
def test_accumulated_gradients_equal_those_of_one_large_batch(make_config, arguments, head, label_smoothing):
    config = make_config(is_causal=head is ReZeroForCausalLM, num_labels=5)
    state = head(config).state_dict()
    updates = {}
    for accumulation in (1, 4):
        model = head(config)
        model.load_state_dict(state)
        args = arguments(
            max_steps=1,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
            label_smoothing_factor=label_smoothing,
        )
        make_trainer(model, args, train_dataset=Labelled(head), data_collator=None).train()
        updates[accumulation] = {name: (p - state[name]).detach() for name, p in model.named_parameters()}
    largest = max(update.abs().max() for update in updates[1].values())
    assert largest > 1e-3
    for name, update in updates[1].items():
        torch.testing.assert_close(updates[4][name], update, rtol=1e-3, atol=1e-5 * largest.item(), msg=name)


def test_logs_show_the_residual_weights(make_config, arguments):
    trainer = make_trainer(ReZeroForCausalLM(make_config(resweight_init=-0.5)), arguments(max_steps=1))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert 0.4 < entry["resweight_mean_abs"] <= entry["resweight_max_abs"] < 0.6


def test_best_checkpoint_has_the_lowest_bits_per_byte(make_config, arguments, tmp_path):
    # the learning rate makes the model worse after the first steps, so the best checkpoint is not the last
    args = arguments(
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        learning_rate=0.3,
        load_best_model_at_end=True,
        metric_for_best_model="bpb",
    )
    assert args.greater_is_better is False
    trainer = make_trainer(ReZeroForCausalLM(make_config()), args)
    trainer.train()
    curve = [entry["eval_bpb"] for entry in trainer.state.log_history if "eval_bpb" in entry]
    assert trainer.state.best_metric == min(curve) != max(curve)
    assert trainer.evaluate()["eval_bpb"] == pytest.approx(min(curve), rel=1e-6)


def test_saved_config_keeps_the_cache_switched_on(make_config, arguments, tmp_path):
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(max_steps=1))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert ReZeroForCausalLM.from_pretrained(tmp_path / "saved").config.use_cache is True
    assert trainer.model.config.use_cache is False


@pytest.mark.parametrize("extra", [{}, {"resweight_learning_rate": 0.02, "weight_decay": 0.1}])
def test_resumed_training_ends_with_the_same_weights_bit_for_bit(make_config, arguments, extra):
    state = ReZeroForCausalLM(make_config(hidden_dropout=0.1)).state_dict()

    def train(resume):
        model = ReZeroForCausalLM(make_config(hidden_dropout=0.1))
        model.load_state_dict(state)
        # 43 windows make 11 steps an epoch: the checkpoint at step 14 lies inside the second epoch
        args = arguments(max_steps=24, save_strategy="steps", save_steps=14, **extra)
        trainer = make_trainer(model, args)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(None)
    halfway = train(f"{whole.args.output_dir}/checkpoint-14")
    finished = train(True)
    assert last_checkpoint(whole.args.output_dir).endswith("checkpoint-24")
    for (name, p), *others in zip(
        whole.model.named_parameters(), halfway.model.parameters(), finished.model.parameters(), strict=True
    ):
        assert all(torch.equal(p, q) for q in others), name
    assert halfway.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]


def test_each_epoch_cuts_the_corpus_elsewhere(make_config, arguments):
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments(max_steps=23, report_to="none"))
    phases = []
    trainer.train_dataset.set_epoch, tell = lambda e: phases.append(e) or tell(e), trainer.train_dataset.set_epoch
    trainer.train()
    assert sorted(set(phases)) == [0, 1, 2]


def test_a_subset_of_windows_evaluates(make_config, arguments):
    subset = Subset(evaluation_windows(TEXT, 16), range(5))
    assert make_trainer(ReZeroForCausalLM(make_config()), arguments(), eval_dataset=subset).evaluate()["eval_bpb"] > 0
