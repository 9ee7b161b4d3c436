"""How fast the loader is: `Batches`, as train.py makes them, against a plain sequential read of the same files.

    python -m benchmarks.loader                     # writes synthetic stores of 2 GB, and deletes them; five minutes
    python -m benchmarks.loader --store activations
    python -m benchmarks.loader --train configs/demo_joint.py --store activations      # what a run waits for its data

One epoch's batches of the train rows are taken as the training loop takes them, read ahead on threads, and nothing is
done with them; another epoch comes before, untimed. The plain read goes through the store's arrays in the order of
their files, with `readinto` of 8 MiB, until it has as many bytes as the layers and rows of these batches take in the
store; so whatever the loader reads beyond them counts against it. The third, tensorstore, reads as many rows of these
layers in their order into memory that is there already, checksums and all: what is left to a loader that neither
shuffles nor skips. The three take turns. Cores busy is the processor's time, of all threads, over that of the clock:
what reading costs beside the disk, page cache and copying included. Cold: before each, the files are dropped from the
page cache (POSIX_FADV_DONTNEED). Warm: all of them have been read. What is printed is also added to
benchmarks/results/loader.txt.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from benchmarks.report import machine, publish
from cltjax.allocator import keep_freed_memory
from cltjax.batches import Batches, read_ahead
from cltjax.checkpoint import TIMING, read_lines
from cltjax.config import DataConfig, TokensConfig, TrainConfig
from cltjax.store import ActivationStore
from cltjax.store_format import DTYPES, IMAGE, SPECIAL, TEXT, StoreSpec
from cltjax.store_writer import Rows, StoreWriter
from cltjax.tokens import token_rules
from cltjax.wiring import Wiring, spell_layers, wire

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "loader.txt"
BAR, WAITING_BAR = 0.8, 0.05
LAYERS, D = 8, 1024  # of a synthetic store
SHARD_ROWS = 4096  # capture's default
PLAIN_READ = 8 << 20
STRETCH = 16384  # rows read in order at once
BATCHES_AHEAD = 4  # as many as cltjax/training.py asks for
# (--layer, --n-targets): one source with some targets, and all layers.
RUNS = (("0", 4), ("all", 16))


def synthetic_store(path: Path, size: int, dtype: str) -> ActivationStore:
    """A store of about `size` bytes. Samples of 600 tokens, as a prompt with 576 image tokens has."""
    tokens = 600
    samples = max(16, size // (2 * LAYERS * D * DTYPES[dtype].itemsize * tokens))
    model = {"id": "synthetic", "revision": None, "class": "none", "n_layers": LAYERS, "d_model": D}
    dataset = {"spec": "synthetic", "fingerprint": str(samples), "samples": samples, "skipped": []}
    spec = StoreSpec(model, "mlp_in", tuple(range(LAYERS)), dtype, SHARD_ROWS, None, dataset, {})
    modality = np.array([SPECIAL] + [IMAGE] * 576 + [TEXT] * (tokens - 577), np.uint8)
    drawn = np.random.default_rng(0).normal(size=(2, 2 * tokens, LAYERS, D)).astype(np.float32)
    splits = ("test", "train", "train", "train", "train", "train", "val", "train") + ("train",) * 7 + ("test",)
    with StoreWriter(path, spec, samples * tokens) as writer:
        for number in range(samples):
            first = 37 * number % tokens  # what the numbers are does not matter: nothing is compressed
            columns = {
                "sample": np.full(tokens, number, np.int32),
                "position": np.arange(tokens, dtype=np.int32),
                "token_id": np.zeros(tokens, np.int32),
                "modality": modality,
                "generated": np.zeros(tokens, np.uint8),
            }
            record = {"id": str(number), "split": splits[number % len(splits)]}
            site, mlp_out = drawn[:, first : first + tokens]
            writer.append(Rows(site, mlp_out, columns), [record], number)
        writer.finish()
    os.sync()  # only what is on disk can be dropped from the page cache
    return ActivationStore.open(path)


def files_of(store: ActivationStore) -> list[Path]:
    """The shards of both arrays of vectors, array by array, each in the order of its rows."""
    found = []
    for part in store.parts:
        for which in ("site", "mlp_out"):
            shards = (part.path / part.name(which) / "c").iterdir()
            for shard in sorted(shards, key=lambda folder: int(folder.name)):
                found += sorted(path for path in shard.rglob("*") if path.is_file())
    return found


def drop(files: Iterable[Path]) -> None:
    """Out of the page cache."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


class Took(NamedTuple):
    """Seconds by the clock, and of the processor for this process, all threads together."""

    seconds: float
    busy: float


def now() -> Took:
    return Took(time.perf_counter(), time.process_time())


def since(begun: Took) -> Took:
    return Took(*(there - here for there, here in zip(now(), begun, strict=True)))


def read_plainly(files: Sequence[Path], size: int, cold: Sequence[Path]) -> Took:
    """Reading `size` bytes, file after file."""
    drop(cold)
    buffer, left = memoryview(bytearray(PLAIN_READ)), size
    begun = now()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while left > 0 and (read := file.readinto(buffer)):  # type: ignore[attr-defined]
                left -= read
    return since(begun)


def read_in_order(store: ActivationStore, wiring: Wiring, rows: int, cold: Sequence[Path]) -> Took:
    """Reading the store's first `rows` rows at a run's layers, stretch by stretch."""
    memory = [np.empty(*store.packed_shape(STRETCH, layers)) for layers in (wiring.sources, wiring.targets)]
    for out in memory:
        out.fill(0)
    drop(cold)
    begun = now()
    for start in range(0, rows, STRETCH):
        chosen = np.arange(start, min(start + STRETCH, rows))
        for which, layers, out in zip(("site", "mlp_out"), (wiring.sources, wiring.targets), memory, strict=True):
            store.read_packed(which, chosen, layers, out[: len(chosen)])
    return since(begun)


def take(batches: Batches, steps: Iterable[int]) -> None:
    """The batches of these steps, and then all that is read ahead of them."""
    with read_ahead((batches(step) for step in steps), depth=BATCHES_AHEAD) as feed:
        for _ in feed:
            pass
    for stream in batches.streams:
        for reading in stream.buffers.values():
            reading.result()


def load(batches: Batches, steps: int, cold: Sequence[Path]) -> Took:
    """One epoch's batches in the middle of a run: as many buffers are read meanwhile as are used."""
    with closing(batches):
        take(batches, range(steps))
        drop(cold)
        begun = now()
        take(batches, range(steps, 2 * steps))
        return since(begun)


def compare(store: ActivationStore, layer: str, n_targets: int, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows of the table for one store and one choice of layers: cold and warm."""
    wiring = wire(layer, store.n_layers, 1, n_targets)
    rules = token_rules(store, wiring.sources, wiring.targets, TokensConfig())
    size = TrainConfig(layer).batch_size

    def loader() -> Batches:
        return Batches(store, wiring.sources, wiring.targets, rules, size, options.data, 0)

    with closing(loader()) as batches:
        if any(stream.order.per_epoch == 1 for stream in batches.streams):
            sys.exit("all rows fit into a buffer, and are read once: name a smaller --buffer-mib")
    files = files_of(store)
    steps = len(rules.rows("train")) // size
    layers = len(wiring.sources) + len(wiring.targets)
    needed = steps * size * layers * store.d_model * DTYPES[store.dtype].itemsize
    share = needed / sum(path.stat().st_size for path in files)
    rows = []
    for cache in ("cold", "warm"):
        found: dict[str, list[Took]] = {"loader": [], "plain": [], "in order": []}
        dropped = files if cache == "cold" else ()
        for _ in range(options.rounds):
            found["loader"].append(load(loader(), steps, dropped))
            found["plain"].append(read_plainly(files, needed, dropped))
            found["in order"].append(read_in_order(store, wiring, steps * size, dropped))
        rates = [needed / 1e9 / statistics.median(one.seconds for one in each) for each in found.values()]
        cores = [statistics.median(one.busy / one.seconds for one in each) for each in found.values()]
        rows.append(
            (
                store.dtype,
                f"{spell_layers(wiring.sources)} -> {spell_layers(wiring.targets)}",
                cache,
                f"{needed / 1e9:.2f} ({share:.0%})",
                *(f"{rate:.2f}" for rate in rates),
                *(of_pairs(found[side], found["loader"]) for side in ("plain", "in order")),
                ", ".join(f"{one:.1f}" for one in cores),
            )
        )
        print(*rows[-1], flush=True)
    return rows


def of_pairs(other: Sequence[Took], loader: Sequence[Took]) -> str:
    """The loader's rate as a share of another's, each time next to it: median and range."""
    shares = [theirs.seconds / own.seconds for theirs, own in zip(other, loader, strict=True)]
    return f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


def loader_table(options: argparse.Namespace) -> Table:
    table = Table(title=f"one epoch of train rows, {options.rounds} pairs", title_justify="left")
    names = "store|layers|page cache|GB (of the store's)|loader GB/s|plain|in order"
    for name in (
        *names.split("|"),
        f"loader of plain (bar {BAR:.0%} cold)",
        "loader of in order",
        "cores busy, of each",
    ):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for dtype in ("bfloat16", "int8"):
            if options.store is not None:
                store = ActivationStore.open(options.store)
            else:
                store = synthetic_store(Path(folder) / dtype, int(options.gb * 1e9), dtype)
            for layer, n_targets in RUNS:
                for row in compare(store, layer, n_targets, options):
                    table.add_row(*row)
            if options.store is not None:
                break
    return table


def waiting(options: argparse.Namespace) -> str:
    """Train for a while, as a user does, and say which share of the time went by waiting for a batch."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = Path(folder) / "run"
        command = ["train.py", "--config", str(options.train), "--store", str(options.store), "--out", str(run)]
        command += ["--steps", str(options.steps)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        timings = [line for line in read_lines(run / TIMING) if "tokens_per_s" in line]
    seconds = sum(line["seconds"] for line in timings)
    share = sum(line["seconds"] * line["waiting"] for line in timings) / seconds
    most = max(line["waiting"] for line in timings)
    rate = sum(line["tokens_per_s"] * line["seconds"] for line in timings) / seconds
    return (
        f"{options.train.name}, {options.steps} steps: {share:.1%} of {seconds:.0f} s spent waiting for data "
        f"(at most {most:.1%} between two records), {rate:,.0f} tokens/s; bar {WAITING_BAR:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="an activation store; default: synthetic ones")
    parser.add_argument("--gb", type=float, default=2, help="size of a synthetic store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--train", type=Path, metavar="CONFIG", help="train on --store instead, and say how long it waits"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--buffer-mib", type=int, default=DataConfig().buffer_mib)
    parser.add_argument("--page-rows", type=int, help="default: as train.py chooses")
    parser.add_argument("--folder", type=Path, help="where stores and runs go; default: the system's temporary folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that what is printed is added to")
    options = parser.parse_args()
    if options.train and not options.store:
        parser.error("--train needs --store")
    keep_freed_memory()  # as train.py does
    options.data = DataConfig(options.page_rows, options.buffer_mib)

    pages = f"pages of {options.page_rows} rows" if options.page_rows else "pages as train.py chooses"
    said = (
        f"{machine('tensorstore', 'numpy', 'jax')}, load {os.getloadavg()[0]:.1f} before; "
        f"buffer {options.data.buffer_mib} MiB, {pages}"
    )
    found = [waiting(options)] if options.train else [loader_table(options)]
    publish(options.results, [said, *found], width=160, append=True)


if __name__ == "__main__":
    main()
