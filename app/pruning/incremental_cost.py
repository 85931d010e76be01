"""The exact cost of a graph from how many classes of each group are gone.

    costs = IncrementalCost(graph, classes)
    costs.cost_at(gone)                         # every measure, anew: some vector operations
    walk = CostWalk(costs, "macs", gone)
    walk.saving(group, 8), walk.move(group, 8)  # one measure, from where the walk stands: what the group touches

Elements and multiply-accumulates are products of at most two widths, and a width is linear in the number of classes of
each group: a cost is a quadratic form of these numbers. Both widths of a layer may move with one class, so savings can
never be added up in advance; they only shrink while other groups do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.network.cost import FLOAT_BYTES, Cost, CostMeasure, file_bytes, safetensors_header_bytes
from app.network.graph import Graph
from app.pruning.channel_classes import Classes
from app.pruning.channel_rules import IntArray, Slots

LARGEST_EXACT = 1 << 60  # sums above it are counted with Python's whole numbers
POWERS_OF_TEN = 10 ** np.arange(1, 19, dtype=np.int64)


class IncrementalCost:
    """The cost of a graph as a function of the classes that are gone from each group.

    `prices` say what one multiply-accumulate of a layer counts where "macs" is measured in a walk or by `amount_at`
    (default: 1); `cost_at` always counts plainly.
    """

    def __init__(self, graph: Graph, classes: Classes, prices: Mapping[str, int] | None = None) -> None:
        self._full: list[int] = []
        self.slots: list[Slots] = []
        """by the number of a width: the classes along it, those that are gone included"""
        self._width_of_axis = self._number_widths(classes)
        self.touched: list[list[tuple[int, int]]] = [[] for _ in classes.groups]
        """for each group: (number of a width, how many of its channels one class has)"""
        self._find_touched(classes)
        self._one = len(self._full)
        """the number of a width that is always 1"""
        self.terms: dict[tuple[int, int], list[int]] = {}
        """two numbers of widths -> how often their product counts: macs, params, stored, macs at their prices"""
        self._dims: list[tuple[str, list[tuple[int, int]]]] = []
        self._read(graph, classes, prices or {})
        self._index_terms()
        self._index_header()

    def cost_at(self, gone: Sequence[int] | IntArray) -> Cost:
        """All costs without so many classes of each group."""
        widths = self.widths_at(gone)
        macs, params, _, _ = (self._total(place, widths) for place in range(4))
        return Cost(params=params, nonzero_params=params, macs=macs, bytes=self._bytes_of(widths))

    def amount_at(self, gone: Sequence[int] | IntArray, measure: CostMeasure) -> int:
        """The cost in one measure: MACs at their prices, parameters, or bytes of the file."""
        widths = self.widths_at(gone)
        return self._bytes_of(widths) if measure == "bytes" else self._total(PLACES[measure], widths)

    def bytes_at(self, gone: Sequence[int] | IntArray) -> int:
        """Size of the safetensors file."""
        return self._bytes_of(self.widths_at(gone))

    def headers(self) -> tuple[int, int]:
        """(bytes of the file's header without any class, with all of them)."""
        whole = np.array([*self._full, 1], dtype=np.int64)
        least, most = (self._bytes_of(widths) - self._numbers_of(widths)[1] for widths in (np.ones_like(whole), whole))
        return least, most

    def widths_at(self, gone: Sequence[int] | IntArray) -> IntArray:
        """Every width, and a 1 behind them."""
        widths = np.array([*self._full, 1], dtype=np.int64)
        left = np.asarray(gone, dtype=np.int64)
        np.subtract.at(widths, self._touched_width, left[self._touched_group] * self._touched_count)
        return widths

    def _total(self, place: int, widths: IntArray) -> int:
        values = widths[self._first] * widths[self._second]
        weights = self._weights[place]
        return int(weights @ (values.astype(object) if weights.dtype == object else values))

    def _bytes_of(self, widths: IntArray) -> int:
        digits, data = self._numbers_of(widths)
        return file_bytes(self._header_besides + digits, data)

    def _numbers_of(self, widths: IntArray) -> tuple[int, int]:
        """(how many digits the header's shapes and offsets have together, bytes of the data)."""
        shapes = self._fixed * widths[self._owner]
        ends = np.cumsum(shapes.prod(axis=1) * FLOAT_BYTES)
        offsets = np.concatenate([ends, ends[:-1]])  # and the first start, which is 0
        return _digits(shapes[self._stated]) + _digits(offsets) + 1, int(ends[-1]) if len(ends) else 0

    def _number_widths(self, classes: Classes) -> list[int]:
        """For each axis of the classes the number of its width: axes along the same slots share one."""
        numbers: dict[tuple[bytes, int], int] = {}
        known: dict[int, int] = {}
        of_axis = []
        for axis in classes.axes:
            slots: Slots = axis.slots
            if id(slots) not in known:
                key = (slots.ids.tobytes(), slots.repeat)
                if key not in numbers:
                    numbers[key] = len(self._full)
                    self._full.append(slots.width)
                    self.slots.append(slots)
                known[id(slots)] = numbers[key]
            of_axis.append(known[id(slots)])
        return of_axis

    def _find_touched(self, classes: Classes) -> None:
        group_of = np.zeros(classes.slot_count, dtype=np.int64)
        for group in classes.groups:
            group_of[group.classes] = group.index
        found: list[tuple[int, int, int]] = []
        for width, slots in enumerate(self.slots):
            ids, counts = np.unique(slots.ids, return_counts=True)
            groups, first = np.unique(group_of[ids], return_index=True)
            for group, count in zip(groups.tolist(), (counts[first] * slots.repeat).tolist(), strict=True):
                self.touched[group].append((width, count))
                found.append((width, group, count))
        columns = np.array(found, dtype=np.int64).reshape(-1, 3).T
        self._touched_width, self._touched_group, self._touched_count = columns

    def _read(self, graph: Graph, classes: Classes, prices: Mapping[str, int]) -> None:
        owned = {(a.layer, a.tensor, a.axis): w for a, w in zip(classes.axes, self._width_of_axis, strict=True)}
        for node in graph.nodes:
            for name, tensor in node.uses.items():
                axes = [(owned.get((node.home, name, axis), self._one), size) for axis, size in enumerate(tensor.shape)]
                widths = sorted(width for width, _ in axes if width != self._one)
                assert len(widths) <= 2, f"{node.home}.{name}: at most two widths of a tensor follow channels"
                first, second = (*widths, self._one, self._one)[:2]
                counted = self.terms.setdefault((first, second), [0, 0, 0, 0])
                fixed = 1
                for width, size in axes:
                    fixed *= size if width == self._one else 1
                if node.shares is None:
                    self._dims.append((f"{node.name}.{name}", axes))
                    counted[PLACES["bytes"]] += fixed
                    counted[PLACES["params"]] += fixed if tensor.trainable else 0
                if name == "weight" and node.macs:
                    positions, rest = divmod(node.macs, tensor.elements)
                    assert rest == 0, f"{node.name}: every weight is used at a whole number of positions"
                    counted[0] += fixed * positions
                    counted[PLACES["macs"]] += fixed * positions * prices.get(node.home, 1)

    def _index_terms(self) -> None:
        pairs = np.array(list(self.terms), dtype=np.int64).reshape(-1, 2)
        self._first, self._second = pairs[:, 0], pairs[:, 1]
        full = [*self._full, 1]
        self._weights: list[NDArray[Any]] = []
        for place in range(4):
            whole = sum(counted[place] * full[a] * full[b] for (a, b), counted in self.terms.items())
            exact = object if whole > LARGEST_EXACT else np.int64
            self._weights.append(np.array([counted[place] for counted in self.terms.values()], dtype=exact))

    def _index_header(self) -> None:
        """Note where the numbers of the file's header come from, and how long it is without them."""
        self._dims.sort()
        most = max((len(axes) for _, axes in self._dims), default=1)
        size = (len(self._dims), most)
        self._fixed, self._owner = np.ones(size, dtype=np.int64), np.full(size, self._one, dtype=np.int64)
        self._stated = np.zeros(size, dtype=np.bool_)
        for row, (_, axes) in enumerate(self._dims):
            for column, (width, length) in enumerate(axes):
                self._owner[row, column], self._stated[row, column] = width, True
                self._fixed[row, column] = length if width == self._one else 1
        whole = {key: tuple(length for _, length in axes) for key, axes in self._dims}
        digits, _ = self._numbers_of(np.array([*self._full, 1], dtype=np.int64))
        self._header_besides = safetensors_header_bytes(whole) - digits


class CostWalk:
    """The cost in one measure while classes leave groups and return: `gone` of each group, `amount` at present.

    Of "bytes" the amount is the elements in the file; `fits` and `may_return` count its header.
    """

    def __init__(self, costs: IncrementalCost, measure: CostMeasure, gone: Sequence[int] | IntArray) -> None:
        self.gone = [int(count) for count in gone]
        self._costs, self._measure, self._touched = costs, measure, costs.touched
        place = PLACES[measure]
        widths = costs.widths_at(gone).tolist()
        self.amount = 0
        self._slopes = [0] * len(widths)
        """for each width, how much the amount rises with it"""
        self._coupled: list[list[tuple[int, int]]] = [[] for _ in widths]
        """for each width: (another, how much the slope of that one rises with it)"""
        for (first, second), counted in costs.terms.items():
            if weight := counted[place]:
                self.amount += weight * widths[first] * widths[second]
                self._slopes[first] += weight * widths[second]
                self._slopes[second] += weight * widths[first]
                self._coupled[first].append((second, weight))
                self._coupled[second].append((first, weight))
        self._bends: dict[int, int] = {}
        self._headers = costs.headers() if measure == "bytes" else (0, 0)
        """between which lengths the file's header is: it only shrinks with its tensors"""

    def saving(self, group: int, count: int) -> int:
        """How much smaller the amount is without `count` more classes of the group; negative where they return."""
        slope, bend = self.saving_terms(group)
        return count * slope - count * count * bend

    def saving_terms(self, group: int) -> tuple[int, int]:
        """(a, b) such that n more classes of the group save a n - b n^2."""
        touched = self._touched[group]
        if group not in self._bends:
            own = dict(touched)
            bend = sum(own[w] * weight * own.get(other, 0) for w in own for other, weight in self._coupled[w])
            self._bends[group] = bend // 2
        return sum([count * self._slopes[width] for width, count in touched]), self._bends[group]

    def move(self, group: int, count: int) -> None:
        """Remove `count` more classes of the group; a negative number returns."""
        self.amount -= self.saving(group, count)
        for width, count_of in self._touched[group]:
            change = count * count_of
            for other, weight in self._coupled[width]:
                self._slopes[other] -= weight * change
        self.gone[group] += count

    def fits(self, allowed: int) -> bool:
        """Whether the cost is at most `allowed`."""
        if self._measure != "bytes":
            return self.amount <= allowed
        least, most = self._headers
        if FLOAT_BYTES * self.amount + least > allowed:
            return False
        return FLOAT_BYTES * self.amount + most <= allowed or self._costs.bytes_at(self.gone) <= allowed

    def may_return(self, group: int, count: int, allowed: int) -> bool:
        """Whether the cost is still at most `allowed` when `count` classes of the group have returned."""
        more = self.amount - self.saving(group, -count)
        if self._measure != "bytes":
            return more <= allowed
        least, most = self._headers
        if FLOAT_BYTES * more + least > allowed:
            return False
        if FLOAT_BYTES * more + most <= allowed:
            return True
        gone = list(self.gone)
        gone[group] -= count
        return self._costs.bytes_at(gone) <= allowed


PLACES: dict[CostMeasure, int] = {"params": 1, "bytes": 2, "macs": 3}
"""where a measure stands in `IncrementalCost.terms`; the plain MACs stand at 0"""


def _digits(numbers: IntArray) -> int:
    """How many digits these numbers have together."""
    return int(np.searchsorted(POWERS_OF_TEN, numbers, side="right").sum()) + len(numbers)
