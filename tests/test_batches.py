"""The order of training rows: every row once an epoch, any step on its own, and the rows that were asked for."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import synthetic_store

from cltjax.batches import Batches, Order, read_ahead, split_batches
from cltjax.config import DataConfig
from cltjax.errors import UserError
from cltjax.store import ActivationStore
from cltjax.wiring import wire

D = 7


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return synthetic_store(tmp_path_factory.mktemp("batches") / "store", rows=997, layers=4, d=D)


def stream(order: Order, first: int, count: int) -> np.ndarray:
    """The rows at positions first..first+count."""
    found = []
    for number, part in order.places(first, count):
        rows, visit = order.buffer(number)
        found.append(rows[visit[part]])
    return np.concatenate(found)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(0, 5),
    st.integers(1, 60),
    st.integers(0, 700),
)
def test_every_row_once_an_epoch_and_any_step_alone(n, page_rows, buffer_rows, seed, batch, first):
    rows = 3 * np.arange(n) + 1
    order = Order(rows, page_rows, buffer_rows, seed)
    whole = stream(order, 0, 3 * n)
    for epoch in range(3):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == rows.tolist()
    first %= 3 * n
    part = stream(order, first, min(batch, 3 * n - first))
    assert part.tolist() == whole[first : first + batch].tolist()


def test_pages_are_neighbours_and_epochs_differ():
    order = Order(np.arange(1000), page_rows=10, buffer_rows=50, seed=3)
    first = order.buffer(0)[0]
    assert len(first) == 50
    pages = {row // 10 for row in (first - first[0]) % 1000} | {0}
    assert len(pages) >= 5  # several pages, from several places
    assert not np.array_equal(np.diff(first), np.ones(49))  # not one stretch
    epochs = [stream(order, e * 1000, 1000).tolist() for e in range(2)]
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert stream(Order(np.arange(1000), 10, 50, seed=4), 0, 1000).tolist() != epochs[0]


def test_batches_hold_the_rows_and_layers_of_the_order(store: ActivationStore):
    wiring = wire("0,2", store.n_layers, 1, 1)
    assert wiring.targets == (1, 3)
    data = DataConfig(page_rows=5, buffer_mib=1)
    batches = Batches(store, wiring, 37, data, seed=2)
    batches.order = Order(store.rows_of("train"), 5, 60, 2)  # small buffers: batches straddle them
    for step in (0, 1, 5, 40, 39, 0):
        rows = stream(batches.order, step * 37, 37)
        batch = batches(step)
        np.testing.assert_array_equal(batch.x, store.read("site", rows, (0, 2)))
        np.testing.assert_array_equal(batch.y, store.read("mlp_out", rows, (1, 3)))
        assert len(batches.buffers) <= 2
    batches.close()


def test_the_buffers_are_bounded_in_bytes(store: ActivationStore):
    wiring = wire("0", store.n_layers, 1, 16)
    batches = Batches(store, wiring, 37, DataConfig(page_rows=256, buffer_mib=3), seed=2)
    row_bytes = 4 * D * 2  # one source and three targets in bfloat16
    pages = -(-len(store.rows_of("train")) // 256)
    assert batches.order.per_epoch == 1 and batches.order.buffer_rows == 256 * pages  # all of it fits
    order = Order(np.arange(100_001), 256, (3 << 20) // 2 // row_bytes, 0)
    assert 2 * order.buffer_rows * row_bytes <= 3 << 20
    sizes = [len(order.buffer(number)[0]) for number in range(order.per_epoch)]
    assert sum(sizes) == 100_001 and order.per_epoch == -(-100_001 // (28086 // 256 * 256))
    assert max(sizes) - min(sizes) <= 256 * order.per_epoch  # even
    batches.close()


def test_a_store_without_train_rows(tmp_path: Path):
    store = synthetic_store(tmp_path / "s", rows=60, layers=2, d=3, splits=("test",))
    with pytest.raises(UserError, match="no train rows"):
        Batches(store, wire("0", 2, 1, 1), 5, DataConfig(), 0)


def test_split_batches_are_the_whole_split(store: ActivationStore):
    wiring = wire("all", store.n_layers, 1, 16)
    found = list(split_batches(store, wiring, "test", size=41))
    rows = store.rows_of("test")
    x, modality = np.concatenate([batch.x for batch, _ in found]), np.concatenate([m for _, m in found])
    np.testing.assert_array_equal(x, store.read("site", rows, wiring.sources))
    np.testing.assert_array_equal(modality, store.column("modality")[rows])


def test_read_ahead_keeps_order_is_bounded_and_raises():
    made = []

    def items():
        for n in range(20):
            made.append(n)
            yield n

    with read_ahead(items(), depth=2) as ahead:
        assert next(ahead) == 0
        time.sleep(0.3)
        assert len(made) <= 5  # one taken, two waiting, one in hand
        assert list(ahead) == list(range(1, 20))

    def broken():
        yield 1
        raise UserError("a damaged chunk")

    with read_ahead(broken()) as ahead, pytest.raises(UserError, match="damaged"):
        list(ahead)
    with read_ahead(items()) as ahead:
        next(ahead)  # leaving early stops the thread
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
