"""The terms of the loss by themselves: in raw units, and the schedules. Gradients: tests/test_step.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dense
from cltjax.axes import ALONE
from cltjax.config import FEW_DEAD, PENALISED, ModelConfig, SparsityConfig, TrainConfig
from cltjax.loss import Active, activate, k_at, penalty_weight, revival, squared_errors
from test_clt import RULES, B, D, forward, model


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
        found = penalty_weight(0.3, ramp, config.steps, np.int32(step))  # type: ignore[arg-type]
        assert float(found) == pytest.approx(dense.penalty_at(step, config), rel=1e-6)


def test_the_feature_at_the_cut_is_not_short_of_it():
    """Not even by the rounding of a product that is computed twice. One feature is dead, or more than are few."""
    clt, *_, x = model(activation="topk_joint")
    normal = clt.normalise_inputs(x)
    pre = clt.pre_activations(normal)
    rank = clt.rank(pre)
    S, _, F = pre.shape
    none = jnp.zeros((S, B, 1))

    @nnx.jit
    def pushed(clt, rank, cut, dead):
        def cost(clt):
            return revival(
                clt, normal, Active(none, none.astype(int), pre, rank, cut, full=none), dead, jnp.ones(B), ALONE
            )

        return nnx.value_and_grad(cost)(clt)

    for feature in range(7):
        dead = jnp.zeros((S, F), bool).at[:, feature].set(True)
        for others in (0, F):  # which lie above every cut
            low = rank.at[..., feature + 1 :].set(jnp.inf)
            either = dead | (jnp.arange(F) > feature) & (others > 0)
            cost, gradients = pushed(clt, low, rank[..., feature, None], either)
            assert float(cost) == 0 and not np.any(gradients.b_enc[...]) and not np.any(gradients.W_enc[...])
            cost, gradients = pushed(clt, low, rank[..., feature, None] + 1, either)
            expected = -B * np.asarray(clt.decoder_norms())[:, feature]
            assert float(cost) == pytest.approx(S * B, rel=1e-4)
            np.testing.assert_allclose(gradients.b_enc[...][:, feature], expected, rtol=1e-5)
            assert np.count_nonzero(gradients.b_enc[...]) == S


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_few_dead_features_are_pushed_as_many_are(activation: str):
    """The gradients with one dead feature more or less in the short cut add up to those of the long way."""
    clt, *_, x = model(activation=activation)
    normal = clt.normalise_inputs(x)
    pre = clt.pre_activations(normal)
    rank = clt.rank(pre)
    S, _, F = pre.shape
    cut = jnp.zeros((1, 1, 1)) if activation in PENALISED else jnp.median(rank, -1, keepdims=True)
    active = Active(cut, jnp.zeros((S, B, 1), int), pre, rank, cut, full=cut)
    losses = 1.0 + jnp.arange(B)

    @nnx.jit
    def pushed(clt, dead):
        return nnx.value_and_grad(lambda clt: revival(clt, normal, active, dead, losses, ALONE))(clt)

    many = jnp.arange(F) < -(-F // FEW_DEAD) + 3  # in each source
    found = pushed(clt, jnp.broadcast_to(many, (S, F)))
    one_by_one = [pushed(clt, jnp.zeros((S, F), bool).at[:, feature].set(True)) for feature in np.flatnonzero(many)]
    summed = jax.tree.map(lambda *leaves: sum(leaves), *one_by_one)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    assert float(found[0]) > 0 and np.any(found[1].W_enc[...])


@pytest.mark.parametrize("activation", RULES)
def test_tokens_without_a_slot_left_are_known(activation: str):
    """For all rules but topk, which takes no more than k."""
    clt, *_, x = model(activation=activation)
    normal = clt.normalise_inputs(x)
    ks, F = jnp.array(clt.k), clt.b_enc[...].shape[1]
    full = []
    for slots in (max(clt.k), F):
        active = nnx.jit(activate, static_argnums=(3, 4, 5))(clt, normal, ks, slots, 0.01, ALONE)
        above = np.asarray(active.rank >= active.cut).sum(-1)
        np.testing.assert_array_equal(active.full, (above >= slots) & (activation != "topk"))
        full.append(int(active.full.sum()))
    assert activation == "topk" or full[0] > 0 == full[1]
