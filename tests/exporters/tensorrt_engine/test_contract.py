"""Every call of TensorRT's API in this package is one that both packages have, as it is made here.

`USES` lists them with their signatures. The sources are read to see that the list is whole, and the
real bindings of TensorRT 11.4 and of TensorRT-RTX to see that it is true.
"""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import moec

ROOT = Path(moec.__file__).parent
SCRIPT = Path(__file__).with_name("bindings.py")
NEAR = (
    *(ROOT / "exporters" / "tensorrt").rglob("*.py"),
    *(ROOT / "runtime" / "engines" / "tensorrt").glob("*.py"),
)
#: the sources that touch the API
TOUCHING = {
    "api.py", "callbacks.py", "checks.py", "child.py", "parse.py", "run.py",
    "opening.py",
}  # fmt: skip
SOURCES = [path for path in sorted(NEAR) if path.name in TOUCHING]
Api = dict[str, dict[str, str]]

#: what variables of the sources hold -> class of the API; "module" is the package itself; of one
#: file alone: "FILE:variable"; what an object keeps: "self.name"
OBJECTS = {
    "trt": "module",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parse.py:error": "ParserError",
    "profile": "IOptimizationProfile",
    "layer": "IAttentionOutputLayer",  # an ILayer, but for what an attention is asked
    "attention": "IAttention",
    "tensor": "ITensor",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "opening.py:config": "IRuntimeConfig",
}
#: variables of other things, of which TensorRT could have an attribute of that name
OTHERS = {
    "self", "job", "span", "writer", "log", "sys.stdin", "np", "held", "each", "whole", "data",
    "data.ctypes", "callbacks.py:file", "child.py:out", "major", "minor",
    "x", "io", "opened", "opened.stream", "current", "stream", "recorded", "each.value", "torch",
    "feeds[INPUT_IDS]", "feeds[first]",
}  # fmt: skip

#: class -> member -> signature, of properties their type; "value": a member of an enumeration
USES: Api = {
    "IBuilderConfig": {
        "add_optimization_profile": "(profile: IOptimizationProfile) -> int",
        "num_compute_capabilities": "int, settable",
        "progress_monitor": "IProgressMonitor, settable",
        "set_compute_capability": "(compute_capability: ComputeCapability, index: int) -> bool",
    },
    "module": {
        "Builder": "(logger: ILogger) -> None",
        "ComputeCapability": "(value: int) -> None",
        "DynamicShapesKernelSpecializationStrategy": "(value: int) -> None",
        "EngineInvalidityDiagnostics": "(value: int) -> None",
        "ExecutionContextAllocationStrategy": "(value: int) -> None",
        "IAttentionOutputLayer": "class",
        "ILogger": "() -> None",
        "IProgressMonitor": "() -> None",
        "IStreamWriter": "() -> None",
        "LayerType": "(value: int) -> None",
        "OnnxParser": "(network: INetworkDefinition, logger: ILogger) -> None",
        "Runtime": "(logger: ILogger) -> None",
        "TensorIOMode": "(value: int) -> None",
        "get_plugin_registry": "() -> detail::accessor<detail::accessor_policies::str_attr>",
    },
    "IPluginRegistry": {
        "load_library": "(plugin_path: str) -> CapsuleType",
    },
    "ILogger": {
        "WARNING": "value",
    },
    "INetworkDefinition": {
        "get_input": "(index: int) -> ITensor",
        "get_layer": "(index: int) -> ILayer",
        "get_output": "(index: int) -> ITensor",
        "num_inputs": "int",
        "num_layers": "int",
        "num_outputs": "int",
    },
    "ITensor": {
        "dtype": "DataType",
        "is_shape_tensor": "bool",
        "name": "str, settable",
        "shape": "Dims, settable",
    },
    "DataType": {
        "name": "str",
    },
    "IAttentionOutputLayer": {
        "attention": "IAttention",
        "get_input": "(index: int) -> ITensor",
        "get_output": "(index: int) -> ITensor",
        "name": "str, settable",
        "num_inputs": "int",
        "num_outputs": "int",
        "type": "LayerType",
    },
    "LayerType": {
        "ATTENTION_OUTPUT": "value",
        "name": "str",
    },
    "CausalMaskKind": {
        "name": "str",
    },
    "IAttention": {
        "causal_kind": "CausalMaskKind, settable",
        "decomposable": "bool, settable",
        "key_value_lengths": "ITensor, settable",
        "mask": "ITensor, settable",
        "query_lengths": "ITensor, settable",
    },
    "Builder": {
        "build_serialized_network_to_stream": (
            "(network: INetworkDefinition, config: IBuilderConfig, writer: IStreamWriter) -> bool"
        ),
        "create_builder_config": "() -> IBuilderConfig",
        "create_network": "(flags: int = 0) -> INetworkDefinition",
        "create_optimization_profile": "() -> IOptimizationProfile",
    },
    "IOptimizationProfile": {
        "set_shape": "(input: str, min: Dims, opt: Dims, max: Dims) -> None",
    },
    "OnnxParser": {
        "get_error": "(index: int) -> IParserError",
        "load_initializer": "(name: str, data: int, size: int) -> bool",
        "load_model_proto": "(model: Buffer, path: str = None) -> bool",
        "num_errors": "int",
        "parse_model_proto": "() -> bool",
    },
    "Runtime": {
        "deserialize_cuda_engine": (
            "(serialized_engine: Buffer) -> ICudaEngine"
            " | (stream_reader_v2: IStreamReaderV2) -> ICudaEngine"
        ),
        "get_engine_validity": "(buffer: Buffer) -> tuple",
    },
    "ICudaEngine": {
        "create_execution_context": (
            "(strategy: ExecutionContextAllocationStrategy"
            " = <ExecutionContextAllocationStrategy.STATIC: 0>) -> IExecutionContext"
            " | (runtime_config: IRuntimeConfig = None) -> IExecutionContext"
        ),
        "create_runtime_config": "() -> IRuntimeConfig",
        "device_memory_size_v2": "int",
        "get_aliased_input_tensor": "(name: str) -> str",
        "get_tensor_dtype": "(name: str) -> DataType",
        "get_tensor_mode": "(name: str) -> TensorIOMode",
        "get_tensor_name": "(index: int) -> str",
        "get_tensor_profile_shape": "(name: str, profile_index: int) -> list[Dims]",
        "get_tensor_shape": "(name: str) -> Dims",
        "num_io_tensors": "int",
        "num_optimization_profiles": "int",
    },
    "IRuntimeConfig": {
        "dynamic_shapes_kernel_specialization_strategy": (
            "DynamicShapesKernelSpecializationStrategy, settable"
        ),
        "set_execution_context_allocation_strategy": (
            "(strategy: ExecutionContextAllocationStrategy"
            " = <ExecutionContextAllocationStrategy.STATIC: 0>) -> None"
        ),
    },
    "IExecutionContext": {
        "execute_async_v3": "(stream_handle: int) -> bool",
        "get_tensor_shape": "(name: str) -> Dims",
        "is_stream_capturable": "(stream: int) -> bool",
        "set_device_memory": "(memory: int, size: int) -> None",
        "set_input_shape": (
            "(name: str, shape: tuple) -> bool | (name: str, shape: list) -> bool"
            " | (name: str, shape: Dims) -> bool"
        ),
        "set_optimization_profile_async": "(profile_index: int, stream_handle: int) -> bool",
        "set_tensor_address": "(name: str, memory: int) -> bool",
    },
    "TensorIOMode": {"INPUT": "value"},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED": "value"},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER": "value"},
    "ParserError": {
        "desc": "() -> str",
        "node": "() -> int",
        "node_name": "() -> str",
        "node_operator": "() -> str",
    },
}
#: members that TensorRT-RTX alone has; the sources ask hasattr for them, or for one beside them
RTX_ALONE = {
    "module.ComputeCapability": "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities": "num_compute_capabilities",
    "IBuilderConfig.set_compute_capability": "num_compute_capabilities",
    "module.EngineInvalidityDiagnostics": "get_engine_validity",
    "Runtime.get_engine_validity": "get_engine_validity",
    "IExecutionContext.is_stream_capturable": "is_stream_capturable",
    "module.DynamicShapesKernelSpecializationStrategy": "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER": "DynamicShapesKernelSpecializationStrategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": (
        "DynamicShapesKernelSpecializationStrategy"
    ),
}


@dataclass(frozen=True)
class Use:
    """One attribute of the API in a source; `call` is (arguments in order, their names)."""

    where: str
    owner: str
    member: str
    call: tuple[int, tuple[str, ...]] | None
    stored: bool


@cache
def bindings(package: str) -> dict[str, Any]:
    """What bindings.py says of `package`, in a process of its own."""
    found = importlib.util.find_spec("tensorrt_bindings" if package == "tensorrt" else package)
    if not found:
        pytest.skip(f"{package}: no bindings here")
    if package == "tensorrt" and not shutil.which("cc"):
        pytest.skip("the bindings without their libraries need a C compiler")
    command = [sys.executable, str(SCRIPT), package]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def uses(path: Path, api: Api) -> Iterator[Use]:
    """Every use of the API in the source at `path`; fails where it cannot tell."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    members = {name for each in api.values() for name in each}
    members -= {*dir(list), *dir(dict), *dir(set)}

    def looked_up(name: str, table: Any) -> str | None:
        return next((key for key in (f"{path.name}:{name}", name) if key in table), None)

    def class_of(node: ast.expr) -> str | None:
        """The class of the API that an expression is of."""
        if key := looked_up(ast.unparse(node), OBJECTS):
            return OBJECTS[key]
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and class_of(node.func.value) == "module":
                return node.func.attr if node.func.attr in api else None
            return class_of(node.func)
        if isinstance(node, ast.Attribute):
            owner = class_of(node.value)
            if owner == "module" and node.attr in api:
                return node.attr
            kind = api.get(owner or "", {}).get(node.attr, "")
            kind = kind.rpartition("-> ")[2].removesuffix(", settable")
            return kind if kind in api else None
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            kind, name = class_of(node.value), node.targets[0].id
            known = looked_up(name, OBJECTS)
            if kind and kind in OBJECTS.values():
                assert known, f"{path.name}:{node.lineno}: list {name}, a {kind}, in OBJECTS"
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        where = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        owner = class_of(node.value)
        if owner:
            call = calls.get(id(node))
            given = call and (len(call.args), tuple(str(k.arg) for k in call.keywords))
            yield Use(where, owner, node.attr, given, isinstance(node.ctx, ast.Store))
        elif not looked_up(ast.unparse(node.value), OTHERS):
            assert node.attr not in members, f"{where}: say in OBJECTS or OTHERS what that is"


def all_uses(api: Api) -> list[Use]:
    return [use for path in SOURCES for use in uses(path, api)]


def unlike(table: Api, api: Api, alone: dict[str, str]) -> list[str]:
    """Rows of `table` that are not so in `api`; those of `alone` must not be there at all."""
    found = []
    for owner, members in table.items():
        for member, signature in members.items():
            real = api.get(owner, {}).get(member)
            wanted = None if f"{owner}.{member}" in alone else signature
            if real != wanted:
                found.append(f"{owner}.{member}: {real}, not {wanted}")
    return found


def ill_made(use: Use, signature: str) -> str | None:
    """What is wrong with a call or an assignment, for a member of that signature."""
    if use.stored:
        return None if signature.endswith(", settable") else f"{use.where} cannot be set"
    if use.call is None or not signature.startswith("("):
        return None
    count, names = use.call
    inner = signature.partition("(")[2].rpartition(") ->")[0]
    taken = [part.split(":")[0].strip() for part in inner.split(", ") if ":" in part]
    needed = [part.split(":")[0].strip() for part in inner.split(", ") if part and "=" not in part]
    given = {*taken[:count], *names}
    fits = count <= len(taken) and set(names) <= set(taken) and set(needed) <= given
    return None if fits else f"{use.where}: {signature}"


def test_the_list_is_whole() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for use in all_uses(bindings("tensorrt_rtx")["api"]):
        found[use.owner].add(use.member)
    assert found == {owner: set(members) for owner, members in USES.items()}


def test_no_other_source_touches_the_api() -> None:
    telling = {"trt", "builder", "network", "parser", "tensor"}
    for path in NEAR:
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert path.name in TOUCHING or not names & telling, f"list {path.name} in TOUCHING"


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_the_list_is_true(package: str) -> None:
    alone = RTX_ALONE if package == "tensorrt" else {}
    assert unlike(USES, bindings(package)["api"], alone) == []


def test_every_call_fits_its_signature() -> None:
    made = all_uses(bindings("tensorrt_rtx")["api"])
    assert sum(use.call is not None for use in made) > 20
    assert [bad for use in made if (bad := ill_made(use, USES[use.owner][use.member]))] == []


def test_what_one_package_lacks_is_asked_for_first() -> None:
    asked = {
        node.args[1].value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "hasattr"
        and isinstance(node.args[1], ast.Constant)
    }
    assert set(RTX_ALONE.values()) <= asked


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_any_change_of_a_signature_is_noticed(package: str) -> None:
    alone = RTX_ALONE if package == "tensorrt" else {}
    api = bindings(package)["api"]
    for owner, members in USES.items():
        for member, signature in members.items():
            if f"{owner}.{member}" in alone:
                continue
            for other in (f"{signature}x", signature.replace("int", "str") + " "):
                assert unlike({owner: {member: other}}, api, alone), f"{owner}.{member}"
    use = Use("here", "Builder", "create_network", (2, ()), False)
    assert ill_made(use, "(flags: int = 0) -> INetworkDefinition"), "one argument too many"
    use = Use("here", "OnnxParser", "get_error", (0, ()), False)
    assert ill_made(use, "(index: int) -> IParserError"), "one argument too few"
    use = Use("here", "IOptimizationProfile", "set_shape", (1, ("min", "op", "max")), False)
    assert ill_made(use, "(input: str, min: Dims, opt: Dims, max: Dims) -> None"), "a wrong name"
    assert ill_made(Use("here", "ILayer", "type", None, True), "LayerType"), "not settable"


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_cpp_calls_our_callbacks(package: str) -> None:
    done = bindings(package)["callbacks"]
    assert (done["errors"], done["warnings"], done["told"]) == (1, 1, 1)
    assert done["goes_on"] == [True] * 4
    assert [step for step, _ in done["steps"]] == [125, 250, 375, 500, 1000]
    assert done["written"] == [6, 6, "engine"]
    assert bool(done["architectures"]) == (package == "tensorrt_rtx")


def test_tensorrt_proper_refuses_what_it_cannot() -> None:
    said = bindings("tensorrt")["refusals"]
    assert said["here"] is None
    code, text = said["aim"]
    assert code == 2 and "TensorRT, which builds for the GPU that it runs on" in text
    code, text = said["builder"]
    assert code == 3 and "a GPU" in text, "the library gave no builder, as without a GPU"
