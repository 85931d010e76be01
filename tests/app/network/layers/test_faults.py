"""Mistakes in a network, each refused with its reason, the pointer to what was sent, the value and the limit."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import pytest

from app.errors import Fault, InvalidSpec
from app.network.graph import build_graph
from app.network.layers.activations import Activation
from app.network.layers.registry import LAYERS, read_layers
from app.network.node import Limits
from tests.support.networks.layer_samples import LayerList, conv, layer


class Mistake(NamedTuple):
    """A network with one mistake, and what must be said about it."""

    layers: LayerList
    pointer: str
    words: tuple[str, ...]
    value: Any = None
    limit: Any = None
    shape: tuple[int, ...] = (3, 32, 32)
    classes: int | None = None


RELU, FLATTEN, GAP = layer("relu"), layer("flatten"), layer("global_avg_pool")
POOL = layer("max_pool", kernel_size=2)


def linear(out_features: int, **fields: Any) -> dict[str, Any]:
    """A linear layer."""
    return layer("linear", out_features=out_features, **fields)


SEED = [conv(32), RELU, POOL, conv(64), RELU, POOL, FLATTEN]
SHORT = [conv(8), RELU, GAP, FLATTEN, linear(10)]

WIDTHS = {
    "the seed's 64 * 16 * 16": Mistake(
        [*SEED, linear(128, in_features=16384), RELU, linear(10)],
        "/model/layers/7/in_features",
        ("16384", "4096"),
        16384,
        4096,
        classes=10,
    ),
    "stated channels": Mistake([conv(8), conv(8, in_channels=3)], "/model/layers/1/in_channels", ("3", "8"), 3, 8),
    "groups that do not divide the input": Mistake([conv(8, groups=2)], "/model/layers/0/groups", ("2", "3"), 2, 3),
    "groups that do not divide the output": Mistake(
        [conv(7, groups=3)], "/model/layers/0/groups", ("3 groups", "7 output"), 3, 7
    ),
    "a depthwise multiplier that is not whole": Mistake(
        [conv(8, groups="depthwise")], "/model/layers/0/out_channels", ("multiple", "3"), 8, 3
    ),
    "norm groups": Mistake(
        [conv(8), layer("group_norm", num_groups=3)], "/model/layers/1/num_groups", ("3 groups", "8"), 3, 8
    ),
    "norm groups of one number": Mistake(
        [conv(8), layer("global_avg_pool"), layer("group_norm", num_groups=8)],
        "/model/layers/2/num_groups",
        ("each of the 8 groups holds one number", "fewer groups"),
        8,
        4,
    ),
    "a norm of one number": Mistake(
        [layer("flatten"), layer("linear", out_features=1), layer("group_norm", num_groups=1)],
        "/model/layers/2/num_groups",
        ("its one group holds one number",),
        1,
        0,
    ),
    "shuffle groups": Mistake(
        [conv(8), layer("channel_shuffle", groups=3)], "/model/layers/1/groups", ("3 groups", "8"), 3, 8
    ),
    "channels that a slice does not find": Mistake(
        [layer("slice", start=1, stop=9)], "/model/layers/0/stop", ("9", "3"), 9, 3
    ),
    "a slice of nothing": Mistake([layer("slice", start=2, stop=2)], "/model/layers/0/start", ("no channel",), 2, 1),
    "too many channels": Mistake(
        [conv(40000), layer("concat", inputs=["conv1", "conv1"])],
        "/model/layers/1",
        ("80000",),
        80000,
        65536,
        (3, 1, 1),
    ),
}

WINDOWS = {
    "larger than the input": Mistake([conv(8, 5, 0)], "/model/layers/0/kernel_size", ("5", "4"), 5, 4, (3, 8, 4)),
    "larger than the padded input": Mistake(
        [conv(8, 5, 1, dilation=2)],
        "/model/layers/0/kernel_size",
        ("9", "6 with padding", "4 without"),
        9,
        6,
        (3, 8, 4),
    ),
    "pool larger than the input, in a container": Mistake(
        [conv(8), layer("repeat", times=3, layers=[RELU, POOL])],
        "/model/layers/1/layers/1/kernel_size",
        ("2", "1"),
        2,
        1,
        (3, 4, 4),
    ),
    "pool padding above half": Mistake(
        [layer("avg_pool", kernel_size=3, padding=2)], "/model/layers/0/padding", ("2", "half", "3"), 2, 1
    ),
    "same with a stride": Mistake(
        [conv(8, 3, "same", stride=2)], "/model/layers/0/padding", ("same", "stride"), "same"
    ),
    "a list for another number of axes": Mistake(
        [conv(8, [3, 3, 3], 1)], "/model/layers/0/kernel_size", ("per spatial axis", "2"), 3, 2
    ),
    "output padding as large as the stride": Mistake(
        [layer("conv_transpose", out_channels=4, kernel_size=3, stride=2, output_padding=2)],
        "/model/layers/0/output_padding",
        ("at most 1",),
        2,
        1,
    ),
    "nothing left": Mistake(
        [layer("conv_transpose", out_channels=4, kernel_size=2, padding=4)],
        "/model/layers/0/padding",
        ("nothing is left", "4 x -3 x -2"),
        -3,
        1,
        (3, 4, 5),
    ),
    "a mode for other ranks": Mistake(
        [layer("upsample", scale_factor=2, mode="bilinear")],
        "/model/layers/0/mode",
        ("2", "1", "linear"),
        "bilinear",
        "linear",
        (3, 9),
    ),
    "reflection beyond the input": Mistake(
        [layer("pad", padding=4, mode="reflect")], "/model/layers/0/padding", ("4 positions",), 4, 3, (3, 4, 9)
    ),
    "reflected channels": Mistake(
        [layer("pad", padding=[0, 0, 0, 0, 1, 0], mode="reflect")],
        "/model/layers/0/padding",
        ("channels", "constant"),
        1,
        0,
    ),
    "a padding list that is too long": Mistake(
        [layer("pad", padding=[0] * 8)], "/model/layers/0/padding", ("up to 6", "8"), 8, 6
    ),
    "an odd padding list": Mistake([layer("pad", padding=[1, 1, 1])], "/model/layers/0/padding", ("3",), 3, 6),
}

ORDER = {
    "convolution after flatten": Mistake([FLATTEN, conv(8)], "/model/layers/1", ("before flatten", "3072")),
    "linear without flatten": Mistake([conv(8), linear(10)], "/model/layers/1", ("flatten", "8 x 32 x 32"), 3, 1),
    "pool after flatten": Mistake([FLATTEN, POOL], "/model/layers/1", ("before flatten",)),
    "spatial dropout after flatten": Mistake(
        [FLATTEN, layer("spatial_dropout")], "/model/layers/1", ("before flatten",)
    ),
    "squeeze and excite after flatten": Mistake(
        [FLATTEN, layer("squeeze_excite")], "/model/layers/1", ("before flatten",)
    ),
    "dropout on the logits": Mistake(
        [*SHORT, layer("dropout")],
        "/model/layers/5",
        ("dropout after the logits", "before the last linear"),
        classes=10,
    ),
    "dropout on the logits, disguised": Mistake(
        [*SHORT, layer("dropout"), FLATTEN], "/model/layers/5", ("dropout after the logits",), classes=10
    ),
    "dropout on the logits, after an average": Mistake(
        [conv(10), GAP, layer("spatial_dropout"), FLATTEN],
        "/model/layers/2",
        ("spatial_dropout after the logits",),
        classes=10,
    ),
}

CLASSES = {
    "of a linear layer": Mistake(SHORT, "/model/layers/4/out_features", ("10", "7"), 10, 7, classes=7),
    "of an average": Mistake(
        [conv(8), RELU, conv(10, 1, 0), GAP, FLATTEN], "/model/layers/2/out_channels", ("10", "7"), 10, 7, classes=7
    ),
    "of a sum": Mistake(
        [*SHORT, linear(10, inputs=["flatten1"]), layer("add", inputs=["linear1", "linear2"])],
        "/model/layers/6",
        ("10", "7"),
        10,
        7,
        classes=7,
    ),
    "not flat": Mistake([conv(10), GAP], "/model/layers/1", ("flatten", "10 x 1 x 1"), [10, 1, 1], [10], classes=10),
    "only flatten": Mistake([FLATTEN], "/model/layers/0", ("3072", "10"), 3072, 10, classes=10),
}

WIRES = {
    "the layer itself": Mistake(
        [conv(8), layer("add", name="a", inputs=["a", "conv1"])],
        "/model/layers/1/inputs/0",
        ("cycle", "'a' takes its own output"),
    ),
    "a circle": Mistake(
        [conv(8, name="a", inputs=["b"]), RELU, conv(8, name="b")],
        "/model/layers/0/inputs/0",
        ("cycle: 'a' takes 'b', 'b' takes 'relu1', 'relu1' takes 'a'",),
    ),
    "a long circle": Mistake(
        [conv(3, inputs=["z"]), *[RELU] * 50, conv(3, name="z")],
        "/model/layers/0/inputs/0",
        ("'conv1' takes 'z', 'z' takes 'relu50'", ", ..., 'relu1' takes 'conv1'"),
    ),
    "a circle through a container": Mistake(
        [layer("residual", name="r", layers=[conv(3), layer("add", inputs=["conv1", "r"])])],
        "/model/layers/0/layers/1/inputs/1",
        ("cycle", "'r_add1' is inside 'r'"),
    ),
    "a circle through another container": Mistake(
        [conv(3, name="a", inputs=["r"]), layer("residual", name="r", layers=[layer("add", inputs=["input", "a"])])],
        "/model/layers/0/inputs/0",
        ("cycle: 'a' takes 'r', 'r' takes 'a'",),
    ),
    "a later layer": Mistake(
        [conv(8, name="a"), conv(8, inputs=["late"]), conv(8, name="late", inputs=["a"])],
        "/model/layers/1/inputs/0",
        ("'late' comes later",),
    ),
    "an unknown layer": Mistake(
        [conv(8), RELU, layer("add", inputs=["relu1", "conv2"])],
        "/model/layers/2/inputs/1",
        ("no layer 'conv2'", "did you mean 'conv1'"),
    ),
    "a layer inside a container, from outside and by its inner name": Mistake(
        [layer("residual", layers=[conv(3, name="x")]), layer("add", inputs=["x", "residual1"])],
        "/model/layers/1/inputs/0",
        ("no layer 'x'",),
    ),
    "no input": Mistake(
        [conv(8), layer("relu", inputs=[])], "/model/layers/1/inputs", ("relu takes one input, not 0",), 0, 1
    ),
    "two inputs for one": Mistake(
        [conv(8), layer("relu", inputs=["conv1", "input"])], "/model/layers/1/inputs", ("one input, not 2",), 2, 1
    ),
    "one input for two": Mistake([conv(8), layer("add")], "/model/layers/1", ("two or more",), 1, 2),
    "sum of other shapes": Mistake(
        [conv(8), layer("add", inputs=["conv1", "input"])],
        "/model/layers/1/inputs",
        ("8 x 32 x 32", "3 x 32 x 32"),
        [3, 32, 32],
        [8, 32, 32],
    ),
    "product of other shapes": Mistake(
        [conv(8), layer("multiply", inputs=["conv1", "input"])],
        "/model/layers/1/inputs",
        ("8 x 32 x 32", "3 x 32 x 32"),
        [3, 32, 32],
        [8, 32, 32],
    ),
    "concat of other sizes": Mistake(
        [conv(3, stride=2), layer("concat", inputs=["input", "conv1"])],
        "/model/layers/1/inputs",
        ("3 x 32 x 32", "3 x 16 x 16"),
        [3, 16, 16],
        [3, 32, 32],
    ),
    "a dead branch": Mistake(
        [conv(8), conv(8, name="dead"), conv(8, inputs=["conv1"])],
        "/model/layers/1",
        ("'dead' is computed but never used", "conv2"),
    ),
    "a dead branch in a container": Mistake(
        [layer("residual", layers=[conv(3), conv(3, name="dead"), conv(3, inputs=["conv1"])])],
        "/model/layers/0/layers/1",
        ("'residual1_dead' is computed but never used",),
    ),
    "two outputs": Mistake(
        [conv(8), GAP, FLATTEN, linear(10), linear(10, inputs=["flatten1"])],
        "/model/layers/3",
        ("'linear1' is computed but never used", "linear2"),
        classes=10,
    ),
}

RESIDUALS = {
    "identity of another width": Mistake(
        [conv(8), layer("residual", shortcut="identity", layers=[conv(4)])],
        "/model/layers/1/shortcut",
        ("4 x 32 x 32", "8 x 32 x 32", "projection"),
        [4, 32, 32],
        [8, 32, 32],
    ),
    "padding cannot narrow": Mistake(
        [conv(8), layer("residual", shortcut="pad", layers=[conv(4)])],
        "/model/layers/1/shortcut",
        ("only add channels",),
        [4, 32, 32],
        [8, 32, 32],
    ),
    "a size that no stride reaches": Mistake(
        [conv(8), layer("residual", layers=[conv(8, 3, 0)])],
        "/model/layers/1",
        ("8 x 30 x 30", "8 x 32 x 32", "no stride"),
        [8, 30, 30],
        [8, 32, 32],
    ),
    "a branch that grows": Mistake(
        [conv(8), layer("residual", layers=[layer("upsample", scale_factor=2)])],
        "/model/layers/1",
        ("no stride",),
        [8, 64, 64],
        [8, 32, 32],
    ),
    "a branch that flattens": Mistake(
        [conv(8), layer("residual", layers=[FLATTEN])], "/model/layers/1", ("number of axes",), [8192], [8, 32, 32]
    ),
}

NAMES = {
    "twice": Mistake(
        [conv(8, name="a"), conv(8, name="a")], "/model/layers/1/name", ("'a' is also", "/model/layers/0")
    ),
    "equal to a later generated one": Mistake(
        [conv(8, name="relu1"), RELU], "/model/layers/0/name", ("'relu1' is also", "/model/layers/1")
    ),
    "equal to an earlier generated one": Mistake(
        [conv(8), conv(8, name="conv1")], "/model/layers/1/name", ("'conv1' is also", "/model/layers/0")
    ),
    "equal to one in a container": Mistake(
        [layer("residual", layers=[conv(3)]), conv(3, name="residual1_conv1")],
        "/model/layers/1/name",
        ("also", "/model/layers/0/layers/0"),
    ),
    "equal to what a container adds": Mistake(
        [layer("residual", layers=[conv(3, name="add1")])], "/model/layers/0/layers/0/name", ("'residual1_add1'",)
    ),
    "equal to what squeeze and excite makes": Mistake(
        [layer("relu", name="squeeze_excite1_conv1"), layer("squeeze_excite")], "/model/layers/0/name", ("also",)
    ),
    "equal to a container": Mistake(
        [conv(3, name="r"), layer("residual", name="r", layers=[conv(3)])], "/model/layers/1/name", ("'r' is also",)
    ),
    "too long with its containers": Mistake(
        [layer("residual", name="a" * 120, layers=[conv(3, name="b" * 120)])],
        "/model/layers/0/layers/0",
        ("241",),
        241,
        200,
    ),
}


def _nested(times: int, depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = RELU
    for _ in range(depth):
        inner = layer("repeat", times=times, layers=[inner])
    return inner


LIMITS = {
    "no layers": Mistake([], "/model/layers", ("at least one layer",), 0, 1),
    "no layers in a container": Mistake(
        [layer("residual", layers=[])], "/model/layers/0/layers", ("at least one",), 0, 1
    ),
    "10,001 layers": Mistake([RELU] * 10_001, "/model/layers", ("10001", "10000"), 10_001, 10_000),
    "10^12 layers by repeats": Mistake(
        [_nested(1000, 4)], "/model/layers/0/layers/0/layers/0/times", ("1000000", "10000"), 1_000_000, 10_000
    ),
    "10,001 by two repeats": Mistake([_nested(5000, 1), _nested(5001, 1)], "/model/layers", ("10001",), 10_001, 10_000),
    "more by what containers add": Mistake(
        [layer("repeat", times=5000, layers=[layer("residual", layers=[conv(3)], shortcut="projection")])],
        "/model/layers",
        ("20000",),
        20_000,
        10_000,
        (3, 1, 1),
    ),
    "too deep": Mistake([_nested(1, 17)], "/model/layers/0" + "/layers/0" * 16 + "/layers", ("16 deep",), 17, 16),
    "parameters": Mistake(
        [FLATTEN, linear(65536), linear(65536)],
        "/model/layers/2",
        ("parameters", "500000000"),
        3072 * 65536 + 65536**2 + 2 * 65536,
        500_000_000,
    ),
    "activations": Mistake(
        [conv(2**16, 1, 0), RELU],
        "/model/layers/0",
        ("activations", "1000000000"),
        2 * 2**16 * 2**14,
        10**9,
        (1, 128, 128),
    ),
    "an input without space": Mistake([RELU], "/model/input_shape", ("2 to 4",), 1, 4, (3,)),
    "an input of five axes": Mistake([RELU], "/model/input_shape", ("2 to 4",), 5, 4, (3, 1, 1, 1, 1)),
    "an input of nothing": Mistake([RELU], "/model/input_shape/1", ("at least 1",), 0, 1, (3, 0, 4)),
    "an input of 10^12": Mistake([RELU], "/model/input_shape", ("67108864",), 3 * 10**12, 2**26, (3, 10**6, 10**6)),
    "an input of too many channels": Mistake([RELU], "/model/input_shape/0", ("65536",), 70000, 65536, (70000, 4)),
}

GROUPS = {
    "widths": WIDTHS,
    "windows": WINDOWS,
    "order": ORDER,
    "classes": CLASSES,
    "wires": WIRES,
    "residuals": RESIDUALS,
    "names": NAMES,
    "limits": LIMITS,
}
MISTAKES = {f"{group}: {name}": mistake for group, mistakes in GROUPS.items() for name, mistake in mistakes.items()}


def faults_of(layers: LayerList, shape: tuple[int, ...], classes: int | None = None, **more: Any) -> tuple[Fault, ...]:
    """The faults with which a network is refused."""
    with pytest.raises(InvalidSpec) as refused:
        build_graph(read_layers(layers), shape, classes=classes, **more)
    return refused.value.faults


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_fault_where_it_was_made(name: str) -> None:
    mistake = MISTAKES[name]
    (fault,) = faults_of(mistake.layers, mistake.shape, mistake.classes)
    assert fault.pointer == mistake.pointer
    assert all(word in fault.message for word in mistake.words), fault.message
    assert (fault.value, fault.limit) == (mistake.value, mistake.limit)


LAST_FORBIDDEN = sorted(
    kind
    for kind, layer_class in LAYERS.items()
    if issubclass(layer_class, Activation) or kind.endswith(("_norm", "dropout"))
)


@pytest.mark.parametrize("kind", [kind for kind in LAST_FORBIDDEN if kind != "spatial_dropout"])
def test_nothing_that_changes_class_scores_may_follow_them(kind: str) -> None:
    fields = {"num_groups": 2} if kind == "group_norm" else {}
    faults = faults_of([*SHORT, layer(kind, **fields)], (3, 8, 8), 10)
    assert [(fault.pointer, f"{kind} after the logits" in fault.message) for fault in faults] == [
        ("/model/layers/5", True)
    ]


def test_several_mistakes_are_reported_at_once() -> None:
    layers = [
        conv(8, groups=2),
        conv(8, name="b", inputs=["input"], in_channels=4),
        layer("add", inputs=["b", "nowhere"]),
    ]
    pointers = [fault.pointer for fault in faults_of(layers, (3, 8, 8))]
    assert pointers == ["/model/layers/0/groups", "/model/layers/1/in_channels", "/model/layers/2/inputs/1"]


def test_a_mistake_inside_a_repeat_is_reported_once() -> None:
    block = [conv(3), layer("relu", name="dead"), layer("relu", inputs=["conv1"])]
    faults = faults_of([layer("repeat", times=50, layers=block)], (3, 8, 8))
    assert [fault.pointer for fault in faults] == ["/model/layers/0/layers/1"]


def test_ten_thousand_wrong_references_are_refused_quickly() -> None:
    layers = [layer("relu", inputs=["z"])] * 100 + [RELU] * 9899 + [layer("relu", name="z")]
    started = time.process_time()
    assert len(faults_of(layers, (3, 8, 8))) == 100
    assert time.process_time() - started < 1


def test_at_most_a_hundred_mistakes_are_reported() -> None:
    assert len(faults_of([layer("relu", inputs=["nowhere"])] * 300, (3, 8, 8))) == 100
    assert len(faults_of([layer("relu", inputs=["input"])] * 300, (3, 8, 8))) == 100


def test_a_network_that_pools_after_its_activation_may_end_with_an_average() -> None:
    """SqueezeNet's head: the last convolution's scores go through relu before they are averaged."""
    graph = build_graph(read_layers([conv(10), RELU, GAP, FLATTEN]), (3, 8, 8), classes=10)
    assert graph["flatten1"].shape == (10,)


def test_limits_can_be_lower() -> None:
    limits = Limits(layers=3, params=100, channels=6, activations=1000)
    assert faults_of([RELU] * 4, (3, 8), limits=limits)[0].limit == 3
    assert faults_of([conv(6), conv(6)], (3, 8), limits=limits)[0].limit == 100
    assert faults_of([conv(7, 1, 0)], (3, 8), limits=limits)[0].limit == 6
    assert faults_of([RELU, RELU], (3, 200), limits=limits)[0].limit == 1000
