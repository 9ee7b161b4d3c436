"""Values against type hints."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from cltjax.errors import UserError
from cltjax.typed import check_types, converted


@dataclass(frozen=True)
class Inner:
    """A group."""

    share: float = 0.5
    rule: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Options:
    """One field of each kind."""

    name: str = "x"
    size: int = 3
    on: bool = False
    where: Path = Path("here")
    perhaps: Path | None = None
    many: tuple[Path, ...] = ()
    ks: float | tuple[float, ...] = 1.5
    in_ner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "change",
    [{}, {"ks": 2}, {"ks": (2, 0.5)}, {"perhaps": Path("a")}, {"many": (Path("a"), Path("b"))}, {"size": 10**400}],
)
def test_what_is_allowed(change: dict[str, Any]):
    check_types(Options(**change))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"name": 0}, "--name is 0, but must be text"),
        ({"size": 2.0}, "--size is 2.0, but must be a whole number"),
        ({"size": True}, "--size is True, but must be a whole number"),
        ({"size": "3"}, "--size is '3', but must be a whole number"),
        ({"on": 1}, "--on is 1, but must be True or False"),
        ({"where": "there"}, "--where is 'there', but must be a path"),
        ({"perhaps": 3}, "--perhaps is 3, but must be a path or None"),
        ({"many": ("a",)}, "--many is ('a',), but must be a tuple, each a path"),
        ({"ks": "3"}, "--ks is '3', but must be a finite number or a tuple, each a finite number"),
        ({"ks": math.nan}, "--ks is nan, but must be a finite number or a tuple, each a finite number"),
        ({"ks": (1.0, math.inf)}, "--ks is (1.0, inf), but must be a finite number or a tuple, each a finite number"),
        ({"in_ner": None}, "--in-ner is None, but must be Inner(...)"),
        ({"in_ner": Inner(rule="c")}, "--in-ner.rule is 'c', but must be one of a, b"),  # type: ignore[arg-type]
        ({"in_ner": Inner(share=True)}, "--in-ner.share is True, but must be a finite number"),
    ],
)
def test_what_is_not(change: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        check_types(Options(**change))
    assert str(error.value) == said


def test_a_long_value_is_cut():
    with pytest.raises(UserError) as error:
        check_types(Options(size=["long\n"] * 100))  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and len(str(error.value)) < 150


def test_forms_that_can_only_mean_one_thing():
    loose = Options(where="there", many=["a"], ks=[3, 4], in_ner={"rule": "b"})  # type: ignore[arg-type]
    strict = Options(where=Path("there"), many=(Path("a"),), ks=(3, 4), in_ner=Inner(rule="b"))
    assert converted(loose, Options) == converted(dataclasses.asdict(loose), Options) == strict
    assert converted(Options(size="3"), Options).size == "3"  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"unknown field 'sise' \(near: size\)"):
        converted({"sise": 3}, Options)
