"""`--distill_from`: teachers with code of their own, and students with adapters."""

import pytest
from support.stock_models import gpt2
from transformers import AutoModelForCausalLM

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainer
from hf_rezero.commands import clm, prune


CODE = """
from transformers import GPT2Config, GPT2LMHeadModel
class OwnConfig(GPT2Config):
    model_type = "own"
class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture
def files(tmp_path):
    """A text, a student, and a teacher that transformers does not know."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 90)
    student = ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, resweight_init=0.5)
    ReZeroForCausalLM(student).save_pretrained(tmp_path / "student")
    teacher = gpt2()
    teacher.config.auto_map = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    teacher.save_pretrained(tmp_path / "teacher")
    config = tmp_path / "teacher" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "gpt2"', '"model_type": "own"'))
    (tmp_path / "teacher" / "code.py").write_text(CODE)
    return tmp_path


def arguments(files, **extra):
    values = {
        "train_file": files / "text.txt",
        "model_name_or_path": files / "student",
        "output_dir": files / "run",
        "distill_from": files / "teacher",
        "block_size": 32,
        "max_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def teachers(monkeypatch):
    """Those of all Trainers that are built."""
    found, build = [], ReZeroTrainer.__init__

    def noted(self, *args, **kwargs):
        build(self, *args, **kwargs)
        found.append(self.teacher)

    monkeypatch.setattr(ReZeroTrainer, "__init__", noted)
    return found


COMMANDS = {
    "clm": (clm, {"do_train": True}),
    "prune": (prune, {"score": "magnitude", "prune_targets": "neurons", "prune_target_sparsity": 0.3}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_code_of_a_teacher_is_run_where_the_command_trusts_it(files, teachers, name):
    command, extra = COMMANDS[name]
    with pytest.raises(ValueError, match="trust_remote_code"):
        command.main(arguments(files, **extra))
    assert teachers == []
    command.main(arguments(files, **extra, trust_remote_code=True))
    assert [type(teacher).__name__ for teacher in teachers] == ["OwnForCausalLM"]


def test_the_revision_of_the_model_is_not_asked_of_the_teacher(files, teachers, monkeypatch):
    asked = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **options: asked.append((name, options.get("revision"))) or load(name, **options),
    )
    values = {"do_train": True, "trust_remote_code": True, "model_revision": "v2"}
    clm.main(arguments(files, **values))
    assert asked == [(str(files / "student"), "v2"), (str(files / "teacher"), None)]


def test_a_student_with_adapters_learns_from_a_teacher(files, teachers):
    pytest.importorskip("peft", reason="pip install peft")
    clm.main(arguments(files, do_train=True, trust_remote_code=True, lora_r=2))
    assert [type(teacher).__name__ for teacher in teachers] == ["OwnForCausalLM"]


def test_a_dense_model_with_residual_weights_is_reported_once(files, capsys):
    gpt2().save_pretrained(files / "gpt2")
    extra = COMMANDS["prune"][1] | {"model_name_or_path": files / "gpt2", "distill_from": files / "gpt2"}
    prune.main(arguments(files, rezero=True, **extra))
    assert capsys.readouterr().out.count("residual weights on") == 1
