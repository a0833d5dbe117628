"""The engines of an artefact: what to build for each part, and what was built."""

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
from moec.exporters.tensorrt.onnx_model import is_fed
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec

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
            "experts in the plugin, which takes their weights joined",
            "experts or all",
            "choose one of them, or use --scheme static",
        )


def need_package(package: Package) -> None:
    """Refuse, before anything is built, to go without the package that builds engines.

    Raises:
        MoecError: it is not installed (exit code 3).
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
    """An engine `folder`/PART.engine of each `path`/PART.onnx; external data lie below `root`.

    The plugin, for models with one, is built in `folder` too. What is recorded are paths as they
    will be in the artefact, where `folder` is called ENGINES.

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
            file=file, built=built, bindings=taken_by(model), plugins=tuple(plugins)
        )
    return done


def taken_by(model: ir.Model) -> tuple[str, ...]:
    """The weights that are inputs of `model`."""
    return tuple(str(each.name) for each in model.graph.inputs if not is_fed(str(each.name)))


def wants_plugin_library(model: ir.Model) -> bool:
    """Whether a node of `model` is the plugin's."""
    return any(node.op_type == "MoecMoe" for node in model.graph)


def plugin_of(folder: Path, spec: ModelSpec, options: EngineOptions, package: Package) -> "Plugin":
    """The plugin for the sizes of `spec`, in `folder`: its sources, and compiled if that can be.

    Raises:
        MoecError: no Triton (exit code 3), or no kernels for these sizes.
    """
    if find_spec("triton") is None:
        refuse(
            "the MoE plugin",
            "no package triton",
            "triton, which compiles its kernels",
            "pip install triton, or use --scheme static",
            exit_code=3,
        )
    from moec.exporters.tensorrt.plugin.build import compile_plugin
    from moec.kernels.launches.launch import SHARED, Sizes

    text = spec.text
    sizes = Sizes(text.dim, text.experts.hidden, text.experts.count)
    wanted = [int(name.removeprefix("SM")) for name in options.architectures]
    known = [each for each in wanted if each in SHARED] if package == "tensorrt_rtx" else [*SHARED]
    rows = max(options.piece, options.batch)
    return compile_plugin([sizes], rows, known, folder / PLUGIN)


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
    """What to build of a part."""
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
    """The tower's; or the decoder's two: a token for each row, and a piece of one prompt."""
    if part == "vision":
        return (_spans(model, {"tiles": (1, 1, options.tiles)}),)
    piece = min(options.piece, options.slots(spec)["ring_slots"])
    decode = {"sequence": (1, 1, 1), "logits": (1, 1, 1), "image_tokens": (0, 0, 0)}
    decode["batch"] = (1, 1, options.batch)
    prefill = {"sequence": (1, piece, piece), "logits": (1, 1, piece), "batch": (1, 1, 1)}
    prefill["image_tokens"] = (0, 0, piece)
    return _spans(model, decode), _spans(model, prefill)


def _spans(model: ir.Model, sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, Span]:
    """The span of each input of `model` that has one of `sizes` in its shape."""
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
