"""Attacks on a training run: kills, signals, damaged checkpoints, lost processes, full disks, NaN and hostile inputs.

    python scripts/reproduce/run.py soak

Every attacked run is resumed with the same command, and must end with the bits of the weights of a run that nothing happened to,
or with one line that says what is wrong. Runs are small, and forked from a process that has imported all already.
"""

import argparse
import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from common.forks import KILLED, Outcome, Places, places_in, run, run_ranks, sharded_on_cpus
from common.record import RESULTS, save
from hf_rezero import ReZeroTrainer
from hf_rezero.commands import clm, running
from hf_rezero.commands.entry import run_command
from hf_rezero.trainer.checkpoints import MANIFEST
from hf_rezero.trainer.folder import LOCK


ROOT = Path(__file__).parents[3]
STEPS = 12
COMMON = {
    "config_overrides": "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,hidden_dropout=0.1,resweight_init=0.5",
    "block_size": 16,
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 1,
    "max_eval_samples": 8,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "do_train": True,
    "do_eval": True,
}
MASKS = {"prune_target_sparsity": 0.3, "prune_start_step": 2, "prune_end_step": 8, "weight_decay": 0.01}
RUNS = {
    "adamw": {},
    "ranger": {"optim": "ranger"},
    "lookahead+muon": {"optim": "lookahead+muon", "optim_args": "lookahead_k=5"},
    "GradInit": {"gradinit_steps": 6, "gradinit_save_steps": 2},
    "l1 masks": {"prune_method": "l1", **MASKS},
    "l0 masks": {"prune_method": "l0", **MASKS},
}
GROUPS = {
    "DDP": {},
    "FSDP2": {"fsdp": "full_shard", "fsdp_config": '{"version": 2, "state_dict_type": "FULL_STATE_DICT"}'},
}
PHASES = ("GradInit", "training", "masks", "evaluation", "saving")
KEYS = ("attacks", "same weights", "refused in one line", "other weights", "lost", "tracebacks", "hung")


# one run


def command(folder: Path, text: Path, resume: bool = False, **extra) -> Callable[[], None]:
    """A call of `hf-rezero clm` as its users make it."""
    values = {"train_file": text, "output_dir": folder, **COMMON, **extra}
    values |= {"resume_from_checkpoint": "true"} if resume else {}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def call() -> None:
        sys.argv = ["hf-rezero clm", *words]
        running._draw = lambda trainer: None  # half the time of a run of 12 steps, and no state of it
        run_command(clm.main)

    return call


def attacked(call: Callable[[], None], places: Callable[[], Places]) -> Callable[[], None]:
    """The call, in a process that ends at a place."""

    def called() -> None:
        with places_in(places()):
            call()

    return called


def within(context: Callable, call: Callable[[], None]) -> Callable[[], None]:
    """The call inside a context."""

    def called() -> None:
        with context():
            call()

    return called


def counted(call: Callable[[], None], seen: Path) -> Callable[[], None]:
    """The call, which writes the phase of each of its places to a file."""

    def called() -> None:
        places = Places()
        with places_in(places):
            call()
        if os.environ.get("RANK", "1") == "1":  # the one of several that will be killed
            seen.write_text("\n".join(places.seen))

    return called


def phases_of(call: Callable[[], None], folder: Path) -> list[str]:
    """The phase of each place of a run."""
    seen = folder.with_suffix(".places")
    outcome = run(counted(call, seen), folder.with_suffix(".log"))
    assert outcome.status == 0, outcome.text
    return seen.read_text().split("\n")


def weights(folder: Path) -> bytes | None:
    """The bytes of the final weights, where there are any."""
    path = folder / "model.safetensors"
    return path.read_bytes() if path.is_file() else None


def judge(outcome: Outcome, folder: Path, expected: bytes) -> str:
    """What came of a run that was resumed."""
    if outcome.is_raw:
        return "tracebacks"
    if outcome.status == KILLED:
        return "hung"
    if outcome.status:
        return "lost"
    return "same weights" if weights(folder) == expected and not (folder / LOCK).exists() else "other weights"


class Tally:
    """Counts by row, written to the result file after each attack, with the log of what went wrong."""

    def __init__(self, path: Path, results: dict):
        self.path, self.results = path, results

    def add(self, row: str, verdict: str, attacks: int = 1, log: str = "") -> None:
        """Count the attacks that one verdict is about."""
        counts = self.results["rows"].setdefault(row, dict.fromkeys(KEYS, 0))
        counts["attacks"] += attacks
        counts[verdict] += attacks
        if verdict not in ("same weights", "refused in one line"):
            self.results["failures"].append(f"{row}: {verdict}: {' '.join(log.split())[-600:]}")
            print(f"{row}: {verdict}\n{log[-3000:]}", flush=True)
        save(self.path, self.results)


# the attacks


def kills(tally: Tally, work: Path, text: Path, names: Sequence[str], count: int, workers: int) -> None:
    """`count` ends of runs, by SIGKILL in three of four and by SIGTERM, SIGINT and SIGHUP, at places spread over all phases."""
    wholes = {}
    for name in names:
        folder = work / f"whole {name}"
        places = phases_of(command(folder, text, **RUNS[name]), folder)
        wholes[name] = places, weights(folder)
    jobs = []
    numbers = cycle([signal.SIGKILL] * 3 + [signal.SIGTERM] + [signal.SIGKILL] * 3 + [signal.SIGINT, signal.SIGHUP])
    rng = np.random.default_rng(0)
    while len(jobs) < count:
        for name, phase in ((name, phase) for phase in PHASES for name in names if phase in wholes[name][0]):
            where = [place for place, other in enumerate(wholes[name][0]) if other == phase]
            number, tear = next(numbers), bool(rng.integers(2))
            # after other signals the run goes on, and would meet a file that it never left half-written
            jobs.append((name, phase, int(rng.choice(where)), number, tear and number == signal.SIGKILL, len(jobs)))
    with get_context("fork").Pool(workers) as pool:  # processes, not threads: each of them forks
        for verdict, row, log in pool.imap_unordered(partial(_killed, work, text, wholes), jobs[:count]):
            tally.add(row, verdict, log=log)


def _killed(work: Path, text: Path, wholes: dict, job: tuple) -> tuple[str, str, str]:
    """Kill a run at a place, and once in three times the resumed one soon after, then let it end."""
    name, phase, place, number, tear, index = job
    folder = work / f"killed {index}"
    log, call = folder.with_suffix(".log"), command(folder, text, **RUNS[name])
    resumed = command(folder, text, resume=True, **RUNS[name])
    row = f"kill, {phase}" if number == signal.SIGKILL else f"signal, {phase}"
    outcome = run(attacked(call, partial(Places, place, number, tear)), log)
    # before the Trainer is made nothing hears a signal, and a shell shows the same status for a process that it ends
    has_begun = any(other != "saving" for other in wholes[name][0][:place])
    if outcome.status not in ((128 + number,) if has_begun and number != signal.SIGKILL else (128 + number, -number)):
        return "tracebacks" if outcome.is_raw else "lost", row, f"{name} {place}: {outcome.status} {outcome.text}"
    if index % 3 == 0 and folder.is_dir():
        run(attacked(resumed, partial(Places, place // 2, signal.SIGKILL, tear)), log)
    outcome = run(resumed if folder.is_dir() else call, log)
    verdict = judge(outcome, folder, wholes[name][1])
    shutil.rmtree(folder, ignore_errors=True)
    return verdict, row, f"{name}, place {place}, signal {number}: {outcome.text}"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "one bit": _flip,
    "garbage": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "removed": lambda path: path.unlink(),
}


def damages(tally: Tally, work: Path, text: Path, files: int | None) -> None:
    """Each file of the newest of two checkpoints, damaged in five ways; then the run is resumed."""
    extra = RUNS["l1 masks"] | {"save_total_limit": 2}
    whole = work / "whole damages"
    outcome = run(command(whole, text, **extra), whole.with_suffix(".log"))
    assert outcome.status == 0, outcome.text
    newest = whole / f"checkpoint-{STEPS}"
    for name in sorted(path.name for path in newest.iterdir())[:files]:
        for way, damage in DAMAGES.items():
            folder = work / "damaged"
            shutil.copytree(whole, folder)
            damage(folder / newest.name / name)
            outcome = run(command(folder, text, resume=True, **extra), folder.with_suffix(".log"))
            named = "is passed over" in outcome.text or (way, name) == ("removed", MANIFEST)
            verdict = judge(outcome, folder, weights(whole)) if named else "other weights"
            tally.add("damaged checkpoint", verdict, log=f"{name} {way}: {outcome.text}")
            shutil.rmtree(folder)


def states(tally: Tally, work: Path, text: Path) -> None:
    """The state of a run that was killed behind GradInit, damaged in five ways; then the run is resumed."""
    whole, killed, extra = work / "whole GradInit state", work / "killed GradInit", RUNS["GradInit"]
    seen = phases_of(command(whole, text, **extra), whole)
    run(attacked(command(killed, text, **extra), partial(Places, seen.index("training"))), killed.with_suffix(".log"))
    for way, damage in DAMAGES.items():
        folder = work / "gradinit"
        shutil.copytree(killed, folder)
        damage(folder / "gradinit" / "state.pt")
        outcome = run(command(folder, text, resume=True, **extra), folder.with_suffix(".log"))
        verdict = judge(outcome, folder, weights(whole))
        if verdict == "lost" and "state.pt" in outcome.text and "GradInit starts anew" in outcome.text:
            verdict = "refused in one line"
        tally.add("damaged state of GradInit", verdict, log=f"{way}: {outcome.text}")
        shutil.rmtree(folder)


def ranks(tally: Tally, work: Path, text: Path, count: int) -> None:
    """One of two processes is killed, under DDP and under FSDP2; the other must end too, and both go on."""
    jobs = [(kind, name) for name in RUNS for kind in GROUPS if kind == "DDP" or "masks" not in name]
    for kind, name in jobs[:count]:
        whole, folder = work / f"whole {kind} {name}", work / f"{kind} {name}"
        extra, seen = RUNS[name] | GROUPS[kind], whole.with_suffix(".places")
        call, resumed = command(folder, text, **extra), command(folder, text, resume=True, **extra)
        prepare = sharded_on_cpus if kind == "FSDP2" else nullcontext
        outcomes = run_ranks(within(prepare, counted(command(whole, text, **extra), seen)), whole.with_suffix(".log"))
        assert not any(outcome.status for outcome in outcomes), outcomes[0].text
        middle = seen.read_text().split("\n").index("saving") + 20  # behind the first checkpoint
        dies = attacked(call, lambda middle=middle: Places(middle if os.environ["RANK"] == "1" else None))
        outcomes = run_ranks(within(prepare, dies), folder.with_suffix(".log"))
        assert outcomes[1].status == KILLED and outcomes[0].status, [outcome.status for outcome in outcomes]
        outcomes = run_ranks(within(prepare, resumed), folder.with_suffix(".log"))
        worst = max(outcomes, key=lambda outcome: outcome.status != 0)
        tally.add(f"one of two processes killed, {kind}", judge(worst, folder, weights(whole)), log=worst.text)


def disks(tally: Tally, work: Path, text: Path) -> None:
    """A disk that is full or read-only at the start, and one that fills up in the middle; where file systems can be mounted."""
    for option in ("size=64k", "ro", "middle"):
        folder = work / f"disk {option}"
        folder.mkdir()
        whole = work / "whole disk"
        if option == "middle":
            outcome = run(command(whole, text), whole.with_suffix(".log"))
            assert outcome.status == 0, outcome.text
            size = sum(p.stat().st_size for p in (whole / f"checkpoint-{STEPS}").rglob("*") if p.is_file())
        mount = f"size={size * 3 // 2 // 4096 * 4}k" if option == "middle" else option
        if subprocess.run(["mount", "-t", "tmpfs", "-o", mount, "tmpfs", folder], capture_output=True).returncode:
            print("file systems cannot be mounted here: no disks")
            return
        try:
            if option == "size=64k":
                (folder / "old").write_bytes(bytes(50_000))
            inside = folder / "run"
            outcome = run(command(inside, text), folder.with_suffix(".log"))
            if option == "middle":
                ended = "tracebacks" if outcome.is_raw else "lost" if outcome.status == 0 else None
                subprocess.run(["mount", "-o", f"remount,size={size * 9}", folder], check=True)
                if ended is None:
                    again = run(command(inside, text, resume=True), folder.with_suffix(".log"))
                    ended = judge(again, inside, weights(whole))
                tally.add("disk that fills up, then has room again", ended, log=outcome.text)
            else:
                refused = outcome.status == 1 and "cannot be written to" in outcome.text and not outcome.is_raw
                tally.add("full or read-only disk", "refused in one line" if refused else "lost", log=outcome.text)
        finally:
            subprocess.run(["umount", folder], check=True)


def spoiled(call: Callable[[], None], steps: Sequence[int], value: float) -> Callable[[], None]:
    """The call, with a loss that is `value` in some steps, counted from 0."""

    def called() -> None:
        honest, count = ReZeroTrainer.compute_loss, iter(range(10**6))

        def compute_loss(self, *args, **kwargs):
            loss = honest(self, *args, **kwargs)
            return loss * value if next(count) in steps else loss

        ReZeroTrainer.compute_loss = compute_loss
        call()

    return called


def numbers(tally: Tally, work: Path, text: Path, names: Sequence[str]) -> None:
    """NaN and infinity in one step, which is left out, and in all from one on, which ends the run behind its last good checkpoint."""
    for name in names:
        for value in (float("nan"), float("inf")):
            for bf16 in (False, True):
                for last in (6, 10**6):
                    folder = work / "numbers"
                    extra = RUNS[name] | ({"bf16": True} if bf16 else {}) | {"max_bad_steps": 4}
                    call = spoiled(command(folder, text, **extra), range(5, last), value)
                    outcome = run(call, folder.with_suffix(".log"))
                    verdict = "tracebacks" if outcome.is_raw else _of_numbers(outcome, folder, last == 6)
                    row = "NaN or infinity in one step" if last == 6 else "NaN or infinity to the end"
                    tally.add(row, verdict, log=f"{name} {value} bf16={bf16}: {outcome.status} {outcome.text}")
                    shutil.rmtree(folder, ignore_errors=True)


def _of_numbers(outcome: Outcome, folder: Path, ends_well: bool) -> str:
    saved = [folder / "model.safetensors"] if ends_well else list(folder.glob("checkpoint-*/model.safetensors"))
    finite = all(np.isfinite(array).all() for path in saved if path.exists() for array in load_file(path).values())
    if not finite or (outcome.status != 0) == ends_well:
        return "other weights"
    said = "is left out" in outcome.text if ends_well else "not finite" in outcome.text or "in a row" in outcome.text
    return ("same weights" if ends_well else "refused in one line") if said else "other weights"


def inputs(tally: Tally, count: int) -> None:
    """The hypothesis suite of hostile arguments and files, with `count` inputs in all."""
    suite = ROOT / "tests" / "fuzz"
    if not suite.is_dir():
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    environment = {**os.environ, "HF_REZERO_FUZZ": str(count)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    verdict = "refused in one line" if done.returncode == 0 else "tracebacks"
    tally.add("hostile inputs", verdict, count, done.stdout + done.stderr)


# the result


def table(results: dict) -> list[list[str]]:
    """One row for each kind of attack."""
    shown = [["attack", "number", *KEYS[1:]]]
    for row, counts in results.get("rows", {}).items():
        shown.append([row, *(str(counts[key]) for key in KEYS)])
    return shown


def main() -> None:
    """Attack, and write the result file as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="ends of runs by signals; some end two times")
    parser.add_argument("--files", type=int, help="files of a checkpoint that are damaged; default: all")
    parser.add_argument(
        "--ranks", type=int, default=2 * len(RUNS), help="runs on two processes of which one is killed"
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="hostile inputs")
    parser.add_argument(
        "--names", nargs="*", default=list(RUNS), choices=list(RUNS), help="runs that are killed and meet NaN"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json")
    args = parser.parse_args()
    importlib.import_module("evaluate")  # late and slow in each run otherwise
    gc.freeze()  # what is imported, of which each run would look for garbage
    results, start = {"rows": {}, "failures": []}, time.monotonic()
    tally = Tally(args.output, results)
    with tempfile.TemporaryDirectory() as name:
        work, text = Path(name), Path(name, "text.txt")
        text.write_bytes(np.random.default_rng(0).integers(97, 123, 1200).astype(np.uint8).tobytes())
        kills(tally, work, text, args.names, args.kills, args.workers)
        damages(tally, work, text, args.files)
        states(tally, work, text)
        numbers(tally, work, text, args.names)
        disks(tally, work, text)
        ranks(tally, work, text, args.ranks)
        inputs(tally, args.inputs)
    results["seconds"] = round(time.monotonic() - start)
    save(args.output, results)
    print("\n".join("  ".join(row) for row in table(results)))
    print(f"{results['seconds']} s, {len(results['failures'])} failures")
    if results["failures"]:
        sys.exit(1)
