"""Write the generated documents: docs/settings.md from app/settings.py, docs/zoo.md from the presets.

Run: .venv/bin/python script/docs.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.network.cost import Cost, cost
from app.network.graph import build_graph
from app.network.layers.registry import read_layers
from app.network.presets.published import PUBLISHED, UNPUBLISHED, Published
from app.network.presets.registry import preset_layers
from app.settings import Settings
from app.spec.catalogue import preset_catalogue

ROOT = Path(__file__).resolve().parent.parent


def settings_page() -> str:
    """The settings as a Markdown table."""
    rows = [
        f"| `ESPALIER_{name.upper()}` | `{field.default}` | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(
        [
            "# Settings",
            "",
            "Environment variables, read once when a process starts. This page is made by `script/docs.py`.",
            "",
            "| variable | default | what it is |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


_ZOO = """# The zoo

Networks by name: `"model": {{"preset": "resnet18", "width": 0.5}}`. This page is made by `script/docs.py`; `GET /v1/presets`
says the same as its first table. `input_shape` and `classes` are the data's unless stated; `width` scales every hidden number of
channels (from 16 up to multiples of 8). A preset takes any size from its smallest on. **Networks for ImageNet have a stem for small
inputs**: below 64 on a side the first two steps that halve the size are left out, as is usual for ResNets on CIFAR; from 64 on they
are the networks of their papers.

## What there is

Cost at the input and the class count that each is known for; *smallest* is the least size of the spatial axes.

{presets}
## Published and ours

Parameters are all trained numbers; MACs are the multiply-accumulates of convolutions and linear layers. A test holds our figures to
the published ones, to the last digit that is printed. Where a source counts something else, *ours, counted alike* says what it
would print, and the last column what the difference is.

{published}
Without a published figure: {unpublished}.
"""


def zoo_page() -> str:
    """Every preset with its cost, and our figures beside the published ones, in Markdown."""
    presets = [
        "| preset | smallest | input | classes | layers | parameters | MACs | what it is | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in preset_catalogue():
        cells = [
            f"`{entry['name']}`",
            _size([entry["smallest_size"]] * entry["spatial_axes"][-1]),
            _size(entry["input_shape"]),
            *(f"{number:,}" for number in (entry["classes"], entry["layers"])),
            *(f"{entry['cost'][measure]:,}" for measure in ("params", "macs")),
            entry["description"],
            entry["source"],
        ]
        presets.append(_row(cells))
    rows = ["| preset | input | classes | published | ours | ours, counted alike | source | what it counts |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    rows += [_comparison(figure) for figure in PUBLISHED]
    return _ZOO.format(
        presets="\n".join([*presets, ""]),
        published="\n".join([*rows, ""]),
        unpublished="; ".join(f"`{name}` ({why})" for name, why in UNPUBLISHED.items()),
    )


def _comparison(figure: Published) -> str:
    layers = read_layers(preset_layers(figure.preset, figure.input_shape, figure.classes))
    ours: Cost = cost(build_graph(layers, figure.input_shape, classes=figure.classes))
    alike = f"{ours.params + figure.more_params:,}; {ours.macs + figure.more_macs:,} MACs"
    cells = [
        f"`{figure.preset}`",
        _size(figure.input_shape),
        f"{figure.classes:,}",
        f"{figure.params or 'none'}; {f'{figure.macs} MACs' if figure.macs else 'no MACs'}",
        f"{ours.params:,}; {ours.macs:,} MACs",
        alike if figure.more_params or figure.more_macs else "the same",
        figure.source,
        figure.note,
    ]
    return _row(cells)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


PAGES = {"settings.md": settings_page, "zoo.md": zoo_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page())
        print(f"docs: wrote {ROOT / 'docs' / name}")
