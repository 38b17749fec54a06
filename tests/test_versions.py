"""Releases of transformers: a checkpoint of one loads and generates in another, and each name that we read is there.

`HF_REZERO_OTHER_PYTHONS` names interpreters with other releases, separated by `:`; `make test-newest` sets it.
"""

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import hf_rezero
from hf_rezero import (
    ReZeroForCausalLM,
    ReZeroForSequenceClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
)


PACKAGE = Path(hf_rezero.__file__).parent
HERE = Path(sys.executable)
OTHERS = [Path(path) for path in os.environ.get("HF_REZERO_OTHER_PYTHONS", "").split(":") if path]
UNEQUAL = {
    0: {"skip": ["attention"]},
    2: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24},
}

RUN = """
import sys, torch
sys.modules["hf_rezero"] = None  # importing it now raises ImportError
import transformers
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    auto_class, inputs = torch.load(folder + "/inputs.pt")
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    outputs = {"version": transformers.__version__, "logits": model(**inputs).logits.detach(), "texts": []}
    if model.can_generate():
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        modes = ({}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"})
        outputs["texts"] = [model.generate(**inputs, **options, **mode) for mode in modes]
    torch.save(outputs, folder + "/result.pt")
"""

SAVE = """
import sys, torch
from hf_rezero import ReZeroConfig, ReZeroForCausalLM
torch.manual_seed(0)
shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "resweight_init": 0.7}
model = ReZeroForCausalLM(ReZeroConfig(**shape, initializer_range=1.0))
model.save_pretrained(sys.argv[1])
torch.save(("AutoModelForCausalLM", {"input_ids": torch.randint(0, 256, (2, 20))}), sys.argv[1] + "/inputs.pt")
"""


@pytest.fixture
def models(make_config, ids):
    """(Auto class, model, inputs) by name; the texts are padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    text, pictures = {"input_ids": ids, "attention_mask": mask}, {"pixel_values": torch.randn(2, 3, 16, 16)}
    make = lambda **values: make_config(initializer_range=1.0, num_labels=3, **values)  # noqa: E731
    resnet = ReZeroResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], resweight_init=0.5, num_labels=3
    )
    mlp = ReZeroMLPConfig(image_size=16, num_hidden_layers=2, hidden_size=16, resweight_init=0.5, num_labels=3)
    return {
        "rotary": ("AutoModelForCausalLM", ReZeroForCausalLM(make()), text),
        "unequal": ("AutoModelForCausalLM", ReZeroForCausalLM(make(per_layer_config=UNEQUAL)), text),
        "learned": ("AutoModelForCausalLM", ReZeroForCausalLM(make(position_embedding_type="learned")), text),
        "encoder": (
            "AutoModelForSequenceClassification",
            ReZeroForSequenceClassification(make(is_causal=False)),
            text,
        ),
        "resnet": ("AutoModelForImageClassification", ReZeroResNetForImageClassification(resnet), pictures),
        "mlp": ("AutoModelForImageClassification", ReZeroMLPForImageClassification(mlp), pictures),
    }


def run(python, code, *arguments):
    """Run `code` in the interpreter, with this package where the code imports it."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{python}:\n{done.stderr[-3000:]}"


def outputs(python, folders):
    """What the checkpoints compute in this environment, by folder."""
    run(python, RUN, *folders)
    return {folder: torch.load(folder / "result.pt") for folder in folders}


def check_same(there, here):
    """Equal logits and texts of two releases, where cached, uncached and static greedy texts are one."""
    assert there["version"] != here["version"]
    torch.testing.assert_close(there["logits"], here["logits"], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(there["texts"], here["texts"], strict=True))
    if here["texts"]:
        cached, uncached, _, static = here["texts"]
        assert torch.equal(cached, uncached) and torch.equal(cached, static)


@pytest.mark.skipif(not OTHERS, reason="HF_REZERO_OTHER_PYTHONS names no interpreter with another transformers")
def test_a_checkpoint_computes_the_same_in_every_environment(models, tmp_path):
    for name, (auto_class, model, inputs) in models.items():
        model.eval().save_pretrained(tmp_path / name)
        torch.save((auto_class, inputs), tmp_path / name / "inputs.pt")
    folders = [tmp_path / name for name in models]
    here = outputs(HERE, folders)
    for python in OTHERS:
        there = outputs(python, folders)
        for folder in folders:
            check_same(there[folder], here[folder])


@pytest.mark.skipif(not OTHERS, reason="HF_REZERO_OTHER_PYTHONS names no interpreter with another transformers")
@pytest.mark.parametrize("python", OTHERS, ids=str)
def test_a_checkpoint_of_another_environment_computes_the_same_here(tmp_path, python):
    run(python, SAVE, tmp_path)
    there, here = (outputs(p, [tmp_path])[tmp_path] for p in (python, HERE))
    check_same(there, here)


# names


def imported_names():
    """(file, line, module, name) of all that the package and its commands import from transformers."""
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
                yield from ((path, node.lineno, node.module, alias.name) for alias in node.names)


def upstream(module, name):
    """The object or submodule of this name, or None."""
    found = getattr(importlib.import_module(module), name, None)
    if found is None and importlib.util.find_spec(f"{module}.{name}"):
        return importlib.import_module(f"{module}.{name}")
    return found


def test_transformers_has_every_name_that_we_import():
    missing = [
        f"{module}.{name}, imported in {path.relative_to(PACKAGE.parent)}:{line}"
        for path, line, module, name in imported_names()
        if upstream(module, name) is None
    ]
    assert not missing, f"transformers {transformers.__version__} lacks " + "; ".join(missing)


def keywords_passed(path):
    """(line, function, keyword) of the calls in a file of functions that it imports from transformers."""
    tree, functions = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            functions |= {alias.name: upstream(node.module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            yield from ((node.lineno, functions[node.func.id], k.arg) for k in node.keywords if k.arg)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("modeling_*.py")), ids=lambda path: path.stem)
def test_transformers_takes_every_argument_that_the_models_pass(path):
    """The masks, outputs and layers that the Hub files call; a renamed argument is named here before it is swallowed."""
    for line, function, keyword in keywords_passed(path):
        parameters = inspect.signature(function).parameters
        assert keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()), (
            f"transformers {transformers.__version__}: {function.__name__} has no argument {keyword}, which "
            f"{path.name}:{line} passes"
        )
