"""The step on meshes of eight devices against one device, and what its compiled program sends between devices."""

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from cltjax import sparse_products
from cltjax.config import TrainConfig
from cltjax.sparsity import candidates
from cltjax.step import Frozen, make_step
from cltjax.wiring import wire
from test_step import FAST, GIVEN_SLOTS, RULES, Case, D, arguments, case, close, given_run, mesh_of
from test_step import settings as configuration

B, F, K, SLOTS = 48, 40, 3, 6
MESHES = ((1, 8), (8, 1), (2, 4), (4, 2))
BOTH = {"revive": 0.3, "auxk": 0.2, "auxk_features": 4}


def after_one_step(of: Case, shape: tuple[int, int], frozen: tuple[Frozen, ...] = (), held: tuple = ()):
    """(everything, figures) after the first step: its moments are the gradients, and the density how often features
    fired."""
    mesh = mesh_of(*shape)
    inputs = arguments(of, mesh, held)
    step: Any = make_step(of.config, of.graph, mesh, frozen)
    return jax.tree.map(np.asarray, step.lower(*inputs).compile(compiler_options=FAST)(*inputs))


@cache
def sharded_case(activation: str) -> tuple[Case, tuple[Frozen, ...], tuple]:
    config = configuration(
        activation,
        F,
        B,
        model={"slots": None if activation == "topk" else SLOTS},
        sparsity=BOTH | ({"penalty": None} if activation == "jumprelu" else {}),
        microbatches=2 if activation in ("topk", "jumprelu") else 1,
    )
    of = case(config, wire("0-1", 2, 0, 16), seed=5, extra=1)
    of = of._replace(state=of.state._replace(step=np.array(0, np.int32)))  # type: ignore[arg-type]
    theirs = case(configuration(activation, 24), wire("0", 2, 0, 16), seed=6)
    frozen = Frozen(theirs.graph, (2,), ((0, 0), (1, 1)), None if activation == "topk" else GIVEN_SLOTS)
    return of, (frozen,), (given_run(activation, theirs)[0],)


@cache
def on_one_device(activation: str):
    of, frozen, held = sharded_case(activation)
    return after_one_step(of, (1, 1), frozen, held)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("activation", RULES)
def test_a_step_is_the_same_on_every_mesh(activation: str, shape: tuple[int, int]):
    """With revive, AuxK and a given run of the same rule; topk and jumprelu over two microbatches, jumprelu with a
    penalty that is steered."""
    of, frozen, held = sharded_case(activation)
    state, figures = after_one_step(of, shape, frozen, held)
    alone, alone_figures = on_one_device(activation)
    gradients, expected = (nnx.to_pure_dict(optax.tree.get(one.optimiser, "mu")) for one in (state, alone))
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-5
    close(gradients, expected)
    close(state, alone)
    close(figures, alone_figures)
    assert (np.round(state.density * B) == np.round(alone.density * B)).all()  # tokens that each feature fired on
    assert (state.silent == alone.silent).all()
    assert 0 < np.sum(alone.silent == 0) < alone.silent.size


@pytest.fixture
def slot_by_slot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sparse products the way of GPUs."""
    jax.clear_caches()
    monkeypatch.setattr(sparse_products, "by_row", lambda: False)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_step_is_the_same_slot_by_slot(activation: str, request: pytest.FixtureRequest):
    of, frozen, held = sharded_case(activation)
    alone, alone_figures = on_one_device(activation)
    request.getfixturevalue("slot_by_slot")
    state, figures = after_one_step(of, (2, 4), frozen, held)
    close(state, alone)
    close(figures, alone_figures)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from((1, 3)))
@pytest.mark.parametrize("slots", [3, 5, 7])
def test_candidates_over_shards_are_those_of_the_whole(slots: int, seed: int, width: int):
    """Ties and all, where a shard has fewer features than there are slots, too."""
    rank = np.random.default_rng(seed).integers(-2, 2 + width, (2, 5, 40)).astype(np.float32)
    best, indices = split_candidates(slots)(rank)
    whole, places = jax.lax.top_k(rank, slots)
    assert (np.asarray(best) == np.asarray(whole)).all()
    # Each shard says F / 8 for what another one has: exactly one knows where a feature is.
    indices = np.asarray(indices).reshape(2, 5, 8, slots)
    mine = indices < 5
    assert (mine.sum(2) == 1).all() and indices.max() <= 5
    found = np.where(mine, indices + 5 * np.arange(8)[:, None], 0).sum(2)
    assert (found == np.asarray(places)).all()


@cache
def split_candidates(slots: int):
    split = P(None, None, "model")
    local = partial(candidates, slots=slots, axis="model")
    outputs = type(candidates(jnp.zeros((1, 1, 8)), 1))(P(), split)  # type: ignore[arg-type]
    return jax.jit(jax.shard_map(local, mesh=mesh_of(1, 8), in_specs=split, out_specs=outputs, check_vma=False))


COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(-start)?\("
)


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every array that crosses devices in a compiled program."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            for shape in re.findall(r"\w+\[([\d,]*)\]", match["type"]):
                found.append((match["name"], tuple(map(int, shape.split(","))) if shape else ()))
    return found


@pytest.mark.parametrize(
    "activation, sparsity, options",
    [
        ("topk", {}, {}),
        ("batchtopk", {}, {}),
        ("batchtopk", {"revive": 0.3}, FAST),
        ("topk_joint", BOTH, FAST),
        ("jumprelu", BOTH, FAST),
    ],
)
def test_what_crosses_devices(activation: str, sparsity: dict, options: dict):
    """On 2x4: ranks of candidates, one sum of the prediction, the gradients of a shard's parameters, and counts. With
    AuxK also the ranks of its candidates, and one sum of what they reconstruct."""
    config: TrainConfig = configuration(
        activation, F, B, model={"k": K, "slots": None if activation == "topk" else SLOTS}, sparsity=sparsity
    )
    of = case(config, wire("0-1", 3, 0, 16))
    mesh = mesh_of(2, 4)
    inputs = arguments(of, mesh)
    step: Any = make_step(config, of.graph, mesh)
    found = collectives(step.lower(*inputs).compile(compiler_options=options).as_text())
    S, T, b, model, C, auxk = 2, 3, B // 2, 4, K if activation == "topk" else SLOTS, "auxk" in sparsity
    sizes = {name: sorted(int(np.prod(s)) for n, s in found if n == name) for name, _ in found}

    assert set(sizes) == {"all-reduce", "all-gather"}
    # As many elements as codes or pre-activations have, of all tokens or a shard's, all features or a shard's.
    dense = {s * t * f for s in (1, S) for t in (B, b) for f in (F, F // model)}
    assert not dense & {size for many in sizes.values() for size in many}
    assert sizes["all-gather"] == sorted([S * b * C * model] + [S * b * BOTH["auxk_features"] * model] * auxk)
    assert sizes["all-reduce"].count(b * T * D) == 1 + auxk
    # A gradient of each parameter, as large as a device's part of it.
    parts = [S * (F // model) * D, S * (F // model), T * D]
    parts += [(F // model) * len(of.wiring.targets_of(source)) * D for source in of.wiring.sources]
    parts += [S * (F // model)] * (activation == "jumprelu")  # thresholds
    rest = sizes["all-reduce"].copy()
    for part in (*[b * T * D] * (1 + auxk), *parts):
        rest.remove(part)
    # What remains are counts: of a feature (fired), a target, a source, or one number.
    fired = S * (F // model)
    assert rest.count(fired) == 1 and max(size for size in rest if size != fired) <= max(S, T)
