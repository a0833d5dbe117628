"""The graphs of a model: the decoder, and what it may have beside it.

That is a vision tower and a layer of multi-token prediction.
"""

from torch import fx

from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.passes.quantize import quantize
from moec.graph_builder.vision import build_vision
from moec.spec.model import ModelSpec
from moec.spec.mtp.model import mtp_of


def _build_mtp(spec: ModelSpec, precision: str) -> fx.GraphModule:
    return build_decoder(mtp_of(spec), precision)


#: part -> the function that builds it; an artefact has a file for each part
BUILDERS = {"model": build_decoder, "vision": build_vision, "mtp": _build_mtp}


def parts_of(spec: ModelSpec) -> tuple[str, ...]:
    """The names of the parts of `spec`."""
    further = {"vision": spec.vision is not None, "mtp": spec.text.mtp == "built"}
    return ("model", *(part for part, there in further.items() if there))


def build_graph(spec: ModelSpec, precision: str = "fp32", *, part: str = "model") -> fx.GraphModule:
    """Build the torch.fx graph of a model, with its weights on the meta device.

    The decoder's inputs and outputs are in `moec.graph_builder.decoder`. If the spec has an FP8
    scheme, FP8 values and their scales stand in place of the weights that it names.

    Args:
        spec: the model.
        precision: what the graph computes in: "fp32", "fp16" or "bf16".
        part: "model" (the decoder), "vision" (the vision tower) or "mtp" (the layer of multi-token
            prediction).
    """
    return quantize(BUILDERS[part](spec, precision), spec)


def build_parts(spec: ModelSpec, precision: str = "fp32") -> dict[str, fx.GraphModule]:
    """Build every graph of `spec`; the result is by part."""
    return {part: build_graph(spec, precision, part=part) for part in parts_of(spec)}
