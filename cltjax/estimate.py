"""What a training run needs, computed before it starts: parameters, memory, FLOPs, bytes, time. Imports no jax.

Letters: S sources, T targets, P (source, target) pairs, F features, D width, C slots (features of a token and source
that are decoded), n tokens of a device's step, b of them in a microbatch. On a mesh DATAxMODEL tokens are split over
DATA and features over MODEL: weights, moments and gradients are split over MODEL and repeated over DATA.

Times are a roofline: each part of a step takes its arithmetic or its memory traffic, whichever is longer, and one part
follows the other. The rates are a device's, assumed or measured (cltjax/rates.py), and shown; no efficiency is made up.
Traffic is counted twice:
  at least   a part moves each number that it needs once (once a microbatch, where it comes again), at the bandwidth:
             a lower bound (a little lower yet where many features are active on no token of a microbatch)
  predicted  a part moves what the code moves (cltjax/sparse_products.py), neighbours at the bandwidth, the rows of
             active features at the rate of rows at random places; top-k goes through numbers at a rate of its own
docs/training.md says how to read the result, and what is left out; docs/scaling.md how near it comes.
"""

import dataclasses
import math
import runpy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cltjax.config import FEW_DEAD, TrainConfig, parse_mesh, slots_of
from cltjax.errors import UserError
from cltjax.store import ActivationStore
from cltjax.store_format import DTYPES, SCALE_BYTES
from cltjax.wiring import Wiring, spell_layers, wire

WEIGHT = 4  # bytes of a float32: weights, moments, gradients, pre-activations, sums
# A parameter's step with AdamW: clipping 3 (square, sum, scale), first moment 3, second 4, bias corrections 2,
# update 3 (root, epsilon, quotient), weight decay 2, learning rate 1, sum 1.
OPTIMISER_FLOPS = 19
# The global norm reads the gradient; the update reads weight, two moments, gradient and writes weight, two moments.
OPTIMISER_BYTES = 8 * WEIGHT
# Of the loops in cltjax/sparse_products.py and of top-k in cltjax/sparsity.py, which import jax.
UNROLL, RUN, LONG = 8, 8, 256
# What a radix sort of a number and its place moves: 8 bytes read and 8 written, four times.
SORT_BYTES = 64


@dataclass(frozen=True)
class ModelShape:
    """What an estimate must know of a VLM's language tower and of how its activations are stored."""

    n_layers: int
    d_model: int
    dtype: str = "bfloat16"
    train_rows: int | None = None
    """Of a store that there is; what `--device-cache` needs follows from it."""


@dataclass(frozen=True)
class Rates:
    """Of one device. The defaults are assumed of an H100: a matrix product in bfloat16 as it is achieved rather than
    as the data sheet has it (989e12), memory below the data sheet (3.35e12), rows at random places no slower, top-k as
    if it sorted, NVLink as in the data sheet (900e9, half each way)."""

    flops: float = 400e12
    """FLOP/s."""
    bandwidth: float = 3e12
    """Bytes/s between its memory and its processor, neighbours after neighbours."""
    gather: float = 3e12
    """Bytes/s of rows at random places: decoder rows of active features, and what is added to their gradients."""
    select: float = 3e12 / SORT_BYTES
    """Numbers/s that top-k goes through."""
    link: float = 450e9
    """Bytes/s that it sends to other devices."""
    by_row: bool = False
    """Whether sparse products go by row, as on a CPU, or in a loop over slots."""


def assumed_rates(dtype: str, bandwidth: float = Rates.bandwidth) -> Rates:
    """An H100's. float32 products are not rounded to TF32: the data sheet gives 67e12 FLOP/s for them."""
    flops = Rates.flops if dtype == "bfloat16" else 67e12
    return Rates(flops, bandwidth, gather=bandwidth, select=bandwidth / SORT_BYTES)


@dataclass(frozen=True)
class Sizes:
    """The numbers that everything else follows from."""

    S: int
    T: int
    P: int
    most: int  # targets of a source
    F: int
    D: int
    C: int  # AuxK's included
    C_start: int  # while k comes down from `k_start` times k
    data: int
    model: int
    tokens: int  # n: of one device's step
    microbatches: int
    held: int  # bytes of an input's or target's number on the device
    computed: int  # bytes of a number in a product


@dataclass(frozen=True)
class Part:
    """A part of a step on one device: arithmetic, and bytes to and from memory (or, for `exchange`, other devices)."""

    name: str
    flops: int
    once: int  # bytes, each number that it needs once
    streamed: int  # bytes that the code moves, neighbours after neighbours
    gathered: int = 0  # bytes that it moves beside these, in rows at random places
    selected: int = 0  # numbers that top-k goes through

    def seconds(self, rates: Rates, least: bool = False) -> float:
        """Arithmetic or traffic, whichever takes longer. least: a lower bound."""
        rate = rates.link if self.name == "exchange" else rates.bandwidth
        moving = self.streamed / rate + self.gathered / rates.gather + self.selected / rates.select
        return max(self.flops / rates.flops, self.once / rate if least else moving)


@dataclass(frozen=True)
class Cost:
    """What a run needs. Bytes and parts are those of one device; parameters and FLOPs a token, of all together."""

    sources: tuple[tuple[int, int, int], ...]  # layer, number of targets, parameters (b_dec is no source's)
    targets: tuple[int, ...]
    parameters: dict[str, int]
    memory: dict[str, int]
    flops_per_token: dict[str, int]
    parts: tuple[Part, ...]
    rates: Rates
    store_bytes_per_token: int  # read
    store_bytes_per_row: int  # kept, where just the layers that are read were captured
    checkpoint_bytes: int
    mesh: tuple[int, int]
    batch_size: int
    microbatches: int
    steps: int
    features: int
    slots: int

    def step_seconds(self, least: bool = False) -> float:
        """Time of a step, part after part. least: a lower bound."""
        return sum(part.seconds(self.rates, least) for part in self.parts)


def estimate(config: TrainConfig, shape: ModelShape, rates: Rates) -> Cost:
    """What `config` needs on a model of this shape. UserError where they do not go together."""
    config.check()
    for name, value in {"d-model": shape.d_model, **dataclasses.asdict(rates)}.items():
        if name != "by_row" and not value > 0:
            raise UserError(f"--{name} {value} must be above 0")
    wiring = wire(config.layer, shape.n_layers, config.offset, config.n_targets)
    z = sizes(config, shape, wiring)
    layers = {*wiring.sources, *wiring.targets}
    stored = DTYPES[shape.dtype].itemsize
    thresholds = z.S * z.F if config.model.activation == "jumprelu" else 0
    parameters = {
        "encoder": z.S * z.F * z.D,
        "decoder": z.P * z.F * z.D,
        "biases": z.S * z.F + z.T * z.D,
        **({"thresholds": thresholds} if thresholds else {}),
    }
    fixed = z.F * (z.D + 1) + thresholds // z.S  # a source's parameters without its decoder
    heads = [(source, len(wiring.targets_of(source))) for source in wiring.sources]
    own = (sum(parameters.values()) - z.T * z.D) // z.model + z.T * z.D  # on one device
    return Cost(
        sources=tuple((source, n, fixed + z.F * n * z.D) for source, n in heads),
        targets=wiring.targets,
        parameters=parameters,
        memory=memory(z, config, own) | cached(z, config, shape),
        flops_per_token=flops_per_token(z, config),
        parts=parts(z, config, own, rates.by_row),
        rates=rates,
        store_bytes_per_token=(z.S + z.T) * z.D * stored,
        store_bytes_per_row=2 * len(layers) * z.D * stored,
        # weights, two moments; tokens of silence and firing rate of each feature; constants
        checkpoint_bytes=WEIGHT * (3 * sum(parameters.values()) + 2 * z.S * z.F + constants(z, config)),
        mesh=(z.data, z.model),
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        steps=config.steps,
        features=z.F,
        slots=z.C,
    )


def sizes(config: TrainConfig, shape: ModelShape, wiring: Wiring) -> Sizes:
    """The run's numbers. UserError where tokens or features do not divide over the mesh."""
    data, model = parse_mesh(config.mesh)
    pieces = data * config.microbatches
    if config.batch_size % pieces:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide into {pieces} pieces "
            f"({data} devices by --mesh {config.mesh}, --microbatches {config.microbatches})"
        )
    if config.model.features % model:
        raise UserError(f"--model.features {config.model.features} do not divide over --mesh {config.mesh}")
    auxk = min(config.sparsity.auxk_features, config.model.features) if config.sparsity.auxk else 0
    return Sizes(
        S=len(wiring.sources),
        T=len(wiring.targets),
        P=len(wiring.pairs),
        most=max(len(wiring.targets_of(source)) for source in wiring.sources),
        F=config.model.features,
        D=shape.d_model,
        C=slots_of(config.model) + auxk,
        C_start=slots_of(config.model, config.sparsity.k_start if config.sparsity.anneal else 1.0) + auxk,
        data=data,
        model=model,
        tokens=config.batch_size // data,
        microbatches=config.microbatches,
        held=DTYPES[shape.dtype].itemsize,
        computed=2 if config.dtype == "bfloat16" else WEIGHT,
    )


def constants(z: Sizes, config: TrainConfig) -> int:
    """Numbers that are not trained by gradients: means, standard deviations, cuts; a steered penalty and its excess."""
    return (z.S + z.T) * (z.D + 1) + z.S + 2 * z.S * config.steered


def memory(z: Sizes, config: TrainConfig, own: int) -> dict[str, int]:
    """Bytes on one device while it does a step; `own` parameters lie on it."""
    S, T, D, C, M = z.S, z.T, z.D, z.C_start, z.model
    b = z.tokens // z.microbatches
    # Of size [S, b, F]: x W_enc and its sum with b_enc, then pre-activations and ranks; AuxK's. Under topk the sum is
    # what top-k reads, which adds it up itself where it goes by runs.
    length = z.F // M
    by_runs = length >= LONG * C and length % RUN == 0
    alone = config.model.activation == "topk" and not (config.sparsity.auxk or config.sparsity.revive)
    dense = 1 if alone and by_runs else 2 + 2 * bool(config.sparsity.auxk)
    pre = dense * WEIGHT * S * b * z.F // M
    # XLA keeps one of its decoder gradients twice where they are summed: before and after.
    summed = z.data * M > 1 or z.microbatches > 1
    gradients = WEIGHT * (own + summed * z.most * z.F * D // M)
    gathered = WEIGHT * S * b * M * min(C, z.F // M) if M > 1 else 0
    found = {
        "weights": WEIGHT * own,
        "Adam moments": 2 * WEIGHT * own,
        # No gradient needs all pre-activations: when there are gradients, these are gone.
        "pre-activations, then gradients": max(pre, gradients),
        "gradients of a microbatch": WEIGHT * own if z.microbatches > 1 else 0,
        "weights in bfloat16": 2 * (S + z.P) * z.F * D // M if z.computed == 2 else 0,
        "batch x, y, and the next": 2 * z.tokens * (S + T) * D * z.held,
        "x normalised": b * S * D * (WEIGHT + (z.computed if z.computed != WEIGHT else 0)),
        "candidates": 3 * WEIGHT * S * b * C + gathered,  # values, indices, gradients
        "y normalised, y_hat": (4 if config.sparsity.auxk else 2) * WEIGHT * b * T * D,
        "counters, constants": 2 * WEIGHT * S * z.F // M + WEIGHT * constants(z, config),
    }
    return {name: size for name, size in found.items() if size}


def cached(z: Sizes, config: TrainConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes of the train rows that stay on each device, all of them: token rules may leave some out."""
    if not config.device_cache:
        return {}
    if shape.train_rows is None:
        raise UserError("--device-cache keeps as many rows as the store has: name --store, and no --model-layers")
    scales = SCALE_BYTES if shape.dtype == "int8" else 0
    return {"train rows": shape.train_rows * (z.S + z.T) * (z.D * z.held + scales)}


def flops_per_token(z: Sizes, config: TrainConfig) -> dict[str, int]:
    """Multiplications and additions that a token costs, over all devices; the optimiser's are in `parts`.

    `revive` computes the pre-activations of dead features again, and their gradient: as many as still are few.
    """
    dense = 2 * z.S * z.F * z.D
    return {
        "encode": dense,
        "encode backward": 2 * z.S * z.C * z.D + (2 * dense // FEW_DEAD if config.sparsity.revive else 0),
        "decode": 2 * z.C * z.P * z.D,
        "decode backward": 4 * z.C * z.P * z.D,  # to the weights, and to the values
    }


def parts(z: Sizes, config: TrainConfig, own: int, by_row: bool) -> tuple[Part, ...]:
    """A step on one device, part by part. by_row: which way sparse products go."""
    n, times, M = z.tokens, z.microbatches, z.model
    encoder, decoder = z.S * z.F * z.D // M, z.P * z.F * z.D // M  # weights
    pre = n * z.S * z.F // M
    x, y, y_hat = n * z.S * z.D * z.held, n * z.T * z.D * z.held, n * z.T * z.D * WEIGHT
    # Weights in the rows of all slots, and of the features that this device has: 1 in M of them.
    slots = n * z.C * z.P * z.D
    active, active_encoder = slots // M, n * z.C * z.S * z.D // M
    rows_once = min(z.computed * active, z.computed * decoder * times)
    flops = {name: n * number // M for name, number in flops_per_token(z, config).items()}

    # Bytes of going once through a float32 for each number of these rows, a few slots a turn: a loop goes through the
    # slots of other devices' features too.
    turns = WEIGHT * slots // z.C * -(-z.C // UNROLL)

    def part(
        name: str, flops: int, once: int, streamed: int | None = None, gathered: int = 0, selected: int = 0
    ) -> Part:
        return Part(name, flops, once, once if streamed is None else streamed, gathered, selected)

    found = [part("encode", flops["encode"], x + z.computed * encoder * times + WEIGHT * pre)]
    passed = (2 if config.sparsity.auxk else 1) * pre
    found.append(part("select", 0, WEIGHT * passed, selected=passed))
    # Either way a loop, whose sum is read and written in every turn.
    streamed = y + y_hat + 2 * turns
    found.append(part("decode", flops["decode"], y + y_hat + rows_once, streamed, z.computed * active))
    # Reads the error, writes a gradient for every weight, and reads decoder rows once more, for the values' gradients.
    # By row, an active feature reads the error of its token. In a loop tokens follow each other, and the gradient's
    # row is read and written; the values' gradients read the error once more in every turn.
    written = y_hat + WEIGHT * decoder * times
    streamed = written if by_row else written + WEIGHT * active + turns
    gathered = z.computed * active + (1 if by_row else 2) * WEIGHT * active
    found.append(part("decode backward", flops["decode backward"], written + rows_once, streamed, gathered))
    written = x + WEIGHT * encoder * times
    streamed = written if by_row else written + WEIGHT * active_encoder
    gathered = (1 if by_row else 2) * WEIGHT * active_encoder
    found.append(part("encode backward", flops["encode backward"], written, streamed, gathered))
    if z.computed == 2:
        found.insert(0, part("round to bfloat16", 0, (WEIGHT + 2) * (encoder + decoder)))
    if config.model.activation != "topk":
        found.insert(0, part("decoder norms", 2 * decoder, WEIGHT * decoder))
    if times > 1:  # the sum is read, a microbatch's gradient is read, the sum is written
        found.append(part("sum over microbatches", own * (times - 1), 3 * WEIGHT * own * (times - 1)))
    found.append(part("optimiser", OPTIMISER_FLOPS * own, OPTIMISER_BYTES * own))
    if z.data * M > 1:
        found.append(part("exchange", 0, exchanged(z, own, predictions=2 if config.sparsity.auxk else 1)))
    return tuple(found)


def exchanged(z: Sizes, own: int, predictions: int) -> int:
    """Bytes that one device sends in a step: candidates and predictions (twice as many where AuxK makes its own) over
    MODEL, gradients over DATA.

    An all-reduce of N bytes over m devices sends 2 N (m - 1) / m from each of them, an all-gather of N bytes N (m - 1).
    """
    M, n = z.model, z.tokens
    candidates = WEIGHT * n * z.S * min(z.C, z.F // M) * (M - 1)
    predicted = predictions * 2 * WEIGHT * n * z.T * z.D * (M - 1) // M
    gradients = 2 * WEIGHT * own * (z.data - 1) // z.data
    return candidates + predicted + gradients


def shape_of_store(path: Path) -> ModelShape:
    """The shape that a store's manifest tells."""
    store = ActivationStore.open(path)
    return ModelShape(store.n_layers, store.d_model, store.dtype, len(store.rows_of("train")))


def shape_of_recipe(path: Path) -> ModelShape | None:
    """`model_shape` of a config file, where it defines one."""
    found = runpy.run_path(str(path)).get("model_shape")
    if found is not None and not isinstance(found, ModelShape):
        raise UserError(f"--config {path}: model_shape must be a ModelShape(n_layers=..., d_model=...)")
    return found


def as_json(cost: Cost, tokens_per_s: float | None = None) -> dict[str, Any]:
    """A cost as plain JSON values, sums and times included."""
    rate = tokens_per_s or cost.batch_size / cost.step_seconds()
    timed = [
        dataclasses.asdict(part)
        | {"seconds": part.seconds(cost.rates), "seconds_at_least": part.seconds(cost.rates, least=True)}
        for part in cost.parts
    ]
    sources = [{"layer": layer, "targets": n, "parameters": size} for layer, n, size in cost.sources]
    return dataclasses.asdict(cost) | {
        "sources": sources,
        "parts": timed,
        "parameters_total": sum(cost.parameters.values()),
        "memory_total": sum(cost.memory.values()),
        "flops_per_token_total": sum(cost.flops_per_token.values()),
        "step_seconds": cost.step_seconds(),
        "step_seconds_at_least": cost.step_seconds(least=True),
        "run_seconds": cost.steps * cost.step_seconds(),
        "run_seconds_at_least": cost.steps * cost.step_seconds(least=True),
        "tokens_per_s": rate,
        "store_bytes": cost.steps * cost.batch_size * cost.store_bytes_per_token,
        "store_bytes_per_s": rate * cost.store_bytes_per_token,
    }


def summary(cost: Cost, tokens_per_s: float | None = None, measured: bool = False) -> list[str]:
    """The figures that matter, in lines. tokens_per_s: the rate to say the store's for, by default the predicted one.
    measured: whether the device's rates were."""
    found = as_json(cost, tokens_per_s)
    kinds = ", ".join(f"{name} {number:,}" for name, number in cost.parameters.items())
    sources, targets = spell_layers(tuple(layer for layer, _, _ in cost.sources)), spell_layers(cost.targets)
    (data, model), rates = cost.mesh, cost.rates
    alone = data * model == 1
    said = [
        f"{count(rates.flops)}FLOP/s",
        f"{count(rates.bandwidth)}B/s of memory",
        f"{count(rates.gather)}B/s in rows at random places",
        f"top-k of {count(rates.select)}numbers/s",
    ]
    if not alone:
        said.append(f"{count(rates.link)}B/s between devices")
    return [
        f"model       sources {sources} -> targets {targets}, F={cost.features}, {cost.slots} slots",
        f"parameters  {found['parameters_total']:,}: {kinds}",
        f"memory      {size(found['memory_total'])} on {'the device' if alone else f'each of {data}x{model} devices'}",
        f"a token     {count(found['flops_per_token_total'])}FLOP, {size(cost.store_bytes_per_token)} from the store",
        f"a step      {cost.batch_size:,} tokens: {duration(found['step_seconds'])}, "
        f"at least {duration(found['step_seconds_at_least'])}",
        f"the run     {cost.steps:,} steps, {cost.steps * cost.batch_size:,} tokens: "
        f"{duration(found['run_seconds'])}, at least {duration(found['run_seconds_at_least'])}",
        f"the store   {size(found['store_bytes'])} read, {found['store_bytes_per_s'] / 1e9:,.2f} GB/s at "
        f"{found['tokens_per_s']:,.0f} tokens/s; {size(10**6 * cost.store_bytes_per_row)} per million rows",
        f"checkpoint  {size(cost.checkpoint_bytes)}; the last and the best are kept",
        f"{'measured' if measured else 'assumed'}    {' ' * (not measured)}{', '.join(said[:2])},",
        f"            {', '.join(said[2:])}",
    ]


def show_cost(cost: Cost, tokens_per_s: float | None = None, measured: bool = False) -> None:
    """Print a cost: the summary, and where it comes from."""
    print("\n".join(summary(cost, tokens_per_s, measured)))
    console = Console()
    by_source = Table("source layers", "targets of each", "parameters of each")
    for (targets, parameters), alike in groupby(cost.sources, key=lambda source: source[1:]):
        by_source.add_row(spell_layers(tuple(layer for layer, _, _ in alike)), f"{targets}", f"{parameters:,}")
    held = Table("memory of a device", "bytes", "")
    for name, number in (cost.memory | {"sum": sum(cost.memory.values())}).items():
        held.add_row(name, f"{number:,}", size(number))
    step = Table("a step on a device", "FLOP", "streamed", "gathered", "time", "at least")
    for part in cost.parts:
        seconds = [duration(part.seconds(cost.rates, least)) for least in (False, True)]
        step.add_row(part.name, count(part.flops), size(part.streamed), size(part.gathered), *seconds)
    step.add_row("sum", "", "", "", *(duration(cost.step_seconds(least)) for least in (False, True)))
    for table in (by_source, held, step):
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)


def size(number: float) -> str:
    """Bytes, with a binary prefix: `49.9 GiB`."""
    power = 0 if number < 1024 else min(5, int(math.log2(number) // 10))
    return f"{number / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def count(number: float) -> str:
    """A number with a decimal prefix and a space, ready for its unit: `1.2 G`."""
    power = 0 if number < 1000 else min(6, int(math.log10(number) // 3))
    return f"{number / 1000**power:.{1 if power else 0}f} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"


def duration(seconds: float) -> str:
    """`37.1 ms`, `12.3 s`, `4.5 min` or `6.7 h`."""
    for unit, scale, limit in (("ms", 1e-3, 1), ("s", 1, 60), ("min", 60, 3600)):
        if seconds < limit:
            return f"{seconds / scale:.{1 if seconds / scale >= 1 else 3}f} {unit}"
    return f"{seconds / 3600:,.1f} h"
