"""Every option of every method refuses what it cannot be, in words that name it, before anything is built."""

import dataclasses
import re

import pytest

from visadapt import VisadaptError
from visadapt.methods import METHODS

OPTIONS = [(cls, f.name) for cls in METHODS.values() for f in dataclasses.fields(cls)]


@pytest.mark.parametrize("value", [[1], b"x", float("nan"), float("inf"), -3], ids=repr)
@pytest.mark.parametrize(("cls", "option"), OPTIONS, ids=str)
def test_what_no_option_can_be_is_refused(cls, option, value) -> None:
    # a factor can be shared by low-rank adapters only
    beside = {"rank": 2} if option == "factor_of" else {}
    with pytest.raises(VisadaptError, match=rf"\b{option}\b.*{re.escape(repr(value))}"):
        cls(**{option: value}, **beside)


@pytest.mark.parametrize(
    ("cls", "option"), [(c, o) for c, o in OPTIONS if not isinstance(getattr(c(), o), bool)], ids=str
)
def test_true_is_no_number(cls, option) -> None:
    beside = {"rank": 2} if option == "factor_of" else {}
    with pytest.raises(VisadaptError, match=rf"\b{option}\b.*True"):
        cls(**{option: True}, **beside)


@pytest.mark.parametrize(("cls", "option"), [(c, o) for c, o in OPTIONS if isinstance(getattr(c(), o), bool)], ids=str)
def test_a_number_is_not_true(cls, option) -> None:
    with pytest.raises(VisadaptError, match=f"{option} must be True or False, got 1"):
        cls(**{option: 1})
