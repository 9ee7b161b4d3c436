"""The console script `cltjax`: what is in a store, what a training run needs, and what becomes of trained runs."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cltjax.command import run
from cltjax.config import TrainConfig, read_config_file
from cltjax.errors import UserError
from cltjax.estimate import (
    ModelShape,
    Rates,
    as_json,
    assumed_rates,
    estimate,
    shape_of_recipe,
    shape_of_store,
    show_cost,
)
from cltjax.splits import Split
from cltjax.store import ActivationStore
from cltjax.store_format import COLUMNS, SPLITS, STATISTICS
from cltjax.wiring import spell_layers

MODALITIES = ("text", "image", "special")


@dataclass(frozen=True)
class Info:
    """Show what a store holds: model, site, rows by split and modality, outliers."""

    store: tyro.conf.Positional[Path] = Path("activations")
    """The activation store."""


@dataclass(frozen=True)
class Verify:
    """Read a whole store and check it against its checksums."""

    store: tyro.conf.Positional[Path] = Path("activations")
    """The activation store."""


@dataclass(frozen=True)
class Plot:
    """Draw the plots of training runs anew from what they have measured so far: RUN/plots/*.png."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories of train.py."""


@dataclass(frozen=True)
class Estimate:
    """Say what a training run needs before it starts: parameters, memory, arithmetic, bytes, time. Takes train.py's
    options; the model is that of --model-layers and --d-model, of --store, or of the config file's `model_shape`."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    model_layers: int | None = None
    """Layers of the model's language tower, with --d-model."""
    d_model: int | None = None
    """Width of its residual stream."""
    store_dtype: Literal["bfloat16", "float16", "float32", "int8"] | None = None
    """How activations are stored; by default as in --store, else bfloat16."""
    flops: float | None = None
    """FLOP/s of a device in matrix products; by default 4e14 for --dtype bfloat16 and 6.7e13 for float32, which we
    assume of an H100."""
    bandwidth: float | None = None
    """Bytes/s between a device and its memory; by default 3e12, assumed of an H100."""
    gather: float | None = None
    """Bytes/s of rows at random places; by default the bandwidth."""
    select: float | None = None
    """Numbers/s that top-k goes through; by default a 64th of the bandwidth, as if it sorted."""
    link: float | None = None
    """Bytes/s that a device sends to others; by default 4.5e11, NVLink's of an H100."""
    measure: bool = False
    """Measure the rates on this machine, in some seconds, instead of assuming them (all but --link)."""
    tokens_per_s: float | None = None
    """Rate to say the store's for; by default the predicted one."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Export:
    """Write trained runs as one CLT directory: safetensors that take and give raw activations. Or a CLT directory in
    circuit-tracer's form."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories of train.py: one, or several with different sources; with --circuit-tracer, a CLT directory."""
    out: Path = Path("clt")
    """The directory to write."""
    combine: Literal["gains", "backfit", "none"] | None = None
    """How several runs become one; by default backfit where one was trained on what the others leave, else gains."""
    store: Path | None = None
    """The activation store that several runs are combined, or thresholds calibrated on; by default the first run's."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What weights are rounded to; biases and thresholds stay float32."""
    non_negative: bool = False
    """Allow no gain below 0 (--combine gains)."""
    best: bool = False
    """Export the checkpoint with the best FVU on val rows, instead of the last."""
    circuit_tracer: bool = False
    """Write circuit-tracer's form of a CLT directory; one trained with topk, and no other, needs --store."""


@dataclass(frozen=True)
class Import:
    """Read a CLT of circuit-tracer, or EleutherAI's transcoders, into a CLT directory."""

    folder: tyro.conf.Positional[Path]
    """A folder with config.yaml (circuit-tracer), or one with a sub-folder for each transcoder (sae.safetensors)."""
    out: Path = Path("clt")
    """The CLT directory to write."""
    model: str | None = None
    """The language model, a Hugging Face model id or a folder, where config.yaml (circuit-tracer) or config.json
    (EleutherAI) does not say."""
    n_layers: int | None = None
    """EleutherAI: the layers of the language model; by default one more than the highest transcoder's."""


@dataclass(frozen=True)
class Push:
    """Upload a CLT directory or an activation store to the Hugging Face hub, with a model card made of clt.json."""

    folder: tyro.conf.Positional[Path]
    """The CLT directory or store."""
    repo: tyro.conf.Positional[str]
    """OWNER/NAME of the repository: a model repository for a CLT, a data set's for a store."""
    private: bool = False
    """Make the repository private."""


@dataclass(frozen=True)
class Pull:
    """Download a CLT directory or an activation store from the Hugging Face hub."""

    repo: tyro.conf.Positional[str]
    """OWNER/NAME, or datasets/OWNER/NAME."""
    out: Path = Path("clt")
    """The folder to write."""
    revision: str | None = None
    """A branch, tag or commit of the repository."""


@dataclass(frozen=True)
class Generate:
    """Ask a VLM a question, and its replacement model, whose MLPs' writes are the CLT's; and either with interventions
    on features."""

    prompt: str
    """The question."""
    clt: Path = Path("clt")
    """The CLT directory."""
    model: str = "examples/shapes/model"
    """A Hugging Face model id, or a folder that holds a model: the one that the CLT was trained on."""
    image: Path | None = None
    """The image."""
    change: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Interventions LAYER:FEATURE[@POSITIONS]CHANGE: 3:1234=5.0, 3:1234*2, 3:1234@image=0, 3:1234@7+1.5, 3:7=0..2."""
    n: int = 32
    """Most tokens of an answer."""
    in_original: bool = False
    """Intervene in the original model: what the features write more or less goes on top of its own MLPs."""
    within: tuple[int, int] | None = None
    """First and last layer that interventions may write to; by default all."""
    template: str = "chat"
    """`chat` (the model's own template), `llava-1.5`, or text with {image} and {prompt} (backslash n is a newline)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the model computes in; auto is float32 on a CPU and bfloat16 on a GPU."""
    lazy: bool = False
    """Leave the CLT's decoders in their files and read the rows of active features, for CLTs larger than memory."""
    clt_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the CLT's encoders and decoders are held in; pre-activations and sums are float32."""
    other_revision: bool = False
    """Take a CLT that was trained on another revision of the model."""


@dataclass(frozen=True)
class Neurons:
    """Find the MLP neurons of the original model that features stand for: those that write along a feature's decoder,
    and fire with it on held-out tokens."""

    features: str
    """LAYER:FEATURE of each, with commas between them: 3:17,3:1234."""
    clt: Path = Path("clt")
    """The CLT directory."""
    model: str = "examples/shapes/model"
    """A Hugging Face model id, or a folder that holds a model: the one that the CLT was trained on."""
    dataset: str = "shapes"
    """`shapes` (bundled), or a JSON(-lines) file: AMBER, POPE, or rows with image and query|question|prompt|text."""
    image_dir: Path | None = None
    """The folder that image names start from; the query file's own folder if not given."""
    top: int = 10
    """Most neurons to name at each target layer."""
    template: str = "chat"
    """`chat` (the model's own template), `llava-1.5`, or text with {image} and {prompt} (backslash n is a newline)."""
    max_samples: int | None = None
    """Stop after this many samples of the split (of `shapes`: those among its first 4000 samples if not given)."""
    batch_size: int = 16
    """Samples a forward pass. Samples of similar length are batched together."""
    generate: int = 0
    """Take the tokens of the model's own answer too, at most this many: for a CLT that was trained on answers."""
    split: Split = "test"
    """The samples to measure on. Only `test` is held out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the model computes in; auto is float32 on a CPU and bfloat16 on a GPU."""
    skip_bad: bool = False
    """Leave out rows whose image is missing or broken or whose prompt is empty."""
    clt_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the CLT's encoders and decoders are held in; pre-activations and sums are float32."""
    other_revision: bool = False
    """Take a CLT that was trained on another revision of the model."""
    out: Path | None = None
    """The JSON file to write; by default CLT_DIR/neurons-<dataset>.json."""


@dataclass(frozen=True)
class Graph:
    """Explain an answer: the attribution graph from image patches and words through features to the next token, as
    files and as a page that opens from disk."""

    prompt: str
    """The question."""
    clt: Path = Path("clt")
    """The CLT directory."""
    model: str = "examples/shapes/model"
    """A Hugging Face model id, or a folder that holds a model: the one that the CLT was trained on."""
    image: Path | None = None
    """The image."""
    out: Path = Path("graph")
    """The folder to write: index.html, graph.json, graph.safetensors, about.json."""
    said: str = ""
    """What the answer begins with: the token behind it is explained."""
    target: str = ""
    """What is explained: next tokens (`red`, or `red,blue`), a contrast (`red - blue`), or features
    (LAYER:FEATURE@POSITION). By default the likeliest next tokens, to .95 of the probability, at most ten."""
    max_nodes: int | None = None
    """Most features in the graph, chosen by influence as it grows; by default all that are active."""
    node_threshold: float = 0.8
    """Show the nodes that have this share of all influence."""
    edge_threshold: float = 0.98
    """Show the edges that carry this share of the influence between them."""
    memory: float = 4.0
    """GB for gradients, decoder vectors and edges at a time."""
    store: Path | None = None
    """An activation store: the page then shows where else its features are active."""
    image_dir: Path | None = None
    """Where images of the store are looked for that are no longer where it says."""
    examples: int = 4
    """Most samples to show of each feature."""
    max_rows: int | None = None
    """Look at no more than this many tokens of the store, those of some samples; by default all of the test split."""
    labels: Path | None = None
    """A JSON file of names: {"3:17": "red"}, or {"3:17": {"label": "red", "score": 0.9}}."""
    supernodes: Path | None = None
    """A JSON file of groups of nodes: [[name, node id, node id, ...], ...]."""
    propose_supernodes: bool = False
    """Group features that are active together and write alike."""
    group_patches: bool = False
    """Show all image patches as one node, which can be opened."""
    pixels: bool = False
    """Add heat maps of the logits over pixels: gradient x input through the vision tower, which is no exact account."""
    title: str = ""
    """Of the page; by default the prompt."""
    template: str = "chat"
    """`chat` (the model's own template), `llava-1.5`, or text with {image} and {prompt} (backslash n is a newline)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    """What the model computes in. Edges add up in float32; in half the memory they are a few per cent off."""
    lazy: bool = False
    """Leave the CLT's decoders in their files and read the rows of active features, for CLTs larger than memory."""
    clt_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the CLT's encoders and decoders are held in; pre-activations and sums are float32."""
    other_revision: bool = False
    """Take a CLT that was trained on another revision of the model."""


@dataclass(frozen=True)
class View:
    """Serve a folder of graphs to browsers on this machine."""

    folder: tyro.conf.Positional[Path] = Path("graph")
    """A graph's folder, or one that holds several."""
    port: int = 8317
    """The port on 127.0.0.1; 0 is any free one."""


@dataclass(frozen=True)
class Dashboard:
    """Write feature dashboards as one searchable page: examples with image patches, histograms, promoted tokens."""

    features: str
    """LAYER:FEATURE of each, with commas between them (3:17,3:1234), or top:200: the 200 strongest, by activation x
    decoder norm."""
    clt: Path = Path("clt")
    """The CLT directory."""
    store: Path = Path("activations")
    """The activation store that examples come from: of the model that the CLT was trained on."""
    out: Path = Path("dashboard")
    """The folder to write: index.html and dashboard.json."""
    model: str | None = None
    """A Hugging Face model id, or a folder that holds a model; by default the one that the CLT names."""
    labels: Path | None = None
    """A JSON file of names: {"3:17": "red"}, or {"3:17": {"label": "red", "score": 0.9}}."""
    image_dir: Path | None = None
    """Where images are looked for that are no longer where the store says."""
    examples: int = 8
    """Most samples to show of each kind: strongest, random."""
    max_rows: int | None = None
    """Look at no more than this many tokens: those of some samples, chosen at random. By default at all of them."""
    split: Split = "test"
    """The samples to look at. Only `test` is held out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the CLT runs."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the model is loaded as."""
    clt_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the CLT's encoders and decoders are held in; pre-activations and sums are float32."""
    other_revision: bool = False
    """Take a CLT that was trained on another revision of the model."""


Command = (
    Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Estimate, tyro.conf.subcommand("estimate")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Neurons, tyro.conf.subcommand("neurons")]
    | Annotated[Graph, tyro.conf.subcommand("graph")]
    | Annotated[View, tyro.conf.subcommand("view")]
    | Annotated[Dashboard, tyro.conf.subcommand("dashboard")]
    | Annotated[Push, tyro.conf.subcommand("push")]
    | Annotated[Pull, tyro.conf.subcommand("pull")]
)


def show(path: Path) -> None:
    """Print a store's manifest, its rows and its statistics."""
    store = ActivationStore.open(path)
    manifest, console = store.manifest, Console()
    model, dataset = store.model, manifest["dataset"]
    state = "complete" if store.complete else "unfinished: only published rows are counted"
    layers = f"layers {spell_layers(store.layers)} of {store.n_layers}"
    print(f"{path}: {store.rows:,} rows of {len(store.samples):,} samples, {state}")
    print(f"model    {model['id']} ({model['class']}, revision {model['revision']})")
    print(f"arrays   {store.site} and mlp_out, {layers}, width {store.d_model}, {store.dtype}")
    print(f"data     {dataset['spec']}, {len(dataset['skipped'])} rows skipped")
    print(f"template {manifest['template']!r}")
    rows = Table("rows", *MODALITIES, "all")
    modality = store.column("modality")
    for code, split in enumerate(SPLITS):
        counts = np.bincount(modality[store.split == code], minlength=len(MODALITIES))
        rows.add_row(split, *(f"{n:,}" for n in counts), f"{counts.sum():,}")
    console.print(rows)
    stats = store.stats()
    figures = Table("layer", f"{store.site} std", "mean norm", "outliers", "mlp_out std", "mean norm", "outliers")
    for i, layer in enumerate(store.layers):
        cells = [
            text
            for one in (stats.site, stats.mlp_out)
            for text in (f"{one.std[i]:.4g}", f"{one.mean_norm[i]:.4g}", f"{one.outliers[i].sum():,}")
        ]
        figures.add_row(str(layer), *cells)
    console.print(figures)
    print(f"over train rows, from {STATISTICS}; an outlier's norm is at least 20 times its layer's mean norm")


def verify(path: Path) -> None:
    """Read a whole store once; the first damaged or missing chunk ends it with an error that names it."""
    store = ActivationStore.open(path)
    shard_rows = store.manifest["shard_rows"]
    starts = range(0, store.rows, shard_rows)
    for start in track(starts, "reading", console=Console(stderr=True)):
        rows = slice(start, min(start + shard_rows, store.rows))
        for layer in store.layers:
            for which in ("site", "mlp_out"):
                store.read(which, rows, (layer,))
    for name in COLUMNS:
        store.column(name)
    for which in ("site", "mlp_out"):
        store.norms(which)
    samples = len(store.samples)
    store.summary()
    print(f"{path}: all {store.rows:,} rows of {samples:,} samples and {len(store.layers)} layers can be read")


def draw_all(runs: Sequence[Path]) -> None:
    """Draw the plots of runs, and say where they are."""
    from cltjax.plots import draw

    if not runs:
        raise UserError("name a run directory: cltjax plot runs/L0")
    for folder in runs:
        found = draw(folder) if folder.is_dir() else []
        if not found:
            raise UserError(f"{folder} holds no figures of a training run: run train.py first")
        print("\n".join(map(str, found)))


def say_cost(options: Estimate) -> None:
    """Print what a training run needs."""
    if options.tokens_per_s is not None and not options.tokens_per_s > 0:
        raise UserError(f"--tokens-per-s {options.tokens_per_s} must be above 0")
    shape = shape_of(options)
    cost = estimate(options.train, shape, rates_of(options, shape))
    if options.json:
        print(json.dumps(as_json(cost, options.tokens_per_s), indent=2))
    else:
        show_cost(cost, options.tokens_per_s, options.measure)
        if options.train.given:
            print("the frozen runs of --given are not counted")


def rates_of(options: Estimate, shape: ModelShape) -> Rates:
    """A device's rates: those named, and for the others what is measured here, or assumed."""
    config = options.train
    if options.measure:
        config.check()
        from cltjax.allocator import keep_freed_memory, will_use_cpu

        if will_use_cpu():
            keep_freed_memory()  # as train.py does
        from cltjax.rates import measure

        rates = measure(config, shape)
    else:
        rates = assumed_rates(config.dtype, Rates.bandwidth if options.bandwidth is None else options.bandwidth)
    named = {name: getattr(options, name) for name in ("flops", "bandwidth", "gather", "select", "link")}
    return dataclasses.replace(rates, **{name: rate for name, rate in named.items() if rate is not None})


def shape_of(options: Estimate) -> ModelShape:
    """The model as the options give it, else as the store does."""
    if options.model_layers is not None and options.d_model is not None:
        return ModelShape(options.model_layers, options.d_model, options.store_dtype or "bfloat16")
    if options.model_layers is not None or options.d_model is not None:
        raise UserError("--model-layers and --d-model go together")
    try:
        shape = shape_of_store(options.train.store)
    except UserError as error:
        raise UserError(f"{error}; or name --model-layers and --d-model") from error
    return shape if options.store_dtype is None else dataclasses.replace(shape, dtype=options.store_dtype)


def write_export(options: Export) -> None:
    """Write runs as a CLT directory, or a CLT directory in circuit-tracer's form."""
    rest = {name: value for name, value in vars(options).items() if name != "circuit_tracer"}
    if not options.circuit_tracer:
        from cltjax.export import export

        export(**rest)
        return
    from cltjax.circuit_tracer import export_circuit_tracer

    if len(options.runs) != 1:
        raise UserError("--circuit-tracer takes one CLT directory: cltjax export clt --circuit-tracer --out tracer")
    for name in ("combine", "non_negative", "best"):
        if rest[name]:
            raise UserError(f"--{name.replace('_', '-')} is for runs: with --circuit-tracer, leave it out")
    if options.dtype != "float32":
        raise UserError("--dtype is for runs: with --circuit-tracer weights stay what they are in the CLT directory")
    export_circuit_tracer(options.runs[0], options.out, options.store)


def read_import(options: Import) -> None:
    """Write what another program's folder holds as a CLT directory."""
    from cltjax.circuit_tracer import CONFIG, import_circuit_tracer
    from cltjax.clt_directory import write_clt
    from cltjax.eleuther import import_eleuther

    if (options.folder / CONFIG).is_file():
        if options.n_layers:
            raise UserError(f"--n-layers is for EleutherAI's transcoders: {options.folder} has files of all layers")
        found, files = import_circuit_tracer(options.folder, options.model)
    else:
        found, files = import_eleuther(options.folder, options.model, options.n_layers)
    write_clt(options.out, found, files)
    if not found.model.get("id"):
        print(f"{options.out} does not say which model it is of: name it with --model, to be sure that they fit")
    print(f"{options.out}: {found.activation.kind}, sources {found.wiring.name[1:]}, F={found.n_features}")


def starting_point(args: Sequence[str]) -> Estimate | None:
    """What `cltjax estimate --config FILE` starts from: the file's model, unless a store is named beside it."""
    if args[:1] != ["estimate"]:
        return None
    config = read_config_file(args)
    if config is None:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--store"):
        parser.add_argument(name, nargs="?", const="")
    named, _ = parser.parse_known_args(args)
    shape = shape_of_recipe(Path(named.config)) if named.store is None else None
    return Estimate(config) if shape is None else Estimate(config, shape.n_layers, shape.d_model, shape.dtype)  # type: ignore[arg-type]


def execute(command: Command) -> None:
    """Look into activation stores, say what a training run needs, and move CLTs between formats and machines."""
    match command:
        case Info():
            show(command.store)
        case Verify():
            verify(command.store)
        case Plot():
            draw_all(command.runs)
        case Estimate():
            say_cost(command)
        case Export():
            write_export(command)
        case Import():
            read_import(command)
        case Generate():
            from cltjax.replacement.answer import generate

            generate(**vars(command))
        case Neurons():
            from cltjax.replacement.neurons import find_neurons

            find_neurons(**vars(command))
        case Graph():
            from cltjax.replacement.explain import explain

            explain(**vars(command))
        case View():
            from cltjax.replacement.viewer.page import serve

            serve(command.folder, command.port)
        case Dashboard():
            from cltjax.replacement.dashboard import write_dashboard

            write_dashboard(**vars(command))
        case Push():
            from cltjax.hub import push

            print(push(command.folder, command.repo, command.private))
        case Pull():
            from cltjax.hub import pull

            print(pull(command.repo, command.out, command.revision))


def main() -> None:
    run(Command, execute, default=starting_point)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
