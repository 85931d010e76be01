"""Jobs put together at random from every field of the language: a plan or faults, never anything else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import pytest

from app.errors import Fault, InvalidSpec
from app.planning.plan import make_plan, plan_answer
from app.spec.data import Synthetic, synthetic_facts
from app.spec.job import parse_job
from app.spec.optimizations import OPTIMIZATIONS
from app.spec.prune import Criterion
from app.spec.quantize import Quantize
from app.spec.references import Source
from tests.support.jobs.sources import source_of
from tests.support.jobs.tiny import SHAPE, SYNTHETIC, tiny_layers
from tests.support.jobs.wishes import (
    JOB,
    ONLY_LINEAR,
    ONLY_NORM,
    SHARED,
    TRANSPOSED,
    WEIGHTLESS,
    WEIGHTS,
    WIDE,
    described,
)
from tests.support.networks.topologies import TOPOLOGIES

SEEDS = range(8)
EACH = 250
NAMES = ("conv1", "conv2", "linear1", "relu1", "batch_norm1", "b", "c", "residual1_conv1", "conv1_core", "nope")
IDS = {"@three": "three", "@ten": "ten", "@weights": "weights"}
CLASSES = tuple(f"class {number}" for number in range(10))
NETWORKS: tuple[dict[str, Any], ...] = (
    *({"model": {"input_shape": list(shape), "layers": layers}} for shape, layers in TOPOLOGIES.values()),
    *(SHARED, WIDE, ONLY_LINEAR, TRANSPOSED, WEIGHTLESS, ONLY_NORM, JOB, {"model": WEIGHTS}, {}),
    *({"model": {"job": "@ten", "head": head}} for head in ("auto", "keep", "new")),
)
BUDGETS = ({"macs": 0.5}, {"macs": 1}, {"params": 0.3}, {"params": 200}, {"bytes": 0.7}, {"latency_ms": 0.5})
BUDGETS += ({"latency_ms": 0.3, "absolute": True}, {"macs": 1e-9}, {})
SCHEDULES = ({"name": "one_shot"}, {"name": "iterative", "steps": 3}, {"name": "cubic"}, {"name": "cubic", "epochs": 1})
POLICIES = ("auto", "lr_rewind", "fine_tune", "weight_rewind", "none")
CRITERIA = get_args(Criterion)
SCHEMES = get_args(Quantize.model_fields["scheme"].annotation)
OPTIMIZATION_TYPES = tuple(part.model_fields["type"].default for part in OPTIMIZATIONS)

Values = Sequence[Any] | Callable[[random.Random], Any]


def drawn(draw: random.Random, fields: Mapping[str, tuple[float, Values]]) -> dict[str, Any]:
    """Some of the fields: each with its probability, with one of its values."""
    found: dict[str, Any] = {}
    for name, (probability, values) in fields.items():
        if draw.random() < probability:
            found[name] = values(draw) if callable(values) else draw.choice(values)
    return found


def some(draw: random.Random) -> list[str]:
    return draw.sample(NAMES[:4] if draw.random() < 0.8 else NAMES, draw.randint(0, 3))


def override(draw: random.Random) -> dict[str, Any]:
    fields: dict[str, tuple[float, Values]] = {"sparsity": (0.5, (0, 0.5, 0.95)), "threshold": (0.1, (0, 0.1))}
    fields |= {"max_sparsity": (0.3, (0, 0.5)), "min_channels": (0.3, (1, 99)), "round_to": (0.3, (1, 3))}
    return drawn(draw, fields | {"pattern": (0.1, ("2:4", "1:3"))})


def retrain(draw: random.Random) -> dict[str, Any]:
    lessons = ({}, {"teacher": "@three"}, {"teacher": "@ten"}, {"artifact": "pruned"})
    return drawn(draw, {"policy": (0.4, POLICIES), "epochs": (0.3, (0, 1, 2)), "distillation": (0.2, lessons)})


def prune(draw: random.Random) -> dict[str, Any]:
    amounts: tuple[dict[str, tuple[float, Values]], ...] = (
        {"budget": (1, BUDGETS)},
        {"sparsity": (1, (0.5, 0.99, 1e-9))},
        {"pattern": (1, ("2:4", "1:2", "7:8"))},
        {"block": (1, ([2, 2], [3, 5])), "sparsity": (1, (0.5,))},
        {"threshold": (1, (0.1,))},
    )
    fields = draw.choices(amounts, (5, 5, 2, 2, 1))[0] | {
        "structure": (0.2, ("weights", "channels", "n:m", "blocks")),
        "criterion": (0.3, CRITERIA),
        "scope": (0.3, ("global", "layer", "sensitivity", "learned")),
        "schedule": (0.2, SCHEDULES),
        "retrain": (0.4, retrain),
        "exclude": (0.2, some),
        "overrides": (0.2, lambda draw: {name: override(draw) for name in some(draw)}),
        "round_to": (0.5, (1, 1, 3, 16, 1024, None)),
        "min_channels": (0.1, (1, 99)),
        "max_sparsity": (0.2, (0.1, 0.999)),
    }
    return {"type": "prune", **drawn(draw, fields)}


FIELDS_OF: dict[str, dict[str, tuple[float, Values]]] = {
    "low_rank": {"rank": (0.4, (1, 4, 999)), "energy": (0.3, (0.5,)), "budget": (0.3, BUDGETS)},
    "separable": {"exclude": (0.3, some)},
    "quantize": {"exclude": (0.3, some), "scheme": (0.3, SCHEMES)},
    "distill": {"teacher": (0.9, ("@three", "@ten"))},
    "regularization": {"group_lasso": (0.5, (0, 1e-3)), "l1": (0.5, (1e-4,))},
}
"""What is drawn for an optimization; one that is not here is asked for with its defaults."""


def optimization(draw: random.Random) -> dict[str, Any]:
    if draw.random() < 0.6:
        return prune(draw)
    kind = draw.choice([name for name in OPTIMIZATION_TYPES if name != "prune"])
    return {"type": kind, **drawn(draw, FIELDS_OF.get(kind, {}))}


def wish(draw: random.Random) -> dict[str, Any]:
    training: dict[str, tuple[float, Values]] = {"epochs": (0.2, (0, 2)), "frozen": (0.1, some)}
    training |= {"lr_factors": (0.1, lambda draw: dict.fromkeys(some(draw), 0.5)), "batch_size": (0.1, (1, 999))}
    training |= {"schedule": (0.1, ({"name": "step"}, {"name": "cosine", "warmup": 3}))}
    steps = [optimization(draw) for _ in range(draw.choice((0, 1, 1, 2, 2, 3)))]
    parts = draw.choice(NETWORKS) | {"training": drawn(draw, training), "optimizations": steps}
    if draw.random() < 0.15:
        table: dict[str, tuple[float, Values]] = {"kept": (0.5, ([0.5], [1e-6], [0.9999999999]))}
        table |= {"criterion": (0.5, CRITERIA), "round_to": (0.3, (3, 64)), "exclude": (0.3, some)}
        parts |= {"kind": "sensitivity", "sensitivity": drawn(draw, table)}
    return described(parts, IDS)


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    """The networks that random jobs refer to."""
    found = {}
    for name, classes in (("three", 3), ("ten", 10)):
        layers = [*tiny_layers()[:-1], {"type": "linear", "out_features": classes}]
        for artifact in ("pruned", "baseline"):
            found[f"job-{name}-{artifact}"] = source_of(layers, SHAPE, CLASSES[:classes])
    return found | {"weights-weights": Source.of_tensors(found["job-three-pruned"].tensors)}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_put_together_at_random_has_a_plan_or_faults_and_its_plan_says_the_same_again(
    seed: int, sources: dict[str, Source]
) -> None:
    draw = random.Random(seed)
    planned, faults = 0, list[Fault]()
    for _ in range(EACH):
        document = wish(draw)
        shape = tuple(document["model"].get("input_shape", SHAPE))
        facts = synthetic_facts(Synthetic.model_validate(SYNTHETIC), shape)
        try:
            plan = make_plan(parse_job(document), facts, sources=sources)
        except InvalidSpec as refused:
            faults += refused.faults
            continue
        planned += 1
        answer = plan_answer(plan)
        json.dumps(answer, allow_nan=False)
        assert plan_answer(make_plan(parse_job(answer["spec"]), facts, sources=sources)) == answer
    assert all(fault.message and fault.pointer.startswith("/") for fault in faults)
    assert planned > EACH // 20, "nearly all were refused, so nearly nothing was planned"
