"""Whatever a user gives: success, or an exception that is documented. Never anything else, nor memory without a bound."""

import argparse
import bz2
import copy
import gzip
import io
import json
import lzma
import zipfile

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import HfArgumentParser

from hf_rezero import ReZeroConfig, ReZeroTrainer, ReZeroTrainingArguments
from hf_rezero.commands.argument_file import read_argument_file
from hf_rezero.commands.running import TextModelArguments, build_config, load_tokenizer
from hf_rezero.commands.texts import DataArguments
from hf_rezero.data import byte_tokenizer, load_corpus
from hf_rezero.data.images import DecodedImages, read_images
from hf_rezero.optim.registry import BASES, parse_optimizer
from hf_rezero.pruning import find_groups, load_pruned, prune_, save_pruned


DOCUMENTED = ValueError, OSError, StrictDataclassError, argparse.ArgumentError
LIMIT = 10**6

numbers = st.one_of(st.integers(), st.integers(-3, 70), st.floats(), st.floats(0, 2))
plain = st.one_of(
    numbers, st.booleans(), st.none(), st.text(max_size=8), st.sampled_from(["1e-3", "nan", "010", "no"])
)
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | numbers, inner, max_size=3),
)


def succeeds_or_says_why(call, *args, **options):
    """The result, or None after a documented exception, whose message is not empty."""
    try:
        return call(*args, **options)
    except DOCUMENTED as error:
        assert str(error)
        return None


@st.composite
def damaged(draw, content):
    """A file, whole, cut short, longer, with other bytes in it, or of other bytes altogether."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["cut", "insert", "replace", "nothing"]))
        if change == "cut":
            del data[place:]
        elif change == "insert":
            data[place:place] = draw(st.binary(max_size=9))
        elif change == "replace":
            data[place : place + 4] = draw(st.binary(min_size=4, max_size=4))
    return bytes(data) if draw(st.integers(0, 9)) else draw(st.binary(max_size=60))


@pytest.fixture(scope="module")
def actions():
    """What the arguments of `hf-rezero clm` take."""
    parser = HfArgumentParser((TextModelArguments, DataArguments, ReZeroTrainingArguments))
    return {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}


@given(data=st.data())
def test_files_of_arguments(data, actions, tmp_path_factory):
    names = st.sampled_from([*actions, *"abc"]) | plain
    lines = st.lists(st.tuples(names, nested), max_size=5)
    text = st.one_of(
        lines.map(lambda pairs: "\n".join(f"{name}: {json.dumps(value, default=str)}" for name, value in pairs)),
        lines.map(lambda pairs: "\n".join(f"{name}: {value}" for name, value in pairs)),
        st.text(alphabet="abk:-[]{}&*!|>'\"#%@, \n\t01.~", max_size=60),
    )
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_bytes(data.draw(text.map(lambda content: content.encode("utf-8", "replace")) | st.binary(max_size=60)))
    values = succeeds_or_says_why(read_argument_file, path, actions)
    assert values is None or values.keys() <= actions.keys()


OPTIMIZERS = [*BASES, "adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor", "gc+lookahead+sgd", "snoo+radam"]
OPTIONS = """lr betas eps weight_decay momentum k alpha fused foreach nesterov amsgrad clip num_iterations centralize
trust_coefficient degenerated_to_sgd lookahead_k lookahead_alpha lookahead_momentum lookahead_evaluate_slow gc_conv_only
params scale_parameter""".split()


@given(
    name=st.sampled_from(OPTIMIZERS),
    pairs=st.lists(
        st.tuples(
            st.sampled_from(OPTIONS) | st.text(max_size=5), st.one_of(plain, st.tuples(numbers, numbers), nested)
        ),
        max_size=3,
    ),
    rest=st.text(alphabet="=,()[]x1 ", max_size=8),
)
def test_arguments_of_optimizers(name, pairs, rest, tmp_path_factory):
    args = copy.copy(_training_arguments(tmp_path_factory))
    args.optim, args.optim_args = (
        name,
        ",".join([*(f"{key}={value}" for key, value in pairs), rest][: len(pairs) + bool(rest)]),
    )

    def build_and_step():
        make, options = ReZeroTrainer.get_optimizer_cls_and_kwargs(args)
        weights = nn.Parameter(torch.ones(3, 2))
        optimizer = parse_optimizer(name, args.optim_args).wrap(make([weights], **options))
        return weights, optimizer

    built = succeeds_or_says_why(build_and_step)
    if built is not None:
        weights, optimizer = built
        weights.grad = torch.eye(3, 2)
        optimizer.step()


_SHARED: dict = {}


def _training_arguments(tmp_path_factory):
    if not _SHARED:
        _SHARED["args"] = ReZeroTrainingArguments(str(tmp_path_factory.mktemp("run")), use_cpu=True, report_to=[])
    return _SHARED["args"]


FIELDS = [name for name in ReZeroConfig().to_dict() if not name.startswith("_")]
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


# those of transformers are checked, or not, by its own class
OURS = ["per_layer_config", *ReZeroConfig.__annotations__]


@given(values=st.dictionaries(st.sampled_from(OURS), nested, max_size=3))
def test_values_of_configs(values):
    config = succeeds_or_says_why(ReZeroConfig, **SMALL | values)
    if config is not None and "per_layer_config" in values:
        assert len(list(config.per_layer_config)) == config.num_hidden_layers


@given(
    layers=st.dictionaries(
        st.one_of(st.integers(-1, 3), st.sampled_from(["0", "1", "x"]), plain),
        st.dictionaries(
            st.sampled_from(["num_attention_heads", "num_key_value_heads", "intermediate_size", "skip", "head_dim"]),
            st.one_of(st.integers(-1, 40), st.lists(st.sampled_from(["mlp", "attention", "x"]), max_size=2), nested),
            max_size=3,
        )
        | nested,
        max_size=3,
    )
    | nested
)
def test_sizes_of_layers(layers):
    succeeds_or_says_why(ReZeroConfig, **SMALL, per_layer_config=layers)


@given(
    kind=st.sampled_from(["rezero", "rezero_mlp", "rezero_resnet", "gone"]),
    pairs=st.lists(st.tuples(st.sampled_from([*FIELDS, "depths", "hidden_sizes", "x"]), nested | st.text(max_size=9))),
)
def test_overrides_of_configs(kind, pairs):
    succeeds_or_says_why(build_config, kind, ",".join(f"{name}={value}" for name, value in pairs))


def _idx(shape, values):
    return b"\0\0\x08" + bytes([len(shape)]) + np.array(shape, dtype=">u4").tobytes() + values


@given(pictures=damaged(_idx([3, 4, 4], bytes(48))), labels=damaged(_idx([3], bytes(3))), packed=st.booleans())
def test_idx_files(pictures, labels, packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    pictures, ending = (gzip.compress(pictures), ".gz") if packed else (pictures, "")
    (folder / f"train-images-idx3-ubyte{ending}").write_bytes(pictures)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    parts = succeeds_or_says_why(read_images, folder, LIMIT)
    assert parts is None or len(parts["train"][0]) == len(parts["train"][1])


def _npz():
    buffer = io.BytesIO()
    np.savez(buffer, train_x=np.zeros((3, 4, 4), np.uint8), train_y=np.arange(3))
    return buffer.getvalue()


@given(content=damaged(_npz()))
def test_npz_files(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(content)
    succeeds_or_says_why(read_images, path, LIMIT)


def _zip(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", content)
    return buffer.getvalue()


PACKED = {"xz": lzma.compress, "gz": gzip.compress, "bz2": bz2.compress, "zip": _zip, "txt": bytes}


@given(
    data=st.data(),
    kind=st.sampled_from(sorted(PACKED)),
    split=st.just((0.8, 0.1, 0.1)) | st.tuples(numbers, numbers, numbers) | st.lists(nested, max_size=4) | nested,
)
def test_archives_and_splits(data, kind, split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    path = folder / f"a.{kind}"
    path.write_bytes(data.draw(damaged(PACKED[kind](b"to be or not to be " * 20))))
    corpus = succeeds_or_says_why(load_corpus, path, split=split, cache_dir=folder / "cache", max_bytes=LIMIT)
    assert corpus is None or len(corpus.train) + len(corpus.validation) + len(corpus.test) <= LIMIT


def _png():
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@given(content=damaged(_png()))
def test_files_of_images(content):
    import datasets

    table = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]}).cast_column(
        "image", datasets.Image()
    )
    pixels = succeeds_or_says_why(DecodedImages(table, "image", (3, 3), 3).__getitem__, [0])
    assert pixels is None or pixels.shape == (1, 3, 3, 3)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The folder of a pruned net."""
    folder, net = tmp_path_factory.mktemp("pruned"), _net()
    prune_(net, find_groups(net), {"0": torch.tensor([1, 5])})
    save_pruned(net, folder)
    return folder


def _net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@given(data=st.data())
def test_pruned_models_and_tokenizers(data, pruned, tmp_path_factory):
    saved = {"method": "given", "kept": {"0": "1,5"}}
    provenance = st.one_of(
        st.builds(
            lambda kept: json.dumps(saved | {"kept": {"0": kept}}).encode(), st.text("0123456789-,", max_size=9)
        ),
        nested.map(lambda kept: json.dumps(saved | {"kept": kept}, default=str).encode()),
        damaged(json.dumps(saved).encode()),
    )
    (pruned / "pruning.json").write_bytes(data.draw(provenance))
    succeeds_or_says_why(load_pruned, pruned, _net())
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(data.draw(damaged(whole)))
    succeeds_or_says_why(load_tokenizer, TextModelArguments(), str(folder))
