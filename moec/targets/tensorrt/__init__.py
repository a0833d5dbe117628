"""Target `tensorrt`: ONNX and engines for TensorRT 11, with moec's MoE plugin."""

from moec.artefact.targets import Precision, Target

TARGET = Target(
    name="tensorrt",
    precisions={
        "bf16": Precision("tensorrt", None, "bf16"),
        "fp8": Precision("tensorrt", "tensorrt", "bf16"),
        "fp16": Precision("tensorrt", None, "fp16"),
        "fp32": Precision("tensorrt", None, "fp32"),
    },
    builder="moec.targets.tensorrt.build:BUILDER",
    engines={
        "tensorrt": "moec.runtime.engines.tensorrt.run:ENGINE",
        "interpreter": "moec.runtime.engines.interpreter:ENGINE",
    },
    proofs={"cpu": "interpreter", "cuda": "interpreter"},
    scheme="mixed",
    # A proof does not run the plugin's kernels, but the model must have sizes that they take
    # (`moec.kernels.sizes.SMALLEST`).
    reduced={"tensorrt-plugin": {"block": 32}},
)
