"""`/openapi.json` and `/docs`: the API described from its own routes, readable without a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, Response

from app import errors
from app.api import responses
from app.api.problems import MEDIA_TYPE
from app.api.rendering import Json
from app.schemas.problem import ProblemSchema
from app.spec.job import JobSpec
from app.web import reference
from app.web.pages import POLICY

SCHEMA = "#/components/schemas/{model}"
PROBLEM: dict[str, Any] = {
    "description": "An error: `code` says which, `errors` where.",
    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
EVERY_ROUTE: responses.Responses = {"default": PROBLEM}

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
def openapi(request: Request) -> Response:
    """The API as OpenAPI 3.1."""
    return Json(request.app.openapi())


@router.get("/docs")
def docs(request: Request) -> Response:
    """The same for people."""
    return HTMLResponse(reference.routes_page(request.app.openapi()), headers={"Content-Security-Policy": POLICY})


@router.get("/docs/jobs")
def language_docs(request: Request) -> Response:
    """The job language: what the body of a submit may hold."""
    return HTMLResponse(reference.language_page(request.app.openapi()), headers={"Content-Security-Policy": POLICY})


@router.get("/docs/errors")
def error_docs() -> Response:
    """Every error code: what the `type` of a problem points to."""
    return HTMLResponse(reference.errors_page(list(_codes())), headers={"Content-Security-Policy": POLICY})


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once: FastAPI's, with problems for errors and the job language as a submit's body."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        _, spec = models_json_schema([(JobSpec, "validation"), (ProblemSchema, "serialization")], ref_template=SCHEMA)
        components: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        components |= spec["$defs"]
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            operation["responses"].pop("422", None)
        app.openapi_schema = document
    return app.openapi_schema


def _codes() -> Iterator[reference.ErrorCode]:
    for kind in _tree(errors.EspalierError):
        if kind is errors.RequestError:
            continue  # never raised itself; its code is that of Internal
        if issubclass(kind, errors.RequestError):
            yield reference.ErrorCode(kind.code, kind.status, _sentence(kind), None)
        elif issubclass(kind, errors.JobError):
            yield reference.ErrorCode(kind.code, None, _sentence(kind), kind.hint)


def _tree(kind: type[errors.EspalierError]) -> Iterator[type[errors.EspalierError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _tree(inner)


def _sentence(kind: type[errors.EspalierError]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
