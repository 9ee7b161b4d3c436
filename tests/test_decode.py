"""Sparse decoding and picking against their dense twins: the value and every gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cltjax.decode
import dense
from cltjax.decode import decode
from cltjax.encode import pick, pre_activations
from cltjax.wiring import wire

B, D, F, K = 13, 7, 29, 5
decode_source: Any = cltjax.decode.decode_source  # whose decorator hides its type


def arguments(wiring, seed=0):
    rng = np.random.default_rng(seed)
    S, T = len(wiring.sources), len(wiring.targets)
    indices = np.stack([[rng.permutation(F)[:K] for _ in range(B)] for _ in range(S)]).astype(np.int32)
    values = np.maximum(rng.normal(size=(S, B, K)), 0).astype(np.float32)
    W_dec = {str(s): rng.normal(size=(F, len(wiring.targets_of(s)), D)).astype(np.float32) for s in wiring.sources}
    y = rng.normal(size=(B, T, D)).astype(np.float32)
    return [jax.tree.map(jnp.asarray, array) for array in (W_dec, values, indices, y)]


def close(a, b):
    """The project's measure: max|a-b| <= 1e-5 max|b|."""
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(np.asarray(b)).max()


def twin_decode(W_dec, values, indices, wiring):
    return dense.decode(W_dec, np.zeros((len(wiring.targets), D), np.float32), values, indices, wiring)


@pytest.mark.parametrize("layers, offset, n_targets", [("0", 1, 16), ("all", 0, 16), ("all", 1, 2), ("0,3", 0, 3)])
def test_decode_and_gradients_equal_the_dense_twin(layers, offset, n_targets):
    wiring = wire(layers, 5, offset, n_targets)
    W_dec, values, indices, y = arguments(wiring)

    def loss(decoder, W_dec, values):
        y_hat = decoder(W_dec, values, indices, wiring)
        return jnp.sum((y_hat - y) ** 2), y_hat

    of = jax.jit(jax.value_and_grad(loss, (1, 2), has_aux=True), static_argnums=0)
    (_, sparse), sparse_gradients = of(decode, W_dec, values)
    (_, twin), twin_gradients = of(twin_decode, W_dec, values)
    close(sparse, twin)
    jax.tree.map(close, sparse_gradients, twin_gradients)


def test_one_feature_chosen_twice_adds_up():
    W_dec = jnp.arange(6.0).reshape(3, 1, 2)
    values, indices = jnp.array([[2.0, 3.0]]), jnp.array([[1, 1]])
    assert jnp.asarray(decode_source(W_dec, values, indices)).tolist() == [[[10.0, 15.0]]]
    gradient = jax.grad(lambda W: jnp.sum(jnp.asarray(decode_source(W, values, indices))))(W_dec)
    assert gradient[:, 0].tolist() == [[0, 0], [5, 5], [0, 0]]


def test_an_index_past_the_end_is_no_feature():
    """It adds nothing, to the prediction or to a gradient: another device has that feature."""
    W_dec, values, indices = jnp.ones((3, 1, 2)), jnp.array([[2.0, 0.0]]), jnp.array([[1, 3]])
    assert jnp.asarray(decode_source(W_dec, values, indices)).tolist() == [[[2.0, 2.0]]]
    gradient = jax.grad(lambda W: jnp.sum(jnp.asarray(decode_source(W, values, indices))))(W_dec)
    assert gradient[:, 0].tolist() == [[0, 0], [2, 2], [0, 0]]
    W_enc, x = jnp.ones((1, 3, 2)), jnp.ones((1, 1, 2))
    pre = pre_activations(W_enc, jnp.zeros((1, 3)), x)
    picked, back = jax.vjp(lambda W, b: pick(W, b, x, pre, indices[None]), W_enc, jnp.zeros((1, 3)))
    assert picked.tolist() == [[[2.0, 0.0]]]
    to_W, to_b = back(jnp.ones((1, 1, 2)))
    assert to_W[0].tolist() == [[0, 0], [1, 1], [0, 0]] and to_b[0].tolist() == [0, 1, 0]


def test_picking_has_the_gradient_of_the_dense_encoder():
    wiring = wire("0-1", 3, 0, 16)
    _, weights, indices, _ = arguments(wiring)
    rng = np.random.default_rng(1)
    W_enc, b_enc, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, F, D), (2, F), (B, 2, D)))

    def sparse(W_enc, b_enc):
        pre = jax.lax.stop_gradient(pre_activations(W_enc, b_enc, x))
        return jnp.sum(weights * pick(W_enc, b_enc, x, pre, indices) ** 2)

    def twin(W_enc, b_enc):
        pre = jnp.einsum("bsd,sfd->sbf", x, W_enc) + b_enc[:, None]
        return jnp.sum(weights * jnp.take_along_axis(pre, indices, -1) ** 2)

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(W_enc, b_enc) for f in (sparse, twin))
    jax.tree.map(close, found, expected)


def test_no_dense_code_is_made():
    """Nothing of the size [B, F] or [B, K, D] appears in the program, forward or backward."""
    wiring = wire("0", 3, 1, 16)
    W_dec, values, indices, y = arguments(wiring)
    gradient = jax.grad(lambda W, v: jnp.sum((decode(W, v, indices, wiring) - y) ** 2), (0, 1))
    text = str(jax.make_jaxpr(gradient)(W_dec, values))
    assert f"{F},2,{D}]" in text  # W_dec
    for absent in (f"{B},{F}]", f"{F},{B}]", f"{B},{K},{D}]", f"{B},{K},2,{D}]", f"{K},{B},2,{D}]"):
        assert absent not in text
