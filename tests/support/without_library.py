"""What a process that cannot import this library makes of checkpoints; run as a program, this file is that process."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import transformers


QUESTION, ANSWER = "question.pt", "answer.pt"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def save(model, folder, auto_class, batch, modes=()):
    """A folder of the model, with what the other process is asked: a batch, and one text for each set of options."""
    model.save_pretrained(folder)
    question = {
        "auto": auto_class.__name__,
        "stock": type(model).original.__name__,
        "batch": batch,
        "modes": list(modes),
    }
    torch.save(question, Path(folder, QUESTION))


def answers(folders):
    """The answer for each folder; one process reads them all."""
    command = [sys.executable, __file__, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(Path(folder, ANSWER)) for folder in folders]


def answer(folder):
    question = torch.load(Path(folder, QUESTION))
    auto, stock = getattr(transformers, question["auto"]), getattr(transformers, question["stock"])
    batch, load = question["batch"], partial(auto.from_pretrained, trust_remote_code=True)
    model = load(folder).eval()
    model.save_pretrained(Path(folder, "again"))
    half = load(folder, dtype=torch.bfloat16)
    return {
        "is_stock": isinstance(model, stock),
        "logits": logits_of(model, batch),
        "texts": [model.generate(**batch, **GREEDY, **mode) for mode in question["modes"]],
        "logits_again": logits_of(load(Path(folder, "again")).eval(), batch),
        "dtypes": {name.rpartition(".")[2]: p.dtype for name, p in half.named_parameters()},
        "without_trust": refusal(auto, folder, trust_remote_code=False),
        "as_stock": refusal(stock, folder),
        "as_stock_in_half": refusal(stock, folder, dtype="bfloat16"),
    }


def logits_of(model, batch):
    return model(**batch).logits.detach()


def refusal(model_class, folder, **options):
    try:
        model_class.from_pretrained(folder, **options)
    except Exception as error:  # whatever is raised, the message is what a user sees
        return str(error)
    return "loaded"


if __name__ == "__main__":
    sys.modules["hf_rezero"] = None  # importing it now raises ImportError
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        torch.save(answer(path), Path(path, ANSWER))
