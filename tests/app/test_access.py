"""The one key of an installation."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from app.access import DEFAULT_TENANT, authenticate
from app.errors import Unauthorized

KEY = SecretStr("esp_key-1")


def test_without_a_key_everybody_is_the_default_tenant() -> None:
    for header in (None, b"", b"Bearer anything", b"\xff"):
        assert authenticate(None, header) == DEFAULT_TENANT


@pytest.mark.parametrize("header", [b"Bearer esp_key-1", b"bearer esp_key-1", b"Bearer  esp_key-1 "])
def test_the_key_opens(header: bytes) -> None:
    assert authenticate(KEY, header) == DEFAULT_TENANT


@pytest.mark.parametrize(
    "header",
    [
        None, b"", b"Bearer", b"Bearer ", b"esp_key-1", b"Basic esp_key-1", b"Bearer esp_key-2", b"Bearer ESP_KEY-1",
        b"Bearer esp_key-1\xe9", b"Bearer esp_key-1 esp_key-1", b"Bearer " + b"x" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_one_and_the_same_refusal(header: bytes | None) -> None:
    with pytest.raises(Unauthorized) as refused:
        authenticate(KEY, header)
    assert (refused.value.status, refused.value.code) == (401, "unauthorized")
    assert refused.value.message == Unauthorized().message
