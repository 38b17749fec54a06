"""Who may import whom: DESIGN of the library, held by a scan of the sources."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import hf_rezero
from hf_rezero.moved import MOVED


PACKAGE = Path(hf_rezero.__file__).parent
REPOSITORY = PACKAGE.parent
# what each part may import from elsewhere, and which of our own parts; each may import itself
RULES = {
    "models": ({"torch", "transformers", "PIL"}, set()),
    "structure": ({"torch", "numpy"}, set()),
    "files": (set(), set()),
    "layers": ({"torch"}, {"structure"}),
    "picture": ({"matplotlib", "cycler"}, {"files"}),
    "plots": ({"matplotlib"}, {"files", "picture"}),
    "notebook": (set(), set()),
    "moved": (set(), set()),
    "metrics": ({"evaluate", "datasets", "gradio"}, set()),
    "optim": ({"torch", "numpy"}, {"structure", "files"}),
    "initialization": ({"torch", "numpy", "tqdm"}, {"optim", "structure", "files", "notebook", "picture", "plots"}),
    "pruning": ({"torch", "numpy", "safetensors"}, {"rewrite", "structure", "files", "notebook", "picture", "plots"}),
    "rewrite": ({"torch", "numpy", "transformers"}, {"structure", "files"}),
    "diagnostics": ({"torch", "numpy"}, {"structure", "files", "notebook", "picture", "plots"}),
    "data": ({"torch", "numpy", "datasets", "PIL", "tokenizers", "transformers", "tqdm"}, {"files"}),
    "publish": (
        {"torch", "huggingface_hub", "safetensors", "transformers", "jinja2", "yaml"},
        {"data", "diagnostics", "files", "plots", "pruning", "structure"},
    ),
    "trainer": (
        {"torch", "numpy", "transformers", "accelerate", "safetensors", "huggingface_hub", "tqdm"},
        {
            "data",
            "diagnostics",
            "files",
            "initialization",
            "metrics",
            "optim",
            "plots",
            "pruning",
            "publish",
            "structure",
        },
    ),
    "commands": (
        {"torch", "numpy", "transformers", "datasets", "evaluate", "peft", "yaml", "tqdm", "PIL", "huggingface_hub"},
        {
            "data",
            "diagnostics",
            "files",
            "models",
            "optim",
            "plots",
            "pruning",
            "publish",
            "rewrite",
            "structure",
            "trainer",
        },
    ),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    """The first folder or file of the package that holds the path."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """The dotted names of all that a file imports, relative ones in full."""
    package = ".".join(path.relative_to(REPOSITORY).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = resolve_name(relative, package) if node.level else node.module
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if module == "hf_rezero")


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in RULES], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_file_imports_only_what_its_part_may(path):
    others, ours = RULES[part_of(path)]
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        if top == "hf_rezero":
            is_public = part_of(path) == "commands" and (not rest or rest in hf_rezero.__all__)
            assert is_public or rest.split(".")[0] in {part_of(path), *ours}, module
        else:
            assert top in others or top in sys.stdlib_module_names, module


def test_every_file_of_the_package_has_a_rule():
    assert {part_of(path) for path in FILES} - RULES.keys() <= {"__init__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("models/*/*.py")), ids=lambda path: path.name)
def test_a_file_of_the_hub_imports_only_torch_transformers_and_its_own_configuration(path):
    for module in imported_modules(path):
        is_own = module == f"hf_rezero.models.{path.parent.name}.configuration_{path.parent.name}"
        assert module.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names} or is_own, module


def test_the_file_of_rewritten_models_imports_only_torch_and_transformers():
    for module in imported_modules(PACKAGE / "rewrite" / "modeling_rewritten.py"):
        assert module.split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}, module


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_use_no_private_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_rezero"):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


def test_public_names_are_pinned():
    assert hf_rezero.__all__ == [
        "LAMB",
        "LARS",
        "DistillationConfig",
        "GradInitConfig",
        "Muon",
        "PruningConfig",
        "RAdam",
        "RZTXDecoderLayer",
        "RZTXEncoderLayer",
        "Ranger",
        "RangerLARS",
        "ReZero",
        "ReZeroConfig",
        "ReZeroForCausalLM",
        "ReZeroForMaskedLM",
        "ReZeroForSequenceClassification",
        "ReZeroForTokenClassification",
        "ReZeroMLPConfig",
        "ReZeroMLPForImageClassification",
        "ReZeroMLPModel",
        "ReZeroModel",
        "ReZeroResNetConfig",
        "ReZeroResNetForImageClassification",
        "ReZeroResNetModel",
        "ReZeroTrainer",
        "ReZeroTrainingArguments",
        "byte_tokenizer",
        "centralize_gradients",
        "fold_resweight_",
        "gradinit_",
        "grow_",
        "jacobian_spectrum",
        "layout_",
        "load_corpus",
        "lookahead",
        "metainit_",
        "param_groups",
        "rezero_",
    ]
    assert all(hasattr(hf_rezero, name) for name in hf_rezero.__all__)


def test_importing_the_library_does_not_import_matplotlib():
    code = "import sys, hf_rezero; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_the_library_imports_no_trainer_and_no_data_sets():
    code = "import sys, hf_rezero; print({'transformers.trainer', 'datasets', 'evaluate'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_rewriting_a_model_imports_no_other_family():
    code = """
import sys, transformers, hf_rezero
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
hf_rezero.rezero_(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
print({f"transformers.models.{family}" for family in ("bert", "llama", "t5")} & sys.modules.keys())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "{'transformers.models.llama'}"


@pytest.mark.parametrize("old", MOVED)
def test_a_module_that_has_moved_is_found_under_its_old_name(old):
    with pytest.warns(DeprecationWarning, match=f"hf_rezero.{old} has moved: import from hf_rezero.{MOVED[old]}"):
        sys.modules.pop(f"hf_rezero.{old}", None)
        module = importlib.import_module(f"hf_rezero.{old}")
    assert module is sys.modules[f"hf_rezero.{MOVED[old]}"]


def test_help_says_where_to_start_and_names_only_what_exists():
    table = re.findall(r"^    [\w ]{17}(.+)$", inspect.getdoc(hf_rezero).partition("Example:")[0], re.MULTILINE)
    assert len(table) == 10
    for line in table:
        module = hf_rezero
        if found := re.match(r"(hf_rezero\.\w+): (.+)", line):
            module, line = importlib.import_module(found[1]), found[2]
        names = re.findall(r"\b(?:[A-Z]\w*[A-Z]\w+|\w+_\w*)(?=[(,; ]|$)", line)
        keywords = {"num_hidden_layers", "num_layers", "learning_rate", "weight_decay"}
        missing = [n for n in names if n not in keywords and not hasattr(module, n) and not hasattr(hf_rezero, n)]
        assert names and not missing
