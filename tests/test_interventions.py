"""cltjax/replacement/interventions.py, and what interventions do in the replacement model and in the original one."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capture.vlm import VLM
from cltjax.clt_directory import Activation
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT, Features
from cltjax.replacement.interventions import Intervention, Positions, Tokens, intervene, put
from cltjax.replacement.model import OnFeatures, ReplacementModel, SteeredModel
from families import EOS, FAMILIES, IMAGE_ID, Encoded, Family
from test_replacement import (
    assert_teacher_forced,
    case,  # noqa: F401
    close,
    hooks,
    original,
    random_clt,
    real_rows,
    without_images,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")

INFINITY = float("inf")
KINDS = [ReplacementModel, SteeredModel]


# As they are written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "how", "value", "positions"),
    [
        ("3:1234=5.0", "set", 5.0, "all"),
        ("3:1234*2", "scale", 2.0, "all"),
        ("3:1234+1.5", "add", 1.5, "all"),
        ("3:1234-1.5", "add", -1.5, "all"),
        ("3:1234=-1e-3", "set", -0.001, "all"),
        ("3:1234=0..2.5", "clamp", (0.0, 2.5), "all"),
        ("3:1234=..2", "clamp", (-INFINITY, 2.0), "all"),
        ("3:1234=-1..", "clamp", (-1.0, INFINITY), "all"),
        ("3:1234@image=0", "set", 0.0, "image"),
        ("3:1234@text*.5", "scale", 0.5, "text"),
        ("3:1234@all-1", "add", -1.0, "all"),
        (" 3:1234 @ 7 = 0 ", "set", 0.0, 7),
        ("3:1234@3,5,8=1", "set", 1.0, (3, 5, 8)),
        ("3:1234@3:9=1", "set", 1.0, slice(3, 9)),
        ("3:1234@3:+1", "add", 1.0, slice(3, None)),
        ("3:1234@:9=1..3", "clamp", (1.0, 3.0), slice(None, 9)),
    ],
)
def test_the_command_lines_form(text: str, how: Any, value: Any, positions: Any) -> None:
    assert Intervention.parse(text) == Intervention(3, 1234, how, value, positions)


@pytest.mark.parametrize(
    "text",
    """3:1234 1234=5 a:1234=5 3:b=5 3:1234=x 3:1234/2 3:1234=.. 3:1234=2..1 3:1234=nan 3:1234*inf 3:1234@=1
    3:1234@-1=1 3:1234@words=1 3:1234@1:2:3=1 3:1234@1,=1 3:1234@1,x=1 3:1234*1..2 3:1234=1...2..3 -3:1234=1
    3:1234==5 3:1234@7@8=1 3:1234=0..nan""".split(),
)
def test_what_is_no_intervention_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as raised:
        Intervention.parse(text)
    assert "\n" not in str(raised.value) and "3:1234" in str(raised.value) + "3:1234" * (text[:6] != "3:1234")


@pytest.mark.parametrize(
    ("how", "value", "positions", "said"),
    [
        ("multiply", 1.0, "all", "sets, scales or adds a number, or clamps"),
        ("set", (1.0, 2.0), "all", "a number"),
        ("add", INFINITY, "all", "a number"),
        ("clamp", 1.0, "all", "clamps to"),
        ("clamp", (2.0, 1.0), "all", "clamps to"),
        ("set", 1.0, "words", "no positions 'words'"),
        ("set", 1.0, -1, "no positions -1"),
        ("set", 1.0, [], r"no positions \[\]"),
        ("set", 1.0, [3, -1], "no positions"),
        ("set", 1.0, slice(-3, None), "no positions"),
        ("set", 1.0, slice(0, 9, 2), "no positions"),
        ("set", 1.0, slice(5, 5), "no positions"),
        ("set", 1.0, slice(None, 0), "no positions"),
    ],
)
def test_refused_when_made(how: Any, value: Any, positions: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Intervention(0, 1, how, value, positions)
    Intervention(0, 1, "set", np.float32(1.5), np.int64(3))  # pyright: ignore[reportArgumentType]


# Where, and what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        # columns of [PAD PAD BOS IMAGE IMAGE 7] and [BOS IMAGE IMAGE 7 8 PAD]
        ("all", ([2, 3, 4, 5], [0, 1, 2, 3, 4])),
        ("image", ([3, 4], [1, 2])),
        ("text", ([5], [3, 4])),
        (0, ([2], [0])),
        (4, ([], [4])),
        ([1, 3], ([3, 5], [1, 3])),
        (slice(1, 3), ([3, 4], [1, 2])),
        (slice(3, None), ([5], [3, 4])),
        (slice(None, 1), ([2], [0])),
    ],
)
def test_positions_count_from_the_samples_own_first_token(positions: Any, chosen: Any) -> None:
    vlm = wrapped("llava")
    ids = torch.tensor([[0, 0, 1, IMAGE_ID, IMAGE_ID, 7], [1, IMAGE_ID, IMAGE_ID, 7, 8, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    one = Intervention(0, 0, "set", 1.0, positions)
    selected = one.selects(Tokens.of(ids, mask, vlm.modality))
    assert [row.nonzero()[:, 0].tolist() for row in selected] == list(chosen)
    for column in range(1, 6):  # token by token, with what came before in a cache
        last = one.selects(Tokens.of(ids[:, column : column + 1], mask[:, : column + 1], vlm.modality))
        assert torch.equal(last, selected[:, column : column + 1])


def dense(features: Features, n: int) -> Tensor:
    return torch.zeros(*features.values.shape[:-1], n).scatter_add(-1, features.indices, features.values)


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_changed_activations_are_those_of_the_dense_code(kind: Any, tmp_path: Path) -> None:
    vlm = wrapped("llava")
    clt = random_clt(tmp_path / "clt", vlm, activation=Activation(kind, (5, 5, 5) if kind == "topk" else ()))
    x = torch.randn(2, 7, vlm.d_model, generator=torch.Generator().manual_seed(3))
    found = clt.encode(1, x)
    tokens = Tokens(torch.arange(7).expand(2, 7), torch.zeros(2, 7, dtype=torch.uint8))
    some = [
        Intervention(1, 3, "scale", 0.5),
        Intervention(1, 3, "add", 2.0, slice(2, None)),
        Intervention(1, 30, "set", 3.0, 4),
        Intervention(1, 0, "clamp", (0.25, 0.5), [1, 2, 6]),
        Intervention(1, 17, "set", 0.0),
    ]
    expected = dense(found, 31)
    before = expected.clone()
    expected[..., 3] *= 0.5
    expected[:, 2:, 3] += 2
    expected[:, 4, 30] = 3
    expected[:, [1, 2, 6], 0] = expected[:, [1, 2, 6], 0].clamp(0.25, 0.5)
    expected[..., 17] = 0
    change = intervene(found, some, tokens)
    assert change.features.tolist() == [0, 3, 17, 30]
    assert torch.equal(change.before, before[..., change.features])
    assert torch.equal(change.after, expected[..., change.features])
    changed = put(found, change)
    assert torch.equal(dense(changed, 31), expected) and not torch.equal(expected, before)
    assert changed.values.shape[-1] > found.values.shape[-1]  # a feature that was not active
    assert torch.equal(dense(found, 31), before)


# In the replacement model and in the original ----------------------------------------------------------------


def often_active(model: VLM, clt: CLT, batch: dict[str, Tensor], layer: int) -> int:
    """The feature of a layer that is active at the most tokens, but not at all."""
    x = real_rows(batch, model.trace(batch, clt.description.site, (layer,)).site[0])
    share = (dense(clt.encode(layer, x), clt.description.n_features) > 0).float().mean(0)
    share[share == 1] = 0
    assert share.max() > 0
    return int(share.argmax())


def writes(model: OnFeatures, batch: dict[str, Tensor]) -> list[Tensor]:
    with model.active():
        return model.vlm.trace(batch, "mlp_in", range(3)).mlp_out


@pytest.mark.parametrize("kind", KINDS)
def test_the_write_changes_by_the_predicted_vector(case: Any, kind: Any, tmp_path: Path) -> None:  # noqa: F811
    """At layer 0, whose input no intervention can change."""
    family, vlm = case
    batch = vlm.collate(family.samples())
    clt = random_clt(tmp_path / "clt", vlm)
    feature = often_active(vlm, clt, batch, 0)
    before = writes(kind(vlm, clt, []), batch)
    assert kind is ReplacementModel or torch.equal(before[0], vlm.trace(batch, "mlp_in", (0,)).mlp_out[0])
    own = dense(clt.encode(0, vlm.trace(batch, "mlp_in", (0,)).site[0]), 31)[..., feature]
    direction = clt.decoder_rows(0, torch.tensor([feature]))[0, 0]
    images = real_rows(batch, batch["input_ids"] == IMAGE_ID)
    for text, new in (
        (f"0:{feature}=1.5", torch.full_like(own, 1.5)),
        (f"0:{feature}*3", own * 3),
        (f"0:{feature}-.5", own - 0.5),
        (f"0:{feature}=0.25..0.5", own.clamp(0.25, 0.5)),
        (f"0:{feature}@image=2", torch.where(batch["input_ids"] == IMAGE_ID, 2.0, own)),
    ):
        model = kind(vlm, clt, [Intervention.parse(text)])
        after = writes(model, batch)
        predicted = real_rows(batch, (new - own)[..., None] * direction)
        change = real_rows(batch, after[0] - before[0])
        assert close(change, predicted, 1e-5) and predicted.abs().max() > 0.01
        if "image" in text:
            assert torch.equal(change[~images], torch.zeros_like(change[~images])) and (change[images] != 0).any()
        assert not torch.equal(after[1], before[1])
    assert hooks(vlm) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_nothing_changes_no_bit(case: Any, kind: Any, tmp_path: Path) -> None:  # noqa: F811
    family, vlm = case
    batch = vlm.collate(family.samples())
    clt = random_clt(tmp_path / "clt", vlm)
    expected = ReplacementModel(vlm, clt).forward(batch) if kind is ReplacementModel else original(vlm, batch)
    feature = often_active(vlm, clt, batch, 0)
    texts = ["0:{}*1", "1:{}+0", "2:{}=-1e9..", "0:{}=0..1e9"]
    some = [Intervention.parse(text.format(feature)) for text in texts]
    assert torch.equal(kind(vlm, clt, some).forward(batch), expected)
    assert not torch.equal(kind(vlm, clt, [Intervention(0, feature, "add", 1.0)]).forward(batch), expected)


def test_later_layers_follow(tmp_path: Path) -> None:
    """With interventions on two layers, every write is again a function of what was read in the same pass."""
    vlm = wrapped("llava")
    batch = vlm.collate(FAMILIES["llava"].samples())
    clt = random_clt(tmp_path / "clt", vlm)
    some = [Intervention(0, 3, "set", 2.0), Intervention(1, 5, "add", 1.0, "text"), Intervention(0, 7, "add", 1.0, 2)]
    text = torch.from_numpy(vlm.modality(batch["input_ids"])) == 0
    model = ReplacementModel(vlm, clt, some)
    with model.active():
        replaced = vlm.trace(batch, "mlp_in", range(3))
    steered_model = SteeredModel(vlm, clt, some)
    assert steered_model.covered == (0, 1, 2)
    with steered_model.active():
        steered = vlm.trace(batch, "mlp_in", range(3))
    for trace, is_steered in ((replaced, False), (steered, True)):
        codes = [dense(clt.encode(layer, trace.site[layer]), 31) for layer in range(3)]
        new = [code.clone() for code in codes]
        new[0][..., 3] = 2
        new[0][:, 2, 7] += 1
        new[1][..., 5] += text
        for target in range(3):
            with torch.no_grad():
                mlp: Any = vlm.layers[target].mlp
                total = mlp(trace.site[target]) if is_steered else clt.b_dec[target]
            for source in range(max(0, target - 1), target + 1):
                W = clt.decoder_rows(source, torch.arange(31))[:, target - source]
                total = total + (new[source] - codes[source] if is_steered else new[source]) @ W
            assert close(real_rows(batch, trace.mlp_out[target]), real_rows(batch, total), 1e-5)
    features = model.features(batch)
    assert torch.equal(dense(features[0], 31)[..., 3], 2.0 * batch["attention_mask"])


@pytest.mark.parametrize("kind", KINDS)
def test_only_within_the_layers_asked_for(kind: Any, tmp_path: Path) -> None:
    vlm = wrapped("llava")
    batch = vlm.collate(FAMILIES["llava"].samples())
    clt = random_clt(tmp_path / "clt", vlm)
    some = [Intervention(0, 3, "set", 9.0)]
    plain = writes(kind(vlm, clt, []), batch)
    for first, last in ((0, 0), (1, 1), (1, 2), (0, 2)):
        model = kind(vlm, clt, some, within=(first, last))
        assert kind is ReplacementModel or model.covered == tuple(range(first, min(last, 1) + 1))
        changed = writes(model, batch)
        direction = clt.decoder_rows(0, torch.tensor([3]))[0]
        differs = [not torch.equal(one, other) for one, other in zip(changed, plain, strict=True)]
        assert differs == ([True] * 3 if first == 0 else [False, True, True])
        if first == 1:  # the input of layer 1 is the same: its write differs by the feature's alone
            own = dense(clt.encode(0, vlm.trace(batch, "mlp_in", (0,)).site[0]), 31)[..., 3]
            predicted = (9.0 - own)[..., None] * direction[1]
            assert close(real_rows(batch, changed[1] - plain[1]), real_rows(batch, predicted), 1e-5)
    one, other = (kind(vlm, clt, some, within=within).forward(batch) for within in ((0, 0), (0, 1)))
    assert not torch.equal(one, other)


def test_left_padding_shifts_nothing(case: Any, tmp_path: Path) -> None:  # noqa: F811
    family, vlm = case
    left, right = (vlm.collate(family.samples(), side) for side in ("left", "right"))
    clt = random_clt(tmp_path / "clt", vlm)
    feature = often_active(vlm, clt, right, 0)
    direction = clt.decoder_rows(0, torch.tensor([feature]))[0, 0]
    cases: list[tuple[Positions, Any]] = [((1, 3), 6), (slice(2, 5), 9), ("text", None)]
    for positions, count in cases:
        for batch in (left, right):
            plain, changed = (
                writes(SteeredModel(vlm, clt, some), batch)[0]
                for some in ([], [Intervention(0, feature, "add", 5.0, positions)])
            )
            number = torch.where(batch["attention_mask"] > 0, batch["attention_mask"].cumsum(1) - 1, -1)
            if isinstance(positions, str):
                where = torch.from_numpy(vlm.modality(batch["input_ids"])) == 0
            else:
                where = torch.isin(number, torch.tensor([2, 3, 4] if isinstance(positions, slice) else [1, 3]))
                assert where.sum() == count
            assert close(changed - plain, where[..., None] * 5 * direction, 1e-5)
            assert torch.equal((changed != plain).any(-1), where)


def assert_generates(model: Any, samples: list[Encoded]) -> list[list[int]]:
    answers = model.generate(samples, 5)
    assert all(len(answer) == 5 or answer[-1] == EOS for answer in answers)
    assert_teacher_forced(model, samples, answers)
    slices = [one.positions for some in model.interventions.values() for one in some]
    starts = [where.start for where in slices if isinstance(where, slice)]
    for sample, answer in zip(samples, answers, strict=True):
        if all(start < sample["input_ids"].shape[1] + 5 for start in starts):
            assert model.generate([sample], 5)[0] == answer
        else:  # alone it is too short for an intervention
            with pytest.raises(UserError, match="there is no position"):
                model.generate([sample], 5)
    return answers


@pytest.mark.parametrize(
    ("kind", "images"), [(ReplacementModel, True), (ReplacementModel, False), (SteeredModel, True)]
)
def test_generated_tokens_are_intervened_on_too(case: Any, kind: Any, images: bool, tmp_path: Path) -> None:  # noqa: F811
    family: Family = case[0]
    vlm: VLM = case[1]
    samples = family.samples() if images else without_images(family)
    clt = random_clt(tmp_path / "clt", vlm)
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    plain = kind(vlm, clt, []).generate(samples, 5)
    some = [Intervention(layer, 4, "set", 20.0, where) for layer, where in enumerate(("all", "text"))]
    later = Intervention(2, 4, "set", 20.0, slice(longest, None))
    assert assert_generates(kind(vlm, clt, [*some, later]), samples) != plain
    assert hooks(vlm) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_behind_the_prompt_are_generated_tokens(kind: Any, tmp_path: Path) -> None:
    vlm = wrapped("qwen2_vl")
    samples = FAMILIES["qwen2_vl"].samples()
    clt = random_clt(tmp_path / "clt", vlm)
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    plain = kind(vlm, clt, []).generate(samples, 5)
    some = [Intervention(layer, 4, "set", 30.0, slice(max(lengths), None)) for layer in range(3)]
    answers = assert_generates(kind(vlm, clt, some), samples)
    number = lengths.index(max(lengths))  # of this sample the first new token, which the prompt decides, is the same
    assert answers[number][0] == plain[number][0] and answers[number][1:] != plain[number][1:]
    kind(vlm, clt, [Intervention(1, 4, "set", 20.0, max(lengths) + 4)]).generate(samples, 5)
    said = f"1:4: there is no position {max(lengths) + 5} in {max(lengths) + 5} tokens"
    with pytest.raises(UserError, match=said):
        kind(vlm, clt, [Intervention(1, 4, "set", 20.0, max(lengths) + 5)]).generate(samples, 5)


def test_a_generated_token_is_changed_by_the_predicted_vector(tmp_path: Path) -> None:
    """The pass of one token with a cache: what layer 0 writes there, and at no other token."""
    vlm = wrapped("llava")
    sample = FAMILIES["llava"].samples()[0]
    clt = random_clt(tmp_path / "clt", vlm)
    length = sample["input_ids"].shape[1]
    seen: dict[str, list[Tensor]] = {}
    for name, some in (("plain", []), ("changed", [Intervention(0, 4, "add", 2.0, (length, length + 2))])):
        model = SteeredModel(vlm, clt, some)
        tap: Any = vlm.layers[0].mlp
        seen[name] = []
        entering = tap.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].clone()))
        with model.active():
            leaving = tap.register_forward_hook(lambda _, args, output, name=name: seen[name].append(output.clone()))
            vlm.generate([sample], 4)
        entering.remove()
        leaving.remove()
    direction = clt.decoder_rows(0, torch.tensor([4]))[0, 0]
    for index in range(4):  # prompt, then three tokens
        x, y = seen["changed"][2 * index : 2 * index + 2]
        with torch.no_grad():
            own = vlm.layers[0].mlp(x)  # pyright: ignore[reportCallIssue]
        expected = 2 * direction if index in (1, 3) else torch.zeros_like(direction)
        assert close(y - own, expected.expand(y.shape), 1e-5)


# Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_there_is_not(kind: Any, tmp_path: Path) -> None:
    vlm = wrapped("llava")
    activation = Activation("topk", (5, 5))
    clt = random_clt(tmp_path / "clt", vlm, sources=(0, 2), n_targets=1, activation=activation)
    batch = vlm.collate(FAMILIES["llava"].samples())
    longest = batch["input_ids"].shape[1]
    for one, within, said in (
        (Intervention(1, 4, "set", 1.0), None, r"1:4: layer 1 is no source of the CLT: \(0, 2\) are"),
        (Intervention(0, 31, "set", 1.0), None, "0:31: a layer has features 0 to 30"),
        (Intervention(0, -1, "set", 1.0), None, "0:-1: a layer has features 0 to 30"),
        (Intervention(2, 4, "set", 1.0), (0, 1), r"layer 2 writes to \(2,\): not to 0 to 1"),
        (Intervention(0, 4, "set", 1.0), (0, 3), r"\(0, 3\) are no first and last layer"),
        (Intervention(0, 4, "set", 1.0), (1, 0), r"\(1, 0\) are no first and last layer"),
    ):
        with pytest.raises(UserError, match=said):
            kind(vlm, clt, [one], within)
    for positions in (longest, [0, longest], slice(longest, None), slice(longest, longest + 9)):
        with pytest.raises(UserError, match=f"0:4: there is no position {longest} in {longest} tokens"):
            kind(vlm, clt, [Intervention(0, 4, "set", 1.0, positions)]).forward(batch)
    for positions in (longest - 1, slice(longest - 1, None)):
        kind(vlm, clt, [Intervention(0, 4, "set", 1.0, positions)]).forward(batch)
    generated = Intervention(0, 4, "set", 1.0, slice(longest, None))
    kind(vlm, clt, [generated]).generate(FAMILIES["llava"].samples(), 1)  # a token that is generated has this number
    on_image, words = kind(vlm, clt, [Intervention(0, 4, "set", 1.0, "image")]), without_images(FAMILIES["llava"])
    on_image.forward(batch)
    for call in (lambda: on_image.forward(vlm.collate(words)), lambda: on_image.generate(words, 2)):
        with pytest.raises(UserError, match="0:4: there are no image tokens in a prompt without an image"):
            call()
    with pytest.raises(UserError, match="revision"):
        kind(
            dataclasses.replace(vlm, revision="two"),
            random_clt(tmp_path / "one", dataclasses.replace(vlm, revision="one")),
            [],
        )
