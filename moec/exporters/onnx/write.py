"""Write a graph as an ONNX file: run passes, lower, simplify, check, set external data, save."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from torch import fx

from moec.artefact.manifest import Port
from moec.exporters.onnx.external_data import set_external_data, write_model
from moec.exporters.onnx.genai import PART
from moec.exporters.onnx.lowering import Lowered, Rule, lower
from moec.exporters.onnx.ort import ORT, ORT_GIVEN, ORT_INT4, ORT_INT8, ORT_PACKED
from moec.exporters.onnx.ort_cuda import ORT_CUDA
from moec.exporters.onnx.standard import OPSET, STANDARD
from moec.exporters.onnx.tensorrt import TENSORRT
from moec.graph_builder.parts import build_graph, parts_of
from moec.graph_builder.passes.buffers import has_buffers, keep_buffers
from moec.graph_builder.passes.genai import genai_inputs
from moec.graph_builder.passes.skip_norm import join_skip_norms
from moec.spec.model import ModelSpec
from moec.weights import joined
from moec.weights.shard import TensorEntry

Pass = Callable[[fx.GraphModule], fx.GraphModule]

#: the most nodes, branches included, whose shapes a check infers
MOST_INFERRED = 20_000
#: a further part: the decoder with the inputs that onnxruntime-genai feeds
GENAI = PART


@dataclass(frozen=True, slots=True)
class Dialect:
    """How graphs become ONNX: passes over each part, and then lowering rules.

    `passes` lists the passes of each part by its name, and may add a part. A dialect that `packs`
    has its own layout of weights, which a build writes once. The weights of other dialects stay in
    the checkpoint. `vision` has the lowering rules of the vision tower if they are not `rules`.
    """

    rules: Sequence[Rule]
    passes: Mapping[str, Sequence[Pass]]
    packs: bool = False
    vision: Sequence[Rule] | None = None


_ORT_PASSES: dict[str, Sequence[Pass]] = {
    "model": (keep_buffers, join_skip_norms),
    GENAI: (keep_buffers, join_skip_norms, genai_inputs),
    "mtp": (join_skip_norms,),
}
DIALECTS = {
    "standard": Dialect(STANDARD, {}),
    "tensorrt": Dialect(TENSORRT, {}),
    "ort": Dialect(ORT, _ORT_PASSES),
    "ort-packed": Dialect(ORT_PACKED, _ORT_PASSES, packs=True),
    # The vision tower is not quantised. It runs once for each prompt, and all tokens depend on it.
    "ort-int8": Dialect(ORT_INT8, _ORT_PASSES, packs=True, vision=ORT_PACKED),
    "ort-int4": Dialect(ORT_INT4, _ORT_PASSES, packs=True, vision=ORT_PACKED),
    "ort-given": Dialect(ORT_GIVEN, _ORT_PASSES, packs=True),
    # The passes of target torch build its graph.
    joined.ORT_CUDA: Dialect(ORT_CUDA, {}, vision=STANDARD),
}


def graphs_of(spec: ModelSpec, precision: str, dialect: str) -> dict[str, fx.GraphModule]:
    """Every graph of an artefact in `dialect`, by part. Part P is written to the file P.onnx."""
    passes = DIALECTS[dialect].passes
    if not has_buffers(spec.text):  # no operator takes such caches: plain attention runs instead
        passes = {
            part: [each for each in some if each is not keep_buffers]
            for part, some in passes.items()
            if part != GENAI
        }
    graphs = {}
    for part in (*parts_of(spec), *(each for each in passes if each == GENAI)):
        graphs[part] = build_graph(spec, precision, part="model" if part == GENAI else part)
        for change in passes.get(part, ()):
            graphs[part] = change(graphs[part])
    return graphs


def lower_model(
    graph: fx.GraphModule,
    dialect: str,
    name: str,
    part: str = "model",
    turned: frozenset[str] = frozenset(),
) -> Lowered:
    """Lower `graph` by the rules of `dialect`. Its weights are inputs without data.

    Layers share shape arithmetic that they have in common. `turned` is as in `lower`.
    """
    chosen = DIALECTS[dialect]
    rules = chosen.vision if part == "vision" and chosen.vision else chosen.rules
    lowered = lower(graph, rules, OPSET, name, chosen.packs, turned)
    CommonSubexpressionEliminationPass()(lowered.model)
    return lowered


def save_checked(model: ir.Model, path: Path) -> None:
    """Write `model`, whose weights have no data, to `path`, and run ONNX's checker on it.

    The check includes shape inference only for models of plain ONNX operators, and of at most
    `MOST_INFERRED` nodes. Shape inference does not know ONNX Runtime's own operators, and with
    thousands of branches it takes a third of the time of a build, to find in each what it found in
    the first.
    """
    path.parent.mkdir(exist_ok=True)
    write_model(model, path)
    plain = set(model.opset_imports) == {""}
    few = next(islice(model.graph.all_nodes(), MOST_INFERRED, None), None) is None
    onnx.checker.check_model(str(path), full_check=plain and few)


def save_bound(model: ir.Model, path: Path, entries: Mapping[str, TensorEntry], root: Path) -> None:
    """Write `model` to `path` with external data: its weights are `entries` in files below `root`.

    No bytes of weights are written.
    """
    set_external_data(model, entries, root)
    path.parent.mkdir(exist_ok=True)
    write_model(model, path)


def ports(values: Sequence[ir.Value]) -> tuple[Port, ...]:
    """Graph inputs or outputs as the manifest lists them: name, type and shape."""
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
