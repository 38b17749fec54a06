"""Files of arguments: what they say, and one error with the line for each thing that they cannot say."""

import json

import pytest

from hf_rezero.commands.running import ModelArguments, parse_arguments
from hf_rezero.commands.texts import DataArguments
from hf_rezero.trainer import ReZeroTrainingArguments


def _parsed(path, content, *words):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    classes = (ModelArguments, DataArguments, ReZeroTrainingArguments)
    return parse_arguments(classes, "", [str(path), "--output_dir", str(path.parent / "run"), *words])


def test_values_are_those_of_the_command_line(tmp_path):
    model, data, training = _parsed(
        tmp_path / "run.yaml",
        """
learning_rate: 1e-3
warmup_steps: 1_000
block_size: 64
eval_stride: null
model_revision: 1.10
run_name: 2026-01-01
save_strategy: no
do_train: yes
optim_args: betas=(0.9, 0.99)
lr_scheduler_kwargs: {points: [[0, 0], [1, 1]]}
label_names: [a, b]
""",
        "--block_size",
        "32",
    )
    assert (training.learning_rate, training.warmup_steps, training.do_train) == (1e-3, 1000, True)
    assert (data.block_size, data.eval_stride, model.model_revision) == (32, None, "1.10")
    assert (training.run_name, training.save_strategy) == ("2026-01-01", "no")
    assert training.lr_scheduler_kwargs == {"points": [[0, 0], [1, 1]]} and training.label_names == ["a", "b"]


def test_json_and_empty_files_are_read(tmp_path):
    content = json.dumps({"block_size": 16, "do_train": True, "learning_rate": 0.5})
    _, data, training = _parsed(tmp_path / "run.json", content)
    assert (data.block_size, training.do_train, training.learning_rate) == (16, True, 0.5)
    assert _parsed(tmp_path / "empty.yaml", "")[1].block_size == 512


@pytest.mark.parametrize(
    "content, message",
    [
        ("- a\n- b", "line 1: got no arguments, expected lines of the form `name: value`"),
        ("just a text", "line 1: got no arguments"),
        ("\n1: 2", "line 2: got the name '1', expected a text"),
        ("null: 2", "line 1: got the name 'null', expected a text"),
        ("? [a, b]\n: 1", r"line 1: got the name .*, expected a text"),
        ("block_size: 16\n\nblock_size: 32", "line 3: block_size stands in line 1 already"),
        ("do_train: true\nblocksize: 3", r"line 2: unknown argument blocksize: did you mean block_size\?"),
        ("xyzzy_plugh: 3", "line 1: unknown argument xyzzy_plugh: see --help for the names"),
        ("help: true", "unknown argument help"),
        ("block_size: 010", "line 1: block_size is 010, which YAML reads in another base"),
        ("warmup_steps: 12:30", "line 1: warmup_steps is 12:30, which YAML reads in another base"),
        ("\nblock_size: null", "line 2: block_size is null: leave the line out for the default, 512"),
        ("learning_rate: .nan", r"line 1: learning_rate is \.nan: expected a finite number"),
        ("learning_rate: .inf", r"line 1: learning_rate is \.inf: expected a finite number"),
        ("learning_rate: true", "line 1: learning_rate is 'true': expected float"),
        ("learning_rate: fast", "line 1: learning_rate is 'fast': expected float"),
        ("block_size: 1.5", "line 1: block_size is '1.5': expected int"),
        ("block_size: [1, 2]", "line 1: block_size has a list: expected one value"),
        ("block_size: {a: 1}", "line 1: block_size has names with values: expected one value"),
        ("do_train: perhaps", "line 1: do_train is 'perhaps': expected true or false"),
        ("save_strategy: sometimes", "line 1: save_strategy is 'sometimes': expected .*steps"),
        ("lr_scheduler_kwargs: {a: 2026-01-01}", "line 1: lr_scheduler_kwargs has values that JSON does not know"),
        ("lr_scheduler_kwargs: {a: .nan}", "line 1: lr_scheduler_kwargs has values that JSON does not know"),
        ("label_names: [[a]]", "line 1: label_names has a list of more than plain values"),
        ("run_name: !!python/object:os.system x", "line 1: run_name has a value with the tag .*, which is not read"),
        ("do_train: true\n  bad: [", "line 2: it is neither YAML nor JSON"),
        ("run_name: *gone", "line 1: it is neither YAML nor JSON"),
        ("run_name: &a [*a]", "got more than 10000 values, references"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "\n".join(
            f"{x}: &{x} [{', '.join([f'*{y}'] * 10)}]" for x, y in zip("bcdefghi", "abcdefgh", strict=True)
        ), "got more than 10000 values, references"),
        ("[" * 5000, "it is neither YAML nor JSON"),
        (b"run_name: \xff", "is not a text in UTF-8"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say_gets_one_error_with_the_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        _parsed(tmp_path / "run.yaml", content)
    assert str(error.value).startswith(str(tmp_path / "run.yaml"))


def test_the_command_line_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="got --learning_rate nan: expected a number"):
        _parsed(tmp_path / "run.yaml", "", "--learning_rate", "nan")
