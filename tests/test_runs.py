"""Runs that build on runs: other meshes, frozen earlier runs, fine-tuning; and every rule from start to figures."""

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cltjax import evaluation, training
from cltjax.axes import ALONE
from cltjax.batches import Batch, split_batches
from cltjax.checkpoint import Checkpoints, read_lines
from cltjax.config import EvaluateConfig, LogConfig, ModelConfig, SparsityConfig, TokensConfig
from cltjax.distributed import make_mesh
from cltjax.errors import UserError
from cltjax.evaluation import evaluate, ridge_bytes, train_and_measure
from cltjax.loss import STEERING
from cltjax.metrics import mean_fvu, measure
from cltjax.normalisation import blank
from cltjax.ridge import fit_ridge, sum_moments
from cltjax.runs import freeze, input_layers, load, start_of
from cltjax.step import Frozen
from cltjax.store import ActivationStore
from cltjax.tokens import token_rules
from cltjax.training import train
from cltjax.wiring import wire
from stores import synthetic_store
from test_training import LAYERS, D, small

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
    lines = [read_lines(run / "metrics.jsonl") for run in (straight, moved)]
    losses = [[record["loss"] for record in of if "loss" in record] for of in lines]
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
    sparse: dict[str, Any] = {"penalty": 0.02} if rule == "jumprelu" else {"k_start": 2}
    sparsity = SparsityConfig(**sparse, revive=1e-3, auxk=0.03, auxk_features=5, dead_after=300)
    model = ModelConfig(64, 6, rule)  # type: ignore[arg-type]
    settings = {"steps": 200, "batch_size": 96, "lr": 1e-2, "microbatches": 2, "model": model, "sparsity": sparsity}
    if rule == "relu":  # the penalty takes its time to reach k
        settings["steps"] = 600
    config = small(store, tmp_path / "run", **settings, offset=0, log=LogConfig(every=50, checkpoint_every=70))
    train(config, stop_after=100)
    train_and_measure(config)
    figures = evaluate(EvaluateConfig(tmp_path / "run", store.path))
    assert figures["fvu"]["all"] < 0.8
    if rule in ("topk_joint", "batchtopk"):  # calibrated on val, measured on test
        assert figures["l0"] == pytest.approx(6, rel=0.1)
        assert (np.asarray(load(tmp_path / "run").clt.cut[...]) > 0).all()
    else:
        assert 0.5 < figures["l0"] <= {"topk": 6, "relu": 12, "jumprelu": 24}[rule]


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


def test_a_given_run_takes_part_with_all_its_features(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """And not only with as many as it had slots for: what others are trained beside is what is measured."""
    model = ModelConfig(64, 6, "batchtopk", slots=8)
    train(small(store, tmp_path / "first", layer="0", steps=100, batch_size=96, lr=1e-2, model=model, log=SELDOM))
    seen, real = [], training.make_step
    monkeypatch.setattr(training, "make_step", lambda *args, **more: seen.append(args[3]) or real(*args, **more))
    capsys.readouterr()
    train(small(store, tmp_path / "second", layer="1", steps=2, given=(tmp_path / "first",)))
    ((frozen,),) = seen
    first, second = (load(tmp_path / name).clt for name in ("first", "second"))
    arrays, rows = nnx.state(first), token_rules(store, (1, 0), (2, 3), TokensConfig()).rows("train")[:2000]
    x = jnp.asarray(store.read("site", rows, (1, 0)))
    whole = np.asarray(frozen.contributions(arrays, x, second, ALONE, True))

    def differing(one: Frozen) -> float:
        written = np.asarray(one.contributions(arrays, x, second, ALONE, False))
        return float((np.abs(written - whole).max((1, 2)) > 1e-5 * np.abs(whole).max()).mean())

    assert differing(replace(frozen, slots=None)) > 0.02 and differing(frozen) < 0.002
    most = int(np.asarray(first.codes(x[:, 1:]) > 0).sum(-1).max())
    assert 8 < frozen.slots <= -(-most // 8) * 8
    assert f"given runs: up to {frozen.slots} features of a token and source" in capsys.readouterr().out


def whole_fvu(store: ActivationStore, runs: list[Path]) -> float:
    """Mean test FVU of several runs' predictions added up, over the targets of the first."""
    first, *others = map(load, runs)
    wiring = first.clt.wiring
    frozen, arrays = freeze(wiring, others)
    inputs = input_layers(wiring, others)
    rules = token_rules(store, inputs, wiring.targets, first.config.tokens)
    batches = split_batches(store, inputs, wiring.targets, rules.group, "test")
    fit = measure(first.clt, batches, rules.used_groups, frozen, arrays).fit
    return mean_fvu(fit.figures(wiring.targets, rules.used_groups))["all"]


def test_one_round_of_backfitting(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three layers in turn, then each again on what the latest of the others leave. A given run brings no other."""
    settings = {"steps": 300, "batch_size": 96, "lr": 1e-2, "model": ModelConfig(64, 6), "log": SELDOM}
    a, b, c, a2, b2, c2 = (tmp_path / name for name in ("a", "b", "c", "a2", "b2", "c2"))
    train(small(store, a, layer="0", **settings))
    train(small(store, b, layer="1", given=(a,), **settings))
    train(small(store, c, layer="2", given=(a, b), **settings))
    before = whole_fvu(store, [a, b, c])
    assert before < whole_fvu(store, [a, b]) < whole_fvu(store, [a])
    train(small(store, a2, layer="0", given=(b, c), start_from=a, **settings))
    train(small(store, b2, layer="1", given=(a2, c), start_from=b, **settings))
    train(small(store, c2, layer="2", given=(b2, a2), start_from=c, **settings))
    after = whole_fvu(store, [a2, b2, c2])
    assert after < before

    restored = []
    real = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda self, *rest: restored.append(self) or real(self, *rest))
    figures = evaluate(EvaluateConfig(c2, store.path))
    assert sorted(one.folder.parent.name for one in restored) == ["a2", "b2", "c2"]
    assert figures["fvu"]["all"] == pytest.approx(whole_fvu(store, [c2, a2, b2]), rel=1e-5)  # of this run's own targets


def test_given_runs_are_pinned(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To their weights, not to where they lie or how they are named."""
    monkeypatch.chdir(tmp_path)
    first, second, run = Path("first"), Path("second"), Path("run")
    pair = (first, second)
    train(small(store, first, layer="0"), stop_after=4)
    train(small(store, second, layer="1"))
    with pytest.raises(UserError, match="given run .*first is unfinished, at step 3 of 6"):
        train(small(store, run, layer="2", given=pair))
    assert not run.exists()
    train(small(store, first, layer="0"))
    train(small(store, run, layer="2", given=pair))
    found = json.loads((run / "config.json").read_text())
    assert found["config"]["given"] == [str(tmp_path / name) for name in pair]
    assert found["data"]["given_runs"]["L0"] == {
        "run": str(tmp_path / "first"),
        "step": 6,
        "digest": load(first).digest,
    }
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    figures = evaluate(EvaluateConfig(Path("../run"), store.path))
    monkeypatch.chdir(tmp_path)

    first.rename("moved")
    with pytest.raises(UserError, match="run needs the given run .*first, which is not there"):
        evaluate(EvaluateConfig(run, store.path))
    with pytest.raises(UserError, match="run needs the given run .*first, which is not there"):
        train(small(store, run, layer="2", given=pair))
    train(small(store, run, layer="2", given=(second, Path("moved"))))  # it is the same run
    assert evaluate(EvaluateConfig(run, store.path)) == figures

    shutil.rmtree(second)
    train(small(store, second, layer="1", seed=1))
    with pytest.raises(UserError, match="was trained with the given run .*second, which has changed since"):
        evaluate(EvaluateConfig(run, store.path))
    for given, field in (((Path("moved"), second), "L1.digest"), ((Path("moved"),), "L1")):
        with pytest.raises(UserError, match=f"run holds another run .*given_runs.{field}: "):
            train(small(store, run, layer="2", given=given))
    # A run follows from what it was given: with another one it is another one.
    digest = load(run).digest
    shutil.rmtree(run)
    train(small(store, run, layer="2", given=(Path("moved"), second)))
    assert load(run).digest != digest


def test_a_run_that_is_started_from_is_pinned(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To its weights, not to where it lies; and what goes on from a checkpoint needs it no more."""
    monkeypatch.chdir(tmp_path)
    first, run = Path("first"), Path("run")
    again = {"layer": "0", "start_from": first}
    train(small(store, first, layer="0"))
    train(small(store, run, **again), stop_after=4)
    pin = {"run": str(tmp_path / "first"), "step": 6, "digest": load(first).digest}
    found = json.loads((run / "config.json").read_text())
    assert found["data"]["start_run"] == pin and found["config"]["start_from"] == pin["run"]

    train(small(store, run, **again | {"start_from": tmp_path / "first"}), stop_after=5)
    first.rename("moved")
    train(small(store, run, **again), stop_after=5)  # gone
    with pytest.raises(UserError, match="elsewhere is no run directory"):
        train(small(store, run, **again | {"start_from": Path("elsewhere")}))
    train(small(store, run, **again | {"start_from": Path("moved")}), stop_after=5)
    with pytest.raises(UserError, match=r"first is no run directory"):
        train(small(store, Path("another"), **again))  # has nothing to go on from

    digest = load(run).digest
    train(small(store, first, layer="0", seed=1))
    with pytest.raises(UserError, match=r"run holds another run \(data start_run.digest: "):
        train(small(store, run, **again))
    with pytest.raises(UserError, match=r"run holds another run \(data start_run: {.*} -> null"):
        train(small(store, run, layer="0"))
    # A run follows from what it started from: with another one it is another one.
    shutil.rmtree(run)
    train(small(store, run, **again), stop_after=4)
    assert load(run).step == 3 and load(run).digest != digest
    with pytest.raises(UserError, match="first is being trained"):
        start_of(pin | {"run": str(first), "step": 3}, blank(wire("0", LAYERS, 1, 16), D), make_mesh("1x1"))


def test_fine_tuning_starts_from_the_weights_of_another_run(store: ActivationStore, tmp_path: Path):
    train(small(store, tmp_path / "first", steps=60, lr=1e-2, log=SELDOM))
    train(small(store, tmp_path / "again", start_from=tmp_path / "first", lr=1e-30, steps=2))
    before, after = (load(tmp_path / run).clt for run in ("first", "again"))
    for name in ("W_enc", "b_enc", "b_dec"):
        assert (np.asarray(getattr(after, name)[...]) == np.asarray(getattr(before, name)[...])).all()


@pytest.mark.parametrize("penalty", [None, 0.02])
def test_fine_tuning_goes_on_with_the_penalty_that_was_steered(store: ActivationStore, tmp_path: Path, penalty):
    """Else more features would be active until it is found again. One that is given is as it is given."""
    settings = {"model": ModelConfig(29, 4, "relu"), "log": LogConfig(every=1, checkpoint_every=1000)}
    train(small(store, tmp_path / "first", steps=60, lr=1e-2, **settings))
    sparsity = SparsityConfig(penalty=penalty)
    train(small(store, tmp_path / "again", start_from=tmp_path / "first", steps=2, sparsity=sparsity, **settings))
    before = load(tmp_path / "first").penalty
    first = read_lines(tmp_path / "again" / "metrics.jsonl")[0]
    assert before is not None and (np.asarray(before.weight) != STEERING["relu"].first).all()
    if penalty is None:
        assert first["penalty_by_source"] == np.asarray(before.weight).tolist()
    else:
        assert "penalty_by_source" not in first and load(tmp_path / "again").penalty is None


@pytest.mark.parametrize("rule, later", [("topk", "topk"), ("jumprelu", "jumprelu"), ("batchtopk", "relu")])
def test_fine_tuning_on_another_store_starts_from_the_same_function(
    store: ActivationStore, tmp_path: Path, rule: str, later: str
):
    """In raw units, whatever means and scales inputs and targets have there."""
    other = synthetic_store(tmp_path / "other", rows=1511, layers=LAYERS, d=D, seed=1)
    first = small(store, tmp_path / "first", steps=60, lr=1e-2, log=SELDOM, model=ModelConfig(29, 4, rule))  # type: ignore[arg-type]
    train(first)
    model, tokens = ModelConfig(29, 4, later), TokensConfig(special=True, image_share=0.2)  # type: ignore[arg-type]
    options = {"start_from": tmp_path / "first", "lr": 1e-30, "steps": 2, "model": model, "tokens": tokens}
    train(small(other, tmp_path / "again", **options))
    before, after = (load(tmp_path / run).clt for run in ("first", "again"))
    if rule != later:
        before.activation, before.slots = later, after.slots
    ratios = [np.asarray(getattr(after, name)[...] / getattr(before, name)[...]) for name in ("in_std", "out_std")]
    assert all(np.abs(ratio - 1).min() > 1e-3 and np.ptp(ratio) > 1e-3 for ratio in ratios)
    x = other.read("site", np.arange(300), before.wiring.sources)
    expected, found = np.asarray(before(x)), np.asarray(after(x))
    assert np.ptp(expected, axis=0).min() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "here, message",
    [
        ({"model": ModelConfig(31, 3)}, "--model.features 29, this run 31"),
        ({"model": ModelConfig(29, 3, "jumprelu")}, "--model.activation topk, this run jumprelu"),
        ({"layer": "0"}, "other sources and targets: --layer 1 --offset 1 .*; here --layer 0 --offset 1 "),
        ({"offset": 2}, "other sources and targets"),
        ({"n_targets": 1}, "other sources and targets"),
        ({"start_from": "thresholds"}, "--model.activation jumprelu, this run topk"),
        ({"start_from": "nothing"}, "is no run directory"),
        ({"store": "wide"}, r"trained on a store with model.d_model 13, this one has 11"),
        ({"store": "deep"}, r"trained on a store with model.n_layers 4, this one has 5"),
    ],
)
def test_what_cannot_be_started_from_is_one_line(
    store: ActivationStore, starts: Path, tmp_path: Path, here: dict, message: str
):
    paths = {name: starts / here.get(name, default) for name, default in (("store", store.path), ("start_from", "run"))}
    with pytest.raises(UserError, match=message) as error:
        train(small(store, tmp_path / "run", **{"layer": "1", **here, **paths}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def starts(store: ActivationStore, tmp_path_factory) -> Path:
    """Two runs of layer 1, and stores of other models."""
    folder = tmp_path_factory.mktemp("starts")
    train(small(store, folder / "run", layer="1"))
    train(small(store, folder / "thresholds", layer="1", model=ModelConfig(29, 3, "jumprelu")))
    synthetic_store(folder / "wide", rows=500, layers=LAYERS, d=11)
    synthetic_store(folder / "deep", rows=500, layers=5, d=D)
    return folder


def test_the_best_checkpoint_is_kept_beside_the_last(store: ActivationStore, tmp_path: Path, capsys):
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
    figures = [evaluate(EvaluateConfig(tmp_path / "run", store.path, best=which)) for which in (True, False)]
    assert [(by["checkpoint"], by["step"], by["steps"]) for by in figures] == [("best", best, 400), ("last", last, 400)]
    assert figures[0]["fvu"]["all"] < figures[1]["fvu"]["all"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == last
    said = capsys.readouterr().out
    assert f"best val FVU: step {best} of 400" in said and f"unfinished: step {last} of 400" in said


def test_without_val_figures_no_checkpoint_is_the_best(store: ActivationStore, tmp_path: Path):
    train(small(store, tmp_path / "run", log=LogConfig(every=2, checkpoint_every=3, val_rows=0)))
    with pytest.raises(UserError, match="no val FVU was measured"):
        evaluate(EvaluateConfig(tmp_path / "run", store.path, best=True))


def test_figures_on_another_store_are_not_the_runs_own(store: ActivationStore, tmp_path: Path, capsys):
    run = tmp_path / "run"
    config = small(store, run)
    train_and_measure(config)
    assert "unfinished" not in capsys.readouterr().out

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in run.rglob("*") if path.suffix in (".json", ".png")}

    before = files()
    other = synthetic_store(tmp_path / "others", rows=1009, layers=LAYERS, d=D, seed=1)
    figures = evaluate(EvaluateConfig(run, other.path))
    (written,) = run.glob("metrics-others-*.json")
    assert json.loads(written.read_text()) == figures and figures["rows"] < 300
    assert files() == before | {str(written): written.read_bytes()}
    said = capsys.readouterr().out
    assert "FVU on" in said and "another store" in said and "plots" not in said
    shutil.move(store.path, tmp_path / "moved")  # the same store at another place
    try:
        assert (
            evaluate(EvaluateConfig(run, tmp_path / "moved"))["fvu"]
            == json.loads(before[str(run / "metrics.json")])["fvu"]
        )
    finally:
        shutil.move(tmp_path / "moved", store.path)
    assert not list(run.glob("metrics-moved*.json"))


def test_figures_of_ridge_stay_until_the_run_is_another(store: ActivationStore, tmp_path: Path, capsys):
    run = tmp_path / "run"
    config = small(store, run, layer="0")
    train_and_measure(config)
    ridge = evaluate(EvaluateConfig(run, store.path, ridge=True))["ridge"]
    capsys.readouterr()
    train_and_measure(config)  # finished: nothing is trained
    assert json.loads((run / "metrics.json").read_text())["ridge"] == ridge
    assert "ridge" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    train_and_measure(replace(config, seed=1))
    assert "ridge" not in json.loads((run / "metrics.json").read_text())


def test_ridge_that_would_not_be_right_or_not_fit_is_one_line(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(small(store, tmp_path / "first", layer="0"))
    train(small(store, tmp_path / "second", layer="1", given=(tmp_path / "first",)))
    with pytest.raises(UserError, match="--ridge is for runs without given ones"):
        evaluate(EvaluateConfig(tmp_path / "second", store.path, ridge=True))
    monkeypatch.setattr(evaluation, "RIDGE_SHARE", 1e-9)
    with pytest.raises(UserError, match="--ridge from 1 sources needs about 0.0 GiB, of "):
        evaluate(EvaluateConfig(tmp_path / "first", store.path, ridge=True))


@pytest.mark.parametrize("layers, n_targets", [("0", 5), ("all", 2), ("all", 5)])
def test_memory_that_ridge_takes(layers: str, n_targets: int):
    """Against what numpy asks for; LAPACK's own workspace is beside that."""
    width, wiring, rng = 97, wire(layers, 6, 1, n_targets), np.random.default_rng(0)
    S, T = len(wiring.sources), len(wiring.targets)
    scales = blank(wiring, width)
    scales.in_std[:], scales.out_std[:] = 1, 1
    rows = Batch(*(rng.normal(size=(61, n, width)).astype(np.float32) for n in (S, T)))
    tracemalloc.start()
    moments = [sum_moments([(rows, np.zeros(61, np.uint8))], scales, (0,)) for _ in range(2)]
    fit_ridge(wiring, *moments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.6 < peak / ridge_bytes(wiring, width) < 1.05
