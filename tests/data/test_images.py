"""Files to arrays, arrays to batches: readers, augmentation, and data sets of images."""

import gzip
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from hf_rezero import ReZeroTrainer
from hf_rezero.data.augmentation import Augmentation, uniforms
from hf_rezero.data.images import DecodedImages, ImageDataset, channel_statistics, collate_images, read_images
from hf_rezero.models.image_processing_gray import GrayImageProcessorPil


RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 9, 11, 3)).astype(
    np.uint8
)  # not square, so that height and width cannot be mixed up
GREY = RNG.integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
LABELS = np.arange(12) % 3


def idx(array, compress=False):
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    return gzip.compress(content) if compress else content


@pytest.fixture(params=[False, True], ids=["plain", "gz"])
def idx_folder(request, tmp_path):
    ending = ".gz" if request.param else ""
    for prefix, count in (("train", 12), ("t10k", 5)):
        images, labels = GREY[:count, ..., 0], LABELS[:count].astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte{ending}").write_bytes(idx(images, request.param))
        (tmp_path / f"{prefix}-labels-idx1-ubyte{ending}").write_bytes(idx(labels, request.param))
    return tmp_path


def test_idx_folder_gives_its_images_and_labels(idx_folder):
    parts = read_images(idx_folder)
    assert sorted(parts) == ["test", "train"]
    for part, count in (("train", 12), ("test", 5)):
        images, labels = parts[part]
        assert np.array_equal(images, GREY[:count]) and np.array_equal(labels, LABELS[:count])
        assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("images", "expected"), [(COLOUR, COLOUR), (GREY, GREY), (GREY[..., 0], GREY)], ids=["rgb", "one", "none"]
)
def test_npz_gives_its_images_and_labels(tmp_path, images, expected):
    np.savez(tmp_path / "a.npz", train_x=images, train_y=LABELS, test_x=images[:4], test_y=LABELS[:4], test_idx=[1])
    parts = read_images(tmp_path / "a.npz")
    assert np.array_equal(parts["train"][0], expected) and np.array_equal(parts["test"][1], LABELS[:4])


def spoil(tmp_path, name, change):
    """A folder with IDX files of which one has its bytes changed."""
    for file, array in (("train-images-idx3-ubyte", GREY[..., 0]), ("train-labels-idx1-ubyte", LABELS.astype("u1"))):
        (tmp_path / file).write_bytes(change(idx(array)) if name in file else idx(array))
    return tmp_path


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nothing", "nothing does not exist: name an .npz file, or a folder"),
        (lambda path: path, "holds no pair of IDX files such as train-images-idx3-ubyte.gz"),
        (lambda path: spoil(path, "images", lambda b: b[:-7]), "promises 768 values and holds 761: download it again"),
        (lambda path: spoil(path, "labels", lambda b: b[:-1]), "promises 12 values and holds 11"),
        (
            lambda path: spoil(path, "images", lambda b: b"\x89PNG" + b),
            "starts with 89 50 4e 47: an IDX file of bytes",
        ),
        (lambda path: spoil(path, "images", lambda b: b""), "starts with : an IDX file of bytes starts with 00 00 08"),
        (lambda path: spoil(path, "labels", lambda b: idx(np.zeros(5, "u1"))), "has 12 images, and labels of uint8"),
        (lambda path: npz(path, x=GREY), "a.npz has no such arrays: train_x and train_y are needed"),
        (lambda path: npz(path, train_x=GREY), "a.npz has train_x: train_x and train_y are needed"),
        (lambda path: npz(path, train_x=GREY / 255, train_y=LABELS), "has images of float64 and shape"),
        (lambda path: npz(path, train_x=np.moveaxis(COLOUR, -1, 1), train_y=LABELS), r"shape \(12, 3, 9, 11\)"),
        (lambda path: npz(path, train_x=GREY, train_y=LABELS / 2), "labels of float64 and shape"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        read_images(make(tmp_path))


def test_a_truncated_archive_is_named(tmp_path, idx_folder):
    path = npz(tmp_path, train_x=GREY, train_y=LABELS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a.npz is damaged or cut short \(.*\): download it again"):
        read_images(path)
    for path in idx_folder.glob("train-images*.gz"):
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"idx3-ubyte.gz is damaged or cut short \(.*\): download it again"):
            read_images(idx_folder)


def test_statistics_are_those_of_the_channels():
    mean, std = channel_statistics(COLOUR)
    assert np.allclose(mean, COLOUR.mean((0, 1, 2)) / 255) and np.allclose(std, COLOUR.std((0, 1, 2)) / 255)
    mean, _ = channel_statistics(COLOUR, max_images=2)
    assert np.allclose(mean, COLOUR[[0, 11]].mean((0, 1, 2)) / 255)


def test_random_numbers_are_uniform_and_belong_to_seed_epoch_and_row():
    rows = np.arange(20_000)
    draws = uniforms(3, 5, rows, 7)
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in draws.T])
    assert (abs(counts - 1000) < 6 * 1000**0.5).all()
    assert abs(np.corrcoef(draws.T) - np.eye(7)).max() < 0.04
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.04
    for other in (uniforms(4, 5, rows, 7), uniforms(3, 6, rows, 7)):
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.02
    assert np.array_equal(uniforms(3, 5, rows[[7, 2]], 7), draws[[7, 2]])


def draws(count, **values):
    """Random numbers of every change, at the middle of their range where nothing else is given: no change."""
    names = ("y", "x", "flip", "brightness", "contrast", "saturation", "angle")
    return np.stack([np.full(count, values.get(name, 0.75 if name == "flip" else 0.5)) for name in names], 1)


def plain(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def test_the_middle_of_all_ranges_changes_nothing():
    for images in (COLOUR, GREY):
        augment = Augmentation(4, True, 0.3, 0.3, 0.3, 10)
        torch.testing.assert_close(augment(images, draws(12)), plain(images), rtol=0, atol=1e-3)
        assert torch.equal(Augmentation()(images, uniforms(0, 0, np.arange(12), 7)), plain(images))


def test_crops_are_windows_of_the_padded_image():
    padded = np.pad(COLOUR, ((0, 0), (2, 2), (2, 2), (0, 0)))
    numbers = uniforms(0, 0, np.arange(12), 7)
    numbers[:, 0] = np.linspace(0, 0.999, 12)
    seen = set()
    for image, changed, (y, x, *_) in zip(padded, Augmentation(crop_padding=2)(COLOUR, numbers), numbers, strict=True):
        top, left = int(y * 5), int(x * 5)
        assert torch.equal(changed, plain(image[None, top : top + 9, left : left + 11])[0])
        seen.add(top)
    assert seen == {0, 1, 2, 3, 4}


def test_half_of_the_images_are_mirrored():
    numbers = uniforms(0, 0, np.arange(4000), 7)
    images = np.tile(np.arange(4, dtype=np.uint8), (4000, 1)).reshape(4000, 1, 4, 1)
    changed = Augmentation(flip=True)(images, numbers)[:, 0, 0]
    mirrored = (changed == torch.tensor([3.0, 2, 1, 0])).all(1)
    assert ((changed == torch.arange(4.0)).all(1) | mirrored).all()
    assert 1850 < mirrored.sum() < 2150


def test_colours_change_as_pillow_does_it():
    smooth = (COLOUR // 2 + 60).astype(np.uint8)  # nothing is cut off at 0 or 255
    for name, enhance in (
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ):
        for draw in (0.0, 0.9):
            changed = Augmentation(**{name: 0.25})(smooth, draws(12, **{name: draw}))
            factor = 1 + 0.25 * (2 * draw - 1)
            pillow = np.stack([np.asarray(enhance(Image.fromarray(image)).enhance(factor)) for image in smooth])
            assert (changed - plain(pillow)).abs().max() < 1.6, name  # Pillow rounds
            assert (changed - plain(smooth)).abs().max() > 5, name
    brighter = Augmentation(brightness=1.0)(COLOUR, draws(12, brightness=0.99))
    assert brighter.max() == 255


def test_rotation_turns_the_image_about_its_centre():
    images = GREY[:2]
    turned = Augmentation(rotation=90)(images, draws(2, angle=1.0))  # the end of the range
    expected = [plain(np.rot90(images, quarter, axes=(1, 2)).copy()) for quarter in (1, 3)]
    assert min((turned - e).abs().max() for e in expected) < 1e-2
    wide = np.zeros((1, 9, 21, 1), np.uint8)
    wide[0, 4, 14] = 255  # 4 to the right of the centre
    turned = Augmentation(rotation=90)(wide, draws(1, angle=1.0))[0, 0]
    assert {(0, 10), (8, 10)} & set(map(tuple, turned.gt(200).nonzero().tolist()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"brightness": 1.5}, "brightness=1.5: factors of 1"),
        ({"saturation": -0.1}, "saturation=-0.1"),
        ({"crop_padding": -1}, "crop_padding=-1 and rotation=0.0"),
        ({"rotation": 200}, "0 or more pixels and 0 ... 180 degrees can be had"),
    ],
)
def test_impossible_augmentation_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**values)


def dataset(augmentation=None, seed=0):
    return ImageDataset(COLOUR, LABELS, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], augmentation, seed)


def test_batches_are_normalised_as_an_image_processor_does_it():
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    batch = next(iter(DataLoader(dataset(), batch_size=5, collate_fn=collate_images)))
    expected = processor([Image.fromarray(image) for image in COLOUR[:5]], return_tensors="pt").pixel_values
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == LABELS[:5].tolist() and batch["labels"].dtype == torch.int64


def test_batches_equal_single_images_in_any_order_and_any_worker():
    data = dataset(Augmentation(4, True, 0.2, 0.2, 0.2, 5))
    singles = [data[i]["pixel_values"] for i in range(12)]
    for workers in (0, 2):
        loader = DataLoader(data, 4, sampler=[3, 1, 11, 0, 5, 7, 2, 4], collate_fn=collate_images, num_workers=workers)
        got = torch.cat([batch["pixel_values"] for batch in loader])
        torch.testing.assert_close(got, torch.stack([singles[i] for i in (3, 1, 11, 0, 5, 7, 2, 4)]))


def test_epochs_and_seeds_augment_differently():
    augment = Augmentation(4, True)
    data, again, other = dataset(augment), dataset(augment), dataset(augment, seed=1)
    first = data[0]["pixel_values"]
    assert torch.equal(first, again[0]["pixel_values"])
    later = []
    for epoch in range(1, 9):
        data.set_epoch(epoch)
        later.append(data[0]["pixel_values"])
    assert sum(torch.equal(first, image) for image in later) < 3
    assert not all(torch.equal(data[i]["pixel_values"], other[i]["pixel_values"]) for i in range(12))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": LABELS[:5]}, "12 images with 5 labels"),
        ({"mean": [0.5]}, r"mean=\[0.5\] and std=.* for images with 3 channels"),
        ({"std": [0.1, 0.0, 0.1]}, "no std of 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(values, message):
    fitting = {"pixels": COLOUR, "labels": LABELS, "mean": [0.5] * 3, "std": [0.2] * 3}
    with pytest.raises(ValueError, match=message):
        ImageDataset(**fitting | values)


@pytest.fixture
def table(tmp_path):
    """Images of unequal size and mode."""
    rows = []
    for i, (mode, size) in enumerate((("RGB", (20, 30)), ("L", (16, 16)), ("RGBA", (7, 5)), ("P", (40, 10)))):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.resize(COLOUR[i], (size[1], size[0], 3))).convert(mode).save(path)
        rows.append(str(path))
    return Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}).cast_column("image", ImageFeature())


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_resized_as_an_image_processor_does_it(table, channels):
    images = DecodedImages(table, "image", (12, 9), channels)
    assert images.shape == (4, 12, 9, channels) == images[:].shape
    cls = GrayImageProcessorPil if channels == 1 else ViTImageProcessorPil
    mean, std = [0.4] * channels, [0.2] * channels
    processor = cls(size={"height": 12, "width": 9}, image_mean=mean, image_std=std, do_convert_rgb=channels == 3)
    data = ImageDataset(images, None, mean, std)
    batch = collate_images(data.__getitems__([2, 0, 3, 1]))
    assert set(batch) == {"pixel_values"}
    expected = processor([table[i]["image"] for i in (2, 0, 3, 1)], return_tensors="pt").pixel_values
    torch.testing.assert_close(batch["pixel_values"], expected)


def test_a_damaged_file_is_named(table, tmp_path):
    path = tmp_path / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"2.png cannot be read as an image \(.*\): remove it"):
        DecodedImages(table, "image", (8, 8), 3)[:]


def test_a_column_without_images_is_refused(table):
    with pytest.raises(ValueError, match="column 'label' holds no images; those that do: image"):
        DecodedImages(table, "label", (8, 8), 3)
    with pytest.raises(ValueError, match="those that do: none"):
        DecodedImages(Dataset.from_dict({"a": [1]}), "b", (8, 8), 3)


def test_resumed_training_sees_the_same_augmentation(arguments):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3)
    state = ResNetForImageClassification(config).state_dict()

    def train(resume, **extra):
        model = ResNetForImageClassification(config)
        model.load_state_dict(state)
        # 3 steps make an epoch: the checkpoint at step 4 lies inside the second
        args = arguments(max_steps=8, save_strategy="steps", save_steps=4, **extra)
        data = dataset(Augmentation(2, True, 0.2, 0.2, 0.2, 5))
        trainer = ReZeroTrainer(model, args, train_dataset=data, data_collator=collate_images)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(None)
    assert whole.train_dataset._epoch == 2
    halfway = train(f"{whole.args.output_dir}/checkpoint-4")
    workers = train(None, dataloader_num_workers=2)
    for (name, p), *others in zip(
        whole.model.named_parameters(), halfway.model.parameters(), workers.model.parameters(), strict=True
    ):
        assert all(torch.equal(p, q) for q in others), name
