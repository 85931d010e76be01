"""Mistakes of a job collected, so that one answer has them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NoReturn

from app.errors import Fault, InvalidSpec
from app.validation.faults import MOST_FAULTS


class Faults:
    """The mistakes found so far. Where they are raised, at most MOST_FAULTS are, the first ones."""

    def __init__(self) -> None:
        self._found: list[Fault] = []

    def add(self, faults: Iterable[Fault]) -> None:
        """Note these, after those found before."""
        self._found += islice(faults, MOST_FAULTS)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note the faults of an InvalidSpec that is raised inside, instead of raising it."""
        try:
            yield
        except InvalidSpec as exc:
            self.add(exc.faults)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Where an InvalidSpec is raised inside, raise one with its faults and, after them, those found before."""
        try:
            yield
        except InvalidSpec as exc:
            self._raise(exc.faults, exc)

    def raise_with(self, first: Iterable[Fault]) -> None:
        """Raise InvalidSpec with `first` and, after them, those found before, if there are any of `first`."""
        if faults := [*islice(first, MOST_FAULTS)]:
            self._raise(faults)

    def raise_if_any(self) -> None:
        """Raise InvalidSpec with what was found, if anything was."""
        if self._found:
            self._raise(())

    def _raise(self, first: Iterable[Fault], cause: InvalidSpec | None = None) -> NoReturn:
        raise InvalidSpec([*first, *self._found][:MOST_FAULTS]) from cause


def raise_first(faults: Iterable[Fault]) -> None:
    """Raise InvalidSpec with the first MOST_FAULTS of these, if there are any."""
    if found := [*islice(faults, MOST_FAULTS)]:
        raise InvalidSpec(found)
