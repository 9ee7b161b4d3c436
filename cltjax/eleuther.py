"""EleutherAI's per-layer transcoders as a CLT directory. No jax and no torch here."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cltjax.clt_directory import Activation, Description
from cltjax.errors import UserError
from cltjax.foreign import Files, common_type, read_json, read_tensors

HOOKPOINT = re.compile(r"(?:.*\.)?(\d+)\.mlp")
# Options of cfg.json that make another function of a transcoder, with the value that does not.
PLAIN = {
    "activation": "topk",
    "signed": False,
    "skip_connection": False,
    "embed_skip": False,
    "gram_lookup": False,
    "n_targets": 0,
    "normalize_io": False,
    "post_encoder_scale": False,
    "coalesce_topk": "none",
}
TRANSCODER = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def import_eleuther(
    folders: Path | str | Sequence[Path], model: str | None = None, n_layers: int | None = None
) -> tuple[Description, Files]:
    """(description, files) of EleutherAI's per-layer transcoders, for `write_clt`: a CLT whose sources write to their
    own layer alone.

    folders: one with a sub-folder for each hookpoint, or these. model, n_layers: of the language model, which cfg.json
    does not say; by default what config.json beside the sub-folders says, and one more than the highest layer.

    The format (EleutherAI/sparsify and EleutherAI/clt-training, sparsify/sparse_coder.py and config.py): in
    `layers.5.mlp/`, named after the module whose input is read and whose output is predicted,
    sae.safetensors    encoder.weight [F, D], encoder.bias [F], W_dec [F, D], b_dec [D]; W_skip [D, D] where cfg has
                       skip_connection. clt-training adds post_enc [F] (added to active features), and with n_targets
                       W_decs.{i}, b_decs.{i}, post_encs.{i}; with normalize_io in_norm and out_norm
    cfg.json           transcode (false: an autoencoder), k, activation ("topk" where it is lacking, "groupmax",
                       "batchtopk"), num_latents, expansion_factor, d_in, skip_connection, ...
    config.json        beside the sub-folders, of the run: model, revision, hookpoints, hookpoints_in
    A transcoder is top-k of ReLU(W x + b), then W_dec and b_dec; b_dec is subtracted from the input of autoencoders
    only. Its target is the MLP module's output: in families with a norm behind the MLP (Gemma 2 and 3) that is not what
    is added to the residual stream, which the files cannot tell.

    UserError for autoencoders and whatever is not this function: skip connections, several targets, other activations,
    a post_enc that is not zero.
    """
    places = hookpoints(folders)
    found = {layer_of(folder): folder for folder in places}
    if len(found) < len(places):
        raise UserError(f"{places[0].parent} has several transcoders of one layer: name the folders to import")
    layers = sorted(found)
    run = run_config(found[layers[0]].parent)
    shapes, types, ks = set(), set(), []
    for layer in layers:
        k, tensors = read_transcoder(found[layer])
        ks.append(k)
        shapes.add(tensors["W_dec"].shape)
        types.update(tensors[name].dtype.name for name in ("encoder.weight", "W_dec"))
    if len(shapes) > 1:
        raise UserError(
            f"{places[0].parent}: the transcoders have the shapes {sorted(shapes)}: all layers must have one"
        )
    F, D = shapes.pop()
    if n_layers is not None and layers[-1] >= n_layers:
        raise UserError(f"{found[layers[-1]]} is of layer {layers[-1]}, and the model has {n_layers}: name its layers")
    identity = {"id": model or run.get("model"), "revision": None if model else run.get("revision"), "class": None}
    described = Description(
        model=identity | {"n_layers": n_layers or layers[-1] + 1, "d_model": D},
        site="mlp_in",
        n_features=F,
        sources=tuple(layers),
        offset=0,
        n_targets=1,
        activation=Activation("topk", tuple(ks), "topk"),
        combined="joint",  # no target has a second source
        dtype=common_type(types),
        derived_from=f"{places[0].resolve().parent.name} (EleutherAI transcoders)",
    )
    return described, transcoder_files(found, layers)


def transcoder_files(folders: Mapping[int, Path], layers: Sequence[int]) -> Files:
    """(file name, tensors) as in a CLT directory."""
    b_dec = {}
    for layer in layers:
        _, tensors = read_transcoder(folders[layer])
        b_dec[f"b_dec_{layer}"] = tensors["b_dec"]
        encoder = {f"W_enc_{layer}": tensors["encoder.weight"], f"b_enc_{layer}": tensors["encoder.bias"]}
        yield f"W_enc_{layer}.safetensors", encoder
        yield f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": tensors["W_dec"][:, None]}
    yield "b_dec.safetensors", b_dec


def hookpoints(folders: Path | str | Sequence[Path]) -> list[Path]:
    """The folders with a sae.safetensors or a cfg.json: those named, or all within the one named."""
    if not isinstance(folders, Path | str):
        return [Path(folder) for folder in folders]
    folder = Path(folders)
    around = [folder, *sorted(folder.glob("*"))]
    found = [one for one in around if (one / "sae.safetensors").exists() or (one / "cfg.json").exists()]
    if not found:
        raise UserError(f"{folder} has no sub-folder with sae.safetensors and cfg.json: name another folder")
    return found


def layer_of(folder: Path) -> int:
    """The layer of a hookpoint's folder, `layers.5.mlp` or the like."""
    found = HOOKPOINT.fullmatch(folder.resolve().name)
    if not found:
        raise UserError(
            f"{folder} is no hookpoint of an MLP (`layers.5.mlp`): only these can be imported, move it away"
        )
    return int(found[1])


def run_config(folder: Path) -> dict[str, Any]:
    """config.json of the training run, empty where there is none. UserError where inputs are other than the MLP's."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    found = read_json(file)
    if (inputs := found.get("hookpoints_in")) and inputs != found.get("hookpoints"):
        raise UserError(f"{file}: the transcoders read {inputs[0]} and not the MLP's input: they cannot be imported")
    return found


def read_transcoder(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """k, and the tensors TRANSCODER. UserError where it is another kind of sparse coder."""
    file, weights = folder / "cfg.json", folder / "sae.safetensors"
    if not file.is_file() or not weights.is_file():
        raise UserError(f"{folder} lacks cfg.json or sae.safetensors: get it again")
    config = read_json(file)
    if not config.get("transcode"):
        raise UserError(f"{folder} is an autoencoder, not a transcoder (transcode in cfg.json): it cannot be imported")
    for name, plain in PLAIN.items():
        if config.get(name, plain) != plain:
            raise UserError(f"{file}: {name} is {config[name]}, which a CLT here does not have: it cannot be imported")
    tensors = read_tensors(weights)
    post_enc = tensors.pop("post_enc", np.zeros(1))
    if post_enc.any():
        raise UserError(f"{weights}: post_enc is not zero, which a CLT here does not have: it cannot be imported")
    if set(tensors) != set(TRANSCODER):
        odd = sorted(set(tensors) ^ set(TRANSCODER))[0]
        raise UserError(f"{weights}: {odd} is {'not known' if odd in tensors else 'missing'}: it cannot be imported")
    shape, k = tensors["encoder.weight"].shape, config.get("k")
    shapes = dict(zip(TRANSCODER, (shape, shape[:1], shape, shape[1:]), strict=True))
    for name, expected in shapes.items():
        if tensors[name].shape != expected or len(shape) != 2:
            raise UserError(f"{weights}: {name} is {tensors[name].shape}, and should be {expected}: get it again")
    if type(k) is not int or not 0 < k <= shape[0]:
        raise UserError(f"{file}: k is {k}, of {shape[0]} features: get it again")
    return k, tensors
