"""Learning from a teacher: the loss of a step is that of the equation, and only in training."""

import pytest
import torch
from support.training import make_trainer, same, weights
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
)

from hf_rezero import DistillationConfig, PruningConfig, ReZeroForCausalLM
from hf_rezero.commands import prune
from hf_rezero.data.windows import collate_bytes
from hf_rezero.trainer.distillation import (
    DistillingTrainer,
    hidden_state_loss,
    load_teacher,
    predicted,
    soft_target_loss,
)


@pytest.fixture
def twins(make_config):
    """A student of three layers and a teacher of five, of equal width, whose outputs are not small."""
    torch.manual_seed(0)
    student = ReZeroForCausalLM(make_config(initializer_range=0.3))
    return student, ReZeroForCausalLM(make_config(num_hidden_layers=5, initializer_range=0.3))


def by_hand(student, teacher, batch, temperature, weight, hidden_weight=0.0):
    """The equation in plain torch, over the whole batch, as lists of numbers."""
    own, other = (model.eval()(batch["input_ids"], output_hidden_states=True) for model in (student, teacher))
    ce, kl, count = 0.0, 0.0, 0
    for row, labels in enumerate(batch["labels"]):
        for position, label in enumerate(labels[1:]):
            if label != -100:
                p, q = (o.logits[row, position].double() for o in (own, other))
                ce = ce - p.log_softmax(0)[label]
                soft_p, soft_q = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (p, q))
                kl = kl + (soft_q * (soft_q / soft_p).log()).sum()
                count += 1
    loss = ((1 - weight) * ce + weight * temperature**2 * kl) / count
    if hidden_weight:
        pairs = zip((0, 1, 2, 3), (0, 2, 3, 5), strict=True)  # layer l of 3 meets layer round(5 l / 3) of 5
        states = [(own.hidden_states[i].double(), other.hidden_states[j].double()) for i, j in pairs]
        loss = loss + hidden_weight * sum((s - t).square().sum() / t.square().sum() for s, t in states) / 4
    return loss


@pytest.mark.parametrize("settings", [(1.0, 0.5, 0.0), (3.0, 0.5, 0.0), (2.0, 1.0, 0.0), (2.0, 0.3, 0.7)])
def test_the_loss_and_its_gradient_are_those_of_the_equation(twins, arguments, settings):
    student, teacher = twins
    config = DistillationConfig(teacher, *settings)
    trainer = make_trainer(student, arguments(), distillation=config)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = batch["labels"].clone().index_fill_(1, torch.tensor([5, 6, 7]), -100)
    expected = by_hand(student, teacher, batch, *settings)
    gradients = torch.autograd.grad(expected, list(student.parameters()))
    student.zero_grad()
    loss = trainer.compute_loss(student.train(), batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_step_is_the_same_in_parts(twins, arguments, make_config):
    """Accumulation over parts with different numbers of labels weighs each prediction alike."""
    _, teacher = twins
    ends = []
    for accumulation in (1, 4):
        torch.manual_seed(1)
        student = ReZeroForCausalLM(make_config())
        args = arguments(gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation)
        trainer = make_trainer(student, args, distillation=DistillationConfig(teacher), data_collator=_unequal)
        trainer.train()
        ends.append(trainer.state.log_history)
    for one, four in zip(*ends, strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)
            assert one["distill_loss"] > 0


def _unequal(features):
    """Labels for the first positions only, of the windows that start with an even byte."""
    ids = collate_bytes(features)["input_ids"]
    labels = ids.clone()
    labels[ids[:, 0] % 2 == 0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def test_an_evaluation_does_not_ask_the_teacher(twins, arguments):
    student, teacher = twins
    plain = make_trainer(student, arguments()).evaluate()
    assert make_trainer(student, arguments(), distillation=DistillationConfig(teacher)).evaluate()[
        "eval_loss"
    ] == pytest.approx(plain["eval_loss"])


def test_a_student_comes_closer_to_its_teacher_and_the_teacher_stays(twins, arguments):
    student, teacher = twins
    before = weights(teacher)
    args = arguments(max_steps=30, learning_rate=3e-3, logging_steps=10)
    trainer = make_trainer(student, args, distillation=DistillationConfig(teacher, weight=1.0))
    trainer.train()
    distances = [entry["distill_loss"] for entry in trainer.state.log_history if "distill_loss" in entry]
    assert distances[-1] < 0.8 * distances[0] and len(distances) == 3
    assert same(weights(teacher), before)


def test_masks_learn_from_the_teacher_too(twins, arguments):
    _, teacher = twins
    student = ReZeroForCausalLM(teacher.config)
    student.load_state_dict(teacher.state_dict())
    args = arguments(max_steps=8, weight_decay=0.1)
    pruning = PruningConfig(target_sparsity=0.3, end_step=6)
    trainer = make_trainer(student, args, pruning=pruning, distillation=DistillationConfig(teacher, weight=1.0))
    trainer.train()
    assert trainer.pruning_report.parameters_after < trainer.pruning_report.parameters_before
    first = trainer.state.log_history[0]
    assert first["distill_loss"] == pytest.approx(0, abs=1e-6)  # the student starts as its teacher


def test_the_arguments_name_a_teacher_by_its_folder(twins, arguments, tmp_path):
    student, teacher = twins
    teacher.save_pretrained(tmp_path / "teacher")
    args = arguments(distill_from=str(tmp_path / "teacher"), distill_temperature=4.0, distill_hidden_weight=0.1)
    trainer = make_trainer(student, args)
    assert same(weights(trainer.teacher), weights(teacher)) and not trainer.teacher.training
    assert (trainer.distillation.temperature, trainer.distillation.hidden_weight) == (4.0, 0.1)
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    assert make_trainer(student, arguments(distill_from="none")).teacher is None


@pytest.mark.parametrize("head", [BertForMaskedLM, BertForSequenceClassification])
def test_models_of_other_tasks_find_their_class(head, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = head(BertConfig(vocab_size=264, **shape))
    student.save_pretrained(tmp_path)
    assert type(load_teacher(str(tmp_path), student)) is head


def test_classes_of_whole_inputs_and_masked_tokens_are_distilled_where_they_have_labels():
    logits = torch.randn(4, 3)
    assert torch.equal(predicted(logits, torch.tensor([0, 2, 1, -100]), False), logits[:3])
    tokens = torch.randn(2, 5, 7)
    labels = torch.full((2, 5), -100).index_put((torch.tensor([1]), torch.tensor([3])), torch.tensor(6))
    assert torch.equal(predicted(tokens, labels, False), tokens[1, 3][None])
    assert torch.equal(predicted(tokens, labels, True), tokens[1, 2][None])
    assert predicted(tokens, None, False).shape == (10, 7)


def test_padding_has_no_part_in_the_hidden_states():
    own, other = [torch.randn(2, 3, 4)], [torch.randn(2, 3, 4)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = (own[0] - other[0])[mask.bool()].square().sum() / other[0][mask.bool()].square().sum()
    torch.testing.assert_close(hidden_state_loss(own, other, mask), expected)


def test_half_precision_is_compared_in_single():
    z, v = torch.randn(5, 9), torch.randn(5, 9)
    assert soft_target_loss(z.bfloat16(), v.bfloat16()).dtype == torch.float32
    assert soft_target_loss(z.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize(("call", "message"), [
    (lambda: DistillationConfig(nn.Linear(2, 2), temperature=0), "distill_temperature=0: expected more than 0"),
    (lambda: DistillationConfig(nn.Linear(2, 2), weight=1.5), "distill_weight=1.5: expected a share"),
    (lambda: DistillationConfig(nn.Linear(2, 2), hidden_weight=-1), "distill_hidden_weight=-1"),
    (lambda: soft_target_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "same vocabulary or classes"),
    (lambda: hidden_state_loss([torch.zeros(1, 2)], [torch.zeros(1, 3)]), "same width"),
    (lambda: predicted(torch.zeros(2, 3), torch.zeros(2, 3), False), "only classes can be distilled"),
    (lambda: load_teacher("x", nn.Linear(2, 2)), "no Auto class knows the task of Linear"),
])  # fmt: skip
def test_what_cannot_be_distilled_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_config_without_teacher_is_refused(twins, arguments):
    with pytest.raises(ValueError, match="from whom shall the model learn"):
        make_trainer(twins[0], arguments(), distillation=DistillationConfig())


def test_a_teacher_with_another_vocabulary_is_refused_in_the_first_step(twins, arguments):
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"300\) from the teacher: expected a teacher with the same vocabulary"):
        make_trainer(twins[0], arguments(), distillation=DistillationConfig(teacher)).train()


def test_the_parent_is_the_trainer_of_transformers_where_nobody_teaches(twins, arguments, monkeypatch):
    called = []
    monkeypatch.setattr(Trainer, "compute_loss", lambda *args, **kwargs: called.append(args) or "loss")
    trainer = make_trainer(twins[0], arguments())
    assert DistillingTrainer.compute_loss(trainer, twins[0].train(), {}) == "loss" and len(called) == 1


def test_the_command_learns_from_the_dense_model_unless_it_is_told_not_to(twins, tmp_path, monkeypatch):
    _, dense = twins
    dense.save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(torch.randint(97, 105, (3050,)).tolist()))
    made = []
    make = prune.make_trainer
    monkeypatch.setattr(prune, "make_trainer", lambda *args: made.append(make(*args)) or made[-1])
    common = (
        f"--model_name_or_path {tmp_path}/dense --train_file {text} --block_size 32 --score magnitude --use_cpu true"
    )
    common += " --disable_tqdm true --report_to none --prune_targets neurons --prune_target_sparsity 0.5 --learning_rate 1e-3"
    for number, extra in enumerate(("--max_steps 2", "--max_steps 2 --distill_from none", "")):
        prune.main([*common.split(), "--output_dir", f"{tmp_path}/{number}", *extra.split()])
    taught, alone, untrained = made
    assert same(weights(taught.teacher), weights(dense)) and taught.args.distill_from == f"{tmp_path}/dense"
    assert alone.teacher is None and untrained.teacher is None
