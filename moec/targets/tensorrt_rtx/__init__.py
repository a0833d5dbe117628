"""Target `tensorrt-rtx`: like `tensorrt`, for TensorRT-RTX, which builds without a GPU."""

from dataclasses import replace

from moec.targets import tensorrt

TARGET = replace(
    tensorrt.TARGET,
    name="tensorrt-rtx",
    builder="moec.targets.tensorrt_rtx.build:BUILDER",
    scheme="static",
)
