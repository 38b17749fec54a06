"""Names of optimizers and their arguments."""

import pytest
import torch
from torch import nn

from hf_rezero import LAMB, LARS, Muon, RAdam, Ranger, RangerLARS
from hf_rezero.optim.registry import BASES, OUTER, parse_arguments, parse_name, parse_optimizer, split_arguments, wrap


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sgd", (False, None, "sgd")),
        ("ranger", (False, None, "ranger")),
        ("gc+adamw_torch_fused", (True, None, "adamw_torch_fused")),
        ("lookahead+adamw_torch", (False, "lookahead", "adamw_torch")),
        ("snoo+radam", (False, "snoo", "radam")),
        ("gc+lookahead+sgd", (True, "lookahead", "sgd")),
        ("gc+snoo+lars", (True, "snoo", "lars")),
    ],
)
def test_names(text, expected):
    assert parse_name(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "gc+", "+sgd", "lookahead+gc+sgd", "gc+gc+sgd", "lookahead+snoo+sgd", "lookahead+", "ema+sgd", "gc+ema+sgd"],
)
def test_names_that_have_no_meaning(text):
    with pytest.raises(ValueError, match=r"optimiser '.*': expected \[gc\+\]"):
        parse_name(text)


@pytest.mark.parametrize("text", ["gc+ranger", "lookahead+ranger", "snoo+ranger_lars", "gc+lookahead+ranger_lars"])
def test_ranger_takes_no_prefix(text):
    with pytest.raises(ValueError, match="has Lookahead and centralised gradients already"):
        parse_name(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, {}),
        ("", {}),
        ("k=6", {"k": 6}),
        (" betas = (0.9, 0.99) , eps = 1e-6 ", {"betas": (0.9, 0.99), "eps": 1e-6}),
        ("betas=[0.9,0.99],k=3", {"betas": [0.9, 0.99], "k": 3}),
        ("eps=(1e-30,1e-3),clip_threshold=1.0", {"eps": (1e-30, 1e-3), "clip_threshold": 1.0}),
        ("nested=((1,2),[3,4]),x=1", {"nested": ((1, 2), [3, 4]), "x": 1}),
        ("nesterov=True,foreach=None,fused=False", {"nesterov": True, "foreach": None, "fused": False}),
        ("mode=fast,path=a/b=c,lr=-1", {"mode": "fast", "path": "a/b=c", "lr": -1}),
        ("k=6,", {"k": 6}),
    ],
)
def test_arguments(text, expected):
    parsed = parse_arguments(text)
    assert parsed == expected
    assert [type(value) for value in parsed.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("text", ["k", "k:6", "=6", "2k=6", "k=6,7", "a-b=1"])
def test_arguments_that_are_none(text):
    with pytest.raises(ValueError, match=r"optim_args=.*: expected name=value"):
        parse_arguments(text)


def test_arguments_are_split_between_the_optimizer_and_what_is_around_it():
    text = "momentum=0.9,lookahead_k=3,gc_conv_only=True,lookahead_alpha=0.8,lookahead_evaluate_slow=True"
    inner, around = split_arguments(parse_name("gc+lookahead+sgd"), text)
    assert inner == {"momentum": 0.9}
    assert around == {
        "lookahead_k": 3,
        "lookahead_alpha": 0.8,
        "lookahead_evaluate_slow": True,
        "gc_conv_only": True,
    }
    assert split_arguments(parse_name("sgd"), None) == ({}, {})


@pytest.mark.parametrize(
    "name, text, key",
    [
        ("sgd", "lookahead_k=3", "lookahead_k"),
        ("gc+sgd", "lookahead_momentum=0.5", "lookahead_momentum"),
        ("lookahead+sgd", "gc_conv_only=True", "gc_conv_only"),
        ("gc+lookahead+sgd", "lookahead_steps=3", "lookahead_steps"),
        ("ranger", "lookahead_k=3", "lookahead_k"),
    ],
)
def test_arguments_for_what_the_name_does_not_ask_for(name, text, key):
    with pytest.raises(ValueError, match=f"{key}: expected (any of|none)"):
        split_arguments(parse_name(name), text)


def test_wrap_puts_the_defaults_of_the_name_around():
    sgd = lambda: torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)  # noqa: E731
    bare = sgd()
    assert wrap(bare, parse_name("sgd"), {}) is bare and "lookahead_k" not in bare.defaults
    for name, (k, alpha, momentum) in {"lookahead+sgd": (5, 0.5, 0.0), "snoo+sgd": (20, 0.7, 0.5)}.items():
        (group,) = wrap(sgd(), parse_name(name), {}).param_groups
        assert (group["lookahead_k"], group["lookahead_alpha"], group["lookahead_momentum"]) == (k, alpha, momentum)
        assert "gc_conv_only" not in group


def test_wrap_passes_the_arguments_on():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    around = {"lookahead_k": 2, "lookahead_momentum": 0.25, "lookahead_evaluate_slow": True, "gc_conv_only": True}
    (group,) = wrap(optimizer, parse_name("gc+snoo+sgd"), around).param_groups
    assert (group["lookahead_k"], group["lookahead_alpha"], group["lookahead_momentum"]) == (2, 0.7, 0.25)
    assert group["gc_conv_only"] is True and callable(optimizer.eval)


def test_a_wrong_value_of_the_text_is_refused_where_it_is_used():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(ValueError, match="k=2.5"):
        wrap(optimizer, parse_name("lookahead+sgd"), {"lookahead_k": 2.5})


def test_bases():
    assert {name: base.make for name, base in BASES.items()} == {
        "radam": RAdam,
        "ranger": Ranger,
        "lars": LARS,
        "larc": LARS,
        "ranger_lars": RangerLARS,
        "lamb": LAMB,
        "muon": Muon,
    }
    assert {name: base.fixed for name, base in BASES.items() if base.fixed} == {"larc": {"clip": True}}
    assert set(OUTER) == {"lookahead", "snoo"}


def test_a_spec_is_read_once():
    assert parse_optimizer("gc+lars", "eps=1e-6") is parse_optimizer("gc+lars", "eps=1e-6")
    assert parse_optimizer("adafactor").base is None
    with pytest.raises(ValueError, match="'adafactor', for which GradInit has no trial step; it has one for radam, "):
        parse_optimizer("adafactor").trial_step  # noqa: B018
