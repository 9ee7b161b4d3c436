import hashlib

from hypothesis import given
from hypothesis import strategies as st

from cltjax.splits import split_of


@given(st.binary())
def test_the_split_is_the_rule(identity: bytes):
    bucket = int(hashlib.sha256(identity).hexdigest(), 16) % 16
    assert split_of(identity) == ("test" if bucket in (0, 1) else "val" if bucket == 2 else "train")


def test_the_split_is_fixed_for_ever():
    held_out = {i: split for i in range(40) if (split := split_of(f"image {i}".encode())) != "train"}
    assert held_out == {
        7: "val", 14: "test", 15: "test", 18: "val", 25: "val", 34: "val", 37: "test", 39: "test"
    }  # fmt: skip
