"""How each target makes files of graphs: one row of functions a target."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import fx

from moec.exporters.artefact import Artefact
from moec.exporters.manifest import Ports, Preset
from moec.exporters.onnx.ort import check_sizes
from moec.exporters.onnx.standard import OPSET
from moec.exporters.onnx.write import (
    DIALECTS,
    graphs_of,
    lower_model,
    ports,
    save_bound,
    save_checked,
)
from moec.exporters.precision import fp8_packings
from moec.exporters.presets import presets
from moec.exporters.targets import BITS
from moec.exporters.torch import program
from moec.graph_builder.passes.fusible import check_fusible
from moec.spec.model import ModelSpec
from moec.weights.fused import fused_packings
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry

#: what a target makes of a graph: an `ir.Model`, a `Program`
Model = Any


@dataclass(frozen=True, slots=True)
class Backend:
    """The functions of a target, in the order in which a build calls them.

    `check` refuses a spec in a precision, `graphs` gives a graph for each part, in a precision and
    dialect, `lower` (graph, dialect, name, part) the model of one and how it wants weights stored,
    `fp8_packings` how wide weights become FP8. `load` takes the model of an artefact's part up
    again. Models are saved before weights are known, and (model, path, entries, root) after.
    """

    dialects: Collection[str]
    check: Callable[[ModelSpec, str], None]
    graphs: Callable[[ModelSpec, str, str], dict[str, fx.GraphModule]]
    lower: Callable[[fx.GraphModule, str, str, str], tuple[Model, dict[str, Packing]]]
    fp8_packings: Callable[[ModelSpec], dict[str, Packing]]
    load: Callable[[Artefact, str], Model]
    save_unbound: Callable[[Model, Path], None]
    save_bound: Callable[[Model, Path, Mapping[str, TensorEntry], Path], None]
    ports: Callable[[Model], Ports]
    presets: Callable[[bool, bool], dict[str, Preset]]
    opset: int | None = None


def _lower_onnx(
    graph: fx.GraphModule, dialect: str, name: str, part: str
) -> tuple[ir.Model, dict[str, Packing]]:
    lowered = lower_model(graph, dialect, name, part)
    return lowered.model, lowered.packings


_ONNX = Backend(
    dialects=DIALECTS,
    check=lambda spec, precision: None,
    graphs=graphs_of,
    lower=_lower_onnx,
    fp8_packings=fp8_packings,
    load=lambda artefact, part: ir.load(artefact.graph(part)),
    save_unbound=save_checked,
    save_bound=save_bound,
    ports=lambda model: Ports(inputs=ports(model.graph.inputs), outputs=ports(model.graph.outputs)),
    presets=presets,
    opset=OPSET,
)

BACKENDS = {
    "onnx": _ONNX,
    "ort": replace(_ONNX, check=lambda spec, precision: check_sizes(spec, BITS.get(precision))),
    "torch": Backend(
        dialects=("torch",),
        check=lambda spec, precision: check_fusible(spec),
        graphs=lambda spec, precision, dialect: program.graphs_of(spec, precision),
        lower=lambda graph, dialect, name, part: (program.program_of(graph), {}),
        fp8_packings=fused_packings,
        load=program.load,
        save_unbound=lambda model, path: model.save(path),
        save_bound=lambda model, path, entries, root: model.save(path),
        ports=lambda model: model.ports,
        presets=lambda quantized, fp8: {},
    ),
}
