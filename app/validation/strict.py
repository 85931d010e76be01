"""The ground rules of every part of the job language: frozen, strict, no unknown fields, no invisible characters."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from app.errors import JsonValue

LARGEST_INT = 2**31 - 1
TEXT_LENGTH = 200
LABELS = 64

# Control characters (C0, DEL, C1), zero-width and joining characters, bidirectional marks, overrides and isolates,
# line and paragraph separators, surrogates, the byte-order mark, tag characters: what a reader cannot see must not be
# in a name.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff\U000e0000-\U000e0fff]"
)


class Strict(BaseModel):
    """One part of a job: immutable; unknown fields, NaN, infinities and numbers of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def fault(message: str, *, field: str | None = None, limit: JsonValue = None, value: JsonValue = None) -> Exception:
    """An exception for validators of this language: `message` at `field` (a name, or a path `a/0`) of the part."""
    context: dict[str, Any] = {"text": message, "field": field, "limit": limit, "value": value}
    return PydanticCustomError("fault", "{text}", context)


def _visible(text: str) -> str:
    found = _INVISIBLE.search(text)
    if found:
        raise fault(f"must not contain control, zero-width or direction characters, but has U+{ord(found[0]):04X}")
    return text


def _label_key(text: str) -> str:
    if ":" in text:
        raise fault("a label's key must not contain a colon, which separates key and value in ?label=key:value")
    return text


Text = Annotated[str, Field(min_length=1, max_length=TEXT_LENGTH), AfterValidator(_visible)]
LabelKey = Annotated[Text, AfterValidator(_label_key)]
LabelValue = Annotated[str, Field(max_length=TEXT_LENGTH), AfterValidator(_visible)]
Names = Annotated[tuple[Text, ...], Field(min_length=1, max_length=10_000)]
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Count = Annotated[int, Field(ge=1, le=LARGEST_INT)]
Shape = Annotated[tuple[Count, ...], Field(min_length=2, max_length=4)]


def without_default(schema: dict[str, Any]) -> None:
    """Take a default out of a JSON schema: it depends on more than its own field, and the description says on what."""
    schema.pop("default", None)
