"""Values of a dataclass against its type hints: what is looked at before a wrong one can do anything else."""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from cltjax.errors import UserError

LONGEST = 80  # characters of a value in a message
PLAIN = {float: "a finite number", int: "a whole number", bool: "True or False", str: "text", Path: "a path"}


def check_types(options: Any, prefix: str = "") -> None:
    """UserError naming the first field of a dataclass, nested ones included, whose value its type hint does not allow.

    A whole number is a float too; True is no number; numbers are finite.
    """
    if not dataclasses.is_dataclass(options):
        raise UserError(f"found {spell(options)}, where options belong")
    for name, hint in typing.get_type_hints(type(options)).items():
        value, option = getattr(options, name), f"{prefix}{name}".replace("_", "-")
        if not fits(value, hint):
            raise UserError(f"--{option} is {spell(value)}, but must be {allowed(hint)}")
        if dataclasses.is_dataclass(value):
            check_types(value, f"{option}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a hint allows; a dataclass is not looked into."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if kind is tuple:  # tuple[X, ...]: no other is used
        return isinstance(value, tuple) and all(fits(one, inner[0]) for one in value)
    if hint in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (hint is float and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, hint)


def allowed(hint: Any) -> str:
    """A type hint in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(allowed(one) for one in inner)
    if kind is Literal:
        return "one of " + ", ".join(map(str, inner))
    if kind is tuple:
        return f"a tuple, each {allowed(inner[0])}"
    if hint is types.NoneType:
        return "None"
    return PLAIN.get(hint) or f"{hint.__name__}(...)"


def spell(value: Any) -> str:
    """A value in a message: on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def converted(value: Any, hint: Any) -> Any:
    """A value as its hint wants it, where it was written in a form that can only mean that: text for a path, a list for
    a tuple, a dictionary for a dataclass. Else the value itself.

    UserError for a dictionary with a field that the dataclass does not have, TypeError where it lacks one.
    """
    if get_origin(hint) in (Union, types.UnionType):
        for one in get_args(hint):
            if fits(made := converted(value, one), one):
                return made
        return value
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(converted(one, get_args(hint)[0]) for one in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return value
    hints = typing.get_type_hints(hint)
    if isinstance(value, hint):
        return dataclasses.replace(value, **{name: converted(getattr(value, name), hints[name]) for name in hints})
    if not isinstance(value, dict):
        return value
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1)
            raise UserError(f"unknown field '{name}'" + (f" (near: {near[0]})" if near else ""))
    return hint(**{name: converted(one, hints[name]) for name, one in value.items()})
