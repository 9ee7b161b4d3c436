"""What a training run needs, computed before it starts: parameters, memory, FLOPs, bytes, time. Imports no jax.

Letters: S sources, T targets, P (source, target) pairs, F features, D width, C slots (features of a token and source
that are decoded), n tokens of a device's step, b of them in a microbatch. On a mesh DATAxMODEL tokens are split over
DATA and features over MODEL: weights, moments and gradients are split over MODEL and repeated over DATA.

Times are a roofline: each part of a step takes its arithmetic or its memory traffic, whichever is longer, at rates that
are assumed and shown, and one part follows the other. No efficiency is made up. Traffic is counted twice:
  once      a part moves each number that it needs once (once a microbatch, where it comes again) and no more: the
            times are a lower bound (a little lower yet where many features are active on no token of a microbatch)
  no cache  the decoder rows of a token's active features are fetched for that token alone, and what it adds to their
            gradients (and to the encoder's) is read and written for it alone
docs/training.md says how to read the result, and what is left out.
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
from cltjax.store_format import DTYPES
from cltjax.wiring import Wiring, spell_layers, wire

WEIGHT = 4  # bytes of a float32: weights, moments, gradients, pre-activations, sums
# A parameter's step with AdamW: clipping 3 (square, sum, scale), first moment 3, second 4, bias corrections 2,
# update 3 (root, epsilon, quotient), weight decay 2, learning rate 1, sum 1.
OPTIMISER_FLOPS = 19
# The global norm reads the gradient; the update reads weight, two moments, gradient and writes weight, two moments.
OPTIMISER_BYTES = 8 * WEIGHT


@dataclass(frozen=True)
class ModelShape:
    """What an estimate must know of a VLM's language tower and of how its activations are stored."""

    n_layers: int
    d_model: int
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Rates:
    """Of one device. The defaults are assumed of an H100: a matrix product in bfloat16 as it is achieved rather than
    as the data sheet has it (989e12), memory below the data sheet (3.35e12), NVLink as there (900e9, half each way)."""

    flops: float = 400e12
    """FLOP/s."""
    bandwidth: float = 3e12
    """Bytes/s between its memory and its processor."""
    link: float = 450e9
    """Bytes/s that it sends to other devices."""


def assumed_rates(dtype: str) -> Rates:
    """An H100's. float32 products are not rounded to TF32: the data sheet gives 67e12 FLOP/s for them."""
    return Rates() if dtype == "bfloat16" else Rates(flops=67e12)


@dataclass(frozen=True)
class Sizes:
    """The numbers that everything else follows from."""

    S: int
    T: int
    P: int
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
    once: int
    no_cache: int

    def seconds(self, rates: Rates, no_cache: bool = False) -> float:
        """Arithmetic or traffic, whichever takes longer."""
        rate = rates.link if self.name == "exchange" else rates.bandwidth
        return max(self.flops / rates.flops, (self.no_cache if no_cache else self.once) / rate)


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

    def step_seconds(self, no_cache: bool = False) -> float:
        """Time of a step, part after part."""
        return sum(part.seconds(self.rates, no_cache) for part in self.parts)


def estimate(config: TrainConfig, shape: ModelShape, rates: Rates) -> Cost:
    """What `config` needs on a model of this shape. UserError where they do not go together."""
    config.check()
    for name, value in {"d-model": shape.d_model, **dataclasses.asdict(rates)}.items():
        if not value > 0:
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
        memory=memory(z, config, own),
        flops_per_token=flops_per_token(z, config),
        parts=parts(z, config, own),
        rates=rates,
        store_bytes_per_token=(z.S + z.T) * z.D * stored,
        store_bytes_per_row=2 * len(layers) * z.D * stored,
        # weights, two moments; tokens of silence and firing rate of each feature; constants
        checkpoint_bytes=WEIGHT * (3 * sum(parameters.values()) + 2 * z.S * z.F + constants(z)),
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
        F=config.model.features,
        D=shape.d_model,
        C=slots_of(config.model) + auxk,
        C_start=slots_of(config.model, config.sparsity.k_start if config.sparsity.anneal else 1.0) + auxk,
        data=data,
        model=model,
        tokens=config.batch_size // data,
        microbatches=config.microbatches,
        held=WEIGHT if shape.dtype == "int8" else DTYPES[shape.dtype].itemsize,  # int8 is read as float32
        computed=2 if config.dtype == "bfloat16" else WEIGHT,
    )


def constants(z: Sizes) -> int:
    """Numbers that belong to the model and are not trained: means, standard deviations, cuts."""
    return (z.S + z.T) * (z.D + 1) + z.S


def memory(z: Sizes, config: TrainConfig, own: int) -> dict[str, int]:
    """Bytes on one device while it does a step; `own` parameters lie on it."""
    S, T, D, C, M = z.S, z.T, z.D, z.C_start, z.model
    b = z.tokens // z.microbatches
    # Of size [S, b, F]: x W_enc and its sum with b_enc, then pre-activations and ranks; AuxK's; a dense gradient.
    dense = 2 + 2 * bool(config.sparsity.auxk) + bool(config.sparsity.revive)
    gathered = WEIGHT * S * b * M * min(C, z.F // M) if M > 1 else 0
    found = {
        "weights": WEIGHT * own,
        "Adam moments": 2 * WEIGHT * own,
        "gradients": WEIGHT * own,
        "gradients of a microbatch": WEIGHT * own if z.microbatches > 1 else 0,
        "weights in bfloat16": 2 * (S + z.P) * z.F * D // M if z.computed == 2 else 0,
        "batch x, y, and the next": 2 * z.tokens * (S + T) * D * z.held,
        "x normalised": b * S * D * (WEIGHT + (z.computed if z.computed != WEIGHT else 0)),
        "pre-activations": dense * WEIGHT * S * b * z.F // M,
        "candidates": 3 * WEIGHT * S * b * C + gathered,  # values, indices, gradients
        "y normalised, y_hat, its gradient": (5 if config.sparsity.auxk else 3) * WEIGHT * b * T * D,
        "counters, constants": 2 * WEIGHT * S * z.F // M + WEIGHT * constants(z),
    }
    return {name: size for name, size in found.items() if size}


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


def parts(z: Sizes, config: TrainConfig, own: int) -> tuple[Part, ...]:
    """A step on one device, part by part."""
    n, times, M = z.tokens, z.microbatches, z.model
    encoder, decoder = z.S * z.F * z.D // M, z.P * z.F * z.D // M  # weights
    pre = WEIGHT * n * z.S * z.F // M
    x, y, y_hat = n * z.S * z.D * z.held, n * z.T * z.D * z.held, n * z.T * z.D * WEIGHT
    # Weights of the features that are active on each token: a device has 1 in M of them.
    active, active_encoder = n * z.C * z.P * z.D // M, n * z.C * z.S * z.D // M
    rows = z.computed * active
    rows_once = min(rows, z.computed * decoder * times)
    flops = {name: n * number // M for name, number in flops_per_token(z, config).items()}

    def part(name: str, flops: int, once: int, no_cache: int | None = None) -> Part:
        return Part(name, flops, once, once if no_cache is None else no_cache)

    found = [
        part("encode", flops["encode"], x + z.computed * encoder * times + pre),
        part("select", 0, (2 if config.sparsity.auxk else 1) * pre),
        part("decode", flops["decode"], y + y_hat + rows_once, y + y_hat + rows),
    ]
    written = y_hat + WEIGHT * decoder * times  # reads the error, writes a gradient for every weight
    added = 2 * WEIGHT * active  # a gradient is read and written for every token that adds to it
    found.append(part("decode backward", flops["decode backward"], written + rows_once, written + rows + added))
    written = x + WEIGHT * encoder * times
    found.append(part("encode backward", flops["encode backward"], written, written + 2 * WEIGHT * active_encoder))
    if z.computed == 2:
        found.insert(0, part("round to bfloat16", 0, (WEIGHT + 2) * (encoder + decoder)))
    if config.model.activation != "topk" or config.sparsity.revive:
        found.insert(0, part("decoder norms", 2 * decoder, WEIGHT * decoder))
    if times > 1:  # the sum is read, a microbatch's gradient is read, the sum is written
        found.append(part("sum over microbatches", own * (times - 1), 3 * WEIGHT * own * (times - 1)))
    found.append(part("optimiser", OPTIMISER_FLOPS * own, OPTIMISER_BYTES * own))
    if z.data * M > 1:
        found.append(part("exchange", 0, exchanged(z, own)))
    return tuple(found)


def exchanged(z: Sizes, own: int) -> int:
    """Bytes that one device sends in a step: candidates and predictions over MODEL, gradients over DATA.

    An all-reduce of N bytes over m devices sends 2 N (m - 1) / m from each of them, an all-gather of N bytes N (m - 1).
    """
    M, n = z.model, z.tokens
    candidates = WEIGHT * n * z.S * min(z.C, z.F // M) * (M - 1)
    predictions = 2 * WEIGHT * n * z.T * z.D * (M - 1) // M
    gradients = 2 * WEIGHT * own * (z.data - 1) // z.data
    return candidates + predictions + gradients


def shape_of_store(path: Path) -> ModelShape:
    """The shape that a store's manifest tells."""
    store = ActivationStore.open(path)
    return ModelShape(store.n_layers, store.d_model, store.dtype)


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
        | {"seconds": part.seconds(cost.rates), "seconds_no_cache": part.seconds(cost.rates, no_cache=True)}
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
        "step_seconds_no_cache": cost.step_seconds(no_cache=True),
        "run_seconds": cost.steps * cost.step_seconds(),
        "run_seconds_no_cache": cost.steps * cost.step_seconds(no_cache=True),
        "tokens_per_s": rate,
        "store_bytes": cost.steps * cost.batch_size * cost.store_bytes_per_token,
        "store_bytes_per_s": rate * cost.store_bytes_per_token,
    }


def summary(cost: Cost, tokens_per_s: float | None = None) -> list[str]:
    """The figures that matter, in lines. tokens_per_s: the rate to say the store's for, by default the fastest."""
    found = as_json(cost, tokens_per_s)
    kinds = ", ".join(f"{name} {number:,}" for name, number in cost.parameters.items())
    sources, targets = spell_layers(tuple(layer for layer, _, _ in cost.sources)), spell_layers(cost.targets)
    data, model = cost.mesh
    alone = data * model == 1
    link = "" if alone else f", {count(cost.rates.link)}B/s between devices"
    return [
        f"model       sources {sources} -> targets {targets}, F={cost.features}, {cost.slots} slots",
        f"parameters  {found['parameters_total']:,}: {kinds}",
        f"memory      {size(found['memory_total'])} on {'the device' if alone else f'each of {data}x{model} devices'}",
        f"a token     {count(found['flops_per_token_total'])}FLOP, {size(cost.store_bytes_per_token)} from the store",
        f"a step      {cost.batch_size:,} tokens: at least {duration(found['step_seconds'])}, "
        f"{duration(found['step_seconds_no_cache'])} without a cache",
        f"the run     {cost.steps:,} steps, {cost.steps * cost.batch_size:,} tokens: at least "
        f"{duration(found['run_seconds'])}, {duration(found['run_seconds_no_cache'])} without a cache",
        f"the store   {size(found['store_bytes'])} read, {found['store_bytes_per_s'] / 1e9:,.2f} GB/s at "
        f"{found['tokens_per_s']:,.0f} tokens/s; {size(10**6 * cost.store_bytes_per_row)} per million rows",
        f"checkpoint  {size(cost.checkpoint_bytes)}; the last and the best are kept",
        f"assumed     {count(cost.rates.flops)}FLOP/s and {count(cost.rates.bandwidth)}B/s of memory a device{link}",
    ]


def show_cost(cost: Cost, tokens_per_s: float | None = None) -> None:
    """Print a cost: the summary, and where it comes from."""
    print("\n".join(summary(cost, tokens_per_s)))
    console = Console()
    by_source = Table("source layers", "targets of each", "parameters of each")
    for (targets, parameters), alike in groupby(cost.sources, key=lambda source: source[1:]):
        by_source.add_row(spell_layers(tuple(layer for layer, _, _ in alike)), f"{targets}", f"{parameters:,}")
    held = Table("memory of a device", "bytes", "")
    for name, number in (cost.memory | {"sum": sum(cost.memory.values())}).items():
        held.add_row(name, f"{number:,}", size(number))
    step = Table("a step on a device", "FLOP", "bytes once", "no cache", "time once", "no cache")
    for part in cost.parts:
        seconds = [duration(part.seconds(cost.rates, no_cache)) for no_cache in (False, True)]
        step.add_row(part.name, count(part.flops), size(part.once), size(part.no_cache), *seconds)
    step.add_row("sum", "", "", "", *(duration(cost.step_seconds(no_cache)) for no_cache in (False, True)))
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
