"""The size and work of the presets that papers and libraries print, for docs/zoo.md; tests compare our own figures."""

from __future__ import annotations

from dataclasses import dataclass

from app.network.presets.preset import CIFAR, IMAGENET


@dataclass(frozen=True)
class Published:
    """The figures of preset `preset` at `(C, *spatial)` and K classes, as printed: "11,689,512", "0.85 M", "3.13e8".

    `more_params` and `more_macs` are what the source counts and we do not, as `note` says: it prints ours and those.
    None: the source does not print it.
    """

    preset: str
    input_shape: tuple[int, ...]
    classes: int
    params: str | None
    macs: str | None
    source: str
    note: str = ""
    more_params: int = 0
    more_macs: int = 0


_HE = "He et al. 2015, arXiv 1512.03385, table 6"
_HRANK = "MACs: Lin et al. 2020 (HRank, arXiv 2002.10179), named FLOPs"
_TORCHVISION = "torchvision 0.28, metadata of its pre-trained weights"
_DA2LITE = "model zoo of DA2Lite (github.com/da2so/DA2Lite)"
_BIASES = "torchvision's convolutions have biases, which the batch norm after them removes again"

PUBLISHED = (
    Published("resnet20", CIFAR, 10, "0.27 M", None, _HE),
    Published("resnet32", CIFAR, 10, "0.46 M", None, _HE),
    Published("resnet56", CIFAR, 10, "0.85 M", "125.49 M", f"{_HE}; {_HRANK}"),
    Published("resnet110", CIFAR, 10, "1.7 M", "252.89 M", f"{_HE}; {_HRANK}"),
    Published("resnet18", IMAGENET, 1000, "11,689,512", "1.814 G", _TORCHVISION),
    Published("resnet34", IMAGENET, 1000, "21,797,672", "3.664 G", _TORCHVISION),
    Published("resnet50", IMAGENET, 1000, "25,557,032", "4.089 G", _TORCHVISION),
    Published("resnet18", CIFAR, 10, "11.17 M", "0.56 G", _DA2LITE, "the stem for small inputs"),
    Published("resnet50", CIFAR, 10, "23.52 M", "1.30 G", _DA2LITE, "the stem for small inputs"),
    Published("vgg11", IMAGENET, 1000, "132,868,840", "7.609 G", _TORCHVISION, _BIASES, 2_752),
    Published("vgg16", IMAGENET, 1000, "138,365,992", "15.47 G", _TORCHVISION, _BIASES, 4_224),
    Published("vgg19", IMAGENET, 1000, "143,678,248", "19.632 G", _TORCHVISION, _BIASES, 5_504),
    Published("vgg16", CIFAR, 10, "1.5e7", "3.13e8", "Li et al. 2016, arXiv 1608.08710, table 1"),
    Published("vgg19", CIFAR, 10, "20.04 M", "0.40 G", _DA2LITE),
    Published("mobilenet_v1", IMAGENET, 1000, "4.2 M", "569 M", "Howard et al. 2017, arXiv 1704.04861, table 8"),
    Published("mobilenet_v2", IMAGENET, 1000, "3,504,872", "0.301 G", _TORCHVISION),
    Published(
        "efficientnet_lite0",
        IMAGENET,
        1000,
        "4.65 M",
        "0.40 G",
        "timm (results/benchmark-infer-amp-nhwc-pt113-cu117-rtx3090.csv)",
        "timm counts 2 for each output of a batch norm; the authors print 4.7 M parameters and 407 M multiply-adds and "
        "do not say what they count",
        more_macs=2 * 6_737_696,
    ),
    Published(
        "densenet40",
        CIFAR,
        10,
        "1.0 M",
        None,
        "Huang et al. 2016, arXiv 1608.06993, table 2",
        "what pruning papers print (up to 1.06 M parameters, 283 M multiply-accumulates) is of a network that begins "
        "with 24 channels; the paper's begins with 16",
    ),
    Published("shufflenet_v2", IMAGENET, 1000, "2,278,604", "0.145 G", f"{_TORCHVISION} (shufflenet_v2_x1_0)"),
    Published(
        "inception_small",
        (3, 28, 28),
        10,
        "1,649,402",
        None,
        "Zhang et al. 2016, arXiv 1611.03530, table 1",
        "the paper counts one number for each output of a convolution, as many as its variant without batch norm has; "
        "batch norm has a weight and a bias",
        more_params=-1_712,
    ),
    Published("squeezenet", IMAGENET, 1000, "1,235,496", "0.349 G", f"{_TORCHVISION} (squeezenet1_1)"),
)
UNPUBLISHED = {
    "simple_cnn": "no paper",
    "deep_cnn": "no paper",
    "lenet5": "the paper's second convolution reads only some of the maps; 61,706 parameters with all of them",
    "unet_encoder": "no figure for the contracting path alone; a test counts the layers of the paper's figure 1",
    "audio_cnn": "a quarter of the paper's channels",
    "video_cnn": "far smaller than the paper's network",
}
"""Why a preset has no published figure."""
