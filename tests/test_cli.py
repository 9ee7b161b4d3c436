import dataclasses
import inspect
import json
from pathlib import Path

import pytest

from cltjax.cli import main, show, verify
from cltjax.errors import UserError
from cltjax.store import ActivationStore
from stores import synthetic_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "activations"
    synthetic_store(path, rows=211, layers=3, d=5)
    return path


def test_info_counts_rows_by_split_and_modality(store: Path, capsys: pytest.CaptureFixture[str]):
    show(store)
    printed = capsys.readouterr().out
    assert f"{ActivationStore.open(store).rows:,} rows" in printed
    for split in ("train", "val", "test"):
        assert f"{len(ActivationStore.open(store).rows_of(split)):,}" in printed


@pytest.mark.parametrize(
    "name",
    ["mlp_in/c/0/0/0", "mlp_out/c/0/0/0", "modality/c/0", "mlp_out_norm/c/0/0", "samples.jsonl", "stats.safetensors"],
)
def test_verify_reads_every_file(store: Path, capsys: pytest.CaptureFixture[str], name: str):
    verify(store)
    assert "can be read" in capsys.readouterr().out
    file = store / name
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=name):
        verify(store)


def test_a_folder_without_a_store_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["cltjax", "info", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no activation store" in capsys.readouterr().err


RECIPE = """from cltjax.config import ModelConfig, TrainConfig
from cltjax.estimate import ModelShape
model_shape = ModelShape(n_layers=3, d_model=11)
config = TrainConfig("all", offset=0, model=ModelConfig(features=26, k=2))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "x.py"
    path.write_text(RECIPE)
    return path


def estimated(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, int]]:
    monkeypatch.setattr("sys.argv", ["cltjax", "estimate", *args, "--json"])
    main()
    return json.loads(capsys.readouterr().out)


def test_estimate_takes_the_model_from_options_a_store_or_the_recipe(
    store: Path, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given = ["--config", str(recipe)]
    for args, d_model in (
        (given, 11),
        ([f"--config={recipe}", "--d-model", "7"], 7),
        ([*given, "--store", str(store)], 5),
        (["--layer", "all", "--offset", "0", "--model.features", "26", f"--store={store}"], 5),
        (["--layer", "all", "--model.features", "26", "--model-layers", "4", "--d-model", "13"], 13),
    ):
        found = estimated(args, capsys, monkeypatch)
        assert found["parameters"]["encoder"] == 3 * 26 * d_model


def test_estimate_takes_the_options_of_training_and_prints_tables(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    found = estimated(["--config", str(recipe), "--model.features", "34", "--mesh", "2x2"], capsys, monkeypatch)
    assert found["mesh"] == [2, 2]
    assert found["parameters"]["decoder"] == 6 * 34 * 11
    monkeypatch.setattr("sys.argv", ["cltjax", "estimate", "--config", str(recipe), "--tokens-per-s", "1000"])
    main()
    printed = capsys.readouterr().out
    assert "at 1,000 tokens/s" in printed
    for name in ("source layers", "Adam moments", "optimiser", "gathered"):
        assert name in printed


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--layer", "0", "--store", "nowhere"], "--model-layers and --d-model"),
        (["--layer", "0", "--d-model", "5"], "go together"),
        (["--layer", "7", "--model-layers", "3", "--d-model", "5"], "layer 7"),
        (["--layer", "0", "--model-layers", "3", "--d-model", "5", "--mesh", "2by4"], "--mesh 2by4"),
        (["--layer", "0", "--model-layers", "3", "--d-model", "5", "--flops", "0"], "--flops 0"),
        (["--layer", "0", "--model-layers", "3", "--d-model", "5", "--tokens-per-s", "0"], "--tokens-per-s 0"),
        (["--config", "nowhere.py"], "no such file"),
        (["--config"], "--config needs"),
    ],
)
def test_what_estimate_cannot_do_is_one_line(
    args: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["cltjax", "estimate", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_commands_that_load_a_clt_say_how_it_is_held():
    """Options of a command are the arguments of what it calls."""
    from cltjax import cli
    from cltjax.replacement.answer import generate
    from cltjax.replacement.config import FidelityConfig, GraphsConfig
    from cltjax.replacement.dashboard import write_dashboard
    from cltjax.replacement.explain import explain
    from cltjax.replacement.neurons import find_neurons

    always_lazy = {cli.Neurons: find_neurons, cli.Dashboard: write_dashboard}
    for options, work in ({cli.Generate: generate, cli.Graph: explain} | always_lazy).items():
        assert {field.name for field in dataclasses.fields(options)} == set(inspect.signature(work).parameters)
    for options in (cli.Generate, cli.Graph, FidelityConfig, GraphsConfig, *always_lazy):
        found = {field.name: field.default for field in dataclasses.fields(options)}
        assert found["clt_dtype"] == "float32" and found.get("lazy") == (None if options in always_lazy else False)
