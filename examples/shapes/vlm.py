"""The demo VLM, untrained: a small but true LLaVA (CLIP tower, projector, Llama decoder) and its processor."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.shapes.questions import FOOD, MATERIALS, USES
from examples.shapes.scenes import COLORS, COLUMNS, IMAGE_SIZE, ROWS, SHAPES

PATCH = 8  # pixels: a 6x6 grid of patches, four to a cell
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
WIDTH, TEXT_LAYERS, VISION_LAYERS = 128, 6, 4
TEMPLATE = "USER: <image>\n{} ASSISTANT:"
# What the processor's `apply_chat_template` writes; the same text as TEMPLATE for one image and one question.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = (
    *("USER:", "ASSISTANT:", "?", ".", ",", "yes", "no", "even", "odd", "above", "below"),
    *("0", "1", "2", "3", "4", "12"),
    *(*COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES if shape != "cross"), "crosses"),
    *(*ROWS, *COLUMNS, *FOOD.values(), *MATERIALS, *USES),
    *"What Which Where How Is There Do Describe".split(),
    *"a at and are colors corners does food from have in is image just made many number of or".split(),
    *"row column shape color same the there thing things two used for has".split(),
)
VOCABULARY = tuple(dict.fromkeys((*_SPECIAL, *_WORDS)))


def build_processor(image_size: int = IMAGE_SIZE, patch: int = PATCH) -> LlavaProcessor:
    """Word-level tokens; an image is scaled to `image_size` pixels and is (image_size / patch)^2 `<image>` tokens."""
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")  # pyright: ignore[reportCallIssue]
    )
    words = Regex(r"USER:|ASSISTANT:|\w+|[^\w\s]")
    core.pre_tokenizer = pre_tokenizers.Split(words, behavior="removed", invert=True)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # pyright: ignore[reportAttributeAccessIssue]
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", VOCABULARY.index("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=[0.3, 0.3, 0.3],
            image_std=[0.3, 0.3, 0.3],
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=CHAT_TEMPLATE,
    )


def build_config() -> LlavaConfig:
    """Sizes chosen so that 1.3 M parameters fit 3 MB in bfloat16 and later MLPs matter (see README.md)."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
