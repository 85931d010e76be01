"""A setting that is not valid ends the start with one sentence, which does not repeat its value."""

from __future__ import annotations

import pytest

from app import migrate
from app.errors import StartupError
from app.settings import load_settings


def test_a_wrong_variable_is_named_and_its_value_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_SLOTS", "s3cret")
    with pytest.raises(StartupError, match=r"^ESPALIER_SLOTS is not valid: ") as refused:
        load_settings()
    assert "s3cret" not in refused.value.message


def test_a_wrong_argument_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_PORT", "8000")
    with pytest.raises(StartupError, match=r"^the given port is not valid: "):
        load_settings(port=99_999)


def test_the_migration_says_so_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ESPALIER_PORT", "http")
    assert migrate.main() == 1
    assert capsys.readouterr().err.startswith("espalier migrate: ESPALIER_PORT is not valid: ")


def test_a_lease_that_a_worker_could_outlive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_LEASE_S", "30")
    with pytest.raises(
        StartupError, match=r"^ESPALIER_RENEW_S < ESPALIER_SELF_FENCE_S < ESPALIER_LEASE_S .*10, 40, 30"
    ):
        load_settings()
    assert load_settings(self_fence_s=20).lease_s == 30
