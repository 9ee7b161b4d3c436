"""Devices: the mesh that a run is split over, and how rows get onto it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cltjax.config import parse_mesh
from cltjax.errors import UserError


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


def check_divides(mesh: Mesh, batch_size: int, microbatches: int, features: int) -> None:
    """UserError where tokens or features cannot be split evenly."""
    data, model = mesh.shape["data"], mesh.shape["model"]
    if batch_size % (microbatches * data):
        raise UserError(
            f"--batch-size {batch_size} does not divide into {microbatches} microbatches on {data} shards of --mesh"
        )
    if features % model:
        raise UserError(f"--model.features {features} does not divide into the {model} shards of --mesh")


def own_positions(mesh: Mesh, batch_size: int, microbatches: int) -> np.ndarray:
    """Which positions of a batch this process' devices need, in the order that `place` takes them."""
    grid = np.arange(batch_size).reshape(microbatches, mesh.shape["data"], -1)
    mine = [
        row for row, devices in enumerate(mesh.devices) if any(d.process_index == jax.process_index() for d in devices)
    ]
    return grid[:, mine].ravel()


def place(rows: np.ndarray, mesh: Mesh, batch_size: int, microbatches: int) -> jax.Array:
    """This process' rows of a batch (`own_positions`) -> [M, B/M, ...] split over `data`."""
    sharding = NamedSharding(mesh, P(None, "data"))
    local = rows.reshape(microbatches, -1, *rows.shape[1:])
    whole = (microbatches, batch_size // microbatches, *rows.shape[1:])
    return jax.make_array_from_process_local_data(sharding, local, whole)
