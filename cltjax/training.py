"""Training: one small pytree of state, one jitted step that takes its place, and a loop that never makes it wait.

Figures of step n-1 are fetched while step n runs; batches are read on threads. A run that is killed and started again
with the same configuration ends with the same bits as one that was not: parameters, optimiser, counters, metrics.jsonl.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from cltjax.allocator import keep_freed_memory, will_use_cpu
from cltjax.batches import ROW_ORDER, Batches, drawn_apart, read_ahead, row_batches, sample_rows, trained_mix
from cltjax.checkpoint import (
    METRICS,
    TIMING,
    Checkpoints,
    Lines,
    check_folder,
    claim,
    identity,
    last_step,
    read_config,
    whole_lines,
    without_paths,
)
from cltjax.clt import CLT
from cltjax.config import ProcessesConfig, TrainConfig, as_json, k_values
from cltjax.device_cache import DeviceCache
from cltjax.distributed import (
    agree,
    check_divides,
    check_features,
    is_main,
    make_mesh,
    own_positions,
    place_batch,
    say,
    start,
    together,
)
from cltjax.errors import UserError
from cltjax.files import Lock
from cltjax.metrics import EVERY, calibrate, mean_fvu, measure, room
from cltjax.normalisation import Normalisation, normalisation_of
from cltjax.runs import check_given, freeze, input_layers, load_given, pin_of_start, pins, start_of
from cltjax.sparsity import RANKED_BY_NORM
from cltjax.step import (
    Frozen,
    Step,
    TrainState,
    abstract_state,
    annealed_steps,
    graph_of,
    initial_state,
    make_step,
    shardings,
)
from cltjax.store import ActivationStore
from cltjax.tokens import TokenRules, token_rules
from cltjax.wiring import Wiring, spell_layers, wire

# Validation rows that thresholds are calibrated on.
CALIBRATION_ROWS = 8192
# Options in which the processes of a run may differ: where each of them finds the files, and which it is.
ONE_PROCESS: dict[str, Any] = {"store": Path(), "out": None, "config": None, "processes": ProcessesConfig()}
# A run whose train FVU is on average above so many times what it starts with will not come back.
DIVERGED = 10.0
# Nor will one that is above this so many steps after warm-up: what it has learned is worse than nothing.
WORTHLESS, SETTLED = 1.25, 200
# Nor one in which, by then, fewer than this share of the k features of a token are active, and which explains little.
COLLAPSED, LITTLE = 0.25, 0.5
# From this share of tokens on, the progress line says that they have as many active features as there are slots.
MANY_FULL = 0.01
TREND_STEPS = 50  # over about so many the average is taken
# Steps that jumprelu bears where dead features are revived, and hardly more (docs/training.md).
LONG_JUMPRELU = 2500


@jax.jit
def all_finite(parameters: nnx.State) -> jax.Array:
    """Whether no weight is infinite or not a number."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters)]))


@dataclass
class Trend:
    """Average train FVU and L0 of the last steps; of all of them at first. Part of a checkpoint's meta, so that whether
    a run is given up does not depend on where it was resumed, or on what is logged."""

    steps: int = 0
    fvu: float = 0.0
    l0: float = 0.0
    first: float = 0.0  # FVU of the first step

    def add(self, figures: dict[str, Any]) -> None:
        self.steps += 1
        share = 1 / min(self.steps, TREND_STEPS)
        fvu = [float(error) / float(power) for error, power in zip(figures["error"], figures["power"], strict=True)]
        l0 = [float(one) for one in figures["l0"]]
        self.fvu += share * (sum(fvu) / len(fvu) - self.fvu)
        self.l0 += share * (sum(l0) / len(l0) - self.l0)
        if self.steps == 1:
            self.first = self.fvu

    @property
    def start(self) -> float:
        """FVU to judge by. The mean alone has 1, and so has a new run; but S given runs that each predict the whole
        target leave about (S - 1)^2."""
        return max(1.0, self.first)

    def fault(self, config: TrainConfig) -> str | None:
        """Why the run is to be given up, if it is."""
        settled = self.steps >= config.warmup_steps + SETTLED
        if self.fvu > (WORTHLESS if settled else DIVERGED) * self.start:
            than = f"{self.first:.3g} at first; the mean alone has 1"
            return f"training has diverged (train FVU {self.fvu:.3g} on average, {than})"
        if settled and config.has_k:
            ks = k_values(config.model.k, config.model.features)
            k = sum(ks) / len(ks)
            if self.l0 < COLLAPSED * k and self.fvu > LITTLE * self.start:
                return f"training has collapsed (L0 {self.l0:.3g} of {k:g} on average, train FVU {self.fvu:.3g})"
        return None


@dataclass
class Window:
    """Sums of the figures since the last record. Part of a checkpoint's meta, so that a resumed record is the same."""

    steps: int = 0
    loss: float = 0.0
    l0: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    power: list[float] = field(default_factory=list)

    def add(self, figures: dict[str, Any]) -> None:
        self.steps += 1
        self.loss += float(figures["loss"])
        for name in ("l0", "full", "error", "power"):
            values = [float(value) for value in figures[name]]
            before = getattr(self, name) or [0.0] * len(values)
            setattr(self, name, [a + b for a, b in zip(before, values, strict=True)])

    def record(self, step: int, tokens: int, figures: dict[str, Any]) -> dict[str, Any]:
        """The record of metrics.jsonl after `step` steps; means over the window, last values of dead, grad_norm, lr
        and, where they are steered, of the penalty's weights."""
        fvu = [error / power for error, power in zip(self.error, self.power, strict=True)]
        record = {
            "step": step,
            "tokens": tokens,
            "loss": self.loss / self.steps,
            "fvu": sum(fvu) / len(fvu),
            "fvu_by_target": fvu,
            "l0": sum(self.l0) / len(self.l0) / self.steps,
            "l0_by_source": [l0 / self.steps for l0 in self.l0],
            "full": max(self.full) / self.steps,
            **{name: float(figures[name]) for name in ("dead", "rare", "grad_norm", "lr")},
        }
        if "penalty" in figures:
            record["penalty_by_source"] = [float(weight) for weight in figures["penalty"]]
        return record


def plan(config: TrainConfig, store: ActivationStore) -> Wiring:
    """The (source, target) pairs of a run. UserError where the store does not have what they need."""
    config.check()
    wiring = wire(config.layer, store.n_layers, config.offset, config.n_targets)
    for layer in sorted({*wiring.sources, *wiring.targets}):
        if layer not in store.layers:
            role = "source" if layer in wiring.sources else "target"
            raise UserError(
                f"{role} layer {layer} was not captured in {store.path} (layers {spell_layers(store.layers)}): "
                "capture it, or choose other --layer, --offset, --n-targets"
            )
    for option, values, wanted, what in (
        ("--model.k", k_values(config.model.k, config.model.features), len(wiring.sources), "sources"),
        ("--target-weights", config.target_weights, len(wiring.targets), "targets"),
    ):
        if len(values) not in (wanted, 1 if option == "--model.k" else 0):
            raise UserError(f"{option} has {len(values)} numbers for {wanted} {what}")
    if len(store.rows_of("test")) == 0:
        raise UserError(f"{store.path} has no test rows to measure on: capture more samples")
    return wiring


def train(config: TrainConfig, stop_after: int | None = None) -> Path:
    """Train, or resume, the run that `config` describes; returns the run directory.

    With `--processes` every process of the run calls this. What they do alike they must find alike: the options, the
    store, the earlier runs, the last checkpoint.

    stop_after: leave after so many steps, without a last checkpoint, as a kill would (for tests).
    """
    started = time.perf_counter()
    if will_use_cpu():
        keep_freed_memory()
    start(config.processes)
    with together():
        store = ActivationStore.open(config.store)
        wiring = plan(config, store)
        mesh = make_mesh(config.mesh)
        check_divides(mesh, config.batch_size, config.microbatches)
        check_features(mesh, config.model.features)
    run = config.out or Path("runs") / wiring.name
    config = dataclasses.replace(config, layer=spell_layers(wiring.sources), out=run, warmup=config.warmup_steps)
    agree("other options", as_json(dataclasses.replace(config, **ONE_PROCESS)))
    given = load_given(run, config.given, mesh)
    start_from = config.start_from and config.start_from.absolute()  # found from any other folder too
    config = dataclasses.replace(config, given=tuple(one.run for one in given), start_from=start_from)
    with ExitStack() as opened:
        with together():
            check_given(wiring, given, identity(store))
            frozen, arrays = freeze(wiring, given)
            inputs = input_layers(wiring, given)
            rules = token_rules(store, inputs, wiring.targets, config.tokens)
            scales = normalisation_of(store, wiring.sources, wiring.targets, rules)
            rules.some_rows("test")
            if config.model.activation in RANKED_BY_NORM:
                drawn_apart(store, rules, "val")  # are there some for its thresholds, at every checkpoint?
            own = own_positions(mesh, config.batch_size, config.microbatches)
            batches = opened.enter_context(
                closing(Batches(store, inputs, wiring.targets, rules, config.batch_size, config.data, config.seed, own))
            )
            check_folder(run, store.path)
            data = identity(store) | {"given_runs": pins(given), "outliers": dataclasses.asdict(rules.limits)}
            data["start_run"] = pin_of_start(run, config, wiring, data)
            run.mkdir(parents=True, exist_ok=True)
            if is_main():
                opened.enter_context(closing(Lock(run, "another train.py")))
        last = last_step(run)
        with together():
            if (order := row_order(run, store, last, config.steps)) is not None:
                data["row_order"] = order
        agree("another store or checkpoint", [without_paths(data), last])
        claim(run, as_json(config), data, resumable=last is not None)
        measured = config.log.val_rows > 0 and len(rules.rows("val")) > 0
        checkpoints = opened.enter_context(closing(Checkpoints(run, measured)))
        if last is None:
            state, meta = first_state(config, wiring, scales, data["start_run"], mesh), {}
        else:
            state, meta = checkpoints.restore(last, abstract_state(config, wiring, scales, mesh))
            say(f"resuming {run} at step {last}")
        say_plan(config, store, rules, wiring, run)
        begins = last is None  # a run that goes on has to stay as it began
        if begins and not config.device_cache and (advice := batches.advice()):
            say(advice)
        frozen = with_room(store, inputs, wiring.targets, rules, frozen, arrays, mesh)
        records = opened.enter_context(closing(Lines(run / METRICS, meta.get("metrics_bytes", 0))))
        kept = 0 if last is None else whole_lines(run / TIMING)
        timings = opened.enter_context(closing(Lines(run / TIMING, kept)))
        graph = graph_of(config, wiring, scales)
        split = mesh, config.batch_size, config.microbatches
        with together():
            cache = DeviceCache(batches, *split) if config.device_cache else None
        if cache is None:
            feed = Feed(batches, lambda batch: place_batch(batch, *split))
        else:
            feed = Feed(cache.places, cache.batch)
        make = partial(make_step, config, graph, mesh, frozen)
        validate = partial(validation, config, graph, mesh, store, inputs, rules, frozen, arrays)
        loop = Loop(config, make(), arrays, feed, checkpoints, records, timings, validate)
        if config.sparsity.k_start > 1:
            loop.annealing = make(annealing=True)
        if meta:
            loop.window, loop.trend = Window(**meta["window"]), Trend(**meta["trend"])
        loop.started = started
        loop.run(state, last or 0, stop_after)
    return run


def row_order(run: Path, store: ActivationStore, last: int | None, steps: int) -> dict[str, int] | None:
    """What the order of rows depends on beside seed and options, to be recorded. UserError where the run was begun by
    a version that had another order, and is not done."""
    found = {"rule": ROW_ORDER, "block_rows": store.block_rows}
    if last is None:
        return found
    begun = read_config(run)["data"].get("row_order")
    if last == steps:
        return begun  # no more are taken
    if begun is None:
        raise UserError(
            f"{run} was begun by an earlier version, which took rows in another order: it can be measured and "
            "exported but does not go on; name another --out"
        )
    return found


def first_state(
    config: TrainConfig, wiring: Wiring, scales: Normalisation, pin: dict[str, Any] | None, mesh: Mesh
) -> TrainState:
    """The state before the first step, on its mesh: made there, since one device may not hold it. `pin`: of the run to
    start from."""
    make = partial(initial_state, config, wiring, scales)
    state = jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()
    if pin is not None:
        parameters, steered = start_of(pin, scales, mesh)
        if steered is None or state.penalty is None:  # one of the two is not steered
            steered = state.penalty
        state = state._replace(parameters=parameters, penalty=steered)
    return state


def with_room(
    store: ActivationStore,
    inputs: tuple[int, ...],
    targets: tuple[int, ...],
    rules: TokenRules,
    frozen: tuple[Frozen, ...],
    arrays: Sequence[nnx.State],
    mesh: Mesh,
) -> tuple[Frozen, ...]:
    """The given runs with as many slots as train rows need, whatever they were trained with; says how many that is.

    Part of what a run is, though in no file: it follows from the store, the given runs and the token rules.
    """
    if not frozen:
        return ()
    mix = trained_mix(store, rules, "train", CALIBRATION_ROWS)
    found = room(frozen, arrays, row_batches(store, inputs, targets, mix.stratum, mix.rows), mesh)
    if counted := [each for each in found if each is not None]:
        most, least = max(slots for slots, _ in counted), min(share for _, share in counted)
        say(f"given runs: up to {most} features of a token and source, all that are active on {least:.2%} of tokens")
    return tuple(dataclasses.replace(one, slots=each and each[0]) for one, each in zip(frozen, found, strict=True))


def validation(
    config: TrainConfig,
    graph: nnx.GraphDef,
    mesh: Mesh,
    store: ActivationStore,
    inputs: tuple[int, ...],
    rules: TokenRules,
    frozen: tuple[Frozen, ...],
    arrays: Sequence[nnx.State],
    state: TrainState,
) -> tuple[TrainState, float | None]:
    """The state with thresholds for use outside of training (where the rule needs them), and its FVU on `val` rows."""
    clt: CLT = nnx.merge(graph, state.parameters, state.constants)
    calibrated = clt.activation in RANKED_BY_NORM
    used = rules.rows("val")  # a sample of them all could have none that are used
    if not len(used) or not (calibrated or config.log.val_rows):
        return state, None

    batches = partial(row_batches, store, inputs, clt.wiring.targets)
    if calibrated:
        mix = trained_mix(store, rules, "val", CALIBRATION_ROWS)
        cut = calibrate(clt, partial(batches, mix.stratum, mix.rows), mix.shares, mesh)
        clt.cut[...] = jax.device_put(cut, clt.cut[...].sharding)
        state = state._replace(constants=nnx.split(clt, nnx.Param, ...)[2])
    if not config.log.val_rows:
        return state, None
    sample = sample_rows(used, config.log.val_rows, store.block_rows)
    figures = measure(clt, batches(rules.group, sample), rules.used_groups, frozen, arrays, mesh).fit
    return state, mean_fvu(figures.figures(clt.wiring.targets, rules.used_groups))[EVERY]


def say_plan(config: TrainConfig, store: ActivationStore, rules: TokenRules, wiring: Wiring, run: Path) -> None:
    """What is going to be done, and which options will do nothing."""
    tokens, model = config.steps * config.batch_size, config.model
    k = f" k={spell_numbers(model.k)}" if config.has_k else ""
    say(
        f"{run}: source {spell_layers(wiring.sources)} -> targets {spell_layers(wiring.targets)}, "
        f"F={model.features}, {model.activation}{k}; {tokens:,} tokens"
        + ("" if store.complete else " (the capture is unfinished: only what is published)")
    )
    say(f"train rows: {rules.describe('train')}")
    if model.activation == "jumprelu" and config.sparsity.revive > 0 and config.steps > LONG_JUMPRELU:
        say(
            f"jumprelu with --sparsity.revive may come apart in runs of more than {LONG_JUMPRELU:,} steps: watch val "
            "FVU, or take batchtopk (docs/training.md)"
        )
    if model.activation == "topk" and model.slots is not None:
        say(f"--model.slots {model.slots} does nothing under topk: k features of a token are active")
    if config.log.val_rows and not len(rules.rows("val")):
        say("val rows: none, so there is no val FVU and no best checkpoint")


def spell_numbers(k: float | tuple[float, ...]) -> str:
    return ",".join(f"{one:g}" for one in (k if isinstance(k, tuple) else (k,)))


@dataclass(frozen=True)
class Feed:
    """Batches in two stages, of which the first is done ahead on a thread: `read` a step's on the host, `send` what
    that gave to the devices (x, y)."""

    read: Callable[[int], Any]
    send: Callable[[Any], tuple[jax.Array, jax.Array]]


@dataclass
class Loop:
    """The training loop of one process."""

    config: TrainConfig
    step: Step
    arrays: Sequence[nnx.State]  # of the frozen runs
    feed: Feed
    checkpoints: Checkpoints
    records: Lines
    timings: Lines
    validate: Callable[[TrainState], tuple[TrainState, float | None]]
    annealing: Step | None = None  # the step while k comes down
    window: Window = field(default_factory=Window)
    trend: Trend = field(default_factory=Trend)
    compiling: bool = True
    started: float = field(default_factory=time.perf_counter)  # when `train` was called
    start_up: float | None = None  # seconds from there to the end of the first step; None once it is in timing.jsonl
    since: float = 0.0  # when the current stretch of `waited` and `timed_steps` began
    waited: float = 0.0
    timed_steps: int = 0

    def run(self, state: TrainState, first: int, stop_after: int | None) -> TrainState:
        """Do the steps from `first` on. A KeyboardInterrupt says how far they are."""
        try:
            return self.advance(state, first, stop_after)
        except KeyboardInterrupt as error:
            self.checkpoints.wait()
            last = self.checkpoints.last()
            again = "from the beginning" if last is None else f"from the checkpoint of step {last}"
            done = self.trend.steps
            raise KeyboardInterrupt(
                f"interrupted at step {done}; start the same command again to go on {again}"
            ) from error

    def advance(self, state: TrainState, first: int, stop_after: int | None) -> TrainState:
        steps = self.config.steps if stop_after is None else min(stop_after, self.config.steps)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        self.since = time.perf_counter()
        with read_ahead((self.feed.read(n) for n in range(first, steps)), depth=4) as ready:
            for n in range(first, steps):
                x, y = self.next_batch(ready)
                advance = self.annealing if self.annealing and n < annealed_steps(self.config) else self.step
                with jax.transfer_guard("disallow"):
                    state, figures = advance(state, x, y, self.arrays)
                if pending is not None:
                    self.note(*pending)
                pending = n + 1, figures
                if (n + 1) % self.config.log.checkpoint_every == 0 or n + 1 == self.config.steps:
                    self.note(*pending)
                    pending = None
                    self.save(n + 1, state)
            if pending is not None:
                self.note(*pending)
        return state

    def next_batch(self, ready: Iterator[Any]) -> tuple[jax.Array, jax.Array]:
        began = time.perf_counter()
        batch = next(ready)
        self.waited += time.perf_counter() - began
        return self.feed.send(batch)

    def save(self, step: int, state: TrainState) -> None:
        """Measure on `val` rows, then begin to save. UserError where the weights are not finite: nothing is saved."""
        if not bool(all_finite(state.parameters)):
            self.stop(step, "the weights are not finite")
        began = time.perf_counter()
        ready, fvu = self.validate(state)
        if fvu is not None:
            say(f"step {step:>6}/{self.config.steps}  val FVU {fvu:.4f}")
            self.records.add({"step": step, "val_fvu": fvu})
        meta = {
            "window": dataclasses.asdict(self.window),
            "trend": dataclasses.asdict(self.trend),
            "metrics_bytes": self.records.size(),
        }
        self.checkpoints.save(step, ready, meta, fvu)
        self.since += time.perf_counter() - began  # speed is that of training

    def stop(self, step: int, why: str) -> None:
        """Raise UserError. All processes come here, or none: what they decide on is alike."""
        self.checkpoints.wait()
        last = self.checkpoints.last()
        kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
        with together():
            raise UserError(
                f"{why} at step {step}; {kept}. Lower --lr (now {self.config.learning_rate:g}), with another --out"
            )

    def note(self, step: int, waiting: dict[str, jax.Array]) -> None:
        """Take in the figures of one step: stop on what will not come back, write a record where one is due."""
        figures = jax.device_get(waiting)
        if self.compiling:  # the first step's time is the compiler's
            self.compiling, self.since, self.waited = False, time.perf_counter(), 0.0
            self.start_up = self.since - self.started
            say(f"first step done {self.start_up:.1f} s after the start")
        else:
            self.timed_steps += 1
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])):
            self.stop(step, "the loss is not finite")
        self.trend.add(figures)
        if fault := self.trend.fault(self.config):
            self.stop(step, fault)
        self.window.add(figures)
        if step % self.config.log.every and step != self.config.steps:
            return
        record = self.window.record(step, step * self.config.batch_size, figures)
        self.records.add(record)
        self.window = Window()
        self.report(record)

    def report(self, record: dict[str, Any]) -> None:
        """The progress line, and the same in timing.jsonl. Figures are those of the training batches. What is about
        speed is left out where no step was timed: the first one's time is the compiler's."""
        now = time.perf_counter()
        timing: dict[str, Any] = {"step": record["step"], "seconds": now - self.since}
        if self.start_up is not None:
            timing["start_up"], self.start_up = self.start_up, None
        speed = left = ""
        if self.timed_steps:
            rate, waiting = (n / timing["seconds"] for n in (self.timed_steps * self.config.batch_size, self.waited))
            timing |= {"tokens_per_s": rate, "waiting": waiting}
            seconds = int((self.config.steps - record["step"]) * self.config.batch_size / rate)
            speed = f"{rate:>7,.0f} tokens/s  waiting {waiting:4.0%}  "
            left = f"  left {seconds // 60}:{seconds % 60:02d}"
        say(
            f"step {record['step']:>6}/{self.config.steps}  {speed}"
            f"loss {record['loss']:.4f}  train FVU {record['fvu']:.4f}  L0 {record['l0']:.1f}  "
            f"dead {record['dead']:.1%}"
            + (f"  slots full {record['full']:.0%}" if record["full"] >= MANY_FULL else "")
            + left
        )
        self.timings.add(timing)
        self.since, self.waited, self.timed_steps = now, 0.0, 0
