"""The order of training rows: every row once an epoch, any step on its own, and the rows that were asked for."""

import dataclasses
import re
import threading
import time
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cltjax.batches import (
    Batch,
    Batches,
    Order,
    other_seed,
    page_size,
    read_ahead,
    row_batches,
    sample_rows,
    split_batches,
    spread,
    trained_mix,
)
from cltjax.config import DataConfig, TokensConfig
from cltjax.errors import UserError
from cltjax.store import IMAGE, ActivationStore
from cltjax.store_format import unpack
from cltjax.tokens import NormLimits, TokenRules, token_rules
from cltjax.wiring import wire
from store_cases import make_case, write
from stores import synthetic_store

D = 7
ORDER_CRC32 = 2372032937


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return synthetic_store(tmp_path_factory.mktemp("batches") / "store", rows=997, layers=4, d=D)


def ordered(rows: np.ndarray, page_rows: int, buffer_rows: int, seed: int, block_rows: int = 1) -> Order:
    """Of rows that lie as they are numbered."""
    return Order(rows, rows, page_rows, buffer_rows, seed, block_rows)


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
    st.integers(1, 50),
)
def test_every_row_once_an_epoch_and_any_step_alone(n, page_rows, buffer_rows, seed, batch, first, block):
    rows = np.sort(np.random.default_rng(n).choice(3 * n, n, replace=False))
    order = ordered(rows, page_rows, buffer_rows, seed, block)
    whole = stream(order, 0, 3 * n)
    for epoch in range(3):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == rows.tolist()
    first %= 3 * n
    part = stream(order, first, min(batch, 3 * n - first))
    assert part.tolist() == whole[first : first + batch].tolist()
    for number in range(3 * order.per_epoch):
        found, _ = order.buffer(number)
        assert order.first(number) == sum(len(order.buffer(before)[0]) for before in range(number))
        assert (np.diff(found) > 0).all() and len(found) <= max(buffer_rows, page_rows)
        if page_rows >= block and order.per_epoch > 1:  # no block is read for two buffers
            assert all(np.isin(rows[rows // block == one], found).all() for one in np.unique(found // block))


def test_pages_are_neighbours_and_epochs_differ():
    order = ordered(np.arange(1000), page_rows=10, buffer_rows=50, seed=3)
    first = order.buffer(0)[0]
    assert 40 <= len(first) <= 50
    assert 3 <= (np.diff(first) > 1).sum() <= 4  # several pages, from several places
    epochs = [stream(order, e * 1000, 1000).tolist() for e in range(2)]
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert stream(ordered(np.arange(1000), 10, 50, seed=4), 0, 1000).tolist() != epochs[0]


class Spy:
    """Stands in for a store, and notes the rows that are read."""

    def __init__(self, store: ActivationStore) -> None:
        self.store, self.read_rows = store, []

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def read_packed(self, which: str, rows: np.ndarray, layers, out: np.ndarray) -> np.ndarray:
        self.read_rows.append(rows)
        return self.store.read_packed(which, rows, layers, out)


def rules_of(store: ActivationStore, **options) -> TokenRules:
    return token_rules(store, (0, 2), (1, 3), TokensConfig(**options))


def make(store, rules: TokenRules, size: int = 37, *, buffer_rows: int, positions=None, seed: int = 2) -> Batches:
    """Batches of layers (0, 2) -> (3, 1) with small buffers, which batches straddle."""
    batches = Batches(store, (0, 2), (3, 1), rules, size, DataConfig(page_rows=5), seed, positions)
    for stream in batches.streams:
        stream.order = ordered(stream.order.rows, 5, buffer_rows, stream.order.seed)
    return batches


@lru_cache
def numbers(store: ActivationStore) -> dict[bytes, int]:
    """Row numbers by what is stored at layers 0 and 2."""
    found = {row.tobytes(): number for number, row in enumerate(store.read("site", slice(None), (0, 2)))}
    assert len(found) == store.rows
    return found


def rows_in(store: ActivationStore, batch: Batch) -> np.ndarray:
    """Which rows of the store a batch of layers 0 and 2 holds."""
    return np.array([numbers(store)[row.tobytes()] for row in batch.x])


@pytest.mark.parametrize("special", [False, True])
def test_batches_hold_the_rows_and_layers_of_the_order(store: ActivationStore, special: bool):
    rules = rules_of(store, special=special)
    assert len(rules.rows("train")) < len(store.rows_of("train")) or special
    batches = make(store, rules, buffer_rows=60)
    order = ordered(rules.rows("train"), 5, 60, 2)
    for step in (0, 1, 5, 40, 39, 0):
        rows = stream(order, step * 37, 37)
        batch = batches(step)
        np.testing.assert_array_equal(batch.x, store.read("site", rows, (0, 2)))
        np.testing.assert_array_equal(batch.y, store.read("mlp_out", rows, (3, 1)))
        assert len(batches.streams[0].buffers) <= 2
    batches.close()


def test_the_order_is_the_same_as_ever(store: ActivationStore):
    """Old runs resume with the rows they would have had: this checksum is of the order numbered 2 (ROW_ORDER)."""
    found = [
        stream(ordered(np.arange(7919), page_rows, buffer_rows, 3, 128), 0, 3 * 7919)
        for page_rows, buffer_rows in ((256, 2048), (32, 640), (256, 128))  # parts of blocks; a page is a buffer
    ]
    found += [spread(512, 200), np.array(other_seed(3, 1))]
    whole = b"".join(one.astype(np.uint64).tobytes() for one in found)
    assert zlib.crc32(whole) == ORDER_CRC32


@settings(max_examples=25, deadline=None)
@given(
    share=st.sampled_from([None, 0.0, 0.2, 0.5, 0.9, 1.0]),
    pieces=st.integers(1, 4),
    buffer_rows=st.sampled_from([30, 90, 5000]),
    seed=st.integers(0, 3),
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=3),
)
def test_each_process_gets_its_positions(store, share, pieces, buffer_rows, seed, steps):
    rules = rules_of(store, image_share=share)
    whole = make(store, rules, buffer_rows=buffer_rows, seed=seed)
    assigned = np.random.default_rng(seed).integers(0, pieces, 37)
    for piece in set(assigned.tolist()):
        positions = np.random.default_rng(piece).permutation(np.flatnonzero(assigned == piece))
        spy = Spy(store)
        mine = make(spy, rules, buffer_rows=buffer_rows, seed=seed, positions=positions)
        for step in steps:
            expected, found = whole(step), mine(step)
            np.testing.assert_array_equal(found.x, expected.x[positions])
            np.testing.assert_array_equal(found.y, expected.y[positions])
        mine.close()
        assert all(len(np.unique(rows)) == len(rows) for rows in spy.read_rows)
    whole.close()


def test_a_process_reads_its_part_of_a_buffer(store: ActivationStore):
    """With 5 of 37 positions, 5 of 37 rows of a buffer: those of the batches that it is used for."""
    spy, rules = Spy(store), rules_of(store)
    batches = make(spy, rules, buffer_rows=185, positions=slice(3, 8))
    full = make(store, rules, buffer_rows=185)
    n = len(batches.streams[0].order.buffer(0)[0])
    assert len(rules.rows("train")) > 2 * n > 200
    batches(0)
    batches.close()
    expected = [r for step in range(-(-n // 37)) for r in rows_in(store, full(step))[3:8]]
    assert set(spy.read_rows[0].tolist()) <= set(expected) and len(spy.read_rows[0]) >= len(expected) - 5
    full.close()


@settings(max_examples=20, deadline=None)
@given(share=st.sampled_from([0.0, 0.1, 0.5, 0.77, 1.0]), size=st.integers(10, 50), seed=st.integers(0, 9))
def test_images_have_their_share_of_every_batch(store, share: float, size: int, seed: int):
    """And both kinds go through all their rows before any comes again."""
    rules = rules_of(store, special=True, image_share=share)
    batches = make(store, rules, size, buffer_rows=150, seed=seed)
    modality, used = store.column("modality"), rules.rows("train")
    seen = []
    for step in range(40):
        rows = rows_in(store, batches(step))
        assert (modality[rows] == IMAGE).sum() == round(share * size)
        seen += rows.tolist()
    batches.close()
    again = np.bincount(seen, minlength=store.rows)
    assert again[np.setdiff1d(np.arange(store.rows), used)].sum() == 0
    for kind in (used[modality[used] == IMAGE], used[modality[used] != IMAGE]):
        assert len(kind) == 0 or again[kind].max() - again[kind].min() <= 1
    if 0 < share < 1:
        first, second = batches.streams
        assert {first.order.seed, second.order.seed} > {seed} and second.order.seed != first.order.seed


def test_the_share_holds_in_any_piece_of_a_batch():
    """Contiguous microbatches, strided ones, and shards of them: each within 4 tokens of its share."""
    for n in (13, 256, 460):
        chosen = spread(512, n)
        assert chosen.sum() == n
        for parts in (2, 4, 8, 16):
            for pieces in (chosen.reshape(parts, -1), chosen.reshape(-1, parts).T):
                assert np.abs(pieces.sum(1) - n / parts).max() <= 4


@pytest.mark.parametrize("share", [None, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("most", [1, 60, 10**6])
def test_a_sample_that_stands_for_the_trained_mix(store: ActivationStore, share: float | None, most: int):
    """As `most` rows have it where there are so many, and every row of it has its stratum."""
    rules, modality = rules_of(store, image_share=share), store.column("modality")
    rows, mix = rules.rows("val"), trained_mix(store, rules, "val", most)
    assert np.isin(mix.rows, rows).all() and (np.diff(mix.rows) > 0).all()
    if share in (None, 1.0):
        assert mix.shares == (1.0,) and len(mix.rows) == min(most, len(rows)) and not mix.stratum[mix.rows].any()
        return
    assert mix.shares == (1 - share, share)
    image = modality[mix.rows] == IMAGE
    assert (mix.stratum[mix.rows] == image).all()
    there = (modality[rows] == IMAGE).sum()
    assert image.sum() == min(there, max(1, round(share * most)))
    assert (~image).sum() == min(len(rows) - there, max(1, round((1 - share) * most)))


def test_image_share_without_what_it_needs(tmp_path: Path, store: ActivationStore):
    path = tmp_path / "text"
    write(path, make_case(samples_by_batch=(31,), longest=13))
    text = ActivationStore.open(path)
    rules = token_rules(text, (1,), (3,), TokensConfig(image_share=0.5))
    for gone, lacking in ((0, "other than image"), (1, "none image")):
        left = dataclasses.replace(rules, group=np.where(rules.group == gone, 2, rules.group))
        with pytest.raises(UserError, match=lacking):
            Batches(text, (1,), (3,), left, 5, DataConfig(), 0)
    tiny = token_rules(text, (1,), (3,), TokensConfig(image_share=0.01))
    with pytest.raises(UserError, match="--batch-size 5 is 0 tokens"):
        Batches(text, (1,), (3,), tiny, 5, DataConfig(), 0)


def test_a_store_that_fits_into_a_buffer_is_read_once(store: ActivationStore):
    spy, rules = Spy(store), rules_of(store)
    batches = Batches(spy, (0,), (1,), rules, 37, DataConfig(), 0)  # type: ignore[arg-type]
    order = ordered(rules.rows("train"), 256, 10**6, 0, store.block_rows)
    for step in range(3 * len(order.rows) // 37):
        rows = stream(order, step * 37, 37)
        np.testing.assert_array_equal(batches(step).y, store.read("mlp_out", rows, (1,)))
    batches.close()
    assert len(spy.read_rows) == 2 and len(spy.read_rows[0]) == len(order.rows)


@pytest.mark.parametrize("share", [None, 0.3])
def test_an_int8_store_is_not_unpacked_on_the_host(tmp_path: Path, share: float | None):
    held = synthetic_store(tmp_path / "int8", rows=997, layers=4, d=D, dtype="int8")
    batches = make(held, rules_of(held, image_share=share), buffer_rows=60)
    for step in (0, 1, 11, 3):
        batch = batches(step)
        assert batch.x.dtype == batch.y.dtype == np.int8 and batch.x.shape == (37, 2, D + 4)
        whole = Batch(unpack(batch.x), unpack(batch.y))
        np.testing.assert_array_equal(whole.y, held.read("mlp_out", rows_in(held, whole), (3, 1)))
    batches.close()


def test_buffers_are_read_into_the_same_memory(store: ActivationStore):
    """And what was returned is not written over."""
    rules = rules_of(store)
    batches = make(store, rules, buffer_rows=60)
    (one,) = batches.streams
    batches(0)
    found, copies, memory = [], [], {}
    for step in range(40):
        found.append(batches(step))
        copies.append(found[-1].x.copy())
        memory |= {id(held.x): held.x for held in one.memory if held is not None}  # held, so that no id comes again
    batches.close()
    assert one.order.first(20) < 40 * 37 and len(memory) <= 8  # new where a buffer is larger than those before
    for batch, copy in zip(found, copies, strict=True):
        np.testing.assert_array_equal(batch.x, copy)


def test_the_buffers_are_bounded_in_bytes(store: ActivationStore):
    rules = token_rules(store, (0,), (1, 2, 3), TokensConfig(special=True))
    batches = Batches(store, (0,), (1, 2, 3), rules, 37, DataConfig(page_rows=256, buffer_mib=3), seed=2)
    assert batches.streams[0].order.per_epoch == 1  # all of it fits
    row_bytes = 4 * D * 2  # one source and three targets in bfloat16
    order = ordered(np.arange(100_001), 256, (3 << 20) // 2 // row_bytes, 0, 43)
    sizes = [len(order.buffer(number)[0]) for number in range(order.per_epoch)]
    assert sum(sizes) == 100_001 and 2 * max(sizes) * row_bytes <= 3 << 20
    assert order.per_epoch == -(-100_001 // (28086 - 215))
    assert max(sizes) - min(sizes) <= 2 * 215  # even
    batches.close()


def test_buffers_are_full_where_few_rows_of_a_block_are_used():
    """One of 20 rows, as text in prompts with images: pages are small, and as many more are in a buffer."""
    rows = np.arange(0, 400_000, 20)
    order = ordered(rows, 256, 5000, 0, 128)
    sizes = [len(order.buffer(number)[0]) for number in range(order.per_epoch)]
    assert len(sizes) == 5 and sum(sizes) == len(rows) and 3900 < min(sizes) <= max(sizes) <= 5000


@pytest.mark.parametrize(("page_rows", "block"), [(10**9, 128), (4, 128), (300, 128)])
def test_pages_of_any_size(page_rows: int, block: int):
    """Also where a page is larger than a buffer, or than all there are."""
    order = ordered(np.arange(1, 3001, 3), page_rows, 200, 0, block)
    whole = stream(order, 0, 2000)
    assert sorted(whole[:1000]) == sorted(whole[1000:]) == order.rows.tolist()


def test_two_streams_share_the_memory(monkeypatch, store: ActivationStore):
    """Of a buffer of 3 MiB / 2, each stream has what its share of a batch is."""
    asked = []

    class Noted(Order):
        def __init__(self, rows, places, page_rows, buffer_rows, *others) -> None:
            asked.append((page_rows, buffer_rows))
            super().__init__(rows, places, page_rows, buffer_rows, *others)

    monkeypatch.setattr("cltjax.batches.Order", Noted)
    most = (3 << 20) // 2 // (4 * D * 2)
    for share, size in ((None, 37), (0.25, 40)):
        rules = token_rules(store, (0,), (1, 2, 3), TokensConfig(image_share=share))
        Batches(store, (0,), (1, 2, 3), rules, size, DataConfig(buffer_mib=3), 0).close()
    assert asked == [(256, most), (256, most * 30 // 40), (128, most * 10 // 40)]


@pytest.mark.parametrize("share", [None, 0.3])
def test_small_pages_are_said_with_the_buffer_that_has_large_ones(monkeypatch, store: ActivationStore, share):
    """Followed, the advice gives whole pages; one MiB less does not. (Rows are made 1000 times as wide.)"""
    monkeypatch.setattr(ActivationStore, "packed_shape", lambda _, n, layers: ((n, len(layers), D), np.dtype("V2000")))
    rules = rules_of(store, image_share=share)

    def batches(data: DataConfig) -> Batches:
        found = Batches(store, (0, 2), (3, 1), rules, 40, data, 0)
        found.close()
        return found

    advice = batches(DataConfig(buffer_mib=3)).advice()
    assert advice is not None
    said = re.search(r"a page is 1/3 of a block of 43 rows, .* --data.buffer-mib (\d+) makes", advice)
    assert said
    for less, whole in ((0, True), (1, False)):
        enough = batches(DataConfig(buffer_mib=int(said[1]) - less))
        assert (min(one.order.blocks for one in enough.streams) == 1) == whole
        assert enough.advice() is None or not whole
    assert batches(DataConfig(page_rows=64, buffer_mib=3)).advice() is None
    assert batches(DataConfig(page_rows=8, buffer_mib=3)).advice() is None  # asked for


def test_pages_shrink_where_a_buffer_would_hold_few():
    assert [page_size(rows) for rows in (10**6, 8192, 8191, 4096, 2000, 513, 511, 100, 1)] == [
        *(256, 256, 128, 128, 32, 16, 16, 16, 16)
    ]


def test_a_store_without_train_rows(tmp_path: Path, store: ActivationStore):
    untrained = synthetic_store(tmp_path / "s", rows=60, layers=2, d=3, splits=("test",))
    rules = token_rules(untrained, (0,), (1,), TokensConfig(), NormLimits((1e9,), (1e9,)))
    with pytest.raises(UserError, match="no train rows"):
        Batches(untrained, (0,), (1,), rules, 5, DataConfig(), 0)
    rules = rules_of(store, outlier_factor=1e-9)
    with pytest.raises(UserError, match=r"--tokens options, which leave out [\d,]+ outlier"):
        Batches(store, (0,), (1,), rules, 5, DataConfig(), 0)


def test_split_batches_are_the_whole_split(store: ActivationStore):
    wiring = wire("all", store.n_layers, 1, 16)
    group = rules_of(store).group
    found = list(split_batches(store, wiring.sources, wiring.targets, group, "test", size=41))
    rows = store.rows_of("test")
    x, groups = np.concatenate([batch.x for batch, _ in found]), np.concatenate([m for _, m in found])
    np.testing.assert_array_equal(x, store.read("site", rows, wiring.sources))
    np.testing.assert_array_equal(groups, group[rows])
    assert set(groups) == {0, 1, 2}


@pytest.mark.parametrize("most", [1, 50, 97, 131, 10**6])
def test_at_most_so_many_rows_from_all_over_the_split(store: ActivationStore, most: int):
    rows = store.rows_of("test")
    sample = sample_rows(rows, most, store.block_rows)
    found = list(row_batches(store, (0, 2), (1,), np.arange(store.rows), sample, 41))
    chosen = np.concatenate([group for _, group in found])
    assert np.all(np.diff(chosen) > 0) and np.isin(chosen, rows).all()
    np.testing.assert_array_equal(rows_in(store, Batch(np.concatenate([b.x for b, _ in found]), found[0][0].y)), chosen)
    assert min(most, len(rows)) - store.block_rows < len(chosen) <= most
    if 3 * store.block_rows < most < len(rows):
        assert chosen[0] == rows[0] and chosen[-1] >= np.quantile(rows, 0.6)


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
