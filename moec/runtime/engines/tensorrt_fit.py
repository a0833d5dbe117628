"""Whether an engine of TensorRT fits: this machine, its artefact, and the shapes of a call."""

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
from moec.weights.shard import TensorEntry
from moec.weights.view import STORED

Shape = tuple[int, ...]
#: a profile: the smallest and the largest shape of each input by name
Spans = Mapping[str, tuple[Shape, Shape]]
#: names of dtypes in ONNX -> torch's
_TORCH = {each.name.lower(): dtype for dtype, each in ONNX_DTYPES.items()}
#: names of dtypes in TensorRT -> torch's, of those that a caller can give
KINDS = {theirs: _TORCH[onnx] for onnx, theirs in DTYPES.items() if onnx in _TORCH}
#: part -> what to do about a call that is too large; no option of a build counts tiles
_FIXES = {
    "model": "give it less at once, or build with a larger --batch, --piece or --context",
    "vision": "give it fewer tiles at once",
}


@dataclass(frozen=True, slots=True)
class Io:
    """An input or output of an engine; -1 is a size that a call chooses.

    `dtype` is None where torch has none, `shape` where the engine's own is as good as any.
    """

    given: bool
    dtype: torch.dtype | None
    shape: Shape | None

    def __str__(self) -> str:
        kind, shape = "an input" if self.given else "an output", self.shape
        return f"{kind}, {self.dtype}{'' if shape is None else f' {list(shape)}'}"


def engine_of(artefact: Artefact, part: str) -> Engine:
    """What the manifest says of the engine of `part`.

    Raises:
        MoecError: there is none, or its files are not as they were written (exit code 1).
    """
    found = artefact.manifest.engines.get(part)
    if found is None:
        refuse(
            f"{artefact.path}: {part}",
            "its ONNX alone",
            "an engine",
            f"moec engine {artefact.path}, or run the ONNX with engine interpreter",
        )
    check_engine(artefact, found)
    return found


def check_gpu(artefact: Artefact, built: Built, device: str) -> None:
    """Refuse a machine on which the engine cannot run.

    Raises:
        MoecError: another device than "cuda", no GPU, or one that it was not built for (exit code
            3).
    """
    where, title = f"device {device}: {artefact.path}", PACKAGES[built.package][0]
    if device != "cuda":
        refuse(
            where,
            f"an engine of {title}",
            "device cuda",
            "choose device cuda, or engine interpreter",
            exit_code=3,
        )
    if not torch.cuda.is_available():
        refuse(
            where,
            f"torch {torch.__version__}, which finds no GPU",
            f"a GPU, for {title}",
            "run it where there is one, or its ONNX with engine interpreter",
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
    """Refuse another `version` of the package than the one that built the engine (exit code 3)."""
    if version != built.version:
        title = PACKAGES[built.package][0]
        refuse(
            f"{title}: {artefact.path}",
            f"version {version}",
            f"version {built.version}, which built the engine",
            f"install that version, or moec engine {artefact.path}",
            exit_code=3,
        )


def ios_of(ports: Ports, weights: Mapping[str, tuple[TensorEntry, ...]]) -> dict[str, Io]:
    """What an engine must take and give: `ports`, and `weights` by the entries they are made of."""
    found = {each.name: Io(False, _TORCH.get(each.dtype), None) for each in ports.outputs}
    for each in ports.inputs:
        sizes = (size if isinstance(size, int) else -1 for size in each.shape)
        found[each.name] = Io(True, _TORCH.get(each.dtype), tuple(sizes))
    for name, entries in weights.items():
        # Of joined weights the bytes are known, and not how an engine counts them.
        shape = entries[0].shape if len(entries) == 1 else None
        found[name] = Io(True, STORED[entries[0].dtype], shape)
    return found


def check_ios(
    where: object,
    found: Mapping[str, Io],
    expected: Mapping[str, Io],
    weights: Mapping[str, tuple[TensorEntry, ...]],
) -> None:
    """Refuse an engine whose inputs and outputs are others than its artefact's (exit code 1)."""
    for name in sorted(found.keys() | expected.keys()):
        theirs, ours = found.get(name), expected.get(name)
        if theirs and ours and ours.shape is None:
            theirs = Io(theirs.given, theirs.dtype, None)
        if theirs != ours:
            raise _another(f"{where}: {name}", theirs or "not in the engine", ours or "no such one")
    for name, entries in weights.items():
        io, stored = found[name], sum(each.nbytes for each in entries)
        assert io.shape is not None and io.dtype is not None
        size = math.prod(io.shape) * io.dtype.itemsize
        if size != stored:
            raise _another(f"{where}: {name}", f"{size} bytes", f"the weights' {stored}")


def check_aliases(where: object, aliases: Mapping[str, str]) -> None:
    """Refuse an engine that writes an output over another input than its cache (exit code 1)."""
    for name, over in aliases.items():
        if over != cache_of(name):
            raise _another(
                f"{where}: {name}",
                f"written over {over}",
                f"over {cache_of(name)}" if cache_of(name) else "memory of its own",
            )


def cache_of(output: str) -> str:
    """The input that is the cache which `output` is; "" for other outputs."""
    return output.replace("present", "past", 1) if output.startswith("present.") else ""


def _another(where: str, found: object, expected: object) -> MoecError:
    return MoecError(where, found, expected, "build the engine again", exit_code=1)


def fits(shapes: Mapping[str, Shape], spans: Spans) -> bool:
    """Whether `shapes` are what a profile spans."""
    return all(within(shape, *spans[name]) for name, shape in shapes.items())


def within(shape: Shape, least: Shape, most: Shape) -> bool:
    """Whether each size of `shape` is from that in `least` to that in `most`."""
    return len(shape) == len(most) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )


def no_profile(part: str, shapes: Mapping[str, Shape], profiles: Sequence[Spans]) -> MoecError:
    """The refusal of a call with `shapes` that fit none of `profiles`.

    Names the first input that the profile which most of them fit has no room for.
    """
    odd = (
        [name for name, shape in shapes.items() if not within(shape, *spans[name])]
        for spans in profiles
    )
    name = min(odd, key=len)[0]
    limits = [f"{list(spans[name][0])} to {list(spans[name][1])}" for spans in profiles]
    return MoecError(
        f"engine of {part}: {name}",
        list(shapes[name]),
        " or ".join(dict.fromkeys(limits)),
        _FIXES[part],
    )
