"""All that is to be measured on a GPU, in one command of under ten minutes, with all results in one folder.

    python -m benchmarks.gpu --out benchmarks/results/gpu

- *step*: a training step against the dense one, part by part (benchmarks/train_step.py --gpu).
- *products*: the ways to do sparse products and top-k, Pallas kernels among them (benchmarks/products.py).
- *capture*: what capturing a VLM of LLaVA-1.5-7B's shape costs over its forward passes (benchmarks/capture.py).
- *attribution*: graphs of a random Llama and of a random LLaVA (benchmarks/attribution.py).
- *demo*: the demo's VLM captured, and its joint recipe trained for some steps, with and without `--device-cache`.
- *estimate*: the rates of this GPU, and what they make of LLaVA-1.5-7B's layer 0.

Each is a process with a limit of its own, and what it prints goes to FOLDER/NAME.txt as it comes. One that fails or
takes too long is named in FOLDER/summary.txt, and the next ones go on; the status is then 1.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import machine

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "torch", "transformers", "flax")
Commands = Callable[[Path, Path], list[list[str]]]  # of the results' folder and a working folder


@dataclass(frozen=True)
class Part:
    """Commands that follow one another, and the seconds that they may take together."""

    name: str
    limit: float
    commands: Commands


def step(out: Path, _: Path) -> list[list[str]]:
    return [["-m", "benchmarks.train_step", "--gpu", "--results", str(out)]]


def products(out: Path, _: Path) -> list[list[str]]:
    return [["-m", "benchmarks.products", "--results", str(out)]]


def capture(_: Path, work: Path) -> list[list[str]]:
    options = "--shape llava-7b --samples 32 --batch-size 8 --pairs 2"  # a pair writes 10 GB
    return [["-m", "benchmarks.capture", *options.split(), "--folder", str(work)]]


def attribution(out: Path, _: Path) -> list[list[str]]:
    options = "--device cuda --parts llama large"
    return [["-m", "benchmarks.attribution", *options.split(), "--out", str(out / "attribution_gpu.txt")]]


def demo(_: Path, work: Path) -> list[list[str]]:
    model, store = ROOT / "examples/shapes/model", work / "store"
    train = ["train.py", "--config", "configs/demo_joint.py", "--store", str(store), "--steps", "300"]
    return [
        ["capture/run.py", "--model", str(model), "--max-samples", "3000", "--out", str(store)],
        [*train, "--out", str(work / "run")],
        [*train, "--out", str(work / "cached"), "--device-cache"],
    ]


def estimate(_: Path, __: Path) -> list[list[str]]:
    return [["-m", "cltjax.cli", "estimate", "--config", "configs/llava_1_5_7b_layer0.py", "--measure"]]


PARTS = (
    Part("step", 230, step),
    Part("products", 90, products),
    Part("capture", 80, capture),
    Part("attribution", 60, attribution),
    Part("demo", 80, demo),
    Part("estimate", 30, estimate),
)


def run(part: Part, out: Path, limit: float) -> str:
    """Run a part's commands for at most `limit` seconds; returns how it ended."""
    began = time.monotonic()
    with (out / f"{part.name}.txt").open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as work:
        for command in part.commands(out, Path(work)):
            print("$ python", *command, file=file, flush=True)
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # with what it starts, it can be ended as a whole
                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"},
            )
            try:
                status = process.wait(max(0, limit - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                return f"stopped after {limit:.0f} s"
            finally:  # also on Ctrl-C
                with suppress(ProcessLookupError):  # children may outlive it
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if status:
                return f"status {status} after {time.monotonic() - began:.0f} s"
    return f"done in {time.monotonic() - began:.0f} s"


def run_all(parts: Sequence[Part], out: Path, seconds: float) -> bool:
    """Run parts one after the other, `seconds` at most together. Whether all were done."""
    out.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), True
    with (out / "summary.txt").open("w", encoding="utf-8") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        say(machine(*PACKAGES))
        say(gpu())
        for part in parts:
            left = seconds - (time.monotonic() - began)
            ended = run(part, out, min(part.limit, left)) if left > 0 else "not begun: no time was left"
            done &= ended.startswith("done")
            say(f"{part.name}: {ended}")
    return done


def gpu() -> str:
    """The GPU's name, memory and driver."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi: no GPU"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu", help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--seconds", type=float, default=570, help="of all parts together")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and with it what runs
    parts = [part for part in PARTS if options.parts is None or part.name in options.parts]
    sys.exit(not run_all(parts, options.out.absolute(), options.seconds))


if __name__ == "__main__":
    main()
