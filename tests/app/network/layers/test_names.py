"""Layer names become attributes of torch modules, keys of files and words of source: what cannot be one is refused."""

from __future__ import annotations

import keyword

import pytest
from pydantic import ValidationError
from torch import nn

from app.network.graph import build_graph
from app.network.layers.names import MODULE_ATTRIBUTES, OWN_WORDS, local_names, why_refused
from app.network.layers.registry import LAYERS, read_layers
from worker.network import build_network


def test_the_reserved_names_are_the_attributes_of_torch_modules() -> None:
    assert {name for name in {*dir(nn.Module), *vars(nn.Module())} if not name.startswith("_")} == MODULE_ATTRIBUTES


def test_the_network_has_no_attribute_that_a_layer_could_be_called() -> None:
    network = build_network(build_graph(read_layers([{"type": "relu", "name": "only"}]), (1, 4)))
    public = {name for name in {*dir(network), *vars(network)} if not name.startswith("_")}
    assert public - MODULE_ATTRIBUTES - OWN_WORDS == {"only"}


@pytest.mark.parametrize(
    "name",
    [
        *[
            "",
            "1conv",
            "_conv",
            "__init__",
            "a.b",
            "a/b",
            "../x",
            "a b",
            "a-b",
            "é",
            "ｃonv",
            "conv\n",
            "con\x00v",
            "\u202econv",
        ],
        *["input", "graph", "self", "weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
        *["class", "None", "lambda", "train", "eval", "half", "type", "to", "forward", "training", "T_destination"],
        *["con", "CON", "Aux", "nul", "COM1", "lpt9"],
        "a" * 201,
    ],
)
def test_a_name_that_cannot_be_an_attribute_a_key_or_a_word_is_refused_at_its_field(name: str) -> None:
    assert why_refused(name) is not None
    with pytest.raises(ValidationError) as refused:
        read_layers([{"type": "residual", "layers": [{"type": "relu", "name": name}]}])
    assert [fault["loc"] for fault in refused.value.errors()] == [(0, "residual", "layers", 0, "relu", "name")]


@pytest.mark.parametrize("name", ["a", "conv1", "Stem", "block_2_b", "match", "case", "logits", "a" * 200])
def test_other_names_are_accepted(name: str) -> None:
    assert why_refused(name) is None


def test_every_word_of_python_is_refused() -> None:
    assert all(why_refused(word) for word in keyword.kwlist)


def test_no_layer_type_gives_a_name_that_is_refused() -> None:
    assert [kind for kind in LAYERS if why_refused(f"{kind}1") is not None] == []


def test_unnamed_layers_are_counted_per_type_and_named_ones_are_not() -> None:
    layers = [("conv", None), ("relu", None), ("conv", "stem"), ("conv", None), ("relu", None)]
    assert local_names(layers) == ["conv1", "relu1", "stem", "conv2", "relu2"]
