"""The list of jobs and the page of one job, from the documents of the API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from app.web.html import Html, element, join

Document = Mapping[str, Any]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ASSETS = {"page.css": "text/css", "page.js": "text/javascript"}
ASSET_FOLDER = Path(__file__).parent / "assets"
STATES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
MOST_LAYERS_NAMED = 3
BUSY = frozenset({"queued", "running", "cancelling"})
EVENT_TYPES = (
    "job.submitted",
    "job.claimed",
    "job.resumed_from_checkpoint",
    "phase.started",
    "epoch.finished",
    "training.stopped_early",
    "prune.planned",
    "prune.applied",
    "retraining.rate_chosen",
    "quantize.applied",
    "sensitivity.measured",
    "checkpoint.saved",
    "checkpoint.corrupt",
    "warning",
    "worker.lost",
    "job.released",
    "job.stopping",
    "job.paused",
    "job.resumed",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
)
MEASURES = (
    ("accuracy", "accuracy"),
    ("loss", "loss"),
    ("parameters", "params"),
    ("parameters that are not zero", "nonzero_params"),
    ("MACs", "macs"),
    ("bytes", "bytes"),
)


def frame(title: str, children: Iterable[object], *, busy: bool = False) -> str:
    """A whole page."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} · Espalier"),
        element("link", rel="stylesheet", href="/assets/page.css"),
        element("script", src="/assets/page.js", defer=""),
    )
    header = element(
        "header",
        element("a", element("strong", "Espalier"), href="/"),
        element("a", "jobs", href="/"),
        element("a", "API", href="/docs"),
    )
    main = element("main", *children, data_busy="yes" if busy else "no")
    return "<!doctype html>\n" + element("html", head, element("body", header, main), lang="en")


def jobs_page(jobs: Sequence[Document], next_cursor: str | None, state: str | None) -> str:
    """The newest jobs, or those in one state."""
    filters = [element("a", "all", href="/", aria_current="page" if state is None else None)]
    filters += [
        element("a", name, href=f"/?state={name}", aria_current="page" if state == name else None) for name in STATES
    ]
    titles = ("job", "state", "progress", "accuracy", "MACs kept", "submitted")
    table = element(
        "table", element("tr", *(element("th", title) for title in titles)), *(_job_row(job) for job in jobs)
    )
    more = None
    if next_cursor is not None:
        query = {"cursor": next_cursor} | ({"state": state} if state else {})
        more = element("p", element("a", "older jobs", href=f"/?{urlencode(query)}"))
    nothing = None if jobs else element("p", "No jobs here. POST one to /v1/jobs.", class_="soft")
    live = element("div", table, nothing, more, id="live")
    navigation = element("nav", *(join([link, " "]) for link in filters))
    return frame("Jobs", [element("h1", "Jobs"), navigation, live], busy=True)


def job_page(job: Document, report: Document | None, artifacts: Sequence[Document], events: Sequence[Document]) -> str:
    """One job: state and progress or error first, then the verdict, the tables, the files, the events."""
    table = (report or {}).get("sensitivity")
    live = element(
        "div",
        element("p", _state(job), " ", _progress(job)),
        _waiting(job),
        _error(job),
        *([_verdict(job), _comparison(job), _classes(report)] if table is None else [_sensitivity(table)]),
        _notes(report),
        _downloads(job, artifacts, report),
        id="live",
    )
    listed = element(
        "ol",
        *(element("li", element("span", _clock(event["at"]), class_="soft"), event["message"]) for event in events),
        class_="events",
        data_events=f"/jobs/{job['id']}/events",
        data_last=events[-1]["seq"] if events else 0,
        data_types=" ".join(EVENT_TYPES),
    )
    log = element("a", "log of the trainer", href=f"/jobs/{job['id']}/logs")
    children = [element("h1", job["name"] or job["id"]), live, element("h2", "Events"), listed, element("p", log)]
    return frame(job["name"] or job["id"], children, busy=job["state"] in BUSY)


def _job_row(job: Document) -> Html:
    baseline, final = _measures(job)
    accuracy = f"{_percent(baseline.get('accuracy'))} → {_percent(final.get('accuracy'))}" if final else ""
    return element(
        "tr",
        element("td", element("a", job["name"] or job["id"], href=f"/jobs/{job['id']}")),
        element("td", _state(job)),
        element("td", _progress(job)),
        element("td", accuracy),
        element("td", _kept(baseline.get("macs"), final.get("macs")) if final else ""),
        element("td", job["created_at"][:16].replace("T", " "), class_="soft"),
    )


def _state(job: Document) -> Html:
    return element("span", job["state"], class_=f"state {job['state']}")


def _progress(job: Document) -> Html | None:
    progress = job["progress"]
    if job["state"] not in BUSY and job["state"] != "paused":
        return None
    words = [progress["phase"]]
    if progress["epochs"]:
        words.append(f"epoch {progress['epoch']} of {progress['epochs']}")
    if progress["images_per_s"]:
        words.append(f"{progress['images_per_s']:,.0f} images/s")
    if progress["eta_s"] is not None:
        words.append(f"{_duration(progress['eta_s'])} left")
    return join([element("progress", value=progress["fraction"], max=1), " " + ", ".join(words)])


def _waiting(job: Document) -> Html | None:
    queue = job.get("queue")
    if queue is None:
        return None
    reasons = {
        "no_worker": "no worker is alive: start one",
        "all_busy": "every worker is busy",
        "backing_off": "it waits a little after a crash",
        "starting": "a worker takes it in a moment",
    }
    return element("p", f"Number {queue['position']} in the queue: {reasons.get(queue['reason'], queue['reason'])}.")


def _error(job: Document) -> Html | None:
    error = job["error"]
    if error is None:
        return None
    place = [" at ", element("code", error["pointer"])] if error["pointer"] else None
    code = element("a", error["code"], href=f"/docs/errors#{error['code']}")
    return element(
        "div",
        element("p", element("strong", code), place, ": ", error["message"]),
        element("p", error["hint"]),
        class_="problem",
    )


def _verdict(job: Document) -> Html | None:
    baseline, final = _measures(job)
    if not final or final.get("accuracy") is None:
        return None
    words = [f"{_kept(baseline.get('macs'), final.get('macs'))} of the MACs"]
    kept = _kept(baseline.get("nonzero_params"), final.get("nonzero_params"))
    words.append(f"{kept} of the weights that are not zero")
    if baseline.get("accuracy") is not None:
        change = (final["accuracy"] - baseline["accuracy"]) * 100
        words.append(
            f"accuracy {_percent(baseline['accuracy'])} → {_percent(final['accuracy'])} ({change:+.2f} points)"
        )
    early = " It was stopped early." if job["stopped_early"] else ""
    return element("p", element("strong", ", ".join(words) + "."), early)


def _comparison(job: Document) -> Html | None:
    baseline, final = _measures(job)
    if not final:
        return None
    int8 = (job["summary"] or {}).get("int8") or {}
    compared: list[tuple[str, Any, Any, Any]] = [
        (title, baseline.get(name), final.get(name), int8.get(name)) for title, name in MEASURES
    ]
    for runtime, batches in (final.get("latency_ms") or {}).items():
        dense, eight = ((one.get("latency_ms") or {}).get(runtime) or {} for one in (baseline, int8))
        for batch, times in (batches or {}).items():
            before, eight_bits = ((one.get(batch) or {}).get("p50") for one in (dense, eight))
            title = f"{runtime}, {batch.replace('_', ' ')}, p50 ms"
            compared.append((title, before, times.get("p50"), eight_bits))
    titles = ("", "dense", "pruned", "kept", "8 bits") if int8 else ("", "dense", "pruned", "kept")
    rows = [_compared(*row)[: len(titles)] for row in compared]
    head = element("tr", *(element("th", title) for title in titles))
    body = [
        element("tr", element("td", row[0]), *(element("td", value, class_="number") for value in row[1:]))
        for row in rows
    ]
    return join([element("h2", "Dense against pruned"), element("table", head, *body)])


def _compared(title: str, before: float | None, after: float | None, int8: float | None) -> tuple[str, ...]:
    """The cells of one measure: title, dense, pruned, the part kept, 8 bits."""
    kept = _kept(before, after) if title not in ("accuracy", "loss") else ""
    return title, _number(before), _number(after), kept, _number(int8)


def _sensitivity(table: Document) -> Html:
    """The accuracy when one group of channels alone is cut, a row for each group, a column for each part kept."""
    groups, whole = table["groups"], table["whole"]
    parts = [f"{point['kept'] * 100:.4g} % kept" for point in groups[0]["points"]] if groups else []
    titles = ("layers that lose channels together", "channels", *parts)
    head = element("tr", *(element("th", title) for title in titles))
    body = [
        element(
            "tr",
            element("td", _named(row["layers"]), title=", ".join(row["layers"])),
            element("td", row["channels"], class_="number"),
            *(
                element("td", _percent(one["after_recalibration"]), title=_cut(one), class_="number")
                for one in row["points"]
            ),
        )
        for row in groups
    ]
    images = f"{table['examples']:,} {table.get('measured_on', 'test')} images"  # of test before a table said so
    words = (
        f"Accuracy on {images} when one group alone is cut, the weakest channels by {table['criterion']} first, "
        "batch norm recalibrated, nothing retrained. Uncut: "
    )
    left = ", ".join(f"{row['name']} ({row['reason']})" for row in whole)
    return join(
        [
            element("h2", "Sensitivity"),
            element("p", words, element("strong", _percent(table["accuracy"])), "."),
            element("table", head, *body),
            element("p", f"Not cut: {left}.", class_="soft") if whole else None,
        ]
    )


def _named(layers: Sequence[str]) -> str:
    """Names of layers, at most three, and how many more there are."""
    more = f" and {len(layers) - MOST_LAYERS_NAMED} more" if len(layers) > MOST_LAYERS_NAMED else ""
    return ", ".join(layers[:MOST_LAYERS_NAMED]) + more


def _cut(point: Document) -> str:
    cut = _percent(point["after_cut"])
    return f"{point['channels']} channels left, {point['macs']:,} MACs; {cut} before batch norm was recalibrated"


def _classes(report: Document | None) -> Html | None:
    rows = (report or {}).get("classes") or []
    if not rows:
        return None
    worst = sorted(rows, key=lambda row: row.get("change") or 0)[:20]
    head = element("tr", *(element("th", title) for title in ("class, worst first", "dense", "pruned", "test images")))
    body = [
        element(
            "tr",
            element("td", row["name"]),
            element("td", _percent(row["baseline_accuracy"]), class_="number"),
            element("td", _percent(row["final_accuracy"]), class_="number"),
            element("td", row["examples"], class_="number"),
        )
        for row in worst
    ]
    return join([element("h2", "Classes"), element("table", head, *body)])


def _notes(report: Document | None) -> Html | None:
    notes = (report or {}).get("notes") or []
    if not notes:
        return None
    return join([element("h2", "Notes"), element("ul", *(element("li", note) for note in notes))])


def _downloads(job: Document, artifacts: Sequence[Document], report: Document | None) -> Html | None:
    if not artifacts:
        return None
    proofs = (report or {}).get("verification") or {}
    titles = ("file", "bytes", "verified: largest difference", "sha256")
    head = element("tr", *(element("th", title) for title in titles))
    rows = [
        element(
            "tr",
            element("td", element("a", file["name"], href=f"/jobs/{job['id']}/artifacts/{file['name']}")),
            element("td", f"{file['size_bytes']:,}", class_="number"),
            element("td", _number((proofs.get(file["name"]) or {}).get("max_abs_difference"))),
            element("td", file["sha256"], class_="sha"),
        )
        for file in artifacts
    ]
    return join([element("h2", "Downloads"), element("table", head, *rows)])


def _measures(job: Document) -> tuple[Document, Document]:
    summary = job["summary"] or {}
    return summary.get("baseline") or {}, summary.get("final") or {}


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value * 100:.2f} %"


def _kept(before: float | None, after: float | None) -> str:
    return f"{after / before * 100:.0f} %" if before and after is not None else "?"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _clock(at: str) -> str:
    return at[11:19] + " "
