"""Devices: the processes that drive them together, the mesh that a run is split over, and how rows get onto it.

Every process runs the same program on the same options and reads the same files; `say` and `is_main` are all that
makes process 0 another than the rest. What may fail on one process alone belongs into `together`, or the others wait.
"""

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cltjax.batches import Batch
from cltjax.config import ProcessesConfig, parse_mesh
from cltjax.errors import UserError

START_SECONDS = 300  # in which all processes must have been started
# A process that ends waits so long for the others to end as well. Then jax ends them all: one has failed alone, and
# they would wait for it for ever.
END_SECONDS = 60


def start(processes: ProcessesConfig) -> None:
    """Find the other processes of this run, where there are any. To be called before anything that uses devices.

    Raises UserError where they cannot be found. Does nothing where it was called before.
    """
    address, count, number = processes.check()
    if jax.distributed.is_initialized() or not (processes.auto or address):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending a process
    if address and number:
        wait_for_coordinator(address)
    elif address:
        check_port(address)
        print(f"process 0 of {count}: waiting for the others at {address}", flush=True)
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            # With an address, SLURM and the like are not asked: they would leave each process one device.
            cluster_detection_method="deactivate" if address else None,
            initialization_timeout=START_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except ValueError as error:  # what jax says where it finds no cluster
        raise UserError(
            f"--processes.auto finds no SLURM step (srun starts one), Open MPI, Kubernetes or TPU pod here ({error}): "
            "name --processes.coordinator, --processes.count and --processes.id"
        ) from error


def wait_for_coordinator(address: str) -> None:
    """Until process 0 listens at HOST:PORT. jax's own wait ends in a crash where nobody does; this in a UserError."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=START_SECONDS).close()
        except OSError as error:
            if time.monotonic() >= end:
                raise UserError(
                    f"--processes.coordinator {address} does not answer ({error}): start process 0 there, with the "
                    "same address"
                ) from error
            time.sleep(0.2)
        else:
            return


def check_port(address: str) -> None:
    """UserError where process 0 cannot listen at HOST:PORT. jax would wait at a port that is another program's."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise UserError(f"--processes.coordinator {address} cannot be used ({error}): name another port") from error


def several() -> bool:
    """Whether other processes take part."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this process writes files, Orbax' checkpoints apart, and prints."""
    return jax.process_index() == 0


def say(*what: str) -> None:
    """Print on process 0."""
    if is_main():
        print(*what, flush=True)


@contextmanager
def together() -> Iterator[None]:
    """For work that may fail on one process and not on another: all go on, or none does. They wait here for the last.

    The first process that failed raises its error, the others leave without a word. Nothing inside may wait for
    another process.
    """
    if not several():
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:  # not swallowed: raised below
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
    if failure is not None and failed[0] == jax.process_index():
        raise failure
    if len(failed):
        raise SystemExit(2)


def agree(what: str, value: Any) -> None:
    """UserError where some process has another `value` (JSON) than process 0: they would do different things, and
    wait for each other for ever. `what` is "other options" and the like."""
    if not several():
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    every = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    with together():
        if (every[0] != every[jax.process_index()]).any():
            raise UserError(
                f"process {jax.process_index()} has {what} than process 0: start the same command for all, on a file "
                "system that they share"
            )


def make_mesh(text: str) -> Mesh:
    """`2x4` -> a mesh with axes data (2) and model (4) of the first 8 devices. UserError where that cannot be."""
    data, model = parse_mesh(text)
    devices = jax.devices()
    if data * model > len(devices):
        raise UserError(f"--mesh {text} needs {data * model} devices: there are {len(devices)} ({devices[0].platform})")
    if jax.process_count() > 1 and data * model != len(devices):
        raise UserError(f"--mesh {text} must use all {len(devices)} devices of the {jax.process_count()} processes")
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), ("data", "model"), axis_types=types, devices=devices[: data * model])


def check_divides(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """UserError where tokens cannot be split evenly."""
    data = mesh.shape["data"]
    if batch_size % (microbatches * data):
        raise UserError(
            f"--batch-size {batch_size} does not divide into {microbatches} microbatches on {data} shards of --mesh"
        )


def check_features(mesh: Mesh, features: int) -> None:
    """UserError where features cannot be split evenly."""
    model = mesh.shape["model"]
    if features % model:
        raise UserError(f"--model.features {features} does not divide into the {model} shards of --mesh")


def own_shards(mesh: Mesh) -> list[int]:
    """Which shards of `data` this process' devices have, ascending."""
    return [
        row for row, devices in enumerate(mesh.devices) if any(d.process_index == jax.process_index() for d in devices)
    ]


def own_positions(mesh: Mesh, batch_size: int, microbatches: int) -> np.ndarray:
    """Which positions of a batch this process' devices need, in the order that `place` takes them."""
    grid = np.arange(batch_size).reshape(microbatches, mesh.shape["data"], -1)
    return grid[:, own_shards(mesh)].ravel()


def place(rows: np.ndarray, mesh: Mesh, batch_size: int, microbatches: int) -> jax.Array:
    """This process' rows of a batch (`own_positions`) -> [M, B/M, ...] split over `data`."""
    own, whole = own_shards(mesh), (microbatches, batch_size // microbatches, *rows.shape[1:])
    local = rows.reshape(microbatches, len(own), -1, *rows.shape[1:])

    def shard(index: Any) -> np.ndarray:
        return local[:, own.index((index[1].start or 0) // local.shape[2])]

    return jax.make_array_from_callback(whole, NamedSharding(mesh, P(None, "data")), shard)


def place_batch(batch: Batch, mesh: Mesh, batch_size: int, microbatches: int) -> tuple[jax.Array, jax.Array]:
    """A batch as it was read -> x [M, B/M, S, D], y [M, B/M, T, D], split over `data`."""
    return place(batch.x, mesh, batch_size, microbatches), place(batch.y, mesh, batch_size, microbatches)


def spread(rows: np.ndarray, mesh: Mesh, axis: int = 0) -> jax.Array:
    """An array that every process has whole, split over `data` along an axis."""
    sharding = NamedSharding(mesh, P(*(None,) * axis, "data"))
    return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
