"""To and from a hub that is a dictionary here: what belongs goes over whole, and what fails leaves nothing behind."""

import dataclasses
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from cltjax import hub
from cltjax.clt_directory import Activation, CLTDirectory, write_clt
from cltjax.errors import UserError
from cltjax.hub import model_card, pull, push
from cltjax.store import ActivationStore
from stores import synthetic_store
from test_clt_directory import D, description, random_files

RESPONSE: Any = SimpleNamespace(headers={}, request=None)
METRICS = {
    "rows": 21471,
    "fvu": {"all": 0.25, "text": 0.5},
    "l0": 15.651110,
    "dead": 0.078125,
    "targets": {
        "1": {"all": {"fvu": 0.2, "slope": 1.0}, "text": {"fvu": 0.4, "slope": None}},
        "2": {"all": {"fvu": 0.3}},
    },
    "sources": {"0": {"l0": 16.0, "dead": 0.0}, "1": {"l0": 15.3, "dead": 0.15625}},
}


def filtered(files: list[str], call: dict[str, Any]) -> list[str]:
    """As the hub's own client does."""
    patterns = {name: call[name] for name in ("allow_patterns", "ignore_patterns")}
    return list(filter_repo_objects(files, **patterns))


class Hub:
    """HfApi with its repositories in a dictionary; every call must fit the real signature."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Any] = {}
        self.calls: list[str] = []
        self.broken: dict[str, Exception] = {}

    def __call__(self) -> "Hub":
        return self

    def called(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs)
        self.calls.append(name)
        if (error := self.broken.get(name) or self.broken.get(f"{name} {self.calls.count(name)}")) is not None:
            raise error
        bound.apply_defaults()
        return bound.arguments

    def repo(self, call: dict[str, Any]) -> Any:
        key = call["repo_type"] or "model", call["repo_id"]
        if key not in self.repos:
            raise RepositoryNotFoundError(f"404\n\nRepository Not Found for {key[1]}", response=RESPONSE)
        return self.repos[key]

    def create_repo(self, *args: Any, **kwargs: Any) -> str:
        call = self.called("create_repo", *args, **kwargs)
        new = SimpleNamespace(private=call["private"], files={".gitattributes": b""}, sha="0" * 40)
        assert (self.repos.setdefault((call["repo_type"], call["repo_id"]), new) is new) or call["exist_ok"]
        return f"https://hub/{call['repo_id']}"

    def repo_info(self, *args: Any, **kwargs: Any) -> Any:
        return self.repo(self.called("repo_info", *args, **kwargs))

    def list_repo_files(self, *args: Any, **kwargs: Any) -> list[str]:
        return list(self.repo(self.called("list_repo_files", *args, **kwargs)).files)

    def create_commit(self, *args: Any, **kwargs: Any) -> None:
        call = self.called("create_commit", *args, **kwargs)
        files = self.repo(call).files
        for operation in call["operations"]:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()

    def upload_folder(self, *args: Any, **kwargs: Any) -> None:
        call = self.called("upload_folder", *args, **kwargs)
        files, folder = self.repo(call).files, Path(call["folder_path"])
        for name in list(filter_repo_objects(list(files), allow_patterns=call["delete_patterns"])):
            del files[name]
        here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in filtered(here, call):
            files[name] = (folder / name).read_bytes()

    def snapshot_download(self, *args: Any, **kwargs: Any) -> None:
        call = self.called("snapshot_download", *args, **kwargs)
        repo, folder = self.repo(call), Path(call["local_dir"])
        assert call["revision"] == repo.sha
        (folder / ".cache/huggingface").mkdir(parents=True)
        (folder / ".cache/huggingface/tree.json").write_text("{}")
        for number, name in enumerate(filtered(list(repo.files), call)):
            if number == 2 and "half way" in self.broken:
                raise self.broken["half way"]
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(repo.files[name])


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(hub, "HfApi", found)
    return found


def a_clt(folder: Path, **changes: Any) -> Path:
    one = description(**changes)
    write_clt(folder, one, random_files(one).items())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_clt_comes_back_as_it_was_with_a_card(tmp_path: Path, remote: Hub):
    clt = a_clt(tmp_path / "clt")
    before = contents(clt)
    for odd in ("weights.pt", "model.pkl", "run.py", ".hidden.json", ".b_dec.safetensors.tmp"):
        (clt / odd).write_bytes(b"\x80")
    assert push(clt, "me/clt", private=True) == "https://hub/me/clt"
    repo = remote.repos["model", "me/clt"]
    assert repo.private and set(repo.files) == {*before, "README.md", ".gitattributes"}
    assert repo.files["README.md"].decode() == model_card(CLTDirectory.open(clt).description)
    assert not (clt / "README.md").exists()
    repo.files |= {"evil.pkl": b"\x80", "modeling.py": b"", "sub/x.bin": b"", "a/.b.json": b"{}"}
    assert pull("me/clt", tmp_path / "back") == tmp_path / "back"
    assert contents(tmp_path / "back") == before | {"README.md": repo.files["README.md"]}
    assert {path.name for path in tmp_path.iterdir()} == {"clt", "back"}


def test_an_own_card_stays(tmp_path: Path, remote: Hub):
    (a_clt(tmp_path / "clt") / "README.md").write_text("mine")
    push(tmp_path / "clt", "me/clt", private=False)
    assert remote.repos["model", "me/clt"].files["README.md"] == b"mine"


@pytest.mark.parametrize("parts", [False, True])
def test_a_store_is_a_data_set(tmp_path: Path, remote: Hub, parts: bool):
    for number in (1, 2) if parts else (0,):
        synthetic_store(tmp_path / "store" / (f"part-{number}-of-2" if parts else ""), rows=340, shard_rows=17)
    store = tmp_path / "store"
    before = contents(store)
    assert sum("/c/1" in name for name in before) > 9  # chunks with several digits, of one to three axes
    (store / "mlp_in").mkdir(exist_ok=True)
    for odd in ("mlp_in/c.pkl", "notes.txt"):
        (store / odd).write_bytes(b"\x80")
    push(store, "me/store", private=False)
    assert set(remote.repos) == {("dataset", "me/store")}
    remote.repos["dataset", "me/store"].files |= {"mlp_in/c/0/0/evil.pkl": b"\x80", "mlp_in/c/1.pkl": b"\x80"}
    pull("me/store", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    back, whole = ActivationStore.open(tmp_path / "back"), ActivationStore.open(store)
    np.testing.assert_array_equal(back.read("site", slice(0, 40), [0, 3]), whole.read("site", slice(0, 40), [0, 3]))
    assert len(back.parts) == (2 if parts else 1)


def test_a_name_may_be_a_models_and_a_data_sets(tmp_path: Path, remote: Hub):
    synthetic_store(tmp_path / "store", rows=34)
    push(a_clt(tmp_path / "clt"), "me/x", private=False)
    push(tmp_path / "store", "datasets/me/x", private=False)
    assert {kind for kind, _ in remote.repos} == {"model", "dataset"}
    assert (pull("me/x", tmp_path / "a") / "clt.json").exists()
    assert (pull("datasets/me/x", tmp_path / "b") / "manifest.json").exists()


def test_a_second_push_replaces_the_first(tmp_path: Path, remote: Hub):
    push(a_clt(tmp_path / "first"), "me/clt", private=False)
    remote.repos["model", "me/clt"].files["plots/own.png"] = b"png"
    push(a_clt(tmp_path / "second", sources=(0, 1), activation=Activation("relu")), "me/clt", private=False)
    pull("me/clt", tmp_path / "back")
    assert CLTDirectory.open(tmp_path / "back").description.sources == (0, 1)
    assert (tmp_path / "back/plots/own.png").exists()


@pytest.mark.parametrize("broken", ["create_repo", "create_commit 1", "upload_folder", "create_commit 2"])
def test_a_failed_upload_is_one_line_and_leaves_nothing_to_pull(tmp_path: Path, remote: Hub, broken: str):
    clt = a_clt(tmp_path / "clt")
    before = contents(clt)
    remote.broken[broken] = HfHubHTTPError("503 Server\n\nError", response=RESPONSE)
    with pytest.raises(UserError, match=re.escape("clt could not be pushed to me/clt (503 Server Error)")):
        push(clt, "me/clt", private=False)
    assert contents(clt) == before and [path.name for path in tmp_path.iterdir()] == ["clt"]
    remote.broken.clear()
    with pytest.raises(UserError, match="me/clt"):
        pull("me/clt", tmp_path / "back")
    push(clt, "me/clt", private=False)
    pull("me/clt", tmp_path / "back")


@pytest.mark.parametrize("broken", ["upload_folder", "create_commit 4"])
def test_a_broken_off_replacement_is_not_a_mixture(tmp_path: Path, remote: Hub, broken: str):
    """Two CLTs of the same shapes: half of each would open. And another may come instead."""
    push(a_clt(tmp_path / "clt"), "me/clt", private=False)
    remote.broken[broken] = OSError("Connection reset")
    with pytest.raises(UserError, match="Connection reset"):
        push(tmp_path / "clt", "me/clt", private=False)
    with pytest.raises(UserError, match="has neither clt.json nor manifest.json"):
        pull("me/clt", tmp_path / "back")
    assert "b_dec.safetensors" in remote.repos["model", "me/clt"].files
    remote.broken.clear()
    push(a_clt(tmp_path / "other", sources=(0,), activation=Activation("relu")), "me/clt", private=False)
    assert CLTDirectory.open(pull("me/clt", tmp_path / "back")).description.sources == (0,)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left"),
        hub.NETWORK("down"),
        HFValidationError("not a\nname"),
        RuntimeError(),
        ValueError("v"),
    ],
)
@pytest.mark.parametrize("broken", ["repo_info", "snapshot_download", "half way"])
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path: Path, remote: Hub, broken: str, error: Exception):
    push(a_clt(tmp_path / "clt"), "me/clt", private=False)
    remote.broken[broken] = error
    with pytest.raises(UserError, match="me/clt could not be pulled") as raised:
        pull("me/clt", tmp_path / "back")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["clt"]


def test_what_is_not_whole_is_not_kept(tmp_path: Path, remote: Hub):
    push(a_clt(tmp_path / "clt"), "me/clt", private=False)
    del remote.repos["model", "me/clt"].files["W_dec_1.safetensors"]
    said = re.escape("me/clt holds no whole CLT directory: me/clt/W_dec_1.safetensors is missing")
    with pytest.raises(UserError, match=said):
        pull("me/clt", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["clt"]


def test_wrong_names_are_said(tmp_path: Path, remote: Hub):
    with pytest.raises(UserError, match="Repository Not Found for me/none") as raised:
        pull("me/none", tmp_path / "back")
    assert "\n" not in str(raised.value)
    remote.create_repo("me/bert", repo_type="model")
    with pytest.raises(UserError, match="has neither clt.json nor manifest.json"):
        pull("me/bert", tmp_path / "back")
    (tmp_path / "back").mkdir()
    with pytest.raises(UserError, match="back exists already"):
        pull("me/bert", tmp_path / "back")
    with pytest.raises(UserError, match="back has neither clt.json nor manifest.json"):
        push(tmp_path / "back", "me/x", private=False)


def test_nothing_is_sent_before_the_folder_is_looked_at(tmp_path: Path, remote: Hub):
    clt = a_clt(tmp_path / "clt")
    (clt / "W_dec_1.safetensors").unlink()
    with pytest.raises(UserError, match="W_dec_1.safetensors is missing"):
        push(clt, "me/clt", private=False)
    assert remote.calls == []


def test_other_repositories_are_left_alone(tmp_path: Path, remote: Hub):
    clt = a_clt(tmp_path / "clt")
    remote.create_repo("me/bert", repo_type="model", private=False)
    repo = remote.repos["model", "me/bert"]
    with pytest.raises(UserError, match="me/bert is public already"):
        push(clt, "me/bert", private=True)
    repo.files["model.safetensors"] = b""
    with pytest.raises(UserError, match="me/bert holds model.safetensors and is no CLT directory"):
        push(clt, "me/bert", private=False)
    assert set(repo.files) == {".gitattributes", "model.safetensors"}


# The model card


def front(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


@pytest.mark.parametrize("name, base", [("org/a-model", True), ("gpt2", True), ("a/b/c", False), ("/x/y", False)])
def test_the_card_says_what_the_weights_are(name, base):
    one = description(model=description().model | {"id": name}, activation=Activation("jumprelu", (), "batchtopk"))
    card = model_card(one)
    assert front(card).get("base_model") == (name if base else None)
    assert front(card)["library_name"] == "cltjax" and "cross-layer-transcoder" in front(card)["tags"]
    for line in (
        "| reads (site) | mlp_in |",
        "| offset, targets of a source | 1, 2 |",
        "| activation | jumprelu (trained as batchtopk) |",
        "| sources | 0-1,3 |",
        "| layers predicted | 4 of 5 |",
    ):
        assert line in card
    assert "No test figures" in card and "FVU" not in card
    assert "| activation | topk, k = 2, 3 |" in model_card(description())


def test_the_card_has_the_test_figures():
    card = model_card(description(metrics=METRICS))
    for line in (
        "(`test` rows, 21,471 tokens)",
        "| target | all | text |",
        "| 1 | 0.2 | 0.4 |",
        "| 2 | 0.3 |  |",
        "| mean | 0.25 | 0.5 |",
        "| source | L0 | dead |",
        "| 1 | 15.3 | 0.1562 |",
        "| mean | 15.65 | 0.07812 |",
    ):
        assert line in card
    without = model_card(dataclasses.replace(description(), metrics={"l0": 3.0}))
    assert "| mean | 3 |  |" in without and "FVU" not in without


def test_how_the_card_loads_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    a_clt(tmp_path / "clt")
    [code] = re.findall(r"```python\n(.*?)```", model_card(description()), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"x": {layer: torch.randn(2, D) for layer in (0, 1, 3)}}
    exec(code, known)
    assert {target: y.shape for target, y in known["y_hat"].items()} == dict.fromkeys((1, 2, 3, 4), (2, D))
