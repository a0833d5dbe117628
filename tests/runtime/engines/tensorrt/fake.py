"""The part of TensorRT's API that runs engines, strict, over memory that is really there.

An engine file is a marker, b"engine of PART". What it computes is the artefact's ONNX, node by node
in ONNX's reference interpreter; its profiles are those that a build asks for. Addresses are read
and written as they are. What TensorRT refuses, or what would be undefined, is logged and refused.
"""

import ctypes
import gc
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.artefact.engine_job import DTYPES, Built, Job
from moec.artefact.manifest import Engine as Recorded
from moec.exporters.onnx.weight_inputs import weights_of
from moec.exporters.tensorrt.build import job_of
from moec.runtime.engines.interpreter import interpreter
from moec.runtime.engines.tensorrt.fit import KINDS
from moec.spec.names import is_input, is_present
from moec.weights.view import view

VERSION = "1.7.1.116"
ALIGNED = 64  # bytes: what torch's memory on the CPU is aligned to
Computes = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, MALFORMED_ENGINE = 1, 2, 32


class ILogger:
    WARNING = 2

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


@dataclass
class Tensor_:  # noqa: N801
    """An input or output of an engine; sizes that a call chooses are names."""

    given: bool
    dtype: str
    shape: tuple[int | str, ...]
    alias: str | None = None


@dataclass
class Plan:
    """What an engine file stands for; tests change it."""

    tensors: dict[str, Tensor_]
    job: Job
    computes: Computes
    weights: dict[str, bytes]  # what must lie at the addresses of bindings
    memory: int = 1000
    fails: str | None = None  # what it says when a call fails
    capturable: bool = True
    calls: list[tuple[int, dict[str, tuple[int, ...]]]] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)


class Package:
    """The module; `rtx` says which of the two. `log` is the process's one logger."""

    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger
    __version__ = VERSION

    def __init__(self, plans: dict[str, Plan], rtx: bool = True) -> None:
        self.__name__ = "tensorrt_rtx" if rtx else "tensorrt"
        self.plans, self.rtx = plans, rtx
        self.log: Any = None
        self.libraries: list[str] = []
        self.runtimes = 0
        self.watch_memory = False  # look whether addresses are of living tensors, which takes time
        if rtx:
            self.EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
            self.DynamicShapesKernelSpecializationStrategy = (
                DynamicShapesKernelSpecializationStrategy
            )

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        assert isinstance(log, ILogger)
        self.log = self.log or log  # the first stays
        self.runtimes += 1
        return RtxRuntime(self) if self.rtx else Runtime(self)

    def get_plugin_registry(self) -> Any:
        return SimpleNamespace(load_library=self._load_library)

    def _load_library(self, path: str) -> object:
        if not Path(path).is_file() or path in self.libraries:
            self.says(f"cannot load {path}")
            return None
        self.libraries.append(path)
        return object()

    def says(self, text: str) -> bool:
        """Log an error, and fail."""
        self.log.log(1, text)
        return False


class Runtime:
    def __init__(self, trt: Package) -> None:
        self.trt = trt

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "Engine | None":
        found = re.fullmatch(rb"engine of (\w+)", bytes(serialized_engine))
        if not found:
            self.trt.says("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed")
            return None
        return Engine(self.trt, self.trt.plans[found[1].decode()])


class RtxRuntime(Runtime):
    def get_engine_validity(self, buffer: Any) -> tuple[object, int]:
        return object(), int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)


class Engine:
    def __init__(self, trt: Package, plan: Plan) -> None:
        self.trt, self.plan = trt, plan
        self.num_io_tensors = len(plan.tensors)
        self.num_optimization_profiles = len(plan.job.profiles)
        self.device_memory_size_v2 = plan.memory
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.plan.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self.plan.tensors[name].given else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.plan.tensors[name].dtype)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self.plan.tensors[name].shape
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        span = self.plan.job.profiles[profile_index].get(name)
        fixed = self.get_tensor_shape(name)
        return [span.min, span.opt, span.max] if span else [fixed] * 3

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.plan.tensors[name].alias

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(strategy=ExecutionContextAllocationStrategy.STATIC)

        def choose(strategy: ExecutionContextAllocationStrategy) -> None:
            config.strategy = strategy

        config.set_execution_context_allocation_strategy = choose
        return config

    def create_execution_context(self, config: Any) -> Any:
        made = (RtxContext if self.trt.rtx else Context)(self, config)
        self.contexts.append(made)
        return made


class Context:
    def __init__(self, engine: Engine, config: Any) -> None:
        self.engine, self.trt, self.plan, self.config = engine, engine.trt, engine.plan, config
        self.profile: int | None = None
        self.memory = (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.fresh: set[str] = set()  # addresses that were set since the last call
        self.sizes: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self.config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        taken = [each.profile for each in self.engine.contexts]
        if not 0 <= profile_index < self.engine.num_optimization_profiles or profile_index in taken:
            return self.trt.says(f"profile {profile_index} is taken, or there is none")
        self.profile, self.shapes, self.sizes = profile_index, {}, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        known = self.plan.tensors.get(name)
        if not known or not known.given or self.profile is None:
            return self.trt.says(f"set_input_shape: {name} is no input, or there is no profile")
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(most) or any(
            not low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            return self.trt.says(f"set_input_shape: {name} {shape} is not in {least} to {most}")
        self.shapes[name] = shape
        for size, named in zip(shape, known.shape, strict=True):
            if isinstance(named, str):
                self.sizes[named] = size
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.plan.tensors or not memory or memory % ALIGNED:
            return self.trt.says(f"set_tensor_address: {name} cannot be at {memory}")
        self.addresses[name] = memory
        self.fresh.add(name)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        found = []
        for size in self.plan.tensors[name].shape:
            known = all(word in self.sizes for word in re.findall(r"[a-z_]+", str(size)))
            found.append(eval(str(size), {}, dict(self.sizes)) if known else -1)
        return tuple(found)

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.plan.fails is not None:
            return self.trt.says(self.plan.fails) if self.plan.fails else False
        if self.profile is None or self.memory[1] < self.plan.memory or self.memory[0] % ALIGNED:
            return self.trt.says("execute: no profile, or not the memory that it needs")
        tensors = self.plan.tensors
        for name, each in tensors.items():
            unset = each.given and is_input(name) and name not in self.shapes
            if unset or -1 in self.get_tensor_shape(name):
                return self.trt.says(f"execute: {name} has no shape")
            if name not in (self.addresses if name in self.plan.weights else self.fresh):
                return self.trt.says(f"execute: {name} has no address, or an old one")
            if each.alias and self.addresses[name] != self.addresses[each.alias]:
                return self.trt.says(f"execute: {name} must be where {each.alias} is")
        if any(self.get_tensor_shape(name) != shape for name, shape in self.shapes.items()):
            return self.trt.says("execute: shapes contradict each other")
        if self.trt.watch_memory and not self._all_alive():
            return False
        for name, expected in self.plan.weights.items():
            if self._bytes(name) != expected:
                return self.trt.says(f"execute: other weights at {name}")
        self.fresh.clear()
        self.plan.calls.append((self.profile, dict(self.shapes)))
        self.plan.streams.append(stream_handle)
        feeds = {name: self._view(name) for name, each in tensors.items() if is_input(name)}
        feeds = {name: x for name, x in feeds.items() if tensors[name].given}
        apart = {name for name, each in tensors.items() if is_present(name)
                 and not each.alias}  # fmt: skip
        for name in apart:
            past = name.replace("present", "past", 1)
            feeds[past] = feeds[past].clone()
        results = self.plan.computes(feeds)
        for name in apart:
            results[name] = feeds[name.replace("present", "past", 1)]
        for name, result in results.items():
            self._view(name).copy_(result)
        return True

    def _view(self, name: str) -> Tensor:
        """The memory at the address of `name`, as what it should be."""
        dtype, shape = KINDS[self.plan.tensors[name].dtype], self.get_tensor_shape(name)
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        memory = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)

    def _bytes(self, name: str) -> bytes:
        return self._view(name).flatten().view(torch.uint8).numpy().tobytes()

    def _all_alive(self) -> bool:
        """Whether the memory of each tensor is that of a tensor of torch's, all of it."""
        gc.collect()
        spans = set()
        for each in gc.get_objects():
            if issubclass(type(each), Tensor):
                with suppress(RuntimeError, NotImplementedError):  # fakes, sparse: without memory
                    storage = each.untyped_storage()
                    spans.add((storage.data_ptr(), storage.nbytes()))
        for name in self.plan.tensors:
            start, size = self.addresses[name], self._view(name).nbytes
            if not any(at <= start and start + size <= at + long for at, long in spans):
                return self.trt.says(f"execute: {name} is not in memory of anybody's")
        return True


class RtxContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return self.plan.capturable and bool(self.shapes)


def plan_of(artefact: Artefact, part: str = "model") -> Plan:
    """What a build would make of the ONNX of `artefact`."""
    manifest = artefact.manifest
    model = ir.load(artefact.graph(part))
    assert manifest.options
    job = job_of(
        model, part, artefact.path, artefact.path, None, manifest.spec, manifest.options,
        "tensorrt_rtx",
    )  # fmt: skip
    tensors = {}
    for values, kinds in ((model.graph.inputs, job.inputs), (model.graph.outputs, job.outputs)):
        for each in values:
            sizes = (d.value if isinstance(d, ir.SymbolicDim) else d for d in each.shape or ())
            shape = tuple(size if isinstance(size, int) else str(size) for size in sizes)
            name, given = str(each.name), values is model.graph.inputs
            tensors[name] = Tensor_(given, DTYPES[kinds[name]], shape)
            if is_present(name):
                tensors[name].alias = name.replace("present", "past", 1)
    bindings = [name for name, each in tensors.items() if each.given and not is_input(name)]
    parts = weights_of(manifest, artefact.stored(), bindings)
    weights = {
        name: b"".join(view(e).flatten().view(torch.uint8).numpy().tobytes() for e in entries)
        for name, entries in parts.items()
    }
    return Plan(tensors, job, interpreter(artefact, part=part), weights)


def with_engines(artefact: Artefact, plans: Mapping[str, Plan], **changes: Any) -> Artefact:
    """`artefact` with engine files for `plans`; `changes` of how they were built."""
    built = Built(
        package="tensorrt_rtx", version=VERSION, architectures=("SM89", "SM120"), size=15,
        seconds={}, peak_bytes=0, layers=1, layer_types={}, precisions={},
    )  # fmt: skip
    built = built.model_copy(update=changes)
    engines = {}
    for part, plan in plans.items():
        (artefact.path / f"{part}.engine").write_bytes(f"engine of {part}".encode())
        bindings = tuple(plan.weights)
        engines[part] = Recorded(file=f"{part}.engine", built=built, bindings=bindings)
    with_them = artefact.manifest.model_copy(update={"engines": engines})
    return replace(artefact, manifest=with_them, trust_engines=True)
