"""Tests that start whole services run in one process, so that two never compete for the cores."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in {"e2e", "faults"}:
            item.add_marker(pytest.mark.xdist_group("services"))
