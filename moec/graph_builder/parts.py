"""The graphs that a model is made of: the decoder, and the vision tower where there is one."""

from torch import fx

from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.passes.quantize import quantize
from moec.graph_builder.vision import build_vision
from moec.spec.model import ModelSpec

#: part -> its builder; an artefact holds each as PART.onnx
_BUILDERS = {"model": build_decoder, "vision": build_vision}


def parts_of(spec: ModelSpec) -> tuple[str, ...]:
    """The parts that `spec` has."""
    return ("model", "vision") if spec.vision else ("model",)


def build_graph(spec: ModelSpec, precision: str = "fp32", part: str = "model") -> fx.GraphModule:
    """A part of `spec`, computing in `precision`, weights on meta as they are stored.

    The decoder's inputs and outputs are in `moec.graph_builder.decoder`. With a scheme, FP8 codes
    and scales stand in place of the weights that it names.
    """
    return quantize(_BUILDERS[part](spec, precision), spec)


def build_parts(spec: ModelSpec, precision: str = "fp32") -> dict[str, fx.GraphModule]:
    """Every graph of `spec`, by part."""
    return {part: build_graph(spec, precision, part) for part in parts_of(spec)}
