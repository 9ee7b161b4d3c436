"""Rows of a store for training and for measuring.

`Batches(step)` is a pure function of the seed and the step: a run resumes at any step without a saved position.
Train rows are cut into pages of neighbouring rows, which one read gets cheaply; each epoch visits the pages in another
order, several at a time (a buffer, bounded in bytes), with the rows of a buffer shuffled. Neighbouring tokens of one
sample are alike, so the more pages a buffer holds, the better a batch is mixed.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np

from cltjax.config import DataConfig
from cltjax.errors import UserError
from cltjax.store import ActivationStore
from cltjax.store_format import DTYPES
from cltjax.wiring import Wiring

Item = TypeVar("Item")


class Batch(NamedTuple):
    """Raw rows as stored: x [B, S, D] at the sources, y [B, T, D] at the targets."""

    x: np.ndarray
    y: np.ndarray


class Order:
    """In which order rows are visited, epoch after epoch. Epochs follow one another without a gap."""

    def __init__(self, rows: np.ndarray, page_rows: int, buffer_rows: int, seed: int) -> None:
        """rows: [N] ascending row numbers. A buffer is whole pages, at least one, of at most `buffer_rows` together."""
        self.rows = rows
        self.page_rows = page_rows
        pages, most = -(-len(rows) // page_rows), max(1, buffer_rows // page_rows)
        self.per_epoch = -(-pages // most)
        # As equal as whole pages allow: while a small one is used up, a large one would not be read in time.
        self.buffer_rows = -(-pages // self.per_epoch) * page_rows
        self.per_epoch = -(-len(rows) // self.buffer_rows)
        self.seed = seed

    def buffer(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Buffer `number`, counted through all epochs: its rows, ascending, and the order to visit them in."""
        epoch, place = divmod(number, self.per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        # Pages are cut at other places in every epoch, and the short page is another.
        n, shift = len(self.rows), int(rng.integers(len(self.rows)))
        whole = n // self.page_rows
        pages = np.append(rng.permutation(whole), whole)  # the short (or empty) rest comes last
        per_buffer = self.buffer_rows // self.page_rows
        chosen = pages[place * per_buffer : (place + 1) * per_buffer]
        places = (chosen[:, None] * self.page_rows + np.arange(self.page_rows)).ravel()
        found = self.rows[(places[places < n] + shift) % n]
        return np.sort(found), np.random.default_rng([self.seed, epoch, place]).permutation(len(found))

    def places(self, first: int, count: int) -> Iterator[tuple[int, slice]]:
        """Where `count` positions of the endless stream lie: (buffer number, slice of its visiting order)."""
        while count > 0:
            epoch, offset = divmod(first, len(self.rows))
            place, start = divmod(offset, self.buffer_rows)
            size = min(self.buffer_rows, len(self.rows) - place * self.buffer_rows)
            taken = min(count, size - start)
            yield epoch * self.per_epoch + place, slice(start, start + taken)
            first += taken
            count -= taken


class Batches:
    """Training batches of one store; call with a step. While one buffer is used, the next is read on a thread."""

    def __init__(self, store: ActivationStore, wiring: Wiring, batch_size: int, data: DataConfig, seed: int) -> None:
        rows = store.rows_of("train")
        if len(rows) == 0:
            raise UserError(f"{store.path} has no train rows: capture more samples")
        self.store, self.wiring, self.batch_size = store, wiring, batch_size
        # int8 is read as float32.
        item = 4 if store.dtype == "int8" else DTYPES[store.dtype].itemsize
        row_bytes = (len(wiring.sources) + len(wiring.targets)) * store.d_model * item
        self.order = Order(rows, data.page_rows, (data.buffer_mib << 20) // 2 // row_bytes, seed)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="buffer")
        self.buffers: dict[int, Future[tuple[np.ndarray, Batch]]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of one step. Cheap when steps ascend; any step may be asked for."""
        pieces = []
        for number, part in self.order.places(step * self.batch_size, self.batch_size):
            visit, held = self._buffer(number)
            chosen = visit[part]
            pieces.append(Batch(held.x[chosen], held.y[chosen]))
        if len(pieces) == 1:
            return pieces[0]
        return Batch(np.concatenate([piece.x for piece in pieces]), np.concatenate([piece.y for piece in pieces]))

    def _buffer(self, number: int) -> tuple[np.ndarray, Batch]:
        wanted = (number, number + 1)
        for old in [held for held in self.buffers if held not in wanted]:
            self.buffers.pop(old).cancel()
        for new in wanted:
            if new not in self.buffers:
                self.buffers[new] = self.reader.submit(self._read, new)
        return self.buffers[number].result()

    def _read(self, number: int) -> tuple[np.ndarray, Batch]:
        rows, visit = self.order.buffer(number)
        return visit, read_rows(self.store, self.wiring, rows)

    def close(self) -> None:
        """Stop reading ahead."""
        self.reader.shutdown(wait=True, cancel_futures=True)
        self.buffers.clear()


def read_rows(store: ActivationStore, wiring: Wiring, rows: np.ndarray) -> Batch:
    """The given rows at the layers a CLT needs, and no others."""
    return Batch(store.read("site", rows, wiring.sources), store.read("mlp_out", rows, wiring.targets))


def split_batches(
    store: ActivationStore, wiring: Wiring, split: str, size: int = 2048
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every row of one split in order, `size` at a time, with each row's modality [B]."""
    rows, modality = store.rows_of(split), store.column("modality")
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        yield read_rows(store, wiring, chosen), modality[chosen]


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
