"""Every test here starts whole services: one process runs them all, so that two never compete for the cores."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/faults" in str(item.path):
            item.add_marker(pytest.mark.xdist_group("services"))
