"""A saved folder is a Hub repository: it loads through the Auto classes, with this library and without it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_rezero import ReZeroForCausalLM, byte_tokenizer


LOAD_AND_RUN = """
import sys, torch
if sys.argv[1] == "without":
    sys.modules["hf_rezero"] = None  # importing it now raises ImportError
else:
    import hf_rezero
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel
torch.set_num_threads(1)
folder, remote = sys.argv[2], sys.argv[1] == "without"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
inputs = torch.load(folder + "/inputs.pt")
torch.save({"logits": model(inputs).logits, "ids": model.generate(inputs, max_new_tokens=8, do_sample=False)}, folder + "/" + sys.argv[1])
assert AutoModel.from_pretrained(folder, trust_remote_code=remote).config.model_type == "rezero"
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=remote)
print(type(model).__module__)
"""


@pytest.mark.parametrize("library", ["with", "without"])
def test_a_fresh_process_gives_the_same_logits_to_the_bit(make_config, ids, tmp_path, library):
    model = ReZeroForCausalLM(make_config(position_embedding_type="rotary", norm_position="branch")).eval()
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", LOAD_AND_RUN, library, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert ("transformers_modules" in run.stdout) == (library == "without")
    result = torch.load(tmp_path / library)
    assert torch.equal(result["logits"], model(ids).logits)
    assert torch.equal(result["ids"], model.generate(ids, max_new_tokens=8, do_sample=False))


def test_the_folder_holds_code_and_every_auto_class(make_config, tmp_path):
    ReZeroForCausalLM(make_config()).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "configuration_rezero.py", "modeling_rezero.py"} <= names
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForMaskedLM"] == "modeling_rezero.ReZeroForMaskedLM"
    assert len(auto_map) == 6


def test_a_missing_key_gets_its_initial_value(make_config, tmp_path):
    ReZeroForCausalLM(make_config(resweight_init=0.3, norm_position="pre", norm_type="dyt")).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    dropped = ("resweight", "alpha", "norm.bias")
    save_file({k: v for k, v in load_file(path).items() if not k.endswith(dropped)}, path, metadata={"format": "pt"})
    parameters = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    expected = {"resweight": 0.3, "alpha": 0.5, "norm.bias": 0.0}
    for suffix, value in expected.items():
        tensors = [p for name, p in parameters.items() if name.endswith(suffix)]
        assert tensors and all(torch.equal(p, torch.full_like(p, value)) for p in tensors), suffix


def test_positions_survive_loading_through_the_meta_device(make_config, ids, tmp_path):
    model = ReZeroForCausalLM(make_config()).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_truncated_weight_file_is_refused_with_advice(make_config, tmp_path):
    ReZeroForCausalLM(make_config()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OSError, match="damaged or cut short.*copy or download it again"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_text_generation_pipeline(make_config, tmp_path):
    ReZeroForCausalLM(make_config()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    assert generate("abc", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("abc")
