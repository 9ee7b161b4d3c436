"""Runs that build on runs: other meshes, frozen earlier runs, fine-tuning; and every rule from start to figures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stores import synthetic_store
from test_training import LAYERS, D, small

from cltjax.checkpoint import Checkpoints, read_lines
from cltjax.config import EvaluateConfig, LogConfig, ModelConfig, SparsityConfig
from cltjax.errors import UserError
from cltjax.evaluation import evaluate, train_and_measure
from cltjax.runs import load
from cltjax.store import ActivationStore
from cltjax.training import train

SELDOM = LogConfig(every=50, checkpoint_every=1000)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return synthetic_store(tmp_path_factory.mktemp("runs") / "store", rows=8009, layers=LAYERS, d=D)


def on_mesh(store: ActivationStore, out: Path, mesh: str, **options):
    sizes = {"batch_size": 48, "model": ModelConfig(features=40, k=3), "log": LogConfig(every=1, checkpoint_every=3)}
    return small(store, out, **{**sizes, "mesh": mesh, **options})


@pytest.mark.parametrize("later", ["1x1", "8x1"])
def test_a_checkpoint_goes_on_with_another_mesh(store: ActivationStore, tmp_path: Path, later: str):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train(on_mesh(store, straight, "2x4"))
    train(on_mesh(store, moved, "2x4"), stop_after=4)  # three steps are in its checkpoint
    train(on_mesh(store, moved, later))
    losses = [[record["loss"] for record in read_lines(run / "metrics.jsonl")] for run in (straight, moved)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(losses[0]) == 6 and losses[0][0] > losses[0][-1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mesh": "2x"}, "DATAxMODEL"),
        ({"mesh": "3x3"}, "needs 9 devices: there are 8"),
        ({"mesh": "1x7"}, "--model.features 40 does not divide"),
        ({"mesh": "5x1"}, "--batch-size 48 does not divide"),
        ({"microbatches": 7}, "--microbatches 7"),
        ({"model": ModelConfig(40, (3, 4))}, "2 numbers for 3 sources"),
        ({"target_weights": (1.0,)}, "1 numbers for 3 targets"),
    ],
)
def test_what_cannot_be_split_is_one_line(store: ActivationStore, tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        train(on_mesh(store, tmp_path / "run", **{"mesh": "1x1", **options}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", ["topk", "topk_joint", "batchtopk", "jumprelu", "relu"])
def test_every_rule_trains_resumes_and_is_measured(store: ActivationStore, tmp_path: Path, rule: str):
    """Also with microbatches, annealing and both remedies for dead features."""
    sparsity = SparsityConfig(penalty=0.02, k_start=2, revive=1e-3, auxk=0.03, auxk_features=5, dead_after=300)
    model = ModelConfig(64, 6, rule)  # type: ignore[arg-type]
    settings = {"steps": 200, "batch_size": 96, "lr": 1e-2, "microbatches": 2, "model": model, "sparsity": sparsity}
    config = small(store, tmp_path / "run", **settings, offset=0, log=LogConfig(every=50, checkpoint_every=70))
    train(config, stop_after=100)
    train_and_measure(config)
    figures = evaluate(EvaluateConfig(tmp_path / "run", store.path))
    assert figures["fvu"]["all"] < 0.8
    if rule in ("topk_joint", "batchtopk"):  # calibrated on val, measured on test
        assert figures["l0"] == pytest.approx(6, rel=0.1)
        assert (np.asarray(load(tmp_path / "run").clt.cut[...]) > 0).all()
    else:
        assert 0.5 < figures["l0"] <= (6 if rule == "topk" else 24)


def test_backfitting_a_layer_on_what_a_frozen_one_leaves(store: ActivationStore, tmp_path: Path):
    """The figures of the second run are those of both together, and better than the first alone."""
    settings = {"steps": 300, "batch_size": 96, "lr": 1e-2, "offset": 0, "model": ModelConfig(64, 6), "log": SELDOM}
    first = small(store, tmp_path / "first", layer="1", **settings)
    train_and_measure(first)
    alone = evaluate(EvaluateConfig(tmp_path / "first", store.path))["targets"]["3"]["all"]["fvu"]
    second = small(store, tmp_path / "second", layer="3", given=(tmp_path / "first",), **settings)
    train_and_measure(second)
    both = evaluate(EvaluateConfig(tmp_path / "second", store.path))["targets"]["3"]["all"]
    assert both["fvu"] < 0.8 * alone and both["slope"] == pytest.approx(1, abs=0.1)
    # On what the first leaves, or beside it: not the same as predicting everything again.
    unaware = small(store, tmp_path / "unaware", layer="3", **settings)
    train_and_measure(unaware)
    weights = [load(tmp_path / name).clt.W_dec["3"][...] for name in ("second", "unaware")]
    assert not np.allclose(*map(np.asarray, weights), atol=1e-3)
    with pytest.raises(UserError, match="source 1 is in this run and in --given"):
        train(small(store, tmp_path / "x", layer="1", given=(tmp_path / "first",), **settings))
    with pytest.raises(UserError, match="writes to none of the targets"):
        train(
            small(
                store, tmp_path / "x", layer="0", n_targets=1, given=(tmp_path / "first",), **settings | {"offset": 0}
            )
        )


def test_fine_tuning_starts_from_the_weights_of_another_run(store: ActivationStore, tmp_path: Path):
    train(small(store, tmp_path / "first", steps=60, lr=1e-2, log=SELDOM))
    again = small(store, tmp_path / "again", start_from=tmp_path / "first", lr=1e-9, steps=2)
    train(again)
    for name in ("W_enc", "b_dec"):
        before, after = (np.asarray(getattr(load(tmp_path / run).clt, name)[...]) for run in ("first", "again"))
        np.testing.assert_allclose(after, before, atol=1e-7)
    with pytest.raises(UserError, match="another shape: .*W_dec"):
        train(small(store, tmp_path / "other", start_from=tmp_path / "first", model=ModelConfig(31, 3)))


def test_the_best_checkpoint_is_kept_beside_the_last(store: ActivationStore, tmp_path: Path):
    """Weights that get worse: the learning rate rises all the time until the run has to stop."""
    config = small(store, tmp_path / "run", steps=400, warmup=400, decay=0.0, lr=3.0, clip=1e9)
    with pytest.raises(UserError, match=r"(diverged|not finite).*the checkpoint of step \d+ is kept"):
        train(replace(config, log=LogConfig(every=5, checkpoint_every=5)))
    checkpoints = Checkpoints(tmp_path / "run")
    best, last = checkpoints.best(), checkpoints.last()
    checkpoints.close()
    assert best is not None and last is not None and best < last
    for step, trained in ((best, load(tmp_path / "run", best=True)), (last, load(tmp_path / "run"))):
        assert trained.step == step
        assert np.isfinite(np.asarray(trained.clt.W_enc[...])).all()
