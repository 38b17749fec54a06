"""The table of the goals that were set for speed and quality: each claim says what it measured, `VERDICTS` what we make of it."""

from common.record import RESULTS, read_json
from run import load_claim


CLAIMS = (
    "speed.model_speed",
    "speed.generation_speed",
    "speed.compiled_speed",
    "speed.import_time",
    "rezero.depth",
    "rezero.norm_gap",
    "rezero.recipe",
    "rezero.enwik8_prefix",
)
UNMEASURED = {"GPU: share of bf16 peak, CUDA graphs, 1.2 bpb in 15 minutes": "40 %, 3 x, 15"}
# readings of the figures; no run has measured these sentences
VERDICTS = {
    "12 x 512, training, bf16": "probably the products, equal for all, that fill the step",
    "128 x 64, one token": "probably calls of modules in Python",
    "12 x 512, one token, fp32, laid out": "the products, equal for all, fill it; bf16 1.34",
    "12 x 768, one token, fp32, laid out": "likewise; bf16 1.33",
    "128 x 64, one token, fp32, laid out": "probably calls of modules in Python, which no layout changes",
    "128 x 64, training, fp32, compiled": "compiling gains little in fp32, for GPT-2 more",
    "128 x 64, inference, compiled": "likewise",
    "import, seconds over `import transformers`": "the Auto classes register real classes, which bring torch",
    "64 layers: steps to 4.0 bpb of ReZero, pre-norm, scaled pre-norm": "the scaled one starts better",
    "64 layers: the same to 3.6 bpb": "the scaled one catches up",
    "12 x 64, 2,000 steps: test bpb above scaled pre-norm, at first and with slower residual weights": (
        "within the spread of the seeds"
    ),
    "GPU: share of bf16 peak, CUDA graphs, 1.2 bpb in 15 minutes": "no GPU was at hand",
}


def measured(module: str) -> list[list[str]]:
    """The goals of one claim: name, what was set, what was measured, a note."""
    return load_claim(module).goals(read_json(RESULTS / f"{module.split('.')[1]}.json"))


def table(results: dict) -> list[list[str]]:
    """One row for each goal; it has no result file of its own."""
    rows = [row for module in CLAIMS for row in measured(module)]
    rows += [[goal, aim, "", ""] for goal, aim in UNMEASURED.items()]
    reasons = ("; ".join(filter(None, (VERDICTS.get(goal), note))) for goal, _, _, note in rows)
    return [
        ["goal", "set", "measured", "why it was missed"],
        *([*r[:3], why] for r, why in zip(rows, reasons, strict=True)),
    ]
