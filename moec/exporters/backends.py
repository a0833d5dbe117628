"""How each target makes files of graphs: one row of functions a target."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import fx

from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Engine, Ports, Preset
from moec.artefact.session_options import presets
from moec.artefact.targets import BITS, PACKAGES
from moec.exporters.onnx.external_data import load_onnx
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
from moec.exporters.tensorrt import onnx_model
from moec.exporters.tensorrt.build import build_engines
from moec.exporters.tensorrt.support import check_expressible
from moec.exporters.torch import program
from moec.graph_builder.passes.torch_support import check_fusible
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.weights.joined import joined_packings
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
    `engines` (models, path, folder, root, spec, options, progress) builds into `folder` what a
    machine runs; targets without it have no options.
    """

    dialects: Collection[str]
    check: Callable[[ModelSpec, str], None]
    graphs: Callable[[ModelSpec, str, str, EngineOptions], dict[str, fx.GraphModule]]
    lower: Callable[[fx.GraphModule, str, str, str], tuple[Model, dict[str, Packing]]]
    fp8_packings: Callable[[ModelSpec], dict[str, Packing]]
    load: Callable[[Artefact, str], Model]
    save_unbound: Callable[[Model, Path], None]
    save_bound: Callable[[Model, Path, Mapping[str, TensorEntry], Path, EngineOptions], None]
    ports: Callable[[Model], Ports]
    presets: Callable[[bool, bool], dict[str, Preset]]
    opset: int | None = None
    engines: Callable[..., dict[str, Engine]] | None = None


def _lower_onnx(
    graph: fx.GraphModule, dialect: str, name: str, part: str
) -> tuple[ir.Model, dict[str, Packing]]:
    lowered = lower_model(graph, dialect, name, part)
    return lowered.model, lowered.packings


_ONNX = Backend(
    dialects=DIALECTS,
    check=lambda spec, precision: None,
    graphs=lambda spec, precision, dialect, options: graphs_of(spec, precision, dialect),
    lower=_lower_onnx,
    fp8_packings=fp8_packings,
    load=lambda artefact, part: load_onnx(artefact.graph(part)),
    save_unbound=save_checked,
    save_bound=lambda model, path, entries, root, options: save_bound(model, path, entries, root),
    ports=lambda model: Ports(inputs=ports(model.graph.inputs), outputs=ports(model.graph.outputs)),
    presets=presets,
    opset=OPSET,
)

_TENSORRT = replace(
    _ONNX,
    dialects=onnx_model.DIALECTS,
    check=check_expressible,
    graphs=onnx_model.graphs_of,
    lower=onnx_model.lower,
    fp8_packings=onnx_model.packings_of,
    save_bound=lambda model, path, entries, root, options: onnx_model.save_bound(
        model, path, entries, root, options.bindings
    ),
    ports=onnx_model.ports_of,
    presets=lambda quantized, fp8: {},
)

BACKENDS = {
    "onnx": _ONNX,
    "ort": replace(_ONNX, check=lambda spec, precision: check_sizes(spec, BITS.get(precision))),
    **{
        target: replace(_TENSORRT, engines=partial(build_engines, package=package))
        for target, package in PACKAGES.items()
    },
    "torch": Backend(
        dialects=("torch",),
        check=lambda spec, precision: check_fusible(spec),
        graphs=lambda spec, precision, dialect, options: program.graphs_of(spec, precision),
        lower=lambda graph, dialect, name, part: (program.program_of(graph), {}),
        fp8_packings=joined_packings,
        load=program.load,
        save_unbound=lambda model, path: model.save(path),
        save_bound=lambda model, path, entries, root, options: model.save(path),
        ports=lambda model: model.ports,
        presets=lambda quantized, fp8: {},
    ),
}


def backend_of(artefact: Artefact) -> Backend:
    """The functions of the target of `artefact`.

    Raises:
        MoecError: another version of moec built it.
    """
    manifest = artefact.manifest
    backend = BACKENDS.get(manifest.target)
    known = backend.dialects if backend else BACKENDS
    if (
        not backend
        or manifest.dialect not in known
        or (backend.presets(False, False) and not manifest.presets)
    ):
        refuse(
            f"{artefact.path}: dialect {manifest.dialect}",
            "built by another version of moec",
            " or ".join(known),
            "build the artefact again",
        )
    return backend
