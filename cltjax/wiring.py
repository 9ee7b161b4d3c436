"""Which source layers exist and which target layers each of them writes to.

Source l reads layer l and writes to the targets l+offset, ..., l+offset+n_targets-1 that the model has.
A source without a target does not exist; a layer that is nobody's target is uncovered.
"""

from dataclasses import dataclass
from functools import cached_property

from cltjax.errors import UserError
from cltjax.layers import parse_layers


@dataclass(frozen=True)
class Wiring:
    """The (source, target) pairs of a CLT, as layer numbers of the model."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]  # ordered by source, then target

    def targets_of(self, source: int) -> tuple[int, ...]:
        """The target layers of one source layer, nearest first: consecutive layers."""
        return tuple(target for s, target in self.pairs if s == source)

    @cached_property
    def windows(self) -> tuple[slice, ...]:
        """[S] where each source's targets lie among `targets`: consecutive layers are neighbours there too."""
        found = []
        for source in self.sources:
            written = self.targets_of(source)
            first = self.targets.index(written[0])
            found.append(slice(first, first + len(written)))
        return tuple(found)

    @property
    def name(self) -> str:
        """`L0`, `L0-4` or `L0,2-4`: what a run directory is called."""
        return "L" + spell_layers(self.sources)


def spell_layers(layers: tuple[int, ...]) -> str:
    """Ascending layers as `parse_layers` reads them: `0`, `0-4`, `0,2-4`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def wire(layers: str, n_layers: int, offset: int, n_targets: int) -> Wiring:
    """The pairs for `layers` as written on the command line (`all`, `0`, `0-7`, `0,4,8`).

    `all` leaves out sources that no target is left for; naming one is a UserError.
    """
    if offset < 0:
        raise UserError(f"--offset {offset} must be 0 or above")
    if n_targets < 1:
        raise UserError(f"--n-targets {n_targets} must be 1 or above")
    named = parse_layers(layers, n_layers)
    last = n_layers - 1
    sources = tuple(layer for layer in named if layer + offset <= last)
    if layers.strip() != "all" and sources != named:
        raise UserError(
            f"layer {named[-1]} has no target at --offset {offset}: the model's last layer is {last}; "
            f"name layers up to {last - offset}, or all"
        )
    if not sources:
        raise UserError(f"no layer of a model with {n_layers} layers has a target at --offset {offset}")
    pairs = [(s, t) for s in sources for t in range(s + offset, min(s + offset + n_targets, n_layers))]
    return Wiring(sources, tuple(sorted({target for _, target in pairs})), tuple(pairs))
