"""Rows of a store for training and for measuring.

`Batches(step)` is a pure function of the seed and the step: a run resumes at any step without a saved position.
Train rows are cut into pages of neighbouring rows, whole blocks of the store as a rule, which are read at once; each
epoch visits the pages in another order, several at a time (a buffer, bounded in bytes), with the rows of a buffer
shuffled. Neighbouring tokens of one sample are alike, so the more pages a buffer holds, the better a batch is mixed.

Where image tokens have a share of their own, they and all others are two such streams, each with its own epochs.
"""

import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from cltjax.config import DataConfig
from cltjax.errors import UserError
from cltjax.store import ActivationStore
from cltjax.store_format import IMAGE
from cltjax.tokens import TokenRules

Item = TypeVar("Item")

# The rule by which rows are ordered: a run goes on only by the one that it began with. (1, until November 2026: pages
# began anywhere.)
ROW_ORDER = 2
# Rows of a page where none are asked for: the most, unless a buffer would hold too few such pages; then the fewest.
MOST_PAGE_ROWS, FEWEST_PAGE_ROWS, ENOUGH_PAGES = 256, 16, 32


class Batch(NamedTuple):
    """Raw rows as stored: x [B, S, D] at the sources, y [B, T, D] at the targets.

    Of an int8 store `Batches` returns [.., D + 4] int8 as ActivationStore.read_packed does, a quarter of what has to
    get to the device as float32: the step unpacks it there. All else here returns float32.
    """

    x: np.ndarray
    y: np.ndarray


class Layout(NamedTuple):
    """An epoch's pages in the order that they are visited in, and its buffers, each of which is some of them."""

    starts: np.ndarray  # [pages] where a page begins among the order's rows
    sizes: np.ndarray  # [pages] rows
    cuts: np.ndarray  # [buffers + 1] the first page of each
    rows: np.ndarray  # [buffers + 1] rows of the epoch before each


class Order:
    """In which order rows are visited, epoch after epoch. Epochs follow one another without a gap."""

    def __init__(
        self, rows: np.ndarray, places: np.ndarray, page_rows: int, buffer_rows: int, seed: int, block_rows: int = 1
    ) -> None:
        """rows: [N] ascending row numbers; places: [N] where they lie (ActivationStore.places).

        A page is those of these rows that lie in neighbouring blocks of `block_rows`, which are what is read: in
        as many as `page_rows` hold, or in a part of one block. A buffer is whole pages, at least one, of at most
        `buffer_rows` rows together.
        """
        self.rows, self.seed = rows, seed
        self.blocks = page_rows // block_rows  # of a page
        self.pieces = -(-block_rows // page_rows)  # pages of a block
        most = max(1, self.blocks) * -(-block_rows // self.pieces)  # rows of a page
        block, place = np.divmod(places, block_rows)
        part = block * self.pieces + place * self.pieces // block_rows
        self.first_rows = np.append(0, np.flatnonzero(np.diff(part)) + 1)  # of each block, or part of one, with rows
        self.parts = part[self.first_rows]
        self.single = False  # a page is a buffer
        if len(rows) <= buffer_rows:
            self.per_epoch = 1
        elif buffer_rows >= 2 * most:
            self.per_epoch = -(-len(rows) // (buffer_rows - most))
        else:
            extent = int(self.parts[-1] - self.parts[0])
            self.single, self.per_epoch = True, min(len(self.parts), extent // max(1, self.blocks) + 2)
        self.layout = lru_cache(maxsize=3)(self._layout)  # of the epochs around
        self.buffer = lru_cache(maxsize=2)(self._buffer)

    def _layout(self, epoch: int) -> Layout:
        """Pages begin at other blocks in every epoch where they are several blocks long."""
        rng = np.random.default_rng([self.seed, epoch])
        page = (self.parts + rng.integers(self.blocks)) // self.blocks if self.blocks else self.parts
        starts = self.first_rows[np.append(0, np.flatnonzero(np.diff(page)) + 1)]
        visit = rng.permutation(len(starts))
        sizes = np.diff(starts, append=len(self.rows))[visit]
        before = np.append(0, np.cumsum(sizes))
        # As equal as whole pages allow: while a small one is used up, a large one would not be read in time.
        if self.single:
            cuts = np.minimum(np.arange(self.per_epoch + 1), len(starts))
        else:
            cuts = np.searchsorted(before, np.arange(self.per_epoch + 1) * len(self.rows) / self.per_epoch)
        return Layout(starts[visit], sizes, cuts, before[cuts])

    def _buffer(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Buffer `number`, counted through all epochs: its rows, ascending, and the order to visit them in."""
        epoch, place = divmod(number, self.per_epoch)
        layout = self.layout(epoch)
        chosen = slice(layout.cuts[place], layout.cuts[place + 1])
        pages = sorted(zip(layout.starts[chosen].tolist(), layout.sizes[chosen].tolist(), strict=True))
        found = np.concatenate([self.rows[start : start + size] for start, size in pages] or [self.rows[:0]])
        return found, np.random.default_rng([self.seed, epoch, place]).permutation(len(found))

    def first(self, number: int) -> int:
        """The position in the endless stream at which buffer `number` begins."""
        epoch, place = divmod(number, self.per_epoch)
        return epoch * len(self.rows) + int(self.layout(epoch).rows[place])

    def places(self, first: int, count: int) -> Iterator[tuple[int, slice]]:
        """Where `count` positions of the endless stream lie: (buffer number, slice of its visiting order)."""
        while count > 0:
            epoch, offset = divmod(first, len(self.rows))
            rows = self.layout(epoch).rows
            place = int(np.searchsorted(rows, offset, "right")) - 1
            start = offset - int(rows[place])
            taken = min(count, int(rows[place + 1]) - offset)
            yield epoch * self.per_epoch + place, slice(start, start + taken)
            first += taken
            count -= taken


class Held(NamedTuple):
    """A buffer in memory: the rows of it that are needed, and where those visited one after the other lie in it."""

    place: np.ndarray  # by place in the visiting order; of rows that are not needed, anything
    batch: Batch


class Stream:
    """The rows that batches take from one order. While one buffer is used, the next is read on a thread."""

    def __init__(
        self, store: ActivationStore, sources: Sequence[int], targets: Sequence[int], order: Order, needed: np.ndarray
    ) -> None:
        """needed: [n] bool: which of the n rows that each batch takes are returned, and therefore read."""
        self.store, self.sources, self.targets = store, tuple(sources), tuple(targets)
        self.order, self.needed = order, needed
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="buffer")
        self.buffers: dict[int, Future[Held]] = {}
        self.whole: Batch | None = None
        # Of the last buffer with an even number, and with an odd one: as each is dropped before the next but one is
        # read, and batches are copies, its memory serves again. New memory costs as much time as reading into it.
        self.memory: list[Batch | None] = [None, None]

    def __call__(self, step: int) -> list[Batch]:
        """The needed rows of one step, in pieces that follow one another."""
        pieces, done, n = [], 0, len(self.needed)
        for number, part in self.order.places(step * n, n):
            held, size = self._buffer(number), part.stop - part.start
            chosen = held.place[part][self.needed[done : done + size]]
            pieces.append(Batch(held.batch.x[chosen], held.batch.y[chosen]))
            done += size
        return pieces

    def rows(self, step: int) -> np.ndarray:
        """The numbers of the needed rows of one step. Reads nothing."""
        n, found = len(self.needed), []
        for number, part in self.order.places(step * n, n):
            rows, visit = self.order.buffer(number)
            found.append(rows[visit[part]])
        return np.concatenate(found)[self.needed]

    def _buffer(self, number: int) -> Held:
        wanted = (number, number + 1)
        for old in [held for held in self.buffers if held not in wanted]:
            self.buffers.pop(old).cancel()
        for new in wanted:
            if new not in self.buffers:
                self.buffers[new] = self.reader.submit(self._read, new)
        return self.buffers[number].result()

    def _read(self, number: int) -> Held:
        rows, visit = self.order.buffer(number)
        if self.order.per_epoch == 1 and self.needed.all():
            # Every buffer holds the same rows: all there are.
            if self.whole is None:
                self.whole = self._read_rows(rows, number)
            return Held(visit, self.whole)
        needed = self.needed[(self.order.first(number) + np.arange(len(rows))) % len(self.needed)]
        kept = np.zeros(len(rows), bool)
        kept[visit[needed]] = True
        place = np.cumsum(kept) - 1
        return Held(place[visit], self._read_rows(rows[kept], number))

    def _read_rows(self, rows: np.ndarray, number: int) -> Batch:
        layers, memory = (self.sources, self.targets), self.memory[number % 2]
        if memory is None or len(memory.x) < len(rows):
            memory = self.memory[number % 2] = None  # freed before there is another
            memory = Batch(*(np.empty(*self.store.packed_shape(len(rows), some)) for some in layers))
            self.memory[number % 2] = memory
        found = Batch(memory.x[: len(rows)], memory.y[: len(rows)])
        for which, some, out in zip(("site", "mlp_out"), layers, found, strict=True):
            self.store.read_packed(which, rows, some, out)
        return found

    def close(self) -> None:
        """Stop reading ahead."""
        self.reader.shutdown(wait=True, cancel_futures=True)
        self.buffers.clear()


class Batches:
    """Training batches of one store, of the rows that its token rules use; call with a step."""

    def __init__(
        self,
        store: ActivationStore,
        sources: Sequence[int],
        targets: Sequence[int],
        rules: TokenRules,
        batch_size: int,
        data: DataConfig,
        seed: int,
        positions: np.ndarray | slice | None = None,
    ) -> None:
        """sources, targets: the layers of x and of y, in that order.

        positions: [b] which of the `batch_size` rows of every batch are returned, in that order; by default all. No
        others are read, and what lies at a position does not depend on it. UserError where rows are lacking.
        """
        (_, layers, width), dtype = store.packed_shape(1, (*sources, *targets))
        row_bytes = layers * width * dtype.itemsize
        self.row_bytes, self.batch_size, self.chosen_pages = row_bytes, batch_size, data.page_rows is None
        # One buffer in use and one that is read; the streams share in them as they share in a batch.
        most_rows = (data.buffer_mib << 20) // 2 // row_bytes
        self.store, self.sources, self.targets = store, tuple(sources), tuple(targets)
        everywhere = np.arange(batch_size)
        self.positions = everywhere if positions is None else everywhere[positions]
        self.streams: list[Stream] = []
        returned = []
        strata = shares(store, rules, batch_size)
        # All that batches take, whoever takes them, ascending.
        self.train_rows = np.sort(np.concatenate([rows for rows, _ in strata]))
        for number, (rows, slots) in enumerate(strata):
            buffer_rows = most_rows * len(slots) // batch_size
            page_rows = data.page_rows or page_size(buffer_rows)
            own_seed = seed if number == 0 else other_seed(seed, number)
            order = Order(rows, store.places(rows), page_rows, buffer_rows, own_seed, store.block_rows)
            needed = np.isin(slots, self.positions)
            if needed.any():
                self.streams.append(Stream(store, sources, targets, order, needed))
                returned.append(slots[needed])
        # Row i of a batch is row gather[i] of the streams' rows, one stream after the other.
        found = np.concatenate(returned)
        ascending = np.argsort(found)
        self.gather = ascending[np.searchsorted(found[ascending], self.positions)]
        self.in_order = np.array_equal(self.gather, np.arange(len(found)))

    def __call__(self, step: int) -> Batch:
        """The batch of one step. Cheap when steps ascend; any step may be asked for."""
        pieces = [piece for stream in self.streams for piece in stream(step)]
        if len(pieces) > 1:
            x, y = np.concatenate([piece.x for piece in pieces]), np.concatenate([piece.y for piece in pieces])
        else:
            x, y = pieces[0]
        return Batch(x, y) if self.in_order else Batch(x[self.gather], y[self.gather])

    def rows(self, step: int) -> np.ndarray:
        """The numbers [b] of the rows that the batch of one step has. Reads nothing."""
        return np.concatenate([stream.rows(step) for stream in self.streams])[self.gather]

    def read(self, rows: np.ndarray) -> Batch:
        """Rows by their numbers, as a batch has them."""
        return Batch(
            self.store.read_packed("site", rows, self.sources), self.store.read_packed("mlp_out", rows, self.targets)
        )

    def advice(self) -> str | None:
        """One line where pages are smaller than the blocks that are read for them, as the buffer is small, and what to
        do; else None."""
        small = [one for one in self.streams if one.order.per_epoch > 1 and one.order.pieces > 1]
        if not small or not self.chosen_pages:
            return None
        worst = min(small, key=lambda one: len(one.needed))  # the smallest buffer
        block = worst.store.block_rows
        # Of both streams together, of which this one has its share.
        rows = math.ceil(least_buffer(block) * self.batch_size / len(worst.needed))
        mib = math.ceil(2 * rows * self.row_bytes / 2**20)
        return (
            f"rows of this size are many bytes: a page is 1/{worst.order.pieces} of a block of {block} rows, which is "
            f"read as often in an epoch; --data.buffer-mib {mib} makes pages of whole blocks"
        )

    def close(self) -> None:
        """Stop reading ahead."""
        for stream in self.streams:
            stream.close()


def shares(store: ActivationStore, rules: TokenRules, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train rows that are drawn apart, and the places in a batch that are theirs: (rows [N], slots [n]), ascending."""
    strata = drawn_apart(store, rules, "train")
    if len(strata) == 1:
        return [(strata[0][0], np.arange(batch_size))]
    (other, _), (image, share) = strata
    n = round(share * batch_size)
    if n in (0, batch_size):
        raise UserError(
            f"--tokens.image-share {share} of --batch-size {batch_size} is {n} tokens: choose 0 or 1 for that"
        )
    images = spread(batch_size, n)
    return [(other, np.flatnonzero(~images)), (image, np.flatnonzero(images))]


def drawn_apart(store: ActivationStore, rules: TokenRules, split: str) -> list[tuple[np.ndarray, float]]:
    """Rows of a split by what training draws them apart by, and which share of the trained tokens each part is:
    (rows [N] ascending, share); the shares' sum is 1. UserError where rows are lacking."""
    rows, share = rules.some_rows(split), rules.tokens.image_share
    if share is None or share in (0, 1):  # at 0 and 1 the rules use no others
        return [(rows, 1.0)]
    image = store.column("modality")[rows] == IMAGE
    if image.all() or not image.any():
        lacking = "image" if not image.any() else "other than image"
        raise UserError(
            f"--tokens.image-share {share} takes both image and other tokens, but the {split} rows of {store.path} "
            f"that the --tokens options leave have none {lacking}: {rules.describe(split)}"
        )
    return [(rows[~image], 1 - share), (rows[image], share)]


class Mix(NamedTuple):
    """A sample of a split's rows, each of a stratum, that together stand for the tokens that are trained on."""

    rows: np.ndarray  # ascending
    stratum: np.ndarray  # [N] of all rows of the store; a row of the sample has a place in `shares`
    shares: tuple[float, ...]  # of the trained tokens, by stratum; of the sample's rows they may be others


def trained_mix(store: ActivationStore, rules: TokenRules, split: str, most: int) -> Mix:
    """About `most` of a split's rows at most, of each stratum its share where there are so many. UserError where rows
    are lacking."""
    strata = drawn_apart(store, rules, split)
    stratum, chosen = np.zeros(store.rows, np.uint8), []
    for number, (rows, share) in enumerate(strata):
        stratum[rows] = number
        chosen.append(sample_rows(rows, max(1, round(share * most)), store.block_rows))
    return Mix(np.sort(np.concatenate(chosen)), stratum, tuple(share for _, share in strata))


def spread(size: int, n: int) -> np.ndarray:
    """[size] bool with n True, evenly in any stretch and at any stride, so that each piece of a batch has its share.

    The n places at which multiples of the golden ratio have the smallest fractions: a Kronecker sequence.
    """
    fraction = np.arange(size) * ((np.sqrt(5) - 1) / 2) % 1
    chosen = np.zeros(size, bool)
    chosen[np.argsort(fraction, kind="stable")[:n]] = True
    return chosen


def page_size(buffer_rows: int) -> int:
    """Rows of a page for buffers of so many rows: as many as leave ENOUGH_PAGES in a buffer, within bounds."""
    rows = MOST_PAGE_ROWS
    while rows > FEWEST_PAGE_ROWS and buffer_rows < ENOUGH_PAGES * rows:
        rows //= 2
    return rows


def least_buffer(page_rows: int) -> int:
    """Rows of the smallest buffer with pages of so many rows, or more."""
    rows = FEWEST_PAGE_ROWS
    while rows < min(page_rows, MOST_PAGE_ROWS):
        rows *= 2
    return ENOUGH_PAGES * rows


def other_seed(seed: int, number: int) -> int:
    """The seed of stream `number`, unrelated to that of the others."""
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0])


def read_rows(store: ActivationStore, sources: Sequence[int], targets: Sequence[int], rows: np.ndarray) -> Batch:
    """The given rows at the layers a CLT needs, and no others."""
    return Batch(store.read("site", rows, sources), store.read("mlp_out", rows, targets))


def split_batches(
    store: ActivationStore,
    sources: Sequence[int],
    targets: Sequence[int],
    group: np.ndarray,
    split: str,
    size: int = 2048,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """All rows of one split as `row_batches`: used rows and left-out ones."""
    return row_batches(store, sources, targets, group, store.rows_of(split), size)


def row_batches(
    store: ActivationStore,
    sources: Sequence[int],
    targets: Sequence[int],
    group: np.ndarray,
    rows: np.ndarray,
    size: int = 2048,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """`rows` [n] in order, `size` at a time, with each row's group [B].

    group: [N] of all rows of the store (`TokenRules.group`).
    """
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        yield read_rows(store, sources, targets, chosen), group[chosen]


def sample_rows(rows: np.ndarray, most: int, page_rows: int) -> np.ndarray:
    """At most `most` of `rows` [N], ascending: whole pages, which cost little to read, at equal distances."""
    if len(rows) <= most:
        return rows
    pages, wanted = -(-len(rows) // page_rows), -(-most // page_rows)
    starts = np.arange(wanted) * pages // wanted * page_rows
    places = (starts[:, None] + np.arange(page_rows)).ravel()
    return rows[places[places < len(rows)][:most]]


@contextmanager
def read_ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Iterator[Item]]:
    """Go through `items` on a thread, at most `depth` ahead of who takes them. An error is raised where it is taken."""
    done = object()
    ready: queue.Queue[object] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not offer((item, None)):
                    return
            offer(done)
        except BaseException as error:  # not swallowed: `taken` raises it
            offer((None, error))

    def taken() -> Iterator[Item]:
        while (found := ready.get()) is not done:
            item, error = found  # type: ignore[misc]
            if error is not None:
                raise error
            yield item

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.set()
        thread.join()
