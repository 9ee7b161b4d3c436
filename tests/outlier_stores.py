"""Small stores in which a few rows of every modality are 1e3 to 1e5 times as large as the others, at some layers."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cltjax.config import TokensConfig
from cltjax.store import ActivationStore
from cltjax.tokens import TokenRules, token_rules
from store_cases import Case, make_case, write

LAYERS = (1, 3, 4)  # captured, of seven
MODALITIES = (0, 1, 2)
SIZES = (1e3, 3e4, 1e5)


@dataclass(frozen=True)
class Large:
    """A row that was made large: at one layer of the site or of mlp_out."""

    row: int
    which: str
    layer: int
    size: float


def outlier_store(
    path: Path, dtype: str = "bfloat16", samples: int = 211, seed: int = 0, parts: int = 1
) -> tuple[ActivationStore, list[Large]]:
    """The store, and the rows that were made large: one by size and modality, of two layers of each array.

    With more parts than one, each has the same number of samples; the large rows are in the first.
    """
    large: list[Large] = []
    for part in range(parts):
        case = make_case(
            dtype, 71, (samples // parts,), seed=seed + part, longest=17, splits=("train", "val", "train", "test")
        )
        calm(case)
        if part == 0:
            large = enlarge(case, np.random.default_rng(seed))
        spec = case.spec
        if parts > 1:
            spec = replace(spec, options={**spec.options, "shard": f"{part + 1}/{parts}"})
        write(path if parts == 1 else path / f"part-{part + 1}-of-{parts}", Case(spec, case.batches))
    return ActivationStore.open(path), large


def calm(case: Case) -> None:
    """Undo make_case's own outliers."""
    for rows, _, _ in case.batches:
        norms = np.linalg.norm(rows.site.astype(np.float32), axis=-1)
        rows.site[(norms > 20 * np.median(norms, axis=0)).any(1)] /= 100


def enlarge(case: Case, rng: np.random.Generator) -> list[Large]:
    (rows, _, _) = case.batches[0]
    modality, found, taken = rows.columns["modality"], [], set()
    for size in SIZES:
        for m in MODALITIES:
            for which, place in (("site", 0), ("mlp_out", 2)):
                row = int(rng.choice([r for r in np.flatnonzero(modality == m) if r not in taken]))
                taken.add(row)
                getattr(rows, which)[row, place] *= size
                found.append(Large(row, which, LAYERS[place], size))
    return found


def rules_of(
    store: ActivationStore, sources: tuple[int, ...] = LAYERS, targets: tuple[int, ...] = LAYERS, **options
) -> TokenRules:
    return token_rules(store, sources, targets, TokensConfig(**options))
