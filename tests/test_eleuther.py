"""EleutherAI's transcoders: the function that sparsify computes, and what is not one of ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cltjax.clt_directory import write_clt
from cltjax.eleuther import import_eleuther
from cltjax.errors import UserError
from test_circuit_tracer import as_here, inputs
from test_clt_directory import LAYERS, D, F


def sparsify(folder: Path, layers: tuple[int, ...], ks: tuple[int, ...], F: int = F) -> None:
    """Transcoders as sparsify saves them."""
    rng = np.random.default_rng(4)
    for layer, k in zip(layers, ks, strict=True):
        place = folder / f"layers.{layer}.mlp"
        place.mkdir(parents=True)
        shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
        save_file(
            {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
            place / "sae.safetensors",
        )
        config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": k}
        config |= {"multi_topk": False, "skip_connection": False, "transcode": True, "d_in": D}
        (place / "cfg.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model": "some/model", "revision": "abc", "hookpoints": []}))


def test_transcoders_are_the_function_that_sparsify_computes(tmp_path: Path):
    sparsify(tmp_path / "tc", (0, 2, 3), (2, 4, 1))
    found, files = import_eleuther(tmp_path / "tc", n_layers=LAYERS)
    write_clt(tmp_path / "clt", found, files)
    assert found.model == {"id": "some/model", "revision": "abc", "class": None, "n_layers": LAYERS, "d_model": D}
    assert found.wiring.pairs == ((0, 0), (2, 2), (3, 3)) and found.activation.k == (2, 4, 1)
    x = inputs()
    dense, y_hat = as_here(tmp_path / "clt", x)
    for layer, k in ((0, 2), (2, 4), (3, 1)):
        one = load_file(tmp_path / f"tc/layers.{layer}.mlp/sae.safetensors")
        acts = np.maximum(x[layer] @ one["encoder.weight"].T + one["encoder.bias"], 0)
        acts *= acts >= np.sort(acts, -1)[:, -k, None]
        np.testing.assert_allclose(dense[layer], acts, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(y_hat[layer], acts @ one["W_dec"] + one["b_dec"], rtol=1e-5, atol=1e-5)


def test_named_folders_and_defaults(tmp_path: Path):
    sparsify(tmp_path, (0, 2, 3), (2, 4, 1))
    found, _ = import_eleuther([tmp_path / "layers.2.mlp", tmp_path / "layers.0.mlp"], model="mine")
    assert found.sources == (0, 2) and found.n_layers == 3 and found.activation.k == (2, 4)
    assert (found.model["id"], found.model["revision"]) == ("mine", None)
    found, _ = import_eleuther(tmp_path / "layers.3.mlp")
    assert found.sources == (3,) and found.model["id"] == "some/model"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transcode": False}, "is an autoencoder, not a transcoder"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"activation": "groupmax"}, "activation is groupmax"),
        ({"n_targets": 3}, "n_targets is 3"),
        ({"normalize_io": True}, "normalize_io is True"),
        ({"signed": True}, "signed is True"),
        ({"k": 14}, "k is 14, of 13 features"),
        ({"W_skip": np.zeros((D, D), np.float32)}, "W_skip is not known"),
        ({"post_enc": np.ones(F, np.float32)}, "post_enc is not zero"),
        ({"W_dec": np.ones((F, D + 1), np.float32)}, r"W_dec is \(13, 8\)"),
        ({"hookpoints_in": ["layers.0"]}, "read layers.0 and not the MLP's input"),
        ({"name": "layers.2"}, "is no hookpoint of an MLP"),
        ({"name": "model.layers.0.mlp"}, "several transcoders of one layer"),
        ({"F": 17}, "all layers must have one"),
        ({"n_layers": 2}, "is of layer 2, and the model has 2"),
    ],
)
def test_other_sparse_coders_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], said: str):
    sparsify(tmp_path, (0, 2), (2, 4))
    import_eleuther(tmp_path)
    place = tmp_path / "layers.2.mlp"
    if "F" in change:
        sparsify(tmp_path, (3,), (2,), change["F"])
    elif "name" in change:
        place.rename(tmp_path / change["name"])
    elif "hookpoints_in" in change:
        (tmp_path / "config.json").write_text(json.dumps(change))
    elif any(isinstance(value, np.ndarray) for value in change.values()):
        save_file(load_file(place / "sae.safetensors") | change, place / "sae.safetensors")
    elif "n_layers" not in change:
        (place / "cfg.json").write_text(json.dumps(json.loads((place / "cfg.json").read_text()) | change))
    with pytest.raises(UserError, match=said) as raised:
        import_eleuther(tmp_path, n_layers=change.get("n_layers"))
    assert "\n" not in str(raised.value)


def test_a_post_encoder_of_zeros_changes_nothing(tmp_path: Path):
    sparsify(tmp_path / "tc", (0,), (2,))
    file = tmp_path / "tc/layers.0.mlp/sae.safetensors"
    save_file(load_file(file) | {"post_enc": np.zeros(F, np.float32)}, file)
    found, files = import_eleuther(tmp_path / "tc")
    write_clt(tmp_path / "clt", found, files)
    np.testing.assert_array_equal(load_file(tmp_path / "clt/b_dec.safetensors")["b_dec_0"], load_file(file)["b_dec"])


def test_no_transcoders(tmp_path: Path):
    with pytest.raises(UserError, match="has no sub-folder with sae.safetensors"):
        import_eleuther(tmp_path)
