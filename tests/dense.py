"""The dense twins of the sparse code: what the mathematics says, without regard to cost. For tests only.

The whole training loss on dense codes [S, B, F], in numpy float64 with gradients derived by hand
(`loss_and_gradients`), is written from the definitions and not from the code that it judges. Which features are chosen
is a constant to the gradient. Conventions: max(0, x) has slope 0 at 0; ties go to the lowest index; k_s(step) is
Python's round.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cltjax.config import TrainConfig, k_values
from cltjax.wiring import Wiring


class Rule(NamedTuple):
    """Which features are active: at one training step, or (with `tau`) outside training."""

    activation: str
    k: tuple[int, ...]  # [S] at this step; the rules that k does not set leave it aside
    slots: int  # candidates of a token in a source; topk has k instead
    bandwidth: float = 1.0
    tau: np.ndarray | None = None  # [S] calibrated cuts, instead of those that the tokens at hand would give


class Given(NamedTuple):
    """An earlier run that stays as it is."""

    parameters: dict[str, Any]
    wiring: Wiring
    rule: Rule
    x_norm: Any = None  # [B, its S, D], where it does not read the same layers as the run that is trained
    units: Any = None  # [its T] its targets' units in those of the run that is trained, where they differ


class Encoded(NamedTuple):
    """What a rule makes of some tokens."""

    codes: np.ndarray  # [S, B, F]
    h: np.ndarray  # [S, B, F]
    cut: np.ndarray | None  # [S, B] smallest rank that is kept; None for relu and jumprelu
    by_h: np.ndarray  # [S, B, F] each code's derivative by its h
    by_log_threshold: np.ndarray | None  # [S, B, F] and by its log_threshold, straight through


# ---------------------------------------------------------------------------------------------------- the rules


def norms(W_dec: dict[str, np.ndarray], wiring: Wiring) -> np.ndarray:
    """[S, F] Frobenius norm of each feature's decoder, over the targets of its source."""
    return np.stack([np.sqrt(np.sum(W_dec[str(source)] ** 2, (1, 2))) for source in wiring.sources])


def places(rank: np.ndarray) -> np.ndarray:
    """Each feature's place, from 0, when the last axis is put in descending order; ties to the lowest index."""
    return np.argsort(np.argsort(-rank, axis=-1, kind="stable"), axis=-1, kind="stable")


def nth_largest(rank: np.ndarray, n: int) -> np.ndarray:
    """The n-th largest along the last axis, from 1."""
    return np.sort(rank, axis=-1)[..., -n]


def encode(parameters: dict[str, Any], x_norm: np.ndarray, rule: Rule, wiring: Wiring) -> Encoded:
    """Dense codes of `x_norm` [B, S, D] under `rule`."""
    h = np.einsum("bsd,sfd->sbf", x_norm, parameters["W_enc"]) + parameters["b_enc"][:, None]
    S, B, F = h.shape
    if rule.activation == "jumprelu":
        theta = np.exp(parameters["log_threshold"])[:, None]
        candidate = places(h - theta) < rule.slots
        active = candidate & (h > theta)
        window = candidate & (np.abs(h - theta) < rule.bandwidth / 2)
        by_theta = -theta / rule.bandwidth * window
        return Encoded(np.where(active, h, 0), h, None, active * 1.0, by_theta * theta)
    cut = None
    if rule.activation == "relu":
        kept = places(h) < rule.slots
    elif rule.activation == "topk":
        kept = places(h) < np.array(rule.k)[:, None, None]
        cut = np.where(kept, h, np.inf).min(-1)
    else:
        rank = h * norms(parameters["W_dec"], wiring)[:, None]
        ranks = np.where(places(rank) < rule.slots, rank, -np.inf)  # of the candidates
        many = min(rule.slots, F)
        if rule.tau is not None:
            of_source = np.asarray(rule.tau)[:, None]
        elif rule.activation == "topk_joint":
            of_source = nth_largest(ranks.transpose(1, 0, 2).reshape(B, S * F), min(sum(rule.k), S * many))
        else:
            of_source = np.array([[nth_largest(ranks[s].ravel(), min(rule.k[s], many) * B)] for s in range(S)])
        cut = np.broadcast_to(of_source, (S, B))
        kept = ranks >= cut[..., None]
    active = kept & (h > 0)
    return Encoded(np.where(active, h, 0), h, cut, active * 1.0, None)


# ---------------------------------------------------------------------------------------------------- decoding


def by_target(W_dec: dict[str, Any], b_dec: Any, codes: Any, wiring: Wiring) -> list[Any]:
    """y_hat of each target [B, D] from dense codes [S, B, F], of numpy or of jax."""
    found = []
    for t, target in enumerate(wiring.targets):
        total = b_dec[t]
        for s, source in enumerate(wiring.sources):
            if target in wiring.targets_of(source):
                total = total + codes[s] @ W_dec[str(source)][:, wiring.targets_of(source).index(target)]
        found.append(total)
    return found


def decode_codes(W_dec: dict[str, np.ndarray], b_dec: np.ndarray, codes: np.ndarray, wiring: Wiring) -> np.ndarray:
    """y_hat [B, T, D] from dense codes [S, B, F]."""
    return np.stack(by_target(W_dec, b_dec, codes, wiring), axis=1)


def decode(W_dec: dict[str, Any], b_dec: Any, values: Any, indices: Any, wiring: Wiring) -> jax.Array:
    """y_hat [B, T, D] from `values`, `indices` [S, B, K] in jax, through a dense code; equal indices add up."""
    S, B, _ = values.shape
    codes = jnp.zeros((S, B, W_dec[str(wiring.sources[0])].shape[0]), values.dtype)
    codes = codes.at[jnp.arange(S)[:, None, None], jnp.arange(B)[None, :, None], indices].add(values)
    return jnp.stack(by_target(W_dec, b_dec, codes, wiring), axis=1)


def decode_backward(
    to_y: np.ndarray, W_dec: dict[str, np.ndarray], codes: np.ndarray, wiring: Wiring
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The gradients to W_dec and to the codes that follow from the gradient `to_y` [B, T, D]."""
    to_W = {name: np.zeros_like(weight) for name, weight in W_dec.items()}
    to_codes = np.zeros_like(codes)
    for s, source in enumerate(wiring.sources):
        for slot, target in enumerate(wiring.targets_of(source)):
            to_target = to_y[:, wiring.targets.index(target)]
            to_W[str(source)][:, slot] = codes[s].T @ to_target
            to_codes[s] += to_target @ W_dec[str(source)][:, slot].T
    return to_W, to_codes


def given_predictions(given: Sequence[Any], x_norm: np.ndarray, wiring: Wiring) -> np.ndarray | float:
    """The sum [B, T, D] of what the given runs predict of this wiring's targets."""
    total = 0.0
    for one in (Given(*fields) for fields in given):
        parameters = as_float64(one.parameters)
        codes = encode(parameters, x_norm if one.x_norm is None else as_float64(one.x_norm), one.rule, one.wiring).codes
        y_hat = by_target(parameters["W_dec"], parameters["b_dec"], codes, one.wiring)
        units = np.ones(len(y_hat)) if one.units is None else as_float64(one.units)
        found = {target: unit * y for target, unit, y in zip(one.wiring.targets, units, y_hat, strict=True)}
        total = total + np.stack([found.get(target, np.zeros_like(y_hat[0])) for target in wiring.targets], axis=1)
    return total


# ---------------------------------------------------------------------------------------------- schedules, the dead


def source_k(config: TrainConfig, n_sources: int) -> tuple[int, ...]:
    """[S] the final k of each source."""
    ks = k_values(config.model.k, config.model.features)
    return ks * n_sources if len(ks) == 1 else ks


def k_at(step: int, config: TrainConfig, n_sources: int) -> tuple[int, ...]:
    """[S] each source's k while `step` is made, never more than there are features."""
    sparsity, span = config.sparsity, config.sparsity.anneal * config.steps
    left = max(0.0, 1 - step / span) if span > 0 else 0.0
    factor = 1 + (sparsity.k_start - 1) * left
    return tuple(min(config.model.features, round(k * factor)) for k in source_k(config, n_sources))


def penalty_at(step: int, config: TrainConfig) -> float:
    """lambda while `step` is made, where it is given."""
    span = config.sparsity.ramp * config.steps
    return (config.sparsity.penalty or 0.0) * (min(1.0, (step + 1) / span) if span > 0 else 1.0)


def rule_at(step: int, config: TrainConfig, n_sources: int) -> Rule:
    """The rule by which `step` is made."""
    slots = config.model.slots
    if slots is None:
        slots = min(config.model.features, 4 * max(source_k(config, n_sources)))
    return Rule(config.model.activation, k_at(step, config, n_sources), slots, config.sparsity.bandwidth)


def dead(silent: Any, config: TrainConfig) -> np.ndarray:
    """[S, F] features that have been silent for more than `dead_after` tokens."""
    silent, after = np.asarray(silent), config.sparsity.dead_after
    if after is None:
        after = 1000 * config.model.features / max(source_k(config, len(silent)))
    return silent > after


# ---------------------------------------------------------------------------------------------------- the loss


class Result(NamedTuple):
    loss: float
    parts: dict[str, np.ndarray]
    gradients: dict[str, Any]


TOKEN_AXIS = {"codes": 1, "h": 1, "cut": 1, "y_hat": 0}  # of the parts that are by token; of the others, the mean


def loss_and_gradients(
    parameters: dict[str, Any],
    x_norm: Any,
    y_norm: Any,
    silent: Any,
    step: int,
    config: TrainConfig,
    wiring: Wiring,
    given: Sequence[Any] = (),
    penalties: Any = None,
) -> Result:
    """The training loss of a step, its parts, and its gradients in the structure of `parameters`, in float64.

    `parameters`: W_enc [S, F, D], b_enc [S, F], W_dec {"0": [F, T_l, D], ...}, b_dec [T, D], for jumprelu log_threshold
    [S, F]; `x_norm` [B, S, D], `y_norm` [B, T, D], `silent` [S, F]; `given`: `Given`s or (parameters, wiring, rule);
    `penalties`: lambda of each source [S], where it is steered.
    Parts, before any weight: reconstruction [T], penalty, revive, auxk; by token: codes and h [S, B, F], y_hat
    [B, T, D] with the given runs' predictions, and cut [S, B] where k sets the rule.
    A microbatch is B / microbatches neighbouring tokens.
    """
    parameters, x, y = as_float64((parameters, x_norm, y_norm))
    still = np.broadcast_to(given_predictions(given, x, wiring), y.shape)
    is_dead, n, B = dead(silent, config), config.microbatches, len(x)
    weights = np.broadcast_to(penalty_at(step, config) if penalties is None else penalties, len(silent))
    assert B % n == 0, f"{B} tokens in {n} microbatches"
    results = [
        _microbatch(parameters, x[piece], y[piece], still[piece], is_dead, weights, step, config, wiring)
        for piece in (slice(i * B // n, (i + 1) * B // n) for i in range(n))
    ]
    parts = {name: [result.parts[name] for result in results] for name in results[0].parts}
    return Result(
        float(np.mean([result.loss for result in results])),
        {
            name: np.concatenate(found, TOKEN_AXIS[name]) if name in TOKEN_AXIS else np.mean(found, 0)
            for name, found in parts.items()
        },
        jax.tree.map(lambda *found: np.mean(found, 0), *(result.gradients for result in results)),
    )


def loss(*arguments: Any, **keywords: Any) -> tuple[float, dict[str, np.ndarray]]:
    """`loss_and_gradients` without the gradients."""
    result = loss_and_gradients(*arguments, **keywords)
    return result.loss, result.parts


def as_float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _microbatch(
    parameters: dict[str, Any],
    x: np.ndarray,
    y: np.ndarray,
    still: np.ndarray,
    is_dead: np.ndarray,
    penalties: np.ndarray,
    step: int,
    config: TrainConfig,
    wiring: Wiring,
) -> Result:
    """The result of some tokens; `still` [B, T, D] is what the given runs predict of them, `penalties` [S] lambda."""
    sparsity, W_dec, (B, T, D) = config.sparsity, parameters["W_dec"], y.shape
    rule, dead_here = rule_at(step, config, len(wiring.sources)), is_dead[:, None]
    codes, h, cut, by_h, by_log_threshold = encode(parameters, x, rule, wiring)
    N = norms(W_dec, wiring)[:, None]  # [S, 1, F]

    # Reconstruction
    weight = np.array(config.target_weights or (1.0,) * T)
    y_hat = decode_codes(W_dec, parameters["b_dec"], codes, wiring) + still
    e = y - y_hat
    reconstruction = np.mean(e**2, (0, 2))
    to_y_hat = -2 * weight[:, None] * e / (B * D)
    to_W_dec, to_codes = decode_backward(to_y_hat, W_dec, codes, wiring)

    # The penalty on aN, to a and to N; and how far below being kept each feature is (without gradient to N)
    to_aN = np.zeros_like(codes)
    if rule.activation == "jumprelu":
        squashed = np.tanh(sparsity.scale * codes * N)
        penalty, to_aN = squashed.sum((1, 2)) / B, sparsity.scale * (1 - squashed**2) / B
        short, short_by_h = N * (np.exp(parameters["log_threshold"])[:, None] - h), -N
    elif rule.activation == "relu":
        penalty, to_aN = (codes * N).sum((1, 2)) / B, np.full_like(codes, 1 / B)
        short, short_by_h = N * -h, -N
    else:
        assert cut is not None
        penalty = np.zeros(len(codes))
        short_by_h = -np.ones_like(N) if rule.activation == "topk" else -N
        short = cut[..., None] + h * short_by_h
    to_aN = penalties[:, None, None] * to_aN
    to_codes = to_codes + to_aN * N
    to_N = np.sum(to_aN * codes, 1)
    along_W_dec = np.where(N[:, 0] > 0, to_N / np.where(N[:, 0] > 0, N[:, 0], 1), 0)  # N has slope 0 at 0

    # Revive; a token counts by its part of the loss
    pushed = dead_here & (short > 0)
    losses = np.mean(e**2, 2) @ weight
    part = (losses / losses.sum())[:, None]
    revive = (np.where(pushed, short, 0) * part).sum()
    to_h = sparsity.revive * pushed * short_by_h * part

    # AuxK
    helping = dead_here & (places(np.where(dead_here, h, -np.inf)) < sparsity.auxk_features) & (h > 0)
    helped = np.where(helping, h, 0)
    missing = decode_codes(W_dec, np.zeros_like(parameters["b_dec"]), helped, wiring) - e
    scale = weight / reconstruction  # mean e^2, a constant
    auxk = np.sum(scale * np.mean(missing**2, (0, 2)))
    aux_to_W_dec, to_helped = decode_backward(2 * scale[:, None] * missing / (B * D), W_dec, helped, wiring)

    to_h = to_h + to_codes * by_h
    if sparsity.auxk:
        to_h = to_h + sparsity.auxk * to_helped * helping
    for s, source in enumerate(map(str, wiring.sources)):
        to_W_dec[source] += along_W_dec[s][:, None, None] * W_dec[source]
        if sparsity.auxk:
            to_W_dec[source] += sparsity.auxk * aux_to_W_dec[source]
    gradients = {
        "W_enc": np.einsum("sbf,bsd->sfd", to_h, x),
        "b_enc": to_h.sum(1),
        "W_dec": to_W_dec,
        "b_dec": to_y_hat.sum(0),
    }
    if by_log_threshold is not None:
        higher = sparsity.revive * pushed * N * np.exp(parameters["log_threshold"])[:, None] * part
        gradients["log_threshold"] = np.sum(to_codes * by_log_threshold + higher, 1)

    total = np.sum(weight * reconstruction) + penalties @ penalty + sparsity.revive * revive
    if sparsity.auxk:
        total = total + sparsity.auxk * auxk
    parts = {"reconstruction": reconstruction, "penalty": penalty.sum(), "revive": revive, "auxk": auxk}
    parts |= {"codes": codes, "h": h, "y_hat": y_hat} | ({} if cut is None else {"cut": cut})
    return Result(total, {name: np.asarray(part) for name, part in parts.items()}, gradients)


# --------------------------------------------------------------------------------------------------------------------


def topk_numpy(pre: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """ReLU of the k largest, ties to the lowest index: a stable sort of the negated values."""
    order = np.argsort(-pre, axis=-1, kind="stable")[..., :k]
    return np.maximum(np.take_along_axis(pre, order, -1), 0), order
