"""Who may import whom: DESIGN of the library, held by a scan of the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_rezero


PACKAGE = Path(hf_rezero.__file__).parent
ALLOWED = {
    "models/rezero/configuration_rezero.py": {"transformers"},
    "models/rezero/modeling_rezero.py": {"torch", "transformers", "configuration_rezero"},
    **{
        f"models/{name}/{kind}_{name}.py": allowed
        for name in ("rezero_mlp", "rezero_resnet")
        for kind, allowed in (
            ("configuration", {"transformers"}),
            ("modeling", {"torch", "transformers", f"configuration_{name}"}),
        )
    },
    "models/image_processing_gray.py": {"PIL", "transformers"},
    "images.py": {"torch", "numpy", "datasets", "PIL"},
    "schedules.py": {"torch", "numpy"},
    "layers.py": {"torch"},
    **{f"structure/{path.name}": {"torch"} for path in PACKAGE.glob("structure/*.py")},
    **{
        f"optim/{path.name}": {"torch", *(p.stem for p in path.parent.glob("*.py"))}
        for path in PACKAGE.glob("optim/*.py")
    },
    **{
        f"pruning/{path.name}": {"torch", "structure", *(p.stem for p in path.parent.glob("*.py"))}
        | ({"safetensors"} if path.stem == "storage" else set())
        for path in PACKAGE.glob("pruning/*.py")
    },
    "grow.py": {"torch", "pruning"},
    "hub.py": {"huggingface_hub", "safetensors", "transformers", "model_card"},
    "model_card.py": {
        *("huggingface_hub", "jinja2", "pruning", "run_record", "safetensors", "tokenization", "yaml"),
    },
    "run_record.py": {"torch", "diagnostics", "plots", "tokenization"},
    "metrics/__init__.py": {"evaluate"},
    "metrics/bits_per_byte/bits_per_byte.py": {"datasets", "evaluate"},
    "metrics/bits_per_byte/app.py": {"evaluate", "gradio"},
    "dead_branches.py": {"torch"},
    "fold.py": {"torch"},
    "convert.py": {"torch"},
    "trial.py": {"torch", "numpy"},
    "gradinit.py": {"torch", "matplotlib", "optim", "plots", "trial"},
    "metainit.py": {"torch", "gradinit", "optim", "trial"},
    "diagnostics.py": {"torch", "numpy", "optim"},
    "plots.py": {"matplotlib"},
    "data.py": {"torch", "numpy", "datasets"},
    "tokenization.py": {"tokenizers", "transformers"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        yield from (m.split(".")[0] for m in modules if m.split(".")[0] not in sys.stdlib_module_names)


@pytest.mark.parametrize("file", ALLOWED)
def test_each_file_imports_only_what_it_may(file):
    assert set(imported(PACKAGE / file)) <= ALLOWED[file]


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_use_no_private_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_rezero"):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


def test_public_names_are_pinned():
    assert hf_rezero.__all__ == [
        "LAMB",
        "LARS",
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
        "load_corpus",
        "lookahead",
        "metainit_",
        "param_groups",
    ]
    assert all(hasattr(hf_rezero, name) for name in hf_rezero.__all__)


def test_importing_the_library_does_not_import_matplotlib():
    code = "import sys, hf_rezero; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
