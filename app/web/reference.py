"""The API, the job language and the error codes as pages, made from the OpenAPI document and the error classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.web.html import Html, element, join
from app.web.pages import frame

ROOT = "JobSpec"
LIMITS = {
    "minimum": " from {}",
    "exclusiveMinimum": " above {}",
    "maximum": " to {}",
    "exclusiveMaximum": " below {}",
    "maxLength": " of at most {} characters",
    "minItems": ", at least {}",
    "maxItems": ", at most {}",
}


@dataclass(frozen=True)
class ErrorCode:
    """A code: with a status it is an HTTP answer, without one it ends a job."""

    code: str
    status: int | None
    sentence: str
    hint: str | None


def routes_page(openapi: dict[str, Any]) -> str:
    """Every route with its parameters and answers, from the OpenAPI document."""
    intro = element(
        "p",
        "Machine-readable: ",
        element("a", "/openapi.json", href="/openapi.json"),
        ". What a job may be: ",
        element("a", "the job language", href="/docs/jobs"),
        ". Errors: ",
        element("a", "all codes", href="/docs/errors"),
        ".",
    )
    routes = [
        _route(method, path, operation)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ]
    return frame("The API", [element("h1", "The API"), intro, *routes])


def language_page(openapi: dict[str, Any]) -> str:
    """Every part of the job language with its fields, from the schema of a submit's body on."""
    schemas = openapi["components"]["schemas"]
    parts = [_part(name, schemas[name]) for name in _reachable(schemas, ROOT)]
    return frame("The job language", [element("h1", "The job language"), *parts])


def errors_page(codes: list[ErrorCode]) -> str:
    """Every error code once, with its sentence and its hint."""
    seen: dict[str, ErrorCode] = {}
    for code in codes:
        seen.setdefault(code.code, code)
    rows = [
        element(
            "tr",
            element("td", element("code", code.code), id=code.code),
            element("td", "ends a job" if code.status is None else code.status),
            element("td", code.sentence, element("br") if code.hint else None, code.hint),
        )
        for code in sorted(seen.values(), key=lambda code: (code.status or 1000, code.code))
    ]
    head = element("tr", *(element("th", title) for title in ("code", "status", "what it means")))
    return frame("Errors", [element("h1", "Errors"), element("table", head, *rows)])


def _reachable(schemas: Mapping[str, Any], root: str) -> list[str]:
    """Names of the schemas that can be reached from `root`, level by level."""
    found: dict[str, None] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            waiting += _references(schemas[name])
    return list(found)


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [name for member in schema for name in _references(member)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"].rpartition("/")[2]] if isinstance(schema.get("$ref"), str) else []
    return own + [name for key, member in schema.items() if key != "discriminator" for name in _references(member)]


def _part(name: str, schema: Mapping[str, Any]) -> Html:
    required = schema.get("required", ())
    rows = [
        element(
            "tr",
            element("td", element("code", field)),
            element("td", _kind(of), *_default(of, field in required)),
            element("td", of.get("description", "")),
        )
        for field, of in schema.get("properties", {}).items()
    ]
    head = element("tr", *(element("th", title) for title in ("field", "value", "")))
    kind = schema.get("properties", {}).get("type", {}).get("const")
    title = [name, [" ", element("code", f'"type": "{kind}"')] if kind else None]
    return join(
        [element("h2", *title, id=name), element("p", schema.get("description", "")), element("table", head, *rows)]
    )


def _kind(schema: Mapping[str, Any]) -> Html:
    """What a value may be, in words; parts of the language are links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return element("a", name, href=f"/docs/jobs#{name}")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return join(_between([element("code", json.dumps(value)) for value in values], " "))
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return join(_between([_kind(one) for one in schema[several]], " or "))
    limits = "".join(words.format(_number(schema[name])) for name, words in LIMITS.items() if name in schema)
    if schema.get("type") == "array":
        inner = schema["prefixItems"] if "prefixItems" in schema else [schema.get("items", {})]
        return join(["list of ", _between([_kind(one) for one in inner], ", "), limits])
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return join(["object", [" of ", _kind(values)] if isinstance(values, dict) else None])
    return join([str(schema.get("type", "any")), limits])


def _default(schema: Mapping[str, Any], required: bool) -> list[object]:
    if "default" not in schema or "const" in schema:
        return [element("span", " required", class_="soft")] if required else []
    return [element("span", " default ", class_="soft"), element("code", json.dumps(schema["default"]))]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _between(parts: Sequence[Html], separator: str) -> list[object]:
    pieces: list[object] = [piece for part in parts for piece in (separator, part)]
    return pieces[1:]


def _route(method: str, path: str, operation: dict[str, Any]) -> Html:
    parameters = [
        element(
            "tr",
            element("td", element("code", parameter["name"]), element("span", f" {parameter['in']}", class_="soft")),
            element("td", parameter.get("description", "")),
        )
        for parameter in operation.get("parameters", [])
    ]
    answers = [
        element("tr", element("td", status), element("td", answer.get("description", "")))
        for status, answer in operation["responses"].items()
    ]
    return join(
        [
            element("h2", element("code", f"{method.upper()} {path}"), f"  {operation.get('summary', '')}"),
            element("p", operation.get("description", "")),
            element("table", *parameters, *answers),
        ]
    )
