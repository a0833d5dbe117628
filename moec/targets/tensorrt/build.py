"""How target `tensorrt` builds: ONNX for TensorRT's parser, and engines if TensorRT is there."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from torch import fx

from moec.artefact.engine_options import EngineOptions
from moec.artefact.placement import Bound
from moec.exporters.builder import Compiler, Wanted
from moec.exporters.tensorrt import onnx_model
from moec.exporters.tensorrt.build import build_engines, check_weight_inputs, need_package
from moec.exporters.tensorrt.support import check_expressible, wants_plugin
from moec.exporters.tensorrt.trtexec import commands
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.targets.onnx.build import BUILDER as ONNX
from moec.weights.packing import Packing


def check(wanted: Wanted) -> None:
    """Refuse a model that neither TensorRT's operators nor the plugin can express.

    Raises:
        MoecError: the message names the field of the spec, its value, and the values allowed.
    """
    check_expressible(wanted.spec, wanted.precision)


def dialect(chosen: str, spec: ModelSpec) -> str:
    """The dialect with the MoE plugin if only it can run the scheme's experts, else `chosen`."""
    return "tensorrt-plugin" if wants_plugin(spec) else chosen


def graphs(wanted: Wanted) -> dict[str, fx.GraphModule]:
    """The graph of each part, with caches of the engines' sizes."""
    return onnx_model.graphs_of(wanted.spec, wanted.compute, wanted.dialect, wanted.options)


def lower(wanted: Wanted, graph: fx.GraphModule, part: str) -> tuple[ir.Model, dict[str, Packing]]:
    """Lower `graph` to ONNX, and remove the inputs and nodes that nothing uses."""
    return onnx_model.lower(graph, f"{wanted.spec.name} {part}", part)


def save(model: ir.Model, path: Path, bound: Bound, options: EngineOptions) -> None:
    """Make weights refer to their files, except those that engines take as inputs."""
    onnx_model.save_bound(model, path, bound.entries, bound.root, options.bindings)


def check_options(options: EngineOptions, dialect: str) -> EngineOptions:
    """Refuse a choice of GPUs: TensorRT builds for the GPU of this machine.

    Raises:
        MoecError: the options name GPUs, or weight inputs that the dialect does not have.
    """
    if options.architectures:
        refuse(
            "--sm",
            f"{', '.join(options.architectures)}, with --target tensorrt",
            "the GPU where the engine is built, which is the one that it runs on",
            "leave --sm out, or use --target tensorrt-rtx",
        )
    check_weight_inputs(options, dialect)
    return options


def compiler(package: Literal["tensorrt", "tensorrt_rtx"]) -> Compiler:
    """The compiler that builds TensorRT engines with `package`."""
    return Compiler(
        need=partial(need_package, package),
        check=check_options,
        build=partial(build_engines, package),
    )


BUILDER = replace(
    ONNX,
    dialects=onnx_model.DIALECTS,
    check=check,
    dialect=dialect,
    graphs=graphs,
    lower=lower,
    packings=onnx_model.packings_of,
    save_bound=save,
    ports=onnx_model.ports_of,
    compiler=replace(compiler("tensorrt"), commands=commands),
)
