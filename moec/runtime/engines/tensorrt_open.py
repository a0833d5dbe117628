"""Opening an engine of TensorRT: its file, its weights on the GPU, and what its contexts are told.

An engine has profiles, ranges of shapes that it was compiled for: the decoder has one for a token
of each of several rows, and one for a piece of one prompt; the vision tower has one. Each has a
context of its own, so that no call has to switch, and all share the memory for inner values, which
one call at a time uses.

TensorRT-RTX compiles kernels for new shapes while it runs. Decode steps that may become CUDA graphs
wait for theirs: a graph keeps the kernels that it was captured with.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.artefact.engine_job import ENGINES
from moec.exporters.tensorrt.api import add_plugins
from moec.exporters.tensorrt.callbacks import new_log
from moec.exporters.tensorrt.weight_inputs import weights_of
from moec.runtime.engines.tensorrt_fit import (
    KINDS,
    Io,
    Spans,
    check_aliases,
    check_ios,
    engine_of,
    ios_of,
)
from moec.runtime.engines.tensorrt_weights import load_bindings
from moec.spec.errors import MoecError, refuse

#: layers of branches and loops, which no CUDA graph holds
_BRANCHES = {"CONDITION", "TRIP_LIMIT", "RECURRENCE"}
#: of a file: bytes, and when it changed, in nanoseconds
Stamp = tuple[int, int]
#: bytes; TensorRT takes no address that is not a multiple
ALIGNED = 256


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """An engine that is ready to run.

    `ios` are what a caller gives and gets, `aliases` the inputs that outputs are written over,
    `profiles` contexts and what each takes. `stream` is for when torch uses the default one, on
    which TensorRT would wait for the GPU; None without CUDA. `steady` says that the first profile's
    calls may become CUDA graphs. `weights` and `memory` are where the contexts were told that they
    are; `runtime` and `engine` must outlive the contexts.
    """

    file: Path
    device: str
    log: Any
    runtime: Any
    engine: Any
    ios: dict[str, Io]
    aliases: dict[str, str]
    profiles: tuple[tuple[Any, Spans], ...]
    weights: dict[str, Tensor]
    memory: Tensor
    stream: Any
    steady: bool

    def must(self, done: object, what: str) -> None:
        """Refuse to go on where TensorRT says that `what` was not `done`."""
        if not done:
            raise failed(self.file, self.log, what)


def open_engine(trt: Any, artefact: Artefact, part: str, device: str) -> OpenEngine:
    """Load the engine of a part of `artefact`, and whatever weights it takes as inputs.

    Raises:
        MoecError: see `moec.runtime.engines.tensorrt`.
    """
    recorded, manifest = engine_of(artefact, part), artefact.manifest
    parts = weights_of(manifest, artefact.stored(), list(recorded.bindings))
    file, log = artefact.path / recorded.file, _log(trt)
    _add_plugins(trt, [(artefact.path / path).resolve() for path in recorded.plugins])
    runtime, engine = _deserialized(trt, file, log)
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: _io(trt, engine, name) for name in names}
    check_ios(file, found, ios_of(manifest.ports(part), parts), parts)
    ios = {name: io for name, io in found.items() if name not in parts}
    written = {
        name: engine.get_aliased_input_tensor(name) for name, io in ios.items() if not io.given
    }
    aliases = {name: over for name, over in written.items() if over}
    check_aliases(file, aliases)
    weights = load_bindings(parts, device)
    size = max(engine.device_memory_size_v2, ALIGNED)
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
    steady = part == "model" and not _BRANCHES & recorded.built.layer_types.keys()
    profiles = tuple(
        (_context(trt, engine, steady and index == 0), _spans(engine, ios, index))
        for index in range(engine.num_optimization_profiles)
    )
    opened = OpenEngine(
        file, device, log, runtime, engine, ios, aliases, profiles, weights, memory, stream, steady
    )
    for index, (context, _) in enumerate(profiles):
        opened.must(context, "no context for it")
        context.set_device_memory(memory.data_ptr(), size)
        handle = stream.cuda_stream if stream else 0
        opened.must(context.set_optimization_profile_async(index, handle), f"profile {index}")
        for name, weight in weights.items():
            opened.must(context.set_tensor_address(name, weight.data_ptr()), name)
    if stream:
        stream.synchronize()
    return opened


@cache
def _log(trt: Any) -> Any:
    """The logger of this process: TensorRT keeps the first, and ignores all others."""
    return new_log(trt, lambda text: None)


@cache
def _libraries(trt: Any) -> dict[Path, Stamp | None]:
    """The plugin libraries that this process has loaded, as they were then."""
    return {}


def _stamp(path: Path) -> Stamp | None:
    """What tells a file from what it was before; None where there is none."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _add_plugins(trt: Any, paths: Sequence[Path]) -> None:
    """Load libraries, each once in a process: TensorRT takes no plugin of the same name again.

    Raises:
        MoecError: a library does not load; or libraries of another artefact, or other bytes of
            these, were loaded before.
    """
    loaded = _libraries(trt)
    others = loaded.keys() - set(paths)
    for path in paths:
        stamp = _stamp(path)
        if others or loaded.get(path, stamp) != stamp:
            was = f"{min(others)}, which was loaded before" if others else "changed since it loaded"
            refuse(
                f"plugin: {path}",
                was,
                "one artefact with a plugin in a process",
                "open it in a new process",
            )
        if path not in loaded:
            add_plugins(trt, (str(path),), _log(trt))
            loaded[path] = stamp


def _deserialized(trt: Any, file: Path, log: Any) -> tuple[Any, Any]:
    """The runtime, and the engine in `file`, which is mapped: it may be as large as its weights."""
    log.errors.clear()
    try:
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise failed(file, log, str(error)) from None
    try:
        runtime = trt.Runtime(log)
    except TypeError:  # how the bindings say that the library gave them nothing
        raise failed(file, log, "no runtime") from None
    with data:
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise failed(file, log, _why(trt, runtime, data))
    return runtime, engine


def _why(trt: Any, runtime: Any, data: mmap.mmap) -> str:
    """What TensorRT-RTX has against an engine, for when its log has nothing."""
    if not hasattr(runtime, "get_engine_validity"):
        return "it does not load"
    _, flags = runtime.get_engine_validity(data)
    known = trt.EngineInvalidityDiagnostics.__members__.items()
    return ", ".join(name for name, each in known if each.value & flags) or "it does not load"


def _io(trt: Any, engine: Any, name: str) -> Io:
    given = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    kind = KINDS.get(engine.get_tensor_dtype(name).name)
    return Io(given, kind, tuple(engine.get_tensor_shape(name)))


def _spans(engine: Any, ios: Mapping[str, Io], profile: int) -> Spans:
    shapes = {n: engine.get_tensor_profile_shape(n, profile) for n, io in ios.items() if io.given}
    return {name: (tuple(least), tuple(most)) for name, (least, _, most) in shapes.items()}


def _context(trt: Any, engine: Any, steady: bool) -> Any:
    """A context without memory of its own; where it is to be `steady`, its kernels stay."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    if steady and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
    return engine.create_execution_context(config)


def failed(file: Path, log: Any, what: str) -> MoecError:
    """The refusal for what an engine did not do: TensorRT's first error, or `what` without one."""
    found = log.errors[0] if log.errors else what
    artefact = file.parent.parent if file.parts[-2] == ENGINES else file.parent
    return MoecError(
        file,
        found,
        "an engine that loads and runs",
        f"build it again: moec engine {artefact}",
        exit_code=1,
    )
