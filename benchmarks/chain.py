"""Not only a toy: a LLaVA of width 1024 from its store to export, replacement and generation, with peak memory.

    python -m benchmarks.chain --out runs/chain [--samples 64] [--steps 30] [--features 8192]

Random weights (benchmarks/shaped_vlm.py), 8 text layers, 576 image tokens, on the CPU: a joint CLT with offset 0, all
36 pairs. Each step is a process of its own, as a user runs it. The table puts its peak resident memory, which the bar
has at LIMIT, beside what it cannot do without: the arrays that a step has to hold, at the width that it holds them in.
Resident memory counts pages of files that are mapped and were read: of lazily loaded decoders those that were used.

What is learned is of no interest (random weights, few steps); that bfloat16 measures like float32 is.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.memory import LIMIT, ROOT, stage
from benchmarks.report import machine, publish
from cltjax.files import write_json
from examples.shapes.scenes import random_scene_of, render

RESULT = ROOT / "benchmarks/results/chain.txt"
WIDTH, LAYERS, K = 1024, 8, 32
PACKAGES = ("torch", "transformers", "jax", "flax", "safetensors")
QUESTION = "What color is the middle right thing?"


@dataclass(frozen=True)
class Step:
    """One command of Python's, the bytes that it cannot do without, and the folder that it writes, if any."""

    name: str
    command: str
    needs: int
    writes: str | None = None


@dataclass(frozen=True)
class Done:
    """A step that ran: seconds, peak resident GB, GB that it wrote."""

    step: Step
    seconds: float
    peak: float
    size: float | None


def steps(samples: int, train_steps: int, features: int) -> Iterator[Step]:
    """All commands, in order; file names are relative to the output folder."""
    encoders = 4 * LAYERS * features * WIDTH
    weights = encoders + 4 * LAYERS * (LAYERS + 1) // 2 * features * WIDTH
    # Embeddings and unembedding, attention, MLPs of benchmarks/shaped_vlm.py in float32; the vision tower is small.
    vlm = 4 * (2 * 32064 * WIDTH + LAYERS * WIDTH * (4 * WIDTH + 3 * (11 * WIDTH // 4)))
    yield Step(
        "random LLaVA", f"-m benchmarks.shaped_vlm --width {WIDTH} --layers {LAYERS} --out model", vlm // 2, "model"
    )
    yield Step(
        "capture", f"capture/run.py --model model --out store --max-samples {samples} --batch-size 4", vlm, "store"
    )
    yield Step(
        "train",
        f"train.py --layer all --offset 0 --store store --out run --model.features {features} --model.k {K} "
        f"--steps {train_steps} --warmup 0 --lr 4e-4 --log.every 10",
        4 * weights,  # and their gradients, and Adam's two moments
        "run",
    )
    kinds = ("float32", "bfloat16")
    for kind in kinds:
        export = f"-m cltjax.cli export run --out clt-{kind} --dtype {kind}"
        yield Step(f"export, {kind}", export, weights, f"clt-{kind}")
    for kind in kinds:
        yield Step(f"evaluate --store, {kind}", f"evaluate.py --clt clt-{kind} --store store", weights)
    for kind in kinds:
        ask = f"-m cltjax.cli generate --clt clt-{kind} --model model --image image.png --n 8 --set 3:17=5.0 --prompt"
        yield Step(f"generate, {kind}", f"{ask} {shlex.quote(QUESTION)}", vlm + weights)
    measure = "evaluate.py --model model --store store --dataset shapes --max-samples 4 --batch-size 2 --generate 4"
    for kind in kinds:
        yield Step(f"evaluate --model, {kind}", f"{measure} --clt clt-{kind}", vlm + weights)
        yield Step(f"evaluate --model --lazy, {kind}", f"{measure} --clt clt-{kind} --lazy", vlm + encoders)


def run(step: Step, out: Path) -> Done:
    """Run one step, with the output folder in front of what lies there; one that ran before is not run again."""
    file = out / "done.json"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if step.command not in figures:
        if step.writes:
            shutil.rmtree(out / step.writes, ignore_errors=True)  # what was broken off
        begun = time.monotonic()
        peak = stage(step.name, *(in_folder(arg, out) for arg in shlex.split(step.command)))
        size = size_of(out / step.writes) if step.writes else None
        figures[step.command] = {"seconds": time.monotonic() - begun, "peak": peak, "size": size}
        write_json(file, figures)
    return Done(step, **figures[step.command])


def in_folder(arg: str, out: Path) -> str:
    named = ("model", "store", "run", "image.png", "clt-float32", "clt-bfloat16")
    return str((out / arg).resolve()) if arg in named else arg


def size_of(folder: Path) -> float:
    """GB in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def table(done: list[Done]) -> Table:
    found = Table("step", title=f"width {WIDTH}, {LAYERS} layers, 576 image tokens, on the CPU", title_justify="left")
    for name in ("seconds", "peak GB", "needs GB", "writes GB"):
        found.add_column(name, justify="right")
    for one in done:
        size = "" if one.size is None else f"{one.size:.2f}"
        found.add_row(one.step.name, f"{one.seconds:.0f}", f"{one.peak:.2f}", f"{one.step.needs / 1e9:.2f}", size)
    return found


def report(done: list[Done], out: Path) -> Iterator[str | Table]:
    """The machine, the commands, the table, and the test FVU of each CLT directory."""
    yield machine(*PACKAGES)
    for one in done:
        yield f"$ python {one.step.command}"
    yield table(done)
    for folder in sorted(out.glob("clt-*")):
        for file in folder.glob("metrics-*.json"):
            fvu = json.loads(file.read_text(encoding="utf-8"))["fvu"]["all"]
            yield f"{folder.name}: test FVU {fvu:.5f}"
    highest = max(one.peak for one in done)
    yield f"highest peak {highest:.2f} GB, limit {LIMIT:.0f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the model, the store and the weights; steps done there are not run again",
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--features", type=int, default=8192)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    render(random_scene_of("test", rng), rng).save(options.out / "image.png")
    done = [run(step, options.out) for step in steps(options.samples, options.steps, options.features)]
    publish(RESULT, report(done, options.out))
    sys.exit(max(one.peak for one in done) > LIMIT)


if __name__ == "__main__":
    main()
