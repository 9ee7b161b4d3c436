"""`make demo`: the whole pipeline on the bundled VLM, in about five minutes on two cores.

Every step is a command that you can type yourself; it is shown before it runs, with its time after it.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"python": [sys.executable], "cltjax": [sys.executable, "-m", "cltjax.cli"]}  # those of this environment
STEPS = (
    (
        "Capture: what every MLP of the demo VLM reads and writes, token by token, for 4,000 images with questions",
        "python capture/run.py --model examples/shapes/model --generate 24 --out demo/activations",
    ),
    (
        "Train: a cross-layer transcoder; every layer's features predict what its own MLP and all later ones write",
        "python train.py --config configs/demo_joint.py --steps 1200 --store demo/activations --out demo/runs/all",
    ),
    (
        "Evaluate: on images that neither the VLM nor the transcoder was trained on, beside ridge regression",
        "python evaluate.py --clt demo/runs/all --store demo/activations --ridge",
    ),
    (
        "Export: weights for PyTorch, as safetensors",
        "cltjax export demo/runs/all --out demo/clt",
    ),
    (
        "Replace: the VLM answers with all of its MLPs replaced; beside it the original and two ablations",
        "python evaluate.py --clt demo/clt --model examples/shapes/model --store demo/activations --max-samples 300",
    ),
    (
        "Name: features by what the pictures show and the questions ask",
        "python examples/shapes/labels.py --clt demo/clt --store demo/activations --out demo/labels.json",
    ),
    (
        "Explain: one answer about a held-out image, from its patches and words through features",
        "cltjax graph --clt demo/clt --image demo/activations/images/shapes-001110.png "
        "--prompt 'What is the orange thing used for?' --store demo/activations --labels demo/labels.json "
        "--out demo/graphs/orange",
    ),
)
NEXT = """
What to try next, after `source .venv/bin/activate`
  python train.py --layer 0 --config configs/demo.py --store demo/activations --out demo/runs/L0      one source layer
  python train.py --config configs/demo_joint.py --model.k 4 --store demo/activations --out demo/runs/k4
  cltjax graph --clt demo/clt --image demo/activations/images/shapes-000038.png --out demo/graphs/right \\
      --prompt "What color is just right of the red thing?" && cltjax view demo/graphs
  python capture/run.py --model YOUR_MODEL --dataset YOUR_QUESTIONS.json --image-dir YOUR_IMAGES --out activations
"""


def main() -> None:
    started = time.monotonic()
    for title, command in STEPS:
        print(f"\n== {title}\n$ {command}", flush=True)
        program, *rest = shlex.split(command)
        begun = time.monotonic()
        done = subprocess.run([*PROGRAMS[program], *rest], cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        print(f"({time.monotonic() - begun:.0f} s)", flush=True)
    print("\nPlots")
    for plot in sorted((ROOT / "demo/runs/all/plots").glob("*.png")):
        print(f"  {plot.relative_to(ROOT)}")
    print("\nThe page, which opens from disk\n  demo/graphs/orange/index.html")
    print(NEXT)
    print(f"make demo took {time.monotonic() - started:.0f} s after the install.")


if __name__ == "__main__":
    main()
