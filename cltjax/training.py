"""Training: one small pytree of state, one jitted step that takes its place, and a loop that never makes it wait.

Figures of step n-1 are fetched while step n runs; batches are read on threads. A run that is killed and started again
with the same configuration ends with the same bits as one that was not: parameters, optimiser, counters, metrics.jsonl.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from cltjax.batches import Batch, Batches, read_ahead
from cltjax.checkpoint import METRICS, TIMING, Checkpoints, Lines, claim, identity, on_device, read_config, whole_lines
from cltjax.clt import CLT
from cltjax.config import TrainConfig, as_json, from_json
from cltjax.errors import UserError
from cltjax.normalisation import blank, normalisation_of
from cltjax.step import Step, TrainState, graph_of, initial_state, make_step
from cltjax.store import ActivationStore
from cltjax.wiring import Wiring, spell_layers, wire


@dataclass
class Window:
    """Sums of the figures since the last record. Part of a checkpoint's meta, so that a resumed record is the same."""

    steps: int = 0
    loss: float = 0.0
    l0: float = 0.0
    error: list[float] = field(default_factory=list)
    power: list[float] = field(default_factory=list)

    def add(self, figures: dict[str, Any]) -> None:
        self.steps += 1
        self.loss += float(figures["loss"])
        self.l0 += float(figures["l0"])
        for name in ("error", "power"):
            values = [float(value) for value in figures[name]]
            before = getattr(self, name) or [0.0] * len(values)
            setattr(self, name, [a + b for a, b in zip(before, values, strict=True)])

    def record(self, step: int, tokens: int, figures: dict[str, Any]) -> dict[str, Any]:
        """The record of metrics.jsonl after `step` steps; means over the window, last values of dead, grad_norm, lr."""
        fvu = [error / power for error, power in zip(self.error, self.power, strict=True)]
        return {
            "step": step,
            "tokens": tokens,
            "loss": self.loss / self.steps,
            "fvu": sum(fvu) / len(fvu),
            "fvu_by_target": fvu,
            "l0": self.l0 / self.steps,
            **{name: float(figures[name]) for name in ("dead", "grad_norm", "lr")},
        }


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
    if len(store.rows_of("test")) == 0:
        raise UserError(f"{store.path} has no test rows to measure on: capture more samples")
    return wiring


def train(config: TrainConfig, stop_after: int | None = None) -> Path:
    """Train, or resume, the run that `config` describes; returns the run directory.

    stop_after: leave after so many steps, without a last checkpoint, as a kill would (for tests).
    """
    store = ActivationStore.open(config.store)
    wiring = plan(config, store)
    run = config.out or Path("runs") / wiring.name
    run.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, layer=spell_layers(wiring.sources), out=run)
    scales = normalisation_of(store, wiring)
    batches = Batches(store, wiring, config.batch_size, config.data, config.seed)
    checkpoints = Checkpoints(run)
    try:
        last = checkpoints.last()
        claim(run, as_json(config), identity(store), resumable=last is not None)
        if last is None:
            state, meta = initial_state(config, wiring, scales), {}
        else:
            like = on_device(jax.eval_shape(lambda: initial_state(config, wiring, scales)))
            state, meta = checkpoints.restore(last, like)
            print(f"resuming {run} at step {last}")
        say_plan(config, store, wiring, run)
        records = Lines(run / METRICS, meta.get("metrics_bytes", 0))
        timings = Lines(run / TIMING, 0 if last is None else whole_lines(run / TIMING))
        try:
            step = make_step(config, graph_of(config, wiring, scales))
            loop = Loop(config, step, batches, checkpoints, records, timings)
            loop.window = Window(**meta.get("window", {}))
            loop.run(state, last or 0, stop_after)
        finally:
            records.close()
            timings.close()
    finally:
        batches.close()
        checkpoints.close()
    return run


def say_plan(config: TrainConfig, store: ActivationStore, wiring: Wiring, run: Path) -> None:
    """One line about what is going to be done."""
    tokens, rows = config.steps * config.batch_size, len(store.rows_of("train"))
    print(
        f"{run}: source {spell_layers(wiring.sources)} -> targets {spell_layers(wiring.targets)}, "
        f"F={config.model.features}, k={config.model.k}; {tokens:,} tokens from {rows:,} train rows"
        + ("" if store.complete else " (the capture is unfinished: only what is published)"),
        flush=True,
    )


@dataclass
class Loop:
    """The training loop of one process."""

    config: TrainConfig
    step: Step
    batches: Batches
    checkpoints: Checkpoints
    records: Lines
    timings: Lines
    window: Window = field(default_factory=Window)
    compiling: bool = True
    since: float = 0.0  # when the current stretch of `waited` and `timed_steps` began
    waited: float = 0.0
    timed_steps: int = 0

    def run(self, state: TrainState, first: int, stop_after: int | None) -> TrainState:
        """Do the steps from `first` on."""
        steps = self.config.steps if stop_after is None else min(stop_after, self.config.steps)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        self.since = time.perf_counter()
        with read_ahead((self.batches(n) for n in range(first, steps)), depth=4) as feed:
            for n in range(first, steps):
                x, y = self.next_batch(feed)
                with jax.transfer_guard("disallow"):
                    state, figures = self.step(state, x, y)
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

    def next_batch(self, feed: Iterator[Batch]) -> tuple[jax.Array, jax.Array]:
        began = time.perf_counter()
        batch = next(feed)
        self.waited += time.perf_counter() - began
        return jax.device_put(batch.x), jax.device_put(batch.y)

    def save(self, step: int, state: TrainState) -> None:
        meta = {"window": dataclasses.asdict(self.window), "metrics_bytes": self.records.size()}
        self.checkpoints.save(step, state, meta)

    def note(self, step: int, waiting: dict[str, jax.Array]) -> None:
        """Take in the figures of one step: stop on what is not finite, write a record where one is due."""
        figures = jax.device_get(waiting)
        if self.compiling:  # the first step's time is the compiler's
            self.compiling, self.since, self.waited = False, time.perf_counter(), 0.0
        else:
            self.timed_steps += 1
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])):
            last = self.checkpoints.last()
            kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
            raise UserError(f"the loss is not finite at step {step}; {kept}. Lower --lr (now {self.config.lr:g})")
        self.window.add(figures)
        if step % self.config.log.every and step != self.config.steps:
            return
        record = self.window.record(step, step * self.config.batch_size, figures)
        self.records.add(record)
        self.window = Window()
        self.say(record)

    def say(self, record: dict[str, Any]) -> None:
        """The progress line, and the same in timing.jsonl. Figures are those of the training batches."""
        now = time.perf_counter()
        seconds = now - self.since
        speed = self.timed_steps * self.config.batch_size / seconds
        waited = self.waited / seconds
        left = (self.config.steps - record["step"]) * self.config.batch_size / max(speed, 1.0)
        print(
            f"step {record['step']:>6}/{self.config.steps}  {speed:>7,.0f} tokens/s  waiting {waited:4.0%}  "
            f"loss {record['loss']:.4f}  train FVU {record['fvu']:.4f}  L0 {record['l0']:.1f}  "
            f"dead {record['dead']:.1%}  left {int(left) // 60}:{int(left) % 60:02d}",
            flush=True,
        )
        timing = {"step": record["step"], "seconds": seconds, "tokens_per_s": speed, "waiting": waited}
        self.timings.add(timing)
        self.since, self.waited, self.timed_steps = now, 0.0, 0


def load(run: Path) -> tuple[CLT, TrainConfig, dict[str, Any]]:
    """The trained model of a run directory, its configuration, and the identity of the data it was trained on."""
    found = read_config(run)
    config, data = from_json(found["config"]), found["data"]
    wiring = wire(config.layer, data["model"]["n_layers"], config.offset, config.n_targets)
    scales = blank(wiring, data["model"]["d_model"])
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} has no checkpoint yet: run train.py again")
    checkpoints = Checkpoints(run)
    try:
        last = checkpoints.last()
        if last is None:
            raise UserError(f"{run} has no checkpoint yet: run train.py again")
        like = on_device(jax.eval_shape(lambda: initial_state(config, wiring, scales)))
        state, _ = checkpoints.restore(last, like)
    finally:
        checkpoints.close()
    return nnx.merge(graph_of(config, wiring, scales), state.parameters, state.constants), config, data
