"""A vision-language model as the rest of the project sees it: prompts and images in, sites and MLP writes out.

Families tried with tiny random models (tests/test_vlm.py): llava, llava_next, llava_onevision, internvl, mistral3,
paligemma (Gemma 1 and 2), qwen2_vl, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, gemma3. Others work if their
arithmetic verifies (capture/sites.py) and are refused with the reason if not, mllama for one: its cross-attention
layers add their MLP's output times the tanh of a gate; aya_vision for another: its attention and MLP run side by side.

In transformers 5.23 the processors of llava, llava_next, paligemma, idefics3 and gemma3 work with PIL alone; those of
llava_onevision, internvl, mistral3 and the qwen families need torchvision, that of smolvlm num2words as well.
"""

import hashlib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import logging

from capture import inputs
from capture.inputs import Encoded
from capture.sites import SITES, LayerSites, Patterns, find_layers, find_mlps, locate, record
from cltjax.errors import UserError

__all__ = ["VLM", "Encoded", "Patterns", "Trace", "load", "wrap"]

DEMO = "examples/shapes/model"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REACH_SECONDS = 10
SAMPLED = 1 << 20  # bytes at either end of a weight file that enter the revision of a local folder


@dataclass(frozen=True)
class Trace:
    """One forward pass, by layer asked for: what the site and the MLP's write were, [B, P, D] each."""

    site: list[Tensor]
    mlp_out: list[Tensor]


@dataclass
class VLM:
    """A loaded model. `verify` finds the sites on the first batch; `trace` calls it where nobody did."""

    model: nn.Module
    processor: Any
    name: str
    revision: str
    d_model: int
    patterns: Patterns = field(default_factory=Patterns)
    sites: list[LayerSites] | None = None
    added_between: tuple[int, ...] = ()
    """Layers whose input is more than the output of the layer before: where qwen3_vl's deepstack enters. Known after
    `verify`, from that batch (a batch without images shows none)."""

    def __post_init__(self) -> None:
        self.layers = find_layers(self.model, self.patterns)
        find_mlps(self.layers, self.patterns)
        self.config: Any = getattr(self.model, "config", None)
        self.image_id = inputs.image_token_id(self.config)
        special = inputs.special_token_ids(self.config, self.processor) - {self.image_id}
        self._special_ids = np.array(sorted(special), dtype=np.int64)
        self.base = _without_head(self.model, self.layers)
        self._accepted = _parameters(self.model)

    @property
    def family(self) -> str:
        """The config's model_type, e.g. llava."""
        return getattr(self.config, "model_type", type(self.model).__name__)

    @property
    def class_name(self) -> str:
        return type(self.model).__name__

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where inputs go and traces come back."""
        return next(p.device for p in self.model.parameters() if p.device.type != "meta")  # meta: offloaded

    @property
    def dtype(self) -> torch.dtype:
        """What the text layers compute in."""
        return next(parameter.dtype for parameter in self.layers[0].parameters() if parameter.is_floating_point())

    # One sample ----------------------------------------------------------------------------------------------

    def encode(self, text: str, image: Image.Image | None) -> Encoded:
        """One sample as the model's arguments, unpadded, batch 1, on the CPU.

        Raises UserError for text whose image placeholders do not match the image, and for a plain prompt where the
        processor always wants an image (paligemma).
        """
        tokenizer = self.tokenizer
        start = getattr(tokenizer, "bos_token", None)
        # a chat template writes the first token itself: the tokenizer must not add a second one
        options = {"add_special_tokens": False} if start and text.startswith(start) else {}
        images = {} if image is None else {"images": [image]}
        try:
            encoded = self.processor(text=[text], return_tensors="pt", **images, **options)
        except (ValueError, TypeError, IndexError) as error:
            what = "this prompt" if image is None else "this prompt and image"
            raise UserError(f"the model's processor refuses {what}: {_line(error)} (prompt: {text[:80]!r})") from error
        sample = {
            name: value
            for name, value in encoded.items()
            if isinstance(value, Tensor) and name != "labels" and (self._accepted is None or name in self._accepted)
        }
        if image is not None and self.image_id is not None and not (sample["input_ids"] == self.image_id).any():
            raise UserError(f"the prompt has no place for its image: {text[:80]!r} lacks the model's image token")
        return sample

    def extend(self, encoded: Encoded, answer_ids: list[int]) -> Encoded:
        """The same sample with its answer behind it.

        Paligemma's type 0 is the prefix, which sees itself in both directions; an answer is its causal suffix, 1.
        Elsewhere 0 is text.
        """
        types = {"token_type_ids": 1} if self.family == "paligemma" else {}
        return inputs.extend(encoded, answer_ids, types)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def modality(self, input_ids: np.ndarray | Tensor) -> np.ndarray:
        """uint8 of the same shape: 0 text, 1 image placeholder, 2 special (delimiters of images included)."""
        return inputs.modality(np.asarray(input_ids), self.image_id, self._special_ids)

    def image_grid(self, encoded: Encoded) -> list[list[int]] | None:
        """[rows, columns] blocks of the image tokens in their order; [] without an image, None if not known."""
        return inputs.image_blocks(encoded, self.config, self.image_id)

    # Batches -------------------------------------------------------------------------------------------------

    def collate(self, encoded: list[Encoded], side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
        """One padded batch on the model's device, pixels in the model's dtype."""
        batch = inputs.collate(encoded, self._pad_id, side)
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }

    def verify(self, batch: Mapping[str, Tensor]) -> None:
        """Find every layer's sites on this batch and prove resid_mid + mlp_out == layer output; else UserError."""
        rows = self._real(batch)
        self.sites, self.added_between = locate(self.layers, self.patterns, rows, lambda: self.forward(batch))

    def trace(self, batch: Mapping[str, Tensor], site: str, layers: Sequence[int]) -> Trace:
        """One forward pass without logits or cache. Values at padding are whatever the model computed there."""
        if site not in SITES:
            raise UserError(f"site '{site}' is not one of {', '.join(SITES)}")
        if self.sites is None:
            self.verify(batch)
        assert self.sites is not None
        taps = [getattr(self.sites[layer], site) for layer in layers] + [self.sites[layer].mlp_out for layer in layers]
        shape = (*batch["input_ids"].shape, self.d_model)
        tensors = [tensor.reshape(shape).to(self.device) for tensor in record(taps, lambda: self.forward(batch))]
        return Trace(tensors[: len(layers)], tensors[len(layers) :])

    def generate(self, encoded: list[Encoded], n: int) -> list[list[int]]:
        """The greedy answers, at most `n` tokens each, ended by their end token where one came.

        Whatever sampling or penalties the model's own generation settings ask for is not applied; the image
        placeholder is never generated.
        """
        if not isinstance(self.model, GenerationMixin):
            raise UserError(f"{self.class_name} cannot generate: capture it without answers")
        batch = self.collate(encoded, side="left")
        ends = _ends(self.model, self.tokenizer)
        settings = GenerationConfig(
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=self._pad_id,
            suppress_tokens=None if self.image_id is None else [self.image_id],
        )
        model = cast(Any, self.model)
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            with torch.no_grad():
                written = model.generate(**batch, generation_config=settings)
        finally:
            model.generation_config = own
        answers = written[:, batch["input_ids"].shape[1] :].tolist()
        return [_cut(answer, ends) for answer in answers]

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def _pad_id(self) -> int:
        found = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if found is None else found

    def _real(self, batch: Mapping[str, Tensor]) -> Tensor:
        mask = batch.get("attention_mask")
        return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    def forward(self, batch: Mapping[str, Tensor]) -> None:
        """The text layers' work and nothing else: no gradients, no cache, no logits (or one position's)."""
        accepted = _parameters(self.base)
        extra: dict[str, Any] = {}
        if accepted is None or "use_cache" in accepted or isinstance(self.base, PreTrainedModel):
            extra["use_cache"] = False
        if accepted and "logits_to_keep" in accepted:
            extra["logits_to_keep"] = 1
        with torch.no_grad():
            self.base(**batch, **extra)


# Loading -----------------------------------------------------------------------------------------------------


def load(model: str, dtype: str = "auto", device: str = "auto", patterns: Patterns | None = None) -> VLM:
    """The model and processor of a Hugging Face id or a folder, in eval mode.

    `dtype` bfloat16, float16, float32 or auto (float32 on a CPU, bfloat16 on a GPU); `device` auto, cpu or cuda.
    Raises UserError, one line, for whatever keeps it from being loaded; code from a repository is never run.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device '{device}' is not auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but torch finds no CUDA device here: use auto or cpu")
    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if dtype not in (*DTYPES, "auto"):
        raise UserError(f"dtype '{dtype}' is not one of auto, {', '.join(DTYPES)}")
    chosen = DTYPES["bfloat16" if place == "cuda" else "float32"] if dtype == "auto" else DTYPES[dtype]
    folder = Path(model).expanduser()
    if not folder.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1 or folder.exists()):
        raise UserError(f"--model {model}: no such folder, and not a model id (owner/name); {_DEMO_HINT}")
    if folder.is_dir():
        processor, loaded = _load(str(folder), chosen, place, local=True)
        revision = _folder_revision(folder)
    else:
        processor, loaded = _load(model, chosen, place, local=not _reachable(model))
        revision = getattr(loaded.config, "_commit_hash", None)
    return wrap(loaded, processor, model, revision or "unknown", patterns)


def wrap(
    model: nn.Module,
    processor: Any,
    name: str,
    revision: str = "unknown",
    patterns: Patterns | None = None,
    d_model: int | None = None,
) -> VLM:
    """A VLM around a model that is already in memory; `d_model` where it has no text config to ask."""
    model.eval().requires_grad_(False)
    if d_model is None:
        config = getattr(model, "config", None)
        if config is None:
            raise UserError(f"{type(model).__name__} has no config: give the width of its residual stream as d_model")
        d_model = config.get_text_config(decoder=True).hidden_size
    assert d_model is not None
    return VLM(model, processor, name, revision, d_model, patterns or Patterns())


_DEMO_HINT = f"the bundled demo model, which needs no network, is {DEMO}"


def _load(name: str, dtype: torch.dtype, place: str, *, local: bool) -> tuple[Any, Any]:
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    if local:
        logging.disable_progress_bar()  # a bar for reading files that are here says nothing
    spread: dict[str, Any] = {}
    if place == "cuda":
        # accelerate (if installed) also spreads a model over several GPUs; without it the one GPU has to do
        spread = {"device_map": "auto"} if _has("accelerate") else {}
    try:
        # the processor first: small files, so that what is missing is known before gigabytes are read
        processor = AutoProcessor.from_pretrained(name, **options)
        auto: Any = AutoModelForImageTextToText
        model = auto.from_pretrained(name, dtype=dtype, use_safetensors=True, **options, **spread)
    except Exception as error:  # whatever a third-party loader meets: files, network, formats, missing packages
        raise UserError(f"--model {name}: cannot be loaded: {_line(error)}; {_DEMO_HINT}") from error
    if not hasattr(processor, "image_processor"):
        raise UserError(f"--model {name}: has no image processor; {_DEMO_HINT}")
    return processor, model if spread else model.to(place)


def _reachable(model: str) -> bool:
    """Ask the hub once, briefly; the loaders themselves retry every file for half a minute.

    False where the hub cannot be reached but the model is in the cache; UserError where it is not.
    """
    try:
        HfApi().model_info(model, timeout=REACH_SECONDS)
    except Exception as error:  # the hub's HTTP client raises its own kinds
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return False
        raise UserError(
            f"--model {model}: cannot be reached and is not in the local cache: {_line(error)}; {_DEMO_HINT}"
        ) from error
    return True


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _line(error: BaseException) -> str:
    """What went wrong, on one line; a package that a processor misses (torchvision, num2words) by its name."""
    text = " ".join(str(error).split()) or type(error).__name__
    missing = re.search(r"requires the (\w+) library but it was not found|pip install (\w+)", text)
    if isinstance(error, ImportError) and missing:
        package = (missing[1] or missing[2]).lower()
        return f"its processor needs the package {package} (pip install {package})"
    return text if len(text) <= 240 else f"{text[:240]}..."


def _folder_revision(folder: Path) -> str:
    """16 hex of sha256 over config.json and, of each weight file, its name, size and both ends (not gigabytes)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED))
            file.seek(max(0, size - SAMPLED), os.SEEK_SET)
            digest.update(file.read(SAMPLED))
    return digest.hexdigest()[:16]


def _without_head(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The model below its vocabulary head, where there is such a module that holds all layers."""
    base: Any = getattr(model, "model", None)
    if isinstance(model, PreTrainedModel) and isinstance(base, PreTrainedModel) and {*layers} <= {*base.modules()}:
        return base
    return model


def _parameters(model: nn.Module) -> set[str] | None:
    """The names `forward` takes; None where it takes any."""
    signature = inspect.signature(model.forward).parameters
    named = {name for name, kind in signature.items() if kind.kind is not inspect.Parameter.VAR_KEYWORD}
    return named if {"input_ids", "args"} & named else None


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's generation settings', else the tokenizer's."""
    settings = getattr(model, "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _cut(answer: list[int], ends: list[int]) -> list[int]:
    first = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: first + 1]
