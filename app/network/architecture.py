"""`architecture.json`: a network as data, with the preprocessing of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import JsonValue
from app.network.graph import Graph, build_graph
from app.network.layers.registry import read_layers
from app.network.node import Limits

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Preprocessing:
    """What turns raw pictures into the network's input: `(x * scale - mean) / std`, mean and std per channel.

    `scale` is 1/255 for uint8 data and 1 for float32 data; mean and std are those of the training part after the scale.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images_NCx: NDArray[Any]) -> NDArray[np.float32]:
        """The network's input, float32 `N x C x ...`, of raw images `N x C x ...` (uint8 or float32).

        Three float32 operations in the order of the formula, so that every runtime that follows it has the same bits.
        """
        per_channel = (1, -1) + (1,) * (images_NCx.ndim - 2)
        ready: NDArray[np.float32] = images_NCx.astype(np.float32, order="C")
        ready *= np.float32(self.scale)
        ready -= np.asarray(self.mean, np.float32).reshape(per_channel)
        ready /= np.asarray(self.std, np.float32).reshape(per_channel)
        return ready

    def document(self) -> dict[str, JsonValue]:
        """The `preprocessing` object of `architecture.json`."""
        return {"scale": self.scale, "mean": list(self.mean), "std": list(self.std)}


def architecture_document(graph: Graph, class_names: Sequence[str], preprocessing: Preprocessing) -> dict[str, Any]:
    """The content of `architecture.json`; its `layers` can be sent as `model.layers` of another job."""
    return {
        "format_version": FORMAT_VERSION,
        "input_shape": list(graph.input_shape),
        "classes": list(class_names),
        "preprocessing": preprocessing.document(),
        "layers": graph.to_layers(),
    }


def read_architecture(document: Mapping[str, Any]) -> tuple[Graph, tuple[str, ...], Preprocessing]:
    """(graph, class names, preprocessing) of the content of an `architecture.json` that `architecture_document` made.

    It was checked when its job was submitted: the limits on the size of networks are not checked again.

    Raises:
        pydantic.ValidationError, InvalidSpec: its layers are not a network. KeyError: something is missing.
    """
    stated = document["preprocessing"]
    preprocessing = Preprocessing(
        float(stated["scale"]), tuple(map(float, stated["mean"])), tuple(map(float, stated["std"]))
    )
    graph = build_graph(read_layers(document["layers"]), tuple(document["input_shape"]), limits=Limits.none())
    return graph, tuple(document["classes"]), preprocessing
