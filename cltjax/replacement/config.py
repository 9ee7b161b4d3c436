"""The options of measuring a replacement model: imports neither jax nor torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cltjax.splits import Split


@dataclass(frozen=True)
class FidelityConfig:
    """Measure a replacement model, beside the original and ablated ones, on held-out samples of a data set."""

    clt: Path
    """CLT directory of cltjax export."""
    model: str
    """The Hugging Face model id or folder of the VLM that the CLT was trained on."""
    dataset: str = "shapes"
    """`shapes` (bundled), or a JSON(-lines) file: AMBER, POPE, or rows with image and query|question|prompt|text."""
    image_dir: Path | None = None
    """The folder that image names start from; the query file's own folder if not given."""
    template: str = "chat"
    """`chat` (the model's own template), `llava-1.5`, or text with {image} and {prompt} (backslash n is a newline)."""
    max_samples: int | None = None
    """Stop after this many samples of the split (of `shapes`: those among its first 4000 samples if not given)."""
    batch_size: int = 16
    """Samples a forward pass. Samples of similar length are batched together."""
    generate: int = 64
    """Let every model answer freely with at most this many tokens; 0: teacher-forced figures only."""
    split: Split = "test"
    """The samples to measure on. Only `test` is held out."""
    per_layer: bool = False
    """Also replace one MLP at a time, and the first n of them."""
    seed: int = 0
    """Of the bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the model computes in; auto is float32 on a CPU and bfloat16 on a GPU."""
    lazy: bool = False
    """Leave the CLT's decoders in their files and read the rows of active features, for CLTs larger than memory."""
    clt_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the CLT's encoders and decoders are held in; pre-activations and sums are float32."""
    store: Path | None = None
    """Activation store whose train rows the mean writes are of; else they are taken over train samples here."""
    skip_bad: bool = False
    """Leave out rows whose image is missing or broken or whose prompt is empty."""
    other_revision: bool = False
    """Take a CLT that was trained on another revision of the model."""
    out: Path | None = None
    """The JSON file to write, the plot goes beside it; by default CLT_DIR/fidelity-<dataset>.json."""


@dataclass(frozen=True)
class GraphsConfig:
    """Measure attribution graphs on held-out samples: scores, and whether what they say comes true when features and
    patches are taken out of the original model."""

    clt: Path
    """CLT directory of cltjax export."""
    model: str
    """The Hugging Face model id or folder of the VLM that the CLT was trained on."""
    graphs: int = 100
    """How many prompts, of the first samples of the split."""
    dataset: str = "shapes"
    """`shapes` (bundled), or a JSON(-lines) file: AMBER, POPE, or rows with image and query|question|prompt|text."""
    image_dir: Path | None = None
    """The folder that image names start from; the query file's own folder if not given."""
    template: str = "chat"
    """`chat` (the model's own template), `llava-1.5`, or text with {image} and {prompt} (backslash n is a newline)."""
    cuts: int = 24
    """Features to take out of each prompt, one at a time; chosen at random among those that pruning keeps."""
    max_nodes: int | None = None
    """Most features of a graph; by default all that are active."""
    memory: float = 4.0
    """GB for gradients and decoder vectors at a time."""
    labels: Path | None = None
    """A JSON file of names of features, for --through."""
    through: str = ""
    """Also say what share of the influence passes through features whose name begins like this."""
    split: Split = "test"
    """The samples to measure on. Only `test` is held out."""
    seed: int = 0
    """Of the choice of features and patches, and of the bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    """What the model computes in. Edges add up in float32; in half the memory they are a few per cent off."""
    skip_bad: bool = False
    """Leave out rows whose image is missing or broken or whose prompt is empty."""
    other_revision: bool = False
    """Take a CLT that was trained on another revision of the model."""
    lazy: bool = False
    """Leave the CLT's decoders in their files and read the rows of active features, for CLTs larger than memory."""
    clt_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the CLT's encoders and decoders are held in; pre-activations and sums are float32."""
    out: Path | None = None
    """The JSON file to write; by default CLT_DIR/graphs-<dataset>.json."""
