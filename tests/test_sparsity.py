"""Top-k of long rows by way of runs: exactly `lax.top_k`, ties and infinities included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cltjax import sparsity
from cltjax.sparsity import LONG, RUN, top_k


def values(seed: int, width: int, levels: int) -> jax.Array:
    """[2, 3, width] of few different numbers, so that there are ties, -inf among them."""
    drawn = np.random.default_rng(seed).integers(0, levels, (2, 3, width)).astype(np.float32)
    return jnp.asarray(np.where(drawn == 0, -np.inf, drawn))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999), runs=st.sampled_from([5, 7]), k=st.integers(1, 5), levels=st.sampled_from([2, 4, 9, 1000])
)
def test_runs_give_the_same_numbers_at_the_same_places(seed: int, runs: int, k: int, levels: int):
    rank = values(seed, runs * RUN, levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsity, "LONG", 0)
        best, places = top_k(rank, k)
    expected = jax.lax.top_k(rank, k)
    assert best.tolist() == expected[0].tolist()
    assert places.tolist() == expected[1].tolist()


def sorted_widths(width: int, k: int) -> set[int]:
    """How wide the matrices are that a program takes the top k of."""
    program = jax.make_jaxpr(lambda rank: top_k(rank, k))(jnp.zeros((2, width)))
    return {eqn.invars[0].aval.shape[-1] for eqn in program.eqns if eqn.primitive.name == "top_k"}  # type: ignore[union-attr]


def test_only_long_rows_go_by_runs():
    assert sorted_widths(LONG * 2, 2) == {LONG * 2 // RUN, 2 * RUN}
    assert sorted_widths(LONG * 2 - RUN, 2) == {LONG * 2 - RUN}
    assert sorted_widths(LONG * 2 + 1, 2) == {LONG * 2 + 1}  # not whole runs


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 37, 333])
def test_pieces_are_put_together_in_order(rows: int):
    rank = jnp.asarray(np.random.default_rng(rows).integers(0, 9, (rows, 13)).astype(np.float32))
    best, places = jax.jit(lambda rank: top_k(rank, 5))(rank)
    expected = jax.lax.top_k(rank, 5)
    assert best.tolist() == expected[0].tolist() and places.tolist() == expected[1].tolist()


def test_no_piece_waits_for_the_memory_of_another():
    """Where only places are used, the compiler would else give the memory of a piece's numbers to the next one."""
    program = jax.jit(lambda rank: top_k(rank, 5)[1]).lower(jnp.zeros((333, 64))).compile().as_text() or ""
    (joined,) = (line for line in program.splitlines() if " concatenate(" in line and "s32[666,5]" in line)
    assert joined.count("%") == 1 + 2 * sparsity.PIECES
