"""The web page: what it shows, that nothing in it is markup but ours, that it asks nobody else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from app.jobs import attempts
from app.web.html import Html, element
from app.web.pages import EVENT_TYPES
from tests.support.checkout import ROOT
from tests.support.services.api import SUMMARY, Api, open_api

EVIL = '<script>alert("1")</script>"\'&'


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with open_api(tmp_path_factory.mktemp("home")) as api:
        yield api


class Page(HTMLParser):
    """A parsed page: its elements with attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.text += data

    def found(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such element."""
        return [attributes for name, attributes in self.elements if name == tag]


def _page(api: Api, path: str) -> Page:
    answer = api.client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return Page(answer.text)


def test_the_list_shows_state_progress_and_what_was_gained(api):
    job_id = api.delivered(name="gained")
    running = api.submit(name="still running")["id"]
    api.say(
        api.claim(running),
        progress={"phase": "retraining", "epoch": 2, "epochs": 3, "fraction": 0.5, "images_per_s": 1234.5, "eta_s": 95},
    )
    page = _page(api, "/")
    assert {"href": f"/jobs/{job_id}"} in page.found("a")
    for words in (
        "gained",
        "succeeded",
        "93.00 % → 92.00 %",
        "50 %",
        "retraining, epoch 2 of 3",
        "1,234 images/s",
        "1 min 35 s",
    ):
        assert words in page.text, words
    assert {"value": "0.5", "max": "1"} in page.found("progress")


def test_the_list_can_be_filtered_and_turned(api):
    for number in range(52):
        api.submit(name=f"waiting {number}")
    page = _page(api, "/?state=queued")
    assert page.text.count("waiting ") == 50
    assert [link for link in page.found("a") if link.get("aria-current")] == [
        {"href": "/?state=queued", "aria-current": "page"}
    ]
    older = next(link["href"] for link in page.found("a") if "cursor" in (link["href"] or ""))
    assert older is not None
    assert _page(api, older).text.count("waiting ") == 2


def test_a_job_page_has_the_verdict_the_table_the_files_and_the_events(api):
    job_id = api.delivered(name="whole")
    page = _page(api, f"/jobs/{job_id}")
    for words in (
        "50 % of the MACs",
        "accuracy 93.00 % → 92.00 % (-1.00 points)",
        "torch, batch 1, p50 ms",
        "shoe",
        "pruned.safetensors",
        "1e-07",
        "the job succeeded",
    ):
        assert words in page.text, words
    href = f"/jobs/{job_id}/artifacts/pruned.safetensors"
    assert {"href": href} in page.found("a")
    assert api.client.get(href).content == b"0123456789" * 10
    assert page.found("main") == [{"data-busy": "no"}]
    assert api.client.get(f"/jobs/{job_id}/logs").status_code == 200


def test_an_8_bit_file_has_a_column_of_its_own(api):
    eight = SUMMARY["final"] | {
        "accuracy": 0.915,
        "bytes": 777,
        "latency_ms": {"onnxruntime": {"batch_1": {"p50": 0.2}}},
    }
    torch = {"torch": {"batch_1": {"p50": 1.0}}, "onnxruntime": {"batch_1": {"p50": 0.5}}}
    summary = {name: measures | {"latency_ms": torch} for name, measures in SUMMARY.items()} | {"int8": eight}
    job_id = api.submit(optimizations=[{"type": "quantize"}])["id"]
    api.deliver(api.claim(job_id), summary=summary)
    text = api.client.get(f"/jobs/{job_id}").text
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["", "dense", "pruned", "kept", "8 bits"] in cells
    figures = {row[0]: row[-1] for row in cells if len(row) == 5}
    assert (figures["accuracy"], figures["bytes"]) == ("0.915", "777")
    assert (figures["onnxruntime, batch 1, p50 ms"], figures["torch, batch 1, p50 ms"]) == ("0.2", "")
    assert "8 bits" not in _page(api, f"/jobs/{api.delivered()}").text


def test_a_table_of_sensitivities_has_a_row_for_each_group_and_a_column_for_each_part(api):
    points = [
        {"kept": 0.5, "channels": 4, "macs": 1200, "params": 99, "after_cut": 0.41, "after_recalibration": 0.87},
        {"kept": 0.001, "channels": 1, "macs": 300, "params": 9, "after_cut": 0.11, "after_recalibration": 0.1234},
    ]
    tied = ["conv2", "conv4", EVIL, "conv8", "conv10"]
    table = {
        "criterion": "l2",
        "measured_on": "validation",
        "examples": 10_000,
        "accuracy": 0.93,
        "groups": [{"layers": layers, "channels": 8, "points": points} for layers in (["conv1"], tied)],
        "whole": [{"name": "linear1", "reason": "network output"}],
    }
    job_id = api.submit(kind="sensitivity")["id"]
    api.deliver(api.claim(job_id), report={"sensitivity": table, "notes": ["a note"]})
    page = _page(api, f"/jobs/{job_id}")
    for words in (
        *["Accuracy on 10,000 validation images", "by l2 first", "Uncut: 93.00 %", "Not cut: linear1 (network output)"],
        *["50 % kept", "0.1 % kept", "87.00 %", "12.34 %", f"conv2, conv4, {EVIL} and 2 more", "a note"],
    ):
        assert words in page.text, words
    assert "Dense against pruned" not in page.text
    assert {"class": "number", "title": "4 channels left, 1,200 MACs; 41.00 % before batch norm was recalibrated"} in [
        dict(sorted(cell.items())) for cell in page.found("td")
    ]
    early = api.submit(kind="sensitivity")["id"]
    old = {name: value for name, value in table.items() if name != "measured_on"} | {"groups": [], "whole": []}
    api.deliver(api.claim(early), early=True, report={"sensitivity": old})
    page = _page(api, f"/jobs/{early}")
    assert "Uncut: 93.00 %" in page.text
    assert "Accuracy on 10,000 test images" in page.text  # tables of earlier versions


def test_the_page_of_a_job_follows_every_type_of_event():
    sources = [path for folder in ("app", "worker") for path in (ROOT / folder).rglob("*.py")]
    emitted = {
        kind for path in sources for kind in re.findall(r'(?:NewEvent|\.event)\(\s*"([a-z_.]+)"', path.read_text())
    }
    assert {"job.submitted", "epoch.finished", "sensitivity.measured"} <= emitted
    assert emitted <= set(EVENT_TYPES)


def test_a_failed_job_opens_with_its_error_and_a_link_to_its_code(api):
    job_id = api.submit()["id"]
    error = {"code": "diverged", "message": "the loss is nan", "pointer": "/training/optimizer/lr", "hint": "lower it"}
    attempts.fail(api.db, api.claim(job_id), error)
    page = _page(api, f"/jobs/{job_id}")
    assert {"href": "/docs/errors#diverged"} in page.found("a")
    for words in ("the loss is nan", "/training/optimizer/lr", "lower it"):
        assert words in page.text


def test_a_waiting_job_says_why_it_waits(api):
    assert "no worker is alive" in _page(api, f"/jobs/{api.submit()['id']}").text


def test_no_name_is_markup(api):
    job_id = api.submit(name=EVIL, labels={EVIL.replace(":", ""): EVIL})["id"]
    api.say(api.claim(job_id), ("warning", EVIL), log=EVIL)
    for path in ("/", f"/jobs/{job_id}"):
        page = _page(api, path)
        assert EVIL in page.text
        assert [script.get("src") for script in page.found("script")] == ["/assets/page.js"]


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/jobs", "/docs/errors", "job"])
def test_a_page_loads_nothing_from_elsewhere_and_runs_nothing_inline(api, path):
    path = f"/jobs/{api.submit()['id']}" if path == "job" else path
    answer = api.client.get(path)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
    assert "frame-ancestors 'none'" in policy
    for name, attributes in Page(answer.text).elements:
        for attribute, value in attributes.items():
            assert not attribute.startswith("on"), (name, attribute)
            assert attribute != "style"
            if attribute in ("src", "href"):
                assert value is not None
                assert re.fullmatch(r"/(?!/).*", value), value
        assert name not in ("style", "iframe", "img", "form")


def test_the_script_and_the_style_are_served_with_their_types(api):
    script, style = api.client.get("/assets/page.js"), api.client.get("/assets/page.css")
    assert script.headers["content-type"].startswith("text/javascript")
    assert style.headers["content-type"].startswith("text/css")
    assert "innerHTML" not in script.text, "the script puts text into the page, never markup from events"
    assert "://" not in script.text + style.text


def test_a_busy_page_follows_the_events_of_its_job_from_where_it_stands(api):
    job_id = api.submit()["id"]
    api.say(api.claim(job_id), ("phase.started", "training begins"))
    listed = _page(api, f"/jobs/{job_id}").found("ol")[0]
    assert (listed["data-events"], listed["data-last"]) == (f"/jobs/{job_id}/events", "3")
    assert listed["data-types"] == " ".join(EVENT_TYPES)
    api.client.post(f"/v1/jobs/{job_id}/cancel")
    answer = api.client.head(f"{listed['data-events']}?after=3", headers={"Accept": "text/event-stream"})
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_the_pages_of_unknown_jobs_and_files_are_404(api):
    for path in ("/jobs/x", f"/jobs/job_{'0' * 26}", "/assets/page.html", "/assets/%2e%2e%2fpages.py"):
        assert api.client.get(path).status_code == 404


def test_only_html_is_not_escaped():
    assert element("p", "<b>", Html("<i>"), None, ["&", 3], title='"') == '<p title="&quot;">&lt;b&gt;<i>&amp;3</p>'
