"""The arguments of transformers' own scripts: the page says of each whether a command takes it, and that is so."""

import contextlib
import importlib
import io
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hf_rezero.commands import clm


PAGE = Path(__file__).parents[2] / "docs" / "guides" / "arguments.md"
HUB = "cache_dir model_revision token trust_remote_code use_auth_token"
TEXT_MODEL = f"model_name_or_path config_name tokenizer_name use_fast_tokenizer {HUB}"
DATA = "dataset_name dataset_config_name max_train_samples max_eval_samples"
FILES = f"{DATA} train_file validation_file overwrite_cache"
LANGUAGE = f"{TEXT_MODEL} {FILES} model_type config_overrides dtype streaming validation_split_percentage"
LANGUAGE += " preprocessing_num_workers"
# what the dataclasses of examples/pytorch of transformers declare, beside TrainingArguments
SCRIPTS = {
    "run_clm.py": ("clm", f"{LANGUAGE} block_size keep_linebreaks"),
    "run_mlm.py": ("mlm", f"{LANGUAGE} max_seq_length mlm_probability line_by_line pad_to_max_length"),
    "run_glue.py": (
        "classify-texts",
        f"{TEXT_MODEL} {FILES} task_name max_seq_length pad_to_max_length max_predict_samples test_file "
        "ignore_mismatched_sizes",
    ),
    "run_ner.py": (
        "classify-tokens",
        f"cache_dir model_revision token trust_remote_code {DATA} model_name_or_path config_name tokenizer_name "
        "ignore_mismatched_sizes task_name train_file validation_file test_file text_column_name label_column_name "
        "overwrite_cache preprocessing_num_workers max_seq_length pad_to_max_length max_predict_samples label_all_tokens "
        "return_entity_level_metrics",
    ),
    "run_image_classification.py": (
        "classify-images",
        f"{HUB} {DATA} model_name_or_path model_type config_name image_processor_name feature_extractor_name "
        "ignore_mismatched_sizes train_dir validation_dir train_val_split image_column_name label_column_name",
    ),
}


@cache
def flags_of(command):
    module = importlib.import_module(f"hf_rezero.commands.{command.replace('-', '_')}")
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"(?<![\w-])--(\w+)", shown.getvalue()))


@cache
def table_of(script):
    """The rows of the page: of each argument whether it is taken, and the words about it."""
    section = PAGE.read_text().partition(f"## {script}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (.*?) \|$", section, re.MULTILINE)
    return {name: (taken == "yes", words) for name, taken, words in rows}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_has_every_argument_of_a_script(script):
    assert table_of(script).keys() == set(SCRIPTS[script][1].split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_page_says_is_taken_is_taken_and_the_rest_has_a_reason(script):
    known = flags_of(SCRIPTS[script][0])
    for name, (taken, words) in table_of(script).items():
        assert taken == (name in known), name
        assert taken or len(words) > 20, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_training_argument_of_the_installed_release_is_taken(script):
    assert {field.name for field in fields(TrainingArguments) if field.init} <= flags_of(SCRIPTS[script][0])


@pytest.mark.parametrize(("words", "message"), [
    (["--lerning_rate", "1e-3"], "unknown argument --lerning_rate: did you mean --learning_rate?"),
    (["--tokeniser_name=x"], "unknown argument --tokeniser_name: did you mean --tokenizer_name?"),
    (["--xyzzy_plugh", "3"], "unknown argument --xyzzy_plugh: see --help for the names"),
    (["--use_cpu", "true", "stray"], "unknown argument stray: see --help"),
])  # fmt: skip
def test_an_unknown_argument_is_an_error_that_names_the_nearest(words, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        clm.main(["--output_dir", str(tmp_path), "--train_file", "x", "--do_train", *words])
