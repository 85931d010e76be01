"""The JSON of the pages: every whole job and every single optimization can be planned."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest

from app.datasets.ingest.builtin import BUILTIN
from app.network.architecture import Preprocessing, architecture_document
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.network.presets.registry import preset_layers
from app.planning.plan import make_plan
from app.spec.data import DataFacts, DataSpec, synthetic_facts
from app.spec.job import parse_job
from app.spec.optimizations import OPTIMIZATIONS
from app.spec.prune import Criterion
from app.spec.references import Source, references_in
from tests.support.checkout import ROOT

FENCED = re.compile(r"^```jsonc?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HOST: dict[str, Any] = {
    "spec_version": 1,
    "data": {"synthetic": {}},
    "model": {"preset": "deep_cnn", "input_shape": [3, 32, 32]},
}
EXAMPLES = [
    pytest.param(document, id=f"{name}-{number}")
    for name in ("jobs.md", "networks.md")
    for number, block in enumerate(FENCED.findall((ROOT / "docs" / name).read_text()))
    if {"spec_version", "type"} & (document := json.loads(block)).keys()
]


def source_of(preset: str, shape: tuple[int, ...], classes: int) -> Source:
    """A finished job's network with these names and shapes; what the pages call weights has them too."""
    graph = build_graph(read_layers(preset_layers(preset, shape, classes)), shape, classes=classes)
    known = Preprocessing(1 / 255, (0.5,) * shape[0], (0.5,) * shape[0])
    document = architecture_document(graph, [f"class {number}" for number in range(classes)], known)
    return Source.of_architecture(document, {name: tensor.shape for name, tensor in graph.tensors().items()})


def facts_of(data: DataSpec, shape: tuple[int, ...]) -> DataFacts:
    """What is known of the data that a page names: built in, or synthetic."""
    if data.dataset is not None:
        return BUILTIN[data.dataset].facts
    assert data.synthetic is not None
    return synthetic_facts(data.synthetic, shape)


@pytest.mark.parametrize("document", EXAMPLES)
def test_every_example_of_the_pages_can_be_planned(document: dict[str, Any]) -> None:
    spec = parse_job(document if "spec_version" in document else {**HOST, "optimizations": [document]})
    shape = spec.model.input_shape or (1, 28, 28)  # built-in data sets
    facts = facts_of(spec.data, shape)
    source = source_of(getattr(spec.model, "preset", "deep_cnn"), shape, facts.classes)
    make_plan(spec, facts, sources={reference.key: source for reference in references_in(spec)})


def test_the_pages_have_an_example_of_every_optimization() -> None:
    steps = [step for example in EXAMPLES for step in example.values[0].get("optimizations", [example.values[0]])]
    assert {part.model_fields["type"].default for part in OPTIMIZATIONS} <= {step.get("type") for step in steps}


def test_the_page_of_jobs_names_every_optimization_and_criterion() -> None:
    page = (ROOT / "docs" / "jobs.md").read_text()
    names = {part.model_fields["type"].default for part in OPTIMIZATIONS} | set(get_args(Criterion))
    assert sorted(name for name in names if f"`{name}`" not in page and f'"{name}"' not in page) == []
