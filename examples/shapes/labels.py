"""Names for the features of a CLT of the demo VLM, from what its pictures show and its questions ask.

    python examples/shapes/labels.py --clt clt --store activations --out labels.json

Every token of the bundled data set has properties that are known: of an image patch the color, shape and place of what
its cell holds; of a text token the word and, in an answer, the word that follows; from the subject's last token on what
is asked about, with the chain's material (B) and use (C); at the prompt's last token the kind of question and answer.
A feature is named by the value that its activation predicts best. The score is average precision over all tokens, above
chance: (AP - share) / (1 - share), where `share` of the tokens have the value; 0 for noise, 1 if it separates them. The
value is chosen on `val`, among the few that correlate best; where its score is at least --least it is the name, and the
score on `test` is reported. Features that nothing here predicts stay without a name.

A feature named by its material says beside it what the chain's probe (probes.safetensors) reads of its decoders, as far
as they write below the probe's depth: the material whose logit they raise most.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_array

from cltjax.clt_directory import CLTDirectory
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.replacement.activity import chunks, encoded
from cltjax.replacement.clt import CLT
from cltjax.replacement.patches import image_places
from cltjax.splits import Split
from cltjax.store import IMAGE, SPECIAL, ActivationStore
from cltjax.tokens import rules_of_clt
from examples.shapes.check_vlm import read_probes
from examples.shapes.dataset import draw
from examples.shapes.questions import MATERIALS, USE_OF, Question, material_of
from examples.shapes.scenes import COLORS, COLUMNS, GRID, ROWS, SHAPES, Scene
from examples.shapes.train_vlm import CELL_OF_PATCH, patch_labels, tokens
from examples.shapes.vlm import VOCABULARY

FEWEST = 10  # tokens that have a value, and tokens that a feature is active on: fewer say nothing
SHORTLIST = 5  # values by correlation, of which average precision chooses
PATCH_NAMES = {"color": (*COLORS, "nothing"), "shape": (*SHAPES, "nothing"), "row": ROWS, "column": COLUMNS}


@dataclass(frozen=True, eq=False)
class Known:
    """Tokens of a split, with what is known of them."""

    rows: np.ndarray  # [N] of the store
    values: dict[str, np.ndarray]  # by `property=value` [N] bool


# What is known -----------------------------------------------------------------------------------------------


def known(store: ActivationStore, rows: np.ndarray) -> Known:
    """The properties of these rows (whole samples' rows that count, ascending)."""
    place = np.full(store.rows, -1)
    place[rows] = np.arange(len(rows))
    found: defaultdict[str, list[int]] = defaultdict(list)
    column = store.column("sample")
    for sample in np.unique(column[rows]).tolist():
        first, last = np.searchsorted(column, [sample, sample + 1])
        for name, at in properties(store, sample, int(first), int(last)):
            found[name] += [i for i in place[at].tolist() if i >= 0]
    values = {}
    for name, at in found.items():
        values[name] = np.zeros(len(rows), bool)
        values[name][at] = True
    return Known(rows, values)


def properties(store: ActivationStore, sample: int, first: int, last: int) -> Iterator[tuple[str, np.ndarray]]:
    """(property=value, rows that have it) of one sample, which has the rows first..last."""
    record, rows = store.samples[sample], np.arange(first, last)
    scene, question, _ = draw(int(record["id"].removeprefix("shapes-")))
    modality = store.column("modality")[first:last]
    ids = store.column("token_id")[first:last]
    places = image_places(record["tokens"], store.column("position")[first:last], modality == IMAGE)
    yield from of_patches(scene, rows[places >= 0], places[places >= 0])
    text = np.flatnonzero((modality != IMAGE) & ((modality != SPECIAL) | store.column("generated")[first:last]))
    generated = store.column("generated")[first:last][text].astype(bool)
    end = int(np.flatnonzero(~generated)[-1])  # the prompt's last token, in `text`
    for i, here in enumerate(text):
        yield f"word={VOCABULARY[ids[here]]}", rows[[here]]
        if i >= end and i + 1 < len(text):
            yield f"next={VOCABULARY[ids[text[i + 1]]]}", rows[[here]]
    yield f"kind={question.kind} (end of prompt)", rows[text[[end]]]
    if question.kind != "describe":
        yield f"answer={question.answer} (end of prompt)", rows[text[[end]]]
    start = subject_end(question, ids[text].tolist())
    for name, value in of_subject(question):
        yield f"{name}={value} (end of prompt)", rows[text[[end]]]
        if start is not None:
            yield f"{name}={value} (subject)", rows[text[[start]]]
            yield f"{name}={value}", rows[text[start:]]


def of_patches(scene: Scene, rows: np.ndarray, places: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name, labels in patch_labels([scene]).items():
        here = labels[0].numpy()[places]
        for code in np.unique(here).tolist():
            yield f"patch {name}={PATCH_NAMES[name][code]}", rows[here == code]
    cell = CELL_OF_PATCH.numpy()[places]
    for code in np.unique(cell).tolist():
        yield f"patch place={ROWS[code // GRID]} {COLUMNS[code % GRID]}", rows[cell == code]
    for thing in scene.things:
        yield f"patch thing={thing.color} {thing.shape}", rows[cell == thing.cell]


def of_subject(question: Question) -> Iterator[tuple[str, str]]:
    """What is true of the thing that is asked about."""
    thing = question.subject
    if thing is not None:
        material = material_of(thing)
        yield "asked thing", f"{thing.color} {thing.shape}"
        yield "asked color", thing.color
        yield "asked shape", thing.shape
        yield "asked row", ROWS[thing.row]
        yield "asked column", COLUMNS[thing.column]
        yield "material B", material
        yield "use C", USE_OF[material]


def subject_end(question: Question, ids: list[int]) -> int | None:
    """Where the phrase that names the subject ends."""
    phrase = tokens(question.phrase)
    starts = range(len(ids) - len(phrase) + 1) if phrase else ()
    return next((i + len(phrase) - 1 for i in starts if ids[i : i + len(phrase)] == phrase), None)


# Scores ------------------------------------------------------------------------------------------------------


def above_chance(rows: np.ndarray, values: np.ndarray, truth: np.ndarray) -> float:
    """The score that the module's docstring defines; arguments as `average_precision`."""
    share = float(truth.mean())
    return (average_precision(rows, values, truth) - share) / (1 - share) if share < 1 else 0.0


def average_precision(rows: np.ndarray, values: np.ndarray, truth: np.ndarray) -> float:
    """Of a feature that is `values` > 0 at `rows` and 0 elsewhere, for truth [N]: the mean over true tokens of the
    precision at their activation, equal ones together. NaN without any."""
    order = np.argsort(-values, kind="stable")
    values, right = values[order], truth[rows[order]]
    ends = np.flatnonzero(np.diff(values, append=-1.0))  # of equal values
    hits = np.append(np.cumsum(right)[ends], truth.sum())
    seen = np.append(ends + 1, len(truth))
    total = truth.sum()
    return float((np.diff(hits, prepend=0) * hits / seen).sum() / total) if total else float("nan")


def correlations(activations: csc_array, truth: np.ndarray) -> np.ndarray:
    """[F, C] Pearson's of activations [N, F] with truth [N, C]; -1 where one of the two does not vary."""
    N = len(truth)
    mean, mean_truth = np.asarray(activations.mean(0)).ravel(), truth.mean(0)
    square = np.asarray(activations.multiply(activations).mean(0)).ravel()
    covariance = activations.T @ truth / N - np.outer(mean, mean_truth)
    spread = np.sqrt(np.outer(np.maximum(square - mean**2, 0), mean_truth * (1 - mean_truth)))
    return np.divide(covariance, spread, out=np.full_like(covariance, -1.0), where=spread > 0)


def activations_of(clt: CLT, store: ActivationStore, layer: int, rows: np.ndarray) -> csc_array:
    """[N, F] of one source on these rows."""
    F, start = clt.description.n_features, 0
    parts: list[list[np.ndarray]] = [[], [], []]
    for piece, place, column, value in encoded(clt, store, layer, chunks(store, rows), torch.arange(F)):
        for part, one in zip(parts, (place + start, column, value), strict=True):
            part.append(one)
        start += len(piece)
    place, column, value = (np.concatenate(part) for part in parts)
    return csc_array((value.astype(np.float32), (place, column)), shape=(len(rows), F))


def column_of(activations: csc_array, feature: int) -> tuple[np.ndarray, np.ndarray]:
    part = slice(activations.indptr[feature], activations.indptr[feature + 1])
    return activations.indices[part], activations.data[part]


def name_features(clt: CLT, store: ActivationStore, least: float) -> dict[str, dict[str, Any]]:
    """{"3:17": {"label", "score" on test, "val"}} of the features that some property predicts.

    UserError for a store of another data set, model or site, or without rows of both splits.
    """
    if store.manifest["dataset"]["spec"] != "shapes":
        raise UserError(f"{store.path} is not of the bundled data set: nothing is known of its tokens")
    rules = rules_of_clt(CLTDirectory(Path("the CLT"), clt.description), store)
    splits: tuple[Split, Split] = ("val", "test")
    val, test = (known(store, rules.some_rows(split)) for split in splits)
    names = [name for name, here in val.values.items() if here.sum() >= FEWEST and name in test.values]
    truth = np.stack([val.values[name] for name in names], 1).astype(np.float32)
    found: dict[str, dict[str, Any]] = {}
    for layer in clt.sources:
        on_val, on_test = (activations_of(clt, store, layer, one.rows) for one in (val, test))
        r = correlations(on_val, truth)
        for feature in np.flatnonzero(np.diff(on_val.indptr) >= FEWEST).tolist():
            best = np.argsort(-r[feature], kind="stable")[:SHORTLIST]
            column = column_of(on_val, feature)
            scores = [above_chance(*column, truth[:, i] > 0) for i in best]
            choice = int(np.argmax(scores))
            if scores[choice] >= least:
                name = names[best[choice]]
                score = above_chance(*column_of(on_test, feature), test.values[name])
                found[f"{layer}:{feature}"] = {
                    "label": name,
                    "score": round(score, 3),
                    "val": round(scores[choice], 3),
                }
        print(f"layer {layer}: {sum(key.startswith(f'{layer}:') for key in found)} features have a name", flush=True)
    return found


def read_by_probe(clt: CLT, found: dict[str, dict[str, Any]], model: Path) -> None:
    """Add what the chain's probe reads of the features that are named by a material, where they write below it."""
    probes, depth = read_probes(model)
    weight = probes["material.weight"] - probes["material.weight"].mean(0)
    for key, one in found.items():
        layer, feature = map(int, key.split(":"))
        below = [i for i, target in enumerate(clt.wiring.targets_of(layer)) if target < depth]
        if one["label"].startswith("material B") and below:
            written = clt.decoder_rows(layer, torch.tensor([feature]))[0, below].sum(0)
            one["probe"] = MATERIALS[int((weight @ written).argmax())]


def report(found: dict[str, dict[str, Any]]) -> None:
    """Print how many features each property names, and how well on test."""
    kinds: defaultdict[str, list[float]] = defaultdict(list)
    for one in found.values():
        name, _, rest = one["label"].partition("=")
        place = rest[rest.index(" (") :] if " (" in rest else ""
        kinds[name + place].append(one["score"])
    print(f"\n{'property':<32} {'features':>8}  score on test: mean, least")
    for name, scores in sorted(kinds.items(), key=lambda pair: -len(pair[1])):
        print(f"{name:<32} {len(scores):>8}  {np.mean(scores):.2f}  {np.min(scores):.2f}")
    probed = [one for one in found.values() if "probe" in one]
    right = sum(one["label"].partition("=")[2].split()[0] == one["probe"] for one in probed)
    if probed:
        print(f"the chain's probe reads the material of the name off the decoders of {right} of {len(probed)}")
    repeated = Counter(one["label"] for one in found.values()).most_common(3)
    print("most often: " + ", ".join(f"{label} ({n})" for label, n in repeated))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clt", type=Path, default=Path("clt"))
    parser.add_argument("--store", type=Path, default=Path("activations"))
    parser.add_argument("--out", type=Path, default=Path("labels.json"))
    parser.add_argument("--least", type=float, default=0.5, help="score on val from which on there is a name")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="for its probes")
    options = parser.parse_args()
    try:
        store = ActivationStore.open(options.store)
        clt = CLT.from_pretrained(options.clt)
        found = name_features(clt, store, options.least)
        read_by_probe(clt, found, options.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    report(found)
    write_json(options.out, found)
    print(f"{options.out}: {len(found)} of {len(clt.sources) * clt.description.n_features} features")


if __name__ == "__main__":
    main()
