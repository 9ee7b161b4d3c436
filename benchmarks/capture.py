"""What capturing costs: its wall time over that of the same forward passes, in pairs, in one process.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.capture       # the demo VLM, as capture/run.py runs it
    python -m benchmarks.capture --shape llava-7b              # LLaVA-1.5-7B's shape with random weights, on a GPU

Both sides read, prepare and batch the same samples and run the same layers. One stops there; the other hooks
every layer and writes the store. Prints each pair's ratio and their median, and the store's bytes a token.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.shaped_vlm import IMAGE_SIZE, LLAVA_7B, PATCH, shaped_config
from capture.config import CaptureConfig
from capture.prompts import Dataset, load_dataset, resolve_template
from capture.recorder import batches, encoder, record_all, windows
from capture.vlm import VLM, load, wrap
from cltjax.store import ActivationStore
from examples.shapes.vlm import build_processor

DEMO = Path(__file__).resolve().parents[1] / "examples/shapes/model"


def forward_only(vlm: VLM, dataset: Dataset, config: CaptureConfig) -> None:
    encode = encoder(vlm, resolve_template(config.template, vlm.processor))
    for batch in batches(windows(dataset.samples, config.batch_size), config.batch_size, encode):
        vlm.forward(vlm.collate(batch.encoded))
    if vlm.device.type == "cuda":
        torch.cuda.synchronize()


def random_7b() -> VLM:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlavaForConditionalGeneration(shaped_config(**LLAVA_7B))
    torch.set_default_dtype(torch.float32)
    return wrap(model, build_processor(IMAGE_SIZE, PATCH), "random LLaVA-1.5-7B")


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", "llava-7b"), default="demo")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the store is written; default: the system's temporary folder"
    )
    options = parser.parse_args()

    vlm = random_7b() if options.shape == "llava-7b" else load(str(DEMO), "auto", "auto")
    dataset = load_dataset("shapes", max_samples=options.samples)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if vlm.device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'}"
    )
    ratios = []
    for pair in range(options.pairs + 1):  # the first is a warm-up
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            config = CaptureConfig(options.shape, out=Path(folder) / "store", batch_size=options.batch_size)
            plain = seconds(lambda config=config: forward_only(vlm, dataset, config))
            captured = seconds(lambda config=config: record_all(vlm, dataset, config))
            if pair == 0:
                store = ActivationStore.open(config.out)
                size = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file())
                content = 2 * len(store.layers) * store.d_model * 2
                print(f"{store.rows:,} rows: {size / store.rows:,.1f} bytes a token, {content:,} of them activations")
                continue
        ratios.append(captured / plain)
        print(
            f"forward {plain:.2f} s, capture {captured:.2f} s, ratio {ratios[-1]:.3f}, "
            f"{store.rows / captured:,.0f} tokens/s",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f} of {len(ratios)} pairs")


if __name__ == "__main__":
    sys.exit(main())
