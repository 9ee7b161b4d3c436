"""How well each kind of CLT reconstructs the MLPs of the demo VLM: one table and one plot, on held-out images.

    python capture/run.py --model examples/shapes/model --max-samples 19000 --out runs/quality/store     # 2.6 GB
    python -m benchmarks.quality --store runs/quality/store --out runs/quality
    python -m benchmarks.quality ... --parts baselines rules      # some of it; what is there is in the table

The baselines (one target a source, offset 1, sources alone) have the rule that is best, which is BEST.

Every trial is a `train.py` command on top of configs/demo_joint.py, printed as it starts; one that is finished is not
run again, one that was broken off goes on, and one that the recipe or this script would now make otherwise has to be
deleted first. Each kind of CLT has the best learning rate of its own sweep: whole runs (short ones favour rates that
are too high), compared by their last FVU on val rows times sqrt(L0), which along a rule's frontier is about constant.
(Not by that of training batches: topk_joint is trained by rank and used with thresholds, and what is best at the one is
not at the other.) A rate at which more than MOST_DEAD of the features die is not chosen.
Figures in the table are of test rows.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from benchmarks.report import machine, publish
from cltjax.command import run as parse
from cltjax.config import TrainConfig, as_json, differing, read_config_file
from cltjax.wiring import spell_layers, wire

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results"
RECIPE = "configs/demo_joint.py"
LAYERS = 6

MOST_DEAD = 0.1
SEEDS = (0, 1, 2)
KS = (2, 4, 8, 16)
# The rules that a penalty steers: the weight of it by learning rate that gives about 16 active features, and how many
# times as much gives as many as KS.
PENALTIES = {
    "jumprelu": {2e-3: 3.6e-4, 4e-3: 3e-4, 8e-3: 2e-5},
    "relu": {2e-3: 1.4e-2, 4e-3: 4.5e-3, 8e-3: 2.2e-3},
}
STRONGER = {"jumprelu": (40, 18, 5, 1), "relu": (11, 5, 2.4, 1)}
# Most active features of a training token and source, as a multiple of k, for the rules under which the number varies.
# Not a bound on what is measured: figures are under the thresholds alone, so a rule for which the bound is tight is
# trained as another one than is measured (jumprelu with 2 k was .017 in training and .026 on test rows). topk_joint is
# bounded by nothing below K, its k of all sources. relu is not held back: 11.6 features in training, 11.5 on test rows.
SLOTS = {"batchtopk": 2, "topk_joint": LAYERS, "jumprelu": 8, "relu": 2}
FEWEST_SLOTS = 32
RULES = ("topk", "batchtopk", "topk_joint", "jumprelu", "relu")
BEST = "batchtopk"  # of the rules, as found with this script
STEPS = 1800  # alike for all, though some take less time over them: three minutes at most
LONG_STEPS = 7000  # of the best rule: within 15 minutes
PARTS = ("sweeps", "long", "baselines", "frontier", "rules")


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
        if self.rule in SLOTS:
            options += ["--model.slots", str(max(FEWEST_SLOTS, SLOTS[self.rule] * k))]
        if self.rule in PENALTIES:
            weight = PENALTIES[self.rule][lr] * STRONGER[self.rule][KS.index(k)]
            options += ["--sparsity.penalty", f"{weight:g}"]
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

    def command(self, store: Path, out: Path) -> list[str]:
        head = [sys.executable, "train.py", "--config", RECIPE]
        if "--steps" not in self.options:
            head += ["--steps", str(STEPS)]
        return [*head, "--store", str(store.resolve()), "--out", str((out / self.name).resolve()), *self.options]


@cache
def configuration(trial: Trial) -> dict[str, Any]:
    """What train.py makes of a trial's command today, as it is in a run's config.json."""
    found: list[TrainConfig] = []
    options = [str(REPOSITORY / RECIPE) if one == RECIPE else one for one in trial.command(Path(), Path())[2:]]
    parse(TrainConfig, found.append, options, read_config_file)
    (config,) = found
    sources = wire(config.layer, LAYERS, config.offset, config.n_targets).sources
    return as_json(replace(config, layer=spell_layers(sources), warmup=config.warmup_steps))


RATES = (2e-3, 4e-3, 8e-3)
# Beside a penalty the revival has another weight, found by trial. (Its units are h |W_dec| for all rules but topk.)
REVIVE = {"jumprelu": ("--sparsity.revive", "1.5e-3"), "relu": ("--sparsity.revive", "3e-4")}
JOINT = {rule: Kind(rule, RATES, rule, REVIVE.get(rule, ())) for rule in RULES}
PER_LAYER = Kind("per_layer", (4e-3, 8e-3, 1.6e-2), BEST, ("--n-targets", "1"))
OFFSET_1 = Kind("offset_1", RATES, BEST, ("--offset", "1"))
SWEPT = (JOINT[BEST], PER_LAYER, OFFSET_1, *(kind for kind in JOINT.values() if kind.rule != BEST))


def alone(offset: int, source: int, lr: float, seed: int) -> Trial:
    """A source that is trained as if there were no others."""
    options = "--layer", str(source), "--offset", str(offset)
    return replace(JOINT[BEST], name=f"alone_{offset}_{source}", options=options).trial(16, lr, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="*", metavar="CLT", help="only these kinds of CLT, as the table names them")
    parser.add_argument("--jobs", type=int, default=1, help="trials at the same time")
    parser.add_argument("--report", action="store_true", help="only the table of what is there")
    options = parser.parse_args()
    bench = Bench(options.store, options.out, options.jobs, options.report)
    chosen = options.only or ["alone", *(kind.name for kind in SWEPT)]
    if "sweeps" in options.parts:
        bench.run(trial for kind in SWEPT if kind.name in chosen for trial in kind.sweep().values())
    rates = {kind.name: bench.best_rate(kind) for kind in SWEPT}
    rows = table_rows(rates)
    for part in options.parts:
        wanted = [row.runs for row in rows if row.part == part and row.name.split(",")[0] in chosen]
        by_seed = zip_longest(*wanted, fillvalue=())  # all rows have one first
        bench.run(trial for runs in by_seed for run in runs for trial in run)
    bench.report(rows)


@dataclass(frozen=True)
class Row:
    """A row of the table: the trials of several seeds, or for a sum the sources' trials of each seed."""

    part: str
    name: str
    k: int
    lr: float
    runs: tuple[tuple[Trial, ...], ...]


def table_rows(rates: dict[str, float]) -> list[Row]:
    """All rows, given each kind's learning rate."""

    def row(part: str, kind: Kind, k: int, seeds: Sequence[int] = SEEDS, steps: int | None = None) -> Row:
        lr = rates[kind.name]
        runs = tuple((kind.trial(k, lr, seed, steps),) for seed in seeds)
        return Row(part, kind.name, k, lr, runs)

    def sums(offset: int) -> Row:
        lr = rates[BEST if offset == 0 else "offset_1"]
        runs = (tuple(alone(offset, source, lr, seed=0) for source in range(LAYERS - offset)),)
        return Row("baselines", f"alone, offset {offset}: naive sum", 16, lr, runs)

    rows = [row("rules", kind, 16) for kind in JOINT.values()]
    rows += [row("baselines", PER_LAYER, 16), row("baselines", OFFSET_1, 16), sums(0), sums(1)]
    rows += [row("frontier", kind, k, (0,)) for kind in (JOINT[BEST], PER_LAYER, *SWEPT[3:]) for k in KS[-2::-1]]
    return rows + [row("long", JOINT[BEST], k, (0,), LONG_STEPS) for k in (4, 8, 16)]


@dataclass(frozen=True)
class Bench:
    """Runs trials, and reads what they measured."""

    store: Path
    out: Path
    jobs: int
    read_only: bool

    def run(self, trials: Iterable[Trial]) -> None:
        """Do what is not done yet."""
        left = [trial for trial in dict.fromkeys(trials) if not self.done(trial)]
        if left and not self.read_only:
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(self.one, left))

    def one(self, trial: Trial) -> None:
        command = trial.command(self.store, self.out)
        print(shlex.join(command[1:]), flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{trial.name}.options").write_text(shlex.join(trial.options))
        with (self.out / f"{trial.name}.txt").open("w") as said:
            subprocess.run(command, check=True, cwd=REPOSITORY, stdout=said, stderr=subprocess.STDOUT)

    def done(self, trial: Trial) -> bool:
        """Whether a trial has been measured. One of other options, or of another recipe, is in the way."""
        run, options = self.out / trial.name, self.out / f"{trial.name}.options"
        if options.exists() and options.read_text() != shlex.join(trial.options):
            sys.exit(f"{run} was made with other options: {options.read_text()}: delete it")
        made = run / "config.json"
        if made.exists() and (change := differing(json.loads(made.read_text())["config"], configuration(trial))):
            sys.exit(f"{run} was made with another recipe ({change}): delete it")
        return options.exists() and (run / "metrics.json").exists()

    def best_rate(self, kind: Kind) -> float:
        """The learning rate of the sweep's best run; the middle one where there was none."""
        found = {lr: self.cost(trial) for lr, trial in kind.sweep().items() if self.done(trial)}
        return min(found, key=found.__getitem__) if found else kind.rates[len(kind.rates) // 2]

    def cost(self, trial: Trial) -> float:
        """What a sweep makes small."""
        last = self.last_record(trial)
        return last["val_fvu"] * last["l0"] ** 0.5 if last["dead"] < MOST_DEAD else float("inf")

    def last_record(self, trial: Trial) -> dict[str, Any]:
        """Of the last training batches, and what was measured on val rows after them."""
        lines = (self.out / trial.name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return next(one for one in reversed(records) if "loss" in one) | next(
            one for one in reversed(records) if "val_fvu" in one
        )

    def figures(self, run: tuple[Trial, ...]) -> dict[str, Any]:
        """What was measured on test rows; of several trials, on the sum of their predictions."""
        folders = [self.out / trial.name for trial in run]
        if len(folders) == 1:
            found = json.loads((folders[0] / "metrics.json").read_text())
            timing = (folders[0] / "timing.jsonl").read_text().splitlines()
            return found | {"seconds": sum(json.loads(line)["seconds"] for line in timing)}
        summed = self.out / f"{run[0].name}-sum.json"
        if not summed.exists():
            summed.write_text(json.dumps(naive_sum(folders, self.store)))
        return json.loads(summed.read_text())

    def report(self, rows: Sequence[Row]) -> None:
        """The table and the plot of what is there, on the screen and in benchmarks/results."""
        RESULTS.mkdir(exist_ok=True)
        there = [(row, [self.figures(run) for run in row.runs if all(map(self.done, run))]) for row in rows]
        there = [(row, found) for row, found in there if found]
        (RESULTS / "quality.json").write_text(json.dumps([row_as_json(row, found) for row, found in there], indent=1))
        publish(RESULTS / "quality.txt", [described(), main_table(there), sweep_table(self)])
        plot_frontier(there, RESULTS / "quality_frontier.png")


def described() -> str:
    """What the figures were made on, and with."""
    commit = ["git", "describe", "--always", "--dirty"]
    version = subprocess.run(commit, check=True, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    return f"{machine('jax', 'flax', 'optax')}; report at {version}"


def naive_sum(runs: Sequence[Path], store_path: Path) -> dict[str, Any]:
    """The test figures of several runs' predictions added up as they are."""
    from cltjax.batches import split_batches
    from cltjax.metrics import measure, summary
    from cltjax.runs import freeze, input_layers, load
    from cltjax.store import ActivationStore
    from cltjax.tokens import token_rules

    first, *others = [load(run) for run in runs]
    wiring, store = first.clt.wiring, ActivationStore.open(store_path)
    frozen, arrays = freeze(wiring, others)
    inputs = input_layers(wiring, others)
    rules = token_rules(store, inputs, wiring.targets, first.config.tokens)
    batches = split_batches(store, inputs, wiring.targets, rules.group, "test")
    measured = measure(first.clt, batches, rules.used_groups, frozen, arrays)
    found = summary(measured, wiring.sources, wiring.targets, rules.used_groups)
    each = [json.loads((run / "metrics.json").read_text()) for run in runs]
    return found | {name: statistics.fmean(one[name] for one in each) for name in ("l0", "dead")}


def row_as_json(row: Row, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kept = ("fvu", "l0", "dead", "targets", "seconds")
    runs = [{name: one[name] for name in kept if name in one} for one in found]
    return {"part": row.part, "name": row.name, "k": row.k, "lr": row.lr, "runs": runs}


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean, and half the range of several seeds."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):{form}}" + (f" ±{half:{form}}" if len(values) > 1 else "")


def main_table(there: Sequence[tuple[Row, list[dict[str, Any]]]]) -> Table:
    table = Table(title="FVU on test rows, mean over targets (± half the range of seeds)", title_justify="left")
    for name in ("CLT", "k", "lr", "seeds", "FVU", "text", "image", "worst target", "L0", "dead", "slopes", "s"):
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
        table.add_row(
            row.name + (" (long)" if row.part == "long" else ""),
            str(row.k),
            f"{row.lr:g}",
            str(len(found)),
            *(spread(values) for values in by.values()),
            spread(worst),
            f"{statistics.fmean(one['l0'] for one in found):.1f}",
            f"{statistics.fmean(one['dead'] for one in found):.1%}",
            f"{min(slopes):.3f}-{max(slopes):.3f}",
            f"{statistics.fmean(seconds):.0f}" if seconds else "",
        )
    return table


def sweep_table(bench: Bench) -> Table:
    rates = sorted({lr for kind in SWEPT for lr in kind.rates})
    title = "Sweeps: FVU on val rows (L0, dead of the last training batches), by learning rate; k = 16, seed 0"
    table = Table("CLT", *(f"{lr:g}" for lr in rates), title=title, title_justify="left")
    for kind in SWEPT:
        cells = dict.fromkeys(rates, "")
        for lr, trial in kind.sweep().items():
            if bench.done(trial):
                last = bench.last_record(trial)
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
    axes.set(
        xlabel="active features a token and source (L0)", ylabel="FVU, mean over targets", xscale="log", yscale="log"
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
