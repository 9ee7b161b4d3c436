"""All train rows of a run on each of its devices, read once; a step then takes its batch from there.

For runs whose rows fit beside the weights, and whose step is faster than rows get to the device: that of one layer on
a GPU. What a step trains on stays as it is: `Batches.rows` says which rows a batch has, and only their places among
all rows are sent.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cltjax.batches import Batches
from cltjax.distributed import place, say
from cltjax.errors import UserError

# Bytes that are read and sent at a time.
PIECE_BYTES = 1 << 28


class DeviceCache:
    """Train rows of `batches` on the devices of a mesh; the batches themselves by `places` and `batch`."""

    def __init__(self, batches: Batches, mesh: Mesh, batch_size: int, microbatches: int) -> None:
        """Reads all rows. UserError where a device plainly has no room for them (`cltjax estimate` says what a step
        needs beside)."""
        self.batches, self.mesh, self.batch_size, self.microbatches = batches, mesh, batch_size, microbatches
        self.rows = batches.train_rows
        began, size = time.perf_counter(), len(self.rows) * batches.row_bytes
        check_room(size, len(self.rows), mesh)
        say(f"reading {len(self.rows):,} train rows, {size / 2**30:.2f} GiB, onto each device")
        self.table = jax.block_until_ready(self._read(NamedSharding(mesh, P())))
        split = NamedSharding(mesh, P(None, "data"))
        self.take = jax.jit(
            lambda table, places: tuple(rows.at[places].get(mode="promise_in_bounds") for rows in table),
            out_shardings=split,
        )
        say(f"read in {time.perf_counter() - began:.1f} s")

    def _read(self, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
        """All rows, x [N, S, D] and y [N, T, D]: a piece at a time, put in its place without a copy of the rest."""
        put = jax.jit(
            lambda table, piece, start: jax.lax.dynamic_update_slice_in_dim(table, piece, start, 0),
            donate_argnums=0,
            out_shardings=sharding,
        )
        first = self.batches.read(self.rows[:1])
        shapes = [(len(self.rows), *rows.shape[1:]) for rows in first]
        tables = [
            jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, rows.dtype)
            for shape, rows in zip(shapes, first, strict=True)
        ]
        length = max(1, PIECE_BYTES // self.batches.row_bytes)
        for start in range(0, len(self.rows), length):
            for number, piece in enumerate(self.batches.read(self.rows[start : start + length])):
                sent = jax.make_array_from_callback(piece.shape, sharding, piece.__getitem__)
                tables[number] = put(tables[number], sent, start)
        return tables[0], tables[1]

    def places(self, step: int) -> np.ndarray:
        """Where the batch of one step lies among all rows: this process' part, [b] int32."""
        return np.searchsorted(self.rows, self.batches.rows(step)).astype(np.int32)

    def batch(self, places: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """x [M, B/M, S, D], y [M, B/M, T, D], split over `data`, as `place_batch` makes them of what was read."""
        return self.take(self.table, place(places, self.mesh, self.batch_size, self.microbatches))


def check_room(size: int, rows: int, mesh: Mesh) -> None:
    """UserError where a device has not `size` bytes free, as far as it says what it has."""
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
        if size > free:
            raise UserError(
                f"--device-cache: {rows:,} train rows are {size / 2**30:.1f} GiB, and {device} has "
                f"{free / 2**30:.1f} GiB left: leave it out, or capture with --dtype int8, or read fewer layers"
            )
