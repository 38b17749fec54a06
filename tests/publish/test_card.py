"""Model cards: every number is one that the run left, and nothing else is said."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from support.training import TEXT, make_trainer
from torch.utils.data import Subset
from transformers import GPT2Config, GPT2LMHeadModel

from hf_rezero import (
    PruningConfig,
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroForSequenceClassification,
    ReZeroTrainingArguments,
    byte_tokenizer,
)
from hf_rezero.commands.running import evaluate_and_save, train_and_save
from hf_rezero.data.description import DataDescription, describe_data
from hf_rezero.data.images import ImageDataset
from hf_rezero.data.masking import MaskedBytes
from hf_rezero.data.units import tokens_are_bytes
from hf_rezero.data.windows import ByteDataset, evaluation_windows
from hf_rezero.publish import card as card_module
from hf_rezero.publish.card import MARKER, write_model_card
from hf_rezero.publish.metadata import check_metadata
from hf_rezero.publish.record import RunRecord, results_of_log
from hf_rezero.publish.redact import command_line, redact


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with GradInit and pruning, as the scripts leave it, and its trainer."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-model"
    torch.manual_seed(0)
    config = ReZeroConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, resweight_init=0.3)
    values = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    values |= {"gradinit_steps": 3, "weight_decay": 0.01, "seed": 7, "disable_tqdm": True, "use_cpu": True}
    args = ReZeroTrainingArguments(str(folder), hub_token="hf_abcdefghijklmnopqrst", **values)
    trainer = make_trainer(
        ReZeroForCausalLM(config),
        args,
        eval_dataset=Subset(evaluation_windows(TEXT[:300], 16), range(20)),
        processing_class=byte_tokenizer(),
        pruning=PruningConfig(target_sparsity=0.4),
    )
    train_and_save(trainer, None)
    evaluate_and_save(trainer, trainer.eval_dataset, "eval")
    evaluate_and_save(trainer, evaluation_windows(TEXT[300:500], 16), "test")
    trainer.create_model_card(dataset="enwik8, first 700 bytes", tasks="text-generation", tags="mine")
    return trainer


@pytest.fixture
def folder(run, tmp_path):
    """A copy of what the run left."""
    return Path(shutil.copytree(run.args.output_dir, tmp_path / "tiny-model"))


def edit(folder, name, **changes):
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: v for key, v in (content | changes).items() if v is not None}))


def index_of(card):
    return metadata_load(card).get("model-index")


def test_metadata_hold_the_numbers_of_the_result_file_to_the_last_digit(folder):
    results, data = json.loads((folder / "all_results.json").read_text()), metadata_load(folder / "README.md")
    name, found = model_index_to_eval_results(data["model-index"])
    assert name == "tiny-model"
    assert {(r.dataset_split, r.metric_type): r.metric_value for r in found} == {
        ("validation", "bits_per_byte"): results["eval_bpb"],
        ("test", "bits_per_byte"): results["test_bpb"],
    }
    assert {r.dataset_name for r in found} == {"enwik8, first 700 bytes"}
    assert {r.task_type for r in found} == {data["pipeline_tag"]} == {"text-generation"}
    assert found[0].dataset_args == {"examples": 20, "of": 37, "bytes": 300, "block_size": 16, "stride": 8}
    assert data["library_name"] == "transformers"
    assert {"hf_rezero", "rezero", "byte-level", "gradinit", "pruning", "mine"} == set(data["tags"])
    assert not {"license", "language", "base_model", "datasets"} & data.keys()


def test_each_number_of_the_text_stands_in_a_file_of_the_run(folder):
    known = "".join(p.read_text() for p in folder.rglob("*.json"))
    values = {f"{float(value):.5g}" for value in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", known)}
    report = json.loads((folder / "pruning/report.json").read_text())
    derived = {
        f"{report['sparsity']:.1%}".rstrip("%"),
        f"{report['max_output']:.3g}",
        f"{report['max_difference']:.1e}",
    }
    kept = re.search(r"kept ([^;]*);", (folder / "README.md").read_text()).group(
        1
    )  # counts of the ranges in the report
    derived |= set(re.findall(r"\d+", kept)) | {"2"}  # of ln 2
    text = ModelCard.load(folder / "README.md").text
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)  # the command of the tests
    numbers = re.findall(r"(?<![\w.-])\d[\d,]*\.?\d*(?:e-?\d+)?(?![\w.])", text.replace(".. ", " "))
    assert len(numbers) > 60
    strange = [n for n in numbers if n not in derived and f"{float(n.replace(',', '').rstrip('.')):.5g}" not in values]
    assert not strange


def test_a_changed_result_changes_the_card(folder):
    edit(folder, "all_results.json", eval_bpb=1.2345678901)
    edit(folder, "run.json", results={})
    text = write_model_card(folder).read_text()
    assert "value: 1.2345678901" in text
    assert "| bits per byte | 1.2346 |" in text


def test_it_tells_of_gradinit_and_of_pruning(folder):
    text = (folder / "README.md").read_text()
    gradinit, pruning = (json.loads((folder / n / "report.json").read_text()) for n in ("gradinit", "pruning"))
    assert "### GradInit" in text and "### Pruning" in text
    for name, scale in gradinit["scales"].items():
        assert f"| {name} | {scale:.5g} |" in text
    assert f"{pruning['parameters_before']:,} -> {pruning['parameters_after']:,} parameters" in text
    assert f"masked and pruned model differ by at most {pruning['max_difference']:.1e}" in text
    assert f"of {pruning['parameters_after']:,} parameters" in text.split("## Results")[0]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"resweights.png", "training.png", "gradinit/report.png", "pruning/report.png"} == set(pictures)
    (folder / "pruning/report.png").unlink()
    assert "(pruning/report.png)" not in write_model_card(folder).read_text()


def test_what_is_not_there_is_left_out(folder, tmp_path):
    for name in ("gradinit", "pruning"):
        shutil.rmtree(folder / name)
    (folder / "resweights.png").unlink()
    text = write_model_card(folder).read_text()
    assert "GradInit" not in text and "### Pruning" not in text and "resweights.png" not in text
    assert not {"gradinit", "pruning"} & set(metadata_load(folder / "README.md")["tags"])
    (tmp_path / "empty").mkdir()
    text = write_model_card(tmp_path / "empty").read_text()
    assert not re.search(r"None|null|TODO|More [Ii]nformation|nan", text)
    assert "model-index" not in text and "## Results" not in text and "How it was made" not in text


def test_without_results_there_is_no_model_index(folder):
    (folder / "all_results.json").unlink()
    (folder / "trainer_state.json").unlink()
    edit(folder, "run.json", results={})
    data = metadata_load(write_model_card(folder))
    assert "model-index" not in data and "metrics" not in data
    assert "No evaluation of these weights was recorded." in (folder / "README.md").read_text()


def test_results_of_data_without_a_name_are_not_indexed(folder):
    edit(folder, "run.json", datasets=None)
    assert index_of(write_model_card(folder)) is None
    assert "| bits per byte |" in (folder / "README.md").read_text()
    assert index_of(write_model_card(folder, dataset="enwik8"))[0]["results"][0]["dataset"]["name"] == "enwik8"


def test_numbers_of_other_weights_are_not_results(folder):
    edit(folder, "all_results.json", before_bpb=9.5, pruned_bpb=9.25, eval_bpb=9.125)
    edit(folder, "run.json", results={})
    card = write_model_card(folder)
    values = {m["value"] for r in index_of(card)[0]["results"] for m in r["metrics"]}
    assert 9.125 in values and not {9.5, 9.25} & values
    assert re.search(
        r"\| before \| 9.5 \|\n\| right after pruning \| 9.25 \|\n\| at the end \| 9.125 \|", card.read_text()
    )


def test_stages_and_sizes_are_those_of_the_report(folder):
    stages = {"metric": "accuracy", "quality_before": 0.5, "quality_at_the_end": 0.25, "bytes_before": 2000}
    edit(folder, "pruning/report.json", **stages, bytes_after=1000)
    edit(folder, "all_results.json", before_accuracy=0.75, pruning_bytes_before=7, pruning_bytes_after=6)
    text = write_model_card(folder).read_text()
    assert "| accuracy on the validation data | value |\n|---|---|\n| before | 0.5 |\n| at the end | 0.25 |\n" in text
    assert "Weight files: 2,000 -> 1,000 bytes." in text


@pytest.mark.parametrize(("best", "expected"), [(None, 3.0), (4, None)])
def test_a_folder_without_record_counts_only_evaluations_of_the_last_weights(tmp_path, best, expected):
    log = [{"step": 4, "eval_bpb": 2.0}, {"step": 8, "eval_bpb": 3.0}, {"step": 8, "train_runtime": 1.0}]
    kept = {} if best is None else {"best_model_checkpoint": "checkpoint-4", "best_global_step": best}
    edit(tmp_path, "trainer_state.json", global_step=8, log_history=log, **kept)
    edit(tmp_path, "config.json", architectures=["ReZeroForCausalLM"], vocab_size=264)
    index = index_of(write_model_card(tmp_path, dataset="a"))
    assert (index and index[0]["results"][0]["metrics"][0]["value"]) == expected


def test_evaluations_count_that_saw_the_saved_weights():
    log = [{"step": step, "eval_bpb": float(step)} for step in (2, 4, 6)]
    end = {"step": 6, "train_runtime": 1.0}
    assert results_of_log([*log, end], step=6) == {"eval_bpb": 6.0}
    assert results_of_log([*log, end], step=4) == {"eval_bpb": 4.0}  # the best weights, loaded at the end
    assert results_of_log([*log, end], step=5) == {}
    assert results_of_log([*log, end, {"step": 6, "eval_bpb": 3.5}], step=4) == {"eval_bpb": 3.5}


def test_tokens_that_are_no_bytes_have_no_bits_per_byte(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    edit(tmp_path, "all_results.json", eval_bpb=5.5)
    card = write_model_card(tmp_path, dataset="a")
    assert index_of(card)[0]["results"][0]["metrics"][0]["type"] == "bits_per_token"
    assert "bits per byte" not in card.read_text().lower() and "hf_rezero  #" not in card.read_text()


def test_a_diverged_run_is_not_indexed(folder):
    edit(folder, "run.json", results={"eval_bpb": float("nan")})
    edit(folder, "all_results.json", test_bpb=None)
    assert index_of(write_model_card(folder)) is None
    assert "| bits per byte | nan |" in (folder / "README.md").read_text()


def test_an_evaluation_adds_to_the_record_of_the_training(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/run_clm.py", "--do_eval"])
    args = ReZeroTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, seed=99)
    trainer = make_trainer(ReZeroForCausalLM.from_pretrained(folder), args)
    metrics = trainer.evaluate()
    trainer.create_model_card()
    record = json.loads((folder / "run.json").read_text())
    assert record["results"]["eval_bpb"] == metrics["eval_bpb"] and record["results"]["test_bpb"]
    assert (record["arguments"]["seed"], record["steps"], record["evaluations"]["eval"]["examples"]) == (7, 8, 37)
    assert record["commands"][-1] == "python scripts/run_clm.py --do_eval"


def test_a_record_comes_back_and_ignores_what_it_does_not_know(folder):
    saved = json.loads((folder / "run.json").read_text())
    record = RunRecord.from_dict(saved | {"mood": "good", "hardware": None})
    assert record.to_dict() == {name: value for name, value in saved.items() if name != "hardware"}
    assert (record.machine.hardware, record.measured.evaluations["eval"].stride) == (None, 8)
    assert RunRecord.from_dict({}).to_dict() == {} and RunRecord.from_dict({"steps": 0}).to_dict() == {"steps": 0}


def test_data_sets_say_what_they_are():
    windows = {"bytes": 100, "block_size": 16}
    assert describe_data(ByteDataset(TEXT[:100], 16)).to_dict() == {"examples": 5, **windows, "stride": 16}
    assert describe_data(MaskedBytes(TEXT[:100], 16, 0.15)).to_dict() == {"examples": 5, **windows, "stride": 16}
    part = Subset(evaluation_windows(TEXT[:100], 16, 4), range(3))
    assert describe_data(part).to_dict() == {"examples": 3, "of": 22, **windows, "stride": 4}
    images = ImageDataset(torch.zeros(4, 8, 8, 1, dtype=torch.uint8).numpy(), None, [0.5], [0.5])
    assert describe_data(images) == DataDescription(examples=4) == describe_data([1, 2, 3, 4])
    assert describe_data(iter([])).to_dict() == {}


def test_the_tokenizer_says_whether_tokens_are_bytes():
    other = byte_tokenizer()
    other.add_tokens(["word"])
    assert tokens_are_bytes(byte_tokenizer(), 50257) and not tokens_are_bytes(other, 264)
    sizes = {None: False, 0: False, 264: True, 512: True, 513: False}
    assert {size: tokens_are_bytes(None, size) for size in sizes} == sizes
    assert tokens_are_bytes(object(), 264)  # an image processor has no vocabulary


def test_the_sentences_stand_in_the_template_alone(folder, tmp_path, monkeypatch):
    words = card_module.TEMPLATE.read_text()
    old = re.sub("{#.*?#}|{%.*?%}|{{.*?}}", "", words, flags=re.DOTALL)
    assert all(sentence in old for sentence in ("One run, one seed", "Started from", "of the cut tensors removed"))
    monkeypatch.setattr(card_module, "TEMPLATE", tmp_path / "mine.md")
    (tmp_path / "mine.md").write_text(words.replace("One run, one seed", "This is a single run"))
    changed = write_model_card(folder).read_text()
    monkeypatch.undo()
    assert "This is a single run" in changed
    assert changed.replace("This is a single run", "One run, one seed") == write_model_card(folder).read_text()


def test_the_code_of_the_card_loads_the_model(folder, run):
    text = (folder / "README.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(codes) == 2 and "trust_remote_code=True" in codes[1] and "import hf_rezero" not in codes[1]
    ids = list(range(16))
    code = f"import torch\nprint(model(torch.tensor([{ids}])).logits.double().sum().item())"
    block = f"import sys; sys.modules['hf_rezero'] = None\n{codes[1]}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=folder.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = run.model.eval()(torch.tensor([ids])).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)


def test_a_card_by_hand_stays(folder, run):
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="written by hand"):
        write_model_card(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert MARKER in write_model_card(folder, overwrite=True).read_text()
    assert not list(folder.rglob("*.tmp"))


def test_the_trainer_leaves_a_card_by_hand(make_config, arguments, caplog):
    trainer = make_trainer(ReZeroForCausalLM(make_config()), arguments())
    path = Path(trainer.args.output_dir, "README.md")
    path.parent.mkdir(exist_ok=True)
    path.write_text("# Mine\n")
    trainer.create_model_card()
    assert path.read_text() == "# Mine\n"


def test_a_classifier_is_one(make_config, tmp_path):
    model = ReZeroForSequenceClassification(make_config(is_causal=False, num_labels=2))
    model.save_pretrained(tmp_path)
    edit(tmp_path, "all_results.json", eval_accuracy=0.75, eval_loss=0.5, eval_runtime=2.0, eval_steps_per_second=3.0)
    edit(tmp_path, "run.json", datasets=["stanfordnlp/sst2"], hub_datasets=["stanfordnlp/sst2"], steps=3)
    card = write_model_card(tmp_path, license="mit", language="en")
    data = metadata_load(card)
    assert (data["pipeline_tag"], data["license"], data["language"]) == ("text-classification", "mit", "en")
    assert data["datasets"] == ["stanfordnlp/sst2"] and data["metrics"] == ["accuracy"]
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75, "name": "accuracy"}]
    assert "AutoModelForSequenceClassification" in card.read_text()
    assert "runtime" not in card.read_text() and "| loss | 0.5 |" in card.read_text()


def test_special_characters_stay_text(folder):
    name = "a|b *c* `d` <img src=x> [e](f) {{ g }}\n---\nlicense: mit"
    edit(folder, "run.json", commands=["python a.py --x '```'\n---\nb"])
    card = write_model_card(folder, dataset=name)
    assert index_of(card)[0]["results"][0]["dataset"]["name"] == name
    assert "license" not in metadata_load(card)
    rows = [line for line in card.read_text().splitlines() if line.startswith("| a\\|b")]
    assert len(rows) == 4 and all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    assert "<img" not in ModelCard.load(card).text and "{{ g }}" in rows[0]
    assert "````bash\npython a.py --x '```'\n---\nb\n````" in card.read_text()


SECRETS = [
    ["--token", "hf_xxx"],
    ["--token=hf_xxx"],
    ["--hub_token", "hf_xxx"],
    ["--hub-token", "hf_xxx"],
    ["--tok", "hf_xxx"],
    ["--wandb_api_key", "hf_xxx"],
    ["--password", "hf_xxx"],
    ["--train_file", "https://me:hf_xxx@example.org/text.xz"],
    ["--train_file", "https://example.org/text.xz?token=hf_xxx"],
    ["--model_name_or_path", "hf_xxxABCDEFGHIJKLMNOPQRSTUVW"],
]


@pytest.mark.parametrize("arguments", SECRETS, ids=lambda arguments: arguments[0])
def test_secrets_of_the_command_line_are_taken_out(arguments):
    command = command_line(argv=["train.py", *arguments, "--seed", "3"])
    assert "hf_xxx" not in command
    assert command.startswith("python train.py") and command.endswith("--seed 3")


def test_what_is_no_secret_stays_in_the_command():
    argv = ["scripts/a.py", "--max_tokens", "5", "--pad_token", "<pad>", "--flag", "data/x.txt", "../y", "--a=b c"]
    assert (
        command_line(argv=argv)
        == "python scripts/a.py --max_tokens 5 --pad_token '<pad>' --flag data/x.txt ../y '--a=b c'"
    )
    assert command_line(argv=["/usr/lib/ipykernel_launcher.py", "-f", "/root/k.json"]) is None


def test_folders_of_the_machine_are_taken_out(folder, run):
    paths = ["/home/me/a.xz", "~/a.xz", "C:\\me\\a.xz", "file:///home/me/a.xz", "x=/home/me/a.xz,y=1"]
    assert [redact(path) for path in paths] == ["a.xz", "a.xz", "a.xz", "a.xz", "x=a.xz,y=1"]
    text = (folder / "README.md").read_text() + (folder / "run.json").read_text()
    assert str(Path(run.args.output_dir).parent) not in text and str(Path.home()) not in text
    assert "hf_abcdefghij" not in text and "hub_token" not in text


BAD = {
    "license": {"license": "Apache 2"},
    "license_name": {"license": "other"},
    "language": {"language": "English"},
    "pipeline_tag": {"pipeline_tag": "talking"},
    "base_model": {"base_model": "/home/me/model"},
    "datasets": {"datasets": ["enwik8, first 4.15 MB"]},
    "tags": {"tags": [1]},
    "finite": {
        "model-index": [
            {
                "name": "a",
                "results": [
                    {
                        "task": {"type": "t"},
                        "dataset": {"name": "d", "type": "d"},
                        "metrics": [{"type": "m", "value": float("nan")}],
                    }
                ],
            }
        ]
    },
    "task.type": {
        "model-index": [
            {"name": "a", "results": [{"dataset": {"name": "d", "type": "d"}, "metrics": [{"type": "m", "value": 1}]}]}
        ]
    },
    "dataset.type": {
        "model-index": [
            {
                "name": "a",
                "results": [{"task": {"type": "t"}, "dataset": {"name": "d"}, "metrics": [{"type": "m", "value": 1}]}],
            }
        ]
    },
    "verified": {
        "model-index": [
            {
                "name": "a",
                "results": [
                    {
                        "task": {"type": "t"},
                        "dataset": {"name": "d", "type": "d"},
                        "metrics": [{"type": "m", "value": 1, "verified": True}],
                    }
                ],
            }
        ]
    },
    "results": {"model-index": [{"name": "a", "results": []}]},
}


@pytest.mark.parametrize("problem", BAD)
def test_metadata_that_the_hub_would_refuse_are_refused(problem):
    with pytest.raises(ValueError, match=problem):
        check_metadata(BAD[problem])


def test_damaged_and_missing_files_are_named(folder):
    (folder / "all_results.json").write_text('{"eval_')
    with pytest.raises(ValueError, match=r"all_results.json is damaged"):
        write_model_card(folder)
    with pytest.raises(ValueError, match="is not a folder"):
        write_model_card(folder / "nowhere")


CARDS = sorted(Path(__file__).parents[2].glob("model_cards/*/README.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_the_cards_of_this_repository_are_what_their_runs_measured(card, tmp_path):
    folder = Path(shutil.copytree(card.parent, tmp_path / card.parent.name))
    data = metadata_load(card)
    options = {name: data[name] for name in ("license", "language") if name in data}
    options["dataset"] = data["model-index"][0]["results"][0]["dataset"]["name"]
    assert write_model_card(folder, **options).read_text() == card.read_text()
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr|mnt|data)/", card.read_text())
    record = json.loads((folder / "run.json").read_text())
    assert RunRecord.from_dict(record).to_dict() == record


def test_the_gallery_shows_every_card():
    gallery = (Path(__file__).parents[2] / "docs" / "gallery.md").read_text()
    assert CARDS and all(f"(../model_cards/{card.parent.name}/README.md)" in gallery for card in CARDS)
