"""The table of the goals that were set for speed and quality: what was measured, and why it was missed where it was."""

from common.curves import mean_steps_to
from common.record import RESULTS, read_json


# the lead of the recipe in bits per byte over the better one of these
RIVALS = "pre-norm x + c F(N(x)), AdamW, warmup", "GPT-2, AdamW, warmup"
RECIPE = "recipe: x + w F(N(x)), Muon"


def lead(name: str) -> float:
    """Bits per byte by which the recipe is below the best of its rivals."""
    best = read_json(RESULTS / f"{name}.json")["best"]
    return min(best[arm]["mean"] for arm in RIVALS) - best[RECIPE]["mean"]


def steps_at_64_layers(target: float) -> list[str]:
    """Mean steps to a training loss of ReZero, pre-norm, and pre-norm with scaled branches."""
    results = read_json(RESULTS / "depth.json")
    rules = "ReZero, w = 0", "pre-norm + warmup", "pre-norm, x + cF(N(x)), + warmup"
    means = [mean_steps_to(results, f"64 {rule}", target) for rule in rules]
    return ["never" if steps is None else f"{steps:.0f}" for steps in means]


def behind_a_norm(arm: str) -> float:
    """Test bits per byte of ReZero above pre-norm at 12 layers."""
    best = read_json(RESULTS / "norm_gap.json")["best"]
    return best[arm]["mean"] - best["pre-norm, x + cF(N(x)), + warmup"]["mean"]


def speed_goals(speeds: dict) -> list[list[str]]:
    """Against GPT-2 as transformers ships it, and the time of the import."""

    def ratio(measure: str, case: str, arm: str = "ReZero, learned positions") -> str:
        return f"{speeds['results'][case][measure][arm]['speed']:.2f}"

    seconds = read_json(RESULTS / "import_time.json")["seconds"]
    saved = speeds["results"]["12 x 512"]["saved"]["ReZero, learned positions"]["saved"]
    relu = {measure: ratio(measure, "128 x 64", "ReZero, relu") for measure in ("train", "infer", "one_token")}
    return [
        ["12 x 512, training, fp32, times GPT-2", "1.10", ratio("train", "12 x 512"), ""],
        [
            "12 x 512, training, bf16",
            "1.4",
            ratio("train_bf16", "12 x 512"),
            "probably the products, equal for all, that fill the step",
        ],
        ["128 x 64, training, fp32", "1.4", ratio("train", "128 x 64"), f"gelu; with relu {relu['train']}"],
        ["128 x 64, training, bf16", "2", ratio("train_bf16", "128 x 64"), ""],
        ["12 x 512, inference, folded", "1.05", ratio("infer", "12 x 512"), ""],
        ["128 x 64, inference, folded", "1.35", ratio("infer", "128 x 64"), f"gelu; with relu {relu['infer']}"],
        [
            "128 x 64, one token",
            "2.5",
            ratio("one_token", "128 x 64"),
            f"probably calls of modules in Python; with relu {relu['one_token']}",
        ],
        ["saved numbers per token, layer and width", "14.2", f"{saved:.1f}", ""],
        [
            "import, seconds over `import transformers`",
            "0.1",
            f"{seconds['import hf_rezero'] - seconds['import transformers (lazy)']:.1f}",
            "the Auto classes register real classes, which bring torch",
        ],
    ]


def depth_goals() -> list[list[str]]:
    """ReZero against pre-norm, deep and at 12 layers."""
    return [
        [
            "64 layers: steps to 4.0 bpb of ReZero, pre-norm, scaled pre-norm",
            "a third",
            ", ".join(steps_at_64_layers(4.0)),
            "the scaled one starts better",
        ],
        ["64 layers: the same to 3.6 bpb", "a third", ", ".join(steps_at_64_layers(3.6)), "the scaled one catches up"],
        [
            "12 x 64, 2,000 steps: test bpb above scaled pre-norm, at first and with slower residual weights",
            "0",
            f"{behind_a_norm('ReZero'):.2f}, {behind_a_norm('ReZero, 3e-3, rate of w x 0.1'):.2f}",
            "within the spread of the seeds",
        ],
    ]


def recipe_goals() -> list[list[str]]:
    """What the recipe reaches, and what its run spends on other things than steps."""
    run = read_json(RESULTS / "enwik8_prefix.json")["runs"]["recipe, 6 layers x 256"]
    shares = read_json(RESULTS / "training_profile.json")["configs"]["enwik8_prefix_recipe"]["shares"]
    scoring = run["eval_runtime"] + run["test_runtime"]
    parts = shares["batches"], scoring / (run["train_runtime"] + scoring), shares["checkpoints"]
    minutes = run["train_runtime"] / 60
    return [
        ["recipe: bpb below its rivals in equal time, prefix", "0.05", f"{lead('recipe'):.2f}", ""],
        ["recipe: the same, featured articles", "0.05", f"{lead('recipe_articles'):.2f}", ""],
        ["recipe: test bpb of the prefix, 45 minutes", "1.80", f"{run['test_bpb']:.3f} in {minutes:.0f} min", ""],
        [
            "recipe: batches, evaluation, checkpoints: shares of the run",
            "2 % each",
            ", ".join(f"{part:.2%}" for part in parts),
            "",
        ],
    ]


def goals(speeds: dict) -> list[list[str]]:
    """One row for each goal; `speeds` is the result of `model_speed.py`."""
    head = ["goal", "set", "measured", "why it was missed"]
    gpu = ["GPU: share of bf16 peak, CUDA graphs, 1.2 bpb in 15 minutes", "40 %, 3 x, 15", "", "no GPU was at hand"]
    return [head, *speed_goals(speeds), *depth_goals(), *recipe_goals(), gpu]
