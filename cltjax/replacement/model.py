"""A VLM whose MLPs write something else: what a CLT predicts (the replacement model), constants, or a little more.

    model = ReplacementModel(vlm, CLT.from_pretrained("clt-dir"))
    model.forward(vlm.collate([vlm.encode(prompt, image)]))          logits [B, P, V]
    model.generate([vlm.encode(prompt, image)], 20)                  ids of the greedy answers
    AblatedModel(vlm, {layer: mean})   SteeredModel(vlm, clt, [Intervention.parse("3:1234=5")])     in the same way

Hooks sit in the VLM while a call runs and at no other time: `vlm` itself, used directly, is the original model, and a
call that fails leaves nothing behind. Code that runs the VLM on its own does so within `with model.active():`.

A hook at the site's tap of a source reads x, a hook at the mlp_out tap of a target returns what is to be written in
place of the tap's output; capture/sites.py has verified both. In a layer the site comes before mlp_out, so that a CLT
with offset 0 needs nothing more. What was read in a forward pass is of use to the layers still to come in that pass,
token by token, and is gone with the next: nothing to keep beside the VLM's own key-value cache. The MLPs themselves are
still computed, for nothing.

Attention patterns and norm scales are free: they follow from the running residual stream. With `freeze` they are those
of the original model on the same batch (cltjax/replacement/frozen.py), so that a changed write reaches later layers
through values, output projections and norm weights alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from capture.inputs import Encoded
from capture.sites import hidden_states_in, hidden_states_out, with_hidden_states
from capture.vlm import VLM
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT, Features
from cltjax.replacement.frozen import Frozen, arguments, record
from cltjax.replacement.interventions import Change, Intervention, Tokens, by_source, check_positions, intervene, put
from cltjax.store_format import IMAGE


@dataclass
class Pass:
    """One forward pass: its tokens, and what was read and written in it so far."""

    ids: Tensor  # [B, P]
    mask: Tensor  # [B, before + P]: 1 at real tokens, those in the cache before them too
    features: dict[int, Features] = field(default_factory=dict)  # by source, as encoded
    changes: dict[int, Change] = field(default_factory=dict)  # by source, where interventions are
    written: set[int] = field(default_factory=set)
    ended: bool = False


class Rewritten:
    """A VLM with other MLP writes at `covered` layers; `uncovered` layers keep their MLPs. A base class.

    UserError for a covered layer that the VLM does not have.
    """

    def __init__(self, vlm: VLM, covered: Sequence[int]):
        self.vlm = vlm
        self.covered = tuple(sorted(covered))
        self.uncovered = tuple(layer for layer in range(vlm.n_layers) if layer not in self.covered)
        for layer in self.covered:
            if not 0 <= layer < vlm.n_layers:
                raise UserError(f"there is no layer {layer}: {vlm.name} has layers 0 to {vlm.n_layers - 1}")
        self._handles: list[RemovableHandle] = []
        self._pass: Pass | None = None

    def forward(
        self, batch: Mapping[str, Tensor], layers: Sequence[int] | None = None, freeze: bool | Frozen = False
    ) -> Tensor:
        """Logits [B, P, V] of a batch as `vlm.collate` makes it, or of one sample as `vlm.encode` does. No cache.

        layers: those of the covered layers whose writes are replaced in this call; None: all of them. freeze: with
        attention patterns and norm scales of the original model on this batch, which it runs first, or of what
        `frozen.record(vlm, batch)` gave before. UserError where these are of another model or batch, or a family's
        attention cannot be frozen.
        """
        batch = self._prepared(batch)
        model = self.vlm.model
        extra = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}
        with self._frozen(batch, freeze), self.active(layers), torch.no_grad():
            output = model(**batch, **extra)
        return output if isinstance(output, Tensor) else output.logits

    def generate(self, encoded: list[Encoded], n: int, layers: Sequence[int] | None = None) -> list[list[int]]:
        """The greedy answers, as `vlm.generate` gives them, of 1 to `n` tokens; `layers` as in `forward`.

        Attention and norms are free: what a generated token attends to is not known before it is there, and once
        another token was chosen the original has no pattern for it. For a given answer `forward(batch, freeze=True)` of
        prompt and answer (`vlm.extend`) says what would be predicted at each of its tokens.

        UserError where `n` is below 1.
        """
        if n < 1:
            raise UserError(f"answers of at most {n} tokens: there must be at least 1 to generate")
        self._prepared(self.vlm.collate(encoded, side="left"), n)
        with self.active(layers):
            return self.vlm.generate(encoded, n)

    @contextmanager
    def active(self, layers: Sequence[int] | None = None) -> Iterator[None]:
        """Within it whatever runs the VLM (`vlm.trace`, `vlm.model`) runs the rewritten one.

        UserError where the sites are not known yet (`vlm.verify`), and for `layers` that are not covered.
        """
        chosen = self.covered if layers is None else tuple(sorted(set(layers)))
        if strangers := [layer for layer in chosen if layer not in self.covered]:
            raise UserError(f"layers {strangers} are not covered: {list(self.covered)} are")
        if self.vlm.sites is None:
            raise UserError(f"the sites of {self.vlm.name} are not known yet: vlm.verify(batch) finds them")
        if self._handles:
            raise RuntimeError("this model is active already")
        base, sites, add = self.vlm.base, self.vlm.sites, self._handles.append
        try:
            add(base.register_forward_pre_hook(self._begin, with_kwargs=True))
            for site, layer in self._reads(chosen):
                tap = getattr(sites[layer], site)
                add(tap.module.register_forward_pre_hook(partial(self._reading, layer), with_kwargs=True))
            for layer in chosen:
                add(sites[layer].mlp_out.module.register_forward_hook(partial(self._writing, layer)))
            add(base.register_forward_hook(partial(self._end, chosen)))
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Take the hooks out: the VLM is the original again. Every call ends with it, also one that fails."""
        while self._handles:
            self._handles.pop().remove()
        self._pass = None

    # What a subclass says ------------------------------------------------------------------------------------

    def _reads(self, layers: Sequence[int]) -> list[tuple[str, int]]:
        """(site, layer) of what has to be read where the writes of these layers are replaced."""
        return []

    def _read(self, layer: int, x: Tensor, now: Pass) -> None:
        """Take note of x [B, P, D] at a layer."""
        raise NotImplementedError

    def _write(self, layer: int, own: Tensor, now: Pass) -> Tensor:
        """What is written [B, P, D] in place of the MLP's own write; its type may be another."""
        raise NotImplementedError

    # Hooks ---------------------------------------------------------------------------------------------------

    def _frozen(self, batch: Mapping[str, Tensor], freeze: bool | Frozen) -> AbstractContextManager[None]:
        """What `freeze` asks for, to be entered; the original model runs here."""
        if isinstance(freeze, bool):
            return record(self.vlm, batch).replayed() if freeze else nullcontext()
        if freeze.vlm.model is not self.vlm.model:
            raise UserError(f"the patterns to freeze are of {freeze.vlm.name}, another model than {self.vlm.name}")
        return freeze.replayed()

    def _prepared(self, batch: Mapping[str, Tensor], new: int = 0) -> dict[str, Tensor]:
        """The batch on the model's device; the sites are known after it. `new`: tokens to be generated."""
        placed = self.vlm.collate([dict(batch)])
        if self.vlm.sites is None:
            self.vlm.verify(placed)
        return placed

    def _begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = arguments(module, args, kwargs)
        ids, mask, cache = (given.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if ids is None:
            raise UserError(f"{self.vlm.name} with other MLP writes takes input_ids, not embeddings")
        if mask is None:  # transformers leaves out one that is all 1
            before = 0 if cache is None else cache.get_seq_length()
            mask = torch.ones(ids.shape[0], before + ids.shape[1], dtype=torch.long, device=ids.device)
        self._pass = Pass(ids, mask)

    def _reading(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        now, x = self._now(), hidden_states_in(args, kwargs)
        if x is not None:
            self._read(layer, x.reshape(*now.ids.shape, -1), now)

    def _writing(self, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        now, own = self._now(), hidden_states_out(output)
        if own is None:
            return None
        written = self._write(layer, own.reshape(*now.ids.shape, -1), now)
        now.written.add(layer)
        return with_hidden_states(output, written.to(own.device, own.dtype).reshape(own.shape))

    def _end(self, layers: Sequence[int], module: nn.Module, args: tuple, output: Any) -> None:
        now = self._now()
        if missing := [layer for layer in layers if layer not in now.written]:
            raise UserError(f"the MLPs of layers {missing} were not passed in this forward pass: nothing replaced them")
        now.ended = True

    def _now(self) -> Pass:
        if self._pass is None or self._pass.ended:
            raise RuntimeError(f"a layer of {self.vlm.name} ran outside of a forward pass of the model")
        return self._pass


class AblatedModel(Rewritten):
    """A VLM of whose MLPs some write a constant [D] each: their mean, or zeros."""

    def __init__(self, vlm: VLM, constants: Mapping[int, Tensor]):
        super().__init__(vlm, list(constants))
        for layer, constant in constants.items():
            if constant.shape != (vlm.d_model,):
                raise UserError(f"layer {layer}: {tuple(constant.shape)} is no vector of width {vlm.d_model}")
        self.constants = dict(constants)

    def _write(self, layer: int, own: Tensor, now: Pass) -> Tensor:
        return self.constants[layer].expand(own.shape)


class OnFeatures(Rewritten):
    """What the replacement model and the steered one share: a CLT, and interventions on its features. A base class.

    within: (first, last) target layers that interventions act on; None: on all. other_revision: take a CLT that was
    trained on another revision of the model. UserError where the CLT is not of this VLM, and for interventions on
    layers, features or positions that there are not.
    """

    def __init__(
        self,
        vlm: VLM,
        clt: CLT,
        interventions: Sequence[Intervention] = (),
        within: tuple[int, int] | None = None,
        other_revision: bool = False,
    ):
        check_match(vlm, clt, other_revision)
        first, last = (0, vlm.n_layers - 1) if within is None else within
        if not 0 <= first <= last < vlm.n_layers:
            raise UserError(f"({first}, {last}) are no first and last layer: there are layers 0 to {vlm.n_layers - 1}")
        self.clt = clt
        self.interventions = by_source(interventions, clt)
        self._within = range(first, last + 1)
        for source in self.interventions:
            if not any(target in self._within for target in clt.wiring.targets_of(source)):
                raise UserError(f"layer {source} writes to {clt.wiring.targets_of(source)}: not to {first} to {last}")
        self._parts = self._sources_by_target()
        super().__init__(vlm, list(self._parts))

    def _sources_by_target(self) -> dict[int, list[int]]:
        """Which targets are written, and the sources that have a part in it."""
        pairs = self.clt.wiring.pairs
        return {target: [source for source, t in pairs if t == target] for target in self.clt.targets}

    def _prepared(self, batch: Mapping[str, Tensor], new: int = 0) -> dict[str, Tensor]:
        placed = super()._prepared(batch, new)
        ids = placed["input_ids"]
        real = placed.get("attention_mask", torch.ones_like(ids))
        check_positions(
            (one for some in self.interventions.values() for one in some),
            longest=int(real.sum(1).max()) + new,
            images=bool((self.vlm.modality(ids.cpu()) == IMAGE).any()),
        )
        return placed

    def _reads(self, layers: Sequence[int]) -> list[tuple[str, int]]:
        return [(self.clt.description.site, source) for source in {s for t in layers for s in self._parts[t]}]

    def _read(self, layer: int, x: Tensor, now: Pass) -> None:
        found = self.clt.encode(layer, x)
        if layer in self.interventions:
            tokens = Tokens.of(now.ids, now.mask, self.vlm.modality)
            now.changes[layer] = intervene(found, self.interventions[layer], tokens)
        now.features[layer] = found

    def _passed(self, target: int, noted: Mapping[int, Any]) -> list[int]:
        """The target's sources; UserError where one of them is not among what was noted in this pass."""
        if missing := [source for source in self._parts[target] if source not in noted]:
            raise UserError(f"layer {target} is written before the site of layers {missing} was passed in this pass")
        return self._parts[target]


class ReplacementModel(OnFeatures):
    """Every covered MLP's write is the CLT's, from features of the replacement's own running residual stream.

    An intervention changes an activation before anything is decoded from it.
    """

    def features(
        self, batch: Mapping[str, Tensor], layers: Sequence[int] | None = None, freeze: bool | Frozen = False
    ) -> dict[int, Features]:
        """The features [B, P, K] of each source in the replaced pass, interventions included; as `forward`.

        Values at padding are whatever the model computed there. `layers`: sources that write to none of them lack.
        """
        batch = self._prepared(batch)
        with self._frozen(batch, freeze), self.active(layers):
            self.vlm.forward(batch)
            assert self._pass is not None
            return {source: self._changed(source, self._pass) for source in self._pass.features}

    def _write(self, layer: int, own: Tensor, now: Pass) -> Tensor:
        changed = self._changed if layer in self._within else lambda source, now: now.features[source]
        return self.clt.decode(layer, {source: changed(source, now) for source in self._passed(layer, now.features)})

    def _changed(self, source: int, now: Pass) -> Features:
        found = now.features[source]
        return put(found, now.changes[source]) if source in now.changes else found


class SteeredModel(OnFeatures):
    """The original model with, at each target t, (new - own activation) W_dec_{l->t} on top of what its MLP writes.

    Own activations are those of the pass itself, with what earlier layers' interventions did to it.
    """

    def _sources_by_target(self) -> dict[int, list[int]]:
        changed = {
            target: [source for source in sources if source in self.interventions]
            for target, sources in super()._sources_by_target().items()
            if target in self._within
        }
        return {target: sources for target, sources in changed.items() if sources}

    def _write(self, layer: int, own: Tensor, now: Pass) -> Tensor:
        total = own.float()
        for source in self._passed(layer, now.changes):
            change = now.changes[source]
            slot = layer - source - self.clt.description.offset
            rows = self.clt.decoder_rows(source, change.features)[:, slot]
            total = total + ((change.after - change.before) @ rows).to(total.device)
        return total


def check_match(vlm: VLM, clt: CLT, other_revision: bool = False) -> None:
    """UserError where a CLT is not one for this VLM, or is no more than several summed as they are.

    Layers, width and class have to be the same; so has the revision where both are known. The model's name may be
    another: a folder moves. Where neither class nor revision is known (an imported CLT), only the name can tell it from
    one of another model with as many layers of that width: unless that is the same, a line says so.
    """
    about, said = clt.description.model, f"the CLT is of {clt.description.model.get('id')}"
    if clt.description.combined == "none":
        raise UserError(
            f"{said} and combined = none, several CLTs summed as they are: export it with --combine gains or backfit"
        )
    for what, its, ours in (
        ("layers", clt.description.n_layers, vlm.n_layers),
        ("width", clt.description.d_model, vlm.d_model),
        ("class", about.get("class") or vlm.class_name, vlm.class_name),
    ):
        if its != ours:
            raise UserError(f"{said}, whose {what} are not those of {vlm.name}: {its}, not {ours}")
    known = {about.get("revision"), vlm.revision} - {None, "", "unknown"}
    if len(known) > 1 and not other_revision:
        raise UserError(
            f"{said} at revision {about['revision']}, and {vlm.name} is at {vlm.revision}: load that one, "
            "or say that another revision will do"
        )
    same = about.get("class") or (known and about.get("revision") == vlm.revision)
    if not same and about.get("id") != vlm.name:
        which = f"only the name {about['id']}" if about.get("id") else "no name"
        say_once(
            f"this CLT does not say which model it is of: it has {which}, no class and no revision. Its layers and "
            f"width are those of {vlm.name}, and maybe others': import it with --model {vlm.name} if it is of this one"
        )


@cache
def say_once(line: str) -> None:
    """Print a line, the first time; models are made of one CLT again and again."""
    print(line)
