"""Target `ort`: ONNX Runtime's own operators, and a folder for onnxruntime-genai."""

from moec.artefact.targets import Precision, Target

#: each width must be a multiple of a quantisation block (`moec.exporters.onnx.experts.ort.BLOCK`)
_BLOCKS = {"block": 64}

TARGET = Target(
    name="ort",
    precisions={
        "fp32": Precision("ort", "ort-packed", "fp32"),
        "fp16": Precision("ort", "ort-packed", "fp16"),
        "bf16": Precision(None, "ort-packed", "bf16"),
        "fp8": Precision("ort", "ort", "fp32"),
        "int8": Precision(None, "ort-int8", "fp32"),
        "int4": Precision(None, "ort-int4", "fp32"),
    },
    builder="moec.targets.ort.build:BUILDER",
    engines={"onnxruntime": "moec.runtime.engines.ort:ENGINE"},
    # The first precision of a device is its default. fp16 with packed weights runs on both.
    devices={
        "cpu": dict.fromkeys(("fp32", "fp16", "fp8", "int8", "int4"), "ort"),
        "cuda": {"fp8": "ort-cuda", "bf16": "ort"},
    },
    reduced={"ort-int8": _BLOCKS, "ort-int4": _BLOCKS},
)
