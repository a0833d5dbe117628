"""Open a TensorRT engine: load its file and its weights, and make its execution contexts.

A TensorRT engine has optimisation profiles: ranges of shapes that it was compiled for. The decoder
has one for decoding a token of each of several sequences, and one for a prefill chunk of a single
sequence. The vision tower has one. Each optimisation profile has its own execution context, so that
no call has to switch. All contexts share the memory for intermediate values, because only one call
runs at a time.

TensorRT-RTX compiles kernels for new shapes at run time. Decode steps that may be captured as CUDA
graphs wait for the kernels of their shapes, because a graph keeps the kernels of its capture.
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
from moec.artefact.opening.native import check_native
from moec.exporters.onnx.weight_inputs import weights_of
from moec.exporters.tensorrt.api import add_plugins
from moec.exporters.tensorrt.callbacks import new_log
from moec.runtime.engines.tensorrt.fit import (
    KINDS,
    Io,
    Spans,
    check_aliases,
    check_ios,
    engine_of,
    ios_of,
)
from moec.runtime.engines.tensorrt.weights import load_bindings
from moec.spec.errors import MoecError, refuse
from moec.weights.packed.hashed import file_sha256

#: layer types of branches and loops, which a CUDA graph cannot contain
_BRANCHES = {"CONDITION", "TRIP_LIMIT", "RECURRENCE"}
#: TensorRT takes addresses that are multiples of this many bytes
ALIGNED = 256


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """A TensorRT engine that is ready to run.

    `ios` are the inputs and outputs of a caller, by name. `aliases` has the input that each output
    is written over. `profiles` has the execution context and the shapes of each optimisation
    profile. `steady` says whether the calls of the first profile may become CUDA graphs.

    `stream` is used while torch is on the default stream, on which TensorRT would wait for the GPU;
    it is None without CUDA. The contexts hold the addresses of `weights` and `memory`, which must
    stay where they are. `runtime` and `engine` must outlive the contexts.
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
        """Raise the error for `what` unless TensorRT reports it as `done`."""
        if not done:
            raise failed(self.file, self.log, what)


def open_engine(trt: Any, artefact: Artefact, part: str, device: str) -> OpenEngine:
    """Load the TensorRT engine of a part of `artefact`, and the weights that it takes as inputs.

    Raises:
        MoecError: see `moec.runtime.engines.tensorrt.run.tensorrt_engine`.
    """
    recorded, manifest = engine_of(artefact, part), artefact.manifest
    check_native(artefact, (recorded.file, *recorded.plugins))
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
        opened.must(context, "no execution context for the engine")
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
    """The logger of this process; TensorRT keeps the first one and ignores all others."""
    return new_log(trt, lambda text: None)


@cache
def _libraries(trt: Any) -> dict[Path, str | None]:
    """The plugin libraries that this process has loaded, with their hashes at that time."""
    return {}


def _hash(path: Path) -> str | None:
    """The hash of a file, which tells whether it has changed; None if there is no file."""
    return file_sha256(path) if path.is_file() else None


def _add_plugins(trt: Any, paths: Sequence[Path]) -> None:
    """Load plugin libraries, each once in a process.

    TensorRT does not accept a second plugin of the same name.

    Raises:
        MoecError: a library does not load; libraries of another artefact were loaded before; or a
            library has changed since it was loaded.
    """
    loaded = _libraries(trt)
    others = loaded.keys() - set(paths)
    for path in paths:
        found = _hash(path)
        if others or loaded.get(path, found) != found:
            was = f"{min(others)}, which was loaded before" if others else "changed since it loaded"
            refuse(
                f"plugin: {path}",
                was,
                "one artefact with a plugin in each process",
                "open the artefact in a new process",
            )
        if path not in loaded:
            add_plugins(trt, (str(path),), _log(trt))
            loaded[path] = found


def _deserialized(trt: Any, file: Path, log: Any) -> tuple[Any, Any]:
    """Load the engine in `file`; return TensorRT's runtime and the engine.

    The file is mapped, because it may be as large as the model's weights.
    """
    log.errors.clear()
    try:
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise failed(file, log, str(error)) from None
    try:
        runtime = trt.Runtime(log)
    except TypeError:  # the bindings raise it if the library returns no runtime
        raise failed(file, log, "no runtime") from None
    with data:
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise failed(file, log, _why(trt, runtime, data))
    return runtime, engine


def _why(trt: Any, runtime: Any, data: mmap.mmap) -> str:
    """Why TensorRT-RTX does not load an engine, if its log does not say so."""
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
    """Make an execution context without its own memory.

    A `steady` one gets the kernels of its shapes before it runs, and keeps them.
    """
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    if steady and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
    return engine.create_execution_context(config)


def failed(file: Path, log: Any, what: str) -> MoecError:
    """The error for a TensorRT engine that failed: TensorRT's first message, or else `what`."""
    found = log.errors[0] if log.errors else what
    artefact = file.parent.parent if file.parts[-2] == ENGINES else file.parent
    return MoecError(
        file,
        found,
        "a TensorRT engine that loads and runs",
        f"build it again: moec engine {artefact}",
        exit_code=1,
    )
