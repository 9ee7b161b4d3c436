"""Rows that stay on the devices: what is trained is what it is without."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from cltjax.batches import Batches
from cltjax.config import DataConfig, LogConfig, ModelConfig, TokensConfig, TrainConfig
from cltjax.device_cache import DeviceCache, check_room
from cltjax.distributed import make_mesh, own_positions, place_batch
from cltjax.errors import UserError
from cltjax.estimate import ModelShape, assumed_rates, estimate, shape_of_store
from cltjax.store import ActivationStore
from cltjax.tokens import token_rules
from cltjax.training import train
from cltjax.wiring import wire
from stores import synthetic_store

LAYERS, D = 4, 13
RATES = assumed_rates("float32")


def held(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> ActivationStore:
    return synthetic_store(tmp_path_factory.mktemp("cache") / dtype, rows=9001, layers=LAYERS, d=D, dtype=dtype)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return held(tmp_path_factory, "bfloat16")


@pytest.fixture(scope="module")
def int8_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return held(tmp_path_factory, "int8")


def config(store: ActivationStore, out: Path, **options) -> TrainConfig:
    """Nine steps of a tiny joint CLT, in which rows come from more than one buffer."""
    settings = {
        "steps": 9,
        "batch_size": 404,
        "lr": 4e-3,
        "model": ModelConfig(features=26, k=3),
        "data": DataConfig(page_rows=7, buffer_mib=1),
        "log": LogConfig(every=2, checkpoint_every=4),
    }
    return TrainConfig(**{"layer": "all", "store": store.path, "out": out, **settings, **options})


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("mesh, microbatches, image_share", [("1x1", 1, None), ("2x2", 2, 0.25)])
def test_batches_are_those_that_are_read(request, dtype, mesh, microbatches, image_share):
    store = request.getfixturevalue("store" if dtype == "bfloat16" else "int8_store")
    wiring = wire("all", LAYERS, 0, 4)
    tokens = TokensConfig(image_share=image_share)
    rules = token_rules(store, wiring.sources, wiring.targets, tokens)
    shape = make_mesh(mesh), 404, microbatches
    own = own_positions(*shape)
    batches = Batches(store, wiring.sources, wiring.targets, rules, 404, DataConfig(page_rows=7, buffer_mib=1), 3, own)
    assert any(stream.order.per_epoch > 1 for stream in batches.streams)
    cache = DeviceCache(batches, *shape)
    assert cache.rows.tolist() == sorted(rules.rows("train"))
    for step in (0, 1, 2, 19, 5):
        wanted, found = place_batch(batches(step), *shape), cache.batch(cache.places(step))
        for one, other in zip(wanted, found, strict=True):
            assert one.dtype == other.dtype and one.sharding == other.sharding
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    batches.close()
    run = TrainConfig("all", offset=0, n_targets=4, model=ModelConfig(26, 3), device_cache=True)
    needed = estimate(run, shape_of_store(store.path), RATES).memory["train rows"]
    assert needed == len(store.rows_of("train")) * batches.row_bytes >= sum(table.nbytes for table in cache.table)


def test_all_processes_keep_the_same_rows(store):
    """Also one whose part of a batch has no image token."""
    wiring = wire("all", LAYERS, 0, 4)
    rules = token_rules(store, wiring.sources, wiring.targets, TokensConfig(image_share=0.02))
    kept = []
    for own in (slice(0, 32), slice(32, 64)):
        batches = Batches(store, wiring.sources, wiring.targets, rules, 64, DataConfig(), 3, own)
        kept.append((len(batches.streams), batches.train_rows.tolist()))
        batches.close()
    assert sorted(streams for streams, _ in kept) == [1, 2] and kept[0][1] == kept[1][1]


def test_an_estimate_has_to_know_the_rows():
    run = TrainConfig("0", model=ModelConfig(26, 3), device_cache=True)
    with pytest.raises(UserError, match="--device-cache keeps as many rows as the store has: name --store"):
        estimate(run, ModelShape(n_layers=3, d_model=5), RATES)


def test_a_run_is_the_same_and_goes_on_without_it(store, tmp_path: Path):
    """Both ways: begun with the cache and ended without, and the reverse."""
    plain = train(config(store, tmp_path / "plain"))
    for name, first in (("begun", True), ("ended", False)):
        other = config(store, tmp_path / name, device_cache=first)
        train(other, stop_after=6)
        train(replace(other, device_cache=not first))
        assert (tmp_path / name / "metrics.jsonl").read_text() == (plain / "metrics.jsonl").read_text()


def test_rows_are_read_once(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In pieces, the last of which is smaller; and the steps are timed as ever."""
    monkeypatch.setattr("cltjax.device_cache.PIECE_BYTES", 1 << 17)
    pieces, read, first = [], Batches.read, Batches.__call__

    def counted(self: Batches, rows: np.ndarray):
        pieces.append(len(rows))
        return read(self, rows)

    def never(self: Batches, step: int):
        raise AssertionError(f"step {step} was read from the store")

    monkeypatch.setattr(Batches, "read", counted)
    monkeypatch.setattr(Batches, "__call__", never)
    cached = train(config(store, tmp_path / "cached", device_cache=True))
    assert pieces[0] == 1 and len(pieces) > 4 and len(set(pieces[1:])) == 2
    monkeypatch.setattr(Batches, "__call__", first)
    plain = train(config(store, tmp_path / "plain"))
    assert (cached / "metrics.jsonl").read_text() == (plain / "metrics.jsonl").read_text()


def test_what_does_not_fit_is_one_line():
    full = Mock(memory_stats=lambda: {"bytes_limit": 5 << 30, "bytes_in_use": 2 << 30})
    silent = Mock(memory_stats=lambda: None)
    check_room(3 << 30, 17, Mock(local_devices=[silent, full]))
    with pytest.raises(
        UserError, match=r"--device-cache: 1,017 train rows are 3\.5 GiB, .* has 3\.0 GiB left: leave it out"
    ):
        check_room(7 << 29, 1017, Mock(local_devices=[silent, full]))
