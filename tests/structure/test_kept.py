"""What every part of the library asks of a network."""

import pytest
import torch
from torch import nn

from hf_rezero.pruning import attach_masks, find_groups, output_of, recalibrate_batchnorm_, taylor
from hf_rezero.structure.kept import modes_kept


def net_with_a_frozen_norm():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Dropout()
    )
    net.train()
    net[1].eval()
    return net


LOOKS = {
    "output_of": lambda net, x: output_of(net, x),
    "taylor": lambda net, x: taylor(net, find_groups(net), [x], lambda model, batch: model(batch).square().mean()),
    "recalibrate_batchnorm_": lambda net, x: recalibrate_batchnorm_(net, [x]),
    "masks": lambda net, x: attach_masks(net, find_groups(net)).detach_(),
}


@pytest.mark.parametrize("name", LOOKS)
def test_looking_at_a_model_leaves_the_mode_of_every_module(name):
    net, x = net_with_a_frozen_norm(), torch.randn(2, 1, 8, 8)
    LOOKS[name](net, x)
    assert [module.training for module in net] == [True, False, True, True, True, True]
    if name != "masks":
        with pytest.raises(RuntimeError):
            LOOKS[name](net, torch.randn(2, 3, 8, 8))
        assert [module.training for module in net] == [True, False, True, True, True, True]


def test_modes_come_back_after_an_error():
    net = net_with_a_frozen_norm()
    with pytest.raises(KeyError), modes_kept(net):
        net.eval()
        raise KeyError
    assert net[0].training and not net[1].training
