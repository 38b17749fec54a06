"""What `print(model)` says of the residual weights."""

import pytest
import torch

from hf_rezero import (
    ReZero,
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroMLPConfig,
    ReZeroMLPModel,
    ReZeroModel,
    ReZeroResNetConfig,
    ReZeroResNetModel,
)


SMALL = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
MODELS = {
    "text": lambda: ReZeroModel(ReZeroConfig(**SMALL)),
    "mlp": lambda: ReZeroMLPModel(ReZeroMLPConfig(hidden_size=8, num_hidden_layers=3)),
    "resnet": lambda: ReZeroResNetModel(ReZeroResNetConfig(hidden_sizes=[8], depths=[3], embedding_size=8)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_tells_its_residual_weights_in_one_line(make):
    model = make()
    weights = [p for name, p in model.named_parameters() if name.endswith("resweight")]
    for i, weight in enumerate(weights):
        weight.data.fill_(0.25 * (i - 1))
    assert len(weights) == 3 and repr(model).count("\n  3 residual weights from -0.25 to 0.25\n") == 1
    with torch.device("meta"):
        assert "residual weights" not in repr(make())


def test_equal_layers_stay_one_line():
    model = ReZeroForCausalLM(ReZeroConfig(**SMALL))
    before = repr(model).count("\n")
    for i, layer in enumerate(model.model.layers):
        next(p for name, p in layer.named_parameters() if name.endswith("resweight")).data.fill_(float(i))
    assert repr(model).count("\n") == before and "(0-2): 3 x" in repr(model)


def test_a_model_without_residual_weights_says_nothing_of_them():
    without = {"resweight_sharing": "none", "resweight_init": 1.0, "resweight_trainable": False}
    model = ReZeroModel(ReZeroConfig(**SMALL, **without, norm_position="pre"))
    assert "residual weight" not in repr(model)


def test_the_wrapper_tells_its_own():
    assert "resweight=0.5" in repr(ReZero(torch.nn.Linear(2, 2), resweight_init=0.5))
    assert "resweight" not in repr(ReZero(torch.nn.Linear(2, 2)).to("meta"))
