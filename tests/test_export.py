"""From trained runs to a CLT directory, and its figures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cltjax.circuit_tracer import write_circuit_tracer
from cltjax.cli import Export, main
from cltjax.clt_directory import CLTDirectory
from cltjax.config import EvaluateConfig, LogConfig, ModelConfig
from cltjax.errors import UserError
from cltjax.evaluation import evaluate, train_and_measure
from cltjax.export import export
from cltjax.replacement import clt as torch_clt
from cltjax.store import ActivationStore
from cltjax.tokens import rules_of_clt
from cltjax.training import train
from stores import synthetic_store
from test_circuit_tracer import with_kind, written
from test_training import LAYERS, D, small

SELDOM = LogConfig(every=50, checkpoint_every=1000)
APART = {"offset": 0, "n_targets": 16, "steps": 150, "batch_size": 128, "lr": 1e-2, "warmup": 10, "log": SELDOM}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return synthetic_store(tmp_path_factory.mktemp("export") / "store", rows=8009, layers=LAYERS, d=D)


@pytest.fixture(scope="module")
def apart(store: ActivationStore, tmp_path_factory) -> list[Path]:
    """Three sources that were each trained as if there were no others."""
    folder = tmp_path_factory.mktemp("apart")
    return [train(small(store, folder / f"L{layer}", layer=str(layer), **APART)) for layer in (0, 1, 3)]


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "jumprelu"])
def test_a_run_and_its_export_have_the_same_figures(store: ActivationStore, tmp_path: Path, rule):
    run, out = tmp_path / "run", tmp_path / "clt"
    train_and_measure(small(store, run, model=ModelConfig(64, 6, rule)))
    export([run], out, dtype="float32")
    of_run = json.loads((run / "metrics.json").read_text())
    of_directory = evaluate(EvaluateConfig(out, store.path))
    for target, by in of_run["targets"].items():
        for group, figures in by.items():
            assert of_directory["targets"][target][group] == pytest.approx(figures, rel=1e-4, abs=1e-6)
    assert of_directory["l0"] == pytest.approx(of_run["l0"], rel=1e-3)
    described = CLTDirectory.open(out).description
    assert described.combined == "joint" and described.activation.trained_as == rule
    assert described.metrics == of_run and described.site == "mlp_in" and described.model["id"] == "synthetic"
    assert described.training[0]["steps_done"] == 6
    assert len(list(out.glob("metrics-store-*.json"))) == 1
    CLTDirectory.open(out)  # figures beside the weights are no fault


def test_rounding_to_bfloat16_changes_little(store: ActivationStore, tmp_path: Path):
    run = train(small(store, tmp_path / "run", **APART | {"steps": 300}))
    found = {}
    for dtype in ("float32", "bfloat16"):
        export([run], tmp_path / dtype, dtype=dtype)  # type: ignore[arg-type]
        found[dtype] = evaluate(EvaluateConfig(tmp_path / dtype, store.path))["fvu"]["all"]
    assert found["float32"] < 0.9 and 0 < abs(found["bfloat16"] - found["float32"]) < 0.002


def test_gains_mend_what_a_naive_sum_counts_twice(store: ActivationStore, apart: list[Path], tmp_path: Path, capsys):
    export(apart, tmp_path / "gains", store=store.path)
    table = capsys.readouterr().out
    export(apart, tmp_path / "none", combine="none", store=store.path)
    found = {}
    for name in ("gains", "none"):
        described = CLTDirectory.open(tmp_path / name).description
        assert described.combined == name and described.sources == (0, 1, 3)
        figures = evaluate(EvaluateConfig(tmp_path / name, store.path))
        assert figures["fvu"]["all"] == pytest.approx(described.metrics["fvu"]["all"], rel=1e-4)
        found[name] = figures
    assert found["gains"]["fvu"]["all"] < 0.9 * found["none"]["fvu"]["all"]
    slopes = {name: [by["all"]["slope"] for by in one["targets"].values()] for name, one in found.items()}
    assert 0.95 < min(slopes["gains"]) < max(slopes["gains"]) < 1.05
    assert min(slopes["none"]) < 0.8  # of the last targets, which have three sources
    described = CLTDirectory.open(tmp_path / "gains").description
    assert set(described.combination["gains"]["3"]) == {"0", "1", "3"}
    # The table is made of moments, the figures of predictions.
    (row,) = [line for line in table.splitlines() if "│ mean" in line]
    naive, mean, single, gains = (float(cell) for cell in row.split("│")[2:-1])
    assert naive == pytest.approx(found["none"]["fvu"]["all"], abs=1e-4)
    assert gains == pytest.approx(found["gains"]["fvu"]["all"], abs=1e-4)
    assert gains < min(mean, single, naive)


def test_gains_that_are_not_negative(store: ActivationStore, apart: list[Path], tmp_path: Path):
    export(apart, tmp_path / "clt", store=store.path, non_negative=True)
    combination = CLTDirectory.open(tmp_path / "clt").description.combination
    gains = [gain for by in combination["gains"].values() for gain in by.values()]
    assert combination["non_negative"] and min(gains) >= 0 and len(gains) == 4 + 3 + 1 + (LAYERS - 4) * 3


def test_backfitted_runs_are_summed_as_they_were_trained(store: ActivationStore, apart: list[Path], tmp_path: Path):
    first, second, _ = apart
    last = tmp_path / "last"
    train_and_measure(small(store, last, layer="3", given=(second, first), **APART))
    export([first, last, second], tmp_path / "clt", store=store.path)
    described = CLTDirectory.open(tmp_path / "clt").description
    assert described.combined == "backfit"
    of_run = json.loads((last / "metrics.json").read_text())["targets"]
    for target, by in of_run.items():  # those that the last run writes to were measured with all three
        assert described.metrics["targets"][target]["all"]["fvu"] == pytest.approx(by["all"]["fvu"], rel=1e-4)
    with pytest.raises(UserError, match="was trained on what other runs leave: name these too"):
        export([last], tmp_path / "alone")
    with pytest.raises(UserError, match="--non-negative is about gains, and there are none with combined = backfit"):
        export([first, last, second], tmp_path / "x", store=store.path, non_negative=True)
    with pytest.raises(UserError, match="--combine backfit: none of these runs"):
        export(apart, tmp_path / "x", combine="backfit", store=store.path)


def test_what_makes_no_clt_is_one_line(store: ActivationStore, apart: list[Path], tmp_path: Path):
    other = train(small(store, tmp_path / "other", layer="2", model=ModelConfig(33, 3), **APART | {"steps": 15}))
    again = train(small(store, tmp_path / "again", layer="0-1", **APART | {"steps": 15}))
    for runs, options, said in (
        ([], {}, "name a run directory"),
        ([tmp_path / "nothing"], {}, "is no run directory"),
        ([apart[0]], {"combine": "gains"}, "--combine gains is for several runs"),
        ([apart[0], other], {}, "--model.features 29 and .*other 33"),
        ([*apart, again], {}, "source 0 is in .*L0 and in .*again"),
        ([apart[0]], {"store": store.path}, "--store is what several runs are combined on, and .*L0 is one: leave it"),
        ([apart[0]], {"non_negative": True}, "--non-negative is about gains, and there are none with combined = joint"),
        (apart, {"non_negative": True, "combine": "none"}, "there are none with combined = none: leave it out"),
    ):
        with pytest.raises(UserError, match=said):
            export(runs, tmp_path / "clt", **options)  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export([apart[0]], tmp_path / "there")
    export([apart[0]], tmp_path / "clt")
    with pytest.raises(UserError, match="--best is for runs"):
        evaluate(EvaluateConfig(tmp_path / "clt", store.path, best=True))


def test_options_of_the_command_are_arguments():
    assert set(vars(Export((Path("runs/L0"),)))) - {"circuit_tracer"} == set(export.__annotations__) - {"return"}


def test_a_store_of_another_model_is_refused(store: ActivationStore, apart: list[Path], tmp_path: Path):
    wider = synthetic_store(tmp_path / "wider", rows=501, layers=LAYERS, d=D + 2)
    export([apart[0]], tmp_path / "clt")
    with pytest.raises(UserError, match=r"d_model"):
        evaluate(EvaluateConfig(tmp_path / "clt", wider.path))
    with pytest.raises(UserError, match=r"d_model"):
        export(apart, tmp_path / "other", store=wider.path)
    assert not np.any([path.name == "other" for path in tmp_path.iterdir()])


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit status of the console script."""
    monkeypatch.setattr("sys.argv", ["cltjax", *map(str, args)])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_to_circuit_tracer_and_back(store, apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A topk CLT gets thresholds under which its mean L0 on val rows is what it was; nothing else changes."""
    assert command(monkeypatch, "export", *apart[:2], "--store", store.path, "--out", tmp_path / "clt") == 0
    assert command(monkeypatch, "export", tmp_path / "clt", "--circuit-tracer", "--out", tmp_path / "tracer") == 2
    assert "name the --store" in capsys.readouterr().err
    to = ("--circuit-tracer", "--out", tmp_path / "tracer", "--store", store.path)
    assert command(monkeypatch, "export", tmp_path / "clt", *to) == 0
    assert command(monkeypatch, "import", tmp_path / "tracer", "--out", tmp_path / "back") == 0
    again = ("--circuit-tracer", "--out", tmp_path / "again")
    assert command(monkeypatch, "export", tmp_path / "back", *again, "--store", store.path) == 2
    said = capsys.readouterr().err
    assert "topk CLT's thresholds" in said and "back is jumprelu: leave it out" in said
    assert command(monkeypatch, "export", tmp_path / "back", *again) == 0
    assert command(monkeypatch, "import", tmp_path / "tracer", "--model", "x", "--out", tmp_path / "named") == 2
    assert "leave --model out" in capsys.readouterr().err
    first, back = (CLTDirectory.open(tmp_path / name) for name in ("clt", "back"))
    assert back.description.activation.kind == "jumprelu" and back.description.wiring == first.description.wiring
    for name, tensors in first:
        for key, value in tensors.items():
            np.testing.assert_array_equal(back.tensors(name)[key], value)
    rows = rules_of_clt(first, store).rows("val")
    for place, source in enumerate(first.description.sources):
        x = torch.from_numpy(store.read("site", rows, (source,))[:, 0].astype(np.float32))
        active = [
            int((torch_clt.CLT.from_pretrained(one.path).encode(source, x).values > 0).sum()) for one in (first, back)
        ]
        assert active[0] == active[1] > len(rows) * first.description.activation.k[place] / 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("a", "b"), "takes one CLT directory"),
        (("a", "--combine", "none"), "--combine is for runs"),
        (("a", "--dtype", "bfloat16"), "--dtype is for runs"),
        (("a",), "is no CLT directory"),
    ],
)
def test_wrong_options_for_circuit_tracer(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "export", *args, "--circuit-tracer", "--out", "x") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_wrong_options_for_import(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    assert command(monkeypatch, "import", tmp_path, "--n-layers", 3) == 2
    assert "--n-layers is for EleutherAI's transcoders" in capsys.readouterr().err
    assert command(monkeypatch, "import", tmp_path / "nothing") == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err


def test_an_import_says_where_the_model_is_not_known(tmp_path, monkeypatch, capsys):
    write_circuit_tracer(written(tmp_path / "clt", with_kind("relu")), tmp_path / "tracer")
    (tmp_path / "tracer" / "clt.json").unlink()
    config = tmp_path / "tracer" / "config.yaml"
    for number, (name, options, found, lines) in enumerate(
        (("some/model", (), "some/model", 1), ("null", (), None, 2), ("null", ("--model", "a/b"), "a/b", 1))
    ):
        config.write_text(re.sub("model_name: .*", f"model_name: {name}", config.read_text()))
        out = tmp_path / str(number)
        assert command(monkeypatch, "import", tmp_path / "tracer", "--out", out, *options) == 0
        assert CLTDirectory.open(out).description.model["id"] == found
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines and ("does not say which model it is of: name it with --model" in said[0]) == (
            lines == 2
        )
