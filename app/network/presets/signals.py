"""Networks for one and three spatial axes: waveforms, clips and volumes."""

from __future__ import annotations

from app.network.presets.blocks import averaged, conv, normed, pool, scaled
from app.network.presets.preset import Layers, Preset


def _audio_cnn(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    length = input_shape[1]
    kernel = min(80, length // 8 * 2) + 1  # odd, so that padding keeps the length; the paper's 80 is for 1 s at 8 kHz
    first = conv(scaled(32, width), kernel, stride=4, padding=kernel // 2, bias=False)
    layers: Layers = [first, {"type": "batch_norm"}, {"type": "relu"}]
    size = [(length - 1) // 4 + 1]
    layers += pool(size, [4])
    for channels in (32, 64, 128):
        layers += normed(scaled(channels, width))
        layers += pool(size, [4])
    return layers + averaged(classes)


def _video_cnn(input_shape: tuple[int, ...], classes: int, width: float) -> Layers:
    size, layers = list(input_shape[1:]), Layers()
    for stage, channels in enumerate((16, 32, 64, 128)):
        layers += normed(scaled(channels, width))
        layers += pool(size, [1 if stage == 0 else 2, 2, 2])  # C3D keeps all frames in its first stage
    return layers + averaged(classes)


SIGNALS = (
    Preset(
        "audio_cnn",
        "waveforms: a long strided convolution, three of size 3, batch norm, pooling by 4; a quarter of M5's channels",
        "M5 of Dai et al. 2016, arXiv 1610.00087",
        (1,),
        8,
        (1, 8000),
        35,
        _audio_cnn,
    ),
    Preset(
        "video_cnn",
        "clips (channels, frames, height, width) or volumes: four 3 x 3 x 3 convolutions (16 to 128), batch norm",
        "after C3D of Tran et al. 2014, arXiv 1412.0767, with batch norm and a global average",
        (3,),
        1,
        (3, 16, 32, 32),
        10,
        _video_cnn,
    ),
)
