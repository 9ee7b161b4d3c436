"""The dense reference against itself: finite differences, limits in which two rules agree, and sums done by hand."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dense
from cltjax.config import ModelConfig, SparsityConfig, TrainConfig
from cltjax.wiring import Wiring, wire
from dense import Given, Rule

B, D, F, K, LAYERS, STEP = 17, 11, 31, 5, 5, 7
RULES = ("topk", "topk_joint", "batchtopk", "jumprelu", "relu")
ALIVE = 0  # tokens of silence of a feature that is alive, and of one that is dead
DEAD = 10**6


def settings(activation: str, k: Any = K, slots: int | None = None, **sparsity: Any) -> TrainConfig:
    return TrainConfig(
        "all",
        n_targets=3,
        steps=100,
        model=ModelConfig(F, k, activation, slots),  # pyright: ignore[reportArgumentType]
        sparsity=SparsityConfig(**{"anneal": 0.0, "ramp": 0.0, **sparsity}),
    )


def case(activation: str = "relu", layers: str = "all", seed: int = 0, tokens: int = B) -> tuple[Any, ...]:
    """Random parameters, tokens, silent (a third is dead) and the wiring."""
    wiring = wire(layers, LAYERS, 1, 3)
    rng = np.random.default_rng(seed)
    S, T = len(wiring.sources), len(wiring.targets)
    parameters = {
        "W_enc": rng.normal(size=(S, F, D)) / np.sqrt(D),
        "b_enc": rng.normal(size=(S, F)) / 3,
        "W_dec": {str(s): rng.normal(size=(F, len(wiring.targets_of(s)), D)) / 5 for s in wiring.sources},
        "b_dec": rng.normal(size=(T, D)),
    }
    if activation == "jumprelu":
        parameters["log_threshold"] = np.log(rng.uniform(0.2, 0.9, (S, F)))
    silent = np.where(rng.random((S, F)) < 1 / 3, DEAD, ALIVE).astype(np.int32)
    return parameters, rng.normal(size=(tokens, S, D)), rng.normal(size=(tokens, T, D)), silent, wiring


def norms(parameters: dict[str, Any], wiring: Wiring) -> np.ndarray:
    return np.stack([np.linalg.norm(parameters["W_dec"][str(s)].reshape(F, -1), axis=1) for s in wiring.sources])


def preactivations(parameters: dict[str, Any], x: np.ndarray) -> np.ndarray:
    return np.stack(
        [x[:, s] @ W.T + b for s, (W, b) in enumerate(zip(parameters["W_enc"], parameters["b_enc"], strict=True))]
    )


def difference(config: TrainConfig, of: tuple[Any, ...], moved: dict[str, Any], size: float = 1e-6) -> float:
    """The loss's central difference along `moved`, which has some of the parameters' names."""
    parameters, x, y, silent, wiring = of

    def at(distance: float) -> float:
        shifted = {n: jax.tree.map(lambda p, v: p + distance * v, parameters[n], v) for n, v in moved.items()}
        return dense.loss(parameters | shifted, x, y, silent, STEP, config, wiring)[0]

    return (at(size) - at(-size)) / (2 * size)


def along(gradients: dict[str, Any], moved: dict[str, Any]) -> float:
    return sum(
        float(np.sum(g * v))
        for name in moved
        for g, v in zip(jax.tree.leaves(gradients[name]), jax.tree.leaves(moved[name]), strict=True)
    )


def directions(parameters: dict[str, Any], names: tuple[str, ...], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {n: jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), parameters[n]) for n in names}


def gradients_of(term: str, config: TrainConfig, of: tuple[Any, ...]) -> dict[str, Any]:
    """The gradients of one term of the loss: those with its weight at 1, minus those with it at 0."""
    parameters, x, y, silent, wiring = of
    on, off = (
        dense.loss_and_gradients(
            parameters, x, y, silent, STEP, replace(config, sparsity=replace(config.sparsity, **{term: weight})), wiring
        )[2]
        for weight in (1.0, 0.0)
    )
    return jax.tree.map(np.subtract, on, off)


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("activation", RULES)
def test_gradients_are_finite_differences(activation):
    """Reconstruction under weights, and the penalty on its way up; a threshold's gradient is a matter of its own."""
    of = parameters, x, y, silent, wiring = case(activation)
    config = replace(settings(activation, penalty=3.0, ramp=0.5), target_weights=(0.5, 2.0, 1.0, 3.0))
    *_, gradients = dense.loss_and_gradients(parameters, x, y, silent, STEP, config, wiring)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        moved = directions(parameters, (name,), seed=1)
        np.testing.assert_allclose(along(gradients, moved), difference(config, of, moved), rtol=1e-6)
    assert all(g.dtype == np.float64 for g in jax.tree.leaves(gradients))
    assert jax.tree.structure(gradients) == jax.tree.structure(parameters)


@pytest.mark.parametrize("activation", RULES)
def test_revival_pushes_dead_features_only(activation):
    """Their h, and jumprelu's thresholds."""
    of = parameters, x, y, silent, wiring = case(activation)
    config = settings(activation, penalty=0.0, revive=0.7)
    _, parts, gradients = dense.loss_and_gradients(parameters, x, y, silent, STEP, config, wiring)
    alone = gradients_of("revive", config, of)
    # By hand: how far each dead feature is from being kept, and the slope of that in h.
    h, N = preactivations(parameters, x), norms(parameters, wiring)[:, None]
    if activation in ("relu", "jumprelu"):
        theta = np.exp(parameters["log_threshold"])[:, None] if activation == "jumprelu" else 0
        short, slope = N * (theta - h), -N
    elif activation == "topk":
        short, slope = np.sort(h)[..., [-K]] - h, -np.ones_like(N)
    else:
        short, slope = parts["cut"][..., None] - h * N, -N
    pushed = (short > 1e-12) & (silent == DEAD)[:, None]
    losses = ((y - parts["y_hat"]) ** 2).sum((1, 2))
    part = (losses / losses.sum())[:, None]
    assert losses.max() > 1.5 * losses.min()
    np.testing.assert_allclose(parts["revive"], np.where(pushed, short * part, 0).sum(), rtol=1e-12)
    to_h = np.where(pushed, slope * part, 0)
    np.testing.assert_allclose(alone["b_enc"], to_h.sum(1), atol=1e-12)
    np.testing.assert_allclose(alone["W_enc"], np.einsum("sbf,bsd->sfd", to_h, x), atol=1e-12)
    if activation == "jumprelu":
        np.testing.assert_allclose(alone["log_threshold"], -(to_h * theta).sum(1), atol=1e-12)
        assert np.abs(alone["log_threshold"][silent == DEAD]).max() > 0.01
    others = {name: alone[name] for name in alone.keys() - {"W_enc", "b_enc", "log_threshold"}}
    assert all(np.abs(leaf).max() < 1e-14 for leaf in jax.tree.leaves(others))
    assert np.abs(alone["b_enc"][silent == DEAD]).max() > 0.01
    if activation in ("topk", "relu", "jumprelu"):  # with these nothing else moves where dead features are moved
        moved = {"b_enc": np.where((silent == DEAD) & ~(parts["codes"] > 0).any(1), 1.0, 0.0)}
        np.testing.assert_allclose(along(gradients, moved), difference(config, of, moved), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("activation", ["topk", "topk_joint", "batchtopk"])
def test_a_dead_feature_that_is_just_kept_is_not_pushed(activation):
    """At the cut itself the distance is 0, and so is its slope."""
    parameters, x, y, silent, wiring = case(activation, "1", tokens=1)
    config = settings(activation, revive=1.0)
    _, parts, _ = dense.loss_and_gradients(parameters, x, y, silent, STEP, config, wiring)
    rank = parts["h"] * (1 if activation == "topk" else norms(parameters, wiring)[:, None])
    last = np.argsort(-rank[0, 0])[K - 1]
    only = np.where(np.arange(F) == last, DEAD, ALIVE)[None]
    assert dense.loss(parameters, x, y, only, STEP, config, wiring)[1]["revive"] == 0
    alone = gradients_of("revive", config, (parameters, x, y, only, wiring))
    assert np.abs(alone["b_enc"]).max() == 0


def test_auxk_is_the_fit_of_what_is_left():
    """The strongest dead features' fit of a fixed e, by loops; its gradients are that fit's finite differences."""
    n = 3
    of = parameters, x, y, silent, wiring = case("topk")
    config = replace(settings("topk", auxk=1.0, auxk_features=n), target_weights=(0.5, 2.0, 1.0, 3.0))
    parts = dense.loss(parameters, x, y, silent, STEP, config, wiring)[1]
    e = y - parts["y_hat"]

    def fit(moved: dict[str, Any], distance: float = 0.0) -> float:
        p = parameters | {m: jax.tree.map(lambda w, v: w + distance * v, parameters[m], moved[m]) for m in moved}
        h, e_hat = preactivations(p, x), np.zeros_like(e)
        for (s, t), b in itertools.product(wiring.pairs, range(B)):
            for f in [f for f in np.argsort(-h[s, b]) if silent[s, f] == DEAD][:n]:
                e_hat[b, t - 1] += max(h[s, b, f], 0) * p["W_dec"][str(s)][f, t - s - 1]
        return float(np.sum(np.mean((e - e_hat) ** 2, (0, 2)) / np.mean(e**2, (0, 2)) * config.target_weights))

    np.testing.assert_allclose(parts["auxk"], fit({}), rtol=1e-12)
    alone = gradients_of("auxk", config, of)
    for name in ("W_enc", "b_enc", "W_dec"):
        moved = directions(parameters, (name,), seed=1)
        slope = (fit(moved, 1e-6) - fit(moved, -1e-6)) / 2e-6
        assert abs(slope) > 0.01
        np.testing.assert_allclose(along(alone, moved), slope, rtol=1e-6)
    assert np.abs(alone["b_dec"]).max() < 1e-14
    assert np.abs(alone["b_enc"][silent == ALIVE]).max() < 1e-14


def test_auxk_without_dead_features_moves_nothing():
    parameters, x, y, silent, wiring = case("topk")
    config = settings("topk", auxk=1.0)
    _, parts, _ = dense.loss_and_gradients(parameters, x, y, 0 * silent, STEP, config, wiring)
    np.testing.assert_allclose(parts["auxk"], len(wiring.targets))  # each target's error is as large as itself
    alone = gradients_of("auxk", config, (parameters, x, y, 0 * silent, wiring))
    assert all(np.abs(leaf).max() < 1e-14 for leaf in jax.tree.leaves(alone))


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_straight_through_gradient_by_its_formula(penalty):
    """da/dtheta = -theta / w within the window, candidates that stay inactive included; da/dh is 1 above theta."""
    slots, w = 13, 0.7
    parameters, x, y, silent, wiring = case("jumprelu")
    config = settings("jumprelu", slots=slots, bandwidth=w, penalty=penalty)
    _, parts, gradients = dense.loss_and_gradients(parameters, x, y, silent, STEP, config, wiring)
    h, N, theta = preactivations(parameters, x), norms(parameters, wiring)[:, None], np.exp(parameters["log_threshold"])
    above = h - theta[:, None]
    candidate = np.zeros(h.shape, bool)
    np.put_along_axis(candidate, np.argsort(-above, -1)[..., :slots], True, -1)
    codes = np.where(candidate & (above > 0), h, 0)
    np.testing.assert_allclose(parts["codes"], codes, rtol=1e-12)
    to_y = 2 * (parts["y_hat"] - y) / (B * D)
    to_codes = penalty * config.sparsity.scale * N / np.cosh(config.sparsity.scale * codes * N) ** 2 / B
    for s, t in wiring.pairs:
        to_codes[s] += to_y[:, t - 1] @ parameters["W_dec"][str(s)][:, t - s - 1].T
    window = candidate & (np.abs(above) < w / 2)
    assert (window & (above < 0)).any() and (window & (above > 0)).any()
    assert ((np.abs(above) < w / 2) & ~candidate).any()
    to_theta = np.sum(to_codes * window, 1) * -theta / w
    np.testing.assert_allclose(gradients["log_threshold"], to_theta * theta, atol=1e-12)
    np.testing.assert_allclose(gradients["b_enc"], np.sum(to_codes * (codes > 0), 1), atol=1e-12)


# ------------------------------------------------------------------------------------------------- the rules


def chosen_by_norm(parameters: dict[str, Any], x: np.ndarray, wiring: Wiring, k: int) -> np.ndarray:
    """Codes of relu(h) where h N is among the k largest of a token and source."""
    h = preactivations(parameters, x)
    _, indices = dense.topk_numpy(h * norms(parameters, wiring)[:, None], k)
    codes = np.zeros_like(h)
    np.put_along_axis(codes, indices, np.maximum(np.take_along_axis(h, indices, -1), 0), -1)
    return codes


def test_topk_codes():
    parameters, x, y, silent, wiring = case("topk")
    values, indices = dense.topk_numpy(preactivations(parameters, x), 20)
    for ks in (20, (3, 20, 1, 7)):  # 20: some of those kept are below 0
        codes = dense.loss(parameters, x, y, silent, STEP, settings("topk", ks), wiring)[1]["codes"]
        for s, k in enumerate(ks if isinstance(ks, tuple) else (ks,) * 4):
            expected = np.zeros((B, F))
            np.put_along_axis(expected, indices[s, :, :k], values[s, :, :k], -1)
            np.testing.assert_allclose(codes[s], expected, rtol=1e-12)


def test_topk_ties_go_to_the_lowest_index():
    parameters, x, y, silent, wiring = case("topk")
    parameters |= {"W_enc": 0 * parameters["W_enc"], "b_enc": 0 * parameters["b_enc"] + np.arange(F) % 2 + 1}  # 1 and 2
    codes = dense.loss(parameters, x, y, silent, STEP, settings("topk"), wiring)[1]["codes"]
    assert (codes == np.where(np.arange(F) < 2 * K, np.arange(F) % 2, 0) * 2).all()
    codes = dense.loss(parameters, x, y, silent, STEP, settings("relu", slots=7), wiring)[1]["codes"]
    assert (codes == np.where(np.arange(F) < 14, np.arange(F) % 2, 0) * 2).all()


def test_topk_joint_of_one_source_is_topk_by_norm():
    parameters, x, y, silent, wiring = case("topk_joint", "1")
    codes = dense.loss(parameters, x, y, silent, STEP, settings("topk_joint"), wiring)[1]["codes"]
    np.testing.assert_allclose(codes, chosen_by_norm(parameters, x, wiring, K), rtol=1e-12)


def test_batchtopk_of_one_token_is_topk_by_norm():
    parameters, x, y, silent, wiring = case("batchtopk", tokens=1)
    codes = dense.loss(parameters, x, y, silent, STEP, settings("batchtopk"), wiring)[1]["codes"]
    np.testing.assert_allclose(codes, chosen_by_norm(parameters, x, wiring, K), rtol=1e-12)


def test_jumprelu_at_threshold_0_is_relu():
    parameters, x, y, silent, wiring = case("relu")
    low = parameters | {"log_threshold": np.full((4, F), -40.0)}
    rest = (x, y, silent, STEP)
    total, parts, gradients = dense.loss_and_gradients(parameters, *rest, settings("relu", penalty=0.0), wiring)
    jump, jump_parts, jump_gradients = dense.loss_and_gradients(low, *rest, settings("jumprelu", penalty=0.0), wiring)
    assert np.abs(jump_gradients.pop("log_threshold")).max() < 1e-30
    np.testing.assert_allclose(jump_parts["codes"], parts["codes"], rtol=1e-12)
    np.testing.assert_allclose(jump, total, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), jump_gradients, gradients)


@pytest.mark.parametrize("activation", ["topk_joint", "batchtopk", "jumprelu", "relu"])
def test_slots_matter_only_where_more_are_active(activation):
    parameters, x, y, silent, wiring = case(activation)
    parameters["b_enc"] -= 1.5
    config = settings(activation, k=2, slots=F, penalty=0.3, revive=0.5, auxk=0.5)
    rest = (x, y, silent, STEP)
    total, parts, gradients = dense.loss_and_gradients(
        parameters, *rest, replace(config, sparsity=replace(config.sparsity, bandwidth=1e-9)), wiring
    )
    most = int((parts["codes"] > 0).sum(-1).max())
    assert 2 < most < F - 5

    def again(slots: int) -> tuple[Any, ...]:
        fewer = replace(
            config,
            model=replace(config.model, slots=slots),
            sparsity=replace(config.sparsity, bandwidth=1e-9),
        )
        return dense.loss_and_gradients(parameters, *rest, fewer, wiring)

    same_total, same_parts, same_gradients = again(most)
    np.testing.assert_array_equal(same_parts["codes"], parts["codes"])
    np.testing.assert_allclose(same_total, total, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), same_gradients, gradients)
    cut_codes = again(most - 1)[1]["codes"]
    assert (cut_codes > 0).sum(-1).max() == most - 1


@pytest.mark.parametrize("ks", [K, (2, 7, 5, 3)])
def test_as_many_are_active_as_k_says(ks):
    parameters, x, y, silent, wiring = case()
    parameters["b_enc"] += 5  # everything is positive
    by_source = ks if isinstance(ks, tuple) else (ks,) * 4
    active = dense.loss(parameters, x, y, silent, STEP, settings("topk_joint", ks), wiring)[1]["codes"] > 0
    assert (active.sum((0, 2)) == sum(by_source)).all() and len(np.unique(active.sum(2))) > 2
    active = dense.loss(parameters, x, y, silent, STEP, settings("batchtopk", ks), wiring)[1]["codes"] > 0
    assert (active.sum((1, 2)) == np.array(by_source) * B).all() and len(np.unique(active.sum(2))) > 2


@pytest.mark.parametrize("activation", ["topk_joint", "batchtopk"])
def test_kept_are_the_largest_by_norm(activation):
    """Everything kept outranks everything left out: within a token over sources, or within a source over tokens."""
    parameters, x, y, silent, wiring = case()
    parts = dense.loss(parameters, x, y, silent, STEP, settings(activation, slots=F), wiring)[1]
    rank = preactivations(parameters, x) * norms(parameters, wiring)[:, None]
    kept, axes = parts["codes"] > 0, (0, 2) if activation == "topk_joint" else (1, 2)
    smallest = np.where(kept, rank, np.inf).min(axes)
    assert (smallest > np.where(kept, -np.inf, rank).max(axes)).all()
    cut = parts["cut"][0] if activation == "topk_joint" else parts["cut"][:, 0]
    np.testing.assert_allclose(cut, smallest, rtol=1e-12)


@pytest.mark.parametrize("activation", ["topk", "topk_joint", "batchtopk"])
def test_more_k_than_candidates_keeps_them_all(activation):
    """An annealed k may begin above the slots, and above F."""
    parameters, x, y, silent, wiring = case()
    parameters["b_enc"] += 5
    config = settings(activation, slots=7, k_start=10.0, anneal=1.0)
    codes = dense.loss(parameters, x, y, silent, 0, config, wiring)[1]["codes"]
    assert ((codes > 0).sum(-1) == (F if activation == "topk" else 7)).all()


def test_calibrated_cuts_are_thresholds():
    """Outside training: a feature is active where h > tau / N, whatever else there is."""
    parameters, x, _, _, wiring = case()
    tau, h = np.array([0.3, 0.5, 0.1, 0.7]), preactivations(parameters, x)
    expected = np.where(h >= tau[:, None, None] / norms(parameters, wiring)[:, None], np.maximum(h, 0), 0)
    for activation in ("topk_joint", "batchtopk"):
        codes = dense.encode(parameters, x, Rule(activation, (K,) * 4, F, tau=tau), wiring).codes
        np.testing.assert_allclose(codes, expected, rtol=1e-12)


# ------------------------------------------------------------------------------------ terms, schedules, the batch


def test_forward_and_loss_by_hand():
    """One source, one token, width 1: small enough to do in one's head."""
    wiring = wire("0", 3, 1, 16)
    parameters = {
        "W_enc": np.array([[[1.0], [2.0], [-1.0]]]),
        "b_enc": np.array([[0.5, -1.0, 0.0]]),
        "W_dec": {"0": np.array([[[3.0], [4.0]], [[0.6], [0.8]], [[5.0], [12.0]]])},
        "b_dec": np.array([[1.0], [2.0]]),
    }
    x, y, silent = np.array([[[2.0]]]), np.array([[[7.0], [11.0]]]), np.array([[ALIVE, ALIVE, DEAD]])
    config = replace(settings("relu", k=1, penalty=0.1, revive=0.01, dead_after=5), target_weights=(1.0, 10.0))
    # h = 2.5, 3, -2; y_hat = 1 + 7.5 + 1.8, 2 + 10 + 2.4; norms 5, 1, 13
    total, parts = dense.loss(parameters, x, y, silent, 0, config, wiring)
    np.testing.assert_allclose(parts["y_hat"].ravel(), [10.3, 14.4])
    np.testing.assert_allclose(parts["reconstruction"], [3.3**2, 3.4**2])
    np.testing.assert_allclose([parts["penalty"], parts["revive"]], [2.5 * 5 + 3, 13 * 2])
    np.testing.assert_allclose(total, 3.3**2 + 10 * 3.4**2 + 0.1 * 15.5 + 0.01 * 26)
    topk = dense.loss(parameters, x, y, silent, 0, settings("topk", k=1), wiring)[1]
    np.testing.assert_allclose(topk["codes"], [[[0, 3, 0]]])
    batchtopk = dense.loss(parameters, x, y, silent, 0, settings("batchtopk", k=1, slots=3), wiring)[1]
    np.testing.assert_allclose(batchtopk["codes"], [[[2.5, 0, 0]]])  # 2.5 * 5 > 3 * 1
    low = parameters | {"log_threshold": np.log([[2.5001, 2.9999, 1.0]])}
    jumprelu = dense.loss(low, x, y, silent, 0, settings("jumprelu", scale=0.25), wiring)[1]
    np.testing.assert_allclose(jumprelu["codes"], [[[0, 3, 0]]])
    np.testing.assert_allclose([jumprelu["penalty"], jumprelu["revive"]], [np.tanh(0.75), 13 * 3])


def test_k_comes_down_and_the_penalty_rises():
    config = settings("topk", (4, 10), k_start=3.0, anneal=0.2, ramp=0.4, penalty=0.5)  # 20 and 40 of 100 steps
    assert [dense.k_at(step, config, 2) for step in (0, 5, 13, 19, 20, 99)] == [
        (12, 30),
        (10, 25),
        (7, 17),
        (4, 11),
        (4, 10),
        (4, 10),
    ]
    np.testing.assert_allclose([dense.penalty_at(step, config) for step in (0, 19, 39, 99)], [0.0125, 0.25, 0.5, 0.5])
    at_once = settings("topk", 4, k_start=3.0, anneal=0.0, ramp=0.0, penalty=0.5)
    assert dense.k_at(0, at_once, 3) == (4, 4, 4) and dense.penalty_at(0, at_once) == 0.5
    assert dense.rule_at(0, config, 2).slots == F and dense.rule_at(0, settings("relu", 3), 2).slots == 12
    assert dense.k_at(0, settings("topk", 0.1), 1) == (3,)


def test_who_is_dead():
    config, silent = settings("relu", (4, 10)), np.array([[3100, 3101], [0, 9999]])
    assert dense.dead(silent, config).tolist() == [[False, True], [False, True]]
    assert dense.dead(silent, settings("relu", dead_after=0)).tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("activation", RULES)
def test_the_loss_is_the_mean_over_microbatches(activation):
    """Each of them with its own cuts, and its own scale of auxk."""
    parameters, x, y, silent, wiring = case(activation, tokens=2 * B)
    config = settings(activation, penalty=0.3, revive=0.2, auxk=0.5)
    total, parts, gradients = dense.loss_and_gradients(
        parameters, x, y, silent, STEP, replace(config, microbatches=2), wiring
    )
    halves = [
        dense.loss_and_gradients(parameters, x[p], y[p], silent, STEP, config, wiring)
        for p in (slice(B), slice(B, None))
    ]
    np.testing.assert_allclose(total, np.mean([half[0] for half in halves]))
    np.testing.assert_array_equal(parts["codes"], np.concatenate([half[1]["codes"] for half in halves], 1))
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, (b + c) / 2, atol=1e-13),
        gradients,
        *(half[2] for half in halves),
    )
    whole = dense.loss(parameters, x, y, silent, STEP, config, wiring)[1]
    assert (activation == "batchtopk") == bool((whole["codes"] != parts["codes"]).any())
    assert abs(whole["auxk"] - parts["auxk"]) > 1e-6


@pytest.mark.parametrize("activation", RULES)
def test_a_decoder_of_zeros_has_a_gradient(activation):
    parameters, x, y, silent, wiring = case(activation)
    parameters["W_dec"]["1"][3] = 0
    *_, gradients = dense.loss_and_gradients(parameters, x, y, silent, STEP, settings(activation), wiring)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_given_predictions_are_subtracted():
    """Given runs of other layers and another rule; targets that they do not write to stay as they are."""
    parameters, x, y, silent, wiring = case("topk", "2-3")
    config = settings("topk", auxk=0.5, revive=0.1)
    first, first_x, _, _, first_wiring = case("topk", "0-1", seed=1)
    second, _, _, _, second_wiring = case("batchtopk", "2-3", seed=2)
    given = [
        Given(first, first_wiring, Rule("topk", (3, 4), F), first_x),
        (second, second_wiring, Rule("batchtopk", (K, K), F, tau=np.array([0.3, 0.5]))),
    ]
    rest = (silent, STEP, config, wiring)
    total, parts, gradients = dense.loss_and_gradients(parameters, x, y, *rest, given)
    predicted = np.zeros_like(y)
    for one, x_one in zip(given, (first_x, x), strict=True):
        h, (weights, drawn, rule) = preactivations(one[0], x_one), one[:3]
        keys = h if rule.tau is None else h * norms(weights, drawn)[:, None]
        for s, source in enumerate(drawn.sources):
            cut = np.sort(keys[s])[:, [-rule.k[s]]] if rule.tau is None else rule.tau[s]
            code = np.where(keys[s] >= cut, np.maximum(h[s], 0), 0)
            for slot, target in enumerate(drawn.targets_of(source)):
                if target in wiring.targets:
                    predicted[:, wiring.targets.index(target)] += code @ weights["W_dec"][str(source)][:, slot]
        for t, target in enumerate(drawn.targets):
            if target in wiring.targets:
                predicted[:, wiring.targets.index(target)] += weights["b_dec"][t]
    assert first_wiring.targets == (1, 2, 3, 4) and wiring.targets == (3, 4)
    left, left_parts, left_gradients = dense.loss_and_gradients(parameters, x, y - predicted, *rest)
    np.testing.assert_allclose(total, left)
    np.testing.assert_allclose(parts["y_hat"], left_parts["y_hat"] + predicted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), gradients, left_gradients)


def test_decode_adds_up_and_skips_what_does_not_exist():
    wiring = wire("0,2", LAYERS, 1, 2)  # targets 1, 2 and 3, 4
    rng = np.random.default_rng(0)
    W_dec = {"0": rng.normal(size=(F, 2, D)).astype(np.float32), "2": rng.normal(size=(F, 2, D)).astype(np.float32)}
    b_dec = rng.normal(size=(4, D)).astype(np.float32)
    values, indices = jnp.ones((2, B, 2)), jnp.full((2, B, 2), 3)
    y_hat = dense.decode(W_dec, b_dec, values, indices, wiring)
    for t, head in enumerate((W_dec["0"][3, 0], W_dec["0"][3, 1], W_dec["2"][3, 0], W_dec["2"][3, 1])):
        np.testing.assert_allclose(y_hat[:, t], np.tile(b_dec[t] + 2 * head, (B, 1)), rtol=1e-5)
