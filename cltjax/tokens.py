"""Which rows of a store are trained on, and in which group every row is counted and reported.

Groups are text, image and special tokens, and outliers: rows of any modality whose norm, at any layer that is read or
written, is at least `outlier_factor` times the layer's mean norm. They come with norms up to 1e5 times the median
(method.md, "What goes wrong in VLMs"); a few of them would rule every mean, every scale and every loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cltjax.clt_directory import CLTDirectory
from cltjax.config import TokensConfig
from cltjax.errors import UserError
from cltjax.statistics import is_outlier, outlier_threshold
from cltjax.store import ActivationStore
from cltjax.store_format import IMAGE, SPECIAL, SPLITS, TEXT
from cltjax.typed import check_types

OUTLIER = 3
GROUPS = {"text": TEXT, "image": IMAGE, "special": SPECIAL, "outlier": OUTLIER}


@dataclass(frozen=True)
class NormLimits:
    """Norms from which on a token is an outlier: of each source's site [S], of each target's mlp_out [T]."""

    site: tuple[float, ...]
    mlp_out: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class TokenRules:
    """The groups of a store's N rows, and which of them are trained on."""

    path: Path  # of the store, for messages
    tokens: TokensConfig
    limits: NormLimits
    group: np.ndarray  # [N] uint8, values of GROUPS
    split: np.ndarray  # [N] uint8, places in SPLITS

    @property
    def used_groups(self) -> tuple[int, ...]:
        """The groups that are trained on, ascending."""
        outlier = (OUTLIER,) if self.tokens.outliers else ()
        return used_modalities(self.tokens) + outlier

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the groups that are not."""
        return tuple(name for name, code in GROUPS.items() if code not in self.used_groups)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers (int64, ascending) of a split's rows in used groups."""
        used = np.isin(self.group, self.used_groups)
        return np.flatnonzero(used & (self.split == SPLITS.index(split)))

    def some_rows(self, split: str) -> np.ndarray:
        """As `rows`. UserError where there are none, saying what the rules leave out."""
        found = self.rows(split)
        if len(found):
            return found
        left = {name: n for name, n in self.counts(split).items() if n}
        if not left:
            raise UserError(f"{self.path} has no {split} rows: capture more samples")
        named = " and ".join(f"{n:,} {name}" for name, n in left.items())
        raise UserError(f"no {split} row of {self.path} is left by the --tokens options, which leave out {named} rows")

    def counts(self, split: str) -> dict[str, int]:
        """Rows of a split by the name of their group, used or not."""
        found = np.bincount(self.group[self.split == SPLITS.index(split)], minlength=len(GROUPS))
        return {name: int(found[code]) for name, code in GROUPS.items()}

    def describe(self, split: str) -> str:
        """Rows of a split by group as one line: `1,200 text, 11,000 image; left out: 900 special, 3 outlier`."""
        counts = self.counts(split)
        used = ", ".join(f"{n:,} {name}" for name, n in counts.items() if name not in self.left_out)
        left = ", ".join(f"{counts[name]:,} {name}" for name in self.left_out)
        return used + (f"; left out: {left}" if left else "")


def token_rules(
    store: ActivationStore,
    sources: Sequence[int],
    targets: Sequence[int],
    tokens: TokensConfig,
    limits: NormLimits | None = None,
) -> TokenRules:
    """The groups of all rows of a store for a CLT that reads layers `sources` and writes layers `targets`.

    limits: those of the store that the CLT was trained on, where this is another one; by default this store's own.
    UserError for layers that were not captured, and for a store without train rows where its own limits are needed.
    """
    if limits is None:
        limits = norm_limits(store, sources, targets, tokens.outlier_factor)
    modality = store.column("modality")
    outlier = outlier_rows(store, sources, targets, limits)
    if tokens.outliers:
        # What is left out as a modality is so whatever its norm: a large BOS is not trained on as an outlier.
        outlier &= np.isin(modality, used_modalities(tokens))
    group = np.where(outlier, np.uint8(OUTLIER), modality)
    return TokenRules(store.path, tokens, limits, group, store.split)


def rules_of_clt(directory: CLTDirectory, store: ActivationStore) -> TokenRules:
    """The token rules that a CLT was trained with, for a store of the same model and site; this program's own where it
    does not say (an imported one).

    UserError for a store of another model or site, or without its layers, and for rules that are none.
    """
    described, wiring = directory.description, directory.description.wiring
    store.check_trained_on(directory.path, described.site, described.model)
    store.axis_of([*wiring.sources, *wiring.targets])
    tokens, limits = trained_rules(directory)
    return token_rules(store, wiring.sources, wiring.targets, tokens, limits)


def trained_rules(directory: CLTDirectory) -> tuple[TokensConfig, NormLimits | None]:
    """The options that a CLT's tokens were chosen by, and its norm limits; the defaults, and None, where it does not
    say. UserError for rules that are none.
    """
    options = dict(directory.description.tokens)
    try:
        limits = options.pop("limits", None)
        if limits is not None:
            limits = NormLimits(**{which: tuple(map(float, norms)) for which, norms in limits.items()})
        tokens = TokensConfig(**options)
        check_types(tokens)
    except (TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{directory.path}: its token rules cannot be read ({error}): export the CLT again") from error
    return tokens, limits


def used_modalities(tokens: TokensConfig) -> tuple[int, ...]:
    """The modalities that are trained on; a share of 0 or 1 leaves out the images or everything else."""
    if tokens.image_share == 1:
        return (IMAGE,)
    image = () if tokens.image_share == 0 else (IMAGE,)
    return (TEXT, *image, *((SPECIAL,) if tokens.special else ()))


def norm_limits(
    store: ActivationStore, sources: Sequence[int], targets: Sequence[int], outlier_factor: float
) -> NormLimits:
    """`outlier_factor` times the mean norm of all train rows, at each layer: as in the store's own outlier counts."""
    found = []
    for which, layers in (("site", sources), ("mlp_out", targets)):
        moments = store.moments(which)
        if moments.count.sum() == 0:
            raise UserError(f"{store.path} has no train rows, so no mean norms: capture more samples")
        found.append(tuple(outlier_threshold(moments, outlier_factor)[store.axis_of(layers)].tolist()))
    return NormLimits(*found)


def outlier_rows(
    store: ActivationStore, sources: Sequence[int], targets: Sequence[int], limits: NormLimits
) -> np.ndarray:
    """[N] bool: rows at or above a limit at any of the layers. A zero vector is never an outlier."""
    found = np.zeros(store.rows, bool)
    for which, layers, limit in (("site", sources, limits.site), ("mlp_out", targets, limits.mlp_out)):
        axis, start = store.axis_of(layers), 0
        for norms in store.norm_pieces(which):
            piece = slice(start, start + len(norms))
            found[piece] |= is_outlier(norms[:, axis], np.asarray(limit)).any(1)
            start += len(norms)
    return found
