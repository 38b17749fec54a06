"""`scripts/run_image_classification.py`, from the command line's arguments to what a run leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from support.launch import SCRIPTS, run_script
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_rezero.commands import classify_images as run_image_classification


MLP = {"model_type": "rezero_mlp", "config_overrides": "num_hidden_layers=3,hidden_size=16"}
RESNET = {"config_overrides": "embedding_size=4,hidden_sizes=[4,8],depths=[1,1]"}
CLASSES = ["dark", "light", "left"]


def pictures(count, size=8, channels=1, seed=0):
    """Images of three classes that can be told apart: dark, light, and light on the left; labels 0, 1, 2."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = np.where(labels == 1, 200, 60)[:, None, None, None].repeat(size, 1).repeat(size, 2).repeat(channels, 3)
    pixels[labels == 2, :, : size // 2] = 200
    return (pixels + rng.integers(-40, 40, pixels.shape)).astype(np.uint8), labels


def arguments(output_dir, **values):
    """A short run on the CPU; True is a flag and None leaves an argument out."""
    defaults = {
        "output_dir": output_dir,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "per_device_train_batch_size": 16,
        "use_cpu": True,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    items = [(name, value) for name, value in {**defaults, **values}.items() if value is not None]
    return [text for name, value in items for text in ([f"--{name}"] + ([] if value is True else [str(value)]))]


def results(folder):
    return json.loads(Path(folder, "all_results.json").read_text())


@pytest.fixture(scope="module")
def grey_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "grey.npz"
    (train_x, train_y), (test_x, test_y) = pictures(150), pictures(30, seed=1)
    np.savez(path, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
    return path


@pytest.fixture(scope="module")
def grey_run(grey_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grey") / "run"
    values = {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 40, "eval_strategy": "steps"}
    values |= {"eval_steps": 10, "save_strategy": "steps", "save_steps": 10, "load_best_model_at_end": "true"}
    values |= {"metric_for_best_model": "accuracy", "random_crop_padding": 1}
    return folder, run_image_classification.main(arguments(folder, train_file=grey_file, **MLP, **values))


def write_folder(folder, count, seed=0, names=CLASSES):
    """A folder for each class, with files of unequal size."""
    for i, (image, label) in enumerate(zip(*pictures(count, 10, 3, seed), strict=True)):
        path = folder / names[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((10 + i % 3, 10), Image.Resampling.NEAREST).save(path)
    return folder


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colour")
    values = {"train_dir": write_folder(folder / "train", 60), "validation_dir": write_folder(folder / "dev", 12, 1)}
    values |= {"test_dir": write_folder(folder / "test", 9, 2), "cache_dir": folder / "cache", "image_size": 8}
    values |= {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 40, "random_flip": None}
    metrics = run_image_classification.main(arguments(folder / "run", **RESNET, **values))
    return folder, metrics


def test_learns_arrays_and_leaves_all_files(grey_run):
    folder, metrics = grey_run
    assert metrics["eval_accuracy"] > 0.9 and metrics["test_accuracy"] > 0.9
    assert results(folder)["test_accuracy"] == metrics["test_accuracy"]
    left = {"config.json", "model.safetensors", "preprocessor_config.json", "training.png", "resweights.png"}
    assert left <= {path.name for path in folder.iterdir()}
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"} and model.config.num_channels == 1
    rows = (folder / "predict_results.txt").read_text().splitlines()
    assert rows[0] == "index\tprediction" and len(rows) == 31
    right = [row == f"{i}\t{i % 3}" for i, row in enumerate(rows[1:])]
    assert np.mean(right) == pytest.approx(metrics["test_accuracy"])


def test_learns_folders_and_names_their_classes(colour_run):
    folder, metrics = colour_run
    assert metrics["eval_accuracy"] > 0.8 and metrics["test_accuracy"] > 0.8
    model = AutoModelForImageClassification.from_pretrained(folder / "run")
    assert list(model.config.id2label.values()) == sorted(CLASSES)
    assert model.config.label2id["light"] == 2
    assert (folder / "run" / "predict_results.txt").read_text().splitlines()[1].split("\t")[1] in CLASSES


def evaluated_logits(folder, path, monkeypatch, tmp_path, **values):
    """The logits that the script's own evaluation has for what it predicts."""
    seen = []
    predict = run_image_classification.ReZeroTrainer.predict
    monkeypatch.setattr(
        run_image_classification.ReZeroTrainer, "predict", lambda *a: seen.append(predict(*a)) or seen[-1]
    )
    values = {"model_name_or_path": folder, "do_predict": True, "cache_dir": tmp_path / "cache"} | values
    run_image_classification.main(arguments(tmp_path / "again", **values))
    return torch.tensor(seen[0].predictions)


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_pipeline_gives_the_logits_of_the_evaluation(kind, grey_run, colour_run, grey_file, monkeypatch, tmp_path):
    if kind == "grey":
        folder, values = grey_run[0], {"train_file": grey_file}
        files = [tmp_path / f"{i}.png" for i in range(30)]
        for file, image in zip(files, pictures(30, seed=1)[0], strict=True):
            Image.fromarray(image[..., 0]).save(file)
    else:
        folder, values = colour_run[0] / "run", {"test_dir": colour_run[0] / "test"}
        files = sorted((colour_run[0] / "test").rglob("*.png"))
    expected = evaluated_logits(folder, None, monkeypatch, tmp_path, **values)
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**processor([Image.open(file) for file in files], return_tensors="pt")).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    answers = pipeline("image-classification", model=str(folder))([str(file) for file in files], top_k=3)
    for answer, row in zip(answers, expected.softmax(-1), strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert [scores[model.config.id2label[i]] for i in range(3)] == pytest.approx(row.tolist(), abs=1e-5)


def test_checkpoint_works_where_the_library_is_not_installed(grey_run, tmp_path):
    folder, _ = grey_run
    image, _ = pictures(3, 13)
    Image.fromarray(image[2, ..., 0]).save(tmp_path / "left.png")
    code = (
        "import sys; sys.modules['hf_rezero'] = None\n"
        "from transformers import pipeline\n"
        f"p = pipeline('image-classification', model={str(folder)!r}, trust_remote_code=True)\n"
        f"print(p({str(tmp_path / 'left.png')!r})[0])"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    here = pipeline("image-classification", model=str(folder))(str(tmp_path / "left.png"))[0]
    assert json.loads(done.stdout.splitlines()[-1].replace("'", '"')) == pytest.approx(here)


def test_checkpoint_evaluates_to_the_same_loss_with_its_own_normalisation(grey_run, grey_file, tmp_path):
    folder, metrics = grey_run
    again = run_image_classification.main(
        arguments(tmp_path / "a", do_eval=True, model_name_or_path=folder, train_file=grey_file)
    )
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    images, labels = pictures(30, seed=1)
    np.savez(tmp_path / "dark.npz", test_x=images // 2, test_y=labels)  # other images, no training images
    run_image_classification.main(
        arguments(tmp_path / "b", do_predict=True, model_name_or_path=folder, train_file=tmp_path / "dark.npz")
    )
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    halves = [Image.fromarray(image[..., 0] // 2) for image in images]
    with torch.no_grad():
        best = model(**processor(halves, return_tensors="pt")).logits.argmax(-1)
    rows = (tmp_path / "b" / "predict_results.txt").read_text().splitlines()[1:]
    assert [int(row.split("\t")[1]) for row in rows] == best.tolist()
    assert json.loads((tmp_path / "b" / "all_results.json").read_text())["test_accuracy"] < 0.9


def test_resumed_run_ends_with_the_same_weights(grey_file, tmp_path):
    values = {"train_file": grey_file, "do_train": True, "max_steps": 14, "save_strategy": "steps", "save_steps": 11}
    values |= {"random_crop_padding": 2, "random_flip": True, "brightness": 0.2, "random_rotation": 5, **MLP}
    run_image_classification.main(arguments(tmp_path / "run", **values))
    whole = AutoModelForImageClassification.from_pretrained(tmp_path / "run").state_dict()
    checkpoint = tmp_path / "run" / "checkpoint-11"
    assert (checkpoint / "preprocessor_config.json").is_file()
    run_image_classification.main(arguments(tmp_path / "again", resume_from_checkpoint=checkpoint, **values))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def make_table(count, seed=0, labels=True):
    images, classes = pictures(count, 8, 3, seed)
    features = Features({"img": ImageFeature(), "fine": ClassLabel(names=CLASSES), "id": Value("int64")})
    rows = {"img": [Image.fromarray(image) for image in images], "fine": classes if labels else [-1] * count}
    return Dataset.from_dict({**rows, "id": range(count)}, features=features)


@pytest.fixture(scope="module")
def saved_dataset(tmp_path_factory):
    """A data set as the Hub has them: own names of columns, classes in an order of their own, no labels for testing."""
    folder = tmp_path_factory.mktemp("hub") / "shapes"
    (folder / "data").mkdir(parents=True)
    for part, table in (("train", make_table(60)), ("test", make_table(6, labels=False))):
        table.to_parquet(folder / "data" / f"{part}-00000-of-00001.parquet")
    return folder


def test_data_sets_keep_the_order_of_their_classes(saved_dataset, tmp_path):
    values = {"dataset_name": saved_dataset, "image_column_name": "img", "label_column_name": "fine"}
    values |= {"do_train": True, "do_eval": True, "do_predict": True, "cache_dir": tmp_path / "cache", **RESNET}
    metrics = run_image_classification.main(arguments(tmp_path / "run", **values))
    assert "eval_accuracy" in metrics and "test_accuracy" not in metrics
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert list(config["id2label"].values()) == CLASSES
    assert len((tmp_path / "run" / "predict_results.txt").read_text().splitlines()) == 7


def test_a_fifth_of_the_images_is_cut_off_for_validation_or_the_test_images_are_taken(grey_file, tmp_path, caplog):
    parts, _ = run_image_classification.load_parts(
        run_image_classification.DataArguments(train_file=str(grey_file)), None
    )
    cut = run_image_classification.cut_validation(parts, 0.2)
    assert [len(cut[part].images) for part in ("train", "validation", "test")] == [120, 30, 30]
    rows = {image.tobytes() for part in ("train", "validation") for image in cut[part].images}
    assert rows == {image.tobytes() for image in parts["train"].images}
    assert run_image_classification.cut_validation(parts, 0.0)["validation"] is parts["test"]


def test_new_classes_need_a_new_classifier(colour_run, grey_run, tmp_path):
    folder, _ = colour_run
    two = write_folder(tmp_path / "two", 24, names=["cat", "dog", "dog"])
    values = {
        "model_name_or_path": folder / "run",
        "train_dir": two,
        "do_train": True,
        "cache_dir": tmp_path / "cache",
    }
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        run_image_classification.main(arguments(tmp_path / "a", **values))
    run_image_classification.main(arguments(tmp_path / "b", ignore_mismatched_sizes=True, **values))
    old, new = (AutoModelForImageClassification.from_pretrained(path) for path in (folder / "run", tmp_path / "b"))
    assert new.config.id2label == {0: "cat", 1: "dog"}
    # the checkpoint's images had another mean: its normalisation goes with its weights
    means = [AutoImageProcessor.from_pretrained(path).image_mean for path in (folder / "run", tmp_path / "b")]
    assert means[0] == means[1]


def test_means_may_be_given(grey_file, tmp_path):
    values = {"train_file": grey_file, "do_train": True, "max_steps": 1, **MLP}
    run_image_classification.main([*arguments(tmp_path / "a", **values), "--image_mean", "0.5", "--image_std", "0.25"])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "a")
    assert (*processor.image_mean, *processor.image_std) == (0.5, 0.25)


def test_stock_models_train_too(grey_file, tmp_path):
    overrides = "num_channels=1,embedding_size=4,hidden_sizes=[4],depths=[1],layer_type=basic"
    values = {"train_file": grey_file, "do_train": True, "do_eval": True, "model_type": "resnet"}
    metrics = run_image_classification.main(arguments(tmp_path / "a", config_overrides=overrides, **values))
    assert metrics["eval_loss"] < 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give exactly one of --dataset_name, --train_file, and folders"),
        ({"train_file": "GREY", "train_dir": "x"}, "give exactly one of"),
        ({"train_dir": "nowhere"}, "nowhere is not a folder: name one that does"),
        ({"train_dir": "EMPTY"}, "holds no images: name one that does"),
        ({"train_file": "GREY", "image_size": 16}, "--image_size 16 for arrays of 8 x 8: leave it out"),
        ({"train_file": "GREY", "image_mean": 0.5}, "--image_mean and --image_std belong together"),
        ({"train_file": "GREY", "train_val_split": 1.5}, "train_val_split=1.5: expected a share"),
        ({"train_file": "GREY", "brightness": 3}, "brightness=3.0"),
        ({"train_file": "ONE"}, "the training images are all of the class '0': two are needed"),
        ({"train_file": "NEW"}, "the test part has the classes 7, which the model does not know: those are 0, 1, 2"),
        ({"train_file": "GREY", "config_overrides": "num_channels=3"}, "have 1 channels and the model num_channels=3"),
        ({"dataset_name": "SHAPES"}, "has no column 'image', only img, fine, id: name the right one with --image_col"),
        ({"dataset_name": "SHAPES", "image_column_name": "img"}, "no column 'label', only img, fine, id"),
        ({"dataset_name": "SHAPES", "image_column_name": "id"}, "the train part has no column 'label'"),
        (
            {"dataset_name": "SHAPES", "image_column_name": "id", "label_column_name": "fine"},
            "column 'id' of the train part holds no images but",
        ),
    ],
)
def test_bad_input_is_one_clear_error(values, message, grey_file, saved_dataset, tmp_path):
    images, labels = pictures(30)
    np.savez(tmp_path / "one.npz", train_x=images, train_y=labels * 0, test_x=images, test_y=labels * 0)
    np.savez(tmp_path / "new.npz", train_x=images, train_y=labels, test_x=images, test_y=labels * 0 + 7)
    (tmp_path / "empty").mkdir()
    paths = {"GREY": grey_file, "ONE": tmp_path / "one.npz", "NEW": tmp_path / "new.npz", "SHAPES": saved_dataset}
    paths["EMPTY"] = tmp_path / "empty"
    values = {name: paths.get(value, value) for name, value in values.items()}
    values = {**MLP, "do_train": True, "do_predict": True, "cache_dir": tmp_path / "cache", **values}
    with pytest.raises(ValueError, match=message):
        run_image_classification.main(arguments(tmp_path / "run", **values))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_part_that_is_missing_is_asked_for(tmp_path):
    images, labels = pictures(30)
    np.savez(tmp_path / "a.npz", train_x=images, train_y=labels)
    values = {"train_file": tmp_path / "a.npz", **MLP}
    with pytest.raises(ValueError, match="there are no images for test, only for train, validation"):
        run_image_classification.main(arguments(tmp_path / "a", do_predict=True, **values))
    with pytest.raises(ValueError, match="there are no images for validation, only for train"):
        run_image_classification.main(arguments(tmp_path / "b", do_eval=True, train_val_split=0, **values))


def test_accumulated_batches_give_the_weights_of_one_large_batch(grey_file, tmp_path):
    values = {"train_file": grey_file, "do_train": True, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, **MLP}
    weights = []
    for batch, steps in ((16, 1), (4, 4)):
        values |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_grad_norm": 0}
        run_image_classification.main(arguments(tmp_path / str(batch), **values))
        weights.append(AutoModelForImageClassification.from_pretrained(tmp_path / str(batch)).state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(grey_file, tmp_path):
    values = {"train_file": grey_file, "do_train": True, "do_eval": True, "random_crop_padding": 2, **MLP}
    losses = {}
    for processes, batch in ((1, 16), (2, 8)):
        folder = tmp_path / str(processes)
        values |= {"per_device_train_batch_size": batch, "logging_steps": 1, "max_steps": 12}
        run_script("run_image_classification.py", *arguments(folder, **values), processes=processes)
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses[processes] = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[2] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("recipe", ["mnist_mlp", "cifar10_resnet20", "cifar10_superconvergence"])
def test_recipes_run(recipe, tmp_path):
    (train_x, train_y), (test_x, test_y) = pictures(24, channels=3), pictures(6, channels=3)
    np.savez(tmp_path / "a.npz", train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
    values = {"dataset_name": "", "train_file": tmp_path / "a.npz", "per_device_train_batch_size": 8, "max_steps": 2}
    values |= {"eval_strategy": "no", "dataloader_num_workers": 0, "logging_steps": 1, "learning_rate": None}
    argv = [str(SCRIPTS / "configs" / f"{recipe}.yaml"), *arguments(tmp_path / "run", **values)]
    run_image_classification.main(argv)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    expected = {"mnist_mlp": [2e-3, 1e-3], "cifar10_resnet20": [0.1, 0.01], "cifar10_superconvergence": [0.032, 0.616]}
    assert rates == pytest.approx(expected[recipe], rel=0.01)
    assert all(np.isfinite(entry["loss"]) for entry in log if "loss" in entry)
