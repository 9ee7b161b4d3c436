"""Which MLP neurons of the original model a feature stands for: aligned with its decoder, and firing with it.

    figures = find_neurons(Path("clt"), "examples/shapes/model", "3:17,3:1234")

cltjax/replacement/down_proj.py says what a neuron i is, what its column c_i, and with a norm behind the map what its
activation: what goes onto c_i in the residual stream. For a feature of source l with decoder
d = W_dec_l[feature, t - l - offset], and every neuron of target layer t:

    cosine         of c_i and d; projection = c_i d / |d|: what it writes along d, by unit of its activation
    correlation    Pearson's, of the feature's and the neuron's activations over held-out tokens, signed; the feature
                   runs on the original model's activations. Gated neurons have activations of both signs
    score          cosine * correlation, which ranks the neurons. Above 0 it pushes along d as the feature fires, also
                   where both are negative
    share          rise of z_i c_i d over the rise of the whole write's product with d; rise: the mean where the feature
                   is active less the mean elsewhere. What is gone along d without this neuron. All add up to 1; there
                   is none where the MLP does not write more along d
    explained      |P d|^2 / |d|^2, P onto the columns of this neuron and of all that rank before it

What is chance? A correlation stands against those that the *same neuron* has with MATCHED other features of the same
source: those that fire most alike, by number of text and of image tokens (their mean and standard deviation, and z). A
circular shift of the tokens would ask less: it also takes away what a feature shares with everything that fires on
images or at the ends of prompts.

A ranking shows the best of many neurons, so p is of the *maximum* (Westfall and Young, Resampling-Based Multiple
Testing, 1993): among the feature itself and the matched ones g, the share of those for which the best neuron by
cosine(feature) * correlation(g) has this score or more. That is the feature's direction with another one's firing. p
holds within one feature and target layer, as far as the others could stand in its place: some that are much like it
make p too large, a poor match (the table says how often the others fire) may make it too small. The rankings by g give
`explained by chance`.

Cosines stand against those of random directions in the space that decoders write to: Gaussian mixtures of the matched
features' decoders. `random cosine` is the size that the best neuron of the layer has for one in twenty of them.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from capture.inputs import IMAGE, SPECIAL, TEXT
from capture.prompts import resolve_template
from capture.vlm import DTYPES, load
from cltjax.clt_directory import CLTDirectory
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.replacement.asking import held_out
from cltjax.replacement.clt import CLT
from cltjax.replacement.down_proj import locate
from cltjax.replacement.firing import HeldOut, Sums, activations, fire_alike
from cltjax.replacement.model import check_match
from cltjax.splits import Split
from cltjax.tokens import trained_rules, used_modalities

MATCHED = 99  # other features that one is compared with: p is at least 0.01
DIRECTIONS = 128  # random ones
QUANTILE = 0.95  # of what happens by chance
MODALITIES = {"text": TEXT, "image": IMAGE, "special": SPECIAL}
LEGEND = """corr: with the feature; others, ±: mean and deviation of the neuron's with features that fire alike, and z.
score: cosine x corr. p: share of those features with whose firing the layer's best neuron scores as much. share: of
what the MLP writes more along the decoder where the feature is active. explained: of the decoder's square, by this and
the neurons above. A layer's own row is chance: the best cosine of a random direction and the best score (1 in 20 is
higher), and what as many neurons explain on average."""

Feature = tuple[int, int]  # source layer, number


def find_neurons(
    clt: Path,
    model: str,
    features: str,
    dataset: str = "shapes",
    image_dir: Path | None = None,
    top: int = 10,
    template: str = "chat",
    max_samples: int | None = None,
    batch_size: int = 16,
    generate: int = 0,
    split: Split = "test",
    device: str = "auto",
    compute_dtype: str = "auto",
    clt_dtype: str = "float32",
    skip_bad: bool = False,
    other_revision: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure, print a table for each feature, write the figures; returns them. Arguments: `cltjax neurons`' options.

    UserError for features that the CLT does not have or that never fire on these tokens, where the CLT is not of
    this model, and for an MLP of another form than the one above.
    """
    for name, value, least in (
        ("top", top, 1),
        ("batch-size", batch_size, 1),
        ("generate", generate, 0),
        ("max-samples", max_samples, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    began = time.monotonic()
    directory = CLTDirectory.open(clt)
    wanted = parse_features(features, directory)
    rules, limits = trained_rules(directory)
    data, samples = held_out(dataset, image_dir, split, max_samples, skip_bad)
    vlm = load(model, compute_dtype, device)
    loaded = CLT.from_pretrained(clt, vlm.device, DTYPES[clt_dtype], lazy=True)
    check_match(vlm, loaded, other_revision)
    held = HeldOut(
        vlm,
        loaded,
        samples,
        resolve_template(template, vlm.processor),
        batch_size,
        generate,
        used_modalities(rules),
        None if rules.outliers else limits,
    )
    found, counts = neurons_of_features(held, wanted, top)
    figures: dict[str, Any] = {
        "settings": {
            "clt": str(clt),
            "clt_dtype": clt_dtype,
            "features": features,
            "image_dir": None if image_dir is None else str(image_dir),
            "top": top,
            "template": template,
            "max_samples": max_samples,
            "batch_size": batch_size,
            "generate": generate,
            "split": split,
        },
        "model": {"id": vlm.name, "revision": vlm.revision, "class": vlm.class_name, "dtype": str(vlm.dtype)[6:]},
        "dataset": {"spec": data.spec, "fingerprint": data.fingerprint, "skipped": len(data.skipped)},
        "samples": len(samples),
        "tokens": counts,
        "features": found,
        "seconds": round(time.monotonic() - began, 1),
    }
    show(figures)
    path = out or clt / f"neurons-{Path(data.spec).stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)
    print(f"figures: {path}")
    return figures


def parse_features(text: str, directory: CLTDirectory) -> list[Feature]:
    """`3:17,3:1234` as (source, feature), each once. UserError for what is none, or none of this CLT."""
    described = directory.description
    found: list[Feature] = []
    for one in text.replace(" ", "").split(","):
        layer, _, number = one.partition(":")
        if not (layer.isdecimal() and number.isdecimal()):
            raise UserError(f"--features {text}: '{one}' is no feature: write LAYER:FEATURE, as in 3:17,3:1234")
        if int(layer) not in described.sources:
            raise UserError(f"{one}: layer {layer} is no source of the CLT: {described.sources} are")
        if int(number) >= described.n_features:
            raise UserError(f"{one}: a layer has features 0 to {described.n_features - 1}")
        found.append((int(layer), int(number)))
    return list(dict.fromkeys(found))


# Figures -------------------------------------------------------------------------------------------------------------


def neurons_of_features(
    held: HeldOut, wanted: Sequence[Feature], top: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The figures of each feature, and over how many tokens. Two passes: the first finds the features that fire alike.

    UserError for features that never fire, or alone, and as `locate`.
    """
    vlm, clt = held.vlm, held.clt
    targets = sorted({target for source, _ in wanted for target in clt.wiring.targets_of(source)})
    neurons = locate(vlm, targets, held.first())
    fired, counts = firing(held, sorted({source for source, _ in wanted}))
    alike = {(s, f): fire_alike(fired[s], f, MATCHED) for s, f in wanted}
    for (source, number), others in alike.items():
        if not fired[source][:, number].any():
            raise UserError(f"{source}:{number} is active on none of these tokens: take more samples, or leave it out")
        if not len(others):
            raise UserError(f"{source}:{number} has no feature to be compared with: no other one of its layer fires")

    members: dict[int, set[int]] = {}  # by source: features asked about, and those that they are compared with
    for (source, number), others in alike.items():
        members.setdefault(source, set()).update((number, *others.tolist()))
    chosen = {source: torch.tensor(sorted(some), device=vlm.device) for source, some in members.items()}
    place = {one: i for i, one in enumerate((s, f) for s, some in chosen.items() for f in some.tolist())}
    sums = Sums.zero(
        len(place) + len(wanted), {layer: one.down.in_features for layer, one in neurons.items()}, vlm.device
    )
    samples = dict.fromkeys(wanted, 0)
    for tokens in held.tokens(neurons):
        a = torch.cat([activations(clt, s, tokens.x(s), some) for s, some in chosen.items()], 1)
        on = a[:, [place[one] for one in wanted]] > 0
        sums.add(torch.cat([a, on.double()], 1), tokens.z)
        for one, here in zip(wanted, on.T, strict=True):
            samples[one] += len(tokens.sample[here].unique())

    found = []
    for source, number in wanted:
        tokens = fired[source].sum(0)
        compared = tokens[alike[source, number]]
        found.append(
            {
                "source": source,
                "feature": number,
                "active": {
                    "tokens": int(tokens[number]),
                    "samples": samples[source, number],
                    "mean": float(sums.a[place[source, number]] / tokens[number]),
                    **{
                        f"of {name}": int(fired[source][code, number]) / counts[name]
                        for name, code in MODALITIES.items()
                        if counts[name]
                    },
                },
                "compared with": {"features": len(compared), "tokens": [int(compared.min()), int(compared.max())]},
                "targets": [],
            }
        )
    for target, those in neurons.items():
        C, correlation = those.columns.to(vlm.device), sums.correlation(target)
        for i, (source, number) in enumerate(wanted):
            if target not in clt.wiring.targets_of(source):
                continue
            row, others = place[source, number], alike[source, number]
            rows = clt.decoder_rows(source, torch.cat([others.new_tensor([number]), others]))
            decoders = rows[:, target - source - clt.description.offset]
            if decoders[0].any():
                figures = at_target(
                    decoders[0],
                    decoders[1:],
                    C,
                    correlation[row],
                    correlation[[place[source, other] for other in others.tolist()]],
                    sums.rise(target, len(place) + i),
                    top,
                )
                found[i]["targets"].append({"layer": target, **figures})
    return found, counts


def firing(held: HeldOut, sources: Sequence[int]) -> tuple[dict[int, Tensor], dict[str, int]]:
    """On how many tokens each feature of these sources is active, [M, F] by modality; and how many tokens there are."""
    F = held.clt.description.n_features
    fired = {source: torch.zeros(len(MODALITIES), F, dtype=torch.long, device=held.vlm.device) for source in sources}
    counts = dict.fromkeys((*MODALITIES, "left out"), 0)
    for tokens in held.tokens({}):
        counts["left out"] += tokens.left_out
        for name, code in MODALITIES.items():
            counts[name] += int((tokens.modality == code).sum())
        for source in sources:
            values, indices = held.clt.encode(source, tokens.x(source))
            for code in MODALITIES.values():
                here = (values > 0) & (tokens.modality == code)[:, None]
                fired[source][code] += torch.bincount(indices[here], minlength=F)
    return fired, counts


def at_target(
    d: Tensor, others: Tensor, C: Tensor, correlation: Tensor, of_others: Tensor, rise: Tensor, top: int
) -> dict[str, Any]:
    """What the module's docstring defines, at one target layer.

    d [D]: the feature's decoder, not 0. others [G, D]: those of the features that it is compared with. C [D, N]: the
    neurons' columns. correlation [N]: with the feature. of_others [G, N]: with the others. rise [N]: of activations.
    """
    length, lengths = d.norm(), C.norm(dim=0).clamp_min(torch.finfo(C.dtype).tiny)
    projection = d @ C / length
    cosine = (projection / lengths).double()
    score, by_chance = cosine * correlation, cosine * of_others
    best = by_chance.max(1).values
    rises = rise * projection.double()
    whole = float(rises.sum())
    ranked = score.topk(min(top, len(score), len(d))).indices
    ranked = ranked[score[ranked] > 0]
    p = (1 + (best[:, None] >= score[ranked]).sum(0)).double() / (1 + len(best))
    mean, deviation = of_others.mean(0), of_others.std(0, correction=0)
    so_far = explained(C[:, ranked], d)
    alternatives = by_chance.topk(len(ranked), dim=1).indices
    return {
        "decoder norm": float(length),
        "neurons of layer": len(score),
        "random cosine": random_cosine(others, C / lengths),
        "score by chance": float(best.quantile(QUANTILE)),
        "explained by chance": float(explained(C[:, alternatives].transpose(0, 1), d)[:, -1].mean()) if len(p) else 0.0,
        "rise": whole,
        "neurons": [
            {
                "neuron": i,
                "cosine": float(cosine[i]),
                "projection": float(projection[i]),
                "correlation": float(correlation[i]),
                "others": {"mean": float(mean[i]), "deviation": float(deviation[i])},
                "z": float((correlation[i] - mean[i]) / deviation[i]) if deviation[i] > 0 else None,
                "score": float(score[i]),
                "p": float(p[rank]),
                "share": float(rises[i]) / whole if whole > 0 else None,
                "explained": float(so_far[rank]),
            }
            for rank, i in enumerate(ranked.tolist())
        ],
    }


def explained(columns: Tensor, d: Tensor) -> Tensor:
    """[..., n]: of |d|^2, what least squares on the first 1, 2, ... n of the columns [..., D, n] reproduces."""
    Q = torch.linalg.qr(columns.double()).Q
    d = d.double()
    return ((d @ Q) / d.norm()).square().cumsum(-1)


def random_cosine(decoders: Tensor, directions: Tensor) -> float:
    """The largest |cosine| of unit columns [D, N] with a Gaussian mixture of decoders [G, D]: 1 in 20 has more."""
    weights = torch.randn(DIRECTIONS, len(decoders), generator=torch.Generator().manual_seed(0)).to(decoders.device)
    mixed = functional.normalize(weights @ functional.normalize(decoders, dim=1), dim=1)
    return float((mixed @ directions).abs().max(1).values.quantile(QUANTILE))


def show(figures: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table for each feature."""
    console = console or Console()
    counts = figures["tokens"]
    for one in figures["features"]:
        active, compared = one["active"], one["compared with"]
        rates = ", ".join(f"{active[f'of {name}']:.2%} of {name}" for name in MODALITIES if counts[name])
        title = (
            f"{one['source']}:{one['feature']}: active on {active['tokens']:,} tokens ({rates}) of "
            f"{active['samples']:,} samples; compared with {compared['features']} features "
            f"active on {compared['tokens'][0]:,} to {compared['tokens'][1]:,}"
        )
        table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True, pad_edge=False)
        table.add_column("neuron", no_wrap=True)
        for name in ("cosine", "corr", "others", "±", "z", "score", "p", "share", "explained"):
            table.add_column(name, justify="right")
        for target in one["targets"]:
            table.add_section()
            names = ("random cosine", "score by chance", "explained by chance")
            cosine, score, chance = (f"[dim]{target[name]:.2f}" for name in names)
            table.add_row(f"[bold]layer {target['layer']}", cosine, "", "", "", "", score, "", "", chance)
            for neuron in target["neurons"]:
                others = neuron["others"]
                before = (neuron["cosine"], neuron["correlation"], others["mean"], others["deviation"])
                after = (neuron["score"], neuron["p"], neuron["share"], neuron["explained"])
                cells = [*map(spelled, before), spelled(neuron["z"], ".1f"), *map(spelled, after)]
                table.add_row(f"  {neuron['neuron']}", *cells)
        console.print(table)
    print(LEGEND)
    kinds = ", ".join(f"{counts[name]:,} {name}" for name in MODALITIES if counts[name])
    of = f"{figures['samples']:,} {figures['settings']['split']} samples of {Path(figures['dataset']['spec']).name}"
    print(f"tokens: {kinds} of {of}; left out: {counts['left out']:,}")


def spelled(figure: float | None, form: str = ".2f") -> str:
    return "-" if figure is None else f"{figure:{form}}"
