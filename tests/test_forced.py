"""cltjax/replacement/forced.py: sums over tokens against plain numpy on all logits; an exact CLT loses nothing."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from capture.vlm import VLM
from cltjax.replacement import forced as module
from cltjax.replacement.asking import end_ids
from cltjax.replacement.forced import GROUPS, ORIGINAL, certain, compare, forced, spread
from cltjax.replacement.model import ReplacementModel
from families import FAMILIES, IMAGE_ID, VOCABULARY, Encoded, Family
from test_replacement import (
    case,  # noqa: F401
    exact_clt,
    original,
    random_clt,
    without_images,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SAID = np.arange(VOCABULARY) != IMAGE_ID


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def by_hand(
    vlm: VLM, model: ReplacementModel, prompts: Sequence[Encoded], answers: Sequence[list[int]]
) -> dict[tuple[str, ...], np.ndarray]:
    """As `forced`, a sample and a token at a time, in float64, from logits at all positions."""
    found: dict[tuple[str, ...], np.ndarray] = {}

    def add(key: tuple[str, ...], sample: int, value: float) -> None:
        found.setdefault(key, np.zeros(len(prompts)))[sample] += value

    for sample, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        batch = vlm.collate([vlm.extend(prompt, answer)])
        logits = {
            ORIGINAL: original(vlm, batch)[0].double().numpy(),
            "replaced": model.forward(batch)[0].double().numpy(),
        }
        for each in logits.values():
            each[:, IMAGE_ID] = -np.inf
        ids, begin = batch["input_ids"][0].tolist(), prompt["input_ids"].shape[1]
        kinds = vlm.modality(np.array(ids))
        for place in range(1, len(ids)):
            own = log_softmax(logits[ORIGINAL][place - 1])
            hard = own.argmax() == ids[place] and np.exp(own.max()) < 0.8
            groups = {
                "all": kinds[place] == 0 or place >= begin,
                "answer": place >= begin,
                "first": place == begin,
                "hard": hard and (kinds[place] == 0 or place >= begin),
                "hard answer": hard and place >= begin,
            }
            for group, inside in groups.items():
                add(("tokens", group), sample, float(inside))
                for name in logits:
                    other = log_softmax(logits[name][place - 1])
                    figures = {
                        "agree": other.argmax() == own.argmax(),
                        "kl": (np.exp(own[SAID]) * (own[SAID] - other[SAID])).sum(),
                        "ce": -other[ids[place]],
                        "right": other.argmax() == ids[place],
                    }
                    for figure, value in figures.items():
                        add((name, group, figure), sample, float(value) if inside else 0.0)
        for name in logits:
            right = [logits[name][begin - 1 + i].argmax() == token for i, token in enumerate(answer)]
            add((name, "exact"), sample, float(all(right)))
    return found


@pytest.mark.parametrize("images", [True, False])
def test_each_family_as_by_hand(
    case: tuple[Family, VLM],  # noqa: F811
    images: bool,
    tmp_path: Path,
) -> None:
    family, vlm = case
    prompts = family.samples() if images else without_images(family)
    own = vlm.generate(prompts, 4)
    answers = [own[0], own[1][:1], [own[2][0], 7, 11]]  # right, short, wrong after its first token
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    found = forced(vlm, {ORIGINAL: nullcontext, "replaced": model.active}, prompts, answers)
    expected = by_hand(vlm, model, prompts, answers)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert np.allclose(found[key], values, rtol=1e-3, atol=1e-4), key
    assert found[ORIGINAL, "exact"].tolist() == [1, 1, 0]
    assert found["tokens", "answer"].tolist() == [len(answer) for answer in answers]
    assert found["tokens", "hard answer"].sum() > 0 and found["replaced", "answer", "kl"].min() > 0.01


def test_parts_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, family = wrapped("qwen2_vl"), FAMILIES["qwen2_vl"]
    prompts, answers = family.samples(), [[5, 6, 7], [8], [9, 10]]
    model = ReplacementModel(vlm, random_clt(tmp_path / "clt", vlm))
    runs = {ORIGINAL: nullcontext, "replaced": model.active}
    whole = forced(vlm, runs, prompts, answers)
    sizes: list[tuple[int, int]] = []

    def counting(vlm: VLM, batch: dict[str, torch.Tensor], positions: Sequence[int]) -> torch.Tensor:
        found = logits_at(vlm, batch, positions)
        sizes.append((len(batch["input_ids"]), found.shape[1]))
        return found

    logits_at = module.logits_at
    monkeypatch.setattr(module, "logits_at", counting)
    monkeypatch.setattr(module, "MOST_LOGITS", 2 * 61 * 17)
    monkeypatch.setattr(module, "CHUNK", 3 * 61)
    parts = forced(vlm, runs, prompts, answers)
    assert [size for size, _ in sizes] == [2, 2, 1, 1]
    longest = max(one["input_ids"].shape[1] for one in prompts)
    assert max(positions for _, positions in sizes) < longest  # nothing is computed at image tokens
    for key, values in whole.items():
        assert np.allclose(parts[key], values, rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_an_exact_clt_loses_nothing(name: str, tmp_path: Path) -> None:
    vlm, family = wrapped(name), FAMILIES[name]
    prompts = family.samples()
    answers = vlm.generate(prompts, 3)
    batch = vlm.collate([vlm.extend(one, answer) for one, answer in zip(prompts, answers, strict=True)])
    model = ReplacementModel(vlm, exact_clt(tmp_path / "clt", vlm, batch, "mlp_in", (0, 1, 2)))
    runs = {ORIGINAL: nullcontext, "replaced": model.active, "one": lambda: model.active((1,))}
    found = forced(vlm, runs, prompts, answers)
    for name in ("replaced", "one"):
        for group in GROUPS:
            assert found[name, group, "agree"].tolist() == found["tokens", group].tolist()
            assert np.abs(found[name, group, "kl"]).max() < 1e-4
            assert np.allclose(found[name, group, "ce"], found[ORIGINAL, group, "ce"], atol=1e-3)
        assert found[name, "exact"].tolist() == [1, 1, 1]
    model.clt.b_dec[1] += 0.5
    assert forced(vlm, runs, prompts, answers)["one", "all", "kl"].min() > 1e-3


def test_figures_of_single_rows() -> None:
    own = torch.tensor([[2.0, 0.0, -torch.inf], [0.0, 1.0, 3.0], [5.0, 1.0, 0.0]])
    other = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 3.0], [4.0, 1.0, 6.0]])
    no_end = torch.zeros(3, dtype=torch.bool), torch.tensor([], dtype=torch.long)
    found = compare(own, other, torch.tensor([1, 2, 0]), *no_end)
    p = np.exp(2) / (1 + np.exp(2))
    kl = p * (np.log(p) - np.log(1 / (1 + np.e))) + (1 - p) * (np.log(1 - p) - np.log(np.e / (1 + np.e)))
    assert found["kl"][0] == pytest.approx(kl, rel=1e-5) and found["kl"][1] == 0 and found["kl"][2] > 1
    assert found["agree"].tolist() == [0, 1, 0] and found["right"].tolist() == [1, 1, 0]
    assert found["ce"][0] == pytest.approx(np.log(1 + np.exp(-1)), rel=1e-5)
    share, right = certain(own, torch.tensor([1, 2, 0]), *no_end)
    assert right.tolist() == [0, 1, 1] and share[0] == pytest.approx(p, rel=1e-5)


def test_any_end_token_is_the_end_of_an_answer() -> None:
    """Ends 0 and 1; the first row is an answer's end, the second a 0 elsewhere, the third no end."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [0.0, 1.0, 3.0]])
    following, ending, ends = torch.tensor([0, 0, 2]), torch.tensor([True, False, False]), torch.tensor([0, 1])
    found = compare(logits, logits, following, ending, ends)
    assert found["right"].tolist() == certain(logits, following, ending, ends)[1].tolist() == [1, 0, 1]
    p = np.exp([1, 3, 2]) / np.exp([1, 3, 2]).sum()
    assert found["ce"][:2] == pytest.approx([-np.log(p[0] + p[1]), -np.log(p[0])], rel=1e-5)


def test_exact_is_what_greedy_decoding_gives_and_where_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says its answer and then an end token; which of several stands behind the answer says nothing."""
    vlm, prompts, runs = wrapped("mistral3"), FAMILIES["mistral3"].samples()[::2], {ORIGINAL: nullcontext}
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [])
    said = vlm.generate(prompts, 3)
    ends = [one[2] for one in said]
    assert ends[0] != ends[1] and not {*ends} & {*said[0][:2], *said[1][:2]}
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", ends)
    assert vlm.generate(prompts, 9) == said and end_ids(vlm) == ends

    def exact(answers: list[list[int]]) -> list[float]:
        return forced(vlm, runs, prompts, answers)[ORIGINAL, "exact"].tolist()

    for end in ends:
        assert exact([[*one[:2], end] for one in said]) == [1, 1]
    assert exact([[said[0][0], ends[0]], said[1]]) == [0, 1]  # it goes on where the answer ends
    strange = next(token for token in range(3, VOCABULARY) if token not in (*ends, *said[0], *said[1]))
    assert exact([said[0], [*said[1][:2], strange]]) == [1, 0]


def test_end_tokens_inside_a_prompt_are_tokens_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chat templates end every turn with one: only an answer's end may be any of them."""
    vlm, prompts, runs = wrapped("mistral3"), FAMILIES["mistral3"].samples()[::2], {ORIGINAL: nullcontext}
    asked = {int(token) for prompt in prompts for token in prompt["input_ids"].flatten()} - {IMAGE_ID}
    answer = [token for token in range(3, VOCABULARY) if token not in asked and token != IMAGE_ID][:2]
    found = []
    for ends in ([], sorted(asked)):
        monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", ends)
        found.append(forced(vlm, runs, prompts, [answer] * len(prompts)))
    without, with_ends = found
    assert len(asked) > 3 and without.keys() == with_ends.keys()
    for key, values in without.items():
        np.testing.assert_array_equal(with_ends[key], values, err_msg=str(key))


# Several devices ---------------------------------------------------------------------------------------------


def test_a_model_over_several_devices_is_known_by_its_parameters() -> None:
    class Parameters(nn.Module):
        def __init__(self, *devices: str):
            super().__init__()
            self.devices = devices

        def parameters(self, recurse: bool = True) -> Any:
            return [type("Parameter", (), {"device": torch.device(device)}) for device in self.devices]

    assert spread(Parameters("cuda:0", "cuda:1")) and spread(Parameters("meta", "cuda:0"))
    assert not spread(Parameters("cuda:1", "cuda:1")) and not spread(wrapped("llava").model)


def test_logits_of_a_spread_model_are_the_same(
    case: tuple[Family, VLM],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which logits to keep is then a number: accelerate moves a tensor to the first device, hidden states are on the
    last."""
    family, vlm = case
    batch = vlm.collate(family.samples())
    length, given = batch["input_ids"].shape[1], []
    with torch.no_grad():
        own = original(vlm, batch)
        for spread_out in (False, True):
            monkeypatch.setattr(module, "spread", lambda model, spread_out=spread_out: spread_out)
            for places in ([length - 1], [length - 4, length - 2], [0, 3, length - 1], np.arange(length)):
                hook = vlm.model.register_forward_pre_hook(
                    lambda _, args, kwargs: given.append(kwargs["logits_to_keep"]), with_kwargs=True
                )
                found = module.logits_at(vlm, batch, places)
                hook.remove()
                assert found.shape == (len(own), len(places), VOCABULARY)
                assert torch.allclose(found, own[:, places], atol=1e-5)
    assert [one.tolist() for one in given[:3]] == [[length - 1], [length - 4, length - 2], [0, 3, length - 1]]
    assert given[4:] == [1, 4, length, length]


def test_logits_that_a_spread_model_keeps_count_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, prompts = wrapped("llava"), FAMILIES["llava"].samples()
    answers, sizes = [[5, 6, 7], [8], [9, 10]], []
    logits_at = module.logits_at

    def counting(vlm: VLM, batch: dict[str, torch.Tensor], positions: Sequence[int]) -> torch.Tensor:
        sizes.append(len(batch["input_ids"]))
        return logits_at(vlm, batch, positions)

    one = forced(vlm, {ORIGINAL: nullcontext}, prompts, answers)
    monkeypatch.setattr(module, "logits_at", counting)
    monkeypatch.setattr(module, "spread", lambda model: True)
    longest = max(prompt["input_ids"].shape[1] + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    monkeypatch.setattr(module, "MOST_LOGITS", 2 * VOCABULARY * longest)
    found = forced(vlm, {ORIGINAL: nullcontext}, prompts, answers)
    assert sizes == [2, 1]
    for key, values in one.items():
        assert np.allclose(found[key], values, rtol=1e-4, atol=1e-5), key
