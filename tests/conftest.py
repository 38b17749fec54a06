import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from hf_rezero import ReZeroConfig, ReZeroTrainingArguments


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_config():
    """Small configs with a residual weight that is not zero: at zero a model that ignores its input passes most tests."""

    def make(**values):
        shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
        return ReZeroConfig(**{**shape, "resweight_init": 0.7, **values})

    return make


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 20))


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a short run on the CPU."""

    def make(**values):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "learning_rate": 1e-2,
            "logging_nan_inf_filter": False,
        }
        return ReZeroTrainingArguments(**{**defaults, **values})

    return make
