"""What a job can ask of an 8-bit file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.spec.step import JobStep
from app.validation.strict import Text

Scheme = Literal["int8_static", "int8_vnni"]


class Quantize(JobStep):
    """Deliver an ONNX file with weights and activations of 8 bits beside the others: `pruned.int8.onnx`.

    Static (ONNX Runtime, QDQ): weights symmetric with one scale per output channel, activations with ranges measured on
    training images. With `int8_static` weights lie between -64 and 64, and the file is right on every processor. With
    `int8_vnni` they lie between -127 and 127, and the file is right only on processors with VNNI or AMX, and on ARM:
    others cut sums off, so a worker with another processor does not deliver the file. Layers that lose most are left in
    float32 until the accuracy on the validation images falls by no more than `max_accuracy_drop`; what is delivered
    keeps to it on the test images too. Where nothing does, the other files are delivered without it, and the report
    says by how much it misses. `exports` are the formats of the float32 network: they need not name onnx.
    """

    type: Literal["quantize"] = "quantize"
    scheme: Annotated[
        Scheme,
        Field(
            description="int8_static: weights of 7 bits, right on every processor. "
            "int8_vnni: weights of 8 bits, right only on processors with VNNI or AMX, and on ARM."
        ),
    ] = "int8_static"
    max_accuracy_drop: Annotated[
        float,
        Field(ge=0, le=1, description="Largest loss of accuracy, as a fraction of 1, against the float32 network."),
    ] = 0.01
    calibration_images: Annotated[
        int, Field(ge=1, le=65_536, description="Training images that ranges are measured on, at most.")
    ] = 512
    exclude: Annotated[tuple[Text, ...], Field(max_length=10_000, description="Layers that stay in float32.")] = ()

    title = "8-bit integers"
    examples = (
        {"type": "quantize", "scheme": "int8_static", "max_accuracy_drop": 0.01},
        {"type": "quantize", "scheme": "int8_vnni"},
    )
    must_be_last = True
