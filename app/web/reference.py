"""The API and its error codes as pages, made from what the code says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.web.html import Html, element, join
from app.web.pages import frame


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


def errors_page(codes: list[ErrorCode]) -> str:
    """Every error code once, with what to do."""
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
