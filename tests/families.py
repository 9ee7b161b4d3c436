"""Every family of vision-language models that capture knows, tiny, with random weights and hand-made inputs.

Widths are odd where the family permits it; the three samples of a family have unequal prompts and, where image
sizes vary, unequal images. All parameters are randomised (`shake`): several families start norms, gates or biases
at 0 or 1, where a wrong site would look right.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

Encoded = dict[str, Tensor]
hf: Any = transformers  # its configurations take more fields than their types say

PAD, BOS, EOS = 0, 1, 2
IMAGE_ID, START_ID, END_ID, VIDEO_ID, BREAK_ID = 59, 58, 57, 60, 56
WORDS = range(3, 53)  # ids that are plain text
VOCABULARY = 61
LENGTHS = (5, 11, 7)  # words behind the image, one number a sample


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], nn.Module]
    image: Callable[[np.random.Generator, int], tuple[list[int], Encoded]]
    """The ids an image stands for, with its delimiters, and its tensors; the second argument is the sample's number."""
    grids: tuple[list[list[int]], ...]
    """What image_grid says of the three samples."""
    norm: str = "post_attention_layernorm"
    write: str = "mlp"
    types: str = ""
    """The family's token-type argument, where it has one."""

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build().eval().requires_grad_(False)
        shake(model)
        return model

    def samples(self, seed: int = 0) -> list[Encoded]:
        return [self.sample(number, seed) for number in range(len(LENGTHS))]

    def sample(self, number: int, seed: int = 0) -> Encoded:
        rng = np.random.default_rng([seed, number])
        ids, image = self.image(rng, number)
        words = rng.choice(WORDS, LENGTHS[number])
        input_ids = torch.tensor([[BOS, *ids, *words]])
        sample = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **image}
        if self.types:
            is_image = (input_ids == IMAGE_ID).long()
            sample[self.types] = torch.zeros_like(is_image) if self.name.startswith("paligemma") else is_image
        return sample


def shake(model: nn.Module) -> None:
    """Move every parameter off its initial value, by enough that no norm, gate or bias is without effect."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            scale = 0.3
        else:  # over the root of what one output sees; experts are [expert, in, out]
            scale = 0.7 / (parameter[0, 0] if parameter.dim() == 3 else parameter[0]).numel() ** 0.5
        parameter.data.add_(scale * noise)


def processor() -> Any:
    """As much of a processor as a VLM asks for when its inputs are hand-made."""
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, bos_token="<s>", all_special_ids=[PAD, BOS, EOS])
    return SimpleNamespace(tokenizer=tokenizer, image_break_token_id=BREAK_ID, image_end_token_id=END_ID)


# Images ------------------------------------------------------------------------------------------------------


def _pixels(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def _fixed(tokens: int, size: int, tiles: tuple[int, int, int] = (1, 1, 1)) -> Any:
    """`tokens` placeholders for each of a sample's tiles, all of one size, in one run."""

    def image(rng: np.random.Generator, number: int) -> tuple[list[int], Encoded]:
        count = tiles[number]
        return [START_ID, *[IMAGE_ID] * tokens * count, END_ID], {"pixel_values": _pixels(rng, count, 3, size, size)}

    return image


def _anyres(counts: tuple[int, int, int], sizes: tuple[tuple[int, int], ...], tiles: tuple[int, int, int]) -> Any:
    """LLaVA-NeXT: the whole image and its tiles, 16x16 pixels each."""

    def image(rng: np.random.Generator, number: int) -> tuple[list[int], Encoded]:
        pixels = _pixels(rng, 1, 1 + tiles[number], 3, 16, 16)
        return [IMAGE_ID] * counts[number], {"pixel_values": pixels, "image_sizes": torch.tensor([sizes[number]])}

    return image


def _pixtral(rng: np.random.Generator, number: int) -> tuple[list[int], Encoded]:
    """Mistral 3: patches of 8 merged 2x2, a break token after each row and an end token after the last."""
    rows, columns = ((2, 3), (3, 2), (1, 2))[number]
    ids = [token for _ in range(rows) for token in (*[IMAGE_ID] * columns, BREAK_ID)]
    sizes = torch.tensor([[rows * 16, columns * 16]])
    return [*ids[:-1], END_ID], {"pixel_values": _pixels(rng, 1, 3, rows * 16, columns * 16), "image_sizes": sizes}


def _qwen(patch: int) -> Any:
    """Qwen: flattened patches of two frames in merge order; a grid of (time, rows, columns) before merging 2x2."""

    def image(rng: np.random.Generator, number: int) -> tuple[list[int], Encoded]:
        rows, columns = ((4, 6), (6, 4), (2, 4))[number]
        tensors = {
            "pixel_values": _pixels(rng, rows * columns, 3 * 2 * patch * patch),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }
        return [START_ID, *[IMAGE_ID] * (rows * columns // 4), END_ID], tensors

    return image


def _tiles(rng: np.random.Generator, number: int) -> tuple[list[int], Encoded]:
    """Idefics 3: 2x2 tokens for each tile of 16x16 pixels, every tile between its own delimiters."""
    count = (3, 1, 2)[number]
    ids = [token for _ in range(count) for token in (START_ID, *[IMAGE_ID] * 4)]
    mask = torch.ones(1, count, 16, 16, dtype=torch.bool)
    return [*ids, START_ID], {"pixel_values": _pixels(rng, 1, count, 3, 16, 16), "pixel_attention_mask": mask}


def _mllama(rng: np.random.Generator, number: int) -> tuple[list[int], Encoded]:
    length = 2 + LENGTHS[number]
    return [IMAGE_ID], {
        "pixel_values": _pixels(rng, 1, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        "cross_attention_mask": torch.ones(1, length, 1, 2, dtype=torch.long),
    }


# Configurations ----------------------------------------------------------------------------------------------


def _text(*, width: int = 39, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 41,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    } | more


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 20,
        "intermediate_size": 23,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    } | more


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_vision(projection_dim=20)),
        text_config=hf.LlamaConfig(**_text()),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return hf.LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_vision(projection_dim=20)),
        text_config=hf.MistralConfig(**_text()),
        image_token_id=IMAGE_ID,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_vision()),
        text_config=hf.Qwen2Config(**_text(width=24)),
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
        vision_aspect_ratio="anyres_max_2",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _internvl() -> nn.Module:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**_vision(image_size=[16, 16], patch_size=[4, 4])),
        text_config=hf.Qwen2Config(**_text(width=24)),
        image_token_id=IMAGE_ID,
        image_seq_length=4,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config)


def _mistral3() -> nn.Module:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**_vision(image_size=48, patch_size=8, head_dim=10)),
        text_config=hf.MistralConfig(**_text()),
        image_token_id=IMAGE_ID,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return hf.Mistral3ForConditionalGeneration(config)


def _paligemma(text: type) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**_vision(projection_dim=39, vision_use_head=False)),
            text_config=text(**_text()),
            image_token_id=IMAGE_ID,
            projection_dim=39,
        )
        return hf.PaliGemmaForConditionalGeneration(config)

    return build


def _gemma3() -> nn.Module:
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=hf.Gemma3TextConfig(**_text(sliding_window=8, layer_types=_GEMMA3_LAYERS)),
        mm_tokens_per_image=4,
        image_token_id=IMAGE_ID,
        boi_token_id=START_ID,
        eoi_token_id=END_ID,
    )
    return hf.Gemma3ForConditionalGeneration(config)


_GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

_QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
}


def _rope(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


def _qwen2_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "embed_dim": 24,
        "hidden_size": 24,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    text = _text(width=24, head_dim=None, rope_parameters=_rope([1, 1, 2]))
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS, tie_word_embeddings=False)
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "out_hidden_size": 24,
        "num_heads": 2,
        "intermediate_size": 29,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    text = _text(width=24, head_dim=None, rope_parameters=_rope([1, 1, 2]))
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS, tie_word_embeddings=False)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(moe: bool = False) -> nn.Module:
    width = 48 if moe else 39  # grouped matrix products of experts want rows of 16 bytes
    vision = {
        "depth": 3,
        "hidden_size": 24,
        "out_hidden_size": width,
        "num_heads": 2,
        "intermediate_size": 29,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _text(width=width, head_dim=8, rope_parameters=_rope([2, 1, 1]))
    if not moe:
        config = hf.Qwen3VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS, tie_word_embeddings=False)
        return hf.Qwen3VLForConditionalGeneration(config)
    text |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = hf.Qwen3VLMoeConfig(vision_config=vision, text_config=text, **_QWEN_IDS, tie_word_embeddings=False)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


def _idefics3() -> nn.Module:
    config = hf.Idefics3Config(
        vision_config=_vision(),
        text_config=hf.LlamaConfig(**_text()),
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return hf.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> nn.Module:
    config = hf.SmolVLMConfig(
        vision_config=_vision(),
        text_config=hf.LlamaConfig(**_text()),
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _aya_vision() -> nn.Module:
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=hf.Cohere2Config(**_text()),
        image_token_id=IMAGE_ID,
        downsample_factor=2,
        alignment_intermediate_size=16,
    )
    return hf.AyaVisionForConditionalGeneration(config)


def _llama4() -> nn.Module:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 24,
        "projector_output_dim": 24,
        "vision_output_dim": 24,
    }
    experts: dict[str, Any] = {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "intermediate_size_mlp": 43,
    }
    config = hf.Llama4Config(vision_config=vision, text_config=_text(head_dim=8, **experts), image_token_index=IMAGE_ID)
    return hf.Llama4ForConditionalGeneration(config)


def _mllama_model() -> nn.Module:
    vision = {
        "hidden_size": 20,
        "intermediate_size": 23,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 40,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    text = _text(
        width=24, head_dim=8, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    text["vocab_size"] = VOCABULARY
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    return hf.MllamaForConditionalGeneration(config)


_GEMMA = {"norm": "pre_feedforward_layernorm", "write": "post_feedforward_layernorm"}

FAMILIES = {
    family.name: family
    for family in (
        Family("llava", _llava, _fixed(16, 16), ([[4, 4]],) * 3),
        Family(
            "llava_next",
            _llava_next,
            # 16 for the whole image; 16x32 pixels are 4 rows of 8, 40x24 without padding 8 of 4, 24x40 4 of 8
            _anyres((16 + 4 * 9, 16 + 8 * 5, 16 + 4 * 9), ((16, 32), (40, 24), (24, 40)), (2, 4, 4)),
            ([[4, 4], [4, 9]], [[4, 4], [8, 5]], [[4, 4], [4, 9]]),
        ),
        Family(
            "llava_onevision",
            _llava_onevision,
            _anyres((16 + 4 * 9, 16 + 4 * 5, 16 + 5 * 6), ((16, 32), (16, 16), (32, 32)), (2, 1, 4)),
            ([[4, 4], [4, 9]], [[4, 4], [4, 5]], [[4, 4], [5, 6]]),
        ),
        Family("internvl", _internvl, _fixed(4, 16, (3, 1, 2)), ([[2, 2]] * 3, [[2, 2]], [[2, 2]] * 2)),
        Family("mistral3", _mistral3, _pixtral, ([[2, 3]], [[3, 2]], [[1, 2]])),
        Family("paligemma", _paligemma(hf.GemmaConfig), _fixed(16, 16), ([[4, 4]],) * 3, types="token_type_ids"),
        Family(
            "paligemma2", _paligemma(hf.Gemma2Config), _fixed(16, 16), ([[4, 4]],) * 3, types="token_type_ids", **_GEMMA
        ),
        Family("qwen2_vl", _qwen2_vl, _qwen(4), ([[2, 3]], [[3, 2]], [[1, 2]]), types="mm_token_type_ids"),
        Family("qwen2_5_vl", _qwen2_5_vl, _qwen(4), ([[2, 3]], [[3, 2]], [[1, 2]]), types="mm_token_type_ids"),
        Family("qwen3_vl", _qwen3_vl, _qwen(4), ([[2, 3]], [[3, 2]], [[1, 2]]), types="mm_token_type_ids"),
        Family(
            "qwen3_vl_moe",
            functools.partial(_qwen3_vl, moe=True),
            _qwen(4),
            ([[2, 3]], [[3, 2]], [[1, 2]]),
            types="mm_token_type_ids",
        ),
        Family("idefics3", _idefics3, _tiles, ([[2, 2]] * 3, [[2, 2]], [[2, 2]] * 2)),
        Family("smolvlm", _smolvlm, _tiles, ([[2, 2]] * 3, [[2, 2]], [[2, 2]] * 2)),
        Family("gemma3", _gemma3, _fixed(4, 16), ([[2, 2]],) * 3, types="token_type_ids", **_GEMMA),
    )
}
# Refused: gated cross-attention layers; attention and MLP side by side.
MLLAMA = Family("mllama", _mllama_model, _mllama, ([], [], []))
AYA_VISION = Family("aya_vision", _aya_vision, _fixed(4, 16), ([[2, 2]],) * 3)
# Found by a pattern: its MLPs are called feed_forward, and the one with experts returns a tuple.
LLAMA4 = Family("llama4", _llama4, _fixed(4, 16), ([[2, 2]],) * 3)
