"""Layer lists as they are written on the command line."""

from cltjax.errors import UserError


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """`all`, `0`, `0-7`, `0,4,8` or a mixture, as sorted layer numbers below `n_layers`.

    Raises UserError for anything else, and for layers the model does not have.
    """
    if text.strip() == "all":
        return tuple(range(n_layers))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"layers '{text}' are not of the form all, 3, 0-7 or 0,4,8")
        found.update(range(int(first), int(last or first) + 1))
    if not found:
        raise UserError(f"layers '{text}' name no layer")
    if max(found) >= n_layers:
        raise UserError(f"layer {max(found)} does not exist: the model has layers 0 to {n_layers - 1}")
    return tuple(sorted(found))
