import pytest
from hypothesis import given
from hypothesis import strategies as st

from cltjax.errors import UserError
from cltjax.layers import parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", (0, 1, 2, 3, 4, 5, 6)), ("0", (0,)), ("2-4", (2, 3, 4)), ("0,4,5-6", (0, 4, 5, 6)), (" 3 , 1", (1, 3))],
)
def test_what_can_be_written(text: str, layers: tuple[int, ...]):
    assert parse_layers(text, 7) == layers


@given(st.sets(st.integers(0, 30), min_size=1))
def test_a_list_is_read_back(layers: set[int]):
    assert parse_layers(",".join(map(str, layers)), 31) == tuple(sorted(layers))


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1-a", "4-2", "1,,2", "0.5"])
def test_what_is_no_list_of_layers(text: str):
    with pytest.raises(UserError, match="layers"):
        parse_layers(text, 7)


def test_a_layer_the_model_does_not_have():
    with pytest.raises(UserError, match="layer 7 does not exist: the model has layers 0 to 6"):
        parse_layers("3-7", 7)
