"""The graphs that a model is made of: the decoder, and the vision tower where there is one."""

from torch import fx

from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.vision import build_vision
from moec.spec.model import ModelSpec

#: part -> its builder; an artefact holds each as PART.onnx
BUILDERS = {"model": build_decoder, "vision": build_vision}


def parts_of(spec: ModelSpec) -> tuple[str, ...]:
    """The parts that `spec` has."""
    return ("model", "vision") if spec.vision else ("model",)


def build_parts(spec: ModelSpec, precision: str = "fp32") -> dict[str, fx.GraphModule]:
    """Every graph of `spec`, by part."""
    return {part: BUILDERS[part](spec, precision) for part in parts_of(spec)}
