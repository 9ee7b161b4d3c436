"""Sparse decoding against its dense twin: the value and every gradient."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cltjax.decode import decode, decode_head
from cltjax.wiring import wire

B, D, F, K = 13, 7, 29, 5


def arguments(wiring, seed=0):
    rng = np.random.default_rng(seed)
    S, P, T = len(wiring.sources), len(wiring.pairs), len(wiring.targets)
    indices = np.stack([[rng.permutation(F)[:K] for _ in range(B)] for _ in range(S)]).astype(np.int32)
    values = np.maximum(rng.normal(size=(S, B, K)), 0).astype(np.float32)
    W_dec = rng.normal(size=(P, F, D)).astype(np.float32)
    b_dec = rng.normal(size=(T, D)).astype(np.float32)
    y = rng.normal(size=(B, T, D)).astype(np.float32)
    return [jnp.asarray(array) for array in (W_dec, b_dec, values, indices, y)]


def close(a, b):
    """The project's measure: max|a-b| <= 1e-5 max|b|."""
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("layers, offset, n_targets", [("0", 1, 16), ("all", 0, 16), ("all", 1, 2), ("0,3", 0, 3)])
def test_decode_and_gradients_equal_the_dense_twin(layers, offset, n_targets):
    wiring = wire(layers, 5, offset, n_targets)
    W_dec, b_dec, values, indices, y = arguments(wiring)

    def loss(decoder, W_dec, b_dec, values):
        y_hat = decoder(W_dec, b_dec, values, indices, wiring)
        return jnp.sum((y_hat - y) ** 2), y_hat

    both = [jax.jit(jax.value_and_grad(loss, (1, 2, 3), has_aux=True), static_argnums=0) for _ in range(2)]
    (_, sparse), sparse_gradients = both[0](decode, W_dec, b_dec, values)
    (_, twin), twin_gradients = both[1](dense.decode, W_dec, b_dec, values)
    close(sparse, twin)
    for one, other in zip(sparse_gradients, twin_gradients, strict=True):
        close(one, other)


def test_one_feature_chosen_twice_adds_up():
    W_dec = jnp.arange(6.0).reshape(3, 2)
    values, indices = jnp.array([[2.0, 3.0]]), jnp.array([[1, 1]])
    assert decode_head(W_dec, values, indices).tolist() == [[10.0, 15.0]]
    gradient = jax.grad(lambda W: decode_head(W, values, indices).sum())(W_dec)
    assert gradient.tolist() == [[0, 0], [5, 5], [0, 0]]


def test_no_dense_code_is_made():
    """Nothing of the size [B, F] appears in the program, forward or backward."""
    wiring = wire("0", 3, 1, 16)
    W_dec, b_dec, values, indices, y = arguments(wiring)
    gradient = jax.grad(lambda W, v: jnp.sum((decode(W, b_dec, v, indices, wiring) - y) ** 2), (0, 1))
    text = str(jax.make_jaxpr(gradient)(W_dec, values))
    assert f"[{B},{F}]" not in text and f"{B},{F}]" not in text and f"[{B},{K},{D}]" not in text
