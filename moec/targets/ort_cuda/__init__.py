"""Target `ort-cuda`: FP8 in ONNX Runtime on a GPU, with moec's custom-op library.

A build of target `ort` in FP8 for device cuda is of this target.
"""

from moec.artefact.targets import Precision, Target

TARGET = Target(
    name="ort-cuda",
    precisions={"fp8": Precision("ort-cuda-fp8", "ort-cuda-fp8", "bf16")},
    builder="moec.targets.ort_cuda.build:BUILDER",
    engines={
        "onnxruntime-cuda": "moec.runtime.engines.ort_cuda.engine:ENGINE",
        "interpreter": "moec.runtime.engines.ort_cuda.interpreter:ENGINE",
    },
    proofs={"cpu": "interpreter"},  # it proves the graph, and not the library
    scheme="dynamic",
    # as for target torch, whose kernels it runs
    reduced={"ort-cuda-fp8": {"block": 128, "head_dim": 16}},
)
