"""Target `onnx`: ONNX's standard operators, for any runtime that supports them."""

from moec.artefact.targets import Precision, Target

TARGET = Target(
    name="onnx",
    precisions={
        "fp32": Precision("standard", None, "fp32"),
        "fp16": Precision("standard", None, "fp16"),
        "bf16": Precision("standard", None, "bf16"),
        "fp8": Precision("standard", "standard", "fp32"),
        "int4": Precision("standard", None, "fp32", given=True),
    },
    builder="moec.targets.onnx.build:BUILDER",
    engines={"onnxruntime": "moec.runtime.engines.ort:ENGINE"},
)
