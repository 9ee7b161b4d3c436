"""cltjax neurons: known neurons are found, sums are numpy's, chance is what it says; in every family."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from capture.inputs import IMAGE, SPECIAL, TEXT
from capture.prompts import Sample
from capture.sites import Tap, record
from capture.vlm import VLM, load, wrap
from cltjax.cli import main
from cltjax.clt_directory import Activation, write_clt
from cltjax.errors import UserError
from cltjax.replacement import firing, neurons
from cltjax.replacement.clt import CLT
from cltjax.replacement.down_proj import locate
from cltjax.replacement.firing import HeldOut, Sums, fire_alike
from cltjax.replacement.neurons import at_target, explained, find_neurons, neurons_of_features, random_cosine
from cltjax.tokens import NormLimits
from families import FAMILIES, LLAMA4, Encoded, processor, shake
from test_replacement import described, hooks, random_clt, real_rows, wrapped
from test_vlm import PATTERNS, _Custom, _custom

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO = "examples/shapes/model"
LAYERS = (0, 1, 2)
ALL = (TEXT, IMAGE, SPECIAL)


@functools.cache
def demo() -> VLM:
    return load(DEMO)


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "load", lambda name, dtype, device: demo())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Any:
    """HeldOut of hand-made inputs: a sample's id is its number."""

    def of(vlm: VLM, clt: CLT, encoded: Sequence[Encoded], limits: NormLimits | None = None, kinds=ALL) -> HeldOut:
        monkeypatch.setattr(firing, "encoder", lambda *_: lambda sample: encoded[int(sample.id)])
        samples = [Sample(str(i), "", "test", None, None, None) for i in range(len(encoded))]
        return HeldOut(vlm, clt, samples, None, 2, 0, kinds, limits)  # type: ignore[arg-type]

    return of


# The last linear map -------------------------------------------------------------------------------------------------


def assert_writes_add_up(vlm: VLM, batch: dict[str, Tensor]) -> None:
    """What goes onto the columns is the write, token by token."""
    layers = tuple(range(vlm.n_layers))
    found = locate(vlm, layers, batch)
    assert hooks(vlm) == 0 and vlm.sites is not None
    for layer, one in found.items():
        taps = [Tap(one.down), Tap(one.mlp, True), vlm.sites[layer].mlp_out]
        flat = [tensor.flatten(0, -2) for tensor in record(taps, lambda: vlm.forward(batch))]
        z, before, write = (tensor[batch["attention_mask"].bool().flatten()].double() for tensor in flat)
        scale = torch.ones(len(z)) if one.gain is None else one.scale(before, write)
        bias = 0 if one.down.bias is None else one.down.bias * (1 if one.gain is None else one.gain)
        whole = scale[:, None] * (z @ one.columns.double().T + bias)
        assert float((whole - write).norm()) < 1e-5 * float(write.norm())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3_vl_moe"])
def test_neurons_of_every_family(name: str) -> None:
    vlm = wrapped(name)
    assert_writes_add_up(vlm, vlm.collate(FAMILIES[name].samples()))
    found = locate(vlm, (1,), vlm.collate(FAMILIES[name].samples()))[1]
    mlp: Any = vlm.layers[1].mlp
    assert found.down is mlp.down_proj and (found.gain is not None) == (name in ("gemma3", "paligemma2"))


@pytest.mark.parametrize("kind", ["plain", "tuple", "flat"])
def test_neurons_of_other_shapes(kind: str) -> None:
    assert_writes_add_up(*_custom(kind))


def test_mlps_of_another_form_are_refused() -> None:
    moe, family = wrapped("qwen3_vl_moe"), FAMILIES["qwen3_vl_moe"]
    with pytest.raises(UserError, match="layer 1: Qwen3VLMoeTextSparseMoeBlock .* experts"):
        locate(moe, (1, 2), moe.collate(family.samples()))
    llama4 = wrapped("llama4")
    batch = llama4.collate(LLAMA4.samples())
    assert list(locate(llama4, (0, 2), batch)) == [0, 2]
    with pytest.raises(UserError, match="layer 1: Llama4TextMoe .* experts"):
        locate(llama4, LAYERS, batch)
    sandwich, batch = _custom("sandwich")  # its LayerNorm takes the mean off
    with pytest.raises(UserError, match="followed by LayerNorm, which is no gain and scale"):
        locate(sandwich, (0,), batch)


class Packed(nn.Linear):
    """A quantised map: a Linear whose weights are no numbers as they stand."""

    def __init__(self, like: nn.Linear):
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = nn.Parameter((64 * like.weight).to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return nn.functional.linear(input, self.weight.float() / 64)


def test_quantised_maps_are_refused() -> None:
    family = FAMILIES["llava"]
    vlm = wrap(family.model(), processor(), "packed")
    mlp: Any = vlm.layers[2].mlp
    mlp.down_proj = Packed(mlp.down_proj)
    batch = vlm.collate(family.samples())
    assert list(locate(vlm, (0, 1), batch)) == [0, 1]
    with pytest.raises(UserError, match="layer 2: LlamaMLP .* quantised"):
        locate(vlm, LAYERS, batch)


def test_a_gain_in_bfloat16_is_no_other_form() -> None:
    family = FAMILIES["gemma3"]
    vlm = wrap(family.model().to(torch.bfloat16), processor(), "gemma3")
    found = locate(vlm, LAYERS, vlm.collate(family.samples()))
    exact = locate(wrapped("gemma3"), LAYERS, vlm.collate(family.samples()))
    for layer in LAYERS:
        one, other = found[layer].gain, exact[layer].gain
        assert one is not None and other is not None and float((one - other).norm() / other.norm()) < 0.01


# Known neurons -------------------------------------------------------------------------------------------------------

WIDTH, NEURONS, F = 11, 13, 37


class Signed(nn.Module):
    """relu, negative for one neuron: as gated neurons are."""

    def forward(self, x: Tensor) -> Tensor:
        sign = torch.ones(NEURONS)
        sign[4] = -1
        return x.relu() * sign


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, CLT, list[Encoded]]:
    """Features 5, 6, 7 and 8 of layer 0 have the encoders of neurons 3, 8, 4 and 2. The decoders at layer 0 are the
    columns of these neurons (6 and 7: less than 0 times it), but for feature 8, which has neuron 12's."""
    model = _Custom("plain")
    for block in model.tower["blocks"]:  # pyright: ignore[reportGeneralTypeIssues]
        block.ffn = nn.Sequential(nn.Linear(WIDTH, NEURONS), Signed(), nn.Linear(NEURONS, WIDTH))
    torch.manual_seed(0)
    shake(model)
    vlm = wrap(model, processor(), "planted", patterns=PATTERNS, d_model=WIDTH)
    rng = np.random.default_rng(0)
    encoded = []
    for length in rng.integers(3, 17, 97):
        ids = torch.from_numpy(rng.integers(3, 53, (1, length)))
        encoded.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    vlm.verify(vlm.collate(encoded[:3]))
    about = described(vlm, n_features=F, activation=Activation("relu"))
    files = {
        file: {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for file, shapes in about.files.items()
    }
    first: Any = vlm.layers[0]
    into, _, back = first.ffn
    encoders = files["W_enc_0.safetensors"]
    for feature, neuron, column, factor in ((5, 3, 3, 2.5), (6, 8, 8, -1.5), (7, 4, 4, -0.5), (8, 2, 12, 1.0)):
        encoders["W_enc_0"][feature] = into.weight[neuron]
        encoders["b_enc_0"][feature] = into.bias[neuron]
        files["W_dec_0.safetensors"]["W_dec_0"][feature, 0] = factor * back.weight[:, column]
    folder = tmp_path_factory.mktemp("planted") / "clt"
    write_clt(folder, about, files.items())
    return vlm, CLT.from_pretrained(folder), encoded


def test_planted_neurons_are_found(planted: tuple[VLM, CLT, list[Encoded]], held: Any) -> None:
    vlm, _, encoded = planted
    found, counts = neurons_of_features(held(*planted), [(0, 5), (0, 6), (0, 7), (0, 8), (1, 5)], 4)
    assert counts["text"] == sum(one["input_ids"].numel() for one in encoded) and counts["left out"] == 0
    assert [[target["layer"] for target in one["targets"]] for one in found] == [[0, 1]] * 4 + [[1]]
    five, six, seven, eight = (one["targets"][0] for one in found[:4])
    for target, neuron, sign in ((five, 3, 1), (seven, 4, -1)):
        best, second = target["neurons"][:2]
        assert best["neuron"] == neuron
        assert best["cosine"] == pytest.approx(sign, abs=1e-5)
        assert best["correlation"] == pytest.approx(sign, abs=1e-5)
        assert best["score"] == pytest.approx(1, abs=1e-5) and second["score"] < 0.6
        assert best["p"] == 1 / (1 + found[0]["compared with"]["features"]) and second["p"] > best["p"]
        assert best["explained"] == pytest.approx(1) and target["explained by chance"] < 0.95
        # its firing with the features that fire as often is around 0
        assert abs(best["others"]["mean"]) < 0.2 and sign * best["z"] > 2.5
        assert target["score by chance"] < 0.9 and target["random cosine"] < 1
    first: Any = vlm.layers[0]
    W = first.ffn[2].weight
    assert five["decoder norm"] == pytest.approx(2.5 * float(W[:, 3].norm()))
    assert five["neurons"][0]["projection"] == pytest.approx(float(W[:, 3].norm()))
    # fires with it and writes the opposite: it is no neuron that the feature stands for
    assert 8 not in [neuron["neuron"] for neuron in six["neurons"]]
    # aligned with one, firing with another: neither is like the feature
    assert all(neuron["p"] > 0.05 for neuron in eight["neurons"])


def by_hand(vlm: VLM, clt: CLT, samples: Sequence[Encoded], feature: tuple[int, int], target: int) -> list[np.ndarray]:
    """[N] numpy's correlations of a feature with a layer's neurons over all tokens of samples, one at a time; and how
    much more the neurons are active with it."""
    source, number = feature
    assert vlm.sites is not None
    one = locate(vlm, (target,), vlm.collate([samples[0]]))[target]
    a, z = [], []
    for sample in samples:
        batch = vlm.collate([sample])
        taps = [vlm.sites[source].mlp_in, Tap(one.down), Tap(one.mlp, True), vlm.sites[target].mlp_out]
        x, into, before, write = record(taps, lambda batch=batch: vlm.forward(batch))
        values, indices = clt.encode(source, x[0])
        a.append(torch.where(indices == number, values, 0.0).sum(-1).numpy())
        if one.gain is not None:
            into = into * (write / (one.gain * before))[..., :1]
        z.append(into[0].numpy())
    both = np.concatenate([np.concatenate(a)[:, None], np.concatenate(z)], 1).astype(np.float64)
    on = both[:, 0] > 0
    return [np.asarray(np.corrcoef(both.T))[0, 1:], both[on, 1:].mean(0) - both[~on, 1:].mean(0)]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_correlations_are_numpys(name: str, tmp_path: Path, held: Any) -> None:
    vlm, samples = wrapped(name), FAMILIES[name].samples()
    vlm.verify(vlm.collate(samples))
    clt = random_clt(tmp_path / "clt", vlm)
    batch = vlm.collate(samples)
    active = clt.encode(0, real_rows(batch, vlm.trace(batch, "mlp_in", (0,)).site[0]))
    often = active.indices[active.values > 0].bincount()
    number = int((often - len(active.values) / 2).abs().argmin())  # now and then
    [found], counts = neurons_of_features(held(vlm, clt, samples), [(0, number)], 41)
    assert sum(counts.values()) == int(batch["attention_mask"].sum())
    assert found["active"]["tokens"] == int(((active.indices == number) & (active.values > 0)).sum())
    for target in found["targets"]:
        expected, rise = by_hand(vlm, clt, samples, (0, number), target["layer"])
        columns = locate(vlm, (target["layer"],), batch)[target["layer"]].columns
        d = clt.decoder_rows(0, torch.tensor([number]))[0, target["layer"]]
        cosine = torch.cosine_similarity(d[:, None], columns, dim=0).numpy()
        rises = rise * (columns.numpy().T @ d.numpy()) / float(d.norm())
        assert target["rise"] == pytest.approx(rises.sum(), rel=1e-4)
        listed = [one["neuron"] for one in target["neurons"]]
        score = expected * cosine
        ranked = [i for i in np.argsort(-score) if score[i] > 0][: min(41, vlm.d_model)]
        assert listed == ranked
        for one in target["neurons"]:
            assert one["correlation"] == pytest.approx(expected[one["neuron"]], abs=1e-5)
            assert one["cosine"] == pytest.approx(cosine[one["neuron"]], abs=1e-5)
            share = rises[one["neuron"]] / rises.sum() if rises.sum() > 0 else None
            assert one["share"] == (None if share is None else pytest.approx(share, rel=1e-3))


def test_sums_do_not_hang_on_batches() -> None:
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.normal(100, 1, (101, 3)))
    z = {4: torch.from_numpy(rng.normal(-50, 0.01, (101, 5))), 7: torch.from_numpy(rng.normal(size=(101, 2)))}
    z[4][:, 2] = 0.1
    sums = Sums.zero(3, {4: 5, 7: 2})
    for rows in (slice(0, 1), slice(1, 64), slice(64, 101)):
        sums.add(a[rows], lambda layer, rows=rows: z[layer][rows])
    for layer in z:
        with np.errstate(invalid="ignore"):
            expected = np.corrcoef(a.numpy().T, z[layer].numpy().T)[:3, 3:]
        expected[:, z[layer].std(0).numpy() < 1e-9] = 0  # does not vary
        np.testing.assert_allclose(sums.correlation(layer).numpy(), expected, atol=1e-6)


# Chance --------------------------------------------------------------------------------------------------------------


def test_p_is_small_as_often_as_it_says() -> None:
    """Of features whose firing is like any other's one in twenty has p of 0.05, though the best of 23 is looked at."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        C = torch.randn(7, 23, generator=generator)
        correlation = torch.randn(20, 23, generator=generator, dtype=torch.float64)
        decoders = torch.randn(20, 7, generator=generator)
        figures = at_target(decoders[0], decoders[1:], C, correlation[0], correlation[1:], torch.zeros(23), 1)
        found.append(figures["neurons"][0]["p"])
    counts = np.bincount(np.round(20 * np.array(found)).astype(int), minlength=21)[1:]
    assert counts.sum() == 400 and counts.min() >= 8 and counts.max() <= 35  # 20 each


def test_p_and_explained_by_chance_are_of_the_same_direction() -> None:
    d, C = torch.tensor([3.0, 4.0, 0.0]), torch.eye(3) * torch.tensor([1.0, -2.0, 5.0])
    of_others = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, 1.0], [0.1, 0.1, 1.0]]).double()
    rise = torch.tensor([-1.0, -2.0, 9.0]).double()
    figures = at_target(d, torch.eye(3), C, torch.tensor([0.5, -0.5, 1.0]).double(), of_others, rise, 1)
    [one] = figures["neurons"]  # neuron 1: cosine -0.8, score 0.4; by the others' firing 0.8, 0.6, 0.06
    assert (one["neuron"], one["cosine"], one["projection"]) == (1, pytest.approx(-0.8), pytest.approx(-1.6))
    assert one["score"] == pytest.approx(0.4) and one["p"] == pytest.approx(3 / 4)
    assert one["explained"] == pytest.approx(0.64)
    assert figures["rise"] == pytest.approx(-0.6 + 3.2) and one["share"] == pytest.approx(3.2 / 2.6)
    [one] = at_target(d, torch.eye(3), C, torch.tensor([0.5, -0.5, 1.0]).double(), of_others, -rise, 1)["neurons"]
    assert one["share"] is None  # where the feature is active it writes less along d
    assert figures["explained by chance"] == pytest.approx((0.64 + 0.36 + 0.36) / 3)
    assert one["others"] == {"mean": pytest.approx(-0.3), "deviation": pytest.approx(np.std([-1, 0, 0.1]))}
    assert one["z"] == pytest.approx((-0.5 + 0.3) / np.std([-1, 0, 0.1]))


def test_explained_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    columns, d = rng.normal(size=(5, 11, 4)), rng.normal(size=11)
    found = explained(torch.from_numpy(columns), torch.from_numpy(d)).numpy()
    for some, shares in zip(columns, found, strict=True):
        for n in range(1, 5):
            left = d - some[:, :n] @ np.linalg.lstsq(some[:, :n], d)[0]
            assert shares[n - 1] == pytest.approx(1 - left @ left / (d @ d))


def test_random_directions_are_of_the_decoders_space() -> None:
    generator = torch.Generator().manual_seed(1)
    axis = torch.eye(101)[:, :1]
    isotropic = torch.randn(999, 101, generator=generator)
    assert random_cosine(isotropic, axis) == pytest.approx(1.96 / 101**0.5, rel=0.25)
    flat = isotropic.clone()
    flat[:, 5:] = 0
    assert random_cosine(flat, axis) > 0.6  # in five dimensions
    assert random_cosine(flat, torch.eye(101)[:, 7:9]) == 0


def test_features_that_fire_alike_do_so_on_text_and_on_images() -> None:
    counts = torch.tensor([[10, 100, 0, 11, 0, 9], [100, 10, 0, 90, 110, 300], [0, 0, 0, 0, 0, 0]])
    assert fire_alike(counts, 0, 9).tolist() == [3, 5, 4, 1]  # never itself, nor the one that never fires
    assert fire_alike(counts, 0, 2).tolist() == [3, 5]
    assert fire_alike(counts[:, 2:3], 0, 9).tolist() == []


# Tokens --------------------------------------------------------------------------------------------------------------


def test_tokens_are_those_that_were_trained_on(tmp_path: Path, held: Any) -> None:
    vlm, samples = wrapped("llava"), FAMILIES["llava"].samples()
    batch = vlm.collate(samples)
    vlm.verify(batch)
    clt = random_clt(tmp_path / "clt", vlm)
    kinds = np.concatenate([vlm.modality(one["input_ids"][0]) for one in samples])

    def counted(limits: NormLimits | None = None, modalities: Sequence[int] = ALL) -> list[int]:
        parts = list(held(vlm, clt, samples, limits, modalities).tokens({}))
        modality = torch.cat([part.modality for part in parts])
        assert [part.x(1).shape == (len(part.sample), vlm.d_model) for part in parts] == [True] * 2
        return [*(int((modality == kind).sum()) for kind in ALL), sum(part.left_out for part in parts)]

    n = [int((kinds == kind).sum()) for kind in ALL]
    assert counted() == [*n, 0] and min(n) > 0
    assert counted(modalities=(TEXT, IMAGE)) == [*n[:2], 0, n[2]]
    trace = vlm.trace(batch, "mlp_in", LAYERS)
    site = [real_rows(batch, one).norm(dim=-1) for one in trace.site]
    write = [real_rows(batch, one).norm(dim=-1) for one in trace.mlp_out]
    wide = [1e9] * 3
    for which, norms in (("site", site), ("mlp_out", write)):
        limit = [float(norms[0].max()) + 1, float(norms[1].median()), 1e9]
        beyond = int((norms[1] >= limit[1]).sum())
        given = NormLimits(**{"site": tuple(wide), "mlp_out": tuple(wide), which: tuple(limit)})
        assert 0 < beyond < len(kinds) and abs(counted(given)[3] - beyond) <= 1  # the median itself may round


# The whole -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "clt"
    random_clt(path, demo())
    return path


@pytest.fixture(scope="module")
def lively(folder: Path) -> str:
    """A feature of layer 2 that fires."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(neurons, "load", lambda name, dtype, device: demo())
        for number in range(31):
            try:
                find_neurons(folder, DEMO, f"2:{number}", max_samples=3, out=folder.parent / "x.json")
            except UserError:
                continue
            return f"2:{number}"
    raise AssertionError


def test_the_command(
    folder: Path, lively: str, loaded_once: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--clt", folder, "--features", f"{lively},{lively}", "--max-samples", 5, "--top", 2, "--batch-size", 2]
    monkeypatch.setattr("sys.argv", ["cltjax", "neurons", *map(str, args)])
    main()
    said = capsys.readouterr().out
    found = json.loads((folder / "neurons-shapes.json").read_text())
    [one] = found["features"]
    assert f"{one['source']}:{one['feature']}" == lively and found["settings"]["split"] == "test"
    assert [target["layer"] for target in one["targets"]] == [2, 3]
    assert all(len(target["neurons"]) == 2 and target["neurons of layer"] == 256 for target in one["targets"])
    assert f"{lively}: active on {one['active']['tokens']:,} tokens" in said and "5 test samples of shapes" in said
    assert found["tokens"]["special"] == 0 < found["tokens"]["left out"]


def test_answers_are_counted_where_asked(folder: Path, lively: str, loaded_once: None, tmp_path: Path) -> None:
    out = tmp_path / "new" / "figures.json"
    found = [
        find_neurons(folder, DEMO, lively, max_samples=3, generate=n, batch_size=size, out=out)["tokens"]
        for n, size in ((0, 16), (4, 16), (4, 2))
    ]
    assert found[1] == found[2] == json.loads(out.read_text())["tokens"]
    assert found[0]["image"] == found[1]["image"] and found[0]["text"] < found[1]["text"] <= found[0]["text"] + 12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": "2-7"}, "'2-7' is no feature: write LAYER:FEATURE"),
        ({"features": ""}, "'' is no feature"),
        ({"features": "2:7,2:"}, "'2:' is no feature"),
        ({"features": "6:7"}, "6:7: layer 6 is no source of the CLT"),
        ({"features": "2:31"}, "2:31: a layer has features 0 to 30"),
        ({"top": 0}, "--top 0: must be at least 1"),
        ({"generate": -1}, "--generate -1: must be at least 0"),
    ],
)
def test_what_cannot_be_asked_is_one_line(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_neurons(folder, DEMO, **{"features": "2:7", **options})


def test_a_feature_that_never_fires_is_one_line(planted: tuple[VLM, CLT, list[Encoded]], held: Any) -> None:
    vlm, clt, encoded = planted
    bias = clt._encoders[1]["b_enc"]
    before = bias.clone()
    bias[3] = -1e6
    with pytest.raises(UserError, match="1:3 is active on none of these tokens"):
        neurons_of_features(held(vlm, clt, encoded[:9]), [(1, 2), (1, 3)], 4)
    bias[:] = -1e6
    bias[3] = 1
    with pytest.raises(UserError, match="1:3 has no feature to be compared with"):
        neurons_of_features(held(vlm, clt, encoded[:9]), [(1, 3)], 4)
    bias[:] = before
