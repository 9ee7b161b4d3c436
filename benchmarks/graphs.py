"""Attribution graphs of the demo VLM: what they are worth, and whether they show a chain that is known to be there.

    python -m benchmarks.graphs --clt clt --per-layer per_layer_clt --graphs 100

Figures of `evaluate.py --graphs` for a CLT and for a per-layer transcoder side by side. Then the chain A -> B -> C
(color x shape -> material -> use; examples/shapes/questions.py): on questions about the use of things for which
training never asked it, the share of the influence on the answer that passes through features of B, beside as many
other features of the same layers (random ones that are active, the mean of DRAWS).

B is named by the chain's linear probe (probes.safetensors), which reads the material off the residual stream after
`depth` layers: a feature is of B if at least half of the square of what it writes below that depth, layers summed, lies
in the directions that the probe's verdict depends on. That is (materials - 1) of D dimensions.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.report import machine, publish
from capture.prompts import resolve_template
from capture.vlm import load
from cltjax.replacement.asking import following_ids
from cltjax.replacement.attribution import attribute
from cltjax.replacement.clt import CLT
from cltjax.replacement.config import GraphsConfig
from cltjax.replacement.graph import FEATURE, Graph, share_through
from cltjax.replacement.local import linearise
from cltjax.replacement.resampling import Figure, Resampled, interval, ratio
from cltjax.replacement.targets import tokens
from cltjax.replacement.validation import validate
from examples.shapes.chain import use_items
from examples.shapes.check_vlm import read_probes

MODEL = Path(__file__).parents[1] / "examples/shapes/model"
RESULTS = Path(__file__).parent / "results"
IN_SPAN = 0.5
DRAWS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clt", type=Path, required=True, help="a joint CLT of the demo VLM")
    parser.add_argument("--per-layer", type=Path, required=True, help="a per-layer transcoder (--n-targets 1)")
    parser.add_argument("--graphs", type=int, default=100, help="prompts, of each of the two parts")
    options = parser.parse_args()
    folders = {"CLT": options.clt, "per-layer": options.per_layer}
    found = {
        name: {
            "figures": validate(GraphsConfig(folder, str(MODEL), options.graphs, device="cpu")),
            "chain": chain(CLT.from_pretrained(folder), options.graphs),
        }
        for name, folder in folders.items()
    }
    for one in found.values():  # paths of this machine say nothing elsewhere
        one["figures"] = {name: value for name, value in one["figures"].items() if name not in ("settings", "model")}
    (RESULTS / "graphs.json").write_text(json.dumps(found, indent=1))
    publish(RESULTS / "graphs.txt", [machine("torch", "transformers"), table(found)], width=110)


def chain(clt: CLT, count: int) -> dict[str, Any]:
    """Shares of influence through B and through others, with intervals over questions."""
    vlm = load(str(MODEL), device="cpu")
    template = resolve_template("chat", vlm.processor)
    of_b = features_of_b(clt)
    rng = np.random.default_rng(0)
    columns = []
    for item in use_items("test", count, unasked=True, rng=random.Random(5)):
        text = template.render(item.question.text, image=True)
        local = linearise(vlm, clt, vlm.encode(text, item.picture.image))
        [answer] = following_ids(vlm, text, item.question.answer)
        columns.append(passing(attribute(local, tokens(local, [answer])), of_b, rng))
    drawn = Resampled({key: np.array([one[key] for one in columns]) for key in columns[0]}, range(len(columns)))
    figures: dict[str, Any] = {name: interval(ratio(drawn[name], drawn["n"])) for name in ("B", "others", "active")}
    return figures | {"features of B": {str(layer): len(some) for layer, some in of_b.items()}}


def features_of_b(clt: CLT, share: float = IN_SPAN) -> dict[int, set[int]]:
    """By source layer, the features whose writes below the probe's depth are its own directions."""
    probes, depth = read_probes(MODEL)
    weight = probes["material.weight"] - probes["material.weight"].mean(0)
    span = torch.linalg.svd(weight, full_matrices=False).Vh[: len(weight) - 1]
    found = {}
    for layer in clt.sources:
        below = [slot for slot, target in enumerate(clt.wiring.targets_of(layer)) if target < depth]
        if below:
            rows = clt.decoder_rows(layer, torch.arange(clt.description.n_features))[:, below].sum(1)
            part = (rows @ span.T).square().sum(1) / rows.square().sum(1).clamp(min=1e-30)
            found[layer] = set(torch.nonzero(part >= share)[:, 0].tolist())
    return found


def passing(graph: Graph, of_b: dict[int, set[int]], rng: np.random.Generator) -> dict[str, float]:
    """Through B; through as many other active features of the same layers; how many of B are active."""
    features = graph.of(FEATURE)
    layer, number = graph.nodes.layer[features], graph.nodes.number[features]
    is_b = np.array([n in of_b.get(at, ()) for at, n in zip(layer.tolist(), number.tolist(), strict=True)])
    groups = [(features[(layer == at) & is_b], features[(layer == at) & ~is_b]) for at in of_b]
    shares = []
    for _ in range(DRAWS):
        some = [rng.choice(rest, min(len(mine), len(rest)), replace=False) for mine, rest in groups]
        shares.append(share_through(graph, np.concatenate(some)))
    return {
        "B": share_through(graph, features[is_b]),
        "others": float(np.mean(shares)),
        "active": float(is_b.sum()),
        "n": 1.0,
    }


def table(found: dict[str, Any]) -> Table:
    made = Table("", *found, title="95 % of the bootstrap over images", title_justify="left")

    def add(label: str, figures: list[Figure]) -> None:
        cells = [
            "" if one["value"] is None else f"{one['value']:.3f} ({one['low']:.3f}, {one['high']:.3f})"
            for one in figures
        ]
        made.add_row(label, *cells)

    all_ = [one["figures"] for one in found.values()]
    for name in ("replacement", "completeness"):
        add(name, [one["scores"][name] for one in all_])
    for name in ("all", "direct", "multi-hop"):
        add(f"Spearman, {name} pairs", [one["spearman"][name] for one in all_])
    for depth in all_[0]["perturbed"]:
        for name in ("cosine", "error"):
            add(f"change {depth} on: {name}", [one["perturbed"][depth][name] for one in all_])
    for share in (key for key in all_[0]["patches"] if key != "drop of all"):
        for how in ("ranked", "random"):
            add(f"patches, {float(share):.1%} {how}: of the drop", [one["patches"][share][how] for one in all_])
    made.add_section()
    for name, label in (("B", "chain: influence through B"), ("others", "  as many others"), ("active", "  B active")):
        add(label, [one["chain"][name] for one in found.values()])
    return made


if __name__ == "__main__":
    main()
