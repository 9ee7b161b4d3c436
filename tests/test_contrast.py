"""cltjax/replacement/contrast.py: what it says of a feature is what one sample after the other, and steering, say."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cltjax.clt_directory import Activation
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT
from cltjax.replacement.contrast import Contrast, Found, contrast, control, summed_writes
from cltjax.replacement.interventions import Intervention, Positions
from cltjax.replacement.model import ReplacementModel, SteeredModel
from families import FAMILIES, Encoded
from test_replacement import hooks, original, random_clt, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")

LEAST = 5
POSITIONS = ("text", "all", "image", (4, 9), slice(3, 7))


@functools.cache
def prompts() -> list[Encoded]:
    """Of unequal length; three answers come LEAST times, others less often."""
    family = FAMILIES["llava"]
    return [family.sample(number, seed) for seed in range(13) for number in range(3)]


@functools.cache
def own_answers() -> list[int]:
    """The first token of each prompt's answer, one prompt at a time."""
    return [wrapped("llava").generate([one], 1)[0][0] for one in prompts()]


@pytest.fixture(scope="module", params=["topk", "relu"])
def clt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CLT:
    k = (5, 5, 5) if request.param == "topk" else ()
    return random_clt(tmp_path_factory.mktemp("clt") / "clt", wrapped("llava"), activation=Activation(request.param, k))


def found(clt: CLT, positions: Positions = "text", batch_size: int = 7) -> Contrast:
    return contrast(wrapped("llava"), clt, prompts(), positions, LEAST, batch_size)


@functools.cache
def sites() -> list[list[Tensor]]:
    """By prompt and layer [P, D], one prompt at a time."""
    vlm = wrapped("llava")
    return [[x[0] for x in vlm.trace(vlm.collate([prompt]), "mlp_in", range(3)).site] for prompt in prompts()]


def activations(clt: CLT, layer: int) -> list[Tensor]:
    """[P, F] of each prompt."""
    dense = []
    for of_prompt in sites():
        values, indices = clt.encode(layer, of_prompt[layer])
        dense.append(torch.zeros(len(values), clt.description.n_features).scatter_add(1, indices, values))
    return dense


def chosen(ids: Tensor, positions: Positions) -> list[int]:
    """Which positions of one prompt [P] these are."""
    modality = wrapped("llava").modality(ids).tolist()
    if isinstance(positions, slice):
        return list(range(len(ids)))[positions]
    wanted = {"text": (0,), "image": (1,), "all": (0, 1, 2)}
    if isinstance(positions, str):
        return [place for place, kind in enumerate(modality) if kind in wanted[positions]]
    assert isinstance(positions, tuple)
    return [place for place in positions if place < len(ids)]


# What it says of features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_contrast_and_typical_are_those_of_one_prompt_after_the_other(clt: CLT, positions: Positions) -> None:
    it, own = found(clt, positions), np.array(own_answers())
    counts = {answer: int((own == answer).sum()) for answer in sorted(set(own.tolist()))}
    assert it.answers == tuple(answer for answer, n in counts.items() if n >= LEAST)
    assert it.counts == tuple(counts[answer] for answer in it.answers)
    assert len(it.answers) == 3 and len(counts) > 3
    used = np.isin(own, it.answers)
    for layer in clt.sources:
        each = activations(clt, layer)
        places = [chosen(prompt["input_ids"][0], positions) for prompt in prompts()]
        peaks = np.stack([one[where].amax(0).numpy() for one, where in zip(each, places, strict=True)])
        for row, answer in enumerate(it.answers):
            expected = peaks[own == answer].mean(0) - peaks[used & (own != answer)].mean(0)
            assert it.contrast[layer][row].numpy() == pytest.approx(expected, abs=1e-4)
        for feature, peak in enumerate(peaks[used].T):
            expected = np.quantile(peak[peak > 0], 0.99) if (peak > 0).any() else 0.0
            assert float(it.typical[layer][feature]) == pytest.approx(expected, abs=1e-4)
        assert it.active(layer) == np.flatnonzero((peaks[used] > 0).any(0)).tolist()


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_effect_is_what_a_little_steering_does(clt: CLT, positions: Positions) -> None:
    """d(logit_answer - logit_own), by central differences in the steered model, over prompts with another answer."""
    vlm, it, own, step = wrapped("llava"), found(clt, positions), own_answers(), 0.02
    batch = vlm.collate(prompts())
    last = batch["attention_mask"].sum(1) - 1
    for layer in clt.sources:
        features = it.effect[layer].abs().amax(0).topk(2).indices.tolist()
        for feature in features:
            logits = {}
            for sign in (1, -1):
                model = SteeredModel(vlm, clt, [Intervention(layer, feature, "add", sign * step, positions)])
                logits[sign] = model.forward(batch)[torch.arange(len(last)), last]
            slope = (logits[1] - logits[-1]).double() / (2 * step)
            for row, answer in enumerate(it.answers):
                others = [i for i, one in enumerate(own) if one != answer and one in it.answers]
                expected = np.mean([float(slope[i, answer] - slope[i, own[i]]) for i in others])
                assert float(it.effect[layer][row, feature]) == pytest.approx(expected, rel=0.02, abs=2e-3)
    assert max(float(effect.abs().max()) for effect in it.effect.values()) > 0.05


def test_batches_make_no_difference(clt: CLT) -> None:
    one, other = found(clt), found(clt, batch_size=len(prompts()))
    assert (one.answers, one.counts) == (other.answers, other.counts)
    for layer in clt.sources:
        for name in ("contrast", "effect", "typical"):
            assert torch.allclose(getattr(one, name)[layer], getattr(other, name)[layer], atol=1e-4)


def test_nothing_is_left_in_the_model(clt: CLT) -> None:
    vlm = wrapped("llava")
    batch = vlm.collate(prompts()[:2])
    before = original(vlm, batch)
    found(clt)
    assert hooks(vlm) == 0 and torch.equal(original(vlm, batch), before)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in vlm.model.parameters())


# What is chosen ----------------------------------------------------------------------------------------------


def test_best_have_the_largest_shift_among_those_that_speak_for_the_answer() -> None:
    seen = Contrast(
        answers=(5, 11),
        counts=(3, 4),
        contrast={2: torch.tensor([[9.0, 9, 9, 9, 9], [1, 0.9, 3, 2, 0]]), 7: torch.tensor([[0.0], [4]])},
        effect={2: torch.tensor([[-1.0, -1, -1, -1, -1], [1, 9, -2, 0.5, 1]]), 7: torch.tensor([[1.0], [3.5]])},
        typical={2: torch.tensor([4.0, 4, 4, 6, 0]), 7: torch.tensor([1.0])},
    )
    # of layer 2: 1 hardly differs, 2 speaks against it, 4 is never active
    first, second = Found(2, 0, 11, 1.0, 1.0, 4.0), Found(2, 3, 11, 2.0, 0.5, 6.0)
    assert seen.best(11, 5) == [first, Found(7, 0, 11, 4.0, 3.5, 1.0), second]
    assert seen.best(11) == [first] and seen.best(5, 3) == []
    assert (first.shift, second.shift) == (4.0, 3.0)
    assert first.intervention(2.5) == Intervention(2, 0, "add", 10.0, "text")
    assert second.ablation("image") == Intervention(2, 3, "set", 0.0, "image")
    assert seen.active(2) == [0, 1, 2, 3]


# The control -------------------------------------------------------------------------------------------------


def test_a_control_writes_the_others_direction_at_the_features_norm(clt: CLT) -> None:
    vlm, layer, feature, other = wrapped("llava"), 0, 3, 17
    batch = vlm.collate(prompts()[:3])
    changed = control(clt, layer, feature, other)
    ratio = summed_writes(clt, layer, feature).norm() / summed_writes(clt, layer, other).norm()
    assert abs(float(ratio) - 1) > 1e-2
    assert torch.allclose(summed_writes(changed, layer, feature).norm(), summed_writes(clt, layer, feature).norm())
    rows = changed.decoder_rows(layer, torch.arange(31))
    expected = clt.decoder_rows(layer, torch.arange(31)).clone()
    expected[feature] = ratio * expected[other]
    assert torch.allclose(rows, expected) and expected.shape[1] == 2
    for source in (1, 2):
        indices = torch.arange(31)
        assert torch.equal(changed.decoder_rows(source, indices), clt.decoder_rows(source, indices))
    # steering with it is steering with the other
    one = SteeredModel(vlm, changed, [Intervention(layer, feature, "add", 2.0, "text")]).forward(batch)
    same = SteeredModel(vlm, clt, [Intervention(layer, other, "add", 2.0 * float(ratio), "text")]).forward(batch)
    own = SteeredModel(vlm, clt, [Intervention(layer, feature, "add", 2.0, "text")]).forward(batch)
    assert torch.allclose(one, same, atol=1e-4) and not torch.allclose(one, own, atol=1e-2)


def test_an_ablations_control_takes_as_much_off_at_the_same_tokens(clt: CLT) -> None:
    vlm = wrapped("llava")
    batch = vlm.collate([prompts()[0]])
    before = vlm.trace(batch, "mlp_in", (0,))
    values, indices = clt.encode(0, before.site[0])
    feature = int(indices[0, -1, 0])
    other = (feature + 5) % 31
    changed = control(clt, 0, feature, other)
    with SteeredModel(vlm, changed, [Found(0, feature, 5, 1.0, 1.0, 1.0).ablation("all")]).active():
        after = vlm.trace(batch, "mlp_in", (0,))
    activation = torch.where(indices == feature, values, 0.0).sum(-1)
    written = -activation[..., None] * changed.decoder_rows(0, torch.tensor([feature]))[0, 0]
    assert activation[0, -1] > 0
    assert torch.allclose(after.mlp_out[0] - before.mlp_out[0], written, atol=1e-4)
    # also where the CLT writes instead of the MLPs
    one, its = ReplacementModel(vlm, changed), ReplacementModel(vlm, clt)
    assert not torch.allclose(one.forward(batch), its.forward(batch), atol=1e-2)


# What is refused ---------------------------------------------------------------------------------------------


def test_refused(clt: CLT, tmp_path: Path) -> None:
    vlm = wrapped("llava")
    with pytest.raises(UserError, match="no two answers that are given to 16 of the 39 prompts"):
        contrast(vlm, clt, prompts(), least=16)
    with pytest.raises(UserError, match="no positions 'last'"):
        contrast(vlm, clt, prompts(), "last", LEAST)  # pyright: ignore[reportArgumentType]
    about = {"id": "another", "class": "Other", "n_layers": 3, "d_model": vlm.d_model}
    other = random_clt(tmp_path / "other", vlm, model=about)
    with pytest.raises(UserError, match="the CLT is of another"):
        contrast(vlm, other, prompts(), least=LEAST)
