"""LLaVAs of any size with random weights: what a speed or memory measurement needs of a model is its shape.

    python -m benchmarks.shaped_vlm --width 1024 --layers 8 --out /tmp/llava-1024

The processor is the demo VLM's, at 336 pixels and patch 14: 576 image tokens an image, as in LLaVA-1.5.
"""

import argparse
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from examples.shapes.vlm import build_processor

IMAGE_SIZE, PATCH = 336, 14


def shaped_config(
    width: int, layers: int, heads: int, intermediate: int, vision_width: int, vision_layers: int
) -> LlavaConfig:
    ids = build_processor().tokenizer
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_width // 64,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            pad_token_id=ids.pad_token_id,
            bos_token_id=ids.bos_token_id,
            eos_token_id=ids.eos_token_id,
        ),
        image_token_index=ids.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
    )


LLAVA_7B = {"width": 4096, "layers": 32, "heads": 32, "intermediate": 11008, "vision_width": 1024, "vision_layers": 24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = shaped_config(options.width, options.layers, options.width // 64, 11 * options.width // 4, 256, 4)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(options.out)  # pyright: ignore[reportArgumentType]
    processor = build_processor(IMAGE_SIZE, PATCH)
    processor.tokenizer.model_max_length = config.text_config.max_position_embeddings  # pyright: ignore
    processor.save_pretrained(options.out)


if __name__ == "__main__":
    main()
