"""CLT directories and activation stores to and from the Hugging Face hub.

    push(Path("clt"), "someone/a-clt", private=True)          pull("someone/a-clt", Path("clt"), revision=None)

A CLT directory (clt.json) is a model repository, a store (manifest.json) a data set. Only the kinds of files that
belong to one are moved: nothing that is a pickle by its name, nothing that is run. An upload is many commits. The file
that makes a folder what it is goes first and comes last, and UPLOADING stands in its place meanwhile: a repository
whose upload broke off holds nothing that `pull` would take, and can be pushed to again.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, XetDownloadError

from cltjax.clt_directory import DESCRIPTION, CLTDirectory, Description, read_description
from cltjax.errors import UserError
from cltjax.files import whole_folder
from cltjax.store import ActivationStore
from cltjax.store_format import MANIFEST

CARD = "README.md"
DATASETS = "datasets/"
UPLOADING = "cltjax-upload.json"
TYPES = ("*.safetensors", "*.json", "*.jsonl", "*.md", "*.png", "*.yaml")
# A zarr chunk has a number for a name, one folder for each axis: mlp_in/c/12/0/0. `*` reaches across folders, so the
# last parts are spelt out.
CHUNKS = tuple(f"*/c/{'[0-9]' * digits}{tail}" for digits in range(1, 9) for tail in ("", "/0", "/0/0"))
HIDDEN = (".*", "*/.*")
# What goes wrong between here and the hub: the first is the HTTP library's own error, of which there have been two; the
# transfer library raises RuntimeError, and what the hub does not accept is a ValueError.
NETWORK = cast(type[Exception], HfHubHTTPError.__bases__[0])
FAULTS = (NETWORK, OSError, ValueError, RuntimeError, XetDownloadError)
HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Kind:
    """What is moved: how the hub calls such a repository, and who looks whether a folder is one."""

    name: str
    repo_type: Literal["model", "dataset"]
    markers: tuple[str, ...]  # the files that make a folder one, as patterns
    patterns: tuple[str, ...]  # all that belong
    check: Callable[[Path], object]

    def is_marked_by(self, files: list[str]) -> list[str]:
        """Those of these files that make it one."""
        return [file for file in files if any(fnmatchcase(file, marker) for marker in self.markers)]


CLT = Kind("CLT directory", "model", (DESCRIPTION,), TYPES, CLTDirectory.open)
STORE = Kind(
    "activation store", "dataset", (MANIFEST, f"part-*-of-*/{MANIFEST}"), (*TYPES, *CHUNKS), ActivationStore.open
)


def push(folder: Path | str, repo: str, private: bool) -> str:
    """Upload a CLT directory or a store, and give the repository's address. A CLT without README.md gets a model card.

    The repository is made where there is none. Weights and chunks in it that are not in the folder are deleted.
    UserError where the folder is not whole, where the repository holds something else, where it is public though
    `private` is asked for, and where the upload fails; nothing is written into the folder.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    kind.check(folder)
    api, repo_id, repo_type = HfApi(), repo.removeprefix(DATASETS), kind.repo_type
    with one_line(f"{folder} could not be pushed to {repo}"):
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        public = not api.repo_info(repo_id, repo_type=repo_type).private
        there = api.list_repo_files(repo_id, repo_type=repo_type)
    if private and public:
        raise UserError(f"{repo} is public already: name another repository, or push without --private")
    before = [file for file in there if file == UPLOADING] + kind.is_marked_by(there)
    if not before and (others := sorted(set(there) - {CARD, ".gitattributes"})):
        raise UserError(f"{repo} holds {others[0]} and is no {kind.name}: name another repository")
    start: list[CommitOperation] = [CommitOperationDelete(file) for file in before if file != UPLOADING]
    start.append(CommitOperationAdd(UPLOADING, json.dumps({"what": kind.name}).encode()))
    end: list[CommitOperation] = [CommitOperationDelete(UPLOADING)]
    for marker in kind.markers:
        end += [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in folder.glob(marker)]
    if kind is CLT and not (folder / CARD).exists():
        end.append(CommitOperationAdd(CARD, model_card(read_description(folder)).encode()))
    with one_line(f"{folder} could not be pushed to {repo}"):
        api.create_commit(repo_id, start, commit_message=f"Begin to upload the {kind.name}", repo_type=repo_type)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type=repo_type,
            allow_patterns=list(kind.patterns),
            ignore_patterns=[*HIDDEN, *kind.markers],
            delete_patterns=["*.safetensors", *CHUNKS],
            commit_message=f"Upload the files of the {kind.name}",
        )
        api.create_commit(repo_id, end, commit_message=f"Upload the {kind.name}", repo_type=repo_type)
    return str(url)


def pull(repo: str, out: Path | str, revision: str | None = None) -> Path:
    """Download a CLT directory or a store as the folder `out`, whole or not at all.

    repo: `owner/name`, looked for among models, then among data sets; `datasets/owner/name` among these alone.
    UserError where `out` exists, where there is no such repository, and where the download fails or is not whole.
    """
    out = Path(out)
    with whole_folder(out) as temporary:
        with one_line(f"{repo} could not be pulled"):
            api = HfApi()
            kind, commit = find(api, repo, revision)
            api.snapshot_download(
                repo.removeprefix(DATASETS),
                repo_type=kind.repo_type,
                revision=commit,
                local_dir=temporary,
                allow_patterns=list(kind.patterns),
                ignore_patterns=list(HIDDEN),
            )
        shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the hub's notes on what it downloaded
        try:
            kind.check(temporary)
        except UserError as error:
            reason = str(error).replace(str(temporary), repo)
            raise UserError(f"{repo} holds no whole {kind.name}: {reason}") from error
    return out


def kind_of(folder: Path) -> Kind:
    """UserError where it is neither."""
    for kind in (CLT, STORE):
        if any(file.is_file() for marker in kind.markers for file in folder.glob(marker)):
            return kind
    raise UserError(f"{folder} has neither {DESCRIPTION} nor {MANIFEST}: name a CLT directory or an activation store")


def find(api: HfApi, repo: str, revision: str | None) -> tuple[Kind, str | None]:
    """What a repository holds, and the commit that `revision` (by default the newest) is now."""
    name = repo.removeprefix(DATASETS)
    kinds = [STORE] if repo.startswith(DATASETS) else [CLT, STORE]
    missing = []
    for kind in kinds:
        try:
            commit = api.repo_info(name, repo_type=kind.repo_type, revision=revision).sha
        except RepositoryNotFoundError as error:
            missing.append(error)
            continue
        if kind.is_marked_by(api.list_repo_files(name, repo_type=kind.repo_type, revision=commit)):
            return kind, commit
    if len(missing) == len(kinds):
        raise missing[0]
    raise UserError(f"{repo} has neither {DESCRIPTION} nor {MANIFEST}: name the repository of a CLT or of a store")


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Faults of the hub, the network and the disk as a UserError of one line."""
    try:
        yield
    except FAULTS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{what} ({reason}): check the name, the network and `hf auth whoami`, then try again"
        ) from error


# The model card -----------------------------------------------------------------------------------------------------


def model_card(described: Description) -> str:
    """README.md of a CLT directory: what it is, its figures on held-out rows, and how it is loaded."""
    model = described.model.get("id")
    front: dict[str, Any] = {"library_name": "cltjax"}
    if isinstance(model, str) and HUB_ID.fullmatch(model):  # the hub refuses a card that names a local folder here
        front["base_model"] = model
    front["tags"] = ["cross-layer-transcoder", "transcoder", "interpretability", "vision-language-model"]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Cross-layer transcoder of {model or 'a model'}",
        description_table(described),
        figures_tables(described.metrics) or "No test figures are recorded.",
        HOW_TO_LOAD.replace("SITE", described.site),
    ]
    return "\n\n".join(parts) + "\n"


HOW_TO_LOAD = """## Load it

After `cltjax pull THIS_REPOSITORY --out clt`, with `x[layer]` the raw `SITE` of each source layer, `[..., d_model]`:

```python
from cltjax.replacement.clt import CLT

clt = CLT.from_pretrained("clt")
features = {layer: clt.encode(layer, x[layer]) for layer in clt.sources}
y_hat = {target: clt.decode(target, features) for target in clt.targets}
```"""


def description_table(described: Description) -> str:
    """What the weights are."""
    activation, wiring = described.activation, described.wiring
    kind = activation.kind
    if activation.k:
        kind += f", k = {', '.join(map(str, sorted(set(activation.k))))}"
    if activation.trained_as not in ("", activation.kind):
        kind += f" (trained as {activation.trained_as})"
    rows = {
        "model": f"{described.model.get('id')} (revision {described.model.get('revision')})",
        "layers, width": f"{described.n_layers}, {described.d_model}",
        "features a source": described.n_features,
        "sources": wiring.name.removeprefix("L"),
        "reads (site)": described.site,
        "offset, targets of a source": f"{described.offset}, {described.n_targets}",
        "layers predicted": f"{len(wiring.targets)} of {described.n_layers}",
        "activation": kind,
        "combined": described.combined,
        "weights": described.dtype,
    }
    if described.derived_from:
        rows["derived from"] = described.derived_from
    return table(["", ""], [[name, str(value)] for name, value in rows.items()])


def figures_tables(metrics: dict[str, Any]) -> str:
    """The test figures that `cltjax.metrics.summary` makes, as far as they are there; else nothing."""
    parts = []
    if targets := metrics.get("targets"):
        groups = list(dict.fromkeys(group for by in targets.values() for group in by))
        rows = [[layer, *(figure(by.get(group, {}).get("fvu")) for group in groups)] for layer, by in targets.items()]
        if mean := metrics.get("fvu"):
            rows.append(["mean", *(figure(mean.get(group)) for group in groups)])
        parts.append("Fraction of variance unexplained (FVU), by target layer and group of tokens:")
        parts.append(table(["target", *groups], rows))
    rows = [[layer, figure(by.get("l0")), figure(by.get("dead"))] for layer, by in metrics.get("sources", {}).items()]
    if "l0" in metrics or "dead" in metrics:
        rows.append(["mean", figure(metrics.get("l0")), figure(metrics.get("dead"))])
    if rows:
        parts.append("Active features a token (L0) and share of features that are never active (dead), by source:")
        parts.append(table(["source", "L0", "dead"], rows))
    if parts:
        rows = f", {metrics['rows']:,} tokens" if "rows" in metrics else ""
        parts.insert(0, f"## Figures on held-out images (`test` rows{rows})")
    return "\n\n".join(parts)


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
