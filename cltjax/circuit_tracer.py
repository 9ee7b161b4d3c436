"""circuit-tracer's CLT directories, written and read.

Its form is a directory of its own, never a CLT directory of this program (cltjax/clt_directory.py):

    W_enc_{i}.safetensors        W_enc_{i} [F, D], b_enc_{i} [F], b_dec_{i} [D] of *output* layer i, threshold_{i} [F]
    W_dec_{i}.safetensors        W_dec_{i} [F, L - i, D]: slot j writes to layer i + j, own layer included
    config.yaml                  model_name, model_kind, and the hooks that features read and write
    clt.json                     for this program alone: where the weights come from (`derived_from`), their real window

every layer of the model has both files, and slots outside the trained window are zero. With thresholds a feature is
active where h is strictly above its own, without any (of layer 0) where h is above 0. `format` of this clt.json is
TRACER_FORMAT, so `CLTDirectory.open` refuses such a directory; `import_circuit_tracer` reads it.

config.yaml is read and written with PyYAML, which huggingface_hub and transformers need. No jax and no torch here.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from cltjax.clt_directory import (
    DESCRIPTION,
    FORMAT,
    Activation,
    CLTDirectory,
    Description,
    as_json,
    description_of,
    tensor_type,
)
from cltjax.errors import UserError
from cltjax.files import whole_folder, write_json, write_whole
from cltjax.foreign import Files, common_type, one_line, read_json, read_tensors
from cltjax.store import ActivationStore
from cltjax.tokens import rules_of_clt

TRACER_FORMAT, TRACER_VERSION = "cltjax CLT in circuit-tracer's form", 1
CONFIG = "config.yaml"
KIND = "cross_layer_transcoder"
# Where circuit-tracer's backends find what a site is. `ln2.hook_normalized`, before the norm's gain, is none of them.
INPUT_HOOKS = {"mlp_in": "mlp.hook_in", "resid_mid": "hook_resid_mid"}
SITES = {hook: site for site, hook in INPUT_HOOKS.items()} | {"hook_resid_pre": "resid_pre"}  # read, not written
OUTPUT_HOOKS = ("hook_mlp_out", "mlp.hook_out")
BINS = 1 << 16  # of a float's bits, in each of two passes
ROWS = 2048  # of pre-activations at a time


# To circuit-tracer --------------------------------------------------------------------------------------------------


def write_circuit_tracer(
    directory: CLTDirectory, out: Path, thresholds: Mapping[int, np.ndarray] | None = None
) -> None:
    """Write a CLT directory in circuit-tracer's form, whole or not at all. One layer is in memory at a time.

    thresholds: of a topk CLT, [F] by source layer (`topk_thresholds`): circuit-tracer knows no topk. A jumprelu CLT has
    its own, a relu CLT none. Weights keep their type; biases and thresholds are float32.

    UserError where `out` exists, for a topk CLT without thresholds, for a site that circuit-tracer cannot read, and for
    combined = none, whose sources do not know of each other.
    """
    described = directory.description
    if described.site not in INPUT_HOOKS:
        raise UserError(
            f"{directory.path} reads {described.site}, which circuit-tracer has no input hook for: "
            f"train on {' or '.join(INPUT_HOOKS)}"
        )
    if described.combined == "none":
        raise UserError(f"{directory.path} is several runs summed as they are: export it with --combine gains first")
    check_thresholds(directory, thresholds)
    b_dec = directory.tensors("b_dec.safetensors")
    with whole_folder(out) as folder:
        for layer in range(described.n_layers):
            encoder = {f"b_dec_{layer}": b_dec.get(f"b_dec_{layer}", np.zeros(described.d_model, np.float32))}
            encoder |= tracer_encoder(directory, layer, None if thresholds is None else thresholds.get(layer))
            save(folder / f"W_enc_{layer}.safetensors", encoder)
            slots = tracer_decoder(directory, layer)
            save(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": slots})
            del slots  # before the next one is made: of a 7B model each takes gigabytes
        config = {
            "model_name": described.model.get("id"),
            "model_kind": KIND,
            "feature_input_hook": INPUT_HOOKS[described.site],
            "feature_output_hook": output_hook(described),
        }
        write_whole(folder / CONFIG, lambda path: path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8"))
        derived = dataclasses.replace(described, derived_from=name_of(directory))
        if thresholds is not None:  # other features are active than those the figures are about
            activation = Activation("jumprelu", trained_as=described.activation.trained_as or described.activation.kind)
            derived = dataclasses.replace(derived, activation=activation, metrics={})
        write_json(folder / DESCRIPTION, {"format": TRACER_FORMAT, "version": TRACER_VERSION} | as_json(derived))


def export_circuit_tracer(path: Path, out: Path, store: Path | None) -> None:
    """`write_circuit_tracer` of the CLT directory `path`; the thresholds of a topk CLT are calibrated on `val` rows of
    `store`, so that each layer's mean L0 stays what it is. UserError where that cannot be done."""
    directory, thresholds = CLTDirectory.open(path), None
    kind = directory.description.activation.kind
    if store is not None:
        if kind != "topk":
            raise UserError(
                f"--store is what a topk CLT's thresholds are calibrated on, and {path} is {kind}: leave it out"
            )
        thresholds = topk_thresholds(directory.description, partial(val_pre_activations, directory, store))
    write_circuit_tracer(directory, out, thresholds)
    print(f"{out}: circuit-tracer's form of {path}" + (", thresholds from val rows" if thresholds else ""))


def val_pre_activations(directory: CLTDirectory, store: Path, source: int) -> Iterator[np.ndarray]:
    """h [B, F] float32 of a source layer on the used `val` rows of a store, in pieces."""
    opened = ActivationStore.open(store)
    rows = rules_of_clt(directory, opened).some_rows("val")
    weights = directory.tensors(f"W_enc_{source}.safetensors")
    W_enc, b_enc = weights[f"W_enc_{source}"].astype(np.float32), weights[f"b_enc_{source}"]
    for start in range(0, len(rows), ROWS):
        x = opened.read("site", rows[start : start + ROWS], (source,))[:, 0].astype(np.float32)
        yield x @ W_enc.T + b_enc


def check_thresholds(directory: CLTDirectory, thresholds: Mapping[int, np.ndarray] | None) -> None:
    """UserError where they are lacking, ValueError where they are not what they must be."""
    described = directory.description
    if described.activation.kind != "topk":
        if thresholds is not None:
            raise ValueError(f"a {described.activation.kind} CLT has its own thresholds, or none")
        return
    if thresholds is None:
        raise UserError(
            f"{directory.path} is a topk CLT, which circuit-tracer does not know: name the --store whose val rows "
            "its thresholds are to be calibrated on"
        )
    for source in described.sources:
        found = np.shape(thresholds[source]) if source in thresholds else None
        if found != (described.n_features,) or np.isnan(thresholds[source]).any():
            raise ValueError(f"thresholds of source {source}: {found}, not ({described.n_features},) numbers")


def tracer_encoder(directory: CLTDirectory, layer: int, threshold: np.ndarray | None) -> dict[str, np.ndarray]:
    """W_enc, b_enc and threshold of a layer. One that is no source is a zero encoder that is never above 1."""
    described = directory.description
    F, D = described.n_features, described.d_model
    if layer in described.sources:
        found = directory.tensors(f"W_enc_{layer}.safetensors")
        if threshold is not None:
            found[f"threshold_{layer}"] = threshold
        if (name := f"threshold_{layer}") in found:
            # Below 0 circuit-tracer would let negative values pass, which have none here.
            found[name] = np.maximum(found[name], 0).astype(np.float32)
        return found
    found = {
        f"W_enc_{layer}": np.zeros((F, D), tensor_type("W_enc", described.dtype)),
        f"b_enc_{layer}": np.zeros(F, np.float32),
    }
    return found if described.activation.kind == "relu" else found | {f"threshold_{layer}": np.ones(F, np.float32)}


def tracer_decoder(directory: CLTDirectory, layer: int) -> np.ndarray:
    """[F, L - layer, D]: zero where the layer does not write."""
    described = directory.description
    shape = described.n_features, described.n_layers - layer, described.d_model
    slots = np.zeros(shape, tensor_type("W_dec", described.dtype))
    if layer in described.sources:
        found = directory.tensors(f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        slots[:, described.offset : described.offset + found.shape[1]] = found
    return slots


def output_hook(described: Description) -> str:
    """What the MLP writes to the residual stream. circuit-tracer's mapping of Qwen lacks the usual name."""
    named = f"{described.model.get('class')} {described.model.get('id')}".lower()
    return "mlp.hook_out" if "qwen" in named else "hook_mlp_out"


def name_of(directory: CLTDirectory) -> str:
    """Which CLT directory: its folder's name, and what tells it from another of that name."""
    digest = hashlib.sha256((directory.path / DESCRIPTION).read_bytes()).hexdigest()[:12]
    return f"{directory.path.resolve().name} ({DESCRIPTION} {digest})"


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, which would hold wrong values of an array that is not contiguous."""
    write_whole(path, partial(save_file, {name: np.ascontiguousarray(value) for name, value in tensors.items()}))


# Thresholds for topk ------------------------------------------------------------------------------------------------


def topk_thresholds(
    described: Description, pre_activations: Callable[[int], Iterable[np.ndarray]]
) -> dict[int, np.ndarray]:
    """[F] float32 by source layer: JumpReLU thresholds under which a topk CLT has the mean L0 that it has with its k.

    pre_activations(source) gives h [B, F] of all (val) rows in pieces, the same in each of two calls. The threshold is
    one number for all features of a source. UserError where there are no rows.
    """
    found = {}
    for source, k in zip(described.sources, described.activation.k, strict=True):
        threshold = topk_threshold(partial(pre_activations, source), k)
        found[source] = np.full(described.n_features, threshold, np.float32)
    return found


def topk_threshold(pieces: Callable[[], Iterable[np.ndarray]], k: int) -> np.float32:
    """What h must strictly exceed so that as many are active as under topk: the k largest of each row, if above 0.

    `pieces()` gives h [B, F] float32; it is gone through twice. Let n be the number of features active under topk: the
    threshold lies halfway between the n-th largest h of all rows and features and the next value below it, so that
    exactly n are above it unless others equal the n-th; halfway, so that rounding elsewhere makes no difference. Found
    without sorting or keeping them: first the upper 16 bits of the n-th, then the lower ones. Infinite where none is
    active. UserError where there are no rows.
    """
    upper, rows, left = np.zeros(BINS, np.int64), 0, 0
    for h in pieces():
        rows += len(h)
        left += int(np.minimum((h > 0).sum(1), k).sum())
        upper += np.bincount(positive_bits(h) // BINS, minlength=BINS)
    if rows == 0:
        raise UserError("there are no val rows, which thresholds are calibrated on: capture more samples")
    if left == 0:
        return np.float32(np.inf)
    high, left = place_of(upper, left)
    lower, below = np.zeros(BINS, np.int64), 0
    for h in pieces():
        bits = positive_bits(h)
        lower += np.bincount(bits[bits // BINS == high] % BINS, minlength=BINS)
        below = max(below, int(bits[bits // BINS < high].max(initial=0)))
    low, _ = place_of(lower, left)
    if (nearer := np.flatnonzero(lower[:low])).size:
        below = high * BINS + int(nearer[-1])
    nth, next_below = np.array([high * BINS + low, below], np.int32).view(np.float32)
    halfway = np.float32((float(nth) + float(next_below)) / 2)
    return min(halfway, np.nextafter(nth, np.float32(0)))  # of neighbouring floats, halfway may be rounded up


def positive_bits(h: np.ndarray) -> np.ndarray:
    """The values above 0 as whole numbers, in the order of the floats."""
    h = np.asarray(h, np.float32)
    return h[h > 0].view(np.int32)


def place_of(counts: np.ndarray, n: int) -> tuple[int, int]:
    """The bin of the n-th largest, and which one it is of that bin's."""
    above = np.cumsum(counts[::-1])[::-1]  # in this bin and higher ones
    place = int((above >= n).sum()) - 1
    return place, n - int(above[place] - counts[place])


# From circuit-tracer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TracerLayer:
    """What the two files of a layer hold, without the weights."""

    n_features: int
    types: frozenset[str]  # of W_enc and W_dec
    b_dec: np.ndarray  # [D] of the output layer
    reads: bool  # whether the encoder has anything but zeros
    writes: tuple[int, ...]  # slots with anything but zeros
    threshold: bool


def import_circuit_tracer(folder: Path | str, model: str | None = None) -> tuple[Description, Files]:
    """(description, files) of a circuit-tracer CLT, for `write_clt`. One layer is in memory at a time.

    model: the language model's name, by default what config.yaml says.

    Every file is looked at before the first is given out. With a clt.json of `write_circuit_tracer` beside them,
    sources and window are what it says. Else they are what is not zero: a layer that neither reads nor writes is no
    source, nor is one that has no layer left to write to. If an output layer has a bias though no slot writes to it,
    all layers are sources with all their slots.

    UserError for what is not such a directory or cannot be kept: skip connections, thresholds below 0 (whose features
    may be negative) or on some layers only, a hook that is no site.
    """
    folder = Path(folder)
    config, n_layers = read_config(folder), count_layers(folder)
    layers = [look_at(folder, layer, n_layers) for layer in range(n_layers)]
    first = layers[0]
    for number, layer in enumerate(layers):
        file = folder / f"W_enc_{number}.safetensors"
        if (layer.n_features, len(layer.b_dec)) != (first.n_features, len(first.b_dec)):
            raise UserError(f"{file} has other numbers of features or of dimensions than layer 0: all layers have one")
        if layer.threshold != first.threshold:
            raise UserError(f"{file}: layer {number} and layer 0 do not both have thresholds: give every layer some")
    types = frozenset.union(*(layer.types for layer in layers))
    activation = Activation("jumprelu" if first.threshold else "relu")
    described = beside(folder)
    if described is None:
        sources, offset, n_targets = window_of(folder, layers)
        described = Description(
            model={"id": model or config.get("model_name"), "revision": None, "class": None}
            | {"n_layers": n_layers, "d_model": len(first.b_dec)},
            site=config["site"],
            n_features=first.n_features,
            sources=sources,
            offset=offset,
            n_targets=n_targets,
            activation=activation,
            combined="joint",
            dtype=common_type(types),
        )
    else:
        said = described.n_layers, described.d_model, described.n_features, described.site, described.activation.kind
        if said != (n_layers, len(first.b_dec), first.n_features, config["site"], activation.kind):
            raise UserError(f"{folder / DESCRIPTION} describes another CLT than the files beside it: export it again")
        described = dataclasses.replace(described, dtype=common_type(types))
        if model:
            raise UserError(f"{folder / DESCRIPTION} says that it is of {described.model.get('id')}: leave --model out")
    check_window(folder, described, layers)
    described = dataclasses.replace(described, derived_from=f"{folder.resolve().name} (circuit-tracer)")
    return described, tracer_files(folder, described, layers)


def tracer_files(folder: Path, described: Description, layers: Sequence[TracerLayer]) -> Files:
    """(file name, tensors) as in a CLT directory."""
    for source in described.sources:
        encoder = read_tensors(folder / f"W_enc_{source}.safetensors")
        del encoder[f"b_dec_{source}"]
        yield f"W_enc_{source}.safetensors", encoder
        slots = read_tensors(folder / f"W_dec_{source}.safetensors")[f"W_dec_{source}"]
        first = described.offset
        yield (
            f"W_dec_{source}.safetensors",
            {f"W_dec_{source}": slots[:, first : first + len(described.wiring.targets_of(source))]},
        )
    yield "b_dec.safetensors", {f"b_dec_{target}": layers[target].b_dec for target in described.wiring.targets}


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml, and in it as `site` what features read. UserError where it is none of a CLT, or of other hooks."""
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            f"{file} is missing: write one with model_name, model_kind: {KIND}, "
            "feature_input_hook and feature_output_hook"
        )
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML ({one_line(error)}): get it again") from error
    if not isinstance(config, dict) or config.get("model_kind") != KIND:
        kind = config.get("model_kind") if isinstance(config, dict) else config
        raise UserError(f"{file}: model_kind is {kind!r}, and only {KIND} can be imported: name another folder")
    hooks = {}
    for name, known in (("feature_input_hook", SITES), ("feature_output_hook", OUTPUT_HOOKS)):
        hooks[name] = str(config.get(name)).removeprefix("blocks.{layer}.")
        if hooks[name] not in known:
            raise UserError(f"{file}: {name} is {hooks[name]}, and only {', '.join(known)} can be imported")
    return config | {"site": SITES[hooks["feature_input_hook"]]}


def count_layers(folder: Path) -> int:
    """Layers are as many as there are encoder files, numbered from 0."""
    names = {file.name for file in folder.glob("W_enc_*.safetensors")}
    if not names:
        raise UserError(f"{folder} has no W_enc_0.safetensors, so no circuit-tracer CLT: name another folder")
    for name in sorted(names - {f"W_enc_{layer}.safetensors" for layer in range(len(names))}):
        raise UserError(
            f"{folder / name} does not belong to a CLT of {len(names)} layers, or one of the layers before it is "
            "missing: get the directory again"
        )
    return len(names)


def look_at(folder: Path, layer: int, n_layers: int) -> TracerLayer:
    """Check a layer's files by names, shapes and values."""
    file = folder / f"W_enc_{layer}.safetensors"
    encoder = read_tensors(file)
    W_enc, b_enc, b_dec, threshold = (
        encoder.pop(f"{name}_{layer}", None) for name in ("W_enc", "b_enc", "b_dec", "threshold")
    )
    if W_enc is None or b_enc is None or b_dec is None:
        raise UserError(f"{file} lacks W_enc_{layer}, b_enc_{layer} or b_dec_{layer}: get it again")
    for name in encoder:
        what = "a skip connection, which a CLT here does not have" if "skip" in name.lower() else "not known"
        raise UserError(f"{file}: {name} is {what}: this CLT cannot be imported")
    if W_enc.ndim != 2:
        raise UserError(f"{file}: W_enc_{layer} is {W_enc.shape}, and should be (features, dimensions): get it again")
    F, D = W_enc.shape
    if threshold is not None and threshold.shape == (F,) and not (threshold.astype(np.float32) >= 0).all():
        raise UserError(f"{file}: threshold_{layer} is below 0, where features may be negative: it cannot be imported")
    decoder_file = folder / f"W_dec_{layer}.safetensors"
    decoder = read_tensors(decoder_file)
    W_dec = decoder.pop(f"W_dec_{layer}", np.zeros(0))
    if decoder:
        raise UserError(f"{decoder_file}: {next(iter(decoder))} is not known: this CLT cannot be imported")
    for at, name, found, shape in (
        (file, "b_enc", b_enc, (F,)),
        (file, "b_dec", b_dec, (D,)),
        (file, "threshold", threshold, (F,)),
        (decoder_file, "W_dec", W_dec, (F, n_layers - layer, D)),
    ):
        if found is not None and found.shape != shape:
            raise UserError(f"{at}: {name}_{layer} is {found.shape}, and should be {shape}: get it again")
    return TracerLayer(
        n_features=F,
        types=frozenset((W_enc.dtype.name, W_dec.dtype.name)),
        b_dec=b_dec.astype(np.float32),
        reads=bool(W_enc.any() or b_enc.any()),
        writes=tuple(slot for slot in range(W_dec.shape[1]) if W_dec[:, slot].any()),
        threshold=threshold is not None,
    )


def window_of(folder: Path, layers: Sequence[TracerLayer]) -> tuple[tuple[int, ...], int, int]:
    """(sources, offset, n_targets): the smallest window that has everything that is not zero."""
    slots = {slot for layer in layers for slot in layer.writes}
    if not slots:
        raise UserError(f"{folder}: every W_dec is zero, so there is nothing to import: get the directory again")
    n_layers, offset = len(layers), min(slots)
    n_targets = max(slots) - offset + 1
    sources = tuple(
        number
        for number, layer in enumerate(layers)
        if (layer.reads or layer.writes) and number + offset < n_layers  # later ones have no target
    )
    covered = {target for source in sources for target in range(source + offset, source + offset + n_targets)}
    if any(layer.b_dec.any() and number not in covered for number, layer in enumerate(layers)):
        return tuple(range(n_layers)), 0, n_layers
    return sources, offset, n_targets


def check_window(folder: Path, described: Description, layers: Sequence[TracerLayer]) -> None:
    """UserError where a weight outside of what is imported is not zero."""
    for number, layer in enumerate(layers):
        targets = described.wiring.targets_of(number)
        outside = [number + slot for slot in layer.writes if number + slot not in targets]
        if outside or (layer.b_dec.any() and number not in described.wiring.targets):
            raise UserError(
                f"{folder}: layer {number} has weights that are outside of the window in {DESCRIPTION}: "
                f"remove {DESCRIPTION} to import all there is"
            )


def beside(folder: Path) -> Description | None:
    """What the clt.json of `write_circuit_tracer` says; None without one."""
    file = folder / DESCRIPTION
    if not file.exists():
        return None
    found = read_json(file)
    form, version = found.get("format"), found.get("version")
    if form == FORMAT:
        raise UserError(f"{folder} is a CLT directory of this program already: use it as it is")
    if (form, version) != (TRACER_FORMAT, TRACER_VERSION):
        raise UserError(f"{file} is not one that this program reads: remove it to import what lies beside it")
    try:
        return description_of(found)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}): remove it to import what lies beside it") from error
