"""What reading other programs' weights shares (circuit_tracer.py, eleuther.py)."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from cltjax.clt_directory import DTYPES, WeightType
from cltjax.errors import UserError

Files = Iterator[tuple[str, dict[str, np.ndarray]]]
"""(name, tensors) of each file of a CLT directory, as `write_clt` takes them."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file. UserError where it cannot be read, or has other types than weights have."""
    codes = {code for _, code in DTYPES.values()}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                if (code := file.get_slice(name).get_dtype()) not in codes:
                    raise UserError(f"{path}: {name} is {code}, and must be {', '.join(DTYPES)}: convert it first")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): get it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """UserError where it holds no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}): get it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: get it again")
    return found


def common_type(types: Iterable[str]) -> WeightType:
    """The type that all weights have; float32, which loses nothing, where they differ."""
    several = set(types)
    return cast(WeightType, several.pop()) if len(several) == 1 else "float32"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
