"""Where in a decoder layer the sites are: found by watching one batch go through, and verified by arithmetic.

No table of families. On the first batch every module inside a layer is watched. The module whose *output* is the
MLP's input is the norm, and its input is `resid_mid`; without one (post-norm layers) the MLP's own input is. What
the layer adds to the residual stream is either the MLP's own output or, where a module takes that output as its
input (`post_feedforward_layernorm` in Gemma 2 and 3), the output of that module. Whichever it is, it must satisfy

    layer output == resid_mid + mlp_out

bit for bit in the model's own dtype: the same two tensors added by the same operation. An implementation that
fuses or reorders the sum is let through only if what is left over is below TOLERANCE of what the MLP wrote, never
of the residual stream, whose rounding (bfloat16: 0.4 %) could hide a missing factor. Anything else (gates, scales,
attention and MLP in parallel, in-place updates) is refused with the reason.

Features that a family adds *between* layers (qwen3_vl's deepstack, after the first layers, in the text model's
loop) leave the identity intact; they are seen as a layer whose input is not the previous layer's output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cltjax.errors import UserError

SITES = ("mlp_in", "resid_mid", "resid_pre")
TOLERANCE = 1e-3  # norm of (layer output - resid_mid - mlp_out) over norm of mlp_out, where the sum is not bit-equal


@dataclass(frozen=True)
class Patterns:
    """Names of the modules, for models whose layers or MLPs are not where they usually are.

    Each is matched part by part between the dots, so `*` never crosses a dot (`model.layers.*`, `*.blocks.?`).
    """

    layers: str = ""
    """Decoder layers, from the model's root, e.g. model.language_model.layers.*; empty: get_decoder().layers."""
    mlp: str = "mlp"
    """The MLP, from its layer."""
    norm: str = ""
    """The module whose input is resid_mid, from its layer; empty: found on the first batch."""
    write: str = ""
    """The module whose output is added to the residual stream, from its layer; empty: found on the first batch."""


@dataclass(frozen=True)
class Tap:
    """One tensor of the forward pass: what `module` receives or what it returns."""

    module: nn.Module
    output: bool = False


@dataclass(frozen=True)
class LayerSites:
    """The taps of one decoder layer, verified."""

    mlp_in: Tap
    resid_mid: Tap
    resid_pre: Tap
    mlp_out: Tap


def find_layers(model: nn.Module, patterns: Patterns) -> list[nn.Module]:
    """The decoder layers, in order. Raises UserError if there are none."""
    if patterns.layers:
        layers = _matching(model, patterns.layers)
        if not layers:
            some = ", ".join(name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("0", "00"))
            raise UserError(f"no module matches the layer pattern '{patterns.layers}' (first items of lists: {some})")
        return layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # pyright: ignore[reportCallIssue]
    if decoder is not None and not hasattr(decoder, "layers"):
        decoder = getattr(decoder, "model", None)  # llama4: the decoder is a text model with a head of its own
    layers: Any = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UserError(
            f"{type(model).__name__} has no get_decoder().layers: say where its text layers are with a layer pattern"
        )
    return list(layers)


def find_mlps(layers: Sequence[nn.Module], patterns: Patterns) -> list[nn.Module]:
    """The one MLP of each layer. Raises UserError for a layer with none or several."""
    return [_one(layer, patterns.mlp, "MLP", number) for number, layer in enumerate(layers)]


def locate(
    layers: Sequence[nn.Module], patterns: Patterns, rows: Tensor, run: Callable[[], object]
) -> tuple[list[LayerSites], tuple[int, ...]]:
    """Watch `run()` (one forward pass) and return the verified sites of every layer.

    `rows` [B, P] is true at real tokens; what happens at padding is not judged. Second result: layers whose input
    is not the output of the layer before, so that something was added (or changed) between the two.
    Raises UserError for the first layer whose arithmetic is not the expected one.
    """
    mlps = find_mlps(layers, patterns)
    found: dict[int, LayerSites] = {}
    between: list[int] = []
    calls: list[_Call] = []
    previous: Tensor | None = None

    def entering(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal previous
            calls.clear()
            entry = hidden_states_in(args, kwargs)
            if previous is not None and entry is not None:
                before, now = (_real(tensor, rows) for tensor in (previous, entry))
                if not torch.equal(before.to(now.device), now):
                    between.append(number)
            previous = None

        return hook

    def leaving(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            nonlocal previous
            if number in found:
                raise UserError(f"layer {number} runs more than once in a forward pass: its rows would be ambiguous")
            out = hidden_states_out(output)
            try:
                found[number] = _resolve(
                    layers[number], mlps[number], patterns, calls, hidden_states_in(args, kwargs), out, rows
                )
            except _UnverifiedError as reason:
                raise UserError(
                    f"layer {number} ({type(layers[number]).__name__}) cannot be captured: {reason}"
                ) from None
            previous = out
            calls.clear()

        return hook

    def watching(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append(_Call(module, hidden_states_in(args, kwargs), hidden_states_out(output)))

    with _hooks() as handles:
        for number, (layer, mlp) in enumerate(zip(layers, mlps, strict=True)):
            handles.append(layer.register_forward_pre_hook(entering(number), with_kwargs=True))
            inside = set(mlp.modules()) - {mlp}
            for module in layer.modules():
                if module is not layer and module not in inside:
                    handles.append(module.register_forward_hook(watching, with_kwargs=True))
            handles.append(layer.register_forward_hook(leaving(number), with_kwargs=True))
        run()
    for number, layer in enumerate(layers):
        if number not in found:
            raise UserError(
                f"layer {number} ({type(layer).__name__}) cannot be captured: it did not run on the first batch"
            )
    return [found[number] for number in range(len(layers))], tuple(between)


def record(taps: Sequence[Tap], run: Callable[[], object]) -> list[Tensor]:
    """The tensors at `taps` during `run()`, not copied. RuntimeError where a tap was passed other than once."""
    seen: list[list[Tensor]] = [[] for _ in taps]

    def receive(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensor = hidden_states_in(args, kwargs)
            if tensor is not None:
                seen[index].append(tensor.detach())

        return hook

    def give(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            tensor = hidden_states_out(output)
            if tensor is not None:
                seen[index].append(tensor.detach())

        return hook

    with _hooks() as handles:
        for index, tap in enumerate(taps):
            if tap.output:
                handles.append(tap.module.register_forward_hook(give(index)))
            else:
                handles.append(tap.module.register_forward_pre_hook(receive(index), with_kwargs=True))
        run()
    for tap, tensors in zip(taps, seen, strict=True):
        if len(tensors) != 1:
            raise RuntimeError(f"{type(tap.module).__name__} ran {len(tensors)} times in one forward pass, not once")
    return [tensors[0] for tensors in seen]


class _UnverifiedError(Exception):
    """Why a layer's arithmetic is not resid_mid + mlp_out."""


class _Call:
    """One module's call inside a layer: what it received and returned, and whether either is later overwritten."""

    def __init__(self, module: nn.Module, received: Tensor | None, returned: Tensor | None):
        self.module, self.received, self.returned = module, received, returned
        self.versions = [_version(received), _version(returned)]

    def overwritten(self) -> bool:
        return self.versions != [_version(self.received), _version(self.returned)]


def _resolve(
    layer: nn.Module,
    mlp: nn.Module,
    patterns: Patterns,
    calls: list[_Call],
    entry: Tensor | None,
    out: Tensor | None,
    rows: Tensor,
) -> LayerSites:
    """The taps of one layer from the calls seen between its `entry` and `out`; raises _UnverifiedError."""
    runs = [call for call in calls if call.module is mlp]
    if len(runs) != 1:
        raise _UnverifiedError(f"its MLP ran {len(runs)} times in one pass")
    (own,) = runs
    if own.received is None or own.returned is None or out is None:
        raise _UnverifiedError("its MLP or the layer itself takes or returns no hidden states")
    if own.returned.numel() != out.numel() or own.received.numel() != out.numel():
        raise _UnverifiedError(f"its MLP works on {tuple(own.received.shape)}, not on every token {tuple(out.shape)}")

    norms = [(tap, tensor) for tap, tensor in _norms(layer, patterns, calls, own) if tensor.numel() == out.numel()]
    writes = [(tap, tensor) for tap, tensor in _writes(layer, patterns, calls, own) if tensor.numel() == out.numel()]
    if not norms or not writes:
        what = f"norm '{patterns.norm}'" if not norms else f"write '{patterns.write}'"
        raise _UnverifiedError(f"the module of pattern {what} did not run, or not on every token")
    for resid_mid, before in norms:
        for mlp_out, write in writes:
            if _misfit(before, write, out, rows) is None:
                return LayerSites(Tap(mlp), resid_mid, Tap(layer), mlp_out)
    reason = str(_misfit(norms[0][1], writes[-1][1], out, rows))
    inside = {*mlp.parameters()}
    gates = [name for name, value in layer.named_parameters() if "gate" in name.split(".")[-1] and value not in inside]
    if gates:
        reason = f"{reason}; it has gates of its own ({', '.join(gates)})"
    if len(norms) > 1 and _same(norms[0][1], entry):
        reason = f"{reason}; its MLP reads what the layer starts from: attention and MLP run side by side"
    if any(call.overwritten() for call in calls):
        reason = f"{reason}; it overwrites activations in place"
    raise _UnverifiedError(reason)


def _norms(layer: nn.Module, patterns: Patterns, calls: list[_Call], own: _Call) -> list[tuple[Tap, Tensor]]:
    """Candidates for resid_mid: the input of what made the MLP's input, else (post-norm layers) that input itself."""
    assert own.received is not None
    if patterns.norm:
        norm = _one(layer, patterns.norm, "norm", None)
        return [(Tap(norm), call.received) for call in calls if call.module is norm and call.received is not None]
    found = [
        (Tap(call.module), call.received)
        for call in calls
        if call is not own and call.received is not None and _same(call.returned, own.received)
    ]
    return [*found, (Tap(own.module), own.received)]


def _writes(layer: nn.Module, patterns: Patterns, calls: list[_Call], own: _Call) -> list[tuple[Tap, Tensor]]:
    """Candidates for mlp_out: the MLP's output, then what each module down the line makes of it."""
    assert own.returned is not None
    if patterns.write:
        module = _one(layer, patterns.write, "write", None)
        runs = [call for call in calls if call.module is module]
        return [(Tap(module, True), call.returned) for call in runs if call.returned is not None]
    chain = [(Tap(own.module, True), own.returned)]
    for call in calls[calls.index(own) + 1 :]:
        current = chain[-1][1]
        if call.returned is None or call.returned.numel() != current.numel() or _same(call.returned, current):
            continue
        if _same(call.received, current):
            chain.append((Tap(call.module, True), call.returned))
    return chain


def _misfit(before: Tensor, write: Tensor, out: Tensor, rows: Tensor) -> str | None:
    """Why `out` is not before + write at the real rows; None where it is."""
    before, write, out = (_real(tensor, rows) for tensor in (before, write, out))
    if torch.equal((before + write).to(out.dtype), out):
        return None
    if not bool(torch.isfinite(out).all()):
        return f"its output is not finite in {str(out.dtype).removeprefix('torch.')}"
    written = write.double()
    change = out.double() - before.double()
    size = float(written.norm())
    left = float((change - written).norm()) / size if size > 0 else float("inf")
    if left <= TOLERANCE:
        return None
    slope = float((change * written).sum()) / size**2 if size > 0 else float("nan")
    return (
        f"its output is not resid_mid + what its MLP writes (off by {left:.2g} of the MLP's size; "
        f"the MLP enters with factor {slope:.3g})"
    )


def _real(tensor: Tensor, rows: Tensor) -> Tensor:
    """[B, P, D] or [B*P, D] at the real tokens: [n, D]."""
    return tensor.detach().reshape(rows.numel(), -1)[rows.reshape(-1).to(tensor.device)]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same memory, whole (a view in another shape counts)."""
    if one is None or other is None:
        return False
    return one is other or (
        one.numel() > 0
        and one.numel() == other.numel()
        and one.dtype == other.dtype
        and one.device == other.device
        and one.data_ptr() == other.data_ptr()
    )


def hidden_states_in(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden states among a module's arguments: the first floating tensor, by position, then by name."""
    named = [kwargs[name] for name in ("hidden_states", "x") if name in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def hidden_states_out(output: Any) -> Tensor | None:
    """The hidden states among what a module returned: itself or its first item (the rest: router logits, weights)."""
    first = next(iter(output.values()), None) if isinstance(output, dict) else output
    if isinstance(first, (tuple, list)):
        first = first[0] if first else None
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def with_hidden_states(output: Any, tensor: Tensor) -> Any:
    """A module's output with other hidden states (where `hidden_states_out` reads them), the rest of it as it is."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, dict):
        first = next(iter(output))
        return type(output)({**output, first: with_hidden_states(output[first], tensor)})
    items = [with_hidden_states(output[0], tensor), *output[1:]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _matching(root: nn.Module, pattern: str) -> list[nn.Module]:
    parts = pattern.split(".")
    return [
        module
        for name, module in root.named_modules()
        if name
        and len(names := name.split(".")) == len(parts)
        and all(fnmatchcase(name, part) for name, part in zip(names, parts, strict=True))
    ]


def _one(layer: nn.Module, pattern: str, what: str, number: int | None) -> nn.Module:
    found = _matching(layer, pattern)
    if len(found) != 1:
        where = type(layer).__name__ if number is None else f"layer {number} ({type(layer).__name__})"
        children = ", ".join(name for name, _ in layer.named_children())
        raise UserError(
            f"{where}: {len(found)} of its modules match the {what} pattern '{pattern}', not one: {children}"
        )
    return found[0]


@contextmanager
def _hooks() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
