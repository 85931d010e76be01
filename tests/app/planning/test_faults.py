"""Mistakes that are collected: which are answered together, in which order, and how many at most."""

from __future__ import annotations

import pytest

from app.errors import Fault, InvalidSpec
from app.planning.faults import Faults, raise_first
from app.validation.faults import MOST_FAULTS


def some(count: int, name: str = "f") -> list[Fault]:
    return [Fault(f"/{name}/{number}", "is wrong") for number in range(count)]


def test_nothing_is_raised_where_nothing_was_found() -> None:
    faults = Faults()
    faults.add([])
    faults.raise_with([])
    raise_first([])
    with faults.followed(), faults.collecting():
        pass
    faults.raise_if_any()


def test_what_was_found_is_raised_at_once_and_no_more_than_the_limit() -> None:
    faults = Faults()
    faults.add(some(60, "a"))
    with faults.collecting():
        raise InvalidSpec(some(60, "b"))
    with pytest.raises(InvalidSpec) as caught:
        faults.raise_if_any()
    assert caught.value.faults == (*some(60, "a"), *some(MOST_FAULTS - 60, "b"))


def test_mistakes_that_end_the_search_come_before_those_found_so_far() -> None:
    faults = Faults()
    faults.add(some(1, "a"))
    with pytest.raises(InvalidSpec) as caught:
        faults.raise_with(some(1, "b"))
    assert caught.value.faults == (*some(1, "b"), *some(1, "a"))
    with pytest.raises(InvalidSpec) as followed, faults.followed():
        raise InvalidSpec(some(1, "c"))
    assert followed.value.faults == (*some(1, "c"), *some(1, "a"))


def test_a_list_without_end_is_read_as_far_as_the_limit() -> None:
    endless = (Fault(f"/{number}", "is wrong") for number in iter(int, 1))
    with pytest.raises(InvalidSpec) as caught:
        raise_first(endless)
    assert len(caught.value.faults) == MOST_FAULTS
