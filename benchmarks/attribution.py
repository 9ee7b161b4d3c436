"""How long an attribution graph takes, and how much memory.

    python -m benchmarks.attribution [--circuit-tracer PYTHON] [--clt CLT_DIR] [--device cuda] [--parts llama ...]

- *llama*: a random Llama (D = 256, 6 layers, 32 positions) and CLTs (F = 2048, joint to the end) of which about 1,100,
  3,200, 7,000 and 11,000 features are active; all rows, float32. `--circuit-tracer` names a python where
  circuit-tracer is installed (benchmarks/circuit_tracer_graphs.py): its time on the same files, right after ours.
- *growth*: the same Llama, 16 features a layer and position, prompts of 64 to 512 tokens, 512 to 2,048 nodes.
- *demo*: graphs of the demo VLM's `test` questions with all active features, the CLT that --clt names.
- *large*: a random LLaVA of width 1024 with 8 layers and 576 image tokens (benchmarks/shaped_vlm.py), a random CLT
  (F = 4096, 32 a layer and position, joint to the end), decoders left in their files, at most 1,000 features.

Each figure is of a process of its own. Seconds are of what makes a graph of a prompt that is encoded already, in a
model that is loaded: `linearise`, targets, `attribute`; of circuit-tracer its `attribute`. CPU seconds are those of all
threads: on a machine with other work they say more. Growth: the peak of resident memory above what was resident before;
peak: of the whole process, with its model.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.circuit_tracer_graphs import describe, memory, random_llama, random_prompt, random_weights, save_llama
from benchmarks.memory import LIMIT, ROOT
from benchmarks.report import machine, publish
from capture.vlm import VLM, Encoded, load
from cltjax.circuit_tracer import write_circuit_tracer
from cltjax.clt_directory import CLTDirectory, write_clt
from cltjax.replacement.attribution import attribute
from cltjax.replacement.clt import CLT
from cltjax.replacement.graph import Graph, prune
from cltjax.replacement.local import linearise
from cltjax.replacement.targets import likeliest
from examples.shapes.questions import ONE_WORD_KINDS, ask
from examples.shapes.scenes import random_scene_of, render
from examples.shapes.vlm import TEMPLATE

RESULT = ROOT / "benchmarks/results/attribution.txt"
PACKAGES = ("torch", "transformers", "numpy", "scipy")
PARTS = ("llama", "growth", "demo", "large")
WIDTH, LAYERS, HEADS, WORDS, FEATURES, POSITIONS = 256, 6, 8, 1000, 2048, 32
SIZES = (1_100, 3_200, 7_000, 11_200)  # active features
GROWTH = ((64, 512), (128, 512), (256, 512), (512, 512), (128, 1024), (128, 2048))  # positions, nodes
GROWTH_K, BATCH = 16, 64
DEMO, PROMPTS = "examples/shapes/model", 10
LARGE_FEATURES, LARGE_K, MAX_NODES = 4096, 32, 1000
QUESTION = TEMPLATE.format("What color is the middle right thing?")

Figures = dict[str, Any]


# What is measured, each in a process of its own ---------------------------------------------------------------------


def measured(make: Callable[[], Graph], device: torch.device) -> Figures:
    """Run it once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    wall, cpu = time.perf_counter(), time.process_time()
    graph = make()
    found = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found["growth"] = memory("VmHWM") - before
    found["peak"] = memory("VmHWM")
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated() / 1e9
    rows = int((~np.isnan(graph.total)).sum())
    return found | {"rows": rows, "active": graph.about["active_features"], "edges": graph.edges.nnz}


def measure_llama(options: argparse.Namespace) -> Figures:
    """Ours, on files that `prepare` wrote."""
    folder = options.folder
    vlm, encoded = bench_llama(load_file(folder / "ids.safetensors")["ids"], options.device)
    clt = CLT.from_pretrained(folder / "clt", vlm.device)
    return measured(lambda: graph_of(vlm, clt, encoded, options.nodes), vlm.device)


def measure_demo(options: argparse.Namespace) -> Figures:
    vlm = load(DEMO, "float32", options.device)
    clt = CLT.from_pretrained(options.clt, vlm.device)
    seconds, cpu, found = [], [], []
    for number in range(PROMPTS):
        rng = random.Random(number)
        scene = random_scene_of("test", rng)
        kind = ONE_WORD_KINDS[number % len(ONE_WORD_KINDS)]
        question = ask(scene, kind, rng) or ask(scene, "exist", rng)
        assert question is not None
        encoded = vlm.encode(TEMPLATE.format(question.text), render(scene, rng))
        wall, own = time.perf_counter(), time.process_time()
        graph = graph_of(vlm, clt, encoded)
        prune(graph)
        seconds.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - own)
        found.append(graph.about["active_features"])
    spread = {"median": float(np.median(seconds)), "most": max(seconds), "cpu": float(np.median(cpu))}
    return spread | {"active": [min(found), max(found)], "peak": memory("VmHWM")}


def measure_large(options: argparse.Namespace) -> Figures:
    vlm = load(str(options.folder / "model"), "float32", options.device)
    clt = CLT.from_pretrained(options.folder / "clt", vlm.device, lazy=True)
    rng = random.Random(0)
    encoded = vlm.encode(QUESTION, render(random_scene_of("test", rng), rng))
    found = measured(lambda: graph_of(vlm, clt, encoded, MAX_NODES), vlm.device)
    return found | {"positions": encoded["input_ids"].shape[1]}


MEASURES = {"llama": measure_llama, "demo": measure_demo, "large": measure_large}


def graph_of(vlm: VLM, clt: CLT, encoded: Encoded, max_nodes: int | None = None) -> Graph:
    local = linearise(vlm, clt, encoded)
    return attribute(local, likeliest(local), max_nodes)


def measure(name: str, options: argparse.Namespace, **more: Any) -> Figures:
    """In another process."""
    given = {"measure": name, "device": options.device} | more
    args = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    return run(sys.executable, "-m", "benchmarks.attribution", *args)


def run(*command: str) -> Figures:
    """The JSON on the last line of what a command prints."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# Models and CLTs ----------------------------------------------------------------------------------------------------


def bench_llama(ids: torch.Tensor, device: str = "cpu") -> tuple[VLM, Encoded]:
    """The random Llama, always the same."""
    torch.manual_seed(0)
    vlm = random_llama(WIDTH, LAYERS, HEADS, WORDS)
    vlm.model.to("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    return vlm, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


def prepare(folder: Path, positions: int, active: int | None = None, circuit_tracer: bool = False) -> None:
    """ids, clt and, for circuit-tracer, llama and tracer. active: how many features are above their thresholds, as many
    in every layer; None: GROWTH_K at each position."""
    folder.mkdir()
    ids = random_prompt(random_llama(WIDTH, 1, HEADS, WORDS), positions)["input_ids"][0]
    save_file({"ids": ids}, folder / "ids.safetensors")
    vlm, encoded = bench_llama(ids)
    kind, layers = "topk" if active is None else "jumprelu", tuple(range(LAYERS))
    described = describe(vlm, FEATURES, kind, layers, 0, LAYERS, "mlp_in", GROWTH_K)
    files = random_weights(described)
    if active is not None:
        found = vlm.trace(vlm.collate([encoded]), "mlp_in", layers).site
        for layer, x in zip(layers, found, strict=True):
            tensors = files[f"W_enc_{layer}.safetensors"]
            h = x[0, 1:].numpy() @ tensors[f"W_enc_{layer}"].T + tensors[f"b_enc_{layer}"]  # none at the first position
            h = np.sort(h.ravel())[h.size - active // LAYERS - 8 :][:16]
            widest = int(np.argmax(np.diff(h)))  # so that rounding elsewhere makes no other feature active
            tensors[f"threshold_{layer}"][:] = h[widest : widest + 2].mean()
    write_clt(folder / "clt", described, files.items())
    if circuit_tracer:
        write_circuit_tracer(CLTDirectory.open(folder / "clt"), folder / "tracer")
        save_llama(vlm, folder / "llama", WORDS)


def prepare_large(folder: Path) -> None:
    shape = ("--width", "1024", "--layers", "8", "--out", str(folder / "model"))
    subprocess.run([sys.executable, "-m", "benchmarks.shaped_vlm", *shape], cwd=ROOT, check=True)
    vlm = load(str(folder / "model"), "float32", "cpu")
    layers = tuple(range(vlm.n_layers))
    described = describe(vlm, LARGE_FEATURES, "topk", layers, 0, vlm.n_layers, "mlp_in", LARGE_K)
    write_clt(folder / "clt", described, random_weights(described).items())


# Parts --------------------------------------------------------------------------------------------------------------


def part_llama(options: argparse.Namespace, folder: Path) -> tuple[Table, list[str]]:
    table = Table(title=f"Llama of width {WIDTH}, {LAYERS} layers, F {FEATURES}, {POSITIONS} positions, all rows")
    right(table, "active", "rows x columns", "s", "CPU s", "growth GB")
    right(table, "circuit-tracer s", "CPU s", "growth GB", "times faster", "by CPU s")
    ratio, versions = None, {}
    for size in options.sizes:
        prepare(folder / str(size), POSITIONS, size, bool(options.circuit_tracer))
        ours = measure("llama", options, folder=folder / str(size))
        columns = ours["active"] + (LAYERS + 1) * POSITIONS
        cells = [f"{ours['active']:,}", f"{ours['rows'] * columns / 1e6:.1f} M", *amounts(ours)]
        if options.circuit_tracer:
            script = ("benchmarks/circuit_tracer_graphs.py", "time", str(folder / str(size)), str(BATCH))
            theirs = run(str(options.circuit_tracer), *script)
            assert theirs["rows"] == ours["rows"], "another graph"
            ratio, versions = theirs["seconds"] / ours["seconds"], theirs["versions"]
            by_cpu = theirs["cpu"] / ours["cpu"]
            cells += [*amounts(theirs), f"{ratio:.1f}", f"{by_cpu:.1f}"]
        table.add_row(*cells)
        say(*cells)
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    said = [] if ratio is None else [f"{ratio:.1f} times faster than circuit-tracer on the most features; bar 10"]
    return table, said + ([f"circuit-tracer's: {used}, batch {BATCH}"] if versions else [])


def part_growth(options: argparse.Namespace, folder: Path) -> tuple[Table, list[str]]:
    table = Table(title=f"The same Llama, {GROWTH_K} features a layer and position, some of the rows")
    right(table, "positions", "nodes", "rows x positions", "active", "s", "CPU s", "growth GB")
    right(table, "CPU ms / 1000 r x p", "MB / 1000 r x p")
    for positions, nodes in GROWTH:
        where = folder / str(positions)
        if not where.exists():
            prepare(where, positions)
        found = measure("llama", options, folder=where, nodes=nodes)
        area = found["rows"] * positions / 1e3
        each = f"{1e3 * found['cpu'] / area:.1f}", f"{1e3 * found['growth'] / area:.2f}"
        cells = [f"{positions}", f"{nodes:,}", f"{area:,.0f} k", f"{found['active']:,}", *amounts(found), *each]
        table.add_row(*cells)
        say(*cells)
    return table, []


def part_demo(options: argparse.Namespace, folder: Path) -> tuple[Table, list[str]]:
    table = Table(title=f"Demo VLM, {options.clt}, {PROMPTS} prompts, all active features, pruned")
    right(table, "active", "median s", "most s", "median CPU s", "peak GB")
    found = measure("demo", options, clt=options.clt)
    spread = f"{found['active'][0]:,} to {found['active'][1]:,}"
    table.add_row(spread, *(f"{found[name]:.2f}" for name in ("median", "most", "cpu", "peak")))
    return table, [f"{found['most']:.2f} s the slowest graph of the demo; bar 5"]


def part_large(options: argparse.Namespace, folder: Path) -> tuple[Table, list[str]]:
    table = Table(title=f"LLaVA of width 1024, 8 layers, F {LARGE_FEATURES}, at most {MAX_NODES:,} features")
    right(table, "positions", "active", "rows", "edges", "s", "CPU s", "growth GB", "peak GB", "GPU GB")
    prepare_large(folder)
    found = measure("large", options, folder=folder)
    counts = (f"{found[name]:,}" for name in ("positions", "active", "rows", "edges"))
    table.add_row(*counts, *amounts(found), f"{found['peak']:.2f}", f"{found['gpu']:.2f}" if "gpu" in found else "")
    return table, [f"{found['peak']:.2f} GB peak of the process on the LLaVA of width 1024; bar {LIMIT:.0f}"]


def right(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")


def amounts(found: Figures) -> list[str]:
    return [f"{found['seconds']:.1f}", f"{found['cpu']:.1f}", f"{found['growth']:.2f}"]


def say(*cells: str) -> None:
    print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--circuit-tracer", type=Path, help="the python of an environment that has it")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="about how many active features the Llama has"
    )
    parser.add_argument("--clt", type=Path, help="CLT directory of the demo VLM; without it, no such part")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    for name, kind in (("measure", str), ("folder", Path), ("nodes", int)):  # of the processes that are measured
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options)))
        return
    # for all processes; threads that wait for others are not to count as work, or to keep others from theirs
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    gpu = f"{torch.cuda.get_device_name()}, " if options.device != "cpu" and torch.cuda.is_available() else ""
    first = f"{gpu}{machine(*PACKAGES)}; {options.threads} threads, load {os.getloadavg()[0]:.1f} before"
    tables, lines = [], []
    for name in options.parts:
        if name == "demo" and options.clt is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            table, said = globals()[f"part_{name}"](options, Path(folder))
        table.title_justify = "left"
        tables.append(table)
        lines += said
    publish(options.out, [first, *tables, *lines])


if __name__ == "__main__":
    main()
