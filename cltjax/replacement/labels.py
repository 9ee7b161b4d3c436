"""Names of features in a JSON file: {"3:17": "red"}, or {"3:17": {"label": "red", "score": 0.9}}."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cltjax.errors import UserError


def read_labels(path: Path | None) -> dict[str, Any]:
    """As they are in the file; none without one. UserError where the file is something else."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--labels {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--labels {path}: not JSON ({error})") from error
    if not isinstance(found, Mapping) or not all(_is_label(one) for one in found.values()):
        raise UserError(
            f'--labels {path}: is not of the form {{"3:17": "a name"}} or {{"3:17": {{"label": "a name"}}}}'
        )
    return dict(found)


def texts(labels: Mapping[str, Any]) -> dict[str, str]:
    """The names alone, without scores."""
    return {name: str(one["label"] if isinstance(one, Mapping) else one) for name, one in labels.items()}


def _is_label(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, Mapping) and isinstance(given.get("label"), str))
