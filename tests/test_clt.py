"""The whole forward pass against a float64 numpy reference, on prime sizes."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dense
from cltjax.clt import CLT
from cltjax.config import ModelConfig
from cltjax.errors import UserError
from cltjax.normalisation import Normalisation
from cltjax.sparsity import candidates
from cltjax.wiring import wire

B, D, F, K, LAYERS = 17, 11, 31, 5, 5
RULES = ("topk", "topk_joint", "batchtopk", "jumprelu", "relu")
CONSTANTS = ("in_mean", "in_std", "out_mean", "out_std")


def model(layers="all", offset=1, n_targets=3, seed=0, activation: Any = "topk"):
    """A CLT with random weights and a strong normalisation, its wiring and weights as float64."""
    wiring = wire(layers, LAYERS, offset, n_targets)
    rng = np.random.default_rng(seed)
    S, T = len(wiring.sources), len(wiring.targets)
    scales = Normalisation(
        rng.normal(0, 3, (S, D)).astype(np.float32),
        rng.uniform(0.5, 4, S).astype(np.float32),
        rng.normal(0, 3, (T, D)).astype(np.float32),
        rng.uniform(0.5, 4, T).astype(np.float32),
    )
    shape = ModelConfig(features=F, activation=activation, k=K, slots=None if activation == "topk" else 11)
    clt = CLT(wiring, shape, scales, jax.random.key(seed))
    for weight in [clt.W_enc, clt.b_enc, clt.b_dec, *clt.W_dec.values()]:
        weight[...] = rng.normal(size=weight[...].shape).astype(np.float32)
    clt.cut[...] = rng.uniform(5, 40, S).astype(np.float32)
    if activation == "jumprelu":
        clt.log_threshold[...] = rng.normal(size=(S, F)).astype(np.float32)
    names = ["W_enc", "b_enc", "b_dec", "cut", *CONSTANTS] + ["log_threshold"] * (activation == "jumprelu")
    weights: dict[str, Any] = {name: np.asarray(getattr(clt, name)[...], np.float64) for name in names}
    weights["W_dec"] = {source: np.asarray(W[...], np.float64) for source, W in clt.W_dec.items()}
    return clt, wiring, weights, rng.normal(0, 3, (B, S, D)).astype(np.float32)


def reference(w, wiring, x, activation="topk"):
    """codes [S, B, F] and y_hat (normalised and raw) by the definition, in float64."""
    normal = (x.astype(np.float64) - w["in_mean"]) / w["in_std"][:, None]
    tau = w["cut"] if activation in ("topk_joint", "batchtopk") else None
    rule = dense.Rule(activation, (K,) * len(wiring.sources), 11, tau=tau)
    codes = dense.encode(w, normal, rule, wiring).codes
    y_hat = dense.decode_codes(w["W_dec"], w["b_dec"], codes, wiring)
    return codes, y_hat, y_hat * w["out_std"][:, None] + w["out_mean"]


def as_codes(values, indices):
    """values, indices [S, B, C] -> [S, B, F]."""
    codes = np.zeros((*values.shape[:2], F))
    np.put_along_axis(codes, np.asarray(indices), np.asarray(values), -1)
    return codes


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def equals_reference(clt, x, expected):
    codes, normalised, raw = expected
    values, indices, y_hat, y = forward(clt, x)
    found = as_codes(values, indices)
    assert ((found > 0) == (codes > 0)).all()
    close(found, codes)
    if normalised is not None:
        close(y_hat, normalised)
    close(y, raw)


@nnx.jit
def forward(clt, x):
    """values, indices, normalised predictions of them, and raw predictions."""
    values, indices = clt.encode(x)
    return values, indices, clt.decode(values, indices), clt(x)


@pytest.mark.parametrize("layers, offset, n_targets", [("0", 1, 16), ("2", 0, 1), ("all", 1, 3), ("0,2-3", 0, 16)])
def test_forward_equals_float64_numpy(layers, offset, n_targets):
    clt, wiring, weights, x = model(layers, offset, n_targets)
    equals_reference(clt, x, reference(weights, wiring, x))


@pytest.mark.parametrize("activation", RULES[1:])
def test_forward_of_every_rule_once_training_is_over(activation):
    """topk_joint and batchtopk with one cut for each source; more features are above it than there are slots for."""
    clt, wiring, weights, x = model("0,2-3", 0, 16, activation=activation)
    expected = reference(weights, wiring, x, activation)
    many = (expected[0] > 0).sum(-1)
    assert many.max() == 11 and (activation == "relu" or many.min() < 11)
    equals_reference(clt, x, expected)


def test_normalisation_folds_into_the_weights():
    """A CLT on raw activations, made by folding, gives the same values and predictions: what an export does."""
    clt, wiring, w, x = model()
    W_enc = w["W_enc"] / w["in_std"][:, None, None]
    out_std = {str(s): w["out_std"][window] for s, window in zip(wiring.sources, wiring.windows, strict=True)}
    folded: dict[str, Any] = {
        "W_enc": W_enc,
        "b_enc": w["b_enc"] - np.einsum("sd,sfd->sf", w["in_mean"], W_enc),
        "W_dec": {source: W * out_std[source][:, None] for source, W in w["W_dec"].items()},
        "b_dec": w["b_dec"] * w["out_std"][:, None] + w["out_mean"],
        "in_mean": np.zeros_like(w["in_mean"]),
        "in_std": np.ones_like(w["in_std"]),
        "out_mean": np.zeros_like(w["out_mean"]),
        "out_std": np.ones_like(w["out_std"]),
    }
    codes, _, raw = reference(folded, wiring, x)
    equals_reference(clt, x, (codes, None, raw))


def test_a_new_model_predicts_the_mean():
    _, wiring, weights, x = model()
    scales = Normalisation(*(np.asarray(weights[name], np.float32) for name in CONSTANTS))
    fresh = CLT(wiring, ModelConfig(features=F, activation="jumprelu", k=K), scales, jax.random.key(3), threshold=1e9)
    expected = np.broadcast_to(weights["out_mean"], (B, *weights["out_mean"].shape))
    np.testing.assert_array_equal(forward(fresh, x)[-1], expected.astype(np.float32))
    np.testing.assert_allclose(fresh.thresholds(), 1e9, rtol=1e-5)
    assert not np.any(fresh.b_enc[...]) and not np.any(fresh.b_dec[...]) and not np.any(fresh.cut[...])

    def uniform(weight, bound):
        assert -bound <= weight.min() < -0.9 * bound and 0.9 * bound < weight.max() <= bound

    uniform(fresh.W_enc[...], 1 / np.sqrt(F))
    for source in wiring.sources:
        W, targets = fresh.W_dec[str(source)][...], len(wiring.targets_of(source))
        assert W.shape == (F, targets, D)
        uniform(W, 1 / np.sqrt(targets * D))
    heads = [np.asarray(W[...]).ravel() for W in fresh.W_dec.values()]
    assert len({float(head[0]) * np.sqrt(head.size) for head in heads}) == len(heads)  # each from its own key


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_only_weights_are_trained(activation):
    clt, wiring, *_ = model(activation=activation)
    _, parameters, rest = nnx.split(clt, nnx.Param, ...)
    thresholds = {"log_threshold"} if activation == "jumprelu" else set()
    assert set(parameters) == {"W_enc", "b_enc", "W_dec", "b_dec"} | thresholds
    assert set(parameters["W_dec"]) == set(map(str, wiring.sources))
    assert set(rest) == {*CONSTANTS, "cut"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_candidates_break_ties_by_lowest_index(seed, slots):
    rank = np.random.default_rng(seed).integers(-2, 3, (2, 3, 7)).astype(np.float32)  # many equal values
    found = candidates(rank, slots)  # pyright: ignore[reportArgumentType]
    order = np.argsort(-rank, axis=-1, kind="stable")[..., :slots]
    assert (np.asarray(found.indices) == order).all()
    assert (np.asarray(found.rank) == np.take_along_axis(rank, order, -1)).all()


def test_wiring_of_windows():
    assert wire("0", 6, 1, 16).pairs == ((0, 1), (0, 2), (0, 3), (0, 4), (0, 5))
    every = wire("all", 4, 1, 2)
    assert every.sources == (0, 1, 2) and every.targets == (1, 2, 3)  # the last layer has nothing to write to
    assert every.pairs == ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
    assert every.targets_of(0) == (1, 2) and every.name == "L0-2"
    assert every.windows == (slice(0, 2), slice(1, 3), slice(2, 3))
    assert wire("0,2-3", 5, 0, 1).name == "L0,2-3"
    assert wire("0,3", 5, 0, 1).windows == (slice(0, 1), slice(1, 2))


@pytest.mark.parametrize(
    "offset, n_targets, message",
    [(-1, 16, "--offset -1 must be 0 or above"), (1, 0, "--n-targets 0 must be 1 or above")],
)
def test_windows_that_are_none(offset: int, n_targets: int, message: str):
    with pytest.raises(UserError, match=f"^{message}$"):
        wire("0", 4, offset, n_targets)


@pytest.mark.parametrize("layers, offset", [("3", 1), ("0-3", 1), ("4", 0), ("all", 4)])
def test_sources_without_a_target_are_refused(layers, offset):
    with pytest.raises(UserError, match=r"layer"):
        wire(layers, 4, offset, 16)
