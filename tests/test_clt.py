"""The whole forward pass against a float64 numpy reference, on prime sizes."""

import dense
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cltjax.clt import CLT
from cltjax.errors import UserError
from cltjax.normalisation import Normalisation
from cltjax.sparsity import topk
from cltjax.wiring import wire

B, D, F, K, LAYERS = 17, 11, 31, 5, 5


def model(layers="all", offset=1, n_targets=3, seed=0):
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
    clt = CLT(wiring, F, K, scales, jax.random.key(seed))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        weight = getattr(clt, name)
        weight[...] = rng.normal(size=weight[...].shape).astype(np.float32)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "in_mean", "in_std", "out_mean", "out_std")
    weights = {name: np.asarray(getattr(clt, name)[...], np.float64) for name in names}
    return clt, wiring, weights, rng.normal(0, 3, (B, S, D)).astype(np.float32)


def reference(w, wiring, x):
    """values, indices, y_hat (normalised and raw) by the definition, in float64."""
    normal = (x.astype(np.float64) - w["in_mean"]) / w["in_std"][:, None]
    pre = np.einsum("bsd,sfd->sbf", normal, w["W_enc"]) + w["b_enc"][:, None]
    values, indices = dense.topk_numpy(pre, K)
    code = np.zeros_like(pre)
    np.put_along_axis(code, indices, values, -1)
    y_hat = np.zeros((len(x), len(wiring.targets), D))
    for t, target in enumerate(wiring.targets):
        y_hat[:, t] = w["b_dec"][t]
        for p, (source, written) in enumerate(wiring.pairs):
            if written == target:
                y_hat[:, t] += code[wiring.sources.index(source)] @ w["W_dec"][p]
    return values, indices, y_hat, y_hat * w["out_std"][:, None] + w["out_mean"]


@pytest.mark.parametrize("layers, offset, n_targets", [("0", 1, 16), ("2", 0, 1), ("all", 1, 3), ("0,2-3", 0, 16)])
def test_forward_equals_float64_numpy(layers, offset, n_targets):
    clt, wiring, weights, x = model(layers, offset, n_targets)
    values, indices = clt.encode(x)
    expected_values, expected_indices, normalised, raw = reference(weights, wiring, x)
    assert (np.asarray(indices) == expected_indices).all()
    np.testing.assert_allclose(values, expected_values, rtol=0, atol=1e-5 * expected_values.max())
    y_hat = clt.decode(values, indices)
    np.testing.assert_allclose(y_hat, normalised, rtol=0, atol=1e-5 * np.abs(normalised).max())
    np.testing.assert_allclose(clt(x), raw, rtol=0, atol=1e-5 * np.abs(raw).max())


def test_normalisation_folds_into_the_weights():
    """A CLT on raw activations, made by folding, gives the same values and predictions: what an export does."""
    clt, wiring, w, x = model()
    W_enc = w["W_enc"] / w["in_std"][:, None, None]
    b_enc = w["b_enc"] - np.einsum("sd,sfd->sf", w["in_mean"], W_enc)
    out_std = np.array([w["out_std"][wiring.targets.index(t)] for _, t in wiring.pairs])
    folded = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": w["W_dec"] * out_std[:, None, None],
        "b_dec": w["b_dec"] * w["out_std"][:, None] + w["out_mean"],
        "in_mean": np.zeros_like(w["in_mean"]),
        "in_std": np.ones_like(w["in_std"]),
        "out_mean": np.zeros_like(w["out_mean"]),
        "out_std": np.ones_like(w["out_std"]),
    }
    values, indices, y_hat, _ = reference(folded, wiring, x)
    assert (np.asarray(clt.encode(x)[1]) == indices).all()
    np.testing.assert_allclose(clt.encode(x)[0], values, rtol=0, atol=1e-5 * values.max())
    np.testing.assert_allclose(clt(x), y_hat, rtol=0, atol=1e-5 * np.abs(y_hat).max())


def test_a_new_model_predicts_the_mean():
    clt, _, weights, x = model()
    fresh = CLT(
        clt.wiring,
        F,
        K,
        Normalisation(*(np.asarray(weights[n]) for n in ("in_mean", "in_std", "out_mean", "out_std"))),
        jax.random.key(3),
    )
    expected = np.broadcast_to(weights["out_mean"], (B, *weights["out_mean"].shape))
    np.testing.assert_array_equal(fresh(x), expected.astype(np.float32))
    bound = 1 / np.sqrt(F)
    assert -bound <= fresh.W_enc[...].min() < -0.9 * bound and 0.9 * bound < fresh.W_enc[...].max() <= bound


def test_only_weights_are_trained():
    clt, *_ = model()
    _, parameters, _ = nnx.split(clt, nnx.Param, ...)
    assert set(parameters) == {"W_enc", "b_enc", "W_dec", "b_dec"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_topk_breaks_ties_by_lowest_index(seed, k):
    pre = np.random.default_rng(seed).integers(-2, 3, (3, 7)).astype(np.float32)  # many equal values
    values, indices = topk(pre, k)
    expected_values, expected_indices = dense.topk_numpy(pre, k)
    assert (np.asarray(indices) == expected_indices).all() and (np.asarray(values) == expected_values).all()


def test_wiring_of_windows():
    assert wire("0", 6, 1, 16).pairs == ((0, 1), (0, 2), (0, 3), (0, 4), (0, 5))
    every = wire("all", 4, 1, 2)
    assert every.sources == (0, 1, 2) and every.targets == (1, 2, 3)  # the last layer has nothing to write to
    assert every.pairs == ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
    assert every.targets_of(0) == (1, 2) and every.name == "L0-2"
    assert [every.pairs[s] for s in every.target_slices] == [((0, 1),), ((0, 2), (1, 2)), ((1, 3), (2, 3))]
    assert wire("0,2-3", 5, 0, 1).name == "L0,2-3"


@pytest.mark.parametrize("layers, offset", [("3", 1), ("0-3", 1), ("4", 0), ("all", 4)])
def test_sources_without_a_target_are_refused(layers, offset):
    with pytest.raises(UserError, match=r"layer"):
        wire(layers, 4, offset, 16)
