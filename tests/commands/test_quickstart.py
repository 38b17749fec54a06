"""`make quickstart` from its own config, to the end: minutes, not seconds."""

import json

import pytest
from support.launch import SCRIPTS, run_script


@pytest.mark.slow
def test_the_quickstart_learns_and_its_checkpoint_writes_text(tmp_path):
    out = tmp_path / "quickstart"
    run_script("run_clm.py", SCRIPTS / "configs" / "quickstart.yaml", "--output_dir", out, timeout=1800)
    results = json.loads((out / "all_results.json").read_text())
    # xz -9 takes 1.9 bits per byte of this text with the whole file to learn from, a unigram model 4.8
    assert results["eval_bpb"] < 3.8 and results["test_bpb"] < 3.8
    sample = run_script("generate.py", out, "--prompt", "def ").stdout
    assert sample.startswith("def ") and len(sample) > 100
