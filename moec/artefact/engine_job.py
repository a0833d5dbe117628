"""What an engine is built from, and what came of it: frozen data that travels as JSON."""

from typing import Literal

from pydantic import Field

from moec.spec.frozen import Frozen

#: names of dtypes in ONNX -> in TensorRT. What is missing here TensorRT lacks, or widens unasked:
#: uint8 weights become int32, float64 becomes float32.
DTYPES = {
    "float": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "float8e4m3fn": "FP8",
    "float4e2m1": "FP4",
    "int4": "INT4",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}


#: the folder of an artefact that holds its engines
ENGINES = "engine"
#: what the name of an engine has behind it while it is not whole
PARTIAL = ".partial"


class Span(Frozen):
    """The shapes of one input that an engine takes: smallest, the one to tune for, largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Job(Frozen):
    """One engine to build.

    Attributes:
        onnx, engine: paths; external data of the model lies below `weights`, by default beside it.
        architectures: the GPUs to build for, such as "SM89", which TensorRT-RTX alone can; () is
            the GPU here.
        profiles: optimisation profiles; each spans every input whose shape is not fixed.
        attentions: how many attention layers the graph has, each with a mask where `masked`, and
            without a fused kernel where `decomposable`, which float32 needs.
        inputs, outputs: dtypes by name, as ONNX spells them in lower case.
        plugins: libraries to load.
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
    """How a build went.

    `size` is the engine's bytes, `seconds` those of each stage, `peak_bytes` the most that the
    building process held. `layers` are the network's before TensorRT fuses them, `layer_types`
    counts them by kind, `precisions` the dtypes of what they give. `messages` are warnings that
    say something.
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
