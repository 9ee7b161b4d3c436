"""Whether attribution graphs are right: their scores, and what happens when features and patches are taken out.

    figures = validate(GraphsConfig(clt=Path("clt"), model="examples/shapes/model", graphs=100))

On each prompt, with all active features in the graph:

- replacement and completeness (cltjax/replacement/graph.py), unpruned;
- influence is causal: features are taken out of the *original* model, one at a time, attention, norms and MLPs free
  (cltjax/replacement/perturbed.py). For every feature t that the graph says s has influence on, Spearman's correlation
  over pairs of that influence, (A + A^2 + ...)[t, s], and of what became of t: |change of its pre-activation| over
  the sum of its absolute in-edges, since an influence is a share of these. Pairs are `direct` where at least half of
  the influence is the edge between the two, else `multi-hop`. The mean over prompts. `of one source` is the mean over
  the features taken out, each with its own targets; `permuted` is all pairs with each target's effects dealt out anew
  among the features taken out, which leaves what targets differ by: not 0, and what the others are to be read against;
- perturbations: the change of the CLT's inputs d layers on, as the local replacement model has it and in the original:
  cosine (mean over features taken out) and normalised error (squared distance over squared length, both summed);
- patches: those with most influence are given the mean embedding of the image's patches, at every layer where an image
  enters. How far the log-probability
  of the likeliest token falls, over how far it falls where all patches have that; beside as many random patches.

Intervals are of the bootstrap over images. (After Anthropic, "Circuit Tracing", 2025, evaluation of the local
replacement model, where feature-to-feature Spearman is .72, replacement .61, completeness .80.)
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor

from capture.prompts import resolve_template
from capture.recorder import encoder
from capture.vlm import DTYPES, load
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.replacement.asking import held_out
from cltjax.replacement.attribution import attribute, check_memory
from cltjax.replacement.clt import CLT
from cltjax.replacement.config import GraphsConfig
from cltjax.replacement.forced import logits_at
from cltjax.replacement.frozen import entered
from cltjax.replacement.graph import EMBEDDING, FEATURE, TINY, Graph, influence_of, prune, share_through
from cltjax.replacement.labels import read_labels, texts
from cltjax.replacement.local import Local, linearise
from cltjax.replacement.perturbed import Cut, local_inputs, original_inputs, repeated
from cltjax.replacement.resampling import RESAMPLES, Figure, Resampled, interval, ratio
from cltjax.replacement.targets import likeliest

PAIRS = ("all", "direct", "multi-hop", "permuted")
AT_ONCE = 8  # features that are taken out in one batch
FEWEST = 10  # pairs that a correlation is taken over
SHARES = (1 / 18, 1 / 6, 1 / 3)  # of the patches
DRAWS = 4  # of random patches
QUIET = 10.0  # seconds between two lines of progress

Column = dict[Any, float]


def validate(config: GraphsConfig) -> dict[str, Any]:
    """Measure, print, write the figures; returns them. UserError where the CLT is not of this model, and without
    samples."""
    check_options(config)
    began = last = time.monotonic()
    names = texts(read_labels(config.labels))
    named = {name for name, label in names.items() if config.through and label.startswith(config.through)}
    if config.through and not named:
        raise UserError(f"--through {config.through}: no feature in --labels {config.labels} is named so")
    dataset, samples = held_out(config.dataset, config.image_dir, config.split, config.graphs, config.skip_bad)
    vlm = load(config.model, config.compute_dtype, config.device)
    clt = CLT.from_pretrained(config.clt, vlm.device, DTYPES[config.clt_dtype], config.lazy)
    encode = encoder(vlm, resolve_template(config.template, vlm.processor))
    columns: list[Column] = []
    for done, sample in enumerate(samples, start=1):
        local = linearise(vlm, clt, encode(sample), config.other_revision)
        rng = np.random.default_rng([config.seed, done])
        graph = attribute(local, likeliest(local), config.max_nodes, config.memory)
        columns.append(measured(local, graph, config.cuts, rng) | passing(graph, named))
        now = time.monotonic()
        if now - last >= QUIET:
            last = now
            left = (len(samples) - done) * (now - began) / done
            print(f"graphs: {done:,} of {len(samples):,}  left {left:.0f} s", flush=True)
    figures = summary(columns, [sample.image or sample.id for sample in samples], config.seed)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    found = {
        "settings": plain | {"resamples": RESAMPLES},
        "model": {"id": vlm.name, "revision": vlm.revision, "class": vlm.class_name, "dtype": str(vlm.dtype)[6:]},
        "dataset": {"spec": dataset.spec, "fingerprint": dataset.fingerprint},
        **figures,
        "seconds": round(time.monotonic() - began, 1),
    }
    out = config.out or config.clt / f"graphs-{Path(dataset.spec).stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    show(found)
    write_json(out, found)
    print(f"figures: {out}")
    return found


def check_options(config: GraphsConfig) -> None:
    for name, value, least in (
        ("graphs", config.graphs, 1),
        ("cuts", config.cuts, 2),
        ("seed", config.seed, 0),
        ("max-nodes", config.max_nodes, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    check_memory(config.memory)
    if config.through and config.labels is None:
        raise UserError("--through is about names of features: say where they are with --labels")


# One prompt --------------------------------------------------------------------------------------------------


def measured(local: Local, graph: Graph, cuts: int, rng: np.random.Generator) -> Column:
    """Numbers of one prompt to be summed over prompts, with what they are to be divided by."""
    features = graph.of(FEATURE)
    found: Column = {"prompts": 1.0, "features": float(len(features))}
    found |= {("score", name): value for name, value in graph.scores().items()}
    kept = kept_features(graph)
    chosen = np.sort(rng.choice(kept, min(cuts, len(kept)), replace=False))
    _, layer, position, number, value = (one[chosen].tolist() for one in graph.nodes)
    made = [Cut(*one) for one in zip(layer, position, number, value, strict=True)]
    changes = []
    for first in range(0, len(made), AT_ONCE):
        some = made[first : first + AT_ONCE]
        real, said = original_inputs(local, some), local_inputs(local, some)
        changes.append(pre_activation_changes(local, graph, real))
        for key, value in by_depth(some, real, said).items():
            found[key] = found.get(key, 0.0) + value
    found |= correlations(graph, chosen, np.concatenate(changes, 1), rng)
    return found | patch_drops(local, graph, rng)


def kept_features(graph: Graph) -> np.ndarray:
    """The features that pruning keeps, as nodes of the graph."""
    left = prune(graph).graph.nodes
    names = set(zip(*(one[left.kind == FEATURE].tolist() for one in left[1:4]), strict=True))
    nodes = graph.of(FEATURE)
    own = zip(*(one[nodes].tolist() for one in graph.nodes[1:4]), strict=True)
    return nodes[[name in names for name in own]]


def pre_activation_changes(local: Local, graph: Graph, inputs: Mapping[int, Tensor]) -> np.ndarray:
    """[features, cuts]: what each cut does to each feature's pre-activation."""
    nodes = graph.of(FEATURE)
    layers, position, number = (torch.from_numpy(one[nodes]).long() for one in graph.nodes[1:4])
    cuts = len(next(iter(inputs.values()))) - 1
    changes = np.zeros((len(nodes), cuts))
    for layer, x in inputs.items():
        here = torch.nonzero(layers == layer)[:, 0]
        rows = local.clt.encoder_rows(layer, number[here].to(local.clt.device)).to(x.device)
        change = (x[:-1] - x[-1:])[:, position[here].to(x.device)]  # [cuts, n, D]
        changes[here.numpy()] = torch.einsum("bnd,nd->nb", change, rows).double().cpu().numpy()
    return changes


def correlations(graph: Graph, chosen: np.ndarray, changes: np.ndarray, rng: np.random.Generator) -> Column:
    """Spearman's of influence and effect, by PAIRS, with how many pairs, and `of one source`; 0 and 0 where there are
    too few."""
    nodes, shares = graph.of(FEATURE), graph.shares()
    influences = influence_of(shares, chosen, graph.nodes.layer)[nodes]
    direct = shares[nodes][:, chosen].toarray()
    effects = np.abs(changes) / np.maximum(graph.inputs()[nodes], TINY)[:, None]
    there, edge = influences > 0, direct >= influences / 2
    found: Column = {}
    for name, mask in zip(PAIRS, (there, there & edge, there & ~edge, there), strict=True):
        effect = dealt_anew(effects, mask, rng) if name == "permuted" else effects
        value = spearman(influences[mask], effect[mask])
        found |= {("spearman", name): value or 0.0, ("defined", name): float(value is not None)}
        found["pairs", name] = float(mask.sum())
    each = [spearman(influences[there[:, s], s], effects[there[:, s], s]) for s in range(len(chosen))]
    found["of one source"] = sum(value for value in each if value is not None)
    found["sources"] = float(sum(value is not None for value in each))
    return found


def spearman(influences: np.ndarray, effects: np.ndarray) -> float | None:
    """None of too few pairs, and where one does not vary."""
    if len(influences) < FEWEST or np.ptp(influences) == 0 or np.ptp(effects) == 0:
        return None
    return float(np.corrcoef(rankdata(influences), rankdata(effects))[0, 1])


def dealt_anew(effects: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Effects [targets, sources], each target's among the sources of its pairs in the mask."""
    found = effects.copy()
    for row, here in zip(found, mask, strict=True):
        row[here] = rng.permutation(row[here])
    return found


def by_depth(cuts: Sequence[Cut], real: Mapping[int, Tensor], said: Mapping[int, Tensor]) -> Column:
    """Sums over cuts of cosines, squared distances and lengths, by how many layers on."""
    found: Column = {}
    for b, cut in enumerate(cuts):
        for layer in real:
            if layer <= cut.layer:
                continue
            one, other = ((x[layer][b] - x[layer][-1]).flatten().double() for x in (real, said))
            length = float(one.norm())
            if length == 0:
                continue
            numbers = {
                "cosine": float(one @ other) / max(length * float(other.norm()), 1e-30),
                "error": float((one - other).norm() ** 2),
                "square": length**2,
                "cuts": 1.0,
            }
            for name, value in numbers.items():
                key = name, layer - cut.layer
                found[key] = found.get(key, 0.0) + value
    return found


@torch.no_grad()
def patch_drops(local: Local, graph: Graph, rng: np.random.Generator) -> Column:
    """How far the log-probability of the likeliest token falls without patches: all, SHARES ranked by influence, and
    as many at random. Nothing for a prompt without an image."""
    ids = local.batch["input_ids"][0].cpu()
    places = np.flatnonzero(ids.numpy() == local.vlm.image_id) if local.vlm.image_id is not None else np.array([], int)
    if len(places) < 2:
        return {}
    words, embedded = graph.of(EMBEDDING), local.entering.embedded
    ranked = places[np.argsort(-graph.influence()[words][places], kind="stable")]
    counts = [max(1, round(share * len(places))) for share in SHARES]
    without = [ranked[:0], places, *(ranked[:n] for n in counts)]
    without += [rng.choice(places, n, replace=False) for n in counts for _ in range(DRAWS)]

    def enter(layer: int, own: Tensor) -> Tensor:
        changed, added = own.clone(), embedded[layer].to(own)
        mean = added[places].mean(0)
        for b, some in enumerate(without):
            changed[b, some] += mean - added[some]
        return changed

    batch = repeated(local, len(without))
    with ExitStack() as stack:
        for layer in embedded:
            stack.enter_context(entered(local.vlm, partial(enter, layer), layer))
        logits = logits_at(local.vlm, batch, [len(ids) - 1])[:, -1].float().log_softmax(-1)
    drops = (logits[0].max() - logits[:, logits[0].argmax()]).double().cpu().numpy()
    found: Column = {("drop", "all"): drops[1], "with image": 1.0}
    for i, share in enumerate(SHARES):
        found["drop", "ranked", share] = drops[2 + i]
        first = 2 + len(SHARES) + i * DRAWS
        found["drop", "random", share] = drops[first : first + DRAWS].mean()
    return found


def passing(graph: Graph, named: set[str]) -> Column:
    """The share of influence through the named features, 'LAYER:FEATURE'; nothing where none is asked for."""
    if not named:
        return {}
    nodes = graph.of(FEATURE)
    pairs = zip(graph.nodes.layer[nodes].tolist(), graph.nodes.number[nodes].tolist(), strict=True)
    return {"through": share_through(graph, nodes[[f"{layer}:{number}" in named for layer, number in pairs]])}


# All prompts -------------------------------------------------------------------------------------------------


def summary(columns: Sequence[Column], units: Sequence[str], seed: int) -> dict[str, Any]:
    """Figures with intervals of what `measured` gave of each prompt."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    drawn = Resampled({key: np.array([column.get(key, 0.0) for column in columns]) for key in keys}, units, seed)

    def mean(key: Any, by: Any = "prompts") -> Figure:
        return interval(ratio(drawn[key], drawn[by]))

    depths = sorted(key[1] for key in keys if isinstance(key, tuple) and key[0] == "cosine")
    found: dict[str, Any] = {
        "counts": {"prompts": len(columns), "images": drawn.units, "features": mean("features")["value"]},
        "scores": {name: mean(("score", name)) for name in ("replacement", "completeness")},
        "spearman": {
            name: mean(("spearman", name), ("defined", name)) | {"pairs": drawn["pairs", name][0]} for name in PAIRS
        }
        | {"of one source": mean("of one source", "sources") | {"pairs": drawn["pairs", "all"][0]}},
        "perturbed": {
            str(depth): {
                "cosine": mean(("cosine", depth), ("cuts", depth)),
                "error": mean(("error", depth), ("square", depth)),
                "features": drawn["cuts", depth][0],
            }
            for depth in depths
        },
    }
    if "with image" in keys:
        found["patches"] = {"drop of all": interval(ratio(drawn["drop", "all"], drawn["with image"]))} | {
            f"{share:.3f}": {
                how: interval(ratio(drawn["drop", how, share], drawn["drop", "all"])) for how in ("ranked", "random")
            }
            for share in SHARES
        }
    if "through" in keys:
        found["through"] = mean("through")
    return found


def show(figures: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the figures."""
    console = console or Console()
    counts, settings = figures["counts"], figures["settings"]
    title = (
        f"{counts['prompts']:,} {settings['split']} prompts, {counts['images']:,} images, "
        f"{counts['features']:,.0f} active features each"
    )
    table = Table("", "", "95 %", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def add(label: str, figure: Figure) -> None:
        if figure["value"] is not None:
            table.add_row(label, f"{figure['value']:.3f}", f"{figure['low']:.3f}-{figure['high']:.3f}")

    for name, figure in figures["scores"].items():
        add(name, figure)
    table.add_section()
    for name, figure in figures["spearman"].items():
        pairs = "" if name in ("permuted", "of one source") else f" pairs ({figure['pairs']:,.0f})"
        add(f"Spearman of influence and ablation, {name}{pairs}", figure)
    table.add_section()
    for depth, found in figures["perturbed"].items():
        add(f"change {depth} layers on: cosine ({found['features']:,.0f} features)", found["cosine"])
        add("  normalised error", found["error"])
    if patches := figures.get("patches"):
        table.add_section()
        add("log-probability lost without all patches, nats", patches["drop of all"])
        for share, found in patches.items():
            if share != "drop of all":
                add(f"  of it, without {float(share):.1%} of the patches: most influential", found["ranked"])
                add("  random", found["random"])
    if "through" in figures:
        table.add_section()
        add(f"influence through '{settings['through']}'", figures["through"])
    console.print(table)
