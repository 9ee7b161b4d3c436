"""The CLT directory: what is written is read, and what is wrong with one is said in one line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cltjax.clt_directory import Activation, CLTDirectory, Description, write_clt
from cltjax.errors import UserError

D, F, LAYERS = 7, 13, 5


def description(**changes: Any) -> Description:
    found = Description(
        model={"id": "tiny", "revision": None, "class": "None", "n_layers": LAYERS, "d_model": D},
        site="mlp_in",
        n_features=F,
        sources=(0, 1, 3),
        offset=1,
        n_targets=2,
        activation=Activation("topk", (2, 3, 2), "topk"),
        combined="joint",
        dtype="float32",
    )
    return dataclasses.replace(found, **changes)


def random_files(one: Description, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        file: {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for file, shapes in one.files.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu", "relu"])
def test_what_is_written_is_read(tmp_path: Path, kind: Any, dtype: Any):
    one = description(dtype=dtype, activation=Activation(kind, (2, 3, 2) if kind == "topk" else (), kind))
    files = random_files(one)
    write_clt(tmp_path / "clt", one, files.items())
    found = CLTDirectory.open(tmp_path / "clt")
    assert found.description == one
    assert {path.name for path in tmp_path.rglob("*")} == {"clt", "clt.json", *files}
    assert ("threshold_3" in files["W_enc_3.safetensors"]) == (kind == "jumprelu")
    for name, tensors in found:
        for key, value in tensors.items():
            rounded = key.startswith("W_") and dtype != "float32"
            assert str(value.dtype) == (dtype if rounded else "float32")
            original = files[name][key]
            if rounded:
                np.testing.assert_allclose(value.astype(np.float32), original, rtol=2**-7, atol=1e-6)
            else:
                np.testing.assert_array_equal(value, original)


def test_the_layout_is_the_documented_one():
    """D and F prime: a swapped axis shows. Slot j of source l writes to layer l + offset + j; layer 4 ends a window."""
    assert description().files == {
        "W_enc_0.safetensors": {"W_enc_0": (F, D), "b_enc_0": (F,)},
        "W_dec_0.safetensors": {"W_dec_0": (F, 2, D)},
        "W_enc_1.safetensors": {"W_enc_1": (F, D), "b_enc_1": (F,)},
        "W_dec_1.safetensors": {"W_dec_1": (F, 2, D)},
        "W_enc_3.safetensors": {"W_enc_3": (F, D), "b_enc_3": (F,)},
        "W_dec_3.safetensors": {"W_dec_3": (F, 1, D)},
        "b_dec.safetensors": {f"b_dec_{target}": (D,) for target in (1, 2, 3, 4)},
    }


def test_views_are_written_as_what_they_show(tmp_path: Path):
    """safetensors writes the memory of a transposed array as it lies."""
    files = random_files(description())
    straight = files["W_enc_1.safetensors"]["W_enc_1"]
    files["W_enc_1.safetensors"]["W_enc_1"] = np.asfortranarray(straight)
    write_clt(tmp_path / "clt", description(), files.items())
    np.testing.assert_array_equal(load_file(tmp_path / "clt/W_enc_1.safetensors")["W_enc_1"], straight)


def test_a_directory_is_whole_or_not_there(tmp_path: Path):
    files = random_files(description())
    files.pop("b_dec.safetensors")
    with pytest.raises(ValueError, match="b_dec"):
        write_clt(tmp_path / "clt", description(), files.items())
    files = random_files(description())
    files["b_dec.safetensors"]["b_dec_1"] = np.zeros(D + 1, np.float32)
    with pytest.raises(ValueError, match=r"b_dec\.safetensors"):
        write_clt(tmp_path / "clt", description(), files.items())
    assert not list(tmp_path.iterdir())
    write_clt(tmp_path / "clt", description(), random_files(description()).items())
    with pytest.raises(UserError, match="exists already"):
        write_clt(tmp_path / "clt", description(), random_files(description()).items())


def damage(folder: Path, how: str) -> None:
    """Do to a CLT directory what a user or a disk may do."""
    described = json.loads((folder / "clt.json").read_text())
    match how:
        case "no clt.json":
            (folder / "clt.json").unlink()
        case "no JSON":
            (folder / "clt.json").write_text("{")
        case "another program's":
            (folder / "clt.json").write_text("[]")
        case "missing":
            (folder / "W_dec_1.safetensors").unlink()
        case "unknown":
            save_file({"W_enc_2": np.zeros((F, D), np.float32)}, folder / "W_enc_2.safetensors")
        case "cut off":
            whole = (folder / "W_enc_0.safetensors").read_bytes()
            (folder / "W_enc_0.safetensors").write_bytes(whole[: len(whole) // 2])
        case "wrong shape":
            save_file({"W_dec_1": np.zeros((F, 1, D), np.float32)}, folder / "W_dec_1.safetensors")
        case "wrong type":
            save_file({"W_dec_1": np.zeros((F, 2, D), np.float16)}, folder / "W_dec_1.safetensors")
        case "another tensor":
            save_file({"W": np.zeros((F, 2, D), np.float32)}, folder / "W_dec_1.safetensors")
        case _:
            name, _, value = how.partition("=")
            *path, last = name.split(".")
            inner = described
            for part in path:
                inner = inner[part]
            inner[last] = json.loads(value)
            (folder / "clt.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no clt.json", "is no CLT directory: it has no clt.json"),
        ("no JSON", "is not JSON"),
        ("another program's", "does not describe a CLT of this program"),
        ("version=2", "is of version 2, this program reads version 1"),
        ("missing", "W_dec_1.safetensors is missing"),
        ("unknown", "W_enc_2.safetensors does not belong to the CLT"),
        ("cut off", "W_enc_0.safetensors cannot be read"),
        ("wrong shape", r"W_dec_1 is \(13, 1, 7\) F32, and should be \(13, 2, 7\) F32"),
        ("wrong type", r"W_dec_1 is \(13, 2, 7\) F16, and should be"),
        ("another tensor", "W_dec_1 is nothing, and should be"),
        ("sources=[0, 1, 4]", "no target"),
        ("sources=[1, 0, 3]", "sources are"),
        ("sources=[]", "sources are|layer"),
        ("model.n_layers=null", "n_layers"),
        ("n_features=12.5", "n_features is 12.5"),
        ('site="mlp_inX"', "site is 'mlp_inX'"),
        ('combined="sum"', "combined is 'sum'"),
        ('dtype="int8"', "dtype is 'int8'"),
        ('activation.kind="gelu"', "activation.kind is 'gelu'"),
        ("activation.k=[2, 3]", "3 sources have 2 numbers k"),
        ("activation.k=[2, 3, 14]", "of 13 features"),
        ("activation=null", "activation"),
        ("model={}", "'n_layers' is lacking|n_layers"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(tmp_path: Path, how: str, said: str):
    write_clt(tmp_path / "clt", description(), random_files(description()).items())
    damage(tmp_path / "clt", how)
    with pytest.raises(UserError, match=said) as raised:
        CLTDirectory.open(tmp_path / "clt")
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
