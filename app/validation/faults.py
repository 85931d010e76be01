"""pydantic's errors as faults with JSON pointers into what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from app.errors import Fault, JsonValue

MOST_FAULTS = 100
DEEPEST = 64
MOST_ENTRIES = 10_000
_KEY_LENGTH = 64  # a key of a megabyte must not come back
_POINTER_LENGTH = 512
_TEXT_LENGTH = 64
_INT_LIMIT = 2**63

_MESSAGES = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this part of the language",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must not be empty",
    "literal_error": "must be one of: {expected}",
    "union_tag_invalid": "is not offered; offered are: {expected_tags}",
    "union_tag_not_found": "is required",
    "string_pattern_mismatch": "must match {pattern}",
    "json_invalid": "is not valid JSON: a string holds one half of a surrogate pair",
}
_LIMITS = ("gt", "ge", "lt", "le", "max_length", "min_length")


def pointer(*path: str | int) -> str:
    """The JSON pointer (RFC 6901) of a path; long keys are cut, and the whole to 512 characters."""
    return "".join("/" + str(part)[:_KEY_LENGTH].replace("~", "~0").replace("/", "~1") for part in path)[
        :_POINTER_LENGTH
    ]


def counted(number: int, noun: str) -> str:
    """`1 channel`, `3 channels`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def echo(value: object) -> JsonValue:
    """`value` if it is a scalar of sane size, else None: nothing large comes back in an error."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < _INT_LIMIT else None
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, str) and len(value) <= _TEXT_LENGTH and value.isprintable():
        return value
    return None


def bulk_fault(document: object) -> Fault | None:
    """What is wrong if lists and objects are nested deeper than 64 or hold more than 10,000 entries, else None.

    Checked first, since a checker that lists every mistake would list half a million.
    """
    level: list[tuple[tuple[str | int, ...], Any]] = [((), document)]
    for _ in range(DEEPEST):
        below = []
        for path, value in level:
            if not isinstance(value, dict | list):
                continue
            if len(value) > MOST_ENTRIES:
                message = f"must have at most {MOST_ENTRIES} entries"
                return Fault(pointer(*path), message, limit=MOST_ENTRIES, value=len(value))
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            below += [((*path, key), child) for key, child in entries if isinstance(child, dict | list)]
        if not below:
            return None
        level = below
    return Fault("", f"is nested deeper than {DEEPEST} levels", limit=DEEPEST)


@dataclass(frozen=True)
class _Located:
    """One error of pydantic: its path in the document, whether it speaks for one arm of a union, and the fault."""

    path: tuple[str | int, ...]
    of_union: bool
    only_type: bool
    fault: Fault


def faults_of(error: ValidationError, document: object) -> list[Fault]:
    """At most 100 faults, in the order of the document's schema, one for each place."""
    located: list[_Located] = []
    for entry in error.errors(include_url=False):
        if not _follows(entry, document):
            located.append(_locate(entry, document))
            if len(located) >= 4 * MOST_FAULTS:
                break
    return _merge(located)[:MOST_FAULTS]


def _follows(entry: Any, document: object) -> bool:
    """Whether the error only follows from another one, which is listed too."""
    if entry["type"] == "too_short":  # pydantic counts the entries that are right
        sent = _at(document, _path(entry["loc"], document, missing=False)[0])
        return isinstance(sent, list | dict) and len(sent) >= entry["ctx"]["min_length"]
    return bool(entry["type"] == "default_factory_not_called")


def _locate(entry: Any, document: object) -> _Located:
    kind, context = entry["type"], entry.get("ctx", {})
    path, of_union = _path(entry["loc"], document, missing=kind == "missing")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, context["discriminator"].strip("'"))
        value = echo(_at(document, path))
    elif kind == "fault":
        if context["field"]:
            path = (*path, *(int(part) if part.isdigit() else part for part in context["field"].split("/")))
        value = echo(entry["input"] if context["field"] is None and context["value"] is None else context["value"])
    elif kind in ("too_long", "too_short"):
        sent = _at(document, path)
        value = len(sent) if isinstance(sent, dict | list) else None
    elif kind == "string_too_long":
        value = len(entry["input"])
    else:
        value = None if kind == "missing" else echo(entry["input"])
    limit = (
        context.get("limit") if kind == "fault" else next((context[name] for name in _LIMITS if name in context), None)
    )
    fault = Fault(pointer(*path), _message(kind, context, entry["msg"]), limit=limit, value=value)
    return _Located(path, of_union, kind.endswith("_type") or kind == "literal_error", fault)


def _message(kind: str, context: dict[str, Any], fallback: str) -> str:
    if kind == "fault":
        return str(context["text"])
    if kind == "too_short" and context["min_length"] > 1:
        return f"must have at least {context['min_length']} entries"
    if kind == "value_error":
        return fallback.removeprefix("Value error, ")
    named = {name: _spoken(name, value) for name, value in context.items()}
    return _MESSAGES[kind].format(**named) if kind in _MESSAGES else fallback


def _spoken(name: str, value: object) -> object:
    if name in ("expected", "expected_tags"):
        return str(value).replace("'", "").replace(" or ", ", ")
    return f"{value:g}" if isinstance(value, float) else value


def _path(location: Sequence[str | int], document: object, *, missing: bool) -> tuple[tuple[str | int, ...], bool]:
    """(path in the document, whether it names an arm of a union) of pydantic's location, which also holds tags."""
    path: list[str | int] = []
    here: Any = document
    of_union = tagged = False
    for position, part in enumerate(location):
        absent = missing and position == len(location) - 1
        entry = isinstance(here, dict) and bool(path) and isinstance(path[-1], int)
        tag = entry and not tagged and here.get("type") == part
        if _steps_into(here, part) and (absent or not tag):
            here = here[part]
        elif not absent:
            tagged, of_union = tagged or tag, of_union or not tag
            continue
        path.append(part)
        of_union = tagged = False
    return tuple(path), of_union


def _steps_into(here: Any, part: str | int) -> bool:
    if isinstance(here, dict):
        return part in here
    return isinstance(here, list) and isinstance(part, int) and part < len(here)


def _at(document: object, path: Sequence[str | int]) -> object:
    for part in path:
        if not isinstance(document, dict):
            if not (isinstance(document, list) and isinstance(part, int)):
                return None
            document = document[part]
        else:
            document = document.get(part)
    return document


def _merge(located: Sequence[_Located]) -> list[Fault]:
    """One fault for each place: of a union's arms the fault that says more than "another type", else one with all types."""
    deeper = {entry.path[:length] for entry in located for length in range(len(entry.path))}
    kept: dict[tuple[str | int, ...], _Located] = {}
    for entry in located:
        if entry.of_union and entry.only_type and entry.path in deeper:
            continue
        before = kept.get(entry.path)
        if before is None or (before.only_type and not entry.only_type):
            kept[entry.path] = entry
        elif before.only_type and entry.of_union and entry.fault.message not in before.fault.message:
            words = before.fault.message + ", or " + entry.fault.message.removeprefix("must be ")
            kept[entry.path] = _Located(
                entry.path, True, True, Fault(before.fault.pointer, words, before.fault.limit, before.fault.value)
            )
    return [entry.fault for entry in kept.values()]
