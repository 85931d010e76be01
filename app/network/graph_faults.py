"""What is wrong with the layers of a network, in their order, one fault for each place."""

from __future__ import annotations

from app.errors import Fault, InvalidSpec, JsonValue
from app.validation.faults import MOST_FAULTS


class GraphFaults:
    """The faults of one network that is being built."""

    def __init__(self) -> None:
        self._by_pointer: dict[str, Fault] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._by_pointer)

    def to_list(self) -> list[Fault]:
        """All faults, in the order in which they were found."""
        return list(self._by_pointer.values())

    def add(self, pointer: str, message: str, limit: JsonValue = None, value: JsonValue = None) -> None:
        """Add a fault, unless there is one at this pointer already.

        Raises:
            InvalidSpec: there are 100 faults.
        """
        self._by_pointer.setdefault(pointer, Fault(pointer, message, limit, value))
        if len(self) >= MOST_FAULTS:
            raise InvalidSpec(self.to_list())
