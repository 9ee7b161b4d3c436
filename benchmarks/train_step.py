"""How fast a training step is: against a dense PyTorch step, part by part, as sizes grow, and in how much memory.

    python -m benchmarks.train_step                      # on a CPU, about ten minutes
    python -m benchmarks.train_step --gpu                # on a GPU, in bfloat16
    python -m benchmarks.train_step --shapes 512,8192,8,32,4096 --growth 512,4096,8,16,1024

A shape is D,F,T,k,B: width, features, targets of the one source, active features, tokens a step. D,F,T,k,B,S has S
sources in as many layers, which write to their own and later layers, T at most: the dense step has no such thing, and
our time is only held against what `cltjax estimate` predicts (--predict), as those of the other shapes are.

Each side is a process of its own. On a CPU both are there at once and take turns, and the ratio is the median of pairs;
a GPU has no room for both, so one comes after the other. What is printed goes to benchmarks/results as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.report import machine, publish
from cltjax.config import ModelConfig, TrainConfig
from cltjax.estimate import Cost, ModelShape, Rates, estimate

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Shape:
    """Width, features, most targets of a source, active features, tokens of a step, sources."""

    D: int
    F: int
    T: int
    k: int
    B: int
    S: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shape":
        return cls(*map(int, text.split(",")))

    def __str__(self) -> str:
        return ",".join(map(str, list(asdict(self).values())[: 5 if self.S == 1 else 6]))

    @property
    def arguments(self) -> list[str]:
        """For a worker."""
        return [str(number) for number in asdict(self).values()]

    def cost(self, dtype: str, rates: Rates) -> Cost:
        """What `cltjax estimate` says of it."""
        layer = f"0-{self.S - 1}" if self.S > 1 else "0"
        options: dict[str, Any] = {
            "layer": layer,
            "offset": 0,
            "n_targets": self.T,
            "batch_size": self.B,
            "dtype": dtype,
        }
        config = TrainConfig(**options, model=ModelConfig(features=self.F, k=self.k, activation="topk"))
        return estimate(config, ModelShape(max(self.S, self.T), self.D, dtype), rates)


BARS = (Shape(512, 8192, 8, 32, 4096), Shape(512, 32768, 8, 32, 2048))
ON_GPU = (Shape(4096, 32768, 16, 64, 8192),)
GROWTH = Shape(512, 8192, 8, 32, 2048)
JOINT = (Shape(128, 1024, 6, 16, 512, 6), Shape(384, 4096, 5, 16, 1024, 5))  # the first is as large as the demo's
# What is made larger, how many times, and how many times as long a step may then take.
GROWING = {"k": (2, 1.5), "F": (4, 3.0), "T": (2, 1.8), "B": (2, 2.0)}


class Worker:
    """A benchmarks.step_worker process; a method's name and its arguments give its answer."""

    def __init__(self, kind: str, shape: Shape, dtype: str) -> None:
        command = [sys.executable, "-m", "benchmarks.step_worker", kind, *shape.arguments, dtype]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended with status {self.process.wait()}: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]
        return json.loads(line)

    def ask(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Our step and the dense one."""
    found: dict[str, Any] = {"shape": asdict(shape), "ours": [], "dense": [], "memory": {}, "start": {}}

    def ask(worker: Worker, kind: str, rounds: int) -> None:
        """So many rounds of steps; before the first, the start, and after each what there is to say."""
        if kind not in found["start"]:
            found["start"][kind] = worker.ask("start")
            found.setdefault("versions", {})[kind] = worker.versions
            worker.ask("steps", options.warm_up[kind])
        for _ in range(rounds):
            found[kind].append(statistics.median(worker.ask("steps", options.steps[kind])))
        found["memory"][kind] = worker.ask("memory")

    with ExitStack() as stack:
        ours = stack.enter_context(Worker("ours", shape, options.dtype))
        if options.gpu:
            ask(ours, "ours", options.rounds)
            tell_parts(found, ours, options)
            stack.close()
            dense = stack.enter_context(Worker("dense", shape, options.dtype))
            ask(dense, "dense", options.rounds)
        else:
            dense = stack.enter_context(Worker("dense", shape, options.dtype))
            for _ in range(options.rounds):
                ask(ours, "ours", 1)
                ask(dense, "dense", 1)
            tell_parts(found, ours, options)
    found["ratios"] = [theirs / own for own, theirs in zip(found["ours"], found["dense"], strict=True)]
    if options.beside:
        command = [sys.executable, str(options.beside), *str(shape).split(",")]
        found["beside"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def tell_parts(found: dict[str, Any], ours: Worker, options: argparse.Namespace) -> None:
    """Add what the parts of our step take, and what this machine could do."""
    found |= {"parts": ours.ask("parts", options.steps["ours"]), "rates": ours.ask("rates")}


def growth(base: Shape, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """How many times as long our step takes as sizes grow: the median of pairs."""
    found = {}
    for name, (times, allowed) in GROWING.items():
        larger = Shape(**asdict(base) | {name: asdict(base)[name] * times})
        with Worker("ours", base, options.dtype) as small, Worker("ours", larger, options.dtype) as large:
            for one in (small, large):
                one.ask("steps", options.warm_up["ours"])
            pairs = []
            for _ in range(options.rounds):
                first, second = (statistics.median(one.ask("steps", options.steps["ours"])) for one in (small, large))
                pairs.append(second / first)
            first, second = (
                shape.cost(options.dtype, Rates(**one.ask("rates"))).step_seconds()
                for shape, one in ((base, small), (larger, large))
            )
        found[f"{name} x {times}"] = {"pairs": pairs, "allowed": allowed, "predicted": second / first}
    return found


def predict(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Our step alone, and what it is predicted from."""
    with Worker("ours", shape, options.dtype) as ours:
        ours.ask("steps", options.warm_up["ours"])
        steps, rates = [], []
        for _ in range(options.rounds):
            steps.append(statistics.median(ours.ask("steps", options.steps["ours"])))
            rates.append(ours.ask("rates"))
        typical = {name: statistics.median_low(one[name] for one in rates) for name in rates[0]}
        return {"shape": asdict(shape), "ours": steps, "memory": {"ours": ours.ask("memory")}, "rates": typical}


def predicted_table(found: Sequence[dict[str, Any]], dtype: str) -> Table:
    """A step's time and memory as predicted from rates that the same process measured, against what they are."""
    table = Table(title="predicted (cltjax estimate) and measured", title_justify="left")
    names = "D F T k B (S)|GB/s|at random|top-k G/s|at least ms|predicted|measured|ratio|predicted GB|compiled|ratio"
    for name in names.split("|"):
        table.add_column(name, justify="right")
    for one in found:
        shape, rates = Shape(**one["shape"]), Rates(**one["rates"])
        cost, step = shape.cost(dtype, rates), statistics.median(one["ours"])
        # One batch is on the device here, and not the next one too.
        memory = sum(cost.memory.values()) - cost.memory["batch x, y, and the next"] / 2
        compiled = one["memory"]["ours"]["peak"]
        table.add_row(
            str(shape).replace(",", " "),
            *(f"{rate / 1e9:,.1f}" for rate in (rates.bandwidth, rates.gather)),
            f"{rates.select / 1e9:.2f}",
            *(f"{1e3 * seconds:,.0f}" for seconds in (cost.step_seconds(least=True), cost.step_seconds(), step)),
            f"{cost.step_seconds() / step:.2f}",
            *(f"{number / 1e9:.2f}" for number in (memory, compiled)),
            f"{memory / compiled:.2f}",
        )
    return table


def compared_table(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="a step against the dense one", title_justify="left")
    names = "D F T k B|tokens/s|dense|times (range of pairs)|start s|dense|step GB|allowed|dense, process GB|process GB"
    for name in names.split("|"):
        table.add_column(name, justify="right")
    for one in found:
        B, ratios = one["shape"]["B"], one["ratios"]
        own, theirs = one["memory"]["ours"], one["memory"]["dense"]
        table.add_row(
            str(Shape(**one["shape"])).replace(",", " "),
            *(f"{B / statistics.median(one[kind]):,.0f}" for kind in ("ours", "dense")),
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
            *(f"{one['start'][kind]:.1f}" for kind in ("ours", "dense")),
            f"{own['peak'] / 1e9:.2f}",
            f"{own['allowed'] / 1e9:.2f}",
            f"{(theirs['peak'] or theirs['resident']) / 1e9:.2f}",
            f"{own['resident'] / 1e9:.2f}",
        )
    return table


def parts_table(one: dict[str, Any], dtype: str) -> Table:
    """A step's parts, each run by itself, and the roofline of each from rates measured in the same run."""
    rates = Rates(**one["rates"])
    shape, step = Shape(**one["shape"]), statistics.median(one["ours"])
    cost = shape.cost(dtype, rates)
    title = f"{shape}: parts; this machine does {rates.flops / 1e9:,.0f} GFLOP/s, {rates.bandwidth / 1e9:,.1f} GB/s"
    table = Table(title=title, title_justify="left")
    for name in ("part", "ms", "predicted ms", "at least", "share of the roofline"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in cost.parts:
        if (seconds := one["parts"].get(part.name)) is not None:
            likely, low = part.seconds(rates), part.seconds(rates, least=True)
            table.add_row(
                part.name, *(f"{1e3 * number:,.1f}" for number in (seconds, likely, low)), f"{low / seconds:.0%}"
            )
    likely, low = cost.step_seconds(), cost.step_seconds(least=True)
    table.add_row("the step", *(f"{1e3 * number:,.1f}" for number in (step, likely, low)), f"{low / step:.0%}")
    return table


def growth_table(base: Shape, found: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"growth from {base}", title_justify="left")
    for name in ("", "times as long (range of pairs)", "allowed", "predicted"):
        table.add_column(name, justify="right")
    for name, one in found.items():
        pairs = one["pairs"]
        table.add_row(
            name,
            f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})",
            f"{one['allowed']:.1f}",
            f"{one['predicted']:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="one side after the other, bfloat16, other shapes")
    parser.add_argument("--shapes", type=Shape.parse, nargs="*")
    parser.add_argument("--growth", type=Shape.parse, help="the shape to grow from; none on a GPU unless given")
    parser.add_argument("--predict", type=Shape.parse, nargs="*", help="shapes to predict without a dense step beside")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, help="a script that prints a dense step's tokens/s, given D F T k B")
    parser.add_argument("--name", help="of the result files; default: train_step_cpu or train_step_gpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    options.shapes = (ON_GPU if options.gpu else BARS) if options.shapes is None else options.shapes
    options.predict = (() if options.gpu else JOINT) if options.predict is None else options.predict
    options.growth = options.growth or (None if options.gpu else GROWTH)
    options.dtype = options.dtype or ("bfloat16" if options.gpu else "float32")
    # The allocator's pool of memory has its size after a few steps.
    options.warm_up = {"ours": 8, "dense": 1}
    options.steps = {"ours": 10, "dense": 10} if options.gpu else {"ours": 3, "dense": 1}

    found = [compare(shape, options) for shape in options.shapes]
    predicted = [predict(shape, options) for shape in options.predict]
    grown = growth(options.growth, options) if options.growth else {}
    versions = ", ".join(found[0]["versions"].values()) if found else "jax " + metadata.version("jax")
    said = [f"{machine()}, {versions}; {options.dtype}"]
    for one in found:
        if "beside" in one:
            rate = one["shape"]["B"] / statistics.median(one["ours"])
            shape = Shape(**one["shape"])
            said.append(
                f"{shape}: {options.beside.name} {one['beside']:.0f} tokens/s, {rate / one['beside']:.1f} times"
            )
    tables = [compared_table(found), *(parts_table(one, options.dtype) for one in found)] if found else []
    if found or predicted:
        tables.append(predicted_table([*found, *predicted], options.dtype))
    if options.growth:
        tables.append(growth_table(options.growth, grown))
    name = options.name or ("train_step_gpu" if options.gpu else "train_step_cpu")
    options.results.mkdir(parents=True, exist_ok=True)
    results = {"said": said, "compared": found, "predicted": predicted, "growth": grown}
    (options.results / f"{name}.json").write_text(json.dumps(results, indent=1))
    publish(options.results / f"{name}.txt", [*said, *tables], width=160)


if __name__ == "__main__":
    main()
