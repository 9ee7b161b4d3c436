"""Weights on their way out of JAX: numpy in float64, JAX and PyTorch are one function, before and after folding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dense
from cltjax.clt_directory import CLTDirectory, Description, write_clt
from cltjax.errors import UserError
from cltjax.folding import activation_of, folded
from cltjax.replacement import clt as torch_clt
from test_clt import CONSTANTS, LAYERS, RULES, B, D, F, K, close, forward, model

WIRINGS = [("all", 1, 3), ("0,2-3", 0, 16), ("2", 0, 1)]


def written(folder: Path, clt: Any, offset: int, n_targets: int, dtype: Any = "float32") -> CLTDirectory:
    """The CLT directory of a JAX CLT."""
    about = {"id": "random", "revision": None, "class": "none", "n_layers": LAYERS, "d_model": D}
    described = Description(
        about, "mlp_in", F, clt.wiring.sources, offset, n_targets, activation_of(clt), "joint", dtype
    )
    write_clt(folder, described, folded(clt, dtype))
    return CLTDirectory.open(folder)


def by_definition(weights: dict[str, Any], wiring: Any, x: np.ndarray, activation: str) -> tuple[np.ndarray, Any]:
    """codes [S, B, F] and raw y_hat [B, T, D] in float64; with no bound on the number of active features."""
    normal = (x.astype(np.float64) - weights["in_mean"]) / weights["in_std"][:, None]
    tau = weights["cut"] if activation in ("topk_joint", "batchtopk") else None
    rule = dense.Rule(activation, (K,) * len(wiring.sources), F, tau=tau)
    codes = dense.encode(weights, normal, rule, wiring).codes
    y_hat = dense.decode_codes(weights["W_dec"], weights["b_dec"], codes, wiring)
    return codes, y_hat * weights["out_std"][:, None] + weights["out_mean"]


def in_torch(clt: torch_clt.CLT, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes [S, B, F] and y_hat [B, T, D] of a CLT directory."""
    features = {layer: clt.encode(layer, torch.from_numpy(x[:, s])) for s, layer in enumerate(clt.sources)}
    codes = np.zeros((len(clt.sources), len(x), F))
    for s, layer in enumerate(clt.sources):
        np.put_along_axis(codes[s], features[layer].indices.numpy(), features[layer].values.numpy(), -1)
    return codes, np.stack([clt.decode(target, features).numpy() for target in clt.targets], 1)


@pytest.mark.parametrize("activation", RULES)
@pytest.mark.parametrize("layers, offset, n_targets", WIRINGS)
def test_numpy_jax_and_torch_are_one_function(tmp_path: Path, activation, layers, offset, n_targets):
    clt, wiring, weights, x = model(layers, offset, n_targets, activation=activation)
    codes, y_hat = by_definition(weights, wiring, x, activation)
    assert (codes > 0).any() and (codes == 0).any()
    if activation == "topk":
        *_, y = forward(clt, x)
    else:
        found = clt.codes(x)
        assert ((np.asarray(found) > 0) == (codes > 0)).all()
        normal = clt.contributions_of_codes(found) + clt.b_dec[...]
        y = normal * clt.out_std[...][:, None] + clt.out_mean[...]
    close(y, y_hat)
    directory = written(tmp_path / "clt", clt, offset, n_targets)
    for lazy in (False, True):
        torch_codes, torch_y_hat = in_torch(torch_clt.CLT.from_pretrained(directory.path, lazy=lazy), x)
        assert ((torch_codes > 0) == (codes > 0)).all()
        close(torch_codes, codes)
        close(torch_y_hat, y_hat)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_weights_are_nearly_the_same_function(tmp_path: Path, dtype):
    clt, wiring, weights, x = model("0,2-3", 0, 16)
    _, y_hat = by_definition(weights, wiring, x, "topk")
    directory = written(tmp_path / "clt", clt, 0, 16, dtype)
    for held in (torch.float32, getattr(torch, dtype)):
        _, found = in_torch(torch_clt.CLT.from_pretrained(directory.path, dtype=held), x)
        error = np.linalg.norm(found - y_hat) / np.linalg.norm(y_hat)
        assert 1e-5 < error < (0.05 if dtype == "float16" else 0.3)  # a rounding may put another feature among the k
    lazy = torch_clt.CLT.from_pretrained(directory.path, dtype=getattr(torch, dtype), lazy=True)
    np.testing.assert_array_equal(in_torch(lazy, x)[1], found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_held_as_asked_wherever_they_are(tmp_path: Path, dtype):
    """float32 files: rows that are read from them are rounded as those in memory are."""
    clt, _, _, x = model("0,2-3", 0, 16)
    path = written(tmp_path / "clt", clt, 0, 16).path
    one, lazy = (torch_clt.CLT.from_pretrained(path, dtype=dtype, lazy=lazy) for lazy in (False, True))
    np.testing.assert_array_equal(in_torch(lazy, x)[1], in_torch(one, x)[1])
    rows = torch.tensor([3, 1])
    assert torch.equal(lazy.decoder_rows(2, rows), one.decoder_rows(2, rows))
    exact = torch_clt.CLT.from_pretrained(path).decoder_rows(2, rows)
    assert torch.equal(lazy.decoder_rows(2, rows), exact.to(dtype).float()) and not torch.equal(exact.to(dtype), exact)


@pytest.mark.parametrize("name", ["W_enc_2", "W_dec_2"])
def test_weights_too_large_for_float16_are_one_line(tmp_path: Path, name: str):
    clt, *_ = model("0,2-3", 0, 16)
    path = written(tmp_path / "clt", clt, 0, 16).path
    file = path / f"{name}.safetensors"
    tensors = load_file(file)
    tensors[name][1] = 1e6
    save_file(tensors, file)
    for dtype in (torch.float32, torch.bfloat16):
        torch_clt.CLT.from_pretrained(path, dtype=dtype)
    with pytest.raises(UserError, match=f"{name} has weights too large for float16"):
        torch_clt.CLT.from_pretrained(path, dtype=torch.float16)
    if name == "W_dec_2":
        lazy = torch_clt.CLT.from_pretrained(path, dtype=torch.float16, lazy=True)
        lazy.decoder_rows(2, torch.tensor([0, 2]))
        with pytest.raises(UserError, match=f"{name} has weights too large for float16"):
            lazy.decoder_rows(2, torch.tensor([0, 1]))
        features = torch_clt.Features(torch.ones(1, 1), torch.tensor([[1]]))
        with pytest.raises(UserError, match=f"{name} has weights too large for float16"):
            lazy.contribution(2, 2, features)


def test_constants_are_folded_in_and_gone(tmp_path: Path):
    clt, *_ = model()
    directory = written(tmp_path / "clt", clt, 1, 3)
    names = {key for _, tensors in directory for key in tensors}
    assert not any(constant in name for name in names for constant in (*CONSTANTS, "cut"))


def test_equal_pre_activations_go_to_the_lowest_index(tmp_path: Path):
    """torch.topk chooses any of them."""
    clt, *_, x = model("2", 0, 1)
    clt.W_enc[...] = clt.W_enc[...] * 0
    clt.b_enc[...] = clt.b_enc[...] * 0 + 1
    exported = torch_clt.CLT.from_pretrained(written(tmp_path / "clt", clt, 0, 1).path)
    found = exported.encode(2, torch.from_numpy(x[:, 0]))
    assert (found.indices.sort(-1).values == torch.arange(K)).all() and len(found.values) == B


def test_rounded_encoders_do_not_meet_large_means(tmp_path: Path) -> None:
    """A mean of a hundred standard deviations, as in residual streams, costs bfloat16's pre-activations nothing."""
    errors = []
    for shift in (0.0, 100.0):
        clt, _, weights, x = model("all", 0, 16, activation="topk")
        far = np.zeros((1, D), np.float32)
        far[0, 2] = shift * float(np.max(weights["in_std"]))
        clt.in_mean[...] = clt.in_mean[...] + far
        exact = np.einsum("bsd,sfd->bsf", (x - weights["in_mean"]) / weights["in_std"][:, None], weights["W_enc"])
        exact = exact + weights["b_enc"]
        directory = written(tmp_path / f"{shift}", clt, 0, 16, "bfloat16")
        loaded = torch_clt.CLT.from_pretrained(directory.path)
        h = np.stack(
            [loaded.pre_activations(layer, torch.from_numpy(x + far)[:, s]) for s, layer in enumerate(loaded.sources)],
            1,
        )
        errors.append(np.abs(h - exact).max() / np.abs(exact).max())
    assert errors[0] < 0.01 and errors[1] < 2 * errors[0]


def test_what_float16_does_not_hold_is_refused(tmp_path: Path) -> None:
    clt, *_ = model("2", 0, 1, activation="topk")
    clt.W_dec["2"][...] = clt.W_dec["2"][...] + 1e6
    with pytest.raises(UserError, match=r"W_dec_2 has values up to .*, too large for float16: export as bfloat16"):
        written(tmp_path / "clt", clt, 0, 1, "float16")
    assert not (tmp_path / "clt").exists()
