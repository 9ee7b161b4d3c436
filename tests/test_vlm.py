"""capture/vlm.py against plain forward hooks, family by family, and on models made to be refused."""

import functools
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from capture.sites import SITES, Patterns
from capture.vlm import VLM, load, wrap
from cltjax.errors import UserError
from examples.shapes.vlm import IMAGE_TOKENS, TEMPLATE, build_config, build_processor
from families import (
    AYA_VISION,
    BREAK_ID,
    END_ID,
    EOS,
    FAMILIES,
    IMAGE_ID,
    LLAMA4,
    MLLAMA,
    START_ID,
    Encoded,
    Family,
    processor,
    shake,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def _case(name: str) -> tuple[Family, VLM]:
    family = FAMILIES[name]
    return family, wrap(family.model(), processor(), name)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[Family, VLM]:
    return _case(request.param)


def _hooked(family: Family, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """What plain hooks on the family's modules, named by hand, see in a whole forward pass of the whole model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in (*SITES, "mlp_out", "layer_out")}

    def before(name: str) -> Any:
        return lambda _, args, kwargs: seen[name].append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(name: str) -> Any:
        return lambda _, args, output: seen[name].append((output[0] if isinstance(output, tuple) else output).clone())

    handles = []
    for layer in model.get_decoder().layers:  # pyright: ignore[reportCallIssue]
        handles += [
            layer.register_forward_pre_hook(before("resid_pre"), with_kwargs=True),
            getattr(layer, family.norm).register_forward_pre_hook(before("resid_mid"), with_kwargs=True),
            layer.mlp.register_forward_pre_hook(before("mlp_in"), with_kwargs=True),
            getattr(layer, family.write).register_forward_hook(after("mlp_out")),
            layer.register_forward_hook(after("layer_out")),
        ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def _rows(batch: dict[str, Tensor], tensor: Tensor, number: int) -> Tensor:
    return tensor[number][batch["attention_mask"][number].bool()]


# Each family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trace_equals_plain_hooks_bit_for_bit(case: tuple[Family, VLM], dtype: torch.dtype) -> None:
    family, vlm = case
    if dtype != torch.float32:
        vlm = wrap(family.model().to(dtype), processor(), family.name)
    batch = vlm.collate(family.samples())
    assert batch["input_ids"].shape[0] == 3 and not batch["attention_mask"].all()
    vlm.verify(batch)
    hooked = _hooked(family, vlm.model, batch)
    layers = (2, 0, 1)
    for site in SITES:
        trace = vlm.trace(batch, site, layers)
        for index, layer in enumerate(layers):
            for number in range(3):
                got, write = (_rows(batch, x[index], number) for x in (trace.site, trace.mlp_out))
                assert torch.equal(got, _rows(batch, hooked[site][layer], number))
                assert torch.equal(write, _rows(batch, hooked["mlp_out"][layer], number))
                if site == "resid_mid":
                    assert torch.equal(got + write, _rows(batch, hooked["layer_out"][layer], number))


def test_alone_equals_padded(case: tuple[Family, VLM]) -> None:
    family, vlm = case
    samples = family.samples()
    batch = vlm.collate(samples)
    for site in SITES:
        together = vlm.trace(batch, site, range(vlm.n_layers))
        for number, sample in enumerate(samples):
            alone = vlm.trace(vlm.collate([sample]), site, range(vlm.n_layers))
            for one, all_of_them in zip(alone.site + alone.mlp_out, together.site + together.mlp_out, strict=True):
                padded = _rows(batch, all_of_them, number)
                assert one.shape == (1, *padded.shape)
                assert (one[0] - padded).abs().max() <= 1e-5 * padded.abs().max()


def test_image_reaches_its_own_rows_only(case: tuple[Family, VLM]) -> None:
    family, vlm = case
    samples = family.samples()
    changed = [dict(sample) for sample in samples]
    changed[0]["pixel_values"] = family.samples(seed=1)[0]["pixel_values"]
    before, after = (vlm.trace(vlm.collate(some), "mlp_in", (0, 2)) for some in (samples, changed))
    is_image = samples[0]["input_ids"][0] == IMAGE_ID
    for one, other in zip(before.site + before.mlp_out, after.site + after.mlp_out, strict=True):
        differs = torch.ne(one, other).any(-1)
        assert differs[0, : len(is_image)][is_image].all()
        assert not differs[1:].any()


def test_grids_and_modality(case: tuple[Family, VLM]) -> None:
    family, vlm = case
    for sample, grid in zip(family.samples(), family.grids, strict=True):
        assert vlm.image_grid(sample) == grid
        ids = sample["input_ids"][0].numpy()
        assert sum(rows * columns for rows, columns in grid) == (ids == IMAGE_ID).sum()
        kinds = vlm.modality(ids)
        assert ((kinds == 1) == (ids == IMAGE_ID)).all()
        assert kinds[0] == 2 and (kinds[np.isin(ids, [BREAK_ID, END_ID])] == 2).all()
        assert (kinds[(ids >= 3) & (ids < 53)] == 0).all()
    plain = {name: torch.full((1, 4), 7) for name in ("input_ids", "attention_mask")}
    assert vlm.image_grid(plain) == []


def test_greedy_answers_are_what_teacher_forcing_predicts(case: tuple[Family, VLM]) -> None:
    family, vlm = case
    samples = family.samples()
    answers = vlm.generate(samples, 5)
    assert all(len(answer) == 5 or answer[-1] == EOS for answer in answers)
    whole = [vlm.extend(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    batch = vlm.collate(whole)
    with torch.no_grad():
        logits = vlm.model(**batch).logits
    logits[..., IMAGE_ID] = -torch.inf
    for number, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        start, stop = sample["input_ids"].shape[1], whole[number]["input_ids"].shape[1]
        assert batch["input_ids"][number, start:stop].tolist() == answer
        assert logits[number, start - 1 : stop - 1].argmax(-1).tolist() == answer
        assert vlm.image_grid(whole[number]) == family.grids[number]


def test_prompts_without_images(case: tuple[Family, VLM]) -> None:
    """Also right after images: qwen keeps the last batch's position offsets in the model."""
    family, vlm = case
    with_images = family.samples()
    names = [name for name in ("input_ids", "attention_mask", family.types) if name]
    plain = [{name: sample[name][:, -5:] for name in names} for sample in with_images]
    fresh = wrap(family.model(), processor(), family.name)
    expected = fresh.trace(fresh.collate(plain), "mlp_in", (0, 1, 2)), fresh.generate(plain, 3)
    vlm.generate(with_images, 2)
    vlm.trace(vlm.collate(with_images), "mlp_in", (0,))
    got = vlm.trace(vlm.collate(plain), "mlp_in", (0, 1, 2)), vlm.generate(plain, 3)
    assert all(map(torch.equal, got[0].site, expected[0].site)) and got[1] == expected[1]
    with pytest.raises(ValueError, match="cannot share a batch"):
        vlm.collate([with_images[0], plain[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_on_what_is_added_is_refused(case: tuple[Family, VLM], dtype: torch.dtype) -> None:
    family, _ = case
    model: Any = family.model().to(dtype)
    layer = model.get_decoder().layers[1]
    whole, written = layer.forward, []
    getattr(layer, family.write).register_forward_hook(lambda _, args, output: written.append(output))
    layer.forward = lambda *args, **kwargs: whole(*args, **kwargs) + 0.02 * written.pop()
    vlm = wrap(model, processor(), family.name)
    with pytest.raises(UserError, match=r"layer 1 \(.*\) cannot be captured: .*with factor 1\.0[12]"):
        vlm.trace(vlm.collate(family.samples()), "mlp_in", (0,))
    assert vlm.sites is None and not any(module._forward_pre_hooks for module in model.modules())


def test_deepstack_is_seen_between_layers() -> None:
    """qwen3_vl adds visual features to image tokens after layers 0 and 1, outside the layers."""
    family, vlm = _case("qwen3_vl")
    batch = vlm.collate(family.samples())
    vlm.verify(batch)
    assert vlm.added_between == (1, 2)
    hooked = _hooked(family, vlm.model, batch)
    differs = (hooked["resid_pre"][1] != hooked["layer_out"][0]).any(-1)
    assert torch.equal(differs, batch["input_ids"] == IMAGE_ID)
    _, other = _case("qwen2_vl")
    other.verify(other.collate(FAMILIES["qwen2_vl"].samples()))
    assert other.added_between == ()


def test_mllama_is_refused() -> None:
    vlm = wrap(MLLAMA.model(), processor(), "mllama")
    with pytest.raises(UserError, match=r"layer 1 \(MllamaCrossAttentionDecoderLayer\).*factor.*cross_attn_mlp_gate"):
        vlm.verify(vlm.collate(MLLAMA.samples()))
    plain = {"input_ids": torch.tensor([[1, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(UserError, match="layer 1 .*did not run"):
        vlm.trace(vlm.collate([plain]), "mlp_in", (0,))


def test_parallel_attention_is_refused() -> None:
    vlm = wrap(AYA_VISION.model(), processor(), "aya_vision")
    with pytest.raises(UserError, match=r"layer 0 \(Cohere2DecoderLayer\).*attention and MLP run side by side"):
        vlm.verify(vlm.collate(AYA_VISION.samples()))


def test_llama4_by_pattern() -> None:
    """Its decoder has a head of its own, and a layer of experts returns a tuple."""
    with pytest.raises(UserError, match="'mlp', not one: self_attn, feed_forward"):
        wrap(LLAMA4.model(), processor(), "llama4")
    vlm = wrap(LLAMA4.model(), processor(), "llama4", patterns=Patterns(mlp="feed_forward"))
    batch = vlm.collate(LLAMA4.samples())
    mid, entry = (vlm.trace(batch, site, range(3)) for site in ("resid_mid", "resid_pre"))
    for layer in (0, 1):  # nothing comes between its layers
        out = mid.site[layer] + mid.mlp_out[layer]
        assert torch.equal(_rows(batch, out, 1), _rows(batch, entry.site[layer + 1], 1))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_the_last_column_of_tiles_is_the_newline(name: str) -> None:
    family, vlm = _case(name)
    model: Any = vlm.model
    for sample in family.samples():
        entry = vlm.trace(vlm.collate([sample]), "resid_pre", (0,)).site[0][0]
        image = entry[sample["input_ids"][0] == IMAGE_ID]
        (rows, columns), tiles = vlm.image_grid(sample) or []
        is_newline = torch.eq(image, model.model.image_newline).all(-1)
        assert not is_newline[: rows * columns].any()
        grid = is_newline[rows * columns :].reshape(tiles)
        assert grid[:, -1].all() and not grid[:, :-1].any()


# Other shapes of layer ---------------------------------------------------------------------------------------


class _Block(nn.Module):
    """A layer with other names, and with one thing that `kind` says about how the MLP is added."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.kind = kind
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(width) for _ in range(3))
        self.mixer = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width))
        self.drop = nn.Dropout(0.5)
        if kind == "tuple":
            dense = self.ffn
            self.ffn = nn.Module()
            self.ffn.dense = dense
            self.ffn.forward = lambda x: (dense(x), x.mean())

    def forward(self, x: Tensor) -> Any:
        mixed = self.mixer(self.ln_1(x).cumsum(1))
        if self.kind == "parallel":
            return x + mixed + self.ffn(self.ln_1(x))
        x = x + mixed
        match self.kind:
            case "plain":
                return x + self.drop(self.ffn(self.drop(self.ln_2(x))))
            case "tuple":
                return (x + self.ffn(self.ln_2(x))[0], None)
            case "flat":
                return x + self.ffn(self.ln_2(x).reshape(-1, x.shape[-1])).view_as(x)
            case "sandwich":
                return x + self.drop(self.ln_3(self.ffn(self.ln_2(x))))
            case "postnorm":
                return x + self.ln_3(self.ffn(x))
            case "scaled":
                return x + 0.9 * self.ffn(self.ln_2(x))
            case "twice":
                return x + self.ffn(self.ln_2(x)) + self.ffn(x)
            case "inplace":
                x += self.ffn(self.ln_2(x))
                return x
        raise AssertionError(self.kind)


class _Custom(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.embed = nn.Embedding(61, 11)
        self.tower = nn.ModuleDict({"blocks": nn.ModuleList(_Block(11, kind) for _ in range(2))})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.tower["blocks"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


PATTERNS = Patterns(layers="tower.blocks.*", mlp="ffn")


def _custom(kind: str, patterns: Patterns = PATTERNS) -> tuple[VLM, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = _Custom(kind)
    shake(model)
    vlm = wrap(model, processor(), kind, patterns=patterns, d_model=11)
    ids = torch.arange(3, 18).reshape(3, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return vlm, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["plain", "tuple", "flat", "sandwich", "postnorm"])
def test_custom_models_by_patterns(kind: str) -> None:
    vlm, batch = _custom(kind)
    assert vlm.n_layers == 2 and vlm.name == kind
    with pytest.raises(UserError, match="cannot generate"):
        vlm.generate([batch], 1)
    mid = vlm.trace(batch, "resid_mid", (0, 1))
    entry = vlm.trace(batch, "resid_pre", (0, 1))
    for layer, block in enumerate(vlm.layers):
        assert isinstance(block, _Block)
        with torch.no_grad():
            x = entry.site[layer]
            x = x + block.mixer(block.ln_1(x).cumsum(1))
            assert torch.equal(mid.site[layer], x)
            out = block(entry.site[layer])
            assert torch.equal(x + mid.mlp_out[layer], out[0] if kind == "tuple" else out)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("parallel", "is not resid_mid"),
        ("scaled", "factor 0.9;|factor 0.9[)]"),
        ("twice", "MLP ran 2 times"),
        ("inplace", "overwrites activations in place"),
    ],
)
def test_custom_models_refused(kind: str, reason: str) -> None:
    vlm, batch = _custom(kind)
    with pytest.raises(UserError, match=f"layer 0 .*{reason}"):
        vlm.verify(batch)


def test_patterns_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"layer pattern 'blocks\.\*'.*tower\.blocks\.0"):
        _custom("plain", Patterns(layers="blocks.*", mlp="ffn"))
    with pytest.raises(UserError, match="MLP pattern 'mlp', not one: ln_1"):
        _custom("plain", Patterns(layers="tower.*.*"))
    with pytest.raises(UserError, match="no get_decoder"):
        _custom("plain", Patterns())
    for given in (Patterns("tower.blocks.*", "ffn", norm="ln_2", write="ln_3"), PATTERNS):
        vlm, batch = _custom("sandwich", given)
        vlm.verify(batch)
        assert vlm.sites and vlm.sites[0].mlp_out.module is vlm.layers[0].ln_3
    wrong, batch = _custom("sandwich", Patterns("tower.blocks.*", "ffn", write="ffn"))
    with pytest.raises(UserError, match="is not resid_mid"):
        wrong.verify(batch)


def test_renamed_family() -> None:
    """A LLaVA whose MLPs go by another name is found by pattern, with the same numbers."""
    family, vlm = _case("llava")
    model: Any = family.model()
    for layer in model.get_decoder().layers:
        mlp = layer.mlp
        del layer.mlp
        layer.add_module("feed_forward", mlp)
        layer.forward = functools.partial(_llama_layer, layer)
    with pytest.raises(UserError, match="0 of its modules match the MLP pattern 'mlp'"):
        wrap(model, processor(), "renamed")
    renamed = wrap(model, processor(), "renamed", patterns=Patterns("model.language_model.layers.?", "feed_*"))
    batch = vlm.collate(family.samples())
    one, other = (some.trace(batch, "mlp_in", (0, 2)) for some in (vlm, renamed))
    assert all(map(torch.equal, one.site + one.mlp_out, other.site + other.mlp_out))


def _llama_layer(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    kwargs.pop("use_cache", None)
    mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + mixed
    return hidden_states + layer.feed_forward(layer.post_attention_layernorm(hidden_states))


# Answers, and the demo's own processor -----------------------------------------------------------------------


def test_answers_end_with_their_end_token() -> None:
    family = FAMILIES["llava"]
    model: Any = family.model()
    model.generation_config.repetition_penalty = 5.0  # not greedy: must not be applied
    vlm = wrap(model, processor(), "llava")
    plain = _case("llava")[1].generate(family.samples(), 5)
    assert vlm.generate(family.samples(), 5) == plain
    end = plain[0][2]
    model.generation_config.eos_token_id = [end]
    expected = [answer[: answer.index(end) + 1] if end in answer else answer for answer in plain]
    assert vlm.generate(family.samples(), 5) == expected
    assert model.generation_config.repetition_penalty == 5.0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the demo VLM, untrained."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    torch.manual_seed(0)
    LlavaForConditionalGeneration(build_config()).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def _image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8))


def test_load_and_encode(demo: Any) -> None:
    vlm = load(str(demo), "float32", "cpu")
    assert (vlm.family, vlm.class_name, vlm.n_layers, vlm.d_model) == ("llava", "LlavaForConditionalGeneration", 6, 128)
    assert len(vlm.revision) == 16 and not any(p.requires_grad for p in vlm.model.parameters())
    assert load(str(demo), "bfloat16", "cpu").dtype == torch.bfloat16 and not vlm.model.training
    samples = [
        vlm.encode(TEMPLATE.format(text), _image(i)) for i, text in enumerate(["Is there?", "How many shapes ?"])
    ]
    assert samples[0]["pixel_values"].shape == (1, 3, 48, 48)
    for sample in samples:
        kinds = vlm.modality(sample["input_ids"])
        assert (kinds == 1).sum() == IMAGE_TOKENS and kinds[0, 0] == 2 and vlm.image_grid(sample) == [[6, 6]]
    trace = vlm.trace(vlm.collate(samples), "mlp_in", (1, 4))
    assert trace.site[0].shape == (2, samples[1]["input_ids"].shape[1], 128)
    answers = vlm.generate(samples, 3)
    assert isinstance(vlm.decode(answers[0]), str)
    plain = vlm.encode("USER: How many ? ASSISTANT:", None)
    assert "pixel_values" not in plain
    # a template that writes the first token itself does not get a second one
    again = vlm.encode("<s>USER: How many ? ASSISTANT:", None)
    assert again["input_ids"].tolist() == plain["input_ids"].tolist()


def test_encode_refuses_what_does_not_fit(demo: Any) -> None:
    vlm = load(str(demo), "float32", "cpu")
    for text in ("USER: How many ? ASSISTANT:", TEMPLATE.format("<image> How many ?")):
        with pytest.raises(UserError, match="image"):
            vlm.encode(text, _image(0))


def test_revision_follows_the_weights(demo: Any, tmp_path: Any) -> None:
    torch.manual_seed(1)
    LlavaForConditionalGeneration(build_config()).save_pretrained(tmp_path / "other")
    build_processor().save_pretrained(tmp_path / "other")
    shutil.copytree(demo, tmp_path / "copy")
    one, other, copy = (load(str(path), "float32").revision for path in (demo, tmp_path / "other", tmp_path / "copy"))
    assert one == copy != other


def test_what_cannot_be_loaded_is_one_line(demo: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    shutil.copytree(demo, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    shutil.copytree(demo, tmp_path / "blind", ignore=shutil.ignore_patterns("*processor*"))
    for model, reason in {
        "someone/some-model": "cannot be reached.*no network",
        "./nowhere": "no such folder",
        str(tmp_path / "cut"): "cannot be loaded",
        str(tmp_path / "empty"): "cannot be loaded",
        str(tmp_path / "blind"): "cannot be loaded.*image processor",
    }.items():
        with pytest.raises(UserError, match=f"{reason}.*examples/shapes/model") as caught:
            load(model)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="float16"):
        load(str(demo), "int8")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA"):
            load(str(demo), "float32", "cuda")


def test_text_model_is_refused_at_once(demo: Any, tmp_path: Any) -> None:
    model: Any = load(str(demo), "float32").model
    model.get_decoder().save_pretrained(tmp_path / "text")
    build_processor().save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(tmp_path / "text"))


def test_a_package_that_a_processor_misses_is_named(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ImportError("\nAProcessor requires the Torchvision library but it was not found in your environment. ...")

    monkeypatch.setattr("capture.vlm.AutoProcessor.from_pretrained", fail)
    with pytest.raises(UserError, match=r"needs the package torchvision \(pip install torchvision\);"):
        load(str(demo))


def test_unknown_grid_is_none() -> None:
    family, vlm = _case("llava")
    sample = family.sample(0)
    sample["input_ids"] = torch.cat([sample["input_ids"], torch.tensor([[IMAGE_ID]])], dim=1)  # a class token, say
    assert vlm.image_grid(sample) is None


def test_delimiters_are_special_wherever_they_are_named() -> None:
    tokenizer = SimpleNamespace(
        pad_token_id=0, all_special_ids=[0], get_vocab=lambda: {"<row_2_col_1>": 40, "row": 41, "[IMG_BREAK]": 42}
    )
    one = SimpleNamespace(tokenizer=tokenizer, fake_image_token_id=43, image_token=44, unrelated_token_id=45)
    vlm = wrap(FAMILIES["qwen2_vl"].model(), one, "qwen2_vl")  # its config names START_ID and END_ID
    ids = np.array([0, 40, 41, 42, 43, 44, 45, START_ID, END_ID, IMAGE_ID])
    assert vlm.modality(ids).tolist() == [2, 2, 0, 2, 2, 0, 0, 2, 2, 1]
    assert vlm.modality(torch.from_numpy(ids)).dtype == np.uint8


def _ids(sample: Encoded) -> list[int]:
    return sample["input_ids"][0].tolist()


def test_extend_leaves_the_prompt_as_it_was(case: tuple[Family, VLM]) -> None:
    family, vlm = case
    sample = family.sample(1)
    before = _ids(sample)
    longer = vlm.extend(sample, [5, 6, 2])
    assert _ids(longer) == [*before, 5, 6, 2] and _ids(sample) == before
    assert longer["attention_mask"].sum() == len(before) + 3
    if family.types:
        assert longer[family.types][0, -3:].tolist() == [int(family.name.startswith("paligemma"))] * 3
    assert _ids(vlm.extend(sample, [])) == before
