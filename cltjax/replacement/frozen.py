"""Attention patterns and norm scales of one pass, held while the model runs again: it is then linear between its MLPs.

    frozen = record(vlm, batch)              the original model's, unless something else is active
    with frozen.replayed():
        vlm.model(**batch)                   another run of this batch, with other MLP writes or embeddings

A pattern is what attention makes of values, after soft caps, sinks, windows, masks and the softmax; a scale is
1 / sqrt(mean x^2 + eps), of a LayerNorm with x less its mean (taking the mean off is linear, and stays live). While
they are replayed queries, keys and scales get no gradient; value and output projections and norm weights act as ever
(circuit-tracer and Anthropic's "Circuit Tracing", 2025, "local replacement model", freeze the same).

No table of families. Attention: a function registered with transformers takes the place of the text layers' own one,
which it still calls. That function is linear in its values, so the pattern is what it makes of the identity, a head's
width at a time: whatever the implementation (eager, sdpa, flash) computes is what is recorded. The vision tower
keeps its own. Norms: any module without parts and with no more than vectors for parameters, outside of the MLPs, whose
answers to probes are those of weight x scale + bias, and whose answer to its real input is too. Norms *behind* an MLP
(Gemma's post_feedforward_layernorm) belong to what it writes, and stay as they are.

Whether this is all that depends on the residual stream is tried on the first batch of a model: without MLP writes the
tower has to be linear in its embeddings; a family that has, say, gates on its attention is refused.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from capture.sites import hidden_states_in, hidden_states_out, with_hidden_states
from capture.vlm import VLM
from cltjax.errors import UserError

PREFIX = "cltjax_frozen_"  # before the name of the attention implementation that is called in its place
FAR, NEAR = 1e3, 1e-4  # root mean square of probes: where eps is nothing, and where it is most of it

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""transformers' form: (module, query, key, value, mask, ...) to (output [B, P, heads, d], weights or None)."""

_acting: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()
_proved: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that are linear once frozen


@dataclass(frozen=True)
class Norm:
    """What a norm computes: (x - mean x, or x) / sqrt(mean square of it + eps) x weight + bias; weight, bias [n]."""

    centred: bool
    weight: Tensor
    bias: Tensor
    eps: float

    def scale(self, x: Tensor) -> Tensor:
        """[..., 1] of x [..., n], in float32 or better."""
        return (self._about(x).pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    def apply(self, x: Tensor, scale: Tensor) -> Tensor:
        """x [..., n] normed by that scale, in the type of x."""
        about = self._about(x)
        # scale x weight first: gradients, of which there are many, are then multiplied once
        return (about * (scale * self.weight.to(about.dtype)) + self.bias.to(about.dtype)).to(x.dtype)

    def _about(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass
class Frozen:
    """Patterns and scales of one batch, detached, on the devices of their layers.

    patterns: [B, heads, P, P] by layer, in the model's type: 4 B heads P^2 bytes a layer in float32. scales: by norm,
    [..., 1] for each time that it runs in a pass.
    """

    vlm: VLM
    ids: Tensor  # [B, P]
    patterns: dict[int, Tensor] = field(default_factory=dict)
    norms: dict[nn.Module, Norm] = field(default_factory=dict)
    scales: dict[nn.Module, list[Tensor]] = field(default_factory=dict)

    def repeated(self, n: int) -> "Frozen":
        """Of a batch of one, as of n of it, in the memory of one."""
        assert len(self.ids) == 1

        def spread(scale: Tensor) -> Tensor:  # [1, P, ...], or [P, ...] where a norm sees tokens side by side
            return scale.expand(n, *scale.shape[1:]) if len(scale) == 1 else scale.repeat(n, *[1] * (scale.dim() - 1))

        patterns = {layer: pattern.expand(n, *pattern.shape[1:]) for layer, pattern in self.patterns.items()}
        scales = {norm: [spread(one) for one in some] for norm, some in self.scales.items()}
        return Frozen(self.vlm, self.ids.expand(n, -1), patterns, self.norms, scales)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it whatever runs the VLM on this batch uses these patterns and scales; gradients pass.

        UserError for a batch of another shape or of other tokens: also for tokens being generated, which have none.
        RuntimeError where the VLM is frozen already.
        """
        passed: dict[nn.Module, int] = {}

        def tokens(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ids = arguments(module, args, kwargs).get("input_ids")
            if ids is not None:
                self._check(tuple(ids.shape))
                if not torch.equal(ids, self.ids.to(ids.device)):
                    raise UserError(f"{self.vlm.name} is frozen on other tokens than these: record this batch")

        def begin(x: Tensor) -> None:
            self._check(tuple(x.shape[:2]))
            passed.clear()

        def attend(layer: int, own: Attend, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            pattern = self.patterns[layer]
            return mixed(pattern, args[2] if len(args) > 2 else kwargs["value"]), pattern

        def norm(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
            number = passed[module] = passed.get(module, -1) + 1
            return self.norms[module].apply(x, self.scales[module][number])

        with ExitStack() as stack:
            stack.enter_context(_intercepted(self.vlm, begin, attend, list(self.norms), norm))
            handle = self.vlm.base.register_forward_pre_hook(tokens, with_kwargs=True)
            stack.callback(handle.remove)
            yield

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape != tuple(self.ids.shape):
            raise UserError(
                f"{self.vlm.name} is frozen on a batch of {self.ids.shape[0]} x {self.ids.shape[1]} tokens, not of "
                f"{' x '.join(map(str, shape))}: record this one (tokens being generated have no pattern to record)"
            )


def record(vlm: VLM, batch: Mapping[str, Tensor]) -> Frozen:
    """Attention patterns and norm scales of one pass of a batch as `vlm.collate` makes it, padding included.

    UserError for models whose attention is not transformers' interface, and for those that freezing does not make
    linear: found out on the first batch, with three passes more. RuntimeError where the VLM is frozen already.
    """
    batch = vlm.collate([dict(batch)])
    if vlm.sites is None:
        vlm.verify(batch)
    frozen = Frozen(vlm, batch["input_ids"])
    real = _real(batch)

    def attend(
        layer: int, own: Attend, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if layer in frozen.patterns:
            raise UserError(f"{vlm.name} cannot be frozen: layer {layer} attends more than once")
        output, weights = own(module, query, key, value, mask, **kwargs)
        pattern = pattern_of(lambda other: own(module, query, key, other, mask, **kwargs)[0], value)
        if not _misfit(mixed(pattern, value)[real], output[real]) <= _tolerance(output.dtype):
            raise UserError(f"{vlm.name} cannot be frozen: attention of layer {layer} is no fixed mixture of values")
        frozen.patterns[layer] = pattern
        return output, weights

    def norm(module: nn.Module, x: Tensor, output: Tensor) -> None:
        found = frozen.norms.get(module) or find_norm(module, x, output)
        if found is not None:
            frozen.norms[module] = found
            frozen.scales.setdefault(module, []).append(found.scale(x))

    with _intercepted(vlm, lambda x: None, attend, _simple(vlm), norm):
        vlm.forward(batch)
    if missing := [layer for layer in range(vlm.n_layers) if layer not in frozen.patterns]:
        raise UserError(
            f"{vlm.name} cannot be frozen: its layers {missing} mix tokens by something else than an attention "
            "function of transformers' interface"
        )
    if vlm.model not in _proved:
        _prove(frozen, batch, real)
        _proved.add(vlm.model)
    return frozen


@contextmanager
def written(vlm: VLM, write: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within it each layer's MLP writes write(layer, own) in place of its own [B, P, D] or [B * P, D]; any gradient
    passes. The sites are known (`vlm.verify`)."""
    assert vlm.sites is not None

    def hook(layer: int) -> Callable[..., Any]:
        def writing(module: nn.Module, args: tuple, output: Any) -> Any:
            own = hidden_states_out(output)
            return None if own is None else with_hidden_states(output, write(layer, own))

        return writing

    with ExitStack() as stack:
        for layer, sites in enumerate(vlm.sites):
            stack.callback(sites.mlp_out.module.register_forward_hook(hook(layer)).remove)
        yield


@contextmanager
def entered(vlm: VLM, enter: Callable[[Tensor], Tensor], layer: int = 0) -> Iterator[None]:
    """Within it a layer starts from enter(own), own [B, P, D]: to the first, the embeddings of words and images."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        own = hidden_states_in(args, kwargs)
        assert own is not None
        new = enter(own)
        return tuple(new if one is own else one for one in args), {
            name: new if one is own else one for name, one in kwargs.items()
        }

    handle = vlm.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward is called with, by name."""
    return inspect.signature(module.forward).bind_partial(*args).arguments | kwargs


# Attention ---------------------------------------------------------------------------------------------------


def mixed(pattern: Tensor, value: Tensor) -> Tensor:
    """Values [B, kv heads, P, d] by a pattern [B, heads, P, P]: [B, P, heads, d]. Neighbours share a kv head."""
    samples, heads, length, _ = pattern.shape
    shared = pattern.to(value.dtype).reshape(samples, value.shape[1], -1, length)
    if samples == 1 and value.requires_grad:  # head by head: gradients batched over many nodes share the pattern then
        mixture = torch.stack([one @ other for one, other in zip(shared[0], value[0], strict=True)])
    else:
        mixture = shared @ value
    return mixture.reshape(samples, heads, length, -1).transpose(1, 2).contiguous()


def pattern_of(attend: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """[B, heads, P, P] of an attention function that is linear in its values, which are [B, kv heads, P, d]."""
    length, width = value.shape[-2:]
    parts = []
    for first in range(0, length, width):
        columns = torch.zeros(length, width, dtype=value.dtype, device=value.device)
        last = min(first + width, length)
        columns[torch.arange(first, last), torch.arange(last - first)] = 1
        parts.append(attend(columns.expand(value.shape).contiguous())[..., : last - first])
    return torch.cat(parts, -1).transpose(1, 2).contiguous()


def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What is registered with transformers: of a module that is being recorded or replayed, that; of others, its own.

    The name it is registered by says which its own is.
    """
    name = _implementation(module.config).removeprefix(PREFIX)
    forward = inspect.unwrap(type(module).forward)
    names = forward.__globals__  # where its family keeps an eager function, and maybe an interface, of its own
    own = names["eager_attention_forward"] if name == "eager" else names["ALL_ATTENTION_FUNCTIONS"][name]
    act = _acting.get(module)
    return own(module, *args, **kwargs) if act is None else act(own, module, *args, **kwargs)


@contextmanager
def _attending(vlm: VLM, attend: Callable[..., Any]) -> Iterator[None]:
    """attend(layer, own function, module, ...) takes the place of the text layers' attention functions."""
    modules = [(number, module) for number, layer in enumerate(vlm.layers) for module in layer.modules()]
    configs: list[Any] = [module.config for _, module in modules if hasattr(module, "config")]
    if hasattr(vlm.config, "get_text_config"):  # the one that masks are made by
        configs.append(vlm.config.get_text_config(decoder=True))
    own = {id(config): (config, _implementation(config)) for config in configs if _implementation(config)}
    if any(name.startswith(PREFIX) for _, name in own.values()):
        raise RuntimeError(f"{vlm.name} is frozen already")
    try:
        for config, name in own.values():
            ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, attention)
            if name in ALL_MASK_ATTENTION_FUNCTIONS:  # the masks that the own function wants
                ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
            config._attn_implementation = PREFIX + name
        for number, module in modules:
            _acting[module] = partial(attend, number)
        yield
    finally:
        for config, name in own.values():
            config._attn_implementation = name
        for _, module in modules:
            _acting.pop(module, None)


def _implementation(config: Any) -> str:
    """The name of a config's attention implementation; empty where it has none."""
    return getattr(config, "_attn_implementation", None) or ""


# Norms -------------------------------------------------------------------------------------------------------


def find_norm(module: nn.Module, x: Tensor, output: Tensor) -> Norm | None:
    """The norm that a module is, by its answers to probes and by its real input x and output [..., n]; else None."""
    n = x.shape[-1]
    if x.shape != output.shape or n < 3:
        return None
    probe = torch.ones(n, dtype=torch.float64, device=x.device)
    probe[1::2] = -1
    if n % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    probe /= probe.pow(2).mean().sqrt()  # of mean 0 and mean square 1: the same to both kinds of norm
    double = {
        f"module.{name}": value.double()
        for name, value in (*module.named_parameters(), *module.named_buffers())
        if value.is_floating_point()
    }

    def answer(given: Tensor) -> Tensor:
        shaped = given.reshape(*[1] * (x.dim() - 1), n)
        return functional_call(_Bare(module), double, (shaped,)).double().reshape(n)

    above, below = answer(FAR * probe), answer(-FAR * probe)
    slope, bias = (above - below) / 2, (above + below) / 2
    size = slope.norm()
    if not size > 0 or not _misfit(answer(2 * FAR * probe), above) <= 1e-4:
        return None  # a norm does not care how large its input is
    near = (answer(NEAR * probe) - answer(-NEAR * probe)) / 2
    scale = near @ slope / size**2 / NEAR
    eps = max(0.0, float(scale**-2 - NEAR**2))
    kinds = [Norm(centred, slope / probe, bias, eps) for centred in (False, True)]
    misfits = [_misfit(norm.apply(x, norm.scale(x)), output) for norm in kinds]
    best = 0 if misfits[0] <= misfits[1] else 1
    return kinds[best] if misfits[best] <= _tolerance(output.dtype) else None


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward(x)


def _simple(vlm: VLM) -> list[nn.Module]:
    """The modules that may be norms: without parts, and with vectors for parameters."""
    return [
        module
        for module in vlm.model.modules()
        if next(module.children(), None) is None and all(parameter.dim() < 2 for parameter in module.parameters())
    ]


# A pass ------------------------------------------------------------------------------------------------------


@contextmanager
def _intercepted(
    vlm: VLM,
    begin: Callable[[Tensor], None],
    attend: Callable[..., Any],
    modules: Sequence[nn.Module],
    norm: Callable[[nn.Module, Tensor, Tensor], Tensor | None],
) -> Iterator[None]:
    """begin(x) where the first layer starts from x; attend as in `_attending`; norm(module, x, output) whenever one of
    the modules makes one tensor of one other, after that and outside of what MLPs write: it may give another output."""
    assert vlm.sites is not None
    outside = False

    def entering(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal outside
        x = hidden_states_in(args, kwargs)
        assert x is not None
        begin(x)
        outside = True

    def writing(module: nn.Module, args: tuple) -> None:
        nonlocal outside
        outside = False

    def leaving(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal outside
        outside = True

    def called(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor | None:
        given = (*args, *kwargs.values())
        if not outside or len(given) != 1 or not isinstance(output, Tensor):
            return None
        x = hidden_states_in(args, kwargs)
        return None if x is None else norm(module, x, output)

    with _attending(vlm, attend), ExitStack() as stack:
        hold = [vlm.layers[0].register_forward_pre_hook(entering, with_kwargs=True)]
        hold += [sites.mlp_in.module.register_forward_pre_hook(writing) for sites in vlm.sites]
        # before other hooks, which are to see the outputs that count
        hold += [module.register_forward_hook(called, with_kwargs=True, prepend=True) for module in modules]
        hold += [layer.register_forward_hook(leaving) for layer in vlm.layers]
        for handle in hold:
            stack.callback(handle.remove)
        yield


# Proof -------------------------------------------------------------------------------------------------------


def _prove(frozen: Frozen, batch: Mapping[str, Tensor], real: Tensor) -> None:
    """UserError unless the frozen tower without MLP writes is linear in its embeddings, up to a constant."""
    vlm, seen = frozen.vlm, []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        out = hidden_states_out(output)
        assert out is not None
        seen.append((out[real] if out.shape[:2] == real.shape else out).double())

    # 0, 1 and 2 times the embeddings: -1 would not tell a norm, which is odd, from what is linear
    with frozen.replayed(), written(vlm, lambda layer, own: torch.zeros_like(own)), ExitStack() as stack:
        stack.callback(vlm.base.register_forward_hook(keep).remove)
        for factor in (0, 1, 2):
            with entered(vlm, lambda own, factor=factor: factor * own):
                vlm.forward(batch)
    none, once, twice = seen
    off = _misfit(twice - once, once - none)
    if not off <= 10 * _tolerance(vlm.dtype):
        raise UserError(
            f"{vlm.name} cannot be frozen: with attention patterns and norm scales held its residual stream is still "
            f"not linear in the embeddings (off by {off:.2g}); something else in its layers depends on it"
        )


def _real(batch: Mapping[str, Tensor]) -> Tensor:
    """[B, P], true at tokens that are not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _misfit(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over norm of the other."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def _tolerance(dtype: torch.dtype) -> float:
    """Of a misfit, by the type that it was computed in."""
    return 1e-4 if torch.finfo(dtype).eps < 1e-6 else 2e-2
