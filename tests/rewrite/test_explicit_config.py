"""What transformers makes of a rewritten checkpoint whose config the caller replaced by an ordinary one: it says what does not fit."""

import pytest
import torch
from support.stock_models import inputs, llama, stir
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_rezero import fold_resweight_, rezero_
from hf_rezero.pruning import find_groups, prune_


NORMS = {"model.norm.weight"} | {
    f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("input_layernorm", "post_attention_layernorm")
}
GATES = {f"model.layers.{i}.{name}.resweight" for i in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")}
LOADERS = {"stock": LlamaForCausalLM, "auto": AutoModelForCausalLM}


def gated(**options):
    model = llama()
    rezero_(model, **options)
    return stir(model)


CASES = {
    "gates, norms kept": (lambda: gated(norm="keep"), GATES, set()),
    "gates, no norms": (gated, GATES, NORMS),
    "no norms": (lambda: fold_resweight_(gated()), set(), NORMS),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", CASES)
def test_gates_and_norms_are_reported_by_name_and_no_more(case, loader, tmp_path, caplog):
    make, unexpected, missing = CASES[case]
    model = make()
    model.save_pretrained(tmp_path)
    loaded, found = LOADERS[loader].from_pretrained(tmp_path, config=llama().config, output_loading_info=True)
    assert type(loaded) is LlamaForCausalLM
    assert (found["unexpected_keys"], found["missing_keys"]) == (unexpected, missing)
    report = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "LOAD REPORT" in r.getMessage()]
    assert ("UNEXPECTED" in report[0], "MISSING" in report[0]) == (bool(unexpected), bool(missing))
    assert not torch.allclose(loaded.eval()(**inputs("llama")).logits, model(**inputs("llama")).logits)


@pytest.mark.parametrize("loader", LOADERS)
def test_other_sizes_are_an_error(loader, tmp_path):
    model = llama()
    groups = find_groups(model, ["neurons"])
    prune_(model, groups, {g.name: torch.arange(1, g.num_units) for g in groups})
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LOADERS[loader].from_pretrained(tmp_path, config=llama().config)
