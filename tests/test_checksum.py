"""Checksums of a state: the same on every mesh, another for any other state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cltjax.checkpoint import LEFT_OUT, agrees
from cltjax.checksum import checksum
from cltjax.distributed import make_mesh

META = {"window": {"loss": 0.1}}


def state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "silent": rng.integers(0, 99, (3, 8)).astype(np.int32),
        "step": np.array(7, np.int32),
        "weights": rng.normal(size=(8, 5, 7)).astype(np.float32),
        "zeros": np.zeros((4, 6), np.float32),
    }


@pytest.mark.parametrize("mesh", ["1x1", "2x4", "8x1"])
def test_it_does_not_depend_on_the_mesh(mesh: str):
    devices = make_mesh(mesh)
    split = {"silent": P(None, "model"), "weights": P(("data", "model"))}
    placed = {
        name: jax.device_put(leaf, NamedSharding(devices, split.get(name, P()))) for name, leaf in state().items()
    }
    found = checksum(placed, META)
    assert found == checksum(jax.tree.map(jnp.asarray, state()), META)
    assert len(found) == 5 and all(isinstance(one, int) for one in found)


def test_anything_else_has_another():
    whole = checksum(state(), META)

    def changes(name: str, *places: tuple[int, ...], xor: int) -> bool:
        other = state()
        for place in places:
            other[name].view(np.uint32)[place] ^= xor
        differing = [a != b for a, b in zip(checksum(other, META), whole, strict=True)]
        return differing == [one == name for one in [*sorted(other), "meta"]]

    for bit in range(32):
        assert changes("weights", (3, 1, 4), xor=1 << bit)
        assert changes("zeros", (3, 5), xor=1 << bit)
    assert changes("weights", (0, 0, 0), (7, 4, 6), xor=1 << 31)  # two signs
    swapped = state()
    swapped["silent"][:, [0, 1]] = swapped["silent"][:, [1, 0]]
    assert checksum(swapped, META)[0] != whole[0]
    assert checksum(state(), {"window": {"loss": 0.2}})[:4] == whole[:4]
    assert checksum(state(), {"window": {"loss": 0.2}})[4] != whole[4]


def test_of_what_was_left_out_nothing_is_known():
    whole, part = checksum(state(), META), checksum(state() | {"silent": LEFT_OUT}, META)
    assert part == [None, *whole[1:]] and agrees(whole, part) and agrees(whole, whole)
    for place in range(1, 5):
        other = [one + (n == place) for n, one in enumerate(whole)]  # type: ignore[operator]
        assert not agrees(other, part)
    assert not agrees(whole[:4], part) and not agrees(None, part)
