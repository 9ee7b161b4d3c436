"""The options of a capture, each a field; `python capture/run.py --help` shows them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from capture.sites import Patterns

Site = Literal["mlp_in", "resid_mid", "resid_pre"]


@dataclass(frozen=True)
class CaptureConfig:
    model: str
    """A Hugging Face model id, or a folder that holds a model; examples/shapes/model is the bundled one."""
    dataset: str = "shapes"
    """`shapes` (bundled), or a JSON(-lines) file: AMBER, POPE, or rows with image and query|question|prompt|text."""
    image_dir: Path | None = None
    """The folder that image names start from; the query file's own folder if not given."""
    out: Path = Path("activations")
    """The store to write. A capture that was stopped goes on where it was."""
    site: Site = "mlp_in"
    """What a source reads: the MLP's input after its norm, the residual before that norm, or that at layer entry."""
    layers: str = "all"
    """all, 3, 0-7 or 0,4,8."""
    generate: int = 0
    """Let the model answer with at most this many tokens, greedily, and capture prompt and answer."""
    max_samples: int | None = None
    """Stop after this many rows of the data set (of `shapes`: 4000 if not given)."""
    batch_size: int = 16
    """Samples a forward pass. Samples of similar length are batched together."""
    image_tokens: float = 1.0
    """The share of every image's tokens to keep, chosen at random by the seed."""
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """What is stored; int8 has a scale for every row and layer."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the model computes in; auto is float32 on a CPU and bfloat16 on a GPU."""
    shard_rows: int = 4096
    """Rows a shard file: what is written, published and resumed as a whole."""
    shard: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    """Capture the I-th of N shares (1/4 ... 4/4) into the same store, from another process or machine."""
    template: str = "chat"
    """`chat` (the model's own template), `llava-1.5`, or text with {image} and {prompt} (backslash n is a newline)."""
    skip_bad: bool = False
    """Leave out rows whose image is missing or broken or whose prompt is empty, and list them in the manifest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    seed: int = 0
    """Of the choice of image tokens."""
    patterns: Patterns = field(default_factory=Patterns)
    """Where the modules are in a model whose layers are not found by themselves."""
