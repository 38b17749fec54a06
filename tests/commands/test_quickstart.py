"""`make quickstart`: a few steps of it, and, marked slow, the whole of it."""

import json
import re
import runpy

import pytest
from support.launch import SCRIPTS, run_script


def test_the_quickstart_ends_with_a_screenful(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,max_position_embeddings=256"
    main = runpy.run_path(str(SCRIPTS / "quickstart.py"))["main"]
    few = ["--max_steps", "2", "--max_eval_samples", "4", "--eval_steps", "1", "--logging_steps", "1"]
    main(["--config_overrides", tiny, "--disable_tqdm", "true", *few])
    screen = capsys.readouterr().out.partition("\nTrained ")[2].splitlines()
    assert 12 <= len(screen) <= 32 and max(map(len, screen)) <= 120
    assert "on 4,096 bytes of the sources of Python" in screen[0]
    table = {name: float(bits) for bits, name in re.findall(r"^    (\d\.\d\d)  (.+)$", "\n".join(screen), re.M)}
    assert list(table) == ["this model", "a bigram model", "xz -9, behind as much text as the model has read"]
    assert 3 < table["a bigram model"] < 4.5 and 1 < table.popitem()[1] < 3 and table["this model"] > 4.5
    pictures = re.findall(r"\S+\.png", "\n".join(screen))
    assert len(pictures) == 2 and all((tmp_path / picture).stat().st_size > 1000 for picture in pictures)


@pytest.mark.slow
def test_the_quickstart_learns_and_its_checkpoint_writes_text(tmp_path):
    out = tmp_path / "quickstart"
    run_script("run_clm.py", SCRIPTS / "configs" / "quickstart.yaml", "--output_dir", out, timeout=1800)
    results = json.loads((out / "all_results.json").read_text())
    # 1.9 after the steps of the config; a bigram model needs 3.6, xz -9 behind as much text 2.0
    assert results["eval_bpb"] < 2.2 and results["test_bpb"] < 2.2
    sample = run_script("generate.py", out, "--prompt", "def ").stdout
    assert sample.startswith("def ") and len(sample) > 100
