"""Hostile and odd wishes: parts of jobs on tiny networks that a service must refuse with reason, or carry out.

Networks that a wish refers to are called `@three` (a finished job with 3 classes), `@ten` (one with 10), `@weights`,
`@queued` and `@cancelled`; `described` replaces them by real ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.jobs.tiny import SHAPE, tiny_layers, tiny_spec

Parts = dict[str, Any]

HEAD: list[Parts] = [
    {"type": "global_avg_pool"},
    {"type": "flatten"},
    {"type": "linear", "out_features": 3},
]


def conv(channels: int = 8, **more: Any) -> Parts:
    """A convolution that keeps the size."""
    return {"type": "conv", "out_channels": channels, "kernel_size": 3, "padding": "same", **more}


def steps(*optimizations: Parts) -> Parts:
    """A job with these optimizations."""
    return {"optimizations": list(optimizations)}


def prune(**fields: Any) -> Parts:
    """A job with one pruning step."""
    return steps({"type": "prune", **fields})


def cut(**fields: Any) -> Parts:
    """A pruning step without retraining, width by width where it takes channels."""
    return {"type": "prune", "round_to": 1, "retrain": {"policy": "none"}, **fields}


def zeros(**fields: Any) -> Parts:
    """A pruning step that sets weights to zero, without retraining."""
    return {"type": "prune", "retrain": {"policy": "none"}, **fields}


def table(**options: Any) -> Parts:
    """A job of kind sensitivity."""
    return {"kind": "sensitivity", "sensitivity": options}


def network(layers: list[Parts], shape: tuple[int, ...] = SHAPE, **more: Any) -> Parts:
    """A job with this network."""
    return {"model": {"input_shape": list(shape), "layers": layers, **more}}


SHARED = network(
    [
        *[conv(name="a"), {"type": "relu"}, conv(name="b"), {"type": "relu"}],
        *[{"type": "conv", "shares": "b", "name": "c"}, {"type": "relu"}, *HEAD],
    ]
)
WIDE = network(tiny_layers(channels=32))
ONLY_LINEAR = network([{"type": "flatten"}, {"type": "linear", "out_features": 3}])
WEIGHTLESS = network([{"type": "global_avg_pool"}, {"type": "flatten"}], (3, 8, 8))
ONLY_NORM = network([{"type": "batch_norm"}, {"type": "global_avg_pool"}, {"type": "flatten"}], (3, 8, 8))
TRANSPOSED = network(
    [{"type": "conv_transpose", "out_channels": 3, "kernel_size": 3}, {"type": "global_avg_pool"}, {"type": "flatten"}]
)
JOB: Parts = {"model": {"job": "@three"}}
WEIGHTS: Parts = {"input_shape": list(SHAPE), "layers": tiny_layers(), "weights": "@weights"}
UNTRAINED: Parts = {"training": {"epochs": 0}}
ALL = ["conv1", "conv2", "linear1"]
TEACHER: Parts = {"type": "distill", "teacher": "@three"}


def distilled(**distillation: Any) -> Parts:
    """A job whose retraining learns from a teacher as well."""
    return prune(sparsity=0.5, retrain={"epochs": 1, "distillation": distillation})


def described(parts: Parts, ids: Mapping[str, str]) -> Parts:
    """The job of one epoch with these parts, with ids instead of names that begin with @."""
    named: Parts = _named(parts, ids)
    return tiny_spec(**named | {"training": {"epochs": 1} | named.get("training", {})})


def _named(value: Any, ids: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _named(member, ids) for key, member in value.items()}
    if isinstance(value, list):
        return [_named(member, ids) for member in value]
    return ids.get(value, value) if isinstance(value, str) else value


OPT = "/optimizations/0"
REFUSED: dict[str, tuple[Parts, str, str]] = {
    # wish: (parts, pointer, words of the message)
    "options without the kind": ({"sensitivity": {"kept": [0.5]}}, "/sensitivity", '"kind": "sensitivity"'),
    "no such kind": ({"kind": "ablation"}, "/kind", "compress, sensitivity"),
    "no kind": ({"kind": None}, "/kind", "compress, sensitivity"),
    "parts that rise": (table(kept=[0.25, 0.5]), "/sensitivity/kept/1", "0.5 follows 0.25"),
    "all of a group": (table(kept=[1]), "/sensitivity/kept/0", "below 1"),
    "next to nothing of a group": (table(kept=[0.5, 1e-20]), "/sensitivity/kept/1", "at least 1e-06"),
    "less than can be cut": (table(kept=[1e-7]), "/sensitivity/kept/0", "at least 1e-06"),
    "33 parts": (table(kept=[1 - n / 100 for n in range(1, 34)]), "/sensitivity/kept", "at most 32"),
    "a table by shares": (table(criterion="erk"), "/sensitivity/criterion", "must be one of: l1"),
    "no image": (table(images=0), "/sensitivity/images", "at least 1"),
    "blocks wider than layers": (table(round_to=1024), "/sensitivity", "round_to is 1024"),
    "a table of nothing": (table(exclude=ALL), "/sensitivity", "no group of channels may be cut"),
    "a table of one linear layer": ({"kind": "sensitivity", **ONLY_LINEAR}, "/sensitivity", "network output"),
    "a table without a layer": (table(exclude=["conv9"]), "/sensitivity/exclude/0", "did you mean conv"),
    "a table without a place": (table(exclude=["c"]) | SHARED, "/sensitivity/exclude/0", "name b"),
    "a table of compressions": ({"kind": "sensitivity", **prune(sparsity=0.5)}, OPT, "kind compress"),
    "a table of no training": ({"kind": "sensitivity", **UNTRAINED}, "/training/epochs", "model.job"),
    "shares of no budget": (
        prune(structure="channels", scope="sensitivity", sparsity=0.5),
        f"{OPT}/scope",
        "state one",
    ),
    "groups of weights": (prune(scope="sensitivity", sparsity=0.5), f"{OPT}/scope", "structure channels"),
    "gates on weights": (prune(scope="learned", sparsity=0.5), f"{OPT}/scope", "structure channels"),
    "gates of no budget": (
        prune(structure="channels", scope="learned", sparsity=0.5),
        f"{OPT}/scope",
        "learned shares out a budget: state one",
    ),
    "gates of time": (prune(scope="learned", budget={"latency_ms": 0.5}), f"{OPT}/scope", "scope sensitivity"),
    "no time": (prune(budget={"latency_ms": 0}), f"{OPT}/budget/latency_ms", "above 0"),
    "two budgets": (prune(budget={"latency_ms": 0.5, "macs": 0.5}), f"{OPT}/budget", "exactly one of"),
    "no budget": (prune(budget={"absolute": True}), f"{OPT}/budget", "exactly one of"),
    "absolute MACs": (prune(budget={"macs": 0.5, "absolute": True}), f"{OPT}/budget/absolute", "for latency_ms"),
    "time of zeros": (prune(structure="weights", budget={"latency_ms": 0.5}), f"{OPT}/budget", "state sparsity"),
    "time of nothing": (
        prune(budget={"latency_ms": 0.5}, exclude=ALL),
        f"{OPT}/budget/latency_ms",
        "no channel may be removed: conv1 (excluded)",
    ),
    "more than there is": (prune(budget={"macs": 1.5}), f"{OPT}/budget/macs", "fraction kept (0 < f <= 1)"),
    "nothing": (prune(budget={"macs": 0}), f"{OPT}/budget/macs", "above 0"),
    "two MACs": (prune(budget={"macs": 2}), f"{OPT}/budget/macs", "the lowest reachable is"),
    "a denormal number of MACs": (prune(budget={"macs": 1e-320}), f"{OPT}/budget/macs", "the lowest reachable is"),
    "a budget and nothing to take": (prune(budget={"macs": 0.5}, exclude=ALL), f"{OPT}/budget/macs", "excluded"),
    "fewer than all must stay": (prune(budget={"macs": 0.9}, min_channels=99), f"{OPT}/budget/macs", "at least 8 must"),
    "held by overrides": (
        prune(budget={"macs": 0.3}, overrides={"conv1": {"sparsity": 0}, "conv2": {"sparsity": 0}}),
        f"{OPT}/budget/macs",
        "8 of 8 channels stay",
    ),
    "nothing to train": (WEIGHTLESS, "/model", "nothing to train"),
    "channels of no layer": (prune(budget={"macs": 0.5}) | ONLY_NORM, OPT, "no convolution and no linear layer"),
    "time of no layer": (prune(budget={"latency_ms": 0.5}) | ONLY_NORM, OPT, "no convolution and no linear layer"),
    "weights of no layer": (prune(sparsity=0.5) | ONLY_NORM, OPT, "no convolution and no linear layer"),
    "a table of no layer": ({"kind": "sensitivity", **ONLY_NORM}, "/sensitivity", "no convolution and no linear layer"),
    "ranks of no layer": (steps({"type": "low_rank", "rank": 2}) | ONLY_NORM, OPT, "none has weights"),
    "one linear layer": (prune(budget={"params": 0.5}) | ONLY_LINEAR, f"{OPT}/budget/params", "network output"),
    "shares for channels": (prune(budget={"macs": 0.5}, criterion="erk"), f"{OPT}/criterion", "structure channels"),
    "gradients of weights": (prune(sparsity=0.5, criterion="taylor"), f"{OPT}/criterion", "structure weights"),
    "lamp inside a layer": (prune(sparsity=0.5, criterion="lamp", scope="layer"), f"{OPT}/scope", "it is l2"),
    "shares over all": (prune(sparsity=0.5, criterion="erk", scope="global"), f"{OPT}/scope", "scope layer"),
    "a threshold by luck": (prune(threshold=0.1, criterion="random"), f"{OPT}/criterion", "l1 or l2"),
    "a pattern and more": (prune(pattern="2:4", sparsity=0.5), f"{OPT}/sparsity", "by its pattern"),
    "a pattern of a budget": (prune(structure="n:m", budget={"macs": 0.5}), f"{OPT}/budget", "by its pattern"),
    "a pattern in rounds": (prune(pattern="2:4", schedule={"name": "iterative"}), f"{OPT}/schedule/name", "one_shot"),
    "a pattern over all": (prune(pattern="2:4", scope="global"), f"{OPT}/scope", "scope layer"),
    "a pattern of all": (prune(pattern="4:4"), f"{OPT}/pattern", "1 <= N < M <= 64"),
    "a pattern of words": (prune(pattern="two:four"), f"{OPT}/pattern", '"2:4" keeps at most 2 of 4'),
    "a pattern of other digits": (prune(pattern="２:４"), f"{OPT}/pattern", '"2:4" keeps at most 2 of 4'),
    "a pattern for three channels": (
        prune(pattern="2:4") | network([conv(3), {"type": "relu"}, *HEAD], (3, 8, 8)),
        f"{OPT}/pattern",
        "conv1 (2:4 on 3 input channels), linear1 (2:4 on 3 input features); N:M needs a number of inputs",
    ),
    "a pattern that fits no inputs": (
        prune(pattern="2:4", overrides={"conv2": {"pattern": "1:3"}}),
        f"{OPT}/overrides/conv2/pattern",
        "1:3 on 8 input channels",
    ),
    "a pattern among channels": (
        prune(budget={"macs": 0.5}, overrides={"conv2": {"pattern": "1:4"}}),
        f"{OPT}/overrides/conv2/pattern",
        "no meaning for structure channels",
    ),
    "a pattern of blocks": (prune(pattern="2:4", block=[2, 2]), f"{OPT}/block", "belongs to structure blocks"),
    "blocks of one side": (prune(block=[4], sparsity=0.5), f"{OPT}/block/1", "required"),
    "blocks without a side": (prune(block=[0, 4], sparsity=0.5), f"{OPT}/block/0", "at least 1"),
    "blocks as large as layers": (prune(block=[999, 999], sparsity=0.5), f"{OPT}/block", "choose smaller blocks"),
    "blocks by size": (prune(block=[2, 2], threshold=0.1), f"{OPT}/threshold", "by sparsity"),
    "no amount": (prune(), OPT, "exactly one of: sparsity, threshold, budget"),
    "a threshold of channels": (prune(structure="channels", threshold=0.1), f"{OPT}/threshold", "budget or sparsity"),
    "more than a group may lose": (prune(structure="channels", sparsity=0.95), f"{OPT}/sparsity", "max_sparsity 0.9"),
    "an empty override": (prune(sparsity=0.5, overrides={"conv2": {}}), f"{OPT}/overrides/conv2", "at least one of"),
    "an override twice": (
        prune(sparsity=0.5, overrides={"conv2": {"sparsity": 0.1, "threshold": 0.1}}),
        f"{OPT}/overrides/conv2/threshold",
        "not both",
    ),
    "an override of nothing": (
        prune(sparsity=0.5, overrides={"conv9": {"sparsity": 0.1}}),
        f"{OPT}/overrides/conv9",
        "did you mean conv",
    ),
    "an override of what is left alone": (
        prune(sparsity=0.5, exclude=["conv1"], overrides={"conv1": {"sparsity": 0.1}}),
        f"{OPT}/overrides/conv1",
        "excluded",
    ),
    "an override of the scores": (
        prune(budget={"macs": 0.5}, overrides={"linear1": {"sparsity": 0.3}}),
        f"{OPT}/overrides/linear1",
        "number of classes",
    ),
    "an override of a place": (
        prune(sparsity=0.5, overrides={"c": {"sparsity": 0.1}}) | SHARED,
        f"{OPT}/overrides/c",
        "name b",
    ),
    "a layer that is not there": (prune(sparsity=0.5, exclude=["conv3"]), f"{OPT}/exclude/0", "did you mean conv"),
    "a layer without weights": (prune(sparsity=0.5, exclude=["relu1"]), f"{OPT}/exclude/0", "is a relu layer"),
    "every layer left alone": (prune(sparsity=0.5, exclude=ALL), f"{OPT}/exclude", "nothing is left to prune"),
    "every layer left alone by a pattern": (prune(pattern="2:4", exclude=ALL), f"{OPT}/exclude", "nothing is left"),
    "channels after zeros": (
        steps(zeros(pattern="2:4"), cut(budget={"macs": 0.5})),
        "/optimizations/1",
        "channels are removed before weights",
    ),
    "channels that are gone": (
        steps(cut(structure="channels", sparsity=0.9), cut(structure="channels", sparsity=0.5)),
        "/optimizations/1",
        "conv1 (1 channel, and at least 1 must stay)",
    ),
    "old weights of another shape": (
        steps(cut(budget={"macs": 0.6}), {"type": "prune", "sparsity": 0.5, "retrain": {"policy": "weight_rewind"}}),
        "/optimizations/1/retrain/policy",
        "changes shapes",
    ),
    "weights from before the training": (
        prune(sparsity=0.5, retrain={"policy": "weight_rewind", "epochs": 1}) | JOB | UNTRAINED,
        f"{OPT}/retrain/epochs",
        "goes back 1 epoch",
    ),
    "nine removals": (
        steps(*(zeros(sparsity=0.1 * n + 0.05) for n in range(9))),
        "/optimizations/8",
        "at most 8 times",
    ),
    "a distillation after the training": (
        steps(zeros(sparsity=0.5), TEACHER),
        "/optimizations/1",
        "before the prune at",
    ),
    "two distillations": (steps(TEACHER, TEACHER | {"artifact": "pruned"}), "/optimizations/1", "state it once"),
    "something after the last": (steps({"type": "quantize"}, zeros(sparsity=0.5)), "/optimizations/1", "quantize last"),
    "4 bits": (steps({"type": "quantize", "scheme": "int4"}), f"{OPT}/scheme", "int8_static"),
    "no layer in 8 bits": (steps({"type": "quantize", "exclude": ALL}), f"{OPT}/exclude", "8 bits: conv1 (excluded)"),
    "what the runtime lacks": (steps({"type": "quantize"}) | TRANSPOSED, OPT, "no 8-bit kernel"),
    "a loss of two": (steps({"type": "quantize", "max_accuracy_drop": 2}), f"{OPT}/max_accuracy_drop", "at most 1"),
    "no network": ({"model": {}}, "/model", "exactly one of: preset, layers, job"),
    "weights of no network": ({"model": {"weights": "@weights"}}, "/model", "exactly one of: preset, layers, job"),
    "two networks": ({"model": {"job": "@three", "layers": []}}, "/model", "exactly one of: preset, layers, job"),
    "a path": ({"model": {"job": "../../etc"}}, "/model/job", "must match"),
    "a job that never was": ({"model": {"job": "job_0"}}, "/model/job", "there is no job job_0: name one"),
    "weights for a job": ({"model": {"job": "@weights"}}, "/model/job", "there is no job"),
    "a job for weights": ({"model": WEIGHTS | {"weights": "@three"}}, "/model/weights", "POST /v1/weights"),
    "a job that waits": ({"model": {"job": "@queued"}}, "/model/job", "wait until it has succeeded"),
    "a job that was cancelled": ({"model": {"job": "@cancelled"}}, "/model/job", "name one that succeeded"),
    "the best of a job": ({"model": {"job": "@three", "artifact": "best"}}, "/model/artifact", "pruned, baseline"),
    "the head of another": ({"model": {"job": "@ten", "head": "keep"}}, "/model/head", "10 classes"),
    "another head untrained": ({"model": {"job": "@ten"}, **UNTRAINED}, "/training/epochs", "linear1"),
    "a new head untrained": ({"model": {"job": "@three", "head": "new"}, **UNTRAINED}, "/training/epochs", "train it"),
    "colours for a grey job": (
        {"model": {"job": "@three", "input_shape": [3, 8, 8]}},
        "/model/input_shape",
        "it takes 1 channel, not 3",
    ),
    "images too small for a job": (
        {"model": {"job": "@three", "input_shape": [1, 2, 2]}},
        "/model/input_shape",
        "max_pool1",
    ),
    "rewrites untrained": (JOB | UNTRAINED | steps({"type": "residual"}), "/training/epochs", "conv1_shortcut"),
    "a distillation in no training": (JOB | UNTRAINED | steps(TEACHER), OPT, "use retrain.distillation"),
    "milestones of no training": (
        JOB | {"training": {"epochs": 0, "schedule": {"name": "step", "milestones": [5]}}},
        "/training/schedule/milestones",
        "leave them out",
    ),
    "a warm-up beyond the end": (
        JOB
        | {"training": {"epochs": 0, "schedule": {"name": "cosine", "warmup": 9}}}
        | prune(sparsity=0.5, retrain={"policy": "lr_rewind"}),
        "/training/schedule/warmup",
        "the retraining of 3 epochs at /optimizations/0",
    ),
    "no training of fresh weights": (UNTRAINED, "/training/epochs", "model.weights"),
    "weights of another network": (
        {"model": WEIGHTS | {"layers": WIDE["model"]["layers"]}},
        "/model/weights",
        "32 x 1",
    ),
    "weights that never were": (
        {"model": WEIGHTS | {"weights": "wt_0"}},
        "/model/weights",
        "there are no weights wt_0",
    ),
    "a mean of three channels": (
        {"model": WEIGHTS | {"preprocessing": {"mean": [0.2] * 3, "std": [0.3] * 3}}},
        "/model/preprocessing/mean",
        "the images have 1 channel",
    ),
    "a deviation of nothing": (
        {"model": WEIGHTS | {"preprocessing": {"mean": [0.2], "std": [0]}}},
        "/model/preprocessing/std/0",
        "above 1e-08",
    ),
    "a new head of fresh weights": (network(tiny_layers(), head="new"), "/model/head", "starts fresh"),
    "frozen nothing": ({"training": {"frozen": ["conv9"]}}, "/training/frozen/0", "similar: conv"),
    "frozen activations": ({"training": {"frozen": ["relu*"]}}, "/training/frozen/0", "without parameters"),
    "frozen everything": ({"training": {"frozen": ["*"]}}, "/training/frozen", "nothing to train"),
    "frozen by half a bracket": ({"training": {"frozen": ["conv["]}}, "/training/frozen/0", "matches no layer"),
    "frozen by sets of sets": ({"training": {"frozen": ["[[a]*"]}}, "/training/frozen/0", "matches no layer"),
    "a frozen place": ({"training": {"frozen": ["c"]}, **SHARED}, "/training/frozen/0", "c shares those of b"),
    "a rate uphill": ({"training": {"lr_factors": {"conv1": -1}}}, "/training/lr_factors/conv1", "at least 0"),
    "a rate of slashes": ({"training": {"lr_factors": {"a/b~c": 1}}}, "/training/lr_factors/a~1b~0c", "matches no"),
    "a lasso of nothing": (steps({"type": "regularization", "group_lasso": 0}), OPT, "group_lasso, above 0"),
    "a teacher of other classes": (steps(TEACHER | {"teacher": "@ten"}), f"{OPT}/teacher", "another class count"),
    "a teacher of other images": (
        steps(TEACHER) | network(tiny_layers(), (3, 8, 8)),
        f"{OPT}/teacher",
        "it takes 1 channel, not 3",
    ),
    "a teacher of the future": (steps(TEACHER | {"teacher": "@queued"}), f"{OPT}/teacher", "wait until"),
    "a teacher without weight": (steps(TEACHER | {"alpha": 0}), f"{OPT}/alpha", "above 0"),
    "another class count at last": (
        distilled(teacher="@ten"),
        f"{OPT}/retrain/distillation/teacher",
        "another class count",
    ),
    "whose network": (distilled(artifact="pruned"), f"{OPT}/retrain/distillation/artifact", "state teacher"),
    "a distillation in no retraining": (
        prune(sparsity=0.5, retrain={"policy": "none", "distillation": {}}),
        f"{OPT}/retrain/distillation",
        "nothing to distil",
    ),
    "shares of itself": (
        network([{"type": "conv", "shares": "a", "name": "a"}, *HEAD]),
        "/model/layers/0/shares",
        "own",
    ),
    "shares of later": (
        network([{"type": "conv", "shares": "b"}, conv(name="b"), *HEAD]),
        "/model/layers/0/shares",
        "comes later",
    ),
    "shares of another width": (
        network([conv(name="a"), conv(6), {"type": "conv", "shares": "a"}, *HEAD]),
        "/model/layers/2/shares",
        "but 6 arrive here",
    ),
    "no rounding": (prune(budget={"macs": 0.5}, round_to=0), f"{OPT}/round_to", "at least 1"),
}
ACCEPTED: dict[str, tuple[Parts, tuple[str, ...]]] = {
    # wish: (parts, where the plan warns)
    "a table of parts that round to nothing": (table(kept=[0.9999999999999999, 1e-6]), ()),
    "a table by gradients of frozen layers": (
        table(kept=[0.5], criterion="taylor") | {"training": {"frozen": ["conv1", "batch_norm1"]}},
        ("/training/frozen",),
    ),
    "a table of one image": (table(kept=[0.5], images=1), ()),
    "a table of a finished job": (table(kept=[0.5]) | JOB | UNTRAINED, ()),
    "a table of shared layers, distilled": (table(kept=[0.5]) | SHARED | steps(TEACHER), ()),
    "an hour": (steps(cut(budget={"latency_ms": 1e6})), (f"{OPT}/budget/latency_ms",)),
    "an hour, in two rounds, by sensitivity": (
        steps(cut(budget={"latency_ms": 1e6}, schedule={"name": "iterative", "steps": 2}, scope="sensitivity")),
        (f"{OPT}/budget/latency_ms",),
    ),
    "one MAC of one": (steps(cut(budget={"macs": 1})), (OPT,)),
    "more bytes than there are": (steps(cut(budget={"bytes": 2**53})), (OPT,)),
    "bytes of shared layers": (steps(cut(budget={"bytes": 0.7})) | SHARED, ()),
    "shared layers by gradients": (
        steps(cut(budget={"macs": 0.5}, scope="global", criterion="taylor")) | SHARED,
        (),
    ),
    "sensitivity beside a part of its own": (
        steps(cut(scope="sensitivity", budget={"macs": 0.5}, overrides={"conv1": {"sparsity": 0}})),
        (),
    ),
    "gates beside a part of its own": (
        steps(cut(scope="learned", budget={"params": 0.5}, overrides={"conv1": {"sparsity": 0}})),
        (),
    ),
    "gates on shared layers in two rounds, by gradients": (
        steps(
            cut(
                scope="learned",
                budget={"bytes": 0.7},
                criterion="taylor",
                schedule={"name": "iterative", "steps": 2},
                retrain={"epochs": 2},
            )
        )
        | SHARED,
        (),
    ),
    "sensitivity of less than a block": (
        steps(zeros(scope="sensitivity", budget={"macs": 0.97}, max_sparsity=0.1)) | WIDE,
        (),
    ),
    "frozen channels by gradients": (
        steps(cut(structure="channels", sparsity=0.5, criterion="taylor")) | {"training": {"frozen": ["*1", "conv2"]}},
        ("/training/frozen",),
    ),
    "frozen and left alone": (
        prune(sparsity=0.5, exclude=["conv1"]) | {"training": {"frozen": ["conv1"]}},
        ("/training/frozen",),
    ),
    "nothing but one weight a layer": (steps(zeros(sparsity=0.999999, criterion="erk")), ()),
    "less than one weight": (steps(zeros(sparsity=1e-9)), ()),
    "a pattern for three channels among others": (
        steps(zeros(pattern="2:4")) | network(tiny_layers(), (3, 8, 8)),
        (),
    ),
    "a pattern after odd widths": (
        steps(cut(structure="channels", sparsity=0.4), zeros(pattern="2:4")),
        (),
    ),
    "a pattern that may fit nothing": (
        steps(cut(budget={"macs": 0.5}, scope="global", criterion="fpgm"), zeros(pattern="7:8", exclude=["linear1"])),
        ("/optimizations/1/pattern",),
    ),
    "blocks that fit badly, in rounds, by luck": (
        steps(
            zeros(block=[3, 5], sparsity=0.9, criterion="random", schedule={"name": "iterative", "steps": 3}),
            zeros(sparsity=0.95, criterion="lamp"),
        ),
        (),
    ),
    "less after more": (
        steps(zeros(sparsity=0.9, scope="layer"), zeros(sparsity=0.5, scope="layer")),
        ("/optimizations/1",),
    ),
    "three times half": (steps(*[cut(structure="channels", sparsity=0.5)] * 3), ()),
    "more rounds than channels": (
        steps(cut(structure="channels", sparsity=0.3, schedule={"name": "iterative", "steps": 40})),
        (),
    ),
    "widths for zeros": (steps(cut(sparsity=0.5, min_channels=2)), (f"{OPT}/min_channels", f"{OPT}/round_to")),
    "a lasso of frozen layers": (
        steps({"type": "regularization", "group_lasso": 1e-2}, cut(budget={"macs": 0.6}))
        | {"training": {"frozen": ["conv1"]}},
        ("/training/frozen",),
    ),
    "no rate at all": ({"training": {"lr_factors": {"*": 0}}}, ()),
    "a job of other classes, frozen but for the head": (
        {"model": {"job": "@ten"}, "training": {"frozen": ["conv*", "batch_norm*"]}},
        ("/model/head",),
    ),
    "a job as it is": (JOB | UNTRAINED, ()),
    "weights as they are, by size": (
        {"model": WEIGHTS, **UNTRAINED, **steps(zeros(threshold=1e-3))},
        ("/model/weights",),
    ),
    "a job distilled from itself": (
        JOB | UNTRAINED | distilled(teacher="@three", artifact="pruned", alpha=1, temperature=100),
        (),
    ),
    "a step schedule of no training": (
        JOB | {"training": {"epochs": 0, "schedule": {"name": "step"}}} | prune(sparsity=0.5, retrain={"epochs": 1}),
        (),
    ),
    "everything at once": (
        steps(
            {"type": "deeper"},
            {"type": "dropout"},
            TEACHER,
            cut(budget={"macs": 0.6}),
            {"type": "prune", "pattern": "1:2", "retrain": {"epochs": 1, "distillation": {}}},
        ),
        (),
    ),
}
