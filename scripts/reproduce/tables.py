"""Result files -> the tables of the README, between `<!-- table:NAME -->` and `<!-- end -->`."""

import math
import re
from pathlib import Path
from statistics import fmean, median

from common.curves import STRIDE, mean_steps_to, runs_of
from common.record import RESULTS, read_json
from goals import goals


README = Path(__file__).parent.parent.parent / "README.md"


def enwik8_prefix(results: dict) -> list[list[str]]:
    """One row for each arm."""
    rows = [
        [
            "12 layers x 192, or as named",
            "validation bpb",
            "test bpb",
            "training loss, last 500 steps (bpb)",
            "minutes",
        ]
    ]
    for arm, run in results["runs"].items():
        tail = [nats for step, nats in run["curve_nats"] if step > run["curve_nats"][-1][0] - 500]
        loss = sum(tail) / len(tail) / math.log(2)
        minutes = f"{run['train_runtime'] / 60:.0f}"
        rows.append([arm, f"{run['eval_bpb']:.3f}", f"{run['test_bpb']:.3f}", f"{loss:.3f}", minutes])
    return rows


def deep_without_warmup(results: dict) -> list[list[str]]:
    """One row for each arm, with all learning rates that were tried."""
    rows = [["128 layers x 64", "best lr", "bpb at the best lr, mean of the seeds", "bpb by lr, seed 0"]]
    for arm, best in results["best"].items():
        grid = {key: run["final"] for key, run in results["runs"].items() if re.match(rf"{arm} lr=.* seed=0$", key)}
        by_rate = ", ".join(f"{key.split('lr=')[1].split()[0]}: {final:.2f}" for key, final in grid.items())
        rows.append([arm, f"{best['learning_rate']:g}", f"{best['mean']:.2f}", by_rate])
    return [*rows, ["unigram entropy of the corpus", "", f"{results['unigram_bpb']:.2f}", ""]]


def defaults(results: dict) -> list[list[str]]:
    """One row for each variant."""
    rows = [["one change to the default", "bits per byte", "against the default, by seed"]]
    for variant, row in results["table"].items():
        differences = ", ".join(f"{d:+.3f}" for d in row["against_default_by_seed"])
        if not math.isfinite(row["bits_per_byte"]):
            rows.append([variant, "diverged", ""])
        else:
            rows.append([variant, f"{row['bits_per_byte']:.3f}", "" if variant == "default" else differences])
    return rows


def data_speed(results: dict) -> list[list[str]]:
    """One row for each path."""
    rows = [["from file to int64 batches of 64 x 512, one core", "MB/s, median"]]
    return [*rows, *([path, f"{speed:.1f}"] for path, speed in results["median"].items())]


def optimizer_speed(results: dict) -> list[list[str]]:
    """One row for each optimizer, one column for each width."""
    widths = list(next(iter(results["results"].values())))
    rows = [["step, as a ratio to torch AdamW foreach", *(f"width {w}" for w in widths), "state / parameters"]]
    for name, by_width in results["results"].items():
        ratios = (f"{by_width[width]['ratio']:.2f}" for width in widths)
        rows.append([name, *ratios, f"{by_width[widths[-1]]['state_per_parameter']:.0f}"])
    return rows


def optimizers(results: dict) -> list[list[str]]:
    """One row for each optimizer, one column for each task: mean and spread of the seeds, and the best rate."""
    tasks = {
        "ReZero LM, batch 4": ("bpb", 3),
        "ReZero LM, batch 24": ("bpb", 3),
        "post-norm LM, init 0.02, batch 4": ("bpb", 3),
        "conv net, batch 32": ("%", 1),
        "conv net, batch 512": ("%", 1),
    }
    rows = [["test, mean ± spread of 3 seeds (lr)", *(f"{task}, {unit}" for task, (unit, _) in tasks.items())]]
    for arm in dict.fromkeys(arm for task in tasks for arm in results["best"][task]):
        best = [(results["best"][task].get(arm), digits) for task, (_, digits) in tasks.items()]
        text = "{mean:.{digits}f} ± {spread:.{digits}f} ({learning_rate:g})"
        rows.append([arm, *(text.format(**run, digits=digits) if run else "" for run, digits in best)])
    return rows


def gradinit_images(results: dict) -> list[list[str]]:
    """One row for each initialisation, one column for each net: accuracy after the first epoch, and the best."""
    cells = {}
    for key, (first, best) in results["table"].items():
        net, arm, rate = key.split(" | ")
        cells.setdefault(arm, {}).setdefault(net, []).append((best, f"{first:.1f} / {best:.1f} ({rate[3:]})"))
    nets = list(cells["Kaiming"])
    rows = [["first-epoch / best test accuracy, % (lr)", *nets]]
    return [*rows, *([arm, *(max(row.get(net, [(0, "")]))[1] for net in nets)] for arm, row in cells.items())]


def gradinit_post_norm(results: dict) -> list[list[str]]:
    """One row for each arm at its best rate."""
    rows = [["12 layers x 64, no warmup unless named", "best lr", "bpb, mean of the seeds", "by seed"]]
    for arm, best in results["best"].items():
        by_seed = ", ".join(f"{final:.2f}" for final in best["final_by_seed"])
        rows.append([arm, f"{best['learning_rate']:g}", f"{best['mean']:.2f}", by_seed])
    return [*rows, ["unigram entropy of the corpus", "", f"{results['unigram_bpb']:.2f}", ""]]


def gradinit_cost(results: dict) -> list[list[str]]:
    """One row for each kind of iteration, time and memory for each model."""
    models = list(results["models"])
    rows = [
        ["one iteration, in training steps", *(f"{model}: {what}" for model in models for what in ("time", "memory"))]
    ]
    for name in dict.fromkeys(name for model in models for name in results["models"][model]["ratios"]):
        found = [results["models"][model]["ratios"].get(name) for model in models]
        cells = (f"{ratios[what]:.2f}" if ratios else "" for ratios in found for what in ("time", "memory"))
        rows.append([name, *cells])
    return rows


def pruning_curve_images(results: dict) -> list[list[str]]:
    """One row for each method, accuracy and fraction removed at each setting."""
    return _pruning_curve(results, ("images",), 1)


def pruning_curve_text(results: dict) -> list[list[str]]:
    """One row for each method on the two byte models, bits per byte and fraction removed at each setting."""
    return _pruning_curve(results, ("text", "depth"), 3)


def _pruning_curve(results: dict, tasks: tuple[str, ...], digits: int) -> list[list[str]]:
    """Means over the seeds, in the order of the fraction removed."""
    cells: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for key, record in results["runs"].items():
        task, method, setting, _ = key.split(" | ")
        if task in tasks:
            cells.setdefault((task, method), {}).setdefault(setting, []).append(record)
    columns, unit = max(map(len, cells.values())), results["tasks"][tasks[0]]["unit"]
    rows = [[f"{unit} (weights removed)", "seeds", *[""] * columns]]
    for (task, method), by_setting in cells.items():
        found = sorted((_mean(runs, "removed"), _mean(runs, "quality")) for runs in by_setting.values())
        points = [f"{quality:.{digits}f} ({removed:.0%})" for removed, quality in found]
        name = method if len(tasks) == 1 else f"{results['tasks'][task]['title']}: {method}"
        seeds = max(map(len, by_setting.values()))
        rows.append([name, f"{seeds}", *points, *[""] * (columns - len(points))])
    return rows


def _mean(runs: list[dict], field: str) -> float:
    return sum(run[field] for run in runs) / len(runs)


def pruning_speed(results: dict) -> list[list[str]]:
    """One row for each model and what went, then one for each kind of mask."""
    rows = [["", "forward pass, time", "products", "file", "parameters", "training step with masks"]]
    for name, ratios in results["forward"].items():
        cells = (f"{ratios[key]:.2f}" for key in ("time", "products", "file", "parameters"))
        rows.append([f"{name}: half removed", *cells, ""])
    return [
        *rows,
        *([f"masks: {name}", "", "", "", "", f"{ratio:.2f}"] for name, ratio in results["training"].items()),
    ]


def resnets(results: dict) -> list[list[str]]:
    """One row for each net and rule: error at the end and epochs to each accuracy, means and seeds."""
    marks = [name for name in next(iter(results["best"].values())) if name.startswith("epochs")]
    rows = [["", "best lr", "test error, %, mean", "by seed", *(f"{mark}, mean" for mark in marks)]]
    for name, best in results["best"].items():
        by_seed = ", ".join(f"{error:.1f}" for error in best["error"])
        waits = [f"{fmean(best[mark]):.1f}" if None not in best[mark] else "not by all" for mark in marks]
        error = f"{fmean(best['error']):.1f}"
        rows.append([name.replace(" | ", ", "), f"{best['learning_rate']:g}", error, by_seed, *waits])
    return rows


def superconvergence(results: dict) -> list[list[str]]:
    """One row for each schedule and rule."""
    rows = [["ResNet-20, 6 epochs", "best maximal lr", "test error, %", "by maximal lr"]]
    for arm, best in results["best"].items():
        grid = {
            key.split("lr=")[1].split(" ")[0]: run
            for key, run in results["runs"].items()
            if key.startswith(f"{arm} | ")
        }
        by_rate = ", ".join(
            f"{rate}: {100 - fmean(grid[rate]['accuracy'][-2:]):.1f}" for rate in sorted(grid, key=float)
        )
        rows.append([arm, f"{best['learning_rate']:g}", f"{best['mean']:.1f}", by_rate])
    return rows


def fully_connected(results: dict) -> list[list[str]]:
    """One row for each rule at 32 layers."""
    rows = [
        ["32 layers x 256", "best lr", "training loss at the end, by seed", "ReZero is there times faster, by seed"]
    ]
    for rule, best in results["best"].items():
        losses, ratios = (", ".join(f"{x:.{d}f}" for x in best[key]) for key, d in (("loss", 2), ("times_faster", 1)))
        rows.append([rule, f"{best['learning_rate']:g}", losses, "" if rule == "ReZero" else ratios])
    return rows


def fully_connected_depth(results: dict) -> list[list[str]]:
    """One row for each deep net."""
    rows = [["layers x 150", "steps with a finite loss", "loss, first steps", "loss, last steps"]]
    for key, run in results["runs"].items():
        layers, rule = key.split(" | ")[:2]
        if layers != "32":
            ends = [f"{loss:.4g}" for loss in (run["loss"][0], run["loss"][-1])] if run["loss"] else ["", ""]
            rows.append([f"{int(layers):,}, {rule}", f"{run['steps']}", *ends])
    return rows


def depth_cost(results: dict) -> list[list[str]]:
    """One row."""
    costs = results["results"]
    seconds = [f"{costs['seconds_per_step'][layers]:.2f}" for layers in ("100", "10000")]
    return [
        ["a step of 100 pictures", "100 layers, s", "10,000 layers, s", "time per layer, 10,000 to 100", "memory, GB"],
        ["ReZero x 150, Adagrad", *seconds, f"{costs['per_layer_against_100']:.2f}", f"{costs['peak_gb']:.1f}"],
    ]


def fold_speed(results: dict) -> list[list[str]]:
    """One row for each model."""
    rows = [["forward pass, one thread", "time of the folded model", "largest difference of logits, relative"]]
    return [*rows, *([c, f"{r['ratio']:.2f}", f"{r['difference']:.0e}"] for c, r in results["results"].items())]


def model_speed(results: dict) -> list[list[str]]:
    """One row for each measure at each size, one column for each model."""
    names = {
        "train": "training step, fp32",
        "train_bf16": "training step, bf16",
        "infer": "inference",
        "one_token": "inference, 1 token",
        "generate": "32 tokens, one at a time",
        "saved": "saved numbers / (tokens x layers x width)",
    }
    arms = list(next(iter(results["results"].values()))["train"])
    rows = [["speed against GPT-2 in transformers", *arms]]
    for name, label in names.items():
        for case, found in ((case, found) for case, found in results["results"].items() if name in found):
            values = [found[name].get(arm, {}).get("saved" if name == "saved" else "speed") for arm in arms]
            rows.append([f"{label}: {case}", *("" if value is None else f"{value:.2f}" for value in values)])
    return rows


def training_profile(results: dict) -> list[list[str]]:
    """One row for each config: the shares of the parts."""
    rows = [["part of the run of a config", "steps", "training", "batches", "evaluation", "checkpoints"]]
    for config, found in results["configs"].items():
        rows.append([f"{config}.yaml", f"{found['steps']:,}", *(f"{x:.2%}" for x in found["shares"].values())])
    return rows


def convergence(results: dict) -> list[list[str]]:
    """One row for each rule: test loss, steps to the targets, and the time of a step."""
    rows = _steps_to_losses(results, "12 layers x 64", (4.0, 3.5, 3.0))
    return [[*row, ms] for row, ms in zip(rows, ["ms a step", *_step_times(results)], strict=True)]


def convergence_articles(results: dict) -> list[list[str]]:
    """One row for each rule: test loss and steps to the targets."""
    return _steps_to_losses(results, "12 layers x 64", (4.0, 3.5, 3.0))


def _step_times(results: dict) -> list[str]:
    return [f"{1000 * results['step_seconds'][arm]:.0f}" for arm in results["best"]]


def depth(results: dict) -> list[list[str]]:
    """One row for each depth and rule."""
    by_depth = dict(sorted(results["best"].items(), key=lambda item: int(item[0].split()[0])))
    return _steps_to_losses(results | {"best": by_depth}, "layers x 64", (4.5, 4.0, 3.6, 3.5))


def _steps_to_losses(results: dict, head: str, targets: tuple[float, ...]) -> list[list[str]]:
    rows = [[*row] for row in _byte_models(results, head)]
    rows[0] += [f"steps to {target} bpb" for target in targets]
    for row, arm in zip(rows[1:], results["best"], strict=True):
        for target in targets:
            steps = mean_steps_to(results, arm, target)
            row.append("not reached" if steps is None else f"{steps:.0f}")
    return rows


def recipe(results: dict) -> list[list[str]]:
    """One row for each arm on both corpora: what as many seconds are enough for."""
    articles = read_json(RESULTS / "recipe_articles.json")
    seconds = results["settings"]["seconds"]
    rows = [
        [
            f"6 layers x 256, {seconds:.0f} s",
            "best lr",
            "steps",
            "enwik8, first 4.15 MB: test bpb, mean",
            "by seed",
            "articles: test bpb",
        ]
    ]
    for arm, best in results["best"].items():
        steps = next(run["steps"] for key, run in results["runs"].items() if key.startswith(f"{arm} |"))
        found = f"{articles['best'][arm]['mean']:.3f}" if arm in articles["best"] else ""
        rows.append([arm, f"{best['learning_rate']:g}", f"{steps}", f"{best['mean']:.3f}", _by_seed(best), found])
    return rows


def norm_gap(results: dict) -> list[list[str]]:
    """One row for each change, means of its seeds."""
    head = ["12 layers x 64, 2,000 steps", "lr", "training bpb, last 200 steps", "worst since step 500"]
    rows = [[*head, "test bpb, mean", "by seed", "stream, rms", "largest logit", "mean size of w"]]
    for arm, best in results["best"].items():
        runs, cells = runs_of(results, arm), [arm, f"{best['learning_rate']:g}"]
        if math.isfinite(best["mean"]):
            losses = [[loss for *_, loss in run["curve"]] for run in runs]
            training, worst = fmean(median(x[-20:]) for x in losses), max(max(x[50:]) for x in losses)
            sizes = ((_mean(runs, name), digits) for name, digits in (("stream", 2), ("logit", 1), ("resweight", 3)))
            cells += [f"{training:.3f}", f"{worst:.1f}", f"{best['mean']:.3f}", _by_seed(best)]
            cells += [f"{x:.{digits}f}" for x, digits in sizes]
        else:
            cells += ["", "", "", f"diverged by step {(len(runs[0]['curve']) + 1) * STRIDE}", "", "", ""]
        rows.append(cells)
    return rows


def import_time(results: dict) -> list[list[str]]:
    """One row for each statement."""
    return [["in a fresh process", "seconds"], *([name, f"{value:.2f}"] for name, value in results["seconds"].items())]


def growing(results: dict) -> list[list[str]]:
    """One row for each way to spend the same layer passes."""
    return _byte_models(results, "layers")


def norm_variants(results: dict) -> list[list[str]]:
    """One row for each residual rule."""
    return _byte_models(results, "12 layers x 64")


def _by_seed(best: dict) -> str:
    return ", ".join(f"{test:.3f}" for test in best["test"])


def _byte_models(results: dict, head: str) -> list[list[str]]:
    rows = [[head, "best lr", "test bits per byte, mean", "by seed"]]
    for arm, best in results["best"].items():
        rows.append([arm, f"{best['learning_rate']:g}", f"{best['mean']:.3f}", _by_seed(best)])
    return rows


def jacobian(results: dict) -> list[list[str]]:
    """One row for each kind of net: by depth before training, and by steps during it."""
    depths, steps = results["settings"]["depths"], list(next(iter(results["training"].values())))
    rows = [["mean σ² (σ zero to float32)", *(f"{depth} layers" for depth in depths), *(f"step {s}" for s in steps)]]
    for arm in dict.fromkeys(key.split(" | ")[0] for key in results["initial"]):
        found = [results["initial"][f"{arm} | {depth}"] for depth in depths]
        found += [results["training"].get(arm, {}).get(step) for step in steps]
        cells = (f"{r['mean_square']:.3g} ({r['share_at_zero']['float32']:.0%})" if r else "" for r in found)
        rows.append([arm, *cells])
    return rows


TABLES = {
    table.__name__: table
    for table in (
        enwik8_prefix,
        deep_without_warmup,
        defaults,
        data_speed,
        optimizer_speed,
        optimizers,
        gradinit_images,
        gradinit_post_norm,
        gradinit_cost,
        pruning_curve_images,
        pruning_curve_text,
        pruning_speed,
        fully_connected,
        fully_connected_depth,
        depth_cost,
        resnets,
        superconvergence,
        growing,
        norm_variants,
        jacobian,
        fold_speed,
        model_speed,
        training_profile,
        import_time,
        goals,
        convergence,
        convergence_articles,
        depth,
        recipe,
        norm_gap,
    )
}

# tables that share a result file with another
SOURCES = dict.fromkeys(("pruning_curve_images", "pruning_curve_text"), "pruning_curve")
SOURCES["fully_connected_depth"] = "fully_connected"
SOURCES["goals"] = "model_speed"


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def render(text: str) -> str:
    """The README with every marked table made anew from its result file."""

    def replace(match: re.Match) -> str:
        name = match[1]
        results = read_json(RESULTS / f"{SOURCES.get(name, name)}.json")
        return f"<!-- table:{name} -->\n{markdown(TABLES[name](results))}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
