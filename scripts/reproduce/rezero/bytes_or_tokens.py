"""Byte models against BPE of 1,024 and 8,192 tokens at equal compute, in bits per byte.

    python scripts/reproduce/run.py bytes_or_tokens --train_file featured_articles.txt.xz

Every arm has the same layers, the same window and batch in tokens, and the same training FLOPs: its number of steps is
the budget over those of a step. A training step has, for each of its tokens,

    6 (12 L d^2 + d V) + 12 L d T        L layers of width d, V tokens in the vocabulary, windows of T tokens

FLOPs: 6 for each weight of the layers and of the output table, and two products of T x d in each attention; looking up
the input table is none. The tokenizers learn from the training part. All arms are scored on the same bytes of the test
part, and each goes to its best learning rate down the same ladder on seed 0. A killed run goes on.
"""

import argparse
from pathlib import Path

from common.byte_lm import add_arguments, load_text, run_grid, train
from common.curves import by_seed, runs_of
from common.record import RESULTS
from hf_rezero.data import ByteDataset, evaluation_windows, load_tokens, train_bpe


LADDER = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
BYTES, START = 264, 3e-3
ARMS = {"bytes": BYTES, "BPE, 1,024 tokens": 1024, "BPE, 8,192 tokens": 8192}
SMOKE = {"layers": 2, "hidden_size": 16, "num_attention_heads": 2, "block_size": 32, "batch_size": 4, "steps": 40}
SMOKE |= {"seeds": 1, "train_bytes": 100_000, "test_bytes": 5_000, "learning_rates": [3e-3], "checkpoint_steps": 20}


def flops_of_a_token(vocab_size: int, layers: int, hidden_size: int, block_size: int) -> int:
    """Of a training step, forward and backward; see above."""
    weights = 12 * layers * hidden_size**2 + hidden_size * vocab_size
    return 6 * weights + 12 * layers * hidden_size * block_size


def steps_of(vocab_size: int, args: argparse.Namespace) -> int:
    """The steps that cost what `args.steps` of the byte model cost."""
    shape = args.layers, args.hidden_size, args.block_size
    return round(args.steps * flops_of_a_token(BYTES, *shape) / flops_of_a_token(vocab_size, *shape))


def read(vocab_size: int, args: argparse.Namespace) -> dict:
    """Give `args` the windows of an arm; returns how many bytes a token of the training part has."""
    data, test = args.corpus.train[: args.train_bytes], args.corpus.test[: args.test_bytes]
    if vocab_size == BYTES:
        args.dataset = ByteDataset(data, args.block_size)
        args.scored = evaluation_windows(test, args.block_size)
        return {"bytes_of_a_token": 1.0}
    tokenizer = train_bpe(data, vocab_size)
    tokens, scored = load_tokens(data, tokenizer, progress=True), load_tokens(test, tokenizer)
    args.dataset = ByteDataset(tokens.ids, args.block_size)
    args.scored = evaluation_windows(scored.ids, args.block_size, token_bytes=scored.num_bytes)
    return {"bytes_of_a_token": round(len(data) / len(tokens.ids), 3)}


def table(results: dict) -> list[list[str]]:
    """One row for each arm: what the same compute is enough for."""
    rows = [
        ["tokens", "bytes of a token", "steps", "MB of text read", "best lr", "test bits per byte, mean", "by seed"]
    ]
    for arm, best in results["best"].items():
        run = runs_of(results, arm)[0]
        size = run["bytes_of_a_token"] * run["tokens"] / 1e6
        rows.append([arm, f"{run['bytes_of_a_token']:.2f}", f"{run['steps']}", f"{size:.2f}"])
        rows[-1] += [f"{best['learning_rate']:g}", f"{best['mean']:.3f}", by_seed(best)]
    return rows


def main() -> None:
    """Run the comparison and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "block_size": 256,
        "batch_size": 8,
        "seeds": 3,
        "threads": 2,
    }
    add_arguments(parser, **sizes, layers=6, steps=1200, train_bytes=30_000_000, test_bytes=300_000)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LADDER)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--smoke", action="store_true", help="sizes that take seconds")
    parser.add_argument("--output", type=Path, default=RESULTS / "bytes_or_tokens.json")
    parser.set_defaults(bf16=True, checkpoint_steps=200)
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(SMOKE)
    load_text(args)

    for arm in args.arms:
        vocab_size, loaded = ARMS[arm], {}
        steps = steps_of(vocab_size, args)
        config = {"vocab_size": vocab_size, "resweight_init": (2 * args.layers) ** -0.5, "hidden_act": "relu2"}
        cost = flops_of_a_token(vocab_size, args.layers, args.hidden_size, args.block_size)

        def run(rate, seed, vocab_size=vocab_size, steps=steps, config=config, cost=cost, loaded=loaded):
            loaded |= read(vocab_size, args) if not loaded else {}
            tokens = steps * args.batch_size * args.block_size
            facts = {"steps": steps, "tokens": tokens, "flops": cost * tokens, **loaded}
            return train(config, [(args.layers, steps)], rate, seed, args) | facts

        best = run_grid({arm: run}, args.learning_rates, args, lambda *_: START)["best"][arm]
        print(f"{arm:20s} {steps} steps, lr {best['learning_rate']:g}, test {best['mean']}", flush=True)


if __name__ == "__main__":
    main()
