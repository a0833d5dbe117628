"""Check that a TensorRT engine fits this machine, its artefact, and the shapes of a call."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.artefact.artefact import Artefact, check_engine
from moec.artefact.engine_job import DTYPES, Built
from moec.artefact.manifest import Engine, Ports
from moec.exporters.onnx.lowering import DTYPES as ONNX_DTYPES
from moec.exporters.tensorrt.api import PACKAGES
from moec.spec.errors import MoecError, refuse
from moec.spec.names import past_of
from moec.weights.shard import TensorEntry
from moec.weights.view import STORED

Shape = tuple[int, ...]
#: an optimisation profile: the smallest and the largest shape of each input, by name
Spans = Mapping[str, tuple[Shape, Shape]]
#: torch's types by ONNX's names
_TORCH = {each.name.lower(): dtype for dtype, each in ONNX_DTYPES.items()}
#: torch's types by TensorRT's names, for the types that a caller can give
KINDS = {theirs: _TORCH[onnx] for onnx, theirs in DTYPES.items() if onnx in _TORCH}
#: what to do about a call that is too large, by part; no build option changes the number of tiles
_FIXES = {
    "model": "give it less at once, or build with a larger --batch, --piece or --context",
    "vision": "give it fewer tiles at once",
}


@dataclass(frozen=True, slots=True)
class Io:
    """An input (`given`) or output of a TensorRT engine. A size of -1 is chosen by each call.

    `dtype` is None if torch has no such type. `shape` is None if any shape is accepted.
    """

    given: bool
    dtype: torch.dtype | None
    shape: Shape | None

    def __str__(self) -> str:
        kind, shape = "an input" if self.given else "an output", self.shape
        return f"{kind}, {self.dtype}{'' if shape is None else f' {list(shape)}'}"


def engine_of(artefact: Artefact, part: str) -> Engine:
    """The manifest's entry for the TensorRT engine of `part`.

    Raises:
        MoecError: there is no TensorRT engine, or its files have changed (exit code 1).
    """
    found = artefact.manifest.engines.get(part)
    if found is None:
        refuse(
            f"{artefact.path}: {part}",
            "an ONNX model without a TensorRT engine",
            "a TensorRT engine",
            f"moec engine {artefact.path}, or run the ONNX model with engine interpreter",
        )
    check_engine(artefact, found)
    return found


def check_gpu(artefact: Artefact, built: Built, device: str) -> None:
    """Refuse a machine on which the TensorRT engine cannot run.

    Raises:
        MoecError: the device is not "cuda", there is no GPU, or the engine was built for others
            (exit code 3).
    """
    where, title = f"device {device}: {artefact.path}", PACKAGES[built.package][0]
    if device != "cuda":
        refuse(
            where,
            f"an engine of {title}, which needs a GPU",
            "device cuda",
            "choose device cuda, or engine interpreter",
            exit_code=3,
        )
    if not torch.cuda.is_available():
        refuse(
            where,
            f"torch {torch.__version__}, which finds no GPU",
            f"a GPU, for {title}",
            "run it on a machine with a GPU, or run the ONNX model with engine interpreter",
            exit_code=3,
        )
    here = "SM{}{}".format(*torch.cuda.get_device_capability())
    if built.architectures and here not in built.architectures:
        refuse(
            where,
            f"{torch.cuda.get_device_name()}, which is {here}",
            f"{' or '.join(built.architectures)}, which the engine was built for",
            f"moec engine {artefact.path} --sm {here}",
            exit_code=3,
        )


def check_version(artefact: Artefact, built: Built, version: str) -> None:
    """Refuse a `version` of the package that differs from the one that built the engine.

    Raises:
        MoecError: the versions differ (exit code 3).
    """
    if version != built.version:
        title = PACKAGES[built.package][0]
        refuse(
            f"{title}: {artefact.path}",
            f"version {version}",
            f"version {built.version}, which built the engine",
            f"install that version, or build the engine again: moec engine {artefact.path}",
            exit_code=3,
        )


def ios_of(ports: Ports, weights: Mapping[str, tuple[TensorEntry, ...]]) -> dict[str, Io]:
    """The inputs and outputs that a TensorRT engine must have: `ports` and weight inputs.

    `weights` has the stored tensors of each weight input.
    """
    found = {each.name: Io(False, _TORCH.get(each.dtype), None) for each in ports.outputs}
    for each in ports.inputs:
        sizes = (size if isinstance(size, int) else -1 for size in each.shape)
        found[each.name] = Io(True, _TORCH.get(each.dtype), tuple(sizes))
    for name, entries in weights.items():
        # For joined weights only the bytes are known, and any shape is accepted.
        shape = entries[0].shape if len(entries) == 1 else None
        found[name] = Io(True, STORED[entries[0].dtype], shape)
    return found


def check_ios(
    where: object,
    found: Mapping[str, Io],
    expected: Mapping[str, Io],
    weights: Mapping[str, tuple[TensorEntry, ...]],
) -> None:
    """Refuse a TensorRT engine whose inputs and outputs are not those of its artefact.

    Raises:
        MoecError: an input or output is missing, unexpected, or of another type or size (exit code
            1).
    """
    for name in sorted(found.keys() | expected.keys()):
        theirs, ours = found.get(name), expected.get(name)
        if theirs and ours and ours.shape is None:
            theirs = Io(theirs.given, theirs.dtype, None)
        if theirs != ours:
            raise _another(
                f"{where}: {name}",
                theirs or "not in the engine",
                ours or "no such input or output",
            )
    for name, entries in weights.items():
        io, stored = found[name], sum(each.nbytes for each in entries)
        assert io.shape is not None and io.dtype is not None
        size = math.prod(io.shape) * io.dtype.itemsize
        if size != stored:
            wanted = f"{stored} bytes, the size of its weights"
            raise _another(f"{where}: {name}", f"{size} bytes", wanted)


def check_aliases(where: object, aliases: Mapping[str, str]) -> None:
    """Refuse a TensorRT engine that writes an output over an input that is not its cache.

    Raises:
        MoecError: the message names the output (exit code 1).
    """
    for name, over in aliases.items():
        if over != past_of(name):
            raise _another(
                f"{where}: {name}",
                f"written over {over}",
                f"written over {past_of(name)}" if past_of(name) else "memory of its own",
            )


def _another(where: str, found: object, expected: object) -> MoecError:
    return MoecError(where, found, expected, "build the engine again", exit_code=1)


def fits(shapes: Mapping[str, Shape], spans: Spans) -> bool:
    """Whether an optimisation profile covers `shapes`."""
    return all(within(shape, *spans[name]) for name, shape in shapes.items())


def within(shape: Shape, least: Shape, most: Shape) -> bool:
    """Whether each size of `shape` is between those of `least` and `most`, inclusively."""
    return len(shape) == len(most) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )


def no_profile(part: str, shapes: Mapping[str, Shape], profiles: Sequence[Spans]) -> MoecError:
    """The error for a call with `shapes` that no optimisation profile covers.

    The message names the first input that does not fit the profile that fits most inputs.
    """
    outside = (
        [name for name, shape in shapes.items() if not within(shape, *spans[name])]
        for spans in profiles
    )
    name = min(outside, key=len)[0]
    limits = [f"{list(spans[name][0])} to {list(spans[name][1])}" for spans in profiles]
    return MoecError(
        f"TensorRT engine of {part}: {name}",
        f"shape {list(shapes[name])}",
        f"a shape from {' or '.join(dict.fromkeys(limits))}",
        _FIXES[part],
    )
