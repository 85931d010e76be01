"""What low rank and separable convolutions do to a network: the layers that are replaced, by which, and those that stay.

done = replace_layers(graph, step, spectra)      # spectra None: the dry run; separable needs none
done.graph, done.products["conv2"]               # the smaller network; the layers instead of conv2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.compression.factorization import (
    Factorable,
    ProductLayers,
    Ranks,
    factorize,
    low_rank_layers,
    named_parts,
    part_names,
    separable_layers,
    separable_parts,
    separate,
)
from app.compression.rank_selection import Spectra, choose_ranks
from app.network.cost import Cost, cost
from app.network.graph import Graph
from app.network.layers.convolutions import Linear
from app.spec.low_rank import LowRank, Separable


@dataclass(frozen=True)
class Replacement:
    """The network with layers replaced.

    `products` has the layers that became several, `ranks` their ranks (empty for separable ones), `kept` the reason for
    every other convolution and linear layer; `layers` could become several, `floor` is the least cost of them all.
    """

    graph: Graph
    products: dict[str, ProductLayers]
    ranks: dict[str, Ranks]
    kept: dict[str, str]
    layers: dict[str, Factorable]
    floor: Cost


def replace_layers(
    graph: Graph, step: LowRank | Separable, spectra: Spectra | None = None, *, baseline: Cost | None = None
) -> Replacement:
    """The network after `step`; see `choose_ranks` for `spectra`, `baseline` and BudgetUnreachable.

    Nothing at all is replaced where no layer can be; `layers` is empty then.
    """
    names = part_names(graph)
    if isinstance(step, Separable):
        layers, kept = separable_layers(graph, only=step.layers, exclude=step.exclude)
        after = separate(graph, layers)
        products = {name: named_parts(separable_parts(layer), names[name]) for name, layer in layers.items()}
        return Replacement(after, products, {}, kept, layers, cost(after))
    choice = choose_ranks(graph, step, spectra, baseline=baseline)
    products = {
        name: named_parts(choice.layers[name].parts(ranks), names[name]) for name, ranks in choice.ranks.items()
    }
    after = factorize(graph, choice.ranks)
    return Replacement(after, products, choice.ranks, choice.kept, choice.layers, choice.floor)


def why_irreplaceable(graph: Graph, step: LowRank | Separable) -> Mapping[str, str]:
    """For each convolution and linear layer that `step` could not replace if it were asked to, the reason."""
    return (separable_layers if isinstance(step, Separable) else low_rank_layers)(graph)[1]


def possible_parts(graph: Graph, layers: Mapping[str, Factorable]) -> frozenset[str]:
    """Names of all layers that could come beside these layers, wherever they stand."""
    names = part_names(graph)
    return frozenset(
        name
        for layer in layers.values()
        for place in layer.places
        for role, name in names[place.name].items()
        if role != "expand"
    )


def written_product(layer: Factorable, product: ProductLayers) -> str:
    """The product in words: `64 -> 24 (1 x 1) -> 32 (3 x 3) -> 64 (1 x 1) channels`."""
    text, axes = str(layer.channels[0]), len(layer.node.shape) - 1
    for _, part in product:
        text += f" -> {part.width}"
        if not isinstance(part.layer, Linear):
            kernel = " x ".join(map(str, part.layer.kernel(axes)))
            text += f" (depthwise {kernel})" if part.role == "depthwise" else f" ({kernel})"
    return f"{text} {'features' if layer.node.type == 'linear' else 'channels'}"
