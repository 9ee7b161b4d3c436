"""`make demo`: the whole pipeline on the bundled VLM, in about three minutes on two cores.

Every step is a command that you can type yourself; it is shown before it runs, with its time after it.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = (
    (
        "Capture: what every MLP of the demo VLM reads and writes, token by token, for 4,000 images with questions",
        "capture/run.py --model examples/shapes/model --out demo/activations",
    ),
    (
        "Train: a cross-layer transcoder that reads layer 0 and predicts the MLPs of all later layers",
        "train.py --layer 0 --config configs/demo.py --store demo/activations --out demo/runs/L0",
    ),
    (
        "Evaluate: on images that neither the VLM nor the transcoder was trained on",
        "evaluate.py --clt demo/runs/L0 --store demo/activations --ridge",
    ),
)
NEXT = """
What to try next, after `source .venv/bin/activate`
  python train.py --config configs/demo_joint.py --store demo/activations --out demo/runs/all      every layer, jointly
  python train.py --config configs/demo.py --layer 2 --model.k 4 --store demo/activations --out demo/runs/L2-k4
  python capture/run.py --model YOUR_MODEL --dataset YOUR_QUESTIONS.json --image-dir YOUR_IMAGES --out activations
"""


def main() -> None:
    started = time.monotonic()
    for title, command in STEPS:
        print(f"\n== {title}\n$ python {command}", flush=True)
        begun = time.monotonic()
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        print(f"({time.monotonic() - begun:.0f} s)", flush=True)
    print("\nPlots")
    for plot in sorted((ROOT / "demo/runs/L0/plots").glob("*.png")):
        print(f"  {plot.relative_to(ROOT)}")
    print(NEXT)
    print(f"make demo took {time.monotonic() - started:.0f} s after the install.")


if __name__ == "__main__":
    main()
