"""Graph -> an ONNX file: passes, lower, tidy, check, bind, save."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from torch import fx

from moec.artefact.manifest import Port
from moec.exporters.onnx.external_data import bind
from moec.exporters.onnx.lowering import Lowered, Rule, lower
from moec.exporters.onnx.ort import ORT, ORT_INT4, ORT_INT8, ORT_PACKED
from moec.exporters.onnx.standard import OPSET, STANDARD
from moec.exporters.onnx.tensorrt import TENSORRT
from moec.graph_builder.parts import build_graph, parts_of
from moec.graph_builder.passes.buffers import keep_buffers
from moec.graph_builder.passes.genai import genai_inputs
from moec.graph_builder.passes.skip_norm import join_skip_norms
from moec.spec.model import ModelSpec
from moec.weights.shard import TensorEntry

Pass = Callable[[fx.GraphModule], fx.GraphModule]

#: the decoder once more, with the inputs that onnxruntime-genai feeds
GENAI = "genai/model"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How graphs become ONNX: passes over each part first, then a table of rules.

    `parts` are files beside those of the spec. A dialect that `packs` has weights of its own
    layout, which are written once; others point into the checkpoint.
    """

    rules: Sequence[Rule]
    passes: Mapping[str, Sequence[Pass]]
    packs: bool = False
    vision: Sequence[Rule] | None = None


_ORT_PASSES: dict[str, Sequence[Pass]] = {
    "model": (keep_buffers, join_skip_norms),
    GENAI: (keep_buffers, join_skip_norms, genai_inputs),
}
DIALECTS = {
    "standard": Dialect(STANDARD, {}),
    "tensorrt": Dialect(TENSORRT, {}),
    "ort": Dialect(ORT, _ORT_PASSES),
    "ort-packed": Dialect(ORT_PACKED, _ORT_PASSES, packs=True),
    # The tower stays as precise as it was: it runs once a prompt, and all tokens build on it.
    "ort-int8": Dialect(ORT_INT8, _ORT_PASSES, packs=True, vision=ORT_PACKED),
    "ort-int4": Dialect(ORT_INT4, _ORT_PASSES, packs=True, vision=ORT_PACKED),
}


def graphs_of(spec: ModelSpec, precision: str, dialect: str) -> dict[str, fx.GraphModule]:
    """Every graph of an artefact in `dialect`, by part; each is the file PART.onnx."""
    passes = DIALECTS[dialect].passes
    graphs = {}
    for part in (*parts_of(spec), *(each for each in passes if each == GENAI)):
        graphs[part] = build_graph(spec, precision, "model" if part == GENAI else part)
        for change in passes.get(part, ()):
            graphs[part] = change(graphs[part])
    return graphs


def lower_model(graph: fx.GraphModule, dialect: str, name: str, part: str = "model") -> Lowered:
    """`graph` in `dialect`, weights unbound. Shape arithmetic that layers repeat is shared."""
    chosen = DIALECTS[dialect]
    rules = chosen.vision if part == "vision" and chosen.vision else chosen.rules
    lowered = lower(graph, rules, OPSET, name, chosen.packs)
    CommonSubexpressionEliminationPass()(lowered.model)
    return lowered


def save_checked(model: ir.Model, path: Path) -> None:
    """Write the unbound `model` to `path`; run ONNX's checker.

    Shape inference is included where it can see through the model: it knows no operator of
    ONNX Runtime's own, and on hundreds of nested branches it takes half of a build.
    """
    path.parent.mkdir(exist_ok=True)
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=set(model.opset_imports) == {""})


def save_bound(model: ir.Model, path: Path, entries: Mapping[str, TensorEntry], root: Path) -> None:
    """Bind `model` to `entries` below `root` and write it; no weight bytes are written."""
    bind(model, entries, root)
    path.parent.mkdir(exist_ok=True)
    ir.save(model, path)


def ports(values: Sequence[ir.Value]) -> tuple[Port, ...]:
    """The manifest's view of graph inputs or outputs."""
    return tuple(
        Port(
            name=each.name or "",
            dtype=each.dtype.name.lower() if each.dtype else "",
            shape=tuple(
                str(dim.value) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in each.shape or ()
            ),
        )
        for each in values
    )
