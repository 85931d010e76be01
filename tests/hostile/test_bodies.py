"""Bodies that attackers and mistakes send to a submit: the right refusal at the right place, never a server error."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.support.services.api import SPEC, Api, error_pointers, open_api

JSON_TYPE = {"Content-Type": "application/json"}
LAYERS: dict[str, Any] = {
    "input_shape": [1, 28, 28],
    "layers": [
        {"type": "conv", "name": "first", "out_channels": 8, "kernel_size": 3},
        {"type": "relu", "name": "bend"},
        {"type": "flatten"},
        {"type": "linear", "out_features": 10},
    ],
}
FULL: dict[str, Any] = {
    "spec_version": 1,
    "name": "full",
    "labels": {"team": "vision"},
    "data": {"synthetic": {"classes": 10, "train": 64, "test": 32, "seed": 0}, "validation": 0.1},
    "model": LAYERS,
    "training": {
        "epochs": 2,
        "batch_size": 16,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        "schedule": {"name": "one_cycle", "warmup": 1},
        "augmentation": ["random_crop"],
        "label_smoothing": 0.1,
        "seed": 1,
    },
    "optimizations": [
        {"type": "dropout", "p": 0.3},
        {"type": "regularization", "l1": 1e-5},
        {
            "type": "prune",
            "sparsity": 0.5,
            "schedule": {"name": "iterative", "steps": 2},
            "retrain": {"epochs": 1, "policy": "lr_rewind"},
        },
    ],
    "exports": ["safetensors"],
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("home")) as api:
        yield api


def _post(api: Api, body: bytes, path: str = "/v1/jobs") -> httpx2.Response:
    return api.client.post(path, content=body, headers=JSON_TYPE)


def _with(place: str, value: Any, base: dict[str, Any] = FULL) -> dict[str, Any]:
    """The full spec with `value` at the JSON pointer `place`."""
    changed = copy.deepcopy(base)
    *path, last = place.split("/")[1:]
    here: Any = changed
    for part in path:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    if isinstance(here, list):
        here[int(last)] = value
    else:
        here[last] = value
    return changed


def _dumped(text: str) -> bytes:
    """A spec with `text`, which `json.dumps` would not write, as its name."""
    return json.dumps(SPEC | {"name": "@"}).replace('"@"', text).encode("utf-8", "surrogatepass")


def test_the_full_spec_of_these_tests_is_valid(api):
    assert _post(api, json.dumps(FULL).encode(), "/v1/jobs/validate").status_code == 200


NOT_JSON = {
    "empty": b"",
    "blank": b"  \n",
    "truncated": b'{"spec_version": 1',
    "trailing text": b"{} x",
    "trailing comma": b'{"a": 1,}',
    "comment": b"{} // x",
    "single quotes": b"{'a': 1}",
    "two documents": b"{}{}",
    "invalid utf-8": b'{"name": "\xff"}',
    "overlong utf-8": b'{"name": "\xc0\xaf"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "utf-16 without mark": '{"a": 1}'.encode("utf-16-le"),
    "utf-32": '{"a": 1}'.encode("utf-32"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "1,000 brackets": b"[" * 1000 + b"]" * 1000,
    "100,000 brackets": b"[" * 100_000,
    "100,000 braces": b'{"a":' * 100_000,
    "NaN": _dumped("NaN"),
    "Infinity": _dumped("Infinity"),
    "-Infinity": _dumped("-Infinity"),
    "5,000 digits": _dumped("9" * 5000),
    "lone high surrogate": _dumped(r'"\ud800"'),
    "lone low surrogate": _dumped(r'"\udc00"'),
    "reversed surrogates": _dumped(r'"\udc00\ud800"'),
    "raw surrogate": _dumped('"\ud800"'),
    "raw NUL": _dumped('"a\0b"'),
    "raw line feed": _dumped('"a\nb"'),
    "bare word": b"null!",
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_document_is_400_invalid_json(api, body):
    answer = _post(api, body)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"1", b"true", b"1.5"])
def test_a_document_that_is_no_object_is_refused_as_a_whole(api, body):
    answer = _post(api, body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")
    assert error_pointers(answer.json()) == [""]


@pytest.mark.parametrize("depth", [65, 200])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_more_than_64_levels_are_refused_with_the_limit(api, depth, opening, closing):
    answer = _post(api, opening * depth + b"1" + closing * depth)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")
    assert answer.json()["errors"][0]["limit"] == 64


@pytest.mark.parametrize(
    "body", [b'{"a": 1, "a": 2}', b'{"data": {"x": 1, "x": 1}}', b'[[{"a": 1, "\\u0061": 2}]]', b'{"": 1, "": 2}']
)
def test_a_key_that_stands_twice_is_refused(api, body):
    answer = _post(api, body)
    assert (answer.status_code, answer.json()["code"]) == (422, "duplicate_key")


@pytest.mark.parametrize("name", ["surprise", "__proto__", "$ref", "constructor", "Name"])
@pytest.mark.parametrize(
    "place",
    [
        "",
        "/data",
        "/data/synthetic",
        "/model",
        "/model/layers/0",
        "/training",
        "/training/optimizer",
        "/training/schedule",
        "/optimizations/0",
        "/optimizations/2",
        "/optimizations/2/retrain",
    ],
)
def test_an_unknown_field_is_refused_at_every_level(api, place, name):
    answer = _post(api, json.dumps(_with(f"{place}/{name}", 1)).encode(), "/v1/jobs/validate")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")
    assert f"{place}/{name}" in error_pointers(answer.json())


@pytest.mark.parametrize(
    "document",
    [
        {f"k{n}": 0 for n in range(90_000)},
        SPEC | {"labels": {str(n): "" for n in range(90_000)}},
        SPEC | {"optimizations": [0] * 300_000},
        SPEC | {"exports": [[]] * 300_000},
        SPEC | {"optimizations": [{"type": "dropout"}] * 40_000},
    ],
    ids=["keys", "labels", "numbers", "lists", "objects"],
)
def test_a_crowd_within_the_size_limit_is_refused_fast_with_at_most_100_errors(api, document):
    body = json.dumps(document, separators=(",", ":")).encode()
    assert len(body) < 1 << 20
    started = time.monotonic()
    answer = _post(api, body)
    assert answer.status_code == 422
    assert 1 <= len(answer.json()["errors"]) <= 100
    assert time.monotonic() - started < 15  # 1 s on an idle machine


def test_a_body_one_byte_over_the_limit_is_413_and_one_at_it_is_read(api):
    limit = api.context.settings.max_spec_bytes
    body = json.dumps(SPEC).encode()
    assert _post(api, body + b" " * (limit - len(body)), "/v1/jobs/validate").status_code == 200
    over = body + b" " * (limit - len(body) + 1)
    assert _post(api, over).json()["code"] == "too_large"
    chunked = api.client.post("/v1/jobs", content=iter([over[:1000], over[1000:]]), headers=JSON_TYPE)
    assert (chunked.status_code, chunked.json()["code"]) == (413, "too_large")


def _places(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    yield place, value
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _places(member, f"{place}/{key}")
    elif isinstance(value, list):
        for number, member in enumerate(value):
            yield from _places(member, f"{place}/{number}")


@pytest.mark.parametrize("wrong", [None, [[[]]], {"x": {}}, "x\u0000", -1, 10**30, 1e308, True])
def test_a_value_of_another_kind_at_any_place_is_refused_there_and_never_a_server_error(api, wrong):
    for place, value in _places(FULL):
        if not place:
            continue
        answer = _post(api, json.dumps(_with(place, wrong)).encode(), "/v1/jobs/validate")
        assert answer.status_code in (200, 422), (place, answer.text)
        if answer.status_code == 422:
            near = [pointer for pointer in error_pointers(answer.json()) if _related(place, pointer)]
            assert near, (place, wrong, answer.json())
        else:  # null is a default, true a flag: the rest fits nowhere in this spec but in a label or a name
            assert wrong is None or type(wrong) is type(value) or place == "/name", (place, wrong)


def _related(place: str, pointer: str) -> bool:
    return pointer.startswith(place) or place.startswith(pointer)


@pytest.mark.parametrize("place", [place for place, _ in _places(FULL) if place.count("/") <= 3 and place])
def test_a_missing_part_is_a_default_or_a_refusal(api, place):
    changed = copy.deepcopy(FULL)
    *path, last = place.split("/")[1:]
    here: Any = changed
    for part in path:
        here = here[int(part)] if isinstance(here, list) else here[part]
    del here[int(last) if isinstance(here, list) else last]
    answer = _post(api, json.dumps(changed).encode(), "/v1/jobs/validate")
    assert answer.status_code in (200, 422)
    if place in ("/spec_version", "/data", "/model"):
        assert place in error_pointers(answer.json())


def test_a_key_of_half_a_megabyte_comes_back_cut(api):
    answer = _post(api, json.dumps(SPEC | {"k" * 500_000: 1}).encode())
    assert answer.status_code == 422
    assert len(answer.content) < 2000


def test_slashes_and_tildes_in_keys_are_escaped_in_pointers(api):
    answer = _post(api, json.dumps(SPEC | {"a/b~c": 1}).encode())
    assert error_pointers(answer.json()) == ["/a~1b~0c"]


INTEGERS = ["/training/epochs", "/training/batch_size", "/training/seed", "/data/synthetic/train", "/spec_version"]
INTEGERS += [
    "/model/layers/0/out_channels",
    "/model/layers/0/kernel_size",
    "/optimizations/2/schedule/steps",
    "/data/limit",
]


@pytest.mark.parametrize("place", INTEGERS)
def test_an_integer_is_an_integer_of_sane_size(api, place):
    for wrong in (2**31, 2**53 + 1, 2**63, 2**64, 10**30, -1, True, "5", 5.0, 5.5, "5e0"):
        answer = _post(api, json.dumps(_with(place, wrong)).encode(), "/v1/jobs/validate")
        assert answer.status_code == 422, (place, wrong)
        assert any(pointer.startswith(place) for pointer in error_pointers(answer.json())), (
            place,
            wrong,
            answer.json(),
        )


@pytest.mark.parametrize("place", INTEGERS)
@pytest.mark.parametrize("text", ["1e999", "-1e999", "9" * 4299, "1e3", "1.0"])
def test_numbers_that_json_dumps_would_not_write_are_refused_at_their_place(api, place, text):
    body = json.dumps(_with(place, "@")).replace('"@"', text).encode()
    answer = _post(api, body, "/v1/jobs/validate")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")
    assert any(pointer.startswith(place) for pointer in error_pointers(answer.json()))


@pytest.mark.parametrize("place", ["/training/optimizer/lr", "/training/label_smoothing", "/optimizations/2/sparsity"])
def test_infinity_by_overflow_is_refused_and_underflow_is_zero(api, place):
    over = _post(api, json.dumps(_with(place, "@")).replace('"@"', "1e999").encode(), "/v1/jobs/validate")
    assert (over.status_code, error_pointers(over.json())) == (422, [place])
    under = _post(api, json.dumps(_with(place, "@")).replace('"@"', "1e-999").encode(), "/v1/jobs/validate")
    assert under.status_code == (200 if place.endswith("label_smoothing") else 422)


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("/training/optimizer/lr", [0, -0.1, 1e308, 5e-324]),
        ("/training/optimizer/momentum", [1.0, -0.1, 1.5]),
        ("/optimizations/2/sparsity", [0, 1, 1.0000001, -0.1]),
        ("/optimizations/0/p", [0, 1, 1.0000001, -0.1]),
        ("/data/validation", [1, -0.1, 1.0000001]),
        ("/training/label_smoothing", [1, -0.1, 2]),
    ],
)
def test_a_number_outside_its_interval_is_refused_with_its_limit(api, place, values):
    for value in values:
        answer = _post(api, json.dumps(_with(place, value)).encode(), "/v1/jobs/validate")
        fault = answer.json()["errors"][0]
        assert (answer.status_code, fault["pointer"]) == (422, place), (value, answer.json())
        assert "limit" in fault


INVISIBLE = {
    "NUL": "\0",
    "C0": "\x1f",
    "DEL": "\x7f",
    "C1": "\x85",
    "CR LF": "\r\n",
    "bidi override": "\u202e",
    "isolate": "\u2066",
    "zero width": "\u200b",
    "line separator": "\u2028",
    "byte order mark": "\ufeff",
}


@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE)
@pytest.mark.parametrize("place", ["/name", "/labels/team", "/model/layers/0/name", "/data/dataset"])
def test_an_invisible_character_is_refused_where_people_read(api, place, text):
    answer = _post(api, json.dumps(_with(place, f"a{text}b")).encode())
    assert answer.status_code == 422
    assert place in error_pointers(answer.json())


@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE)
def test_an_invisible_character_in_a_label_key_is_refused(api, text):
    answer = _post(api, json.dumps(SPEC | {"labels": {f"a{text}b": "c"}}).encode())
    assert answer.status_code == 422
    assert error_pointers(answer.json())[0].startswith("/labels")


def test_a_name_has_at_most_200_characters(api):
    assert _post(api, json.dumps(SPEC | {"name": "n" * 200}).encode(), "/v1/jobs/validate").status_code == 200
    over = _post(api, json.dumps(SPEC | {"name": "n" * 201}).encode())
    assert (over.status_code, error_pointers(over.json())) == (422, ["/name"])
    assert over.json()["errors"][0]["limit"] == 200
    assert _post(api, json.dumps(SPEC | {"name": "n" * (10 << 20)}).encode()).status_code == 413


def test_layer_names_that_look_equal_are_not_two_names(api):
    layers = copy.deepcopy(LAYERS)
    layers["layers"][0]["name"] = "caf\u00e9"
    layers["layers"][1]["name"] = "cafe\u0301"
    answer = _post(api, json.dumps(_with("/model", layers)).encode())
    assert answer.status_code == 422
    assert any(pointer.startswith("/model/layers") for pointer in error_pointers(answer.json()))


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "{{7*7}} ${7*7} %s %n {0.__class__}",
        "'; DROP TABLE jobs; --",
        "$(rm -rf /) `id` | cat",
        "../../etc/passwd",
        "Ünïcødé 模型 🌳",
    ],
)
def test_a_strange_name_is_only_a_name_and_comes_back_unchanged(api, name):
    job = _post(api, json.dumps(SPEC | {"name": name, "labels": {"k": name}}).encode())
    assert job.status_code == 201
    shown = api.client.get(job.headers["location"]).json()
    assert (shown["name"], shown["labels"]) == (name, {"k": name})
    for page in ("/", f"/jobs/{shown['id']}"):
        html = api.client.get(page).text
        assert "<script>alert" not in html
        assert "7*7" not in name or "{{7*7}}" in html


@pytest.mark.parametrize("name", ["../x", "class", "__init__", "weight", "a.b", "a/b", "a b", "1a", ""])
def test_a_layer_name_becomes_an_identifier_so_it_must_be_one(api, name):
    answer = _post(api, json.dumps(_with("/model/layers/0/name", name)).encode())
    assert answer.status_code == 422
    assert "/model/layers/0/name" in error_pointers(answer.json())


@pytest.mark.parametrize("labels", [{str(n): "v" for n in range(65)}, {"": "v"}, {"a:b": "v"}, {"a": 1}, {"a": None}])
def test_labels_are_at_most_64_short_texts_without_colons_in_keys(api, labels):
    answer = _post(api, json.dumps(SPEC | {"labels": labels}).encode())
    assert answer.status_code == 422
    assert error_pointers(answer.json())[0].startswith("/labels")


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.0, True])
def test_an_unknown_spec_version_names_the_known_ones(api, version):
    answer = _post(api, json.dumps(SPEC | {"spec_version": version}).encode())
    fault = answer.json()["errors"][0]
    assert (answer.status_code, fault["pointer"]) == (422, "/spec_version")
    assert "1" in fault["message"]
