"""The event sink of a running job: events, progress, metrics and checkpoints go out, the user's wishes come in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

from app.errors import JsonValue
from app.planning.phases import PhaseName

Wish = Literal["cancel", "stop", "pause"]


@dataclass(frozen=True)
class Progress:
    """How far a job is: `fraction` (0 to 1) of all phases, `epoch` of this phase's `epochs`, `step` of all `steps`."""

    phase: PhaseName
    epoch: int
    epochs: int
    step: int
    steps: int
    fraction: float
    images_per_s: float | None = None
    eta_s: float | None = None

    def document(self) -> dict[str, JsonValue]:
        """The job's `progress` as the API shows it."""
        return {
            "phase": self.phase,
            "epoch": self.epoch,
            "epochs": self.epochs,
            "step": self.step,
            "steps": self.steps,
            "fraction": round(self.fraction, 4),
            "images_per_s": None if self.images_per_s is None else round(self.images_per_s, 1),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
        }


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint whose two files are complete on this machine's disk."""

    step: int
    epoch: int
    phase: PhaseName
    tensors: Path
    state: Path
    metrics: Mapping[str, float]


class Journal(Protocol):
    """Where the pipeline writes what happens. Every method may be called from the checkpoint's writing thread too."""

    def event(self, type: str, message: str, *, level: str = "info", **data: JsonValue) -> None:  # noqa: A002
        """Tell the user that something happened; `message` is one English sentence."""

    def progress(self, progress: Progress) -> None:
        """Tell how far the job is."""

    def metric(self, series: str, step: int, value: float) -> None:
        """Add one point to a curve; `value` is finite."""

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """Announce a checkpoint whose files are complete."""

    def wish(self) -> Wish | None:
        """What the user asked of the running job; read before each step."""


@dataclass(frozen=True)
class JournalEvent:
    """One event as a MemoryJournal keeps it."""

    type: str
    message: str
    level: str
    data: Mapping[str, JsonValue]


@dataclass
class MemoryJournal:
    """A journal that keeps everything: for tests, and for running a job without the service.

    `wishes` is asked before each step with the last progress, so that a caller can ask for something at an exact place;
    `echo` gets one line for each event; with `keep` False checkpoints are deleted as soon as they are announced.
    """

    wishes: Callable[[Progress | None], Wish | None] = lambda progress: None
    echo: IO[str] | None = None
    keep: bool = True
    events: list[JournalEvent] = field(default_factory=list)
    progresses: list[Progress] = field(default_factory=list)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    checkpoints: list[SavedCheckpoint] = field(default_factory=list)
    asked: int = 0
    started: float = field(default_factory=time.monotonic)

    def event(self, type: str, message: str, *, level: str = "info", **data: JsonValue) -> None:  # noqa: A002
        """Keep the event, and print it where an echo is wanted."""
        self.events.append(JournalEvent(type, message, level, data))
        if self.echo is not None:
            self.echo.write(f"{time.monotonic() - self.started:8.1f} s  {message}\n")
            self.echo.flush()

    def progress(self, progress: Progress) -> None:
        """Keep the progress."""
        self.progresses.append(progress)

    def metric(self, series: str, step: int, value: float) -> None:
        """Keep the point."""
        self.metrics.setdefault(series, []).append((step, value))

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """Keep the announcement, and the files unless they are not wanted."""
        self.checkpoints.append(saved)
        if not self.keep:
            saved.tensors.unlink()
            saved.state.unlink()

    def wish(self) -> Wish | None:
        """What `wishes` says at this place."""
        self.asked += 1
        return self.wishes(self.progresses[-1] if self.progresses else None)

    def of_type(self, type: str) -> list[JournalEvent]:  # noqa: A002
        """The events of one type, in order."""
        return [event for event in self.events if event.type == type]
