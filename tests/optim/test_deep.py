"""128 layers without a norm learn under every name."""

import pytest
import torch

from hf_rezero import ReZeroConfig, ReZeroForCausalLM, param_groups
from hf_rezero.optim.registry import parse_optimizer


TEXT = b"the quick brown fox jumps over the lazy dog and runs. "
TORCH = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# name -> learning rate, that of the residual weights, and arguments
NAMES = {
    "radam": (3e-1, 1e-2, None),
    "ranger": (1.0, 1e-2, None),
    "lars": (10.0, 1e-2, "trust_coefficient=0.01"),
    "larc": (0.3, 1e-2, "trust_coefficient=0.1"),
    "ranger_lars": (5.0, 1e-2, None),
    "lamb": (3e-2, 1e-2, None),
    "muon": (3e-2, 1e-2, None),
    "lookahead+adamw": (2e-2, 1e-3, "fused=True"),
    "gc+lookahead+sgd": (0.3, 1e-2, "momentum=0.9,nesterov=True,lookahead_alpha=0.8"),
    "snoo+adamw": (3e-2, 1e-3, "lookahead_k=3"),
}


def build(name, model):
    lr, resweight_lr, text = NAMES[name]
    spec = parse_optimizer(name, text)
    cls, fixed = (spec.base.make, spec.base.fixed) if spec.base else (TORCH[spec.name.base], {})
    groups = param_groups(model, weight_decay=0.01, resweight_learning_rate=resweight_lr)
    return spec.wrap(cls(groups, lr=lr, **spec.arguments, **fixed))


@pytest.mark.parametrize("name", NAMES)
def test_128_layers_learn(name):
    config = ReZeroConfig(
        hidden_size=16, num_hidden_layers=128, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16
    )
    model = ReZeroForCausalLM(config)
    optimizer = build(name, model)
    data = torch.frombuffer(bytearray(TEXT * 3), dtype=torch.uint8).long()
    losses = []
    for t in range(13):
        ids = torch.stack([data[(7 * t + 5 * i) % 80 :][:16] for i in range(8)])
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(5.55, abs=0.2)
    assert losses[-1] < losses[0] - 0.7, losses
    resweights = [p.item() for n, p in model.named_parameters() if n.endswith("resweight")]
    assert len(resweights) == 128 and all(value != 0 for value in resweights)
