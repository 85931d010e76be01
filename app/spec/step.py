"""What every optimization of a job has besides its fields: a title, examples, and its place among the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from app.validation.strict import Strict


class JobStep(Strict):
    """One optimization of a job. Its class says all that the service knows of it without a network.

    What it does to the plan is in `app/planning/dry_run.py`, what it does to the network in `app/rewrites` or on the
    worker.
    """

    title: ClassVar[str]
    """As forms and the catalogue call it."""
    examples: ClassVar[tuple[Mapping[str, Any], ...]]
    """Steps as a job states them, the plainest first. Each can be planned."""
    why_before_compressions: ClassVar[str | None] = None
    """Why it has to stand before the first compression, as a phrase; None: it does not."""
    must_be_last: ClassVar[bool] = False
    """Whether no other optimization may stand after it."""
    may_repeat: ClassVar[bool] = False
    """Whether a job may state it twice for the same layers."""

    @classmethod
    def kind(cls) -> str:
        """The `type` with which a job asks for it."""
        return str(cls.model_fields["type"].default)
