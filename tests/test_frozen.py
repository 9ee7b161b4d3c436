"""cltjax/replacement/frozen.py: what is replayed is what the model did, and all that is left is linear."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capture.sites import Patterns, hidden_states_in
from capture.vlm import VLM, wrap
from cltjax.errors import UserError
from cltjax.replacement import frozen as module_under_test
from cltjax.replacement.clt import CLT
from cltjax.replacement.frozen import Frozen, entered, find_norm, mixed, pattern_of, record, written
from cltjax.replacement.interventions import Intervention
from cltjax.replacement.model import AblatedModel, ReplacementModel, SteeredModel
from families import FAMILIES, LLAMA4, processor
from test_replacement import close, exact_clt, original, random_clt, real_rows, without_images
from test_vlm import _custom

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [*FAMILIES, "llama4"]


def fresh(name: str) -> VLM:
    family = LLAMA4 if name == "llama4" else FAMILIES[name]
    return wrap(family.model(), processor(), name, patterns=Patterns(mlp="feed_forward" if name == "llama4" else "mlp"))


@functools.cache
def shared(name: str) -> VLM:
    return fresh(name)


@functools.cache
def recorded(name: str) -> tuple[VLM, dict[str, Tensor], Frozen]:
    """Three samples with images, padded on the left."""
    vlm = shared(name)
    batch = vlm.collate((LLAMA4 if name == "llama4" else FAMILIES[name]).samples(), side="left")
    return vlm, batch, record(vlm, batch)


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> "Case":
    return recorded(request.param)


Case = tuple[VLM, dict[str, Tensor], Frozen]


def logits_of(vlm: VLM, batch: dict[str, Tensor]) -> Tensor:
    """[n, V] at the real tokens before any soft cap; with gradients."""
    seen: list[Tensor] = []
    root: Any = vlm.model
    head = root.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        root(**batch, use_cache=False)
    finally:
        handle.remove()
    return real_rows(batch, seen[0])


def traces(vlm: VLM) -> tuple[Any, ...]:
    """All that freezing changes: this project's hooks (transformers has some of its own), attention functions."""
    modules = list(vlm.model.modules())
    found = [hook for one in modules for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())]
    hooks = sum(getattr(hook, "func", hook).__module__.startswith(("cltjax", "capture")) for hook in found)
    named: list[Any] = [one.config for one in modules if hasattr(one, "config")]
    configs = [config._attn_implementation for config in named]
    return hooks, configs, len(module_under_test._acting)


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def noise(like: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


# What is recorded, and replayed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_replayed_it_is_the_vlm(name: str) -> None:
    family, vlm = LLAMA4 if name == "llama4" else FAMILIES[name], shared(name)
    words = without_images(family)
    for samples, side in ((family.samples(), "left"), (family.samples()[1:2], "right"), (words, "right")):
        batch = vlm.collate(samples, side)  # pyright: ignore[reportArgumentType]
        before, expected = traces(vlm), real_rows(batch, original(vlm, batch))
        frozen = record(vlm, batch)
        with frozen.replayed():
            assert traces(vlm) != before
            for _ in range(2):  # a second pass starts again
                assert off(real_rows(batch, original(vlm, batch)), expected) <= 1e-5
        assert traces(vlm) == before and torch.equal(real_rows(batch, original(vlm, batch)), expected)
        real = batch["attention_mask"].bool()
        for pattern in frozen.patterns.values():  # of real tokens, over real tokens
            rows = pattern.transpose(1, 2)[real]
            assert (rows.sum(-1) - 1).abs().max() <= 1e-5 and rows.min() >= 0
            assert not (pattern * ~real[:, None, None]).transpose(1, 2)[real].any()


def test_patterns_are_those_that_the_family_gives_out(case: Case) -> None:
    vlm, batch, frozen = case
    found = frozen.patterns
    eager: Any = fresh(vlm.name).model
    eager.config.get_text_config(decoder=True)._attn_implementation = "eager"
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True, use_cache=False).attentions
    assert sorted(found) == list(range(len(expected))) == [0, 1, 2]
    for layer, pattern in enumerate(expected):
        assert pattern.shape[1] > 1
        assert off(*(real_rows(batch, one.transpose(1, 2)) for one in (found[layer], pattern))) <= 1e-5


def test_other_writes_leave_them_as_they_were(case: Case) -> None:
    """What a norm does to each number, y / x, is the same whatever comes in; free, it is not."""
    vlm, batch, frozen = case
    ablated = AblatedModel(vlm, {layer: torch.linspace(-1, 1 + layer, vlm.d_model) for layer in range(3)})

    def gains() -> list[Tensor]:
        mid, entering = (vlm.trace(batch, site, range(3)).site for site in ("resid_mid", "mlp_in"))
        return [real_rows(batch, y / x) for x, y in zip(mid, entering, strict=True)]

    expected = gains()
    with ablated.active():
        free = gains()
    with frozen.replayed(), ablated.active():
        held = gains()
    for layer in range(3):
        assert torch.allclose(held[layer], expected[layer], rtol=1e-3, atol=1e-5)
        assert layer == 0 or not torch.allclose(free[layer], expected[layer], rtol=1e-2)


def test_it_is_linear_between_its_mlps(case: Case) -> None:
    vlm, batch, frozen = case
    writes = vlm.trace(batch, "mlp_in", range(3)).mlp_out
    entry = vlm.trace(batch, "resid_pre", (0,)).site[0]
    direction = noise(entry) * entry.norm() / entry.numel() ** 0.5
    plain = real_rows(batch, original(vlm, batch))

    def bend() -> float:
        with torch.no_grad(), written(vlm, lambda layer, own: writes[layer].reshape(own.shape)):
            none, once, twice = (_entering(vlm, batch, factor * direction) for factor in (0, 1, 2))
            assert off(real_rows(batch, original(vlm, batch)), plain) <= 1e-5 and off(once, none) > 0.1
        return off(twice - none, 2 * (once - none))

    with frozen.replayed():
        assert bend() <= 1e-4
    assert vlm.sites and not any(sites.mlp_out.module in frozen.norms for sites in vlm.sites)  # part of the write
    with dataclasses.replace(frozen, norms={}).replayed():  # patterns alone
        assert bend() > 1e-2
    assert bend() > 1e-2


def _entering(vlm: VLM, batch: dict[str, Tensor], change: Tensor) -> Tensor:
    with entered(vlm, lambda own: own + change):
        return logits_of(vlm, batch)


def test_gradients_are_those_of_the_linear_map(case: Case) -> None:
    """f(x + d) - f(x) = J d, with J from one backward pass: through values alone, queries and keys have no part."""
    vlm, batch, frozen = case
    entry = vlm.trace(batch, "resid_pre", (0,)).site[0]
    change = noise(entry)
    entry.requires_grad_()
    with frozen.replayed(), written(vlm, lambda layer, own: torch.full_like(own, 0.1 * layer)):
        with entered(vlm, lambda own: entry):
            base = logits_of(vlm, batch)
        with torch.no_grad():
            effect = _entering(vlm, batch, change) - base
        (gradient,) = torch.autograd.grad((base * effect).sum(), entry)
    assert torch.allclose((gradient * change).sum(), effect.pow(2).sum(), rtol=1e-4) and effect.norm() > 1


# In the models -----------------------------------------------------------------------------------------------


def test_an_interventions_effect_is_the_linear_one(case: Case, tmp_path: Path) -> None:
    """Steered at layer 0, later MLPs held: the change of logits is the decoder's direction through the frozen map."""
    vlm, batch, frozen = case
    clt = random_clt(tmp_path / "clt", vlm)
    writes = vlm.trace(batch, "mlp_in", range(3)).mlp_out
    model = SteeredModel(vlm, clt, [Intervention(0, 4, "add", 3.0, [1, 3])], within=(0, 0))
    with written(vlm, lambda layer, own: own if layer == 0 else writes[layer].reshape(own.shape)):
        before = original(vlm, batch)
        changed = {
            freeze: _uncapped(vlm, lambda freeze=freeze: model.forward(batch, freeze=freeze))
            for freeze in (True, False)
        }
        given = _uncapped(vlm, lambda: model.forward(batch, freeze=frozen))
        assert torch.equal(before, original(vlm, batch))
    assert off(given, changed[True]) <= 1e-5
    plain = logits_of(vlm, batch)
    where = torch.isin(batch["attention_mask"].cumsum(1) - 1, torch.tensor([1, 3])) & batch["attention_mask"].bool()
    direction = where[..., None] * clt.decoder_rows(0, torch.tensor([4]))[0, 0]
    size = torch.zeros((), requires_grad=True)

    def write(layer: int, own: Tensor) -> Tensor:
        return (writes[layer] + size * direction if layer == 0 else writes[layer]).reshape(own.shape)

    with frozen.replayed(), written(vlm, write):
        linear = logits_of(vlm, batch)
    effects = {freeze: real_rows(batch, one) - plain for freeze, one in changed.items()}
    (slope,) = torch.autograd.grad((linear * effects[True]).sum(), size)
    assert torch.allclose(3 * slope, effects[True].pow(2).sum(), rtol=1e-4)
    assert off(effects[False], effects[True]) > 0.02


def _uncapped(vlm: VLM, run: Callable[[], Tensor]) -> Tensor:
    seen: list[Tensor] = []
    root: Any = vlm.model
    handle = root.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(output))
    run()
    handle.remove()
    return seen[-1]


def test_features_are_those_of_the_frozen_stream(case: Case, tmp_path: Path) -> None:
    vlm, batch, frozen = case
    clt = random_clt(tmp_path / "clt", vlm)
    model = ReplacementModel(vlm, clt)
    found, free = model.features(batch, freeze=True), model.features(batch)
    with frozen.replayed(), model.active():
        trace = vlm.trace(batch, "mlp_in", range(3))
    for source in range(3):
        again = clt.encode(source, trace.site[source])
        assert torch.equal(found[source].indices, again.indices) and torch.equal(found[source].values, again.values)
        assert close(real_rows(batch, found[source].values), real_rows(batch, free[source].values), 1e-5) == (
            source == 0
        )
    assert torch.equal(model.forward(batch, freeze=True), model.forward(batch, freeze=frozen))
    assert not close(real_rows(batch, model.forward(batch)), real_rows(batch, model.forward(batch, freeze=True)), 1e-3)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_an_exact_clt_frozen_is_the_vlm(name: str, tmp_path: Path) -> None:
    vlm, family = shared(name), FAMILIES[name]
    batch = vlm.collate(family.samples())
    model = ReplacementModel(vlm, exact_clt(tmp_path / "clt", vlm, batch, "mlp_in", (0, 1, 2)))
    assert close(real_rows(batch, model.forward(batch, freeze=True)), real_rows(batch, original(vlm, batch)))


def test_ablation_and_layers_take_it_too() -> None:
    vlm = shared("llava")
    batch = vlm.collate(FAMILIES["llava"].samples())
    model = AblatedModel(vlm, {layer: torch.ones(vlm.d_model) for layer in range(3)})
    some = [model.forward(batch, layers, freeze) for layers in ((0,), None) for freeze in (False, True)]
    assert not any(torch.equal(one, other) for i, one in enumerate(some) for other in some[:i])
    assert close(model.forward(batch, (), freeze=True), original(vlm, batch), 1e-5)


def test_the_type_of_the_model_is_kept() -> None:
    vlm = wrap(FAMILIES["gemma3"].model().to(torch.bfloat16), processor(), "gemma3")
    batch = vlm.collate(FAMILIES["gemma3"].samples())
    frozen = record(vlm, batch)
    with frozen.replayed():
        replayed = original(vlm, batch)
    assert replayed.dtype == frozen.patterns[0].dtype == torch.bfloat16
    assert off(real_rows(batch, replayed).float(), real_rows(batch, original(vlm, batch)).float()) < 0.03


# Nothing is left behind --------------------------------------------------------------------------------------


def test_it_is_restored_after_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = fresh("qwen3_vl")
    batch = vlm.collate(FAMILIES["qwen3_vl"].samples())
    clt = random_clt(tmp_path / "clt", vlm)
    model = ReplacementModel(vlm, clt)
    before, expected = traces(vlm), original(vlm, batch)

    def failing(*args: Any) -> Tensor:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(CLT, "decode", failing)
        for call in (model.forward, model.features):
            with pytest.raises(MemoryError):
                call(batch, freeze=True)
            assert traces(vlm) == before
    with monkeypatch.context() as patched:
        patched.setattr(module_under_test, "pattern_of", failing)
        with pytest.raises(MemoryError):
            record(vlm, batch)
        assert traces(vlm) == before
    with pytest.raises(KeyError), record(vlm, batch).replayed():
        raise KeyError
    assert traces(vlm) == before and torch.equal(original(vlm, batch), expected)


def test_the_vision_tower_keeps_its_own() -> None:
    vlm = fresh("llava")
    root: Any = vlm.model
    vision, text = root.config.vision_config, root.config.text_config
    vision._attn_implementation = "eager"
    with record(vlm, vlm.collate(FAMILIES["llava"].samples())).replayed():
        assert (vision._attn_implementation, text._attn_implementation) == ("eager", "cltjax_frozen_sdpa")
        other = shared("internvl")  # which is not frozen
        original(other, other.collate(FAMILIES["internvl"].samples()))
    assert (vision._attn_implementation, text._attn_implementation) == ("eager", "sdpa")


# Refusals ----------------------------------------------------------------------------------------------------


def test_another_batch_is_refused() -> None:
    vlm, family = shared("llava"), FAMILIES["llava"]
    samples = family.samples()
    batch = vlm.collate(samples, side="left")
    frozen = record(vlm, batch)
    model = AblatedModel(vlm, {1: torch.zeros(vlm.d_model)})
    with pytest.raises(UserError, match=r"frozen on a batch of 3 x 30 tokens, not of 2 x 30: record this one"):
        model.forward(vlm.collate(samples[:2]), freeze=frozen)
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, -1] += 1
    with pytest.raises(UserError, match="frozen on other tokens"):
        model.forward(changed, freeze=frozen)
    root: Any = vlm.model
    embeddings = torch.zeros(3, 29, vlm.d_model)
    with frozen.replayed():
        with pytest.raises(UserError, match="not of 3 x 29"), torch.no_grad():
            root.get_decoder()(inputs_embeds=embeddings)
        with pytest.raises(UserError, match=r"tokens being generated have no pattern"):
            vlm.generate(samples, 2)
        with pytest.raises(RuntimeError, match="llava is frozen already"):
            record(vlm, batch)
        with pytest.raises(RuntimeError, match="llava is frozen already"), frozen.replayed():
            pass
        assert off(real_rows(batch, original(vlm, batch)), real_rows(batch, original(fresh("llava"), batch))) < 1e-5
    other = shared("llava_next")
    with pytest.raises(UserError, match="are of llava, another model than llava_next"):
        AblatedModel(other, {1: torch.zeros(other.d_model)}).forward(batch, freeze=frozen)


def test_attention_that_is_not_transformers_is_refused() -> None:
    vlm, batch = _custom("plain")
    with pytest.raises(UserError, match=r"layers \[0, 1\] mix tokens by something else than an attention function"):
        record(vlm, batch)
    assert not any(one._forward_hooks for one in vlm.model.modules()) and not module_under_test._acting


def _gated(layer: Any) -> None:
    def hook(module: nn.Module, args: tuple, kwargs: Any, output: Any) -> Any:
        x = hidden_states_in(args, kwargs)
        assert x is not None
        return output[0] * torch.sigmoid(x), None

    layer.self_attn.register_forward_hook(hook, with_kwargs=True)


def _twice(layer: Any) -> None:
    whole = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **kwargs: (whole(*args, **kwargs)[0] + whole(*args, **kwargs)[0], None)


@pytest.mark.parametrize(
    ("alter", "said"), [(_gated, "still not linear in the embeddings"), (_twice, "layer 1 attends more than once")]
)
def test_what_freezing_does_not_make_linear_is_refused(alter: Callable[[Any], None], said: str) -> None:
    vlm = fresh("llava")
    alter(vlm.layers[1])
    batch = vlm.collate(FAMILIES["llava"].samples())
    before = traces(vlm)
    for _ in range(2):  # not only the first time
        with pytest.raises(UserError, match=f"llava cannot be frozen: .*{said}"):
            record(vlm, batch)
    assert traces(vlm) == before


# Norms by what they compute ----------------------------------------------------------------------------------


class _Gemma(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.gain.float())).type_as(
            x
        )


class _Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize(
    ("make", "centred", "eps"),
    [
        (lambda n: nn.LayerNorm(n, 1e-5), True, 1e-5),
        (lambda n: nn.LayerNorm(n, 1e-12, elementwise_affine=False), True, 0.0),
        (lambda n: nn.RMSNorm(n, 1e-3), False, 1e-3),
        (_Gemma, False, 1e-6),
        (lambda n: _Unit(), False, 0.0),
    ],
)
def test_norms_are_found(make: Callable[[int], nn.Module], centred: bool, eps: float, n: int, dtype: Any) -> None:
    norm = make(n).to(dtype).requires_grad_(False)
    for number, parameter in enumerate(norm.parameters()):
        parameter.add_(noise(parameter, number))
    x = noise(torch.zeros(2, 5, 3, n, dtype=dtype)) * 0.05 + 0.2
    found = find_norm(norm, x, norm(x))
    assert found is not None and found.centred == centred
    assert found.eps == pytest.approx(eps, rel=1e-3, abs=1e-10)
    scale = found.scale(x)
    assert scale.shape == (2, 5, 3, 1) and found.apply(x, scale).dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert close(found.apply(x, scale), norm(x), tolerance)
    assert close(found.apply(3 * x, scale / 3), norm(x), tolerance)


class _Gain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(1, 2, x.shape[-1])


class _Max(nn.Module):
    """Does not care how large its input is either, nor is it told from a norm by probes of one size."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize("module", [nn.Identity(), nn.Dropout(), nn.Tanh(), nn.SiLU(), nn.Softmax(-1), _Gain(), _Max()])
def test_what_is_no_norm(module: nn.Module) -> None:
    x = noise(torch.zeros(5, 7))
    assert find_norm(module.eval(), x, module(x)) is None


def test_layer_norms_and_norms_of_values() -> None:
    """A LLaVA with LayerNorms, and one with a norm behind its value projection: recognised, and linear."""
    family = FAMILIES["llava"]
    for alter, kinds in ((_layer_norms, {True}), (_value_norms, {False})):
        model: Any = family.model()
        alter(model)
        vlm = wrap(model.requires_grad_(False), processor(), "altered")
        batch = vlm.collate(family.samples())
        frozen = record(vlm, batch)
        assert {norm.centred for norm in frozen.norms.values()} == kinds
        assert len(frozen.norms) == (7 if alter is _layer_norms else 10)
        expected = real_rows(batch, original(vlm, batch))
        with frozen.replayed():
            assert off(real_rows(batch, original(vlm, batch)), expected) < 1e-5


def _layer_norms(model: Any) -> None:
    decoder = model.get_decoder()
    for owner, name in [(decoder, "norm")] + [
        (layer, name) for layer in decoder.layers for name in ("input_layernorm", "post_attention_layernorm")
    ]:
        norm = nn.LayerNorm(39)
        norm.bias.data += noise(norm.bias)
        setattr(owner, name, norm)


def _value_norms(model: Any) -> None:
    for layer in model.get_decoder().layers:
        layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj, nn.RMSNorm(6, 1e-6))


def test_patterns_of_any_width() -> None:
    """Three tokens more than twice the width of a head; two query heads to each key and value head."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 6, 13, 13, generator=generator).softmax(-1)
    value = torch.randn(2, 3, 13, 5, generator=generator)

    def attend(other: Tensor) -> Tensor:
        return (pattern @ other.repeat_interleave(2, 1)).transpose(1, 2)

    assert torch.equal(pattern_of(attend, value), pattern)
    assert close(mixed(pattern, value), attend(value), 1e-6)
