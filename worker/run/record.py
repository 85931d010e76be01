"""What a job notes for its report. It is kept in checkpoints, so it is made of JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from worker.evaluation import Scores


@dataclass
class StepRecord:
    """One compression: `position` in the job's optimizations, measures (`M` of the report) before and after, layers.

    `start` is the network before its first removal (as `model.layers`), `sparsity_before` the part of what
    it prunes that earlier steps had pruned. `after` is None while the step is under way. `rounds` has one entry for each
    removal, with the accuracy on the test part right after the cut and after batch norm was recalibrated. `outcomes`
    says what became of each layer in a step that replaces layers; checkpoints call it "fates". `met` says of a budget of
    latency whether it is met, as far as measuring tells; None of other steps. `reconstructed` says
    which layers the last round repaired, and why not the others.
    """

    position: int
    before: dict[str, Any]
    start: list[dict[str, Any]]
    sparsity_before: float = 0.0
    after: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    reconstructed: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    complete: bool = False
    met: bool | None = None


@dataclass
class RunRecord:
    """The report so far: `seconds` of all attempts, scores of the dense network and of the latest one.

    `sensitivity` has a row for each group of channels that a job of this kind has measured; `curves` has the cuts that
    the removal under way has measured so far: index of the group, part kept, rise of the loss.
    """

    baseline: Scores | None = None
    latest: Scores | None = None
    steps: list[StepRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    curves: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, sentence: str) -> None:
        """Add a sentence to the report's notes, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def document(self) -> dict[str, Any]:
        """The record as JSON values; `from_document` reads them back."""
        return {
            "baseline": None if self.baseline is None else self.baseline.document(),
            "latest": None if self.latest is None else self.latest.document(),
            "steps": [_renamed(asdict(step), "outcomes", "fates") for step in self.steps],
            "notes": list(self.notes),
            "sensitivity": list(self.sensitivity),
            "curves": [list(point) for point in self.curves],
            "seconds": self.seconds,
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """The record that `document()` wrote."""
        baseline, latest = document["baseline"], document["latest"]
        return cls(
            baseline=None if baseline is None else Scores.from_document(baseline),
            latest=None if latest is None else Scores.from_document(latest),
            steps=[StepRecord(**_renamed(step, "fates", "outcomes")) for step in document["steps"]],
            notes=list(document["notes"]),
            sensitivity=list(document.get("sensitivity", ())),
            curves=[(group, kept, rise) for group, kept, rise in document.get("curves", ())],
            seconds=document["seconds"],
        )


def _renamed(document: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in document.items()}
