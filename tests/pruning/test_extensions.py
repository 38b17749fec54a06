"""What is not in the tables is added from outside in a few lines: an architecture, a kind of mask."""

import pytest
import torch
from torch import nn

from hf_rezero.pruning import attach_masks, find_groups, magnitude, prune_, remove_pruned_, select
from hf_rezero.pruning.mask_layers import MASK_LAYERS, MaskLayer
from hf_rezero.pruning.penalty import Penalty
from hf_rezero.structure.architectures import ARCHITECTURES, Architecture, FeedForward, ResidualLayer


class Attention(nn.Module):
    """Four heads of two features with names that no rule knows."""

    def __init__(self):
        super().__init__()
        self.head_dim = 2
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        return self.wo(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x + Attention(N(x)), then x + W2 relu(W1 x)."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention()
        self.w1, self.w2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.w2(self.w1(x).relu())


TOY = Architecture(
    attention=("wq", "wk", "wv", "wo"),
    feed_forwards=(FeedForward(("w1",), "w2"),),
    layers=(ResidualLayer(("attention.wo", "w2"), branch_norms=("norm",)),),
)


def test_an_architecture_is_one_row_of_the_table(monkeypatch):
    net, x = nn.Sequential(Layer(), Layer()), torch.randn(3, 5, 8)
    with pytest.raises(ValueError, match="no rule finds heads, neurons, channels in Sequential"):
        find_groups(net)
    monkeypatch.setitem(ARCHITECTURES, "toy", TOY)
    kinds = {group.name: (group.kind, group.num_units) for group in find_groups(net)}
    assert kinds["0.attention"] == ("heads", 4) and kinds["1"] == ("neurons", 12)
    (layers,) = find_groups(net, ["layers"])
    assert layers.gates[0] == ("0.attention.wo.weight", "0.w2.weight", "0.w2.bias")
    groups = [group for group in find_groups(net) if group.name in ("0.attention", "1")]
    kept = select(net, groups, magnitude(net, groups), sparsity=0.4)
    masked = attach_masks(net, groups)
    for name, values in masked.split(masked.layer.mask.data).items():
        values.zero_().index_fill_(0, kept[name], 1.0)
    expected = net.eval()(x)
    masked.detach_()
    prune_(net, groups, kept)
    torch.testing.assert_close(net(x), expected)
    assert net[0].attention.wq.out_features < 8 and net[1].w1.out_features < 12


class Halving(MaskLayer):
    """Factors that halve with every step, the later ones first."""

    kind = "halving"
    learning_rate = 0.1
    steered = Penalty

    def __init__(self, num_units, floor=0.3):
        super().__init__()
        self.floor = floor
        self.register_buffer("factors", torch.ones(num_units))
        self.mask = nn.Parameter(torch.zeros(num_units))

    def forward(self, num_examples=None):
        return self.estimate() + 0 * self.mask

    def estimate(self):
        return torch.where(self.factors < self.floor, 0.0, self.factors)

    def settle(self):
        self.factors[len(self.factors) // 2 :] *= 0.5


def test_a_kind_of_mask_is_one_class_in_the_registry(monkeypatch):
    monkeypatch.setitem(MASK_LAYERS, "halving", Halving)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = attach_masks(net, find_groups(net), "halving", floor=0.2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(3):
        (net(torch.ones(2, 4)).square().mean() + masks.penalty()).backward()
        masks.before_step()
        optimizer.step()
        masks.after_step()
    report = remove_pruned_(net, masks, batch=torch.ones(2, 4))
    assert report.method == "halving" and net[0].out_features == 4 and report.max_difference < 1e-6
