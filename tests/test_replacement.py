"""cltjax/replacement/model.py: with an exact CLT it is the VLM; with any CLT it does what the CLT says, only that."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from capture.sites import Patterns, hidden_states_out, with_hidden_states
from capture.vlm import VLM, wrap
from cltjax.clt_directory import Activation, Description, write_clt
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT, Features
from cltjax.replacement.model import AblatedModel, ReplacementModel, Rewritten
from cltjax.wiring import spell_layers, wire
from families import EOS, FAMILIES, IMAGE_ID, LLAMA4, Encoded, Family, processor
from test_vlm import _custom

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 3  # of every tiny model


@functools.cache
def wrapped(name: str) -> VLM:
    if name == "llama4":
        return wrap(LLAMA4.model(), processor(), name, patterns=Patterns(mlp="feed_forward"))
    return wrap(FAMILIES[name].model(), processor(), name)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[Family, VLM]:
    return FAMILIES[request.param], wrapped(request.param)


def without_images(family: Family) -> list[Encoded]:
    """The words behind the images, of unequal number."""
    names = [name for name in ("input_ids", "attention_mask", family.types) if name]
    lengths = (4, 9, 6)
    return [{name: sample[name][:, -n:] for name in names} for sample, n in zip(family.samples(), lengths, strict=True)]


def described(vlm: VLM, **changes: Any) -> Description:
    about = {
        "id": vlm.name,
        "revision": vlm.revision,
        "class": vlm.class_name,
        "n_layers": vlm.n_layers,
        "d_model": vlm.d_model,
    }
    found = Description(
        model=about,
        site="mlp_in",
        n_features=31,
        sources=tuple(range(vlm.n_layers)),
        offset=0,
        n_targets=2,
        activation=Activation("topk", (5,) * vlm.n_layers, "topk"),
        combined="joint",
        dtype="float32",
    )
    return dataclasses.replace(found, **changes)


def random_clt(folder: Path, vlm: VLM, seed: int = 0, **changes: Any) -> CLT:
    """Weights of a size at which its writes are about as large as its inputs, and no two layers alike."""
    one = described(vlm, **changes)
    rng = np.random.default_rng(seed)
    files = {
        file: {
            name: (rng.normal(size=shape) / np.sqrt(vlm.d_model)).astype(np.float32) for name, shape in shapes.items()
        }
        for file, shapes in one.files.items()
    }
    write_clt(folder, one, files.items())
    return CLT.from_pretrained(folder)


def exact_clt(folder: Path, vlm: VLM, batch: dict[str, Tensor], site: str, sources: tuple[int, ...]) -> CLT:
    """A CLT that gives every token of the batch what the MLP wrote there: a feature for each, the nearest is active.

    h_i(x) = x x_i - |x_i|^2 / 2 is largest for the nearest x_i, and |x_i|^2 / 2 there.
    """
    trace = vlm.trace(batch, site, sources)
    real = batch["attention_mask"].bool()
    files: dict[str, dict[str, np.ndarray]] = {"b_dec.safetensors": {}}
    for layer, x, y in zip(sources, trace.site, trace.mlp_out, strict=True):
        x, y = x[real], y[real]
        square = x.pow(2).sum(-1)
        encoder = {f"W_enc_{layer}": x.numpy(), f"b_enc_{layer}": (-square / 2).numpy()}
        files[f"W_enc_{layer}.safetensors"] = encoder
        files[f"W_dec_{layer}.safetensors"] = {f"W_dec_{layer}": (2 * y / square[:, None])[:, None].numpy()}
        files["b_dec.safetensors"][f"b_dec_{layer}"] = np.zeros(vlm.d_model, np.float32)
    one = described(
        vlm,
        site=site,
        n_features=int(real.sum()),
        sources=sources,
        n_targets=1,
        activation=Activation("topk", (1,) * len(sources), "topk"),
    )
    write_clt(folder, one, files.items())
    return CLT.from_pretrained(folder)


def original(vlm: VLM, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = vlm.model(**batch)
    return output if isinstance(output, Tensor) else output.logits


def real_rows(batch: dict[str, Tensor], tensor: Tensor) -> Tensor:
    return tensor[batch["attention_mask"].bool()]


def close(one: Tensor, other: Tensor, most: float = 1e-4) -> bool:
    return float((one - other).abs().max()) <= most * max(1.0, float(other.abs().max()))


def hooks(vlm: VLM) -> int:
    """How many of this project's hooks are in the model; transformers keeps some of its own there."""
    modules = list(vlm.model.modules())
    found = [hook for one in modules for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())]
    return sum(isinstance(getattr(getattr(hook, "func", hook), "__self__", None), Rewritten) for hook in found)


def assert_teacher_forced(model: Any, samples: list[Encoded], answers: list[list[int]]) -> None:
    """The answers are what the model's own logits over prompt and answer say, token by token."""
    whole = [model.vlm.extend(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    logits = model.forward(model.vlm.collate(whole))
    logits[..., IMAGE_ID] = -torch.inf
    for number, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        start = sample["input_ids"].shape[1] - 1
        assert logits[number, start : start + len(answer)].argmax(-1).tolist() == answer


# Each family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [True, False], ids=["images", "words"])
def test_an_exact_clt_gives_the_vlm(case: tuple[Family, VLM], images: bool, tmp_path: Path) -> None:
    family, vlm = case
    batch = vlm.collate(family.samples() if images else without_images(family))
    expected = original(vlm, batch)
    for site, sources in (("mlp_in", (0, 1, 2)), ("resid_mid", (0, 2))):
        model = ReplacementModel(vlm, exact_clt(tmp_path / site, vlm, batch, site, sources))
        assert (model.covered, model.uncovered) == (sources, () if len(sources) == 3 else (1,))
        assert close(real_rows(batch, model.forward(batch)), real_rows(batch, expected))
        features = model.features(batch)
        count = int(batch["attention_mask"].sum())
        for source in sources:  # every token has its own feature active
            found = real_rows(batch, features[source].indices)[:, 0]
            assert found.unique().numel() >= count // 2 and (real_rows(batch, features[source].values) > 0).all()
        for layer in sources:  # the writes come from the CLT, not from the MLPs that are still there
            model.clt.b_dec[layer] += 0.5
            assert not close(real_rows(batch, model.forward(batch)), real_rows(batch, expected), 1e-3)
            model.clt.b_dec[layer] -= 0.5
    assert torch.equal(original(vlm, batch), expected) and hooks(vlm) == 0


@pytest.mark.parametrize("offset", [0, 1])
def test_writes_are_the_clts_of_the_running_residual_stream(
    case: tuple[Family, VLM], offset: int, tmp_path: Path
) -> None:
    family, vlm = case
    batch = vlm.collate(family.samples())
    layers = range(LAYERS)
    sources = tuple(layers)[: LAYERS - offset]
    for site in ("mlp_in", "resid_mid", "resid_pre"):
        changes = {"site": site, "offset": offset, "sources": sources}
        clt = random_clt(tmp_path / site, vlm, activation=Activation("topk", (5,) * len(sources)), **changes)
        model = ReplacementModel(vlm, clt)
        original_run = vlm.trace(batch, site, layers)
        features = model.features(batch)
        with model.active():
            trace = vlm.trace(batch, site, layers)
        again = {source: clt.encode(source, trace.site[source]) for source in sources}
        for source in sources:
            assert torch.equal(features[source].indices, again[source].indices)
            assert torch.equal(features[source].values, again[source].values)
        assert torch.equal(trace.site[0], original_run.site[0])
        assert not torch.equal(trace.site[2], original_run.site[2])
        assert model.covered == tuple(range(offset, LAYERS))
        for target in layers:
            own = target in model.uncovered
            expected = original_run.mlp_out[target] if own else clt.decode(target, again)
            assert torch.equal(real_rows(batch, trace.mlp_out[target]), real_rows(batch, expected))


@pytest.mark.parametrize("images", [True, False], ids=["images", "words"])
def test_generation_is_teacher_forced_argmax_batched_or_not(
    case: tuple[Family, VLM], images: bool, tmp_path: Path
) -> None:
    family, vlm = case
    samples = family.samples() if images else without_images(family)
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    before = vlm.generate(samples, 5)
    answers = model.generate(samples, 5)
    assert all(len(answer) == 5 or answer[-1] == EOS for answer in answers) and answers != before
    assert_teacher_forced(model, samples, answers)
    assert [model.generate([sample], 5)[0] for sample in samples] == answers
    assert model.generate(samples, 5) == answers
    assert vlm.generate(samples, 5) == before


def test_the_type_of_the_model_is_kept(tmp_path: Path) -> None:
    family = FAMILIES["gemma3"]
    model: Any = family.model().to(torch.bfloat16)
    vlm = wrap(model, processor(), "gemma3")
    batch = vlm.collate(family.samples())
    replaced = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    logits = replaced.forward(batch)
    with replaced.active():
        trace = vlm.trace(batch, "mlp_in", (1,))
    assert logits.dtype == trace.mlp_out[0].dtype == torch.bfloat16
    features = replaced.features(batch)
    written = replaced.clt.decode(1, features)
    assert torch.equal(real_rows(batch, trace.mlp_out[0]), real_rows(batch, written.bfloat16()))


# Other shapes of layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "tuple", "flat", "sandwich", "postnorm", "llama4"])
def test_other_shapes_of_what_an_mlp_returns(kind: str, tmp_path: Path) -> None:
    if kind == "llama4":
        vlm = wrapped(kind)
        batch = vlm.collate(LLAMA4.samples())
    else:
        vlm, batch = _custom(kind)
    layers = tuple(range(vlm.n_layers))
    expected = original(vlm, batch)
    model = ReplacementModel(vlm, exact_clt(tmp_path / "clt", vlm, batch, "mlp_in", layers))
    assert close(real_rows(batch, model.forward(batch)), real_rows(batch, expected))
    for bias in model.clt.b_dec.values():
        bias += 0.5
    assert not close(real_rows(batch, model.forward(batch)), real_rows(batch, expected), 1e-2)


class _Pair(NamedTuple):
    hidden: Tensor
    rest: str


@pytest.mark.parametrize(
    "wrap_up",
    [
        lambda x: x,
        lambda x: (x, "rest"),
        lambda x: [x, "rest"],
        lambda x: _Pair(x, "rest"),
        lambda x: {"hidden": x, "rest": "rest"},
        lambda x: {"hidden": (x, "inner"), "rest": "rest"},
        lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x,)),
    ],
)
def test_the_rest_of_an_output_is_as_it_was(wrap_up: Any) -> None:
    own, other = torch.zeros(2, 3), torch.ones(2, 3)
    output, expected = wrap_up(own), wrap_up(other)
    found = with_hidden_states(output, other)
    assert type(found) is type(expected) and hidden_states_out(found) is other and hidden_states_out(output) is own
    if isinstance(output, BaseModelOutput):
        assert found.last_hidden_state is other and found.hidden_states[0] is own
    elif not isinstance(output, Tensor):
        assert str(found) == str(expected)


# Only some layers; constants ---------------------------------------------------------------------------------


def test_only_the_layers_asked_for_are_replaced(tmp_path: Path) -> None:
    vlm = wrapped("llava")
    batch = vlm.collate(FAMILIES["llava"].samples())
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    whole = vlm.trace(batch, "mlp_in", range(3))
    with model.active((1,)):
        trace = vlm.trace(batch, "mlp_in", range(3))
    features = {layer: model.clt.encode(layer, trace.site[layer]) for layer in (0, 1)}
    assert torch.equal(trace.mlp_out[0], whole.mlp_out[0])
    assert torch.equal(trace.mlp_out[1], model.clt.decode(1, features))
    with torch.no_grad():  # the MLP of layer 2 is its own, on what it is given now
        mlp: Any = vlm.layers[2].mlp
        assert torch.equal(trace.mlp_out[2], mlp(trace.site[2]))
    assert not torch.equal(trace.site[2], whole.site[2])
    assert sorted(model.features(batch, (1,))) == [0, 1]
    assert torch.equal(model.forward(batch, ()), original(vlm, batch))
    assert torch.equal(model.forward(batch, (2, 0, 1)), model.forward(batch))
    some = [model.forward(batch, layers) for layers in ((0,), (1,), (2,), (0, 1))]
    assert not any(torch.equal(one, other) for i, one in enumerate(some) for other in some[:i])
    samples = FAMILIES["llava"].samples()
    assert model.generate(samples, 4, ()) == vlm.generate(samples, 4)


def test_constants(case: tuple[Family, VLM]) -> None:
    family, vlm = case
    samples = family.samples()
    batch = vlm.collate(samples)
    means = {layer: torch.linspace(-1, 1 + layer, vlm.d_model) for layer in (0, 2)}
    model = AblatedModel(vlm, means)
    assert (model.covered, model.uncovered) == ((0, 2), (1,))
    with model.active():
        trace = vlm.trace(batch, "resid_mid", range(3))
    for layer, mean in means.items():
        assert torch.equal(trace.mlp_out[layer], mean.expand(trace.mlp_out[layer].shape))
    assert_teacher_forced(model, samples, model.generate(samples, 4))
    zeros = AblatedModel(vlm, {layer: torch.zeros(vlm.d_model) for layer in range(3)})
    some = [zeros.forward(batch, layers) for layers in ((), (0,), (0, 1), (0, 1, 2))]
    assert torch.equal(some[0], original(vlm, batch))
    assert not any(torch.equal(one, other) for i, one in enumerate(some) for other in some[:i])


def test_the_same_without_gain_or_loss(tmp_path: Path) -> None:
    """A CLT without features in use is the ablation by its b_dec."""
    vlm = wrapped("qwen2_vl")
    batch = vlm.collate(FAMILIES["qwen2_vl"].samples())
    clt = random_clt(tmp_path / "clt", vlm, activation=Activation("relu"))
    for encoder in clt._encoders.values():
        encoder["b_enc"] -= 1e6
    ablated = AblatedModel(vlm, clt.b_dec)
    assert torch.equal(ReplacementModel(vlm, clt).forward(batch), ablated.forward(batch))


# Nothing leaks -----------------------------------------------------------------------------------------------


def test_a_call_leaves_nothing_behind(case: tuple[Family, VLM], tmp_path: Path) -> None:
    family, vlm = case
    batch, words = vlm.collate(family.samples()), vlm.collate(without_images(family))
    before = original(vlm, batch), original(vlm, words)
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    first = model.forward(batch)
    model.forward(words)
    model.generate(family.samples(), 2)
    assert torch.equal(model.forward(batch), first)
    assert torch.equal(original(vlm, batch), before[0]) and torch.equal(original(vlm, words), before[1])
    assert hooks(vlm) == 0 and model._pass is None  # which holds activations
    # other samples are without effect
    alone = model.forward(vlm.collate([family.samples()[1]]))[0]
    assert close(first[1, : len(alone)], alone, 1e-4)


def test_after_an_exception_it_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = wrapped("qwen3_vl")
    samples = FAMILIES["qwen3_vl"].samples()
    batch = vlm.collate(samples)
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    expected = original(vlm, batch), model.forward(batch), model.generate(samples, 3)

    def failing(target: int, features: dict[int, Features]) -> Tensor:
        if target == 1:
            raise MemoryError("no room")
        return CLT.decode(model.clt, target, features)

    with monkeypatch.context() as patched:
        patched.setattr(model.clt, "decode", failing)
        for call in (model.forward, model.features, lambda _: model.generate(samples, 3)):
            with pytest.raises(MemoryError):
                call(batch)
            assert hooks(vlm) == 0
    found = original(vlm, batch), model.forward(batch), model.generate(samples, 3)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] == expected[2]


def test_restore_ends_it_at_once(tmp_path: Path) -> None:
    vlm = wrapped("llava")
    batch = vlm.collate(FAMILIES["llava"].samples())
    expected = original(vlm, batch)
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    with model.active():
        assert hooks(vlm) == 8  # a pass's begin and end, three sources, three targets
        assert torch.equal(original(vlm, batch), replaced := original(vlm, batch))
        with pytest.raises(RuntimeError, match="active already"):
            model.forward(batch)
        assert not torch.equal(replaced, expected)
        model.restore()
        assert torch.equal(original(vlm, batch), expected) and hooks(vlm) == 0
    assert torch.equal(model.forward(batch), replaced)


def test_sites_are_found_on_the_first_batch(tmp_path: Path) -> None:
    family = FAMILIES["internvl"]
    samples = family.samples()
    known = wrapped("internvl")
    clt = random_clt(tmp_path / "clt", known)
    batch = known.collate(samples)
    expected = ReplacementModel(known, clt).forward(batch), ReplacementModel(known, clt).generate(samples, 3)
    calls: list[tuple[Any, Any]] = [
        (lambda model: model.forward(batch), lambda found: torch.equal(found, expected[0])),
        (lambda model: model.generate(samples, 3), lambda found: found == expected[1]),
        (lambda model: model.features(batch), lambda found: sorted(found) == [0, 1, 2]),
    ]
    for call, good in calls:
        model = ReplacementModel(wrap(family.model(), processor(), "fresh"), clt)
        with pytest.raises(UserError, match="sites of fresh are not known yet"), model.active():
            pass
        assert good(call(model))


def test_one_sample_is_a_batch(tmp_path: Path) -> None:
    vlm = wrapped("llava")
    sample = FAMILIES["llava"].samples()[0]
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    assert torch.equal(model.forward(sample), model.forward(vlm.collate([sample])))


# Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"combined": "none"}, "combined = none.*--combine gains"),
        ({"n_layers": 4}, "layers are not those of llava: 4, not 3"),
        ({"d_model": 37}, "width are not those of llava: 37, not 39"),
        ({"class": "Qwen2VLForConditionalGeneration"}, "class are not .*: Qwen2VL.*, not LlavaFor"),
        ({"revision": "one"}, "at revision one, and llava is at two: load that one"),
    ],
)
def test_a_clt_of_another_model_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    vlm = dataclasses.replace(wrapped("llava"), revision="two")
    one = described(vlm)
    combined = changes.pop("combined", "joint")
    clt = random_clt(tmp_path / "clt", vlm, model=one.model | {"id": "a/b"} | changes, combined=combined)
    with pytest.raises(UserError, match=said) as raised:
        ReplacementModel(vlm, clt)
    assert "\n" not in str(raised.value) and "a/b" in str(raised.value)


@pytest.mark.parametrize(
    "changes", [{"id": "elsewhere"}, {"revision": None}, {"revision": "unknown"}, {"class": None}, {}]
)
def test_what_is_not_known_is_no_mismatch(changes: dict[str, Any], tmp_path: Path) -> None:
    vlm = dataclasses.replace(wrapped("llava"), revision="two")
    one = described(vlm)
    ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm, model=one.model | changes))
    other = random_clt(tmp_path / "other", vlm, model=one.model | {"revision": "one"})
    assert ReplacementModel(vlm, other, other_revision=True).covered == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": None}, "has no name, no class and no revision"),
        ({"id": "a/b"}, "has only the name a/b, no class and no revision"),
        ({}, ""),  # its name is the model's
        ({"id": "a/b", "class": "LlavaForConditionalGeneration"}, ""),
        ({"id": "a/b", "revision": "two"}, ""),
    ],
)
def test_a_clt_that_does_not_say_of_which_model_it_is(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is taken with a line about it, once, however many models are made of it."""
    vlm = dataclasses.replace(wrapped("llava"), revision="two", name=str(tmp_path))
    one = described(vlm).model | {"revision": None, "class": None} | changes
    clt = random_clt(tmp_path / "clt", vlm, model=one)
    for _ in range(2):
        ReplacementModel(vlm, clt)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == bool(said)
    if said:
        assert "this CLT does not say which model it is of" in printed[0] and said in printed[0]
        assert f"--model {vlm.name}" in printed[0]


def test_an_answer_has_a_token_at_least(tmp_path: Path) -> None:
    vlm = wrapped("llava")
    samples = FAMILIES["llava"].samples()
    models = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm)), AblatedModel(vlm, {0: torch.zeros(39)})
    for model in models:
        for n in (0, -1):
            with pytest.raises(UserError, match=f"answers of at most {n} tokens: there must be at least 1") as raised:
                model.generate(samples, n)
            assert "\n" not in str(raised.value)
        assert [len(answer) for answer in model.generate(samples, 1)] == [1, 1, 1]


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    vlm = wrapped("llava")
    batch = vlm.collate(FAMILIES["llava"].samples())
    sources = (0, 2)
    activation = Activation("topk", (5, 5))
    model = ReplacementModel(
        vlm, random_clt(tmp_path / "clt", vlm, sources=sources, n_targets=1, activation=activation)
    )
    assert wire(spell_layers(sources), 3, 0, 1).targets == model.covered == sources
    with pytest.raises(UserError, match=r"layers \[1\] are not covered: \[0, 2\] are"):
        model.forward(batch, (0, 1))
    for layers in ([3], [-1, 0]):
        with pytest.raises(UserError, match="there is no layer .*llava has layers 0 to 2"):
            AblatedModel(vlm, {layer: torch.zeros(39) for layer in layers})
    with pytest.raises(UserError, match=r"layer 1: \(38,\) is no vector of width 39"):
        AblatedModel(vlm, {1: torch.zeros(38)})


class _Skipping(nn.Module):
    """A layer that can be told to leave out its MLP."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.skip = layer, False

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.layer
        x = x + block.mixer(block.ln_1(x))
        return x if self.skip else x + block.ffn(block.ln_2(x))


@pytest.mark.parametrize("missing", ["mlp", "layer", "source"])
def test_a_tap_that_is_not_passed_is_an_error(missing: str, tmp_path: Path) -> None:
    plain, batch = _custom("plain")
    root: Any = plain.model
    layers = [_Skipping(layer) for layer in plain.layers]
    root.tower["blocks"] = nn.ModuleList(layers)
    vlm = wrap(root, processor(), "skipping", patterns=Patterns("tower.blocks.*", "layer.ffn"), d_model=11)
    vlm.verify(batch)
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    expected = model.forward(batch)
    match missing:
        case "mlp":
            layers[1].skip = True
        case "layer":
            root.tower["blocks"] = nn.ModuleList(layers[:1])
        case "source":
            layers[0].skip = True
    said = (
        r"layer 1 is written before the site of layers \[0\]" if missing == "source" else r"MLPs of layers \[1\] were"
    )
    for call in (model.forward, model.features):
        with pytest.raises(UserError, match=said):
            call(batch)
        assert hooks(vlm) == 0
    root.tower["blocks"] = nn.ModuleList(layers)
    layers[0].skip = layers[1].skip = False
    assert torch.equal(model.forward(batch), expected)


def test_layers_alone_and_embeddings_are_refused_while_active(tmp_path: Path) -> None:
    vlm = wrapped("llava")
    family = FAMILIES["llava"]
    batch = vlm.collate(without_images(family))
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    model.forward(batch)
    root: Any = vlm.model
    with model.active(), torch.no_grad():
        embeddings = root.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(UserError, match="takes input_ids"):
            root(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
        with pytest.raises(RuntimeError, match="outside of a forward pass"):
            root.get_decoder()(inputs_embeds=embeddings)
        original(vlm, batch)
        with pytest.raises(RuntimeError, match="outside of a forward pass"):  # what was read before is not used again
            root.get_decoder()(inputs_embeds=embeddings)
