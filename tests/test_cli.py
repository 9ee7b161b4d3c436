from pathlib import Path

import pytest
from stores import synthetic_store

from cltjax.cli import main, show, verify
from cltjax.errors import UserError
from cltjax.store import ActivationStore


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
