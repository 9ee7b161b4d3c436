"""The dense twins of the sparse code: what the mathematics says, without regard to cost. For tests only."""

import jax
import jax.numpy as jnp
import numpy as np

from cltjax.wiring import Wiring


def decode(W_dec: jax.Array, b_dec: jax.Array, values: jax.Array, indices: jax.Array, wiring: Wiring) -> jax.Array:
    """The joint sum through a dense [S, B, F] code: same arguments and result as cltjax.decode.decode."""
    S, B, _ = values.shape
    code = jnp.zeros((S, B, W_dec.shape[1]))
    code = code.at[jnp.arange(S)[:, None, None], jnp.arange(B)[None, :, None], indices].add(values)
    targets = []
    for t, target in enumerate(wiring.targets):
        total = jnp.broadcast_to(b_dec[t], (B, b_dec.shape[1]))
        for p, (source, written) in enumerate(wiring.pairs):
            if written == target:
                total = total + code[wiring.sources.index(source)] @ W_dec[p]
        targets.append(total)
    return jnp.stack(targets, axis=1)


def topk_numpy(pre: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """ReLU of the k largest, ties to the lowest index: a stable sort of the negated values."""
    order = np.argsort(-pre, axis=-1, kind="stable")[..., :k]
    return np.maximum(np.take_along_axis(pre, order, -1), 0), order
