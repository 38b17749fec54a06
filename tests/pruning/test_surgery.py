"""Physical removal: the pruned model is the masked one, can be saved, loaded, generated from and trained further."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from support.pruning_models import (
    AUTO,
    IMAGE,
    OTHERS,
    REZERO_IMAGE,
    STOCK,
    TEXT,
    build,
    rezero,
    seed_net,
    set_masks,
    stir,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from hf_rezero import LAMB, Ranger, lookahead, param_groups
from hf_rezero.pruning import (
    Cut,
    PruningGroup,
    attach_masks,
    find_groups,
    load_pruned,
    mean_activations,
    prune_,
    recalibrate_batchnorm_,
    remove_pruned_,
    save_pruned,
)
from hf_rezero.pruning.activations import output_of
from hf_rezero.pruning.report import from_ranges, to_ranges


POST_NORM = ("opt_post_norm", "bart")  # whose layers cannot be switched off
LAYERED = ("rezero", "rezero_gqa", "gpt2", "llama", *(name for name in STOCK if name not in POST_NORM))
KINDS = [
    *((name, ("heads",)) for name in TEXT | OTHERS),
    *((name, ("neurons",)) for name in TEXT | OTHERS),
    *((name, ("channels",)) for name in IMAGE if name != "rezero_mlp"),
    *(("seed_net", kinds) for kinds in (("neurons",), ("channels", "neurons"))),
    ("whisper", ("channels",)),
    *((name, ("layers",)) for name in (*LAYERED, "resnet", "bottleneck_resnet")),
    *((name, ("layers",)) for name in REZERO_IMAGE),
    *((name, ("channels", "layers")) for name in ("rezero_resnet", "rezero_bottleneck", "plain_resnet")),
    *((name, ("heads", "neurons", "layers")) for name in LAYERED),
    *(("rezero_gqa", kinds) for kinds in (("sublayers",), ("width",), ("sublayers", "width", "heads", "neurons"))),
]


def pruned(name, targets, dtype=torch.float64, seed=0, closed=0.4, kind="l1", **options):
    model, batch = build(name, dtype)
    masks = attach_masks(model, find_groups(model, targets), kind)
    set_masks(masks, closed, seed)
    return model, batch, remove_pruned_(model, masks, batch=batch, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("name", "targets"), KINDS, ids=lambda value: "+".join(value) if isinstance(value, tuple) else value
)
def test_the_pruned_model_is_the_masked_one(name, targets, dtype, tolerance):
    model, batch, report = pruned(name, targets, dtype, seed=1)
    before = output_of(build(name, dtype)[0], batch)
    assert report.max_difference <= tolerance
    assert (output_of(model, batch) - before).abs().max() > 100 * tolerance
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    left = report.left_by_kind()
    assert set(left) == set(targets) and all(kept < former for kept, former in left.values())
    assert not any("mask" in key for key in model.state_dict())


# transformers writes the tensors of these under other names than they have in memory
RENAMED = ("gpt_neox", "gpt_neox_sequential", "vit")


@pytest.mark.parametrize(
    ("name", "targets"),
    [kind for kind in KINDS if kind[0] not in RENAMED],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else value,
)
def test_a_pruned_model_comes_back(name, targets, tmp_path):
    model, batch, _ = pruned(name, targets, torch.float32, seed=1)
    save_pruned(model, tmp_path)
    torch.manual_seed(0)
    if name in REZERO_IMAGE:
        again = AutoModelForImageClassification.from_pretrained(tmp_path)
    elif name.startswith("rezero"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    elif hasattr(model, "config") and name in TEXT:
        again = load_pruned(tmp_path, AUTO[name].from_config(AutoConfig.from_pretrained(tmp_path)))
    else:
        again = load_pruned(tmp_path, build(name, torch.float32, seed=5)[0])
    assert torch.equal(output_of(again, batch), output_of(model, batch))


@pytest.mark.parametrize("name", STOCK)
def test_a_pruned_family_of_transformers_comes_back_through_its_auto_class(name, tmp_path):
    targets = ("heads", "neurons", "layers") if name in LAYERED else ("heads", "neurons")
    model, batch, _ = pruned(name, targets, torch.float32, seed=1)
    model.save_pretrained(tmp_path)
    again = AUTO[name].from_pretrained(tmp_path)
    assert torch.equal(output_of(again, batch), output_of(model, batch))


@pytest.mark.parametrize("name", [name for name in (*LAYERED, "resnet", "bottleneck_resnet") if "rezero" not in name])
def test_layers_alone_need_no_help_to_come_back(name, tmp_path):
    model, batch, _ = pruned(name, ("layers",), torch.float32, seed=1)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output_of(again, batch), output_of(model, batch))
    if name in TEXT and name != "modernbert":
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        ids = batch["input_ids"]
        assert torch.equal(again.generate(ids, **options), again.generate(ids, use_cache=False, **options))


SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "hf_rezero" not in sys.modules and not any("hf_rezero" in str(p) for p in sys.path)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(12)[None]
model.train()
model(ids, labels=ids).loss.backward()
model.eval()
with torch.no_grad():
    logits = model(ids).logits
options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=259)
cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
assert torch.equal(cached, plain)
print(json.dumps([logits.double().sum().item(), cached[0].tolist(), sum(p.numel() for p in model.parameters())]))
"""


@pytest.mark.parametrize("without_first_attention", [False, True])
def test_a_fresh_process_without_the_library_loads_generates_and_trains(tmp_path, without_first_attention):
    model = stir(rezero())
    groups = find_groups(model, ["heads", "neurons", "sublayers"])
    masks = attach_masks(model, groups)
    set_masks(masks, seed=2)
    with torch.no_grad():
        gates = masks.split(masks.layer.mask)
        for name in ("model.layers.*.self_attn", "model.layers.*.mlp"):
            gates[name].copy_(torch.tensor([0.9, 0.0, 0.8, 0.7]))
        if without_first_attention:
            gates["model.layers.*.self_attn"][0] = 0.0
    ids = torch.arange(12)[None]
    report = remove_pruned_(model, masks, batch={"input_ids": ids})
    assert report.max_difference < 1e-5 and len(model.model.layers) == 3
    assert (model.model.layers[0].self_attn is None) == without_first_attention
    model.save_pretrained(tmp_path)
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    process = subprocess.run([sys.executable, "-P", "-S", "-c", _isolated(SCRIPT), str(tmp_path)], **options)
    assert process.returncode == 0, process.stderr[-2000:]
    total, generated, parameters = json.loads(process.stdout.splitlines()[-1])
    assert total == pytest.approx(output_of(model, {"input_ids": ids}).double().sum().item(), rel=1e-6)
    assert parameters == report.parameters_after < report.parameters_before
    assert len(generated) == 20


def _isolated(script):
    """Site packages without the editable install of this library."""
    folders = [path for path in sys.path if path.endswith("site-packages")]
    return f"import sys\nsys.path += {folders!r}\n{script}"


def test_unequal_layers_are_in_the_config(tmp_path):
    model, _, report = pruned("rezero", ("heads", "neurons"), seed=1)
    layers = model.config.per_layer_config
    for i, layer in enumerate(model.model.layers):
        assert layers[i].num_attention_heads == len(report.kept[f"model.layers.{i}.self_attn"])
        assert (
            layers[i].intermediate_size == len(report.kept[f"model.layers.{i}.mlp"]) == layer.mlp.up_proj.out_features
        )
    assert len({layers[i].intermediate_size for i in range(4)}) > 1
    assert model.config.head_dim == 8
    assert (
        from_ranges(model.config.pruning["kept"]["model.layers.2.mlp"], at_most=99)
        == report.kept["model.layers.2.mlp"]
    )


def test_equal_layers_leave_a_plain_config(tmp_path):
    model = stir(rezero())
    groups = find_groups(model, ["heads", "neurons"])
    prune_(model, groups, {group.name: torch.arange(group.num_units // 2) for group in groups})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_attention_heads"] == 2 and config["intermediate_size"] == 64
    assert not config.get("per_layer_config")


def test_kept_indices_of_two_rounds_are_those_of_the_first_model():
    model = stir(rezero())
    first = {"model.layers.1.mlp": torch.tensor([3, 5, 8, 9, 40]), "model.layers": torch.tensor([0, 1, 3])}
    prune_(model, find_groups(model, ["neurons", "layers"]), first)
    second = {"model.layers.1.mlp": torch.tensor([0, 2, 4]), "model.layers": torch.tensor([1, 2])}
    prune_(model, find_groups(model, ["neurons", "layers"]), second)
    kept = model.config.pruning["kept"]
    assert kept["model.layers"] == "1,3"
    assert kept["model.layers.0.mlp"] == "3,8,40" and kept["model.layers.1.mlp"] == "0-127"
    assert model.config.num_hidden_layers == 2 and model.config.per_layer_config[0].intermediate_size == 3


@pytest.mark.parametrize("round_to", [8, {"neurons": 16}])
def test_kept_neurons_are_rounded_up(round_to):
    model, _, report = pruned("rezero", ("heads", "neurons"), seed=1, round_to=round_to)
    multiple = 8 if round_to == 8 else 16
    neurons = [len(kept) for name, kept in report.kept.items() if name.endswith("mlp")]
    assert all(count % multiple == 0 for count in neurons) and max(neurons) < 128
    assert report.max_difference < 1e-10


def test_weights_keep_their_type_and_their_trainability():
    model = stir(rezero(tie_word_embeddings=True)).bfloat16()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    masks = attach_masks(model, find_groups(model))
    set_masks(masks)
    report = remove_pruned_(model, masks, batch={"input_ids": torch.arange(12)[None]})
    assert report.max_difference <= 0.05 * report.max_output
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.dtype == torch.bfloat16 and not down.requires_grad and down.is_contiguous()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_width_of_tied_embeddings_goes_in_one_piece_when_the_masks_are_binary():
    model = stir(rezero(tie_word_embeddings=True).double())
    masks = attach_masks(model, find_groups(model, ["width"]))
    with torch.no_grad():
        masks.layer.mask[::3] = 0.0
    report = remove_pruned_(model, masks, batch={"input_ids": torch.arange(12)[None]})
    assert report.max_difference < 1e-10 and model.config.hidden_size == 21
    assert model.lm_head.weight is model.model.embed_tokens.weight


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "ranger": lambda groups: Ranger(groups, lr=1e-2),
    "lamb": lambda groups: LAMB(groups, lr=1e-2),
    "lookahead": lambda groups: lookahead(torch.optim.AdamW(groups, lr=1e-2), k=2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizer_goes_on_as_it_would_have_with_dead_units(make):
    """The oracle: units whose reading and producing weights are 0 and get no gradient."""
    model = stir(rezero(num_hidden_layers=2))
    optimizer = make(param_groups(model, weight_decay=0.1))
    ids = torch.arange(24).view(2, 12)

    def step():
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(3):
        kept_alive = step()  # autograd must not remember the old shapes
    state = {
        n: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        for n, p in model.named_parameters()
    }
    keep = torch.tensor([1, 2, 5, 90])
    prune_(model, find_groups(model), {"model.layers.1.mlp": keep}, optimizer=optimizer)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    for name, parameter in model.named_parameters():
        for key, value in state[name].items():
            if value.ndim == 2 and name == "model.layers.1.mlp.up_proj.weight":
                value = value[keep]
            if value.ndim == 2 and name == "model.layers.1.mlp.down_proj.weight":
                value = value[:, keep]
            torch.testing.assert_close(optimizer.state[parameter][key], value)
    assert step() < kept_alive + 1 and step().isfinite()


def test_slow_weights_take_the_masks_too():
    model = stir(rezero(num_hidden_layers=1))
    optimizer = lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=5)
    ids = torch.arange(12)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    masks = attach_masks(model, find_groups(model, ["neurons"]))
    set_masks(masks)
    slow = optimizer.state[model.model.layers[0].mlp.down_proj.weight]["slow"].clone()
    factors = masks.layer.mask.detach().clone()
    remove_pruned_(model, masks, optimizer=optimizer)
    expected = (slow * factors)[:, factors != 0]
    torch.testing.assert_close(optimizer.state[model.model.layers[0].mlp.down_proj.weight]["slow"], expected)


def test_parameters_of_removed_layers_leave_the_optimizer():
    model = stir(rezero())
    masks = attach_masks(model, find_groups(model, ["layers"]))
    optimizer = torch.optim.AdamW(
        [*param_groups(model, weight_decay=0.1)[:2], {"params": list(masks.parameters()), "weight_decay": 0.0}],
        lr=1e-3,
    )
    model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    with torch.no_grad():
        masks.layer.mask[1] = 0.0
    remove_pruned_(model, masks, optimizer=optimizer)
    assert {p for group in optimizer.param_groups for p in group["params"]} <= set(model.parameters())
    assert set(optimizer.state) <= set(model.parameters())
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_constants_of_removed_units_go_to_the_next_bias():
    """Units that do not depend on the input are replaced exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight[3:] = 0.0
    x = torch.randn(50, 4).double()
    before, groups = model(x), find_groups(model)
    constants = mean_activations(model, groups, [x[:25], x[25:]])
    prune_(model, groups, {"0": torch.arange(3)}, constants=constants)
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)
    assert model[0].out_features == 3


def test_batch_norm_is_recalibrated():
    model, picture = build("seed_net", torch.float64)
    recalibrate_batchnorm_(model, [picture[:1], picture[1:]])
    x = model[0](picture)
    torch.testing.assert_close(model[1].running_mean, x.mean((0, 2, 3)), atol=1e-10, rtol=0)
    expected = torch.stack([x[i].var((1, 2), unbiased=True) for i in range(2)]).mean(0)
    torch.testing.assert_close(model[1].running_var, expected, atol=1e-10, rtol=0)
    assert model[1].momentum == 0.1 and not any(module.training for module in model.modules())


def test_units_of_a_residual_sum_can_be_tied_by_hand():
    """The buffer layers of the seed article, pruned after all: one mask for all that write to the sum."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.block(x).tanh())

    model, x = Residual().double(), torch.randn(3, 4).double()
    readers = (Cut("block.weight", 1), Cut("head.weight", 1))
    cuts = tuple(Cut(f"{part}.{kind}", 0) for part in ("stem", "block") for kind in ("weight", "bias"))
    masks = attach_masks(model, [PruningGroup("sum", "neurons", 6, readers, cuts)])
    set_masks(masks, seed=3)
    report = remove_pruned_(model, masks, batch=x)
    assert report.max_difference < 1e-12 and model.block.weight.shape == (len(report.kept["sum"]),) * 2


def test_files_shrink_with_the_parameters(tmp_path):
    torch.manual_seed(0)
    model = stir(rezero(hidden_size=64, num_hidden_layers=6))
    model.save_pretrained(tmp_path / "dense")
    before = sum(p.numel() for p in model.parameters())
    groups = find_groups(model)
    report = prune_(model, groups, {group.name: torch.arange(group.num_units // 2) for group in groups})
    model.save_pretrained(tmp_path / "pruned")
    dense, small = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "pruned"))
    assert small / dense == pytest.approx(report.parameters_after / before, rel=0.03)


def test_ranges_come_back():
    for indices in ([], [0], [1, 2, 3, 7, 9, 10]):
        assert from_ranges(to_ranges(indices), at_most=6) == indices


def test_the_report_says_what_was_done(tmp_path):
    _, _, report = pruned("rezero", ("heads", "neurons"), seed=1)
    text = str(report)
    assert f"{report.parameters_before:,}" in text and "masked and pruned model differ by at most" in text
    kept, former = report.left_by_kind()["heads"]
    table = report._repr_html_()
    assert f"<td>heads</td><td>{kept}</td><td>{former}</td>" in table and "differ by at most" in table
    assert [axes.get_title() for axes in report.plot().axes[1::2]] == [
        f"{a} of {b}" for a, b in report.left_by_kind().values()
    ]
    report.save(tmp_path / "deep" / "report.json")
    saved = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert saved["parameters_after"] == report.parameters_after
    assert from_ranges(saved["kept"]["model.layers.0.mlp"], at_most=99) == report.kept["model.layers.0.mlp"]


def cut(kept, model=None, targets=("heads", "neurons", "layers")):
    model = model or stir(rezero())
    prune_(model, find_groups(model, targets), {name: torch.tensor(k, dtype=torch.long) for name, k in kept.items()})


def with_masks():
    model = stir(rezero())
    attach_masks(model, find_groups(model))
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cut({"model.layers.9.mlp": [0]}), "expected groups of the model"),
        (lambda: cut({"model.layers.0.mlp": [128]}), "expected 0 to 127"),
        (lambda: cut({"model.layers.0.mlp": [-1]}), "expected 0 to 127"),
        (lambda: cut({"model.layers": []}), "keep at least one"),
        (lambda: cut({"0": []}, seed_net(), ["channels"]), "keep at least one"),
        (lambda: cut({"model.layers.0.mlp": []}, stir(rezero(mlp_bias=True))), "layers' or 'sublayers"),
        (lambda: cut({"model.layers.0.mlp": [1]}, with_masks()), "masks are attached"),
        (lambda: save_pruned(with_masks(), "unused"), "masks are attached"),
        (lambda: save_pruned(rezero(), "unused"), "nothing was pruned"),
        (lambda: load_pruned("/nonexistent", rezero()), "holds no pruned model"),
        (lambda: recalibrate_batchnorm_(seed_net(), []), "no batches"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tied_weights_refuse_fractional_masks():
    model = stir(rezero(tie_word_embeddings=True))
    masks = attach_masks(model, find_groups(model, ["width"]))
    set_masks(masks)
    with pytest.raises(ValueError, match="is tied to"):
        remove_pruned_(model, masks)


def test_a_layer_that_lost_everything_is_gone():
    model = stir(rezero())
    before = copy.deepcopy(model)
    prune_(
        model,
        find_groups(model),
        {"model.layers.2.mlp": torch.tensor([]), "model.layers.2.self_attn": torch.tensor([])},
    )
    with torch.no_grad():
        before.model.layers[2].residuals["layer"].resweight.zero_()
    batch = {"input_ids": torch.arange(12)[None]}
    assert model.config.num_hidden_layers == 3 and torch.equal(output_of(model, batch), output_of(before, batch))


@pytest.mark.parametrize("quantise", ["int8", "meta"])
def test_models_that_are_not_plain_floats_are_refused(quantise):
    model = seed_net()
    if quantise == "meta":
        model = model.to("meta")
    else:
        model[0].weight = nn.Parameter(model[0].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating point first"):
        find_groups(model)


def test_constants_of_a_group_that_stays_whole_change_nothing():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    groups, x = find_groups(net), torch.randn(5, 4)
    constants, expected = mean_activations(net, groups, [x]), net(x)
    prune_(net, groups, {"0": torch.arange(8)}, constants=constants)
    torch.testing.assert_close(net(x), expected)


def test_a_quantizer_does_not_make_floating_point_weights_quantised():
    """As after loading a GGUF file; the tensors of a quantised model are what cannot be cut."""
    model = rezero()
    model.hf_quantizer = object()
    assert {group.kind for group in find_groups(model)} == {"heads", "neurons"}
    model.lm_head.weight.data = model.lm_head.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="lm_head.weight is a Tensor of torch.float8_e4m3fn"):
        find_groups(model)


def test_a_target_that_no_rule_finds_is_named():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert [group.kind for group in find_groups(net)] == ["neurons"]
    with pytest.raises(ValueError, match="no rule finds heads in Sequential: leave them out"):
        find_groups(net, ["heads", "neurons"])


@pytest.mark.parametrize("kept", ["0-99999999999", "0-1,0-1,0-1,0-1,0-1", "a-b", "1.5", "-3", 7, None, ["1"]])
def test_kept_units_that_cannot_be_are_refused(kept, tmp_path):
    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    net = build()
    prune_(net, find_groups(net), {"0": torch.tensor([1, 5])})
    save_pruned(net, tmp_path)
    saved = json.loads((tmp_path / "pruning.json").read_text())
    (tmp_path / "pruning.json").write_text(json.dumps(saved | {"kept": {"0": kept}}))
    with pytest.raises(ValueError, match="got the kept units .* of 8: expected numbers and runs of them"):
        load_pruned(tmp_path, build())


@pytest.mark.parametrize("content", ["[]", '{"kept": []}', '{"kept": ', "\x00", "null", "[" * 10_000])
def test_damaged_provenance_is_refused(content, tmp_path):
    (tmp_path / "pruning.json").write_text(content)
    with pytest.raises(ValueError, match="damaged|not an object|expected"):
        load_pruned(tmp_path, nn.Linear(1, 1))
