"""How a target makes files of graphs: one record of functions, which each target fills in."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Engine, Ports, SessionOptions
from moec.artefact.placement import Bound, Progress
from moec.artefact.targets import find_target, imported
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.weights.packing import Packing

#: what a target makes of a graph: an `ir.Model`, a `Program`; only its own functions look inside
Model = Any


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a build was asked for.

    `precision` is the user's word, `compute` what the graph computes in, `options` the sizes that
    TensorRT engines are built for.
    """

    spec: ModelSpec
    precision: str
    compute: str
    dialect: str
    options: EngineOptions


@dataclass(frozen=True, slots=True)
class Compiler:
    """How a target compiles its models to engine files.

    Attributes:
        need: refuses to start where a package is missing (exit code 3).
        check: completes options for a dialect, and refuses those that the target lacks.
        build: (models, artefact, folder, weights' folder, spec, options, progress) -> the engines
            that it wrote into `folder`, by part.
        commands: what a user types to build the same engines without moec; None: nothing can.
    """

    need: Callable[[], None]
    check: Callable[[EngineOptions, str], EngineOptions]
    build: Callable[
        [Mapping[str, Model], Path, Path, Path | None, ModelSpec, EngineOptions, Progress],
        dict[str, Engine],
    ]
    commands: Callable[[Artefact], Iterator[str]] | None = None


@dataclass(frozen=True, slots=True)
class Builder:
    """The functions of a target, in the order in which a build calls them.

    Attributes:
        dialects: what its graphs may be lowered to.
        check: refuses a model that the target cannot express.
        graphs: the graph of each part, such as "model" and "vision".
        lower: the model of a part's graph, and how it wants weights stored, by parameter.
        packings: how wide weights become FP8 by the spec's scheme.
        save_unbound: writes a model whose weights are not known yet, and checks it.
        save_bound: writes a model whose weights lie where `Bound` says.
        ports: what a model takes and gives.
        load: reads the model of an artefact's part again.
        opset: ONNX's; None for models that are not ONNX.
        dialect: the dialect to use in place of the chosen one, for a scheme that needs another.
        session_options: ONNX Runtime's by name, for quantised integers or not, for FP8 or not.
        beside: writes files of other programs beside the models: (folder, its final path,
            manifest, weights' folder, checkpoint's folder).
        compiler: how engines are compiled; None: the models run as they are.
    """

    dialects: Collection[str]
    check: Callable[[Wanted], None]
    graphs: Callable[[Wanted], dict[str, fx.GraphModule]]
    lower: Callable[[Wanted, fx.GraphModule, str], tuple[Model, dict[str, Packing]]]
    packings: Callable[[ModelSpec], dict[str, Packing]]
    save_unbound: Callable[[Model, Path], None]
    save_bound: Callable[[Model, Path, Bound, EngineOptions], None]
    ports: Callable[[Model], Ports]
    load: Callable[[Artefact, str], Model]
    opset: int | None = None
    dialect: Callable[[str, ModelSpec], str] | None = None
    session_options: Callable[[bool, bool], dict[str, SessionOptions]] | None = None
    beside: Callable[..., None] | None = None
    compiler: Compiler | None = None


def builder_of(target: str) -> Builder:
    """The functions of `target`."""
    found: Builder = imported(find_target(target).builder)
    return found


def builder_for(artefact: Artefact) -> Builder:
    """The functions of the target of `artefact`.

    Raises:
        MoecError: another version of moec built it.
    """
    manifest = artefact.manifest
    builder = builder_of(manifest.target)
    without_options = builder.session_options is not None and not manifest.presets
    if manifest.dialect not in builder.dialects or without_options:
        refuse(
            f"{artefact.path}: dialect {manifest.dialect}",
            "built by another version of moec",
            " or ".join(builder.dialects),
            "build the artefact again",
        )
    return builder
