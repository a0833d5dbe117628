"""Build the TensorRT engines of an artefact: one job for each part, and a record of the result."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
import torch

from moec.artefact.engine_job import ENGINES, Job, Span
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Engine
from moec.artefact.placement import Progress
from moec.exporters.tensorrt.api import PACKAGES
from moec.exporters.tensorrt.engine import build_engine
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.names import RING, is_input, slots

if TYPE_CHECKING:
    from moec.exporters.tensorrt.plugin.build import Plugin

Package = Literal["tensorrt", "tensorrt_rtx"]
#: the folder, among an artefact's engines, of the plugin's sources and library
PLUGIN = "plugin"


def check_weight_inputs(options: EngineOptions, dialect: str) -> None:
    """Refuse weights inside an engine whose plugin takes them as inputs.

    Raises:
        MoecError: names the choices that there are.
    """
    if dialect == "tensorrt-plugin" and options.bindings == "none":
        refuse(
            "--bindings none",
            "the plugin runs the experts, and takes their joined weights as inputs",
            "--bindings experts or all",
            "choose one of them, or use --scheme static",
        )


def need_package(package: Package) -> None:
    """Refuse to start without the package that builds TensorRT engines.

    Raises:
        MoecError: the package is not installed (exit code 3).
    """
    if find_spec(package) is None:
        title, install = PACKAGES[package]
        refuse(
            title,
            "not installed",
            f"the package {package}",
            f"{install}, or add --no-engine and build the engine elsewhere: moec engine",
            exit_code=3,
        )


def build_engines(
    package: Package,
    models: Mapping[str, ir.Model],
    path: Path,
    folder: Path,
    root: Path | None,
    spec: ModelSpec,
    options: EngineOptions,
    progress: Progress,
) -> dict[str, Engine]:
    """Build the TensorRT engine `folder`/PART.engine of each `path`/PART.onnx.

    External data is below `root`. If a model uses the MoE plugin, it is built in `folder` too. The
    recorded paths are those in the finished artefact, where `folder` is called ENGINES.

    Raises:
        MoecError: see `build_engine`; or the plugin cannot be built here (exit code 3).
    """
    done = {}
    for part, model in models.items():
        job = job_of(model, part, path, folder, root, spec, options, package)
        if wants_plugin_library(model):
            library = _library(plugin_of(folder, spec, options, package))
            job = job.model_copy(update={"plugins": (library,)})
        built = build_engine(job, progress)
        if not built.architectures and torch.cuda.is_available():
            here = "SM{}{}".format(*torch.cuda.get_device_capability())
            built = built.model_copy(update={"architectures": (here,)})
        places = (
            f"{ENGINES}/{Path(each).relative_to(folder).as_posix()}"
            for each in (job.engine, *job.plugins)
        )
        file, *plugins = places
        done[part] = Engine(
            file=file, built=built, bindings=weight_inputs_of(model), plugins=tuple(plugins)
        )
    return done


def weight_inputs_of(model: ir.Model) -> tuple[str, ...]:
    """The names of the weights that are inputs of `model`."""
    return tuple(str(each.name) for each in model.graph.inputs if not is_input(str(each.name)))


def wants_plugin_library(model: ir.Model) -> bool:
    """Whether a node of `model` needs the MoE plugin."""
    return any(node.op_type == "MoecMoe" for node in model.graph)


def plugin_of(folder: Path, spec: ModelSpec, options: EngineOptions, package: Package) -> "Plugin":
    """Write the sources of the MoE plugin for the sizes of `spec` to `folder`, and compile them.

    If they cannot be compiled here, the result says why.

    Raises:
        MoecError: Triton is not installed (exit code 3), or there are no kernels for these sizes.
    """
    if find_spec("triton") is None:
        refuse(
            "the MoE plugin",
            "no package triton",
            "triton, which compiles the plugin's kernels",
            "pip install triton, or use --scheme static",
            exit_code=3,
        )
    from moec.exporters.tensorrt.plugin.build import compile_plugin
    from moec.kernels.launches.launch import SHARED
    from moec.kernels.sizes import Sizes

    experts = spec.text.experts
    assert experts is not None  # they are what the plugin runs
    sizes = Sizes(spec.text.dim, experts.hidden, experts.count)
    wanted = [int(name.removeprefix("SM")) for name in options.architectures]
    known = [each for each in wanted if each in SHARED] if package == "tensorrt_rtx" else [*SHARED]
    max_tokens = max(options.piece, options.batch)
    return compile_plugin([sizes], max_tokens, known, folder / PLUGIN)


def _library(found: "Plugin") -> str:
    if found.library is None:
        refuse(
            "the MoE plugin",
            found.why,
            "TensorRT's headers and a C++ compiler",
            "install what is missing; TENSORRT_INCLUDE names the folder of NvInferRuntime.h, CXX "
            "the compiler; or use --scheme static",
            exit_code=3,
        )
    return str(found.library)


def job_of(
    model: ir.Model,
    part: str,
    path: Path,
    folder: Path,
    root: Path | None,
    spec: ModelSpec,
    options: EngineOptions,
    package: Package,
) -> Job:
    """The job that builds the TensorRT engine of a part."""
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    return Job(
        onnx=str(path / f"{part}.onnx"),
        engine=str(folder / f"{part}.engine"),
        package=package,
        architectures=options.architectures if package == "tensorrt_rtx" else (),
        profiles=profiles_of(model, part, spec, options),
        attentions=len(attentions),
        masked=part == "model",
        decomposable=True,
        inputs=_dtypes(model.graph.inputs),
        outputs=_dtypes(model.graph.outputs),
        weights=str(root) if root else None,
    )


def profiles_of(
    model: ir.Model, part: str, spec: ModelSpec, options: EngineOptions
) -> tuple[dict[str, Span], ...]:
    """The optimisation profiles of a part.

    The vision tower has one, over the number of image tiles. The decoder has two: the first for
    decoding one token of each sequence, the second for one prefill chunk of a single sequence.
    """
    if part == "vision":
        return (_spans(model, {"tiles": (1, 1, options.tiles)}),)
    chunk = min(options.piece, options.slots(spec)[slots(RING)])
    decode = {"sequence": (1, 1, 1), "logits": (1, 1, 1), "image_tokens": (0, 0, 0)}
    decode["batch"] = (1, 1, options.batch)
    prefill = {"sequence": (1, chunk, chunk), "logits": (1, 1, chunk), "batch": (1, 1, 1)}
    prefill["image_tokens"] = (0, 0, chunk)
    return _spans(model, decode), _spans(model, prefill)


def _spans(model: ir.Model, sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, Span]:
    """The smallest, usual and largest shape of each input of `model` that has a symbolic size.

    `sizes` gives these three values for each symbol.
    """
    found = {}
    for each in model.graph.inputs:
        dims = [d.value if isinstance(d, ir.SymbolicDim) else d for d in each.shape or ()]
        if any(isinstance(dim, str) for dim in dims):
            small, usual, large = (
                tuple(sizes[dim][i] if isinstance(dim, str) else int(dim or 0) for dim in dims)
                for i in range(3)
            )
            found[str(each.name)] = Span(min=small, opt=usual, max=large)
    return found


def _dtypes(values: Iterable[ir.Value]) -> dict[str, str]:
    return {str(each.name): each.dtype.name.lower() for each in values if each.dtype}
