"""The functions that a target needs to build artefacts, as a record that each target fills in."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Engine, Manifest, Ports
from moec.artefact.placement import Bound, Progress
from moec.artefact.session_options import options_of
from moec.artefact.targets import find_target, imported
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.weights.packing import Packing

#: a lowered graph, such as an `ir.Model` or a `Program`; only the target's functions look inside
Model = Any
#: the path of a file beside the weights, such as a tokenizer, by its name; None if there is none
Companion = Callable[[str], Path | None]


def no_companion(name: str) -> None:
    """The companion of an artefact that has no checkpoint: there is none."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a build should make.

    `precision` is the user's choice, `compute` the dtype that the graph computes in, `options` the
    sizes that TensorRT engines are built for, `turned` the FP8 experts that are stored as [expert,
    out, in] (`turned_experts`).
    """

    spec: ModelSpec
    precision: str
    compute: str
    dialect: str
    options: EngineOptions
    turned: frozenset[str] = frozenset()


def turned_experts(packings: Mapping[str, Packing]) -> frozenset[str]:
    """The stacks of FP8 experts that `packings` turn from [in, out] to [out, in]."""
    return frozenset(
        each.source for each in packings.values() if each.fp8 and each.arrange == "transpose"
    )


@dataclass(frozen=True, slots=True)
class Compiler:
    """How a target compiles its models to TensorRT engines.

    Attributes:
        need: raises if a package is missing (exit code 3).
        check: completes the options for a dialect, and refuses those that the target lacks.
        build: (models, artefact, folder, weights' folder, spec, options, progress) -> the engines,
            by part, whose files it wrote into `folder`.
        commands: yields shell commands that build the same engines without moec; None if there are
            none.
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
    """The functions with which a target builds an artefact.

    Attributes:
        dialects: the dialects to which it lowers graphs.
        check: refuses a model that the target cannot express.
        graphs: builds the graph of each part, such as "model" and "vision".
        lower: (wanted, graph, part) -> the lowered graph, and how its weights must be packed, by
            parameter.
        packings: says how wide weights become FP8 by the spec's scheme.
        save_unbound: writes a model that has no weights yet, and checks it.
        save_bound: writes a model whose weights are where `Bound` says.
        ports: returns the inputs and outputs of a model.
        load: reads the model of an artefact's part again.
        opset: ONNX's; None for models that are not ONNX.
        dialect: (chosen dialect, spec) -> the dialect to use, for schemes that need another one.
        beside: writes files for other programs into folders beside the models: (folder, its final
            path, manifest, name of a file of the checkpoint -> its path or None).
        weights: the folder of the artefact for the weights that a build writes.
        compiler: compiles the models to TensorRT engines; None: the models run as they are.
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
    beside: Callable[[Path, Path, Manifest, Companion], None] | None = None
    weights: str = "."
    compiler: Compiler | None = None


def builder_of(target: str) -> Builder:
    """The functions of `target`."""
    found: Builder = imported(find_target(target).builder)
    return found


def builder_for(artefact: Artefact) -> Builder:
    """The functions of the target of `artefact`.

    Raises:
        MoecError: another version of moec built the artefact.
    """
    manifest = artefact.manifest
    builder = builder_of(manifest.target)
    if manifest.dialect not in builder.dialects or manifest.presets != options_of(manifest):
        refuse(
            f"{artefact.path}: dialect {manifest.dialect}",
            "built by another version of moec",
            " or ".join(builder.dialects),
            "build the artefact again",
        )
    return builder
