"""The loss is the sum over targets of |y - y_hat|^2 / variance, and its gradient that of the dense twin."""

import dense
import jax
import numpy as np
import pytest
from flax import nnx
from test_clt import B, D, model
from test_decode import close

from cltjax.loss import reconstruction_loss, squared_errors


def test_loss_in_raw_units():
    """In raw units: squared distance over D times the squared scale, summed over targets, averaged over tokens."""
    clt, wiring, weights, x = model()
    y = np.random.default_rng(5).normal(2, 3, (B, len(wiring.targets), D)).astype(np.float32)
    loss = reconstruction_loss(squared_errors(clt.decode(*clt.encode(x)), clt.normalise_targets(y)))
    raw = np.asarray(clt(x), np.float64)
    expected = sum(
        np.mean(np.sum((y[:, t] - raw[:, t]) ** 2, -1)) / (D * weights["out_std"][t] ** 2)
        for t in range(len(wiring.targets))
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_gradients_equal_the_dense_twin():
    clt, wiring, _, x = model()
    y = np.random.default_rng(5).normal(0, 3, (B, len(wiring.targets), D)).astype(np.float32)
    graph, parameters, constants = nnx.split(clt, nnx.Param, ...)

    def loss(parameters, sparse):
        clt = nnx.merge(graph, parameters, constants)
        values, indices = clt.encode(x)
        if sparse:
            y_hat = clt.decode(values, indices)
        else:
            y_hat = dense.decode(clt.W_dec[...], clt.b_dec[...], values, indices, wiring)
        return reconstruction_loss(squared_errors(y_hat, clt.normalise_targets(y)))

    sparse, twin = (nnx.to_pure_dict(jax.grad(loss)(parameters, kind)) for kind in (True, False))
    assert sparse.keys() == twin.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    for name in sparse:
        assert np.abs(twin[name]).max() > 0
        close(sparse[name], twin[name])
