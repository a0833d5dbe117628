"""The job of building one TensorRT engine, and its result.

Both are frozen data. They travel as JSON to and from the process that builds.
"""

from typing import Literal

from pydantic import Field

from moec.spec.data import Frozen, dtypes

#: the name of each dtype in ONNX -> its name in TensorRT
DTYPES = {onnx.lower(): theirs for onnx, theirs in dtypes("onnx", "tensorrt").items()}
#: the folder of an artefact that holds its engines
ENGINES = "engine"
#: the suffix of an engine's file name while the file is incomplete
PARTIAL = ".partial"


class Span(Frozen):
    """The shapes that a TensorRT engine takes for one input.

    `min` is the smallest, `max` the largest; TensorRT tunes the engine for `opt`.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Job(Frozen):
    """One TensorRT engine to build.

    Attributes:
        onnx: path of the ONNX file to read.
        engine: path of the engine file to write.
        package: the Python package that builds.
        architectures: the GPUs to build for, such as "SM89"; only TensorRT-RTX can choose. () means
            the GPU of this machine.
        profiles: optimisation profiles; each gives the shapes of every input that has a symbolic
            size.
        attentions: the number of attention layers in the graph.
        decomposable: whether TensorRT may run attention without a fused kernel, as float32 needs.
        masked: whether the attention layers take a mask.
        inputs, outputs: dtypes by name, in ONNX's spelling and in lower case.
        plugins: paths of libraries to load.
        weights: the folder of the ONNX file's external data; None: the ONNX file's own folder.
    """

    onnx: str
    engine: str
    package: Literal["tensorrt", "tensorrt_rtx"]
    architectures: tuple[str, ...] = ()
    profiles: tuple[dict[str, Span], ...] = ()
    attentions: int
    decomposable: bool
    masked: bool = True
    inputs: dict[str, str]
    outputs: dict[str, str]
    plugins: tuple[str, ...] = ()
    weights: str | None = None


class Built(Frozen):
    """The result of a build.

    Attributes:
        size: bytes of the engine file.
        seconds: duration of each stage, by name.
        peak_bytes: the most memory that the building process held.
        layers: the number of layers in the network before TensorRT fuses layers.
        layer_types: the number of these layers of each type.
        precisions: the number of their outputs of each dtype.
        messages: TensorRT's warnings, without those known to be harmless.
    """

    package: str
    version: str
    architectures: tuple[str, ...]
    size: int
    seconds: dict[str, float]
    peak_bytes: int
    layers: int
    layer_types: dict[str, int]
    precisions: dict[str, int]
    messages: tuple[str, ...] = Field(default=())
