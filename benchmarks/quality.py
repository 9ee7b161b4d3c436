"""How well each kind of CLT reconstructs the MLPs of the demo VLM: one table and one plot, on held-out images.

    python capture/run.py --model examples/shapes/model --max-samples 19000 --out runs/quality/store     # 2.6 GB
    python -m benchmarks.quality --store runs/quality/store --out runs/quality --jobs 2
    python -m benchmarks.quality --report                          only the table of what is there, without any run
    python -m benchmarks.quality ... --parts baselines rules       some of it

Every trial is a `train.py` command on top of configs/demo_joint.py, printed as it starts; what rules differ in is said
in the command. What it measured is kept as a file of benchmarks/results/quality/, with the machine and the commit, so
that this can be done in several sittings: a trial that has a file is not run again, one that was broken off goes on,
and one that the recipe or this script would now make otherwise has to be deleted first. Jobs have an equal share of the
cores each.

Each kind of CLT has the best learning rate of its own sweep: whole runs (short ones favour rates that are too high),
compared by their last FVU on val rows times sqrt(L0), which along a rule's frontier is about constant. (Not by that of
training batches: topk_joint is trained by rank and used with thresholds, and what is best at the one is not at the
other.) A rate at which more than MOST_DEAD of the features die is not chosen. The baselines (one target a source,
offset 1, sources alone) have batchtopk, and are to be held against the joint CLT of that rule. Figures in the table are
of test rows.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from queue import Queue
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from benchmarks.report import machine, publish
from cltjax.checkpoint import CONFIG, METRICS, SUMMARY, TIMING, identity, read_config, read_lines
from cltjax.command import run as parse
from cltjax.config import NOT_THE_RUN, TrainConfig, as_json, differing, read_config_file
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.plots import log_scale
from cltjax.store import ActivationStore
from cltjax.store_format import differences
from cltjax.wiring import spell_layers, wire

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results"
TRIALS = RESULTS / "quality"
MEASURED = ("rows", "fvu", "l0", "dead", "targets")  # on test rows
RECIPE = "configs/demo_joint.py"
LAYERS = 6

MOST_DEAD = 0.1
GAVE_UP = "Lower --lr"  # what train.py says of a run that will not come back
SEEDS = (0, 1, 2)
KS = (2, 4, 8, 16)
# Most active features of a training token and source, as a multiple of k, for the rules under which the number varies.
# Not a bound on what is measured: figures are under the thresholds alone, so a rule for which the bound is tight is
# trained as another one than is measured. The table has the share of tokens that reach it.
SLOTS = {"topk": 1, "batchtopk": 2, "topk_joint": 4, "jumprelu": 4, "relu": 4}
FEWEST_SLOTS = 32
RULES = ("topk", "batchtopk", "topk_joint", "jumprelu", "relu")
BASELINE = "batchtopk"  # of the rules, that of the CLTs that a joint one of it is held against
# Beside a penalty another weight of the revival was best. (Its units are h |W_dec| for all rules but topk.)
REVIVE = {"jumprelu": "1e-4", "relu": "1e-4"}
STEPS = 1800  # alike for all, though some take less time over them: three minutes of two idle cores at most
LONG, LONG_STEPS = "batchtopk", 7000  # within 15 minutes; jumprelu does not bear so many (docs/training.md)
PARTS = ("sweeps", "rules", "baselines", "frontier", "long")


@dataclass(frozen=True)
class Kind:
    """A kind of CLT: which sources write where, and which features are active."""

    name: str
    rates: tuple[float, ...]
    """The learning rates of the sweep."""
    rule: str = "topk"
    options: tuple[str, ...] = ()

    def trial(self, k: int, lr: float, seed: int = 0, steps: int | None = None) -> "Trial":
        options = ["--model.activation", self.rule, "--model.k", str(k), "--lr", f"{lr:g}", "--seed", str(seed)]
        options += ["--model.slots", str(max(FEWEST_SLOTS, SLOTS[self.rule] * k))]
        options += ["--sparsity.revive", REVIVE.get(self.rule, "6e-5")]
        if steps is not None:
            options += ["--steps", str(steps)]
        length = "" if steps is None else "-long"
        return Trial(f"{self.name}-k{k}-lr{lr:g}-seed{seed}{length}", (*options, *self.options))

    def sweep(self) -> dict[float, "Trial"]:
        """Its runs at all of its learning rates."""
        return {lr: self.trial(16, lr) for lr in self.rates}


@dataclass(frozen=True)
class Trial:
    """One training run."""

    name: str
    options: tuple[str, ...]

    @property
    def trials(self) -> "tuple[Trial, ...]":
        return (self,)

    def command(self, store: Path, out: Path) -> list[str]:
        head = [sys.executable, "train.py", "--config", RECIPE]
        if "--steps" not in self.options:
            head += ["--steps", str(STEPS)]
        return [*head, "--store", str(store.resolve()), "--out", str((out / self.name).resolve()), *self.options]


@dataclass(frozen=True)
class Sum:
    """The predictions of several runs, added up as they are."""

    name: str
    trials: tuple[Trial, ...]


@cache
def resolved(trial: Trial) -> TrainConfig:
    """What train.py makes of a trial's command today."""
    found: list[TrainConfig] = []
    options = [str(REPOSITORY / RECIPE) if one == RECIPE else one for one in trial.command(Path(), Path())[2:]]
    parse(TrainConfig, found.append, options, read_config_file)
    (config,) = found
    sources = wire(config.layer, LAYERS, config.offset, config.n_targets).sources
    return replace(config, layer=spell_layers(sources), warmup=config.warmup_steps)


def configuration(trial: Trial) -> dict[str, Any]:
    """The same as it is in a run's config.json, without paths and the like."""
    whole = as_json(resolved(trial))
    return {name: value for name, value in whole.items() if name not in NOT_THE_RUN}


RATES = (2e-3, 4e-3, 8e-3)
HIGHER = (1.6e-2,)  # for rules whose best rate was the highest of these
JOINT = {rule: Kind(rule, RATES + HIGHER * (rule in ("topk", "topk_joint", "relu")), rule) for rule in RULES}
PER_LAYER = Kind("per_layer", (4e-3, 8e-3, 1.6e-2), BASELINE, ("--n-targets", "1"))
OFFSET_1 = Kind("offset_1", RATES, BASELINE, ("--offset", "1"))
SWEPT = (JOINT[BASELINE], PER_LAYER, OFFSET_1, *(kind for kind in JOINT.values() if kind.rule != BASELINE))


def alone(offset: int, source: int, lr: float, seed: int) -> Trial:
    """A source that is trained as if there were no others."""
    options = "--layer", str(source), "--offset", str(offset)
    return replace(JOINT[BASELINE], name=f"alone_{offset}_{source}", options=options).trial(16, lr, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="needed but for --report")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    kinds = ["alone", *(kind.name for kind in SWEPT)]
    parser.add_argument("--only", nargs="*", choices=kinds, default=kinds, help="only these kinds of CLT")
    parser.add_argument("--jobs", type=int, default=1, help="trials at the same time")
    parser.add_argument("--report", action="store_true", help="only the table of what is there")
    options = parser.parse_args()
    if not options.report:
        if options.store is None:
            parser.error("--store is needed to run trials")
        try:
            bench = Bench(options.store, options.out, options.jobs)
        except UserError as error:
            parser.error(str(error))
        if "sweeps" in options.parts:
            bench.run(trial for kind in SWEPT if kind.name in options.only for trial in kind.sweep().values())
        rows = table_rows()
        for part in options.parts:
            wanted = [row.runs for row in rows if row.part == part and row.name.split(",")[0] in options.only]
            by_seed = zip_longest(*wanted)  # all rows have one first
            bench.run(run for runs in by_seed for run in runs if run is not None)
    report(table_rows())


@dataclass(frozen=True)
class Row:
    """A row of the table: a run of each seed."""

    part: str
    name: str
    k: int
    lr: float
    runs: tuple[Trial | Sum, ...]


def table_rows() -> list[Row]:
    """All rows, at the learning rates that are best as far as is known."""
    rates = {kind.name: best_rate(kind) for kind in SWEPT}

    def row(part: str, kind: Kind, k: int, seeds: Sequence[int] = SEEDS, steps: int | None = None) -> Row:
        lr = rates[kind.name]
        return Row(part, kind.name, k, lr, tuple(kind.trial(k, lr, seed, steps) for seed in seeds))

    def sums(offset: int) -> Row:
        lr = rates[BASELINE if offset == 0 else "offset_1"]
        parts = tuple(alone(offset, source, lr, seed=0) for source in range(LAYERS - offset))
        return Row(
            "baselines", f"alone, offset {offset}: naive sum", 16, lr, (Sum(f"alone_{offset}-lr{lr:g}-sum", parts),)
        )

    rows = [row("rules", kind, 16) for kind in JOINT.values()]
    rows += [row("baselines", PER_LAYER, 16), row("baselines", OFFSET_1, 16), sums(0), sums(1)]
    rows += [row("frontier", kind, k, (0,)) for k in KS[-2::-1] for kind in (*JOINT.values(), PER_LAYER)]
    return rows + [row("long", JOINT[LONG], k, (0,), LONG_STEPS) for k in (4, 8, 16)]


def result(run: Trial | Sum) -> dict[str, Any] | None:
    """What was measured of a run; None if it was not yet. One of another recipe is in the way."""
    path = TRIALS / f"{run.name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    configs = [found["config"]] if isinstance(run, Trial) else found["configs"]
    for config, trial in zip(configs, run.trials, strict=True):
        if change := differing(config, configuration(trial)):
            sys.exit(f"{path} was made with another recipe ({change}): delete it")
    return found


def best_rate(kind: Kind) -> float:
    """The learning rate of the sweep's best run; the middle one where there was none."""
    results = {lr: result(trial) for lr, trial in kind.sweep().items()}
    found = {lr: cost(one) for lr, one in results.items() if one is not None}
    return min(found, key=found.__getitem__) if found else kind.rates[len(kind.rates) // 2]


def cost(result: dict[str, Any]) -> float:
    """What a sweep makes small."""
    if "stopped" in result:
        return math.inf
    last = result["last"]
    return last["val_fvu"] * last["l0"] ** 0.5 if last["dead"] < MOST_DEAD else math.inf


class Bench:
    """Runs trials, and keeps what they measured."""

    def __init__(self, store: Path, out: Path, jobs: int) -> None:
        self.store, self.out, self.jobs = store, out, jobs
        spec = identity(ActivationStore.open(store))
        self.data = {name: spec[name] for name in ("model", "dataset", "rows")}

    def run(self, runs: Iterable[Trial | Sum]) -> None:
        """Do what is not done yet."""
        left = [run for run in dict.fromkeys(runs) if not self.done(run)]
        trials = dict.fromkeys(trial for run in left for trial in run.trials if not self.trained(trial))
        for trial in trials:
            resolved(trial)  # which tyro does on one thread alone
        cores, shares = sorted(os.sched_getaffinity(0)), Queue()
        for job in range(self.jobs):
            shares.put(cores[job :: self.jobs] or cores)
        # Each thread, and what it starts, is bound to its share.
        with ThreadPoolExecutor(self.jobs, initializer=lambda: os.sched_setaffinity(0, shares.get())) as pool:
            list(pool.map(self.train, trials))
        for run in left:
            if isinstance(run, Sum):
                found = naive_sum([self.out / trial.name for trial in run.trials], self.store)
                found["configs"] = [configuration(trial) for trial in run.trials]
                self.keep(run.name, made(), found)

    def done(self, run: Trial | Sum) -> bool:
        """Whether there is a result, which has to be of this store."""
        found = result(run)
        for name, was, now in differences({} if found is None else found["data"], {} if found is None else self.data):
            sys.exit(f"{TRIALS / run.name}.json was made on another store ({name}: {was} -> {now}): delete it")
        return found is not None

    def trained(self, trial: Trial) -> bool:
        """Whether its run is whole; if so, what it measured is kept. One of another recipe is in the way."""
        run = self.out / trial.name
        if not (run / CONFIG).exists():
            return False
        if change := differing(read_config(run)["config"], configuration(trial)):
            sys.exit(f"{run} was made with another recipe ({change}): delete it")
        if whole := (run / SUMMARY).exists():
            self.collect(trial)
        return whole

    def train(self, trial: Trial) -> None:
        command, said = trial.command(self.store, self.out), self.said(trial)
        print(shlex.join(command[1:]), flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with said.open("w") as file:
            print(made(), file=file, flush=True)
            done = subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
        first, *_, last = said.read_text().splitlines()
        if done.returncode == 2 and GAVE_UP in last:
            self.keep(trial.name, first, {"config": configuration(trial), "stopped": last})
        elif done.returncode:
            sys.exit(f"{trial.name} failed, see {said}: {last}")
        else:
            self.collect(trial)

    def said(self, trial: Trial) -> Path:
        """What a trial printed, after a line of what it was made with."""
        return self.out / f"{trial.name}.txt"

    def collect(self, trial: Trial) -> None:
        """Keep what a finished run measured: on test rows, and of its last training batches and val rows."""
        run, first = self.out / trial.name, self.said(trial).read_text().splitlines()[0]
        summary = json.loads((run / SUMMARY).read_text())
        records, timing = read_lines(run / METRICS), read_lines(run / TIMING)
        last = next(one for one in reversed(records) if "loss" in one)
        last |= next(one for one in reversed(records) if "val_fvu" in one)
        found = {
            "config": configuration(trial),
            "seconds": sum(line["seconds"] for line in timing),
            "last": {name: last[name] for name in ("val_fvu", "fvu", "l0", "dead", "full")},
            **{name: summary[name] for name in MEASURED},
        }
        self.keep(trial.name, first, found)

    def keep(self, name: str, first: str, found: dict[str, Any]) -> None:
        TRIALS.mkdir(parents=True, exist_ok=True)
        write_json(TRIALS / f"{name}.json", {"made": first, "data": self.data} | found)


def made() -> str:
    """What a run is made with."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    return f"{machine('jax', 'flax', 'optax')}; {commit}"


def report(rows: Sequence[Row]) -> None:
    """The table and the plot of what is there, on the screen and in benchmarks/results."""
    there = [(row, [found for run in row.runs if (found := result(run)) and "fvu" in found]) for row in rows]
    there = [(row, found) for row, found in there if found]
    made = Counter(one["made"] for _, found in there for one in found)
    lines = [f"{count} runs: {which}" for which, count in made.items()]
    publish(RESULTS / "quality.txt", [*lines, main_table(there), sweep_table()])
    plot_frontier(there, RESULTS / "quality_frontier.png")


def naive_sum(runs: Sequence[Path], store_path: Path) -> dict[str, Any]:
    """The test figures of several runs' predictions added up as they are."""
    from cltjax.batches import split_batches
    from cltjax.metrics import measure, summary
    from cltjax.runs import freeze, input_layers, load
    from cltjax.tokens import token_rules

    first, *others = [load(run) for run in runs]
    wiring, store = first.clt.wiring, ActivationStore.open(store_path)
    frozen, arrays = freeze(wiring, others)
    inputs = input_layers(wiring, others)
    rules = token_rules(store, inputs, wiring.targets, first.config.tokens)
    batches = split_batches(store, inputs, wiring.targets, rules.group, "test")
    measured = measure(first.clt, batches, rules.used_groups, frozen, arrays)
    found = summary(measured, wiring.sources, wiring.targets, rules.used_groups)
    each = [json.loads((run / SUMMARY).read_text()) for run in runs]
    found |= {name: statistics.fmean(one[name] for one in each) for name in ("l0", "dead")}
    return {name: found[name] for name in MEASURED}


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean, and half the range of several seeds."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):{form}}" + (f" ±{half:{form}}" if len(values) > 1 else "")


def main_table(there: Sequence[tuple[Row, list[dict[str, Any]]]]) -> Table:
    table = Table(title="FVU on test rows, mean over targets (± half the range of seeds)", title_justify="left")
    names = "CLT", "k", "lr", "seeds", "FVU", "text", "image", "worst target", "L0", "dead", "full", "slopes", "s"
    for name in names:
        table.add_column(name, justify="left" if name == "CLT" else "right")
    part = None
    for row, found in there:
        if row.part != part:
            table.add_section()
            part = row.part
        by = {group: [one["fvu"][group] for one in found] for group in ("all", "text", "image")}
        worst = [max(target["all"]["fvu"] for target in one["targets"].values()) for one in found]
        slopes = [target["all"]["slope"] for one in found for target in one["targets"].values()]
        seconds = [one["seconds"] for one in found if "seconds" in one]
        full = [one["last"]["full"] for one in found if "last" in one and row.name != "topk"]
        table.add_row(
            row.name + (" (long)" if row.part == "long" else ""),
            str(row.k),
            f"{row.lr:g}",
            str(len(found)),
            *(spread(values) for values in by.values()),
            spread(worst),
            f"{statistics.fmean(one['l0'] for one in found):.1f}",
            f"{statistics.fmean(one['dead'] for one in found):.1%}",
            f"{max(full):.0%}" if full else "",
            f"{min(slopes):.3f}-{max(slopes):.3f}",
            f"{statistics.fmean(seconds):.0f}" if seconds else "",
        )
    return table


def sweep_table() -> Table:
    rates = sorted({lr for kind in SWEPT for lr in kind.rates})
    title = "Sweeps: FVU on val rows (L0, dead of the last training batches), by learning rate; k = 16, seed 0"
    table = Table("CLT", *(f"{lr:g}" for lr in rates), title=title, title_justify="left")
    for kind in SWEPT:
        cells = dict.fromkeys(rates, "")
        for lr, trial in kind.sweep().items():
            if (found := result(trial)) is not None:
                cells[lr] = "stopped"
                if last := found.get("last"):
                    cells[lr] = f"{last['val_fvu']:.4f} ({last['l0']:.1f}, {last['dead']:.0%})"
        table.add_row(kind.name, *cells.values())
    return table


def plot_frontier(there: Sequence[tuple[Row, list[dict[str, Any]]]], path: Path) -> None:
    """Mean FVU against L0 a source, a line for each rule."""
    figure, axes = plt.subplots(figsize=(5, 3.4), dpi=140, layout="constrained")
    for name in (*JOINT, PER_LAYER.name):
        found = [(row, one) for row, one in there if row.name == name and row.part != "long"]
        points = sorted(
            (statistics.fmean(r["l0"] for r in runs), statistics.fmean(r["fvu"]["all"] for r in runs))
            for _, runs in found
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="active features a token and source (L0)", ylabel="FVU, mean over targets", xscale="log")
    axes.set_xticks(KS, map(str, KS))
    axes.xaxis.set_minor_formatter("")
    log_scale(axes)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
