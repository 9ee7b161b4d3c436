"""The cross-layer transcoder as a Flax NNX module.

    a_l = act(x_l W_enc_l + b_enc_l)            y_hat_t = b_dec_t + sum over sources l of a_l W_dec_{l->t}

Encoders are stacked over sources, decoder heads over the (source, target) pairs that exist. Inputs and targets are
normalised inside: minus the per-dimension train mean, divided by one scalar standard deviation per layer.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from cltjax.decode import decode
from cltjax.normalisation import Normalisation
from cltjax.sparsity import topk
from cltjax.wiring import Wiring


class Constant(nnx.Variable):
    """Belongs to the model and is saved with it, but is not trained."""


class CLT(nnx.Module):
    """W_enc [S, F, D], b_enc [S, F], W_dec [P, F, D], b_dec [T, D], float32; S sources, P pairs, T targets.

    The encoder starts uniform in +-1/sqrt(F), every decoder and bias at zero (method.md: decoders that start at
    zero train as well as small random ones, and `b_dec` = 0 is the mean of a normalised target).
    """

    def __init__(self, wiring: Wiring, features: int, k: int, normalisation: Normalisation, key: jax.Array):
        self.wiring = wiring
        self.k = k
        d_model = normalisation.in_mean.shape[1]
        bound = 1 / math.sqrt(features)
        W_enc = jax.random.uniform(key, (len(wiring.sources), features, d_model), jnp.float32, -bound, bound)
        self.W_enc = nnx.Param(W_enc)
        self.b_enc = nnx.Param(jnp.zeros((len(wiring.sources), features)))
        self.W_dec = nnx.Param(jnp.zeros((len(wiring.pairs), features, d_model)))
        self.b_dec = nnx.Param(jnp.zeros((len(wiring.targets), d_model)))
        self.in_mean = Constant(jnp.asarray(normalisation.in_mean, jnp.float32))
        self.in_std = Constant(jnp.asarray(normalisation.in_std, jnp.float32))
        self.out_mean = Constant(jnp.asarray(normalisation.out_mean, jnp.float32))
        self.out_std = Constant(jnp.asarray(normalisation.out_std, jnp.float32))

    def encode(self, x: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Active features of raw inputs x [B, S, D] of any float type -> values, indices [S, B, K]."""
        return topk(self.pre_activations(x), self.k)

    def pre_activations(self, x: ArrayLike) -> jax.Array:
        """Raw inputs x [B, S, D] -> [S, B, F]."""
        normal = (jnp.asarray(x, jnp.float32) - self.in_mean[...]) / self.in_std[...][:, None]
        # Pre-activations decide which features exist: full fp32, not the TF32 that GPUs use by default.
        pre = jnp.einsum("bsd,sfd->sbf", normal, self.W_enc[...], precision=jax.lax.Precision.HIGHEST)
        return pre + self.b_enc[...][:, None]

    def decode(self, values: jax.Array, indices: jax.Array) -> jax.Array:
        """Predicted targets in normalised units: values, indices [S, B, K] -> [B, T, D]."""
        return decode(self.W_dec[...], self.b_dec[...], values, indices, self.wiring)

    def normalise_targets(self, y: ArrayLike) -> jax.Array:
        """Raw targets [B, T, D] of any float type -> normalised float32."""
        return (jnp.asarray(y, jnp.float32) - self.out_mean[...]) / self.out_std[...][:, None]

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Raw inputs [B, S, D] -> raw predicted MLP outputs [B, T, D]."""
        return self.decode(*self.encode(x)) * self.out_std[...][:, None] + self.out_mean[...]
