"""All presets by name, and the layers of one for given data."""

from __future__ import annotations

from app.errors import Fault, InvalidSpec
from app.network.presets.branching import BRANCHING
from app.network.presets.mobile import MOBILES
from app.network.presets.plain import PLAIN
from app.network.presets.preset import Layers, Preset
from app.network.presets.resnet import RESNETS
from app.network.presets.signals import SIGNALS
from app.network.presets.vgg import VGGS

PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (*PLAIN, *RESNETS, *VGGS, *MOBILES, *BRANCHING, *SIGNALS)
}


def preset_layers(name: str, input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> Layers:
    """The layers, as JSON values, of preset `name` for inputs `(C, *spatial)`; `width` scales every hidden width.

    Raises InvalidSpec at `/model/input_shape` if the preset takes another number of axes or larger inputs.
    """
    preset = PRESETS[name]
    spatial = input_shape[1:]
    if len(spatial) not in preset.axes:
        taken = " or ".join(f"{axes}-D" for axes in preset.axes)
        message = (
            f"{name} takes {taken} inputs, but {list(input_shape)} (channels first) has {len(spatial)} spatial axes"
        )
        raise InvalidSpec([Fault("/model/input_shape", message, limit=preset.axes[-1], value=len(spatial))])
    if min(spatial) < preset.smallest:
        message = (
            f"{name} needs every spatial size to be at least {preset.smallest}, but the input is {list(input_shape)}"
        )
        raise InvalidSpec([Fault("/model/input_shape", message, limit=preset.smallest, value=min(spatial))])
    return preset.layers(input_shape, classes, width)
