"""circuit-tracer's form is the same function as the CLT directory, there and back; EleutherAI's transcoders as well."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

import cltjax.circuit_tracer as tracer
from cltjax.circuit_tracer import (
    import_circuit_tracer,
    topk_threshold,
    topk_thresholds,
    write_circuit_tracer,
)
from cltjax.clt_directory import Activation, CLTDirectory, Description, write_clt
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT
from test_clt_directory import LAYERS, D, F, description, random_files

B = 11
# sources, offset, n_targets: gaps, a window that ends before the model, own layers, all of them
WIRINGS = [((0, 1, 3), 1, 2), ((2,), 0, 1), ((1, 2), 2, 16), (tuple(range(LAYERS)), 0, LAYERS), ((0, 4), 0, 3)]


def written(folder: Path, one: Description, seed: int = 0) -> CLTDirectory:
    """A CLT directory whose features are active on some tokens and not on others."""
    files = random_files(one, seed)
    for tensors in files.values():
        for name in tensors:
            if name.startswith("threshold"):
                tensors[name] = np.abs(tensors[name])
    write_clt(folder, one, files.items())
    return CLTDirectory.open(folder)


def with_kind(kind: Any, sources: tuple[int, ...] = (0, 1, 3), offset: int = 1, n_targets: int = 2, **rest: Any):
    k = (2, 3, 2, 4, 1)[: len(sources)] if kind == "topk" else ()
    changed = {"sources": sources, "offset": offset, "n_targets": n_targets, "activation": Activation(kind, k, kind)}
    return description(**changed | rest)


def inputs(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(LAYERS, B, D)).astype(np.float32)


def as_circuit_tracer_does(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [L, B, D] -> features [L, B, F] and reconstruction [L, B, D], in float64, from the files alone."""
    n = len(list(folder.glob("W_enc_*.safetensors")))
    jump = "threshold_0" in load_file(folder / "W_enc_0.safetensors")
    features, y = [], np.zeros((n, *x.shape[1:]))
    for i in range(n):
        enc = {name: value.astype(np.float64) for name, value in load_file(folder / f"W_enc_{i}.safetensors").items()}
        h = x[i].astype(np.float64) @ enc[f"W_enc_{i}"].T + enc[f"b_enc_{i}"]
        features.append(h * (h > enc[f"threshold_{i}"]) if jump else np.maximum(h, 0))
        W_dec = load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"].astype(np.float64)
        y[i:] += np.einsum("bf,fjd->jbd", features[i], W_dec)
        y[i] += enc[f"b_dec_{i}"]
    return np.stack(features), y


def as_here(folder: Path, x: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Dense features [B, F] by source and y_hat [B, D] by target of a CLT directory, in PyTorch."""
    clt = CLT.from_pretrained(folder)
    found = {layer: clt.encode(layer, torch.from_numpy(x[layer])) for layer in clt.sources}
    dense = {layer: np.zeros((B, clt.description.n_features)) for layer in clt.sources}
    for layer, (values, indices) in found.items():
        np.put_along_axis(dense[layer], indices.numpy(), values.numpy(), -1)
    return dense, {target: clt.decode(target, found).numpy() for target in clt.targets}


def check_same(features: Any, y: Any, dense: dict[int, np.ndarray], y_hat: dict[int, np.ndarray]) -> None:
    """What is no source has no feature, what is no target no reconstruction."""
    assert all(0 < (one > 0).sum() < one.size for one in dense.values())
    for layer in range(LAYERS):
        np.testing.assert_allclose(features[layer], dense.get(layer, np.zeros((B, F))), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(y[layer], y_hat.get(layer, np.zeros((B, D))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sources, offset, n_targets", WIRINGS)
@pytest.mark.parametrize("kind", ["jumprelu", "relu"])
def test_it_is_the_same_function_there_and_back(tmp_path: Path, kind, sources, offset, n_targets):
    one = with_kind(kind, sources, offset, n_targets)
    write_circuit_tracer(written(tmp_path / "clt", one), tmp_path / "out")
    x = inputs()
    features, y = as_circuit_tracer_does(tmp_path / "out", x)
    check_same(features, y, *as_here(tmp_path / "clt", x))
    for name in ("with", "without"):  # our clt.json beside the weights
        found, files = import_circuit_tracer(tmp_path / "out")
        write_clt(tmp_path / name, found, files)
        check_same(features, y, *as_here(tmp_path / name, x))
        assert (found.sources, found.wiring.pairs) == (one.sources, one.wiring.pairs)
        if name == "with":
            assert dataclasses.replace(found, derived_from=None) == one
            (tmp_path / "out/clt.json").unlink()
    for file in (tmp_path / "clt").glob("*.safetensors"):
        np.testing.assert_equal(load_file(tmp_path / "with" / file.name), load_file(file))


def test_the_layout_is_circuit_tracers(tmp_path: Path):
    directory = written(tmp_path / "clt", with_kind("jumprelu", dtype="bfloat16"))
    write_circuit_tracer(directory, tmp_path / "out")
    names = [f"W_{what}_{layer}.safetensors" for what in ("enc", "dec") for layer in range(LAYERS)]
    assert {path.name for path in tmp_path.glob("out/*")} == {*names, "config.yaml", "clt.json"}
    for layer in range(LAYERS):
        encoder = load_file(tmp_path / f"out/W_enc_{layer}.safetensors")
        assert {name: value.shape for name, value in encoder.items()} == {
            f"W_enc_{layer}": (F, D),
            f"b_enc_{layer}": (F,),
            f"b_dec_{layer}": (D,),
            f"threshold_{layer}": (F,),
        }
        W_dec = load_file(tmp_path / f"out/W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        assert W_dec.shape == (F, LAYERS - layer, D) and str(W_dec.dtype) == "bfloat16"
        if layer not in (0, 1, 3):
            assert not encoder[f"W_enc_{layer}"].any() and not encoder[f"b_enc_{layer}"].any() and not W_dec.any()
            assert (encoder[f"threshold_{layer}"] == 1).all()
    b_dec = directory.tensors("b_dec.safetensors")
    assert not load_file(tmp_path / "out/W_enc_0.safetensors")["b_dec_0"].any()  # nobody's target
    for target in (1, 2, 3, 4):
        found = load_file(tmp_path / f"out/W_enc_{target}.safetensors")[f"b_dec_{target}"]
        np.testing.assert_array_equal(found, b_dec[f"b_dec_{target}"])
    said = json.loads((tmp_path / "out/clt.json").read_text())
    assert said["derived_from"].startswith("clt (clt.json ") and said["sources"] == [0, 1, 3]
    found, _ = import_circuit_tracer(tmp_path / "out")
    assert found.dtype == "bfloat16"


def test_relu_has_no_thresholds_anywhere(tmp_path: Path):
    """Of layer 0 one would make circuit-tracer look for all."""
    write_circuit_tracer(written(tmp_path / "clt", with_kind("relu")), tmp_path / "out")
    assert not any("threshold" in name for file in (tmp_path / "out").glob("W_*") for name in load_file(file))


def test_a_threshold_below_0_lets_no_negative_value_pass(tmp_path: Path):
    one = with_kind("jumprelu")
    files = random_files(one)
    assert (files["W_enc_0.safetensors"]["threshold_0"] < 0).any()
    write_clt(tmp_path / "clt", one, files.items())
    write_circuit_tracer(CLTDirectory.open(tmp_path / "clt"), tmp_path / "out")
    features, y = as_circuit_tracer_does(tmp_path / "out", inputs())
    check_same(features, y, *as_here(tmp_path / "clt", inputs()))


@pytest.mark.parametrize(
    "site, model, hooks",
    [
        ("mlp_in", {}, ("mlp.hook_in", "hook_mlp_out")),
        ("resid_mid", {}, ("hook_resid_mid", "hook_mlp_out")),
        ("mlp_in", {"id": "Qwen/Qwen3-VL-2B"}, ("mlp.hook_in", "mlp.hook_out")),
    ],
)
def test_config_names_the_hooks(tmp_path: Path, site, model, hooks):
    one = with_kind("relu", site=site)
    one = dataclasses.replace(one, model=one.model | {"id": "a: b"} | model)
    write_circuit_tracer(written(tmp_path / "clt", one), tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text()) == {
        "model_name": one.model["id"],
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": hooks[0],
        "feature_output_hook": hooks[1],
    }
    (tmp_path / "out/clt.json").unlink()
    found, _ = import_circuit_tracer(tmp_path / "out")
    assert (found.site, found.model["id"]) == (site, one.model["id"])


def test_it_is_not_taken_for_a_clt_directory(tmp_path: Path):
    write_circuit_tracer(written(tmp_path / "clt", with_kind("relu")), tmp_path / "out")
    with pytest.raises(UserError, match="does not describe a CLT of this program"):
        CLTDirectory.open(tmp_path / "out")


@pytest.mark.parametrize(
    "one, said",
    [
        (with_kind("topk"), "is a topk CLT, which circuit-tracer does not know: name the --store"),
        (with_kind("relu", site="resid_pre"), "reads resid_pre, which circuit-tracer has no input hook for"),
        (with_kind("relu", combined="none"), "is several runs summed as they are"),
    ],
)
def test_what_circuit_tracer_cannot_do_is_refused(tmp_path: Path, one, said):
    directory = written(tmp_path / "clt", one)
    with pytest.raises(UserError, match=said):
        write_circuit_tracer(directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clt"]


def test_it_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = written(tmp_path / "clt", with_kind("relu"))
    real = tracer.tracer_decoder

    def full_disk(directory: CLTDirectory, layer: int) -> np.ndarray:
        if layer == 3:
            raise OSError(28, "No space left on device")
        return real(directory, layer)

    monkeypatch.setattr(tracer, "tracer_decoder", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_circuit_tracer(directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clt"]
    monkeypatch.undo()
    write_circuit_tracer(directory, tmp_path / "out")
    with pytest.raises(UserError, match="out exists already"):
        write_circuit_tracer(directory, tmp_path / "out")


def test_wrong_thresholds_are_the_callers_fault(tmp_path: Path):
    topk = written(tmp_path / "clt", with_kind("topk"))
    right = {source: np.ones(F, np.float32) for source in (0, 1, 3)}
    for wrong in ({0: right[0]}, right | {3: np.ones(F + 1)}, right | {1: np.full(F, np.nan)}):
        with pytest.raises(ValueError, match="thresholds of source"):
            write_circuit_tracer(topk, tmp_path / "out", wrong)
    with pytest.raises(ValueError, match="its own thresholds"):
        write_circuit_tracer(written(tmp_path / "relu", with_kind("relu")), tmp_path / "out", right)


def test_views_are_written_as_what_they_show(tmp_path: Path):
    """safetensors writes the memory of a transposed array as it lies."""
    straight = np.arange(35, dtype=np.float32).reshape(5, 7)
    tracer.save(tmp_path / "x.safetensors", {"x": straight.T})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["x"], straight.T)


# Thresholds for topk


def pieces_of(h: np.ndarray, *cuts: int):
    return lambda: iter(np.split(h, cuts))


@pytest.mark.parametrize("k", [1, 5, 13])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_mean_l0_under_the_threshold_is_the_clts_own(k, scale):
    """Rows have from none to all of their features above 0, so many have fewer than k."""
    rng = np.random.default_rng(0)
    h = (rng.normal(size=(97, F)) * scale + rng.normal(size=(97, 1)) * 2 * scale).astype(np.float32)
    own = (np.sort(h, axis=1)[:, -k:] > 0).sum()
    assert 0 < own < (h > 0).sum() or k == F
    found = topk_threshold(pieces_of(h, 7, 7, 40), k)
    assert found.dtype == np.float32 and (h > found).sum() == own
    assert found == topk_threshold(pieces_of(h), k)
    near = np.sort(np.append(h[h > 0], 0))[-own - 1 :][:2].astype(np.float64)
    np.testing.assert_allclose((found - near[0]) / (near[1] - near[0]), 0.5, atol=0.1)  # rounding does not matter


def test_neighbouring_floats_are_told_apart():
    """Of values that differ in their last bits only: halfway between two such is one of them."""
    h = np.ones(1, np.float32).view(np.int32) + np.arange(1, 32, dtype=np.int32)
    h[20:] += 3 << 16  # in another bin
    h = h.view(np.float32)[None]
    for k in range(1, 32):
        assert (h > topk_threshold(pieces_of(h), k)).sum() == k


def test_without_active_features_nothing_is_active_and_without_rows_there_is_no_threshold():
    h = -np.ones((3, F), np.float32)
    assert topk_threshold(pieces_of(h), 2) == np.inf
    with pytest.raises(UserError, match="no val rows"):
        topk_threshold(lambda: iter([]), 2)


def test_a_topk_clt_goes_over_with_its_mean_l0(tmp_path: Path):
    one = with_kind("topk")
    one = dataclasses.replace(one, metrics={"l0": 2.0})
    clt = CLT.from_pretrained(written(tmp_path / "clt", one).path)
    x = np.random.default_rng(3).normal(size=(LAYERS, 101, D)).astype(np.float32)

    def h(source: int):
        for rows in np.split(x[source], [10, 60]):
            yield clt.pre_activations(source, torch.from_numpy(rows)).numpy()

    thresholds = topk_thresholds(one, h)
    assert {source: found.shape for source, found in thresholds.items()} == {0: (F,), 1: (F,), 3: (F,)}
    write_circuit_tracer(CLTDirectory.open(tmp_path / "clt"), tmp_path / "out", thresholds)
    features, _ = as_circuit_tracer_does(tmp_path / "out", x)
    for source in one.sources:
        own = clt.encode(source, torch.from_numpy(x[source])).values
        assert (features[source] > 0).sum() == (own > 0).sum() > 0
    found, files = import_circuit_tracer(tmp_path / "out")
    assert found.activation == Activation("jumprelu", trained_as="topk")
    assert found.metrics == {}  # its figures are those of other features
    write_clt(tmp_path / "back", found, files)
    features, y = as_circuit_tracer_does(tmp_path / "out", x[:, :B])
    check_same(features, y, *as_here(tmp_path / "back", x[:, :B]))


# From circuit-tracer


def test_a_bias_where_nobody_writes_is_kept(tmp_path: Path):
    """circuit-tracer has a b_dec for every layer; here only a target has one."""
    one = with_kind("jumprelu")
    write_circuit_tracer(written(tmp_path / "clt", one), tmp_path / "out")
    (tmp_path / "out/clt.json").unlink()
    file = tmp_path / "out/W_enc_0.safetensors"
    save_file(load_file(file) | {"b_dec_0": np.full(D, 3, np.float32)}, file)
    found, files = import_circuit_tracer(tmp_path / "out")
    write_clt(tmp_path / "back", found, files)
    assert found.wiring.targets == tuple(range(LAYERS))
    features, y = as_circuit_tracer_does(tmp_path / "out", inputs())
    dense, y_hat = as_here(tmp_path / "back", inputs())
    np.testing.assert_allclose(np.stack([y_hat[t] for t in range(LAYERS)]), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.stack([dense[t] for t in range(LAYERS)]), features, rtol=1e-5, atol=1e-5)


def test_an_encoder_with_no_layer_left_to_write_to_is_no_source(tmp_path: Path):
    write_circuit_tracer(written(tmp_path / "clt", with_kind("jumprelu")), tmp_path / "out")
    (tmp_path / "out/clt.json").unlink()
    file = tmp_path / "out/W_enc_4.safetensors"
    save_file(load_file(file) | {"W_enc_4": np.ones((F, D), np.float32)}, file)
    found, _ = import_circuit_tracer(tmp_path / "out")
    assert (found.sources, found.offset, found.n_targets) == ((0, 1, 3), 1, 2)


def test_weights_of_several_types_become_float32(tmp_path: Path):
    write_circuit_tracer(written(tmp_path / "clt", with_kind("relu")), tmp_path / "out")
    file = tmp_path / "out/W_enc_1.safetensors"
    save_file({name: value.astype(np.float16) for name, value in load_file(file).items()}, file)
    found, files = import_circuit_tracer(tmp_path / "out")
    assert found.dtype == "float32"
    write_clt(tmp_path / "back", found, files)
    features, y = as_circuit_tracer_does(tmp_path / "out", inputs())
    check_same(features, y, *as_here(tmp_path / "back", inputs()))


def spoil(folder: Path, how: str) -> None:
    """Make of a circuit-tracer CLT what cannot be imported."""
    name, _, change = how.partition(":")
    if name.endswith(".safetensors"):
        tensors = load_file(folder / name)
        key, _, value = change.partition("=")
        if value == "":
            del tensors[key]
        else:
            F, D = 13, 7
            tensors[key] = np.asarray(eval(value, {"np": np, "F": F, "D": D}))
        save_file(tensors, folder / name)
    elif name == "config.yaml":
        (folder / name).write_text(change)
    elif name == "clt.json":
        described = json.loads((folder / name).read_text()) | json.loads(change)
        (folder / name).write_text(json.dumps(described))
    elif name == "remove":
        (folder / change).unlink()
    else:
        (folder / name).mkdir()


HOOKS = "model_kind: cross_layer_transcoder\nfeature_output_hook: hook_mlp_out\nfeature_input_hook: "


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("remove:config.yaml", "config.yaml is missing: write one"),
        ("config.yaml:model_kind: transcoder_set", "model_kind is 'transcoder_set'"),
        ("config.yaml:{", "is not YAML"),
        (f"config.yaml:{HOOKS}ln2.hook_normalized", "feature_input_hook is ln2.hook_normalized, and only"),
        (f"config.yaml:{HOOKS}hook_resid_pre", "describes another CLT than the files beside it"),
        (f"config.yaml:{HOOKS}mlp.hook_in\nfeature_output_hook: hook_resid_post", "feature_output_hook is"),
        ("remove:W_enc_2.safetensors", "W_enc_4.safetensors does not belong to a CLT of 4 layers"),
        ("remove:W_dec_2.safetensors", "W_dec_2.safetensors cannot be read"),
        ("W_enc_2.safetensors:b_dec_2", "W_enc_2.safetensors lacks"),
        ("W_enc_2.safetensors:W_skip_2=np.ones((D, D), np.float32)", "W_skip_2 is a skip connection"),
        ("W_enc_2.safetensors:other=np.float32([1])", "other is not known"),
        ("W_enc_2.safetensors:threshold_2", "layer 2 and layer 0 do not both have thresholds"),
        ("W_enc_2.safetensors:threshold_2=np.float32([-.1] * F)", "threshold_2 is below 0"),
        ("W_enc_2.safetensors:threshold_2=np.float32([np.nan] * F)", "threshold_2 is below 0"),
        ("W_enc_2.safetensors:b_enc_2=np.float32([1])", r"b_enc_2 is \(1,\), and should be \(13,\)"),
        ("W_enc_2.safetensors:b_dec_2=np.float64([1] * D)", "b_dec_2 is F64"),
        ("W_dec_1.safetensors:W_dec_1=np.zeros((F, 3, D), np.float32)", r"should be \(13, 4, 7\)"),
        ("W_dec_0.safetensors:W_dec_0=np.ones((F, 5, D), np.float32)", "outside of the window in clt.json"),
        ("W_enc_0.safetensors:b_dec_0=np.ones(D, np.float32)", "outside of the window in clt.json"),
        ('clt.json:{"n_features": 17}', "describes another CLT than the files beside it"),
        ('clt.json:{"sources": []}', "is damaged"),
        ('clt.json:{"version": 2}', "is not one that this program reads"),
        ('clt.json:{"format": "cltjax CLT"}', "is a CLT directory of this program already"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path: Path, how: str, said: str):
    write_circuit_tracer(written(tmp_path / "clt", with_kind("jumprelu")), tmp_path / "out")
    import_circuit_tracer(tmp_path / "out")
    spoil(tmp_path / "out", how)
    with pytest.raises(UserError, match=said) as raised:
        import_circuit_tracer(tmp_path / "out")
    assert "\n" not in str(raised.value) and str(tmp_path / "out") in str(raised.value)


def test_a_folder_without_a_clt_is_refused(tmp_path: Path):
    write_circuit_tracer(written(tmp_path / "clt", with_kind("relu")), tmp_path / "out")
    for file in (tmp_path / "out").glob("W_*"):
        file.unlink()
    with pytest.raises(UserError, match="has no W_enc_0.safetensors"):
        import_circuit_tracer(tmp_path / "out")


def test_neither_torch_nor_jax_is_imported():
    code = "import sys, cltjax.circuit_tracer, cltjax.eleuther; sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
