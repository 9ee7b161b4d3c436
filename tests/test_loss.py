"""The terms of the loss by themselves: in raw units, and the schedules. Gradients: tests/test_step.py."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_clt import B, D, forward, model

from cltjax.axes import ALONE
from cltjax.config import ModelConfig, SparsityConfig, TrainConfig
from cltjax.loss import Active, k_at, penalty_weight, revival, squared_errors


def test_loss_in_raw_units():
    """In raw units: squared distance over D times the squared scale, of each token at each target."""
    clt, wiring, weights, x = model()
    y = np.random.default_rng(5).normal(2, 3, (B, len(wiring.targets), D)).astype(np.float32)
    *_, normal, raw = forward(clt, x)
    found = squared_errors(normal, clt.normalise_targets(y))
    expected = np.sum((y - np.asarray(raw, np.float64)) ** 2, -1) / (D * weights["out_std"] ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("anneal, k_start", [(0.5, 4.0), (0.3, 2.7), (0.0, 4.0), (0.5, 1.0), (1.0, 20.0)])
def test_k_comes_down_as_in_the_reference(anneal, k_start):
    config = TrainConfig(
        "0-1",
        steps=20,
        model=ModelConfig(features=31, k=(3, 5)),
        sparsity=SparsityConfig(k_start=k_start, anneal=anneal),
    )
    for step in (0, 1, 5, 9, 10, 11, 19):
        found = k_at((3, 5), 31, config.sparsity, config.steps, np.int32(step))  # type: ignore[arg-type]
        assert tuple(found.tolist()) == dense.k_at(step, config, 2)


@pytest.mark.parametrize("ramp", [1.0, 0.25, 0.0])
def test_the_penalty_rises_as_in_the_reference(ramp):
    config = TrainConfig("0", steps=20, sparsity=SparsityConfig(penalty=0.3, ramp=ramp))
    for step in (0, 3, 4, 5, 19):
        found = penalty_weight(config.sparsity, config.steps, np.int32(step))  # type: ignore[arg-type]
        assert float(found) == pytest.approx(dense.penalty_at(step, config), rel=1e-6)


def test_the_feature_at_the_cut_is_not_short_of_it():
    """Not even by the rounding of a product that the compiler fuses with a subtraction."""
    clt, *_, x = model(activation="topk_joint")
    pre = clt.pre_activations(clt.normalise_inputs(x))
    rank = clt.rank(pre)
    S, _, F = pre.shape
    none = jnp.zeros((S, B, 1))

    @nnx.jit
    def pushed(clt, pre, rank, cut, dead):
        def cost(pre):
            return revival(clt, Active(none, none.astype(int), pre, rank, cut), dead, ALONE)

        return jax.value_and_grad(cost)(pre)

    for feature in range(7):
        dead = jnp.zeros((S, F), bool).at[:, feature].set(True)
        cost, gradient = pushed(clt, pre, rank, rank[..., feature, None], dead)
        assert float(cost) == 0 and not np.any(gradient)
        cost, gradient = pushed(clt, pre, rank, rank[..., feature, None] + 1, dead)
        assert float(cost) == pytest.approx(S * B, rel=1e-4) and np.all(gradient[..., feature] < 0)
