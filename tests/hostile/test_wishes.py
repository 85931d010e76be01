"""Impossible wishes are refused at the door, with place, reason and advice; odd ones that can be met are accepted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support.jobs.finished import network_files
from tests.support.jobs.tiny import SHAPE, tiny_layers
from tests.support.jobs.wishes import ACCEPTED, REFUSED, described
from tests.support.services.api import Api, open_api

RAW = ("should", "Value error", "Traceback", "None", "<class", "  ")  # words of a library, not ours


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.fixture(scope="module")
def ids(api: Api) -> dict[str, str]:
    """Real ids of what the wishes refer to."""
    found = {"@queued": "", "@cancelled": ""}
    for name, classes in (("@three", 3), ("@ten", 10)):
        layers = [*tiny_layers()[:-1], {"type": "linear", "out_features": classes}]
        names = tuple(f"class {number}" for number in range(classes))
        files = {}
        for stem in ("pruned", "baseline"):
            files |= network_files(layers, SHAPE, names, stem=stem)
        found[name] = api.submit()["id"]
        api.deliver(api.claim(found[name]), files)
        if classes == 3:
            answer = api.client.post("/v1/weights", content=files["pruned.safetensors"])
            found["@weights"] = answer.json()["id"]
    found["@queued"], found["@cancelled"] = api.submit()["id"], api.submit()["id"]
    api.client.post(f"/v1/jobs/{found['@cancelled']}/cancel")
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_wish_is_refused_where_it_stands_with_reason_and_advice(api, ids, name):
    parts, pointer, words = REFUSED[name]
    document = described(parts, ids)
    tried, sent = (api.client.post(path, json=document) for path in ("/v1/jobs/validate", "/v1/jobs"))
    assert (tried.status_code, sent.status_code, sent.json()["code"]) == (422, 422, "invalid_spec")
    assert tried.json()["errors"] == sent.json()["errors"]
    fault = sent.json()["errors"][0]
    assert fault["pointer"] == pointer
    assert words in fault["message"]
    assert not [raw for raw in RAW if raw in fault["message"]]


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_wish_is_accepted_and_what_is_accepted_says_the_same_again(api, ids, name):
    parts, warned = ACCEPTED[name]
    document = described(parts, ids)
    tried, sent = (api.client.post(path, json=document) for path in ("/v1/jobs/validate", "/v1/jobs"))
    assert (tried.status_code, sent.status_code) == (200, 201), sent.text
    assert tuple(dict.fromkeys(warning["pointer"] for warning in tried.json()["warnings"])) == warned
    again = api.client.post("/v1/jobs/validate", json=sent.json()["spec"])
    assert again.json() == tried.json()
    json.dumps(tried.json(), allow_nan=False)
