"""Checkpoints that are damaged in every way: an older whole one is taken and the bad one named, or one clear error."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.training import make_trainer, same, weights

from hf_rezero import GradInitConfig, PruningConfig, ReZeroForCausalLM
from hf_rezero.trainer.checkpoints import MANIFEST, check_model_files, fault_of, last_checkpoint
from hf_rezero.trainer.gradinit import state_file


def flip(path):
    """Change one bit in the middle, or of the largest part of an archive: between its parts are bytes that mean nothing."""
    content, place = bytearray(path.read_bytes()), path.stat().st_size // 2
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda part: part.file_size)
            place = content.index(archive.read(largest)) + largest.file_size // 2
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "bit-flipped": flip,
    "replaced": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "removed": lambda path: path.unlink(),
}
# of an early release, or killed before the manifest: a JSON file that is JSON still, and weights and code, cannot tell
UNSEEN = {"bit-flipped": (".json", ".safetensors"), "removed": ("config.json", "training_args.bin", "pruning.pt")}
CODE = (".py",)
PRUNING = {"method": "l1", "lambda_": 0.05, "start_step": 1, "end_step": 5}


@pytest.fixture
def run(make_config, arguments):
    """A run with masks that has saved the checkpoints 2 and 4, and a trainer that could resume it."""

    def make():
        torch.manual_seed(0)
        args = arguments(max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=2)
        return make_trainer(ReZeroForCausalLM(make_config()), args, pruning=PruningConfig(**PRUNING))

    trainer = make()
    trainer.train()
    newest, older = (Path(trainer.args.output_dir, f"checkpoint-{step}") for step in (6, 4))
    return trainer, newest, older, make


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_every_file_of_a_checkpoint_is_missed_when_it_is_damaged(run, damage, with_manifest, caplog):
    _, newest, older, make = run
    names = [path.name for path in newest.iterdir()]
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "pruning.pt"}
    assert states | {"config.json", "model.safetensors", MANIFEST} <= set(names)
    if not with_manifest:
        (newest / MANIFEST).unlink()
        names.remove(MANIFEST)
        names = [name for name in names if not name.endswith(UNSEEN.get(damage, ()) + CODE)]
    assert last_checkpoint(older.parent) == str(newest)
    again = make()
    for name in names:
        content = (newest / name).read_bytes()
        DAMAGES[damage](newest / name)
        if (damage, name) == ("removed", MANIFEST):
            assert last_checkpoint(older.parent) == str(newest)
        else:
            caplog.clear()
            assert last_checkpoint(older.parent) == str(older), name
            assert f"{newest} is passed over: it " in caplog.text
            assert name == MANIFEST or damage == "removed" or name in caplog.text, caplog.text
            with pytest.raises(ValueError, match="checkpoint-6"):
                again.train(resume_from_checkpoint=str(newest))
        (newest / name).write_bytes(content)
    assert last_checkpoint(older.parent) == str(newest)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", MANIFEST])
def test_a_run_resumes_before_its_damaged_checkpoint_to_the_same_weights(run, name):
    whole, newest, _, make = run
    expected = {name: tensor.clone() for name, tensor in load_file(newest / "model.safetensors").items()}
    flip(newest / name)
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[-2]["step"] == 6 and fault_of(newest) is None
    assert same(weights(whole.model), weights(resumed.model))
    written = load_file(newest / "model.safetensors")
    assert all(torch.equal(expected[name], written[name]) for name in expected)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_json_that_is_no_object_is_named(run, with_manifest, caplog):
    _, newest, older, make = run
    if not with_manifest:
        (newest / MANIFEST).unlink()
    again = make()
    for name in ("trainer_state.json", "config.json", MANIFEST):
        before = (newest / name).read_bytes() if (newest / name).exists() else None
        for content in (b"\xff", b"null", b"[]", b"", b'{"global_step": '):
            (newest / name).write_bytes(content)
            caplog.clear()
            assert last_checkpoint(older.parent) == str(older)
            assert name in caplog.text
            with pytest.raises(ValueError, match=name):
                again.train(resume_from_checkpoint=str(newest))
        (newest / name).unlink() if before is None else (newest / name).write_bytes(before)
    assert last_checkpoint(older.parent) == str(newest)


def test_the_manifest_is_there_before_an_older_checkpoint_goes(make_config, arguments, monkeypatch):
    kept = []

    def rotate(folder, *args, **kwargs):
        kept.append({path.name: fault_of(path) for path in Path(folder).glob("checkpoint-*")})

    monkeypatch.setattr("hf_rezero.trainer.checkpoints.rotate_checkpoints", rotate)
    args = arguments(max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)
    make_trainer(ReZeroForCausalLM(make_config()), args).train()
    assert kept == [{"checkpoint-2": None}, {"checkpoint-2": None, "checkpoint-4": None}]
    assert args.save_total_limit == 1


def test_the_manifest_of_a_damaged_checkpoint_does_not_outlive_it(run, monkeypatch):
    """Killed while it writes a checkpoint anew, a run leaves one that is judged by what was written this time."""
    _, newest, _, make = run
    flip(newest / "optimizer.pt")

    def killed(checkpoint):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_rezero.trainer.checkpoints.write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        make().train(resume_from_checkpoint=True)
    assert not (newest / MANIFEST).exists() and last_checkpoint(newest.parent) == str(newest)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "bit-flipped", "replaced"])
def test_a_damaged_state_of_gradinit_is_named(make_config, arguments, damage):
    def make():
        torch.manual_seed(0)
        return make_trainer(ReZeroForCausalLM(make_config()), arguments(), gradinit=GradInitConfig(num_steps=2))

    trainer = make()
    trainer.train()
    path = state_file(trainer.args.output_dir)
    DAMAGES[damage](path)
    with pytest.raises(ValueError, match=r"gradinit/state.pt .*: remove it, and GradInit starts anew"):
        make().train(resume_from_checkpoint=True)


def test_a_state_of_other_content_is_named(run):
    _, newest, _, make = run
    (newest / MANIFEST).unlink()
    torch.save(make().model, newest / "pruning.pt")  # an archive that is whole, of pickled objects
    with pytest.raises(ValueError, match=r"pruning.pt is no state .*: use an earlier checkpoint"):
        make().train(resume_from_checkpoint=str(newest))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "bit-flipped", "replaced"])
def test_a_damaged_history_of_masks_loses_only_what_cannot_be_read(run, damage):
    whole, _, older, make = run
    history = Path(older.parent, "pruning", "history.jsonl")
    DAMAGES[damage](history)
    resumed = make()
    resumed.train(resume_from_checkpoint=str(older))
    assert same(weights(whole.model), weights(resumed.model))
    assert all(json.loads(line)["kept"] for line in history.read_text().splitlines())


def test_unfinished_checkpoints_are_passed_over(tmp_path):
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"epoch": '), (20, None), (25, "[]"), (30, "{}")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
        torch.save({}, folder / "pytorch_model.bin")
        if step != 30:
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.save({}, folder / name)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="holds 0 checkpoints and none of them is complete: nothing to resume from"):
        last_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_of_weights_alone_needs_a_word(make_config, arguments):
    args = arguments(max_steps=4, save_strategy="steps", save_steps=2, save_only_model=True)
    make_trainer(ReZeroForCausalLM(make_config()), args).train()
    folder = Path(args.output_dir, "checkpoint-2")
    with pytest.raises(ValueError, match="none of them is complete.*checkpoint-4 has weights and no state of the opt"):
        last_checkpoint(args.output_dir)
    again = make_trainer(ReZeroForCausalLM(make_config()), args)
    with pytest.raises(
        ValueError, match="no state of the optimizer, the scheduler, the random numbers.*--resume_weights_only true"
    ):
        again.train(resume_from_checkpoint=str(folder))
    again.args.resume_weights_only = True
    again.train(resume_from_checkpoint=str(folder))
    assert again.state.global_step == 4


def test_a_truncated_checkpoint_is_named(make_config, arguments, tmp_path):
    model = ReZeroForCausalLM(make_config())
    model.save_pretrained(tmp_path)
    check_model_files(tmp_path)
    path = tmp_path / "model.safetensors"
    assert load_file(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors holds \d+ bytes and is damaged or cut short"):
        make_trainer(model, arguments()).train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="is not a folder"):
        check_model_files(tmp_path / "missing")
