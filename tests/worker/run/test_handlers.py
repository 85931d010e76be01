"""Every optimization has a handler on the worker's side, and compressions one that removes."""

from __future__ import annotations

import inspect
from typing import get_args

from app.spec.optimizations import OPTIMIZATIONS, Compression, Rewrite
from worker.run.handlers import HANDLERS, CompressionHandler, OptimizationHandler, RewriteHandler


def test_every_optimization_has_a_handler_and_no_handler_has_none() -> None:
    assert set(HANDLERS) == set(OPTIMIZATIONS)
    assert all(isinstance(handler, OptimizationHandler) for handler in HANDLERS.values())


def test_a_compression_removes_a_rewrite_reports_what_it_brought() -> None:
    removing = {kind for kind, handler in HANDLERS.items() if isinstance(handler, CompressionHandler)}
    assert removing == set(get_args(Compression))
    rewriting = {kind for kind, handler in HANDLERS.items() if isinstance(handler, RewriteHandler)}
    assert rewriting == set(get_args(Rewrite))


def test_a_handler_lacks_no_part() -> None:
    for kind in (OptimizationHandler, CompressionHandler):
        assert inspect.isabstract(kind), "each part has to be written"
    assert not any(inspect.isabstract(type(handler)) for handler in HANDLERS.values())
