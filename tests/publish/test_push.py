"""Pushes to a Hub on this machine, and loading from it where this library is not installed."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.hub_server import READER, WRITER, HubServer, Worker

from hf_rezero import ReZeroForCausalLM, byte_tokenizer
from hf_rezero.publish.push import files_to_push


ROOT = Path(__file__).parents[2]
CODE = {"configuration_rezero.py", "modeling_rezero.py"}
MODEL = {"config.json", "model.safetensors", *CODE}
RUN = MODEL | {"README.md", "tokenizer.json", "tokenizer_config.json", "training.png", "resweights.png"}
PICKLES = (".bin", ".pt", ".pth", ".pkl")
NAMES = f"""
import sys, torch
from pathlib import Path
from unittest.mock import patch
from transformers import AutoTokenizer, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from hf_rezero import *
from hf_rezero.publish import *
from hf_rezero.pruning import find_groups, magnitude, prune_, select
sys.path.insert(0, {str(ROOT / "scripts")!r})
torch.set_num_threads(1)
shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, resweight_init=0.7)
ids = torch.arange(40).view(2, 20)
"""
STRANGER = """
import sys
sys.modules["hf_rezero"] = None  # importing it now raises ImportError
import torch, transformers
torch.set_num_threads(1)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


def start(hub, folder, names, **environment):
    worker = Worker(hub.environment(folder / "home", **environment), folder / "log")
    worker.run(names)
    return worker


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    """A process of somebody who is logged in."""
    worker = start(hub, tmp_path_factory.mktemp("worker"), NAMES)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """A process without this library, of somebody who is not logged in."""
    worker = start(hub, tmp_path_factory.mktemp("stranger"), STRANGER, token=None)
    yield worker
    worker.close()


@pytest.fixture(autouse=True)
def _forget(request):
    yield
    if "hub" in request.fixturenames:
        hub = request.getfixturevalue("hub")
        assert not hub.leaked
        for container in (hub.repos, hub.large, hub.faults, hub.requests):
            container.clear()


@pytest.fixture
def folder(make_config, tmp_path):
    """What a finished run leaves, with what must stay at home."""
    folder = tmp_path / "run"
    ReZeroForCausalLM(make_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    for name in ("training.png", "resweights.png", "pruning/report.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x89PNG\0")
    shutil.copytree(folder, folder / "checkpoint-2")
    shutil.copytree(folder / "checkpoint-2", folder / "best")
    (folder / "best" / "trainer_state.json").write_text("{}")
    private = (
        "training_args.bin optimizer.pt gradinit/state.pt trainer_state.json .env _notes.md runs/events.json x.py"
    )
    for name in private.split():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


UP = RUN | {"generation_config.json", "pruning/report.png"}


def push(folder, repo="me/mine", **options):
    return f"push_folder({str(folder)!r}, {repo!r}, **{options!r})"


# models of each kind

KINDS = {
    "causal": ("ReZeroForCausalLM(ReZeroConfig(**shape))", "AutoModelForCausalLM"),
    "masked": ("ReZeroForMaskedLM(ReZeroConfig(**shape, is_causal=False))", "AutoModelForMaskedLM"),
    "sequences": (
        "ReZeroForSequenceClassification(ReZeroConfig(**shape, num_labels=3, pad_token_id=0))",
        "AutoModelForSequenceClassification",
    ),
    "pruned": ("prune(ReZeroForCausalLM(ReZeroConfig(**shape)))", "AutoModelForCausalLM"),
    "rewritten": ("rewritten()", "AutoModelForCausalLM"),
    "resnet": (
        "ReZeroResNetForImageClassification(ReZeroResNetConfig(num_labels=3))",
        "AutoModelForImageClassification",
    ),
    "mlp": (
        "ReZeroMLPForImageClassification(ReZeroMLPConfig(image_size=28, num_channels=1, hidden_size=16, num_labels=3))",
        "AutoModelForImageClassification",
    ),
}
PRUNE = """
def prune(model):
    groups = find_groups(model, ["heads", "neurons"])
    prune_(model, groups, select(model, groups, magnitude(model, groups), sparsity=0.4))
    assert model.config.per_layer_config
    return model

def rewritten():
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes))
    rezero_(model, resweight_init=0.7)
    return model
"""
IMAGES = {
    "mlp": "GrayImageProcessorPil(size={'height': 28, 'width': 28}, image_mean=[0.5], image_std=[0.5])",
    "resnet": "ViTImageProcessorPil(size={'height': 32, 'width': 32})",
}
LOAD = """
auto, repo, path, processor = {arguments}
given = torch.load(path)
model = getattr(transformers, auto).from_pretrained(repo, trust_remote_code=True)
with torch.no_grad():
    result = torch.equal(model(given["inputs"]).logits, given["logits"])
assert "transformers_modules" in type(model).__module__
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 has no public one without torchvision
processor_class = AutoImageProcessor if processor == "AutoImageProcessor" else transformers.AutoTokenizer
loaded = processor_class.from_pretrained(repo, trust_remote_code=True)
inputs = loaded("to be") if processor == "AutoTokenizer" else loaded(given["image"], return_tensors="pt")
result = [result, list(inputs.input_ids) if processor == "AutoTokenizer" else list(inputs.pixel_values.shape)]
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_pushed_model_gives_the_same_logits_where_the_library_is_not_installed(
    hub, worker, stranger, tmp_path, kind
):
    make, auto = KINDS[kind]
    path, is_image = str(tmp_path / "logits.pt"), kind in IMAGES
    channels, size = (1, 28) if kind == "mlp" else (3, 32)
    processor = IMAGES.get(kind, "byte_tokenizer()")
    worker.run(
        f"from hf_rezero.models.image_processing_gray import GrayImageProcessorPil\n{PRUNE}\ntorch.manual_seed(0)\n"
        f"model = {make}.eval()\ninputs = torch.rand(2, {channels}, {size}, {size}) if {is_image} else ids\n"
        f"image = torch.randint(0, 256, ({channels}, {size}, {size}), dtype=torch.uint8)\n"
        f"torch.save({{'inputs': inputs, 'image': image, 'logits': model(inputs).logits.detach()}}, {path!r})\n"
        f"model.push_to_hub('me/{kind}'); {processor}.push_to_hub('me/{kind}')"
    )
    first, _ = hub.repos[f"me/{kind}"].log()
    endings = sorted(Path(name).suffix for name in first.changed if name != "generation_config.json")
    code = [".py"] if kind == "rewritten" else [".py", ".py"]  # one file for models of all classes of transformers
    assert endings == [".json", ".md", *code, ".safetensors"], first.changed
    kind_of_processor = "AutoImageProcessor" if is_image else "AutoTokenizer"
    loaded = stranger.run(LOAD.format(arguments=(auto, f"me/{kind}", path, kind_of_processor)))
    assert loaded == [True, [1, channels, size, size] if is_image else list(b"to be")]


# runs

RUN_CLM = """
from hf_rezero.commands import clm as run_clm
from hf_rezero.trainer import ReZeroTrainingArguments
Path({text!r}).write_bytes(b"to be or not to be " * 99)
words = "--config_overrides hidden_size=16,num_hidden_layers=2,num_attention_heads=2 --block_size 32 --max_steps 4 " \\
    "--logging_steps 1 --use_cpu true --disable_tqdm true --do_train --do_eval --push_to_hub true --save_steps 2 {more}"
run_clm.main(["--train_file", {text!r}, "--output_dir", {out!r}, *words.split()])
"""


def test_a_run_ends_with_everything_on_the_hub_and_every_commit_loads(hub, worker, stranger, tmp_path):
    out = tmp_path / "run"
    more = f"--hub_model_id me/run --hub_token {WRITER}"
    worker.run(RUN_CLM.format(text=str(tmp_path / "text.txt"), out=str(out), more=more))
    log = hub.repos["me/run"].log()
    assert log[-1].message == "End of training" and log[0].message == "Training in progress, step 2"
    assert set(log[-1].files) >= RUN | {"all_results.json"}
    for commit in log:
        assert set(commit.files) >= MODEL | {"tokenizer.json"}
        assert not [name for name in commit.files if name.endswith(PICKLES) or "checkpoint" in name]
        assert not [name for name, blob in commit.files.items() if WRITER.encode() in blob.content]
        load = (
            f"from_pretrained('me/run', revision={commit.sha!r}, code_revision={commit.sha!r}, trust_remote_code=True)"
        )
        total = stranger.run(f"result = transformers.AutoModelForCausalLM.{load}.lm_head.weight.sum().item()")
    assert total == pytest.approx(load_file(out / "model.safetensors")["lm_head.weight"].sum().item())
    # what stays at home must not hold the token either
    files = [path for path in out.rglob("*") if path.is_file()]
    assert out / "training_args.bin" in files and not [p for p in files if WRITER.encode() in p.read_bytes()]
    assert not list(out.glob("_push-*"))


TRAINER = """
import numpy as np
from hf_rezero.data import ByteDataset, collate_bytes
def trainer(out, **values):
    data = ByteDataset(np.frombuffer(b"to be or not to be " * 9, dtype=np.uint8), block_size=16)
    values = dict(max_steps=2, save_strategy="no", disable_tqdm=True, use_cpu=True) | values
    model = ReZeroForCausalLM(ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    model.add_model_tags("ours")
    args = ReZeroTrainingArguments(out, **values)
    return ReZeroTrainer(model, args, train_dataset=data, data_collator=collate_bytes, processing_class=byte_tokenizer())
"""


def test_the_trainer_pushes_in_one_commit(hub, worker, tmp_path):
    out = str(tmp_path / "run")
    worker.run(f"{TRAINER}\nt = trainer({out!r}, hub_model_id='me/one', hub_revision='dev'); t.train()")
    worker.run("t.push_to_hub(tags='mine', private=True)")
    (commit,) = hub.repos["me/one"].log()
    assert set(commit.changed) >= MODEL | {"README.md", "tokenizer.json"}
    assert hub.repos["me/one"].private and set(hub.repos["me/one"].refs) == {"main", "dev"}
    card = hub.repos["me/one"].files("dev")["README.md"].decode()
    assert "mine" in card and "ours" in card
    worker.run("t.args.hub_model_id = 'me/later'; t.hub_model_id = None; t.push_to_hub(blocking=False).result()")
    assert len(hub.repos["me/later"].log()) == 1


def test_a_run_that_cannot_push_ends_before_the_training(hub, worker, tmp_path):
    make = f"{TRAINER}\ntrainer({str(tmp_path / 'run')!r}, push_to_hub=True, **{{options}})"
    error = worker.ask(make.format(options={"hub_model_id": "other/run"}))["error"]
    assert re.match(r"PushError: other/run: .*write access", error), error
    error = worker.ask(make.format(options={"hub_strategy": "all_checkpoints"}))["error"]
    assert re.match(r"ValueError: hub_strategy=all_checkpoints would publish optimizer states", error), error


def test_a_refused_push_in_the_background_does_not_end_the_training(hub, worker, tmp_path):
    hub.fail("POST", "/commit/", 403, message="no")
    worker.run(
        f"{TRAINER}\nt = trainer({str(tmp_path / 'run')!r}, push_to_hub=True, save_strategy='steps', save_steps=1)\n"
        "t.train()\nassert t.state.global_step == 2"
    )
    assert "not published: me/run: the token gives no write access" in worker.log.read_text()


# folders


def test_a_folder_goes_up_in_one_commit_without_what_belongs_to_the_run(hub, worker, folder):
    worker.run(push(folder, private=True, commit_message="mine"))
    repo = hub.repos["me/mine"]
    assert repo.private
    assert [(c.message, set(c.changed)) for c in repo.log()] == [("mine", UP)]
    assert all(repo.files()[name] == (folder / name).read_bytes() for name in UP)
    worker.run(push(folder))
    assert len(repo.log()) == 1, "nothing had changed"


def test_branches_and_pull_requests(hub, worker, folder):
    worker.run(push(folder, revision="try/1"))
    assert set(hub.repos["me/mine"].files("try/1")) >= UP
    code = push(folder, token=READER, create_pr=True)
    assert worker.run(f"result = {code}.pr_url") == f"{hub.url}/me/mine/discussions/1"
    assert set(hub.repos["me/mine"].files("refs/pr/1")) >= UP
    assert set(hub.repos["me/mine"].files()) == {".gitattributes"}


def test_weights_that_would_be_loaded_instead_are_removed_by_the_same_commit(hub, worker, folder, tmp_path):
    shards = tmp_path / "shards"
    worker.run(
        f"model = ReZeroForCausalLM.from_pretrained({str(folder)!r})\n"
        f"model.save_pretrained({str(shards)!r}, max_shard_size='20KB')\n{push(folder)}\n"
        f"{push(shards)}"
    )
    weights = {name for name in hub.repos["me/mine"].files() if "model" in name and not name.endswith(".py")}
    assert weights == {path.name for path in shards.iterdir() if "model." in path.name or "model-" in path.name}
    assert len(hub.repos["me/mine"].log()) == 2 and "model.safetensors" not in weights and len(weights) > 2


def test_a_card_is_made_unless_there_is_one(hub, worker, folder):
    (folder / "README.md").unlink()
    worker.run(push(folder))
    assert "me/mine" in hub.repos["me/mine"].files()["README.md"].decode()
    (folder / "README.md").write_text("by hand")
    worker.run(push(folder))
    (folder / "README.md").unlink()
    worker.run(push(folder))
    assert hub.repos["me/mine"].files()["README.md"] == b"by hand"


def damage(name, change):
    def act(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return act


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    pickle_weights(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def forget_code(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "auto_map"}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (remove("config.json"), "has no config.json"),
        (remove("model.safetensors"), "lacks model.safetensors: save the model again"),
        (pickle_weights, "lacks model.safetensors: pytorch_model.bin is pickled"),
        (lose_a_shard, "lacks model-00001-of-00002.safetensors"),
        (damage("model.safetensors", lambda content: content[:-1000]), "model.safetensors is damaged or cut short"),
        (remove("modeling_rezero.py"), "lacks modeling_rezero.py, named in its config"),
        (remove("configuration_rezero.py"), "lacks configuration_rezero.py"),
        (forget_code, "names no code for rezero"),
        (
            damage("README.md", lambda content: content + WRITER.encode()),
            "README.md holds what looks like a Hub token",
        ),
    ],
)
def test_folders_that_are_no_whole_model_are_refused(folder, spoil, message):
    assert set(files_to_push(folder)) == UP
    spoil(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        files_to_push(folder)
    assert WRITER not in str(refusal.value)


def test_a_folder_of_another_architecture_needs_no_code(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert set(files_to_push(folder)) == UP - CODE


def test_an_adapter_has_other_weights(folder):
    for name in ("config.json", *CODE):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"auto_mapping": null}')
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors"):
        files_to_push(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert set(files_to_push(folder)) == UP - MODEL | {"adapter_config.json", "adapter_model.safetensors"}


# refusals

REFUSALS = {
    "not logged in": ({"token": False}, None, "nobody is logged in: run `hf auth login`"),
    "unknown token": ({"token": "hf_" + "x" * 36}, None, "the token is not valid.*hf auth login"),
    "another's name": ({"token": READER}, None, "the token gives no write access.*pull request"),
    "no branch": ({}, ("POST", "/branch/", 403), "the token gives no write access"),
    "preupload": ({}, ("POST", "/preupload/", 403), "the token gives no write access"),
    "conflict": ({}, ("POST", "/commit/", 409), "somebody else is changing it: run the same command again"),
    "precondition": ({}, ("POST", "/commit/", 412), "somebody else is changing it"),
    "too large": ({}, ("POST", "/commit/", 413), "does not accept a file or commit of this size"),
    "too large a file": ({}, ("PUT", "/storage/", 413), "does not accept a file or commit of this size"),
    "revoked meanwhile": ({}, ("POST", "/commit/", 401), "the token is not valid|does not exist"),
    "gone meanwhile": ({}, ("POST", "objects/batch", 404), "it does not exist"),
    "card": ({}, ("POST", "/validate-yaml", 400), "the Hub refused it.*Invalid metadata in README.md"),
    "server error": (
        {},
        ("POST", "/commit/", 500),
        "the connection broke .*the server has its reasons.*all of it was",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_push_is_one_clear_error_and_changes_nothing(hub, worker, folder, case):
    options, fault, message = REFUSALS[case]
    if fault:
        hub.fail(*fault, message="the server has its reasons")
        options = {"revision": "dev"} if case == "no branch" else options
    answer = worker.ask(
        f"try:\n    {push(folder, **options)}\nexcept PushError as error:\n"
        "    result = [str(error), error.__cause__ is None, error.__suppress_context__ or error.__context__ is None]\n"
    )
    assert "error" not in answer and answer["result"], answer
    text, *alone = answer["result"]
    assert re.match(f"me/mine: .*{message}", text, re.DOTALL) and all(alone), text
    assert not fault or "its reasons" in text
    assert ("Nothing was published" in text) == (case not in ("not logged in", "server error"))
    assert not any(repo.log() for repo in hub.repos.values())
    assert "\n" not in text and WRITER not in text


def test_a_public_repository_is_not_taken_for_a_private_one(hub, worker, folder):
    worker.run(push(folder))
    error = worker.ask(push(folder, private=True, commit_message="secret"))["error"]
    assert "me/mine exists and is public. Nothing was published" in error
    assert len(hub.repos["me/mine"].log()) == 1


def test_a_connection_that_breaks_once_is_taken_up(hub, worker, folder):
    hub.fail("PUT", "/storage/", cut=1000, times=1)
    worker.run(f"with patch('time.sleep'): {push(folder)}")
    assert set(hub.repos["me/mine"].log()[0].changed) == UP


@pytest.mark.parametrize("request_, cut", [(("PUT", "/storage/"), 1000), (("POST", "/commit/"), 100)])
def test_a_connection_that_stays_broken_leaves_nothing_and_the_push_can_be_repeated(
    hub, worker, folder, request_, cut
):
    hub.fail(*request_, cut=cut)
    error = worker.ask(f"with patch('time.sleep'): {push(folder)}")["error"]
    assert re.match(r"PushError: me/mine: the connection broke .* run the same command again", error), error
    assert not hub.repos["me/mine"].log()
    hub.faults.clear()
    sent, before = set(hub.large), len(hub.requests)
    worker.run(push(folder))
    assert set(hub.repos["me/mine"].log()[0].changed) == UP
    again = {path.split("/")[-1] for method, path in hub.requests[before:] if method == "PUT"}
    assert not again & sent and bool(again) == (request_[0] == "PUT"), "large files that are there are not sent again"


def test_a_push_whose_answer_was_lost_is_not_published_twice(hub, worker, folder):
    hub.fail("POST", "/commit/", cut="after", times=1)
    error = worker.ask(push(folder))["error"]
    assert "so all of it was published or nothing: run the same command again" in error
    worker.run(push(folder))
    assert [set(commit.changed) for commit in hub.repos["me/mine"].log()] == [UP]


def test_a_hub_that_is_not_there(hub, worker, folder):
    elsewhere = "with patch('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9'): "
    error = worker.ask(elsewhere + push(folder))["error"]
    assert re.match("PushError: me/mine: the connection broke", error), error
    assert not hub.requests


def test_a_refusal_through_xet_is_told_by_its_status(hub, worker, folder):
    pytest.importorskip("hf_xet")
    hub.fail("GET", "/xet-write-token/", 403, message="no")
    error = worker.ask("with patch('huggingface_hub.constants.HF_HUB_DISABLE_XET', False): " + push(folder))["error"]
    assert re.match("PushError: me/mine: the token gives no write access", error), error
    assert not hub.repos["me/mine"].log()


# the script


def script(worker, *words):
    code = f"import push_to_hub\nresult = push_to_hub.main({[str(word) for word in words]!r})"
    return worker.ask(code)


def test_the_script_lists_without_asking_the_hub_and_then_publishes(hub, worker, folder):
    listed = script(worker, folder, "me/mine", "--dry_run")
    assert {line.split()[-1] for line in listed["printed"].splitlines() if line.startswith(" ")} - {"files"} == UP
    assert "training_args.bin" in listed["printed"].splitlines()[-1] and "checkpoint-2" in listed["printed"]
    assert hub.requests == []
    pushed = script(worker, folder, "me/mine", "--private", "--revision", "dev", "--commit_message", "first")
    assert pushed["printed"] == f"published: {pushed['result']}\n"
    assert hub.repos["me/mine"].private and hub.repos["me/mine"].resolve("dev").message == "first"
    assert "discussions/1" in script(worker, folder, "me/mine", "--create_pr")["result"]


def test_the_script_says_in_one_line_what_is_wrong(hub, worker, folder):
    assert re.match("PushError: other/mine: the token gives no", script(worker, folder, "other/mine")["error"])
    (folder / "model.safetensors").unlink()
    assert "lacks model.safetensors" in script(worker, folder, "me/mine")["error"]
    assert "--create_pr" in script(worker, "--help")["printed"]


# what must not be seen


def test_no_token_in_any_output_or_file(hub, worker, folder):
    worker.run(f"from huggingface_hub.utils import logging; logging.set_verbosity_debug()\n{push(folder)}")
    hub.fail("POST", "/commit/", 403, message="no")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    answer = worker.ask(push(folder))
    worker.run("logging.set_verbosity_warning()")
    seen = json.dumps(answer).encode() + worker.log.read_bytes()
    files = [path for top in (folder, worker.log.parent) for path in top.rglob("*") if path.is_file()]
    assert len(files) > 20 and b"Uploading" in seen
    assert WRITER.encode() not in seen + b"".join(path.read_bytes() for path in files)


def test_the_page_on_sharing_does_what_it_says(hub, worker, stranger, tmp_path):
    text = (ROOT / "docs" / "guides" / "share.md").read_text()
    blocks = re.findall(r"```(?:py|python)\n(.*?)```", text, re.DOTALL)
    worker.run(f"import os; os.chdir({str(tmp_path)!r})\n" + "\n".join(blocks))
    assert hub.repos["me/rezero-small"].log()
