"""The compose file says what the code reads; no engine is needed to check that."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.support.checkout import ROOT


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


def test_every_espalier_variable_is_a_setting(compose: dict[str, Any]) -> None:
    known = {f"ESPALIER_{name.upper()}" for name in Settings.model_fields}
    used = {
        name
        for service in compose["services"].values()
        for name in service.get("environment", {})
        if name.startswith("ESPALIER_")
    }
    assert used
    assert used <= known


def test_what_a_service_waits_for_exists_and_can_be_healthy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services, f"{name} waits for {other}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for the health of {other}"


def test_every_named_volume_is_declared_and_used(compose: dict[str, Any]) -> None:
    used = {volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])}
    assert used == set(compose["volumes"])


def test_only_the_gpu_worker_reserves_a_device_and_it_needs_its_profile(compose: dict[str, Any]) -> None:
    reserving = [name for name, service in compose["services"].items() if "deploy" in service]
    assert reserving == ["worker-gpu"]
    assert compose["services"]["worker-gpu"]["profiles"] == ["gpu"]


def test_the_api_is_published_on_loopback_and_needs_a_key(compose: dict[str, Any]) -> None:
    api = compose["services"]["api"]
    assert all(port.startswith("127.0.0.1:") for port in api["ports"])
    assert ":?" in api["environment"]["ESPALIER_API_KEY"]


def test_the_images_run_as_a_user_and_each_build_target_is_a_stage(compose: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", dockerfile, re.M))
    targets = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert targets <= stages
    for stage in targets:
        body = dockerfile.split(f"AS {stage}\n")[1].split("\nFROM ")[0]
        assert "USER espalier" in body
        assert "HEALTHCHECK" in body
