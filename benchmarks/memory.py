"""Not only a toy: peak memory of capture -> train -> evaluate on a LLaVA of width 1024 with 576 image tokens.

    python benchmarks/memory.py [--samples 120] [--steps 40]

Random weights (benchmarks/shaped_vlm.py), 8 text layers, on the CPU. Each stage is a process of its own, as a user
runs it; what is printed is its wall time and its peak resident memory, which the bar puts at 12 GB at most.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 12.0  # GB


def stage(name: str, *args: str) -> float:
    """Run one command to its end and return its peak resident memory in GB."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *args], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{name} ended with status {process.returncode}")
    peak = usage.ru_maxrss * 1024 / 1e9
    print(f"{name}: {time.monotonic() - begun:.0f} s, peak {peak:.2f} GB", flush=True)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="where the model and the store go; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, store, run = (str(Path(folder) / name) for name in ("model", "store", "run"))
        stage("model", "-m", "benchmarks.shaped_vlm", "--width", "1024", "--layers", "8", "--out", model)
        capture = ("--model", model, "--out", store, "--max-samples", str(options.samples), "--batch-size", "4")
        train = ("--layer", "0", "--store", store, "--out", run, "--steps", str(options.steps), "--warmup", "0")
        size = ("--model.features", str(options.features), "--model.k", "32", "--lr", "4e-4")
        peaks = [
            stage("capture", "capture/run.py", *capture),
            stage("train", "train.py", *train, *size),
            stage("evaluate", "evaluate.py", "--clt", run, "--store", store),
        ]
    print(f"highest peak {max(peaks):.2f} GB, limit {LIMIT:.0f} GB")
    sys.exit(max(peaks) > LIMIT)


if __name__ == "__main__":
    main()
