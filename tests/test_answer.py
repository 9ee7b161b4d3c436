"""`cltjax generate` on the bundled demo VLM, with a CLT that writes what the test says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cltjax.cli import main
from cltjax.clt_directory import Activation, Description, write_clt
from cltjax.errors import UserError
from cltjax.replacement.answer import generate
from cltjax.replacement.clt import CLT

MODEL = "examples/shapes/model"
LAYERS, D, F = 6, 128, 11


@pytest.fixture(scope="module")
def clt(tmp_path_factory) -> Path:
    """Features that are never active, and biases of 0: the replaced model has no MLPs."""
    path = tmp_path_factory.mktemp("answer") / "clt"
    model = {"id": MODEL, "revision": None, "class": None, "n_layers": LAYERS, "d_model": D}
    described = Description(model, "mlp_in", F, tuple(range(LAYERS)), 0, LAYERS, Activation("relu"), "joint", "float32")
    files = {
        name: {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        for name, shapes in described.files.items()
    }
    files["W_dec_2.safetensors"]["W_dec_2"][7] = np.random.default_rng(0).normal(0, 3, (LAYERS - 2, D))
    write_clt(path, described, files.items())
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "grey.png"
    Image.new("RGB", (48, 48), "grey").save(path)
    return path


def test_answers_side_by_side(clt: Path, image: Path, capsys: pytest.CaptureFixture[str]):
    found = generate(clt, MODEL, "Describe the image.", image, ("2:7=9",), n=5)
    assert list(found) == ["original", "replaced", "replaced, 2:7=9"]
    assert len(set(found.values())) == 3  # without MLPs, and with one feature's writes instead of them
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{who}: {answer}" for who, answer in found.items()]


def test_interventions_in_the_original_model(clt: Path, image: Path):
    plain = generate(clt, MODEL, "Describe the image.", image, n=5)
    found = generate(clt, MODEL, "Describe the image.", image, ("2:7=9",), n=5, in_original=True)
    assert list(plain) == ["original", "replaced"] and list(found)[2] == "original, 2:7=9"
    assert found["original"] == plain["original"] != found["original, 2:7=9"]
    none = generate(clt, MODEL, "Describe the image.", image, ("2:7*9",), n=5, in_original=True)
    assert none["original, 2:7*9"] == plain["original"]  # nine times nothing


@pytest.mark.parametrize("lazy", [False, True])
def test_a_clt_in_its_files_or_rounded_says_the_same(clt: Path, image: Path, lazy: bool, monkeypatch):
    """As far as five tokens tell; what the options ask for is what is loaded."""
    asked = []
    load = CLT.from_pretrained.__func__

    def noted(kind: type, path: Path, *how: object) -> CLT:
        asked.append(how[1:])
        return load(kind, path, *how)

    monkeypatch.setattr(CLT, "from_pretrained", classmethod(noted))
    question = (clt, MODEL, "Describe the image.", image, ("2:7=9",), 5)
    plain = generate(*question)
    assert generate(*question, lazy=lazy, clt_dtype="bfloat16") == plain
    assert asked == [(torch.float32, False), (torch.bfloat16, lazy)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"change": ("2:7",)}, "is no intervention"),
        ({"change": ("2:11=1",)}, "features 0 to 10"),
        ({"n": 0}, "--n 0: must be at least 1"),
        ({"in_original": True}, "name some with --set"),
        ({"change": ("2:7@image=1",)}, "no image tokens in a prompt without an image"),
        ({"change": ("2:7@900:=1",)}, "there is no position 900 in"),
        ({"image": Path("nothing.png")}, "--image nothing.png: cannot be read"),
        ({"image": Path("pyproject.toml")}, "--image pyproject.toml: cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_one_line(clt: Path, options, said: str):
    with pytest.raises(UserError, match=said):
        generate(clt, MODEL, "Describe the image.", **options)


def test_the_command(clt: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    args = ["--clt", clt, "--model", MODEL, "--image", image, "--prompt", "Describe the image.", "--n", 3]
    monkeypatch.setattr(
        "sys.argv",
        ["cltjax", "generate", *map(str, args), "--set", "2:7=9", "2:7@image*2", "--lazy", "--clt-dtype", "float16"],
    )
    main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()][:2] == ["original", "replaced"]
