"""The cross-layer transcoder as a Flax NNX module.

    a_l = act(x_l W_enc_l + b_enc_l)            y_hat_t = b_dec_t + sum over sources l of a_l W_dec_{l->t}

Encoders are stacked over sources; a source's decoder heads lie side by side, one for each target that exists. Inputs
and targets are normalised inside: minus the per-dimension train mean, divided by one scalar standard deviation per
layer. Every method works alike on a whole CLT and, inside `jax.shard_map`, on one device's share of its features.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from cltjax.axes import ALONE, Axes, total
from cltjax.config import ModelConfig, k_values, slots_of
from cltjax.decode import decode, decode_codes
from cltjax.encode import pick, pre_activations
from cltjax.normalisation import Normalisation
from cltjax.sparsity import RANKED_BY_NORM, candidates
from cltjax.wiring import Wiring

TINY = 1e-30  # under a square root, so that the gradient of a zero norm is 0 and not NaN


class Constant(nnx.Variable):
    """Belongs to the model and is saved with it, but is not trained."""


class CLT(nnx.Module):
    """W_enc [S, F, D], b_enc [S, F], W_dec {source: [F, T_l, D]}, b_dec [T, D], float32; for jumprelu also
    log_threshold [S, F]. S sources, T targets, T_l targets of source l.

    The encoder starts uniform in +-1/sqrt(F), decoders in +-1/sqrt(T_l D), biases at zero (`b_dec` = 0 is the mean of
    a normalised target).
    """

    def __init__(
        self,
        wiring: Wiring,
        model: ModelConfig,
        normalisation: Normalisation,
        key: jax.Array,
        threshold: float = 0.03,
        dtype: str = "float32",
    ):
        self.wiring = wiring
        self.activation = model.activation
        self.k = source_ks(model, wiring)
        self.slots = slots_of(model)
        self.dtype = dtype
        S, F, T, D = len(wiring.sources), model.features, len(wiring.targets), normalisation.in_mean.shape[1]
        keys = jax.random.split(key, S + 1)

        def uniform(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
            bound = 1 / math.sqrt(fan)
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        self.W_enc = nnx.Param(uniform(keys[S], (S, F, D), F))
        self.b_enc = nnx.Param(jnp.zeros((S, F)))
        heads = {}
        for s, source in enumerate(wiring.sources):
            T_l = len(wiring.targets_of(source))
            heads[str(source)] = nnx.Param(uniform(keys[s], (F, T_l, D), T_l * D))
        self.W_dec = nnx.Dict(heads)
        self.b_dec = nnx.Param(jnp.zeros((T, D)))
        if self.activation == "jumprelu":
            self.log_threshold = nnx.Param(jnp.full((S, F), math.log(threshold), jnp.float32))
        self.in_mean = Constant(jnp.asarray(normalisation.in_mean, jnp.float32))
        self.in_std = Constant(jnp.asarray(normalisation.in_std, jnp.float32))
        self.out_mean = Constant(jnp.asarray(normalisation.out_mean, jnp.float32))
        self.out_std = Constant(jnp.asarray(normalisation.out_std, jnp.float32))
        # What h |W_dec| must reach once training is over, for the rules that look at whole batches while it lasts.
        self.cut = Constant(jnp.zeros(S))

    def normalise_inputs(self, x: ArrayLike) -> jax.Array:
        """Raw inputs x [B, S, D] of any float type -> normalised float32."""
        return (jnp.asarray(x, jnp.float32) - self.in_mean[...]) / self.in_std[...][:, None]

    def normalise_targets(self, y: ArrayLike) -> jax.Array:
        """Raw targets [B, T, D] of any float type -> normalised float32."""
        return (jnp.asarray(y, jnp.float32) - self.out_mean[...]) / self.out_std[...][:, None]

    def pre_activations(self, normal: jax.Array) -> jax.Array:
        """Normalised inputs [B, S, D] -> [S, B, F]."""
        return pre_activations(self.W_enc[...], self.b_enc[...], normal, self.dtype)

    def pick(self, normal: jax.Array, pre: jax.Array, indices: jax.Array) -> jax.Array:
        """Pre-activations at `indices` [S, B, K], with the sparse gradient."""
        return pick(self.W_enc[...], self.b_enc[...], normal, jax.lax.stop_gradient(pre), indices)

    def decoder_norms(self) -> jax.Array:
        """|W_dec| of each feature over all its targets [S, F]."""
        heads = [self.W_dec[str(source)][...] for source in self.wiring.sources]
        return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(W), (1, 2)) + TINY) for W in heads])

    def thresholds(self) -> jax.Array:
        """What a jumprelu feature's pre-activation must exceed [S, F]."""
        return jnp.exp(self.log_threshold[...])

    def rank(self, pre: jax.Array) -> jax.Array:
        """What decides which features are active [S, B, F]; has no gradient."""
        pre = jax.lax.stop_gradient(pre)
        if self.activation in RANKED_BY_NORM:
            return pre * jax.lax.stop_gradient(self.decoder_norms())[:, None]
        if self.activation == "jumprelu":
            return pre - jax.lax.stop_gradient(self.thresholds())[:, None]
        return pre

    def passes(self, rank: jax.Array) -> jax.Array:
        """Whether features of this rank [S, ...] are active, for rules with a threshold, once training is over."""
        if self.activation in RANKED_BY_NORM:
            return rank >= self.cut[...].reshape(-1, *(1,) * (rank.ndim - 1))
        return rank > 0

    def encode(self, x: ArrayLike, axes: Axes = ALONE) -> tuple[jax.Array, jax.Array]:
        """Active features of raw inputs x [B, S, D], once training is over -> values, indices [S, B, K].

        Values are 0 for slots that no feature takes. Of more features above their thresholds than there are slots, the
        highest ranks are given: `codes` has them all.
        """
        pre = self.pre_activations(self.normalise_inputs(x))
        found = candidates(self.rank(pre), self.slots, axes.model)
        values = jnp.take_along_axis(pre, found.indices, -1, mode="fill", fill_value=0)
        if self.activation == "topk":
            kept = jnp.arange(self.slots) < jnp.array(self.k)[:, None, None]
        else:
            kept = self.passes(found.rank)
        return jnp.where(kept, jnp.maximum(values, 0), 0), found.indices

    def codes(self, x: ArrayLike) -> jax.Array:
        """All features [S, B, F] of raw inputs x [B, S, D] under a rule with thresholds, once training is over."""
        pre = self.pre_activations(self.normalise_inputs(x))
        return jnp.where(self.passes(self.rank(pre)), jnp.maximum(pre, 0), 0)

    def contributions(self, values: jax.Array, indices: jax.Array) -> jax.Array:
        """What active features [S, B, K] write to the targets, in normalised units and without b_dec: [B, T, D]."""
        return decode({layer: W[...] for layer, W in self.W_dec.items()}, values, indices, self.wiring, self.dtype)

    def contributions_of_codes(self, codes: jax.Array) -> jax.Array:
        """The same of dense codes [S, B, F], for tokens with any number of active features."""
        return decode_codes({layer: W[...] for layer, W in self.W_dec.items()}, codes, self.wiring)

    def decode(self, values: jax.Array, indices: jax.Array, axes: Axes = ALONE) -> jax.Array:
        """Predicted targets in normalised units: values, indices [S, B, K] -> [B, T, D]."""
        return total(self.contributions(values, indices), axes.model) + self.b_dec[...]

    def __call__(self, x: ArrayLike, axes: Axes = ALONE) -> jax.Array:
        """Raw inputs [B, S, D] -> raw predicted MLP outputs [B, T, D]."""
        normal = self.decode(*self.encode(x, axes), axes)
        return normal * self.out_std[...][:, None] + self.out_mean[...]


def source_ks(model: ModelConfig, wiring: Wiring) -> tuple[int, ...]:
    """k of each source."""
    ks = k_values(model.k, model.features)
    return ks * len(wiring.sources) if len(ks) == 1 else ks
