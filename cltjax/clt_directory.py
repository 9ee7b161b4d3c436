"""The CLT directory: trained weights as they leave JAX, in safetensors and JSON. Imports neither jax nor torch.

    clt.json                     Description: what the weights are, and how they came about
    W_enc_{l}.safetensors        W_enc_{l} [F, D], b_enc_{l} [F], and where features have one threshold_{l} [F]
    W_dec_{l}.safetensors        W_dec_{l} [F, T_l, D]: slot j writes to layer l + offset + j
    b_dec.safetensors            b_dec_{t} [D] for every covered target layer t

Weights take and give raw activations: normalisation is folded in. docs/clt.md describes it for other programs.
"""

import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cltjax.errors import UserError
from cltjax.files import whole_folder, write_json, write_whole
from cltjax.typed import converted, fits
from cltjax.wiring import Wiring, spell_layers, wire

Combined = Literal["joint", "backfit", "gains", "none"]
WeightType = Literal["float32", "float16", "bfloat16"]
Site = Literal["mlp_in", "resid_mid", "resid_pre"]
FORMAT, FORMAT_VERSION = "cltjax CLT", 1
DESCRIPTION = "clt.json"
# What nobody reads but people: free-form JSON.
FREE = ("model", "tokens", "metrics", "combination", "training")
DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "float16": (np.dtype(np.float16), "F16"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
}


@dataclass(frozen=True)
class Activation:
    """Which features of a token are active, once training is over: a function of the source's pre-activations h alone.

    topk: the k largest h, those above 0. relu: h above 0. jumprelu: h above its feature's threshold. Ties go to the
    lowest index.
    """

    kind: Literal["topk", "jumprelu", "relu"]
    k: tuple[int, ...] = ()
    """topk: one a source."""
    trained_as: str = ""
    """The sparsity rule in training. topk_joint and batchtopk leave a threshold for every feature."""


@dataclass(frozen=True)
class Description:
    """What clt.json says."""

    model: dict[str, Any]  # id, revision, class, n_layers, d_model
    site: Site
    n_features: int
    sources: tuple[int, ...]
    offset: int
    n_targets: int
    activation: Activation
    combined: Combined
    dtype: WeightType
    tokens: dict[str, Any] = field(default_factory=dict)  # which tokens it was trained on
    metrics: dict[str, Any] = field(default_factory=dict)  # on test rows
    combination: dict[str, Any] = field(default_factory=dict)  # of several runs: gains by target and source
    training: list[dict[str, Any]] = field(default_factory=list)  # the configuration of each run
    derived_from: str | None = None

    @property
    def n_layers(self) -> int:
        return int(self.model["n_layers"])

    @property
    def d_model(self) -> int:
        return int(self.model["d_model"])

    @cached_property
    def wiring(self) -> Wiring:
        return wire(spell_layers(self.sources), self.n_layers, self.offset, self.n_targets)

    @property
    def files(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shape of each tensor of each file."""
        F, D = self.n_features, self.d_model
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for layer in self.sources:
            encoder = {f"W_enc_{layer}": (F, D), f"b_enc_{layer}": (F,)}
            if self.activation.kind == "jumprelu":
                encoder[f"threshold_{layer}"] = (F,)
            found[f"W_enc_{layer}.safetensors"] = encoder
            heads = len(self.wiring.targets_of(layer))
            found[f"W_dec_{layer}.safetensors"] = {f"W_dec_{layer}": (F, heads, D)}
        return found | {"b_dec.safetensors": {f"b_dec_{target}": (D,) for target in self.wiring.targets}}


def write_clt(folder: Path, description: Description, files: Iterable[tuple[str, Mapping[str, np.ndarray]]]) -> None:
    """Write a CLT directory, whole or not at all. `files`: (name, tensors) of each file, in any order.

    UserError where the folder exists already, and where weights are too large for the description's dtype. Weights are
    rounded to it; biases and thresholds, which decide what is active, stay float32.
    """
    expected = description.files
    with whole_folder(folder) as temporary:
        for name, tensors in files:
            shapes = expected.pop(name)
            found = {key: value.shape for key, value in tensors.items()}
            if shapes != found:
                raise ValueError(f"{name}: {found}, not {shapes}")
            # safetensors writes the wrong values of an array that is not contiguous, without a word.
            with np.errstate(over="ignore"):  # looked at below
                rounded = {
                    key: np.ascontiguousarray(value, tensor_type(key, description.dtype))
                    for key, value in tensors.items()
                }
            for key, value in tensors.items():
                if np.isfinite(value).all() and not np.isfinite(rounded[key].astype(np.float32)).all():
                    raise UserError(
                        f"{key} has values up to {np.abs(value).max():.3g}, too large for {description.dtype}: "
                        "export as bfloat16 or float32"
                    )
            write_whole(temporary / name, partial(save_file, rounded))
        if expected:
            raise ValueError(f"lacking: {', '.join(expected)}")
        write_json(temporary / DESCRIPTION, {"format": FORMAT, "version": FORMAT_VERSION} | as_json(description))


def tensor_type(name: str, dtype: str) -> np.dtype:
    """What a tensor is stored as."""
    return DTYPES[dtype if name.startswith("W_") else "float32"][0]


def as_json(description: Description) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(description)))


@dataclass(frozen=True)
class CLTDirectory:
    """A CLT directory whose files were looked at: names, shapes and types are right, nothing is loaded."""

    path: Path
    description: Description

    @classmethod
    def open(cls, path: Path | str) -> "CLTDirectory":
        """UserError for a folder that is no CLT directory, or lacks a file, or has one that does not belong there."""
        path = Path(path)
        found = cls(path, read_description(path))
        expected = found.description.files
        present = {file.name for file in path.glob("*.safetensors")}
        for name in sorted(present - expected.keys()):
            raise UserError(f"{path / name} does not belong to the CLT that {DESCRIPTION} describes: remove it")
        for name, shapes in expected.items():
            if name not in present:
                raise UserError(f"{path / name} is missing: export the CLT again")
            check_file(path / name, shapes, found.description.dtype)
        return found

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The tensors of one file, as stored."""
        with safe_open(self.path / name, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """(name, tensors) of every file, one at a time."""
        for name in self.description.files:
            yield name, self.tensors(name)


def read_description(path: Path) -> Description:
    """What clt.json says; UserError where there is none, or it is not of this format."""
    file = path / DESCRIPTION
    if not file.is_file():
        raise UserError(f"{path} is no CLT directory: it has no {DESCRIPTION} (cltjax export writes one)")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): export the CLT again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{file} does not describe a CLT of this program: name another folder")
    if found.get("version") != FORMAT_VERSION:
        raise UserError(f"{file} is of version {found.get('version')}, this program reads version {FORMAT_VERSION}")
    try:
        return description_of(found)
    except (KeyError, TypeError, ValueError, UserError) as error:
        said = f"{error} is lacking" if isinstance(error, KeyError) else error
        raise UserError(f"{file} does not describe a CLT ({said}): export the CLT again") from error


def description_of(found: dict[str, Any]) -> Description:
    """A description from JSON. KeyError, TypeError, ValueError or UserError where it is none."""
    known = {f.name: found[f.name] for f in dataclasses.fields(Description) if f.name in found}
    description = converted(known, Description)
    for name, hint in typing.get_type_hints(Description).items():
        if name not in FREE and not fits(value := getattr(description, name), hint):
            raise ValueError(f"{name} is {value!r}")
    for name, hint in typing.get_type_hints(Activation).items():
        if not fits(value := getattr(description.activation, name), hint):
            raise ValueError(f"activation.{name} is {value!r}")
    if not all(type(description.model[name]) is int for name in ("n_layers", "d_model")):
        raise ValueError("model.n_layers and model.d_model are no whole numbers")
    sources, k = description.sources, description.activation.k
    if not sources or sources != description.wiring.sources:
        raise ValueError(f"sources are {sources}, and not ascending layers of the model")
    if len(k) != (len(sources) if description.activation.kind == "topk" else 0):
        raise ValueError(f"{len(sources)} sources have {len(k)} numbers k")
    if not all(0 < one <= description.n_features for one in k):
        raise ValueError(f"k is {k}, of {description.n_features} features")
    return description


def check_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """UserError where a file's tensors are not those expected, by name, shape or type."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): export the CLT again") from error
    codes = dict(DTYPES.values())
    wanted = {name: (shape, codes[tensor_type(name, dtype)]) for name, shape in shapes.items()}
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            was, should = (f"{one[0]} {one[1]}" if one else "nothing" for one in (found.get(name), wanted.get(name)))
            raise UserError(f"{path}: {name} is {was}, and should be {should}: export the CLT again")
