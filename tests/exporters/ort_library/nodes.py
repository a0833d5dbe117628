"""Runs in a process whose libcuda.so.1 is the fake one: nodes of the library in ONNX Runtime.

    nodes.py LIBRARY CASE

The library is compiled for ONNX Runtime's CPU provider. Prints a line of JSON: what was said.
"""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from moec.kernels.ahead_of_time.operations import TOKENS
from moec.kernels.ahead_of_time.variants import Operation
from tests.exporters.ort_library.conftest import OPERATIONS

TYPES = {
    "bf16": (TensorProto.BFLOAT16, np.uint16), "fp8e4nv": (TensorProto.FLOAT8E4M3FN, np.uint8),
    "fp32": (TensorProto.FLOAT, np.float32), "i32": (TensorProto.INT32, np.int32),
}  # fmt: skip


def model(operation: Operation, constants: str, left_out: str = "") -> bytes:
    """One node of `operation`."""
    given = [each for each in operation.inputs if each]
    names = [each.name if each and each.name != left_out else "" for each in operation.inputs]
    outputs = [each.name for each in operation.outputs]
    node = helper.make_node(operation.name, names, outputs, domain="moec", constants=constants)

    def info(each: Any) -> Any:
        return helper.make_tensor_value_info(each.name, TYPES[each.dtype][0], list(each.shape))

    graph = helper.make_graph(
        [node], "one", [info(each) for each in given], [info(each) for each in operation.outputs]
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("moec", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()


def value(each: Any, sizes: dict[str, int]) -> Any:
    kind, stored = TYPES[each.dtype]
    shape = [sizes[size] if isinstance(size, str) else size for size in each.shape]
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, stored), kind)


def main() -> None:
    library, case = sys.argv[1:]
    name, _, how = case.partition(":")
    operation, constants = OPERATIONS[name]
    sizes = {TOKENS: 6, "batch": 3, "steps": 2, "slots": 8}
    if how == "step":
        sizes |= {TOKENS: 3, "steps": 1}
    if how in ("none", "many"):
        sizes[TOKENS] = 0 if how == "none" else 70
    if how == "batch":
        sizes[TOKENS] = 7
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        options.register_custom_ops_library(library)
        text = "eps=0.5" if how == "constants" else constants
        session = onnxruntime.InferenceSession(model(operation, text), options)
        binding = session.io_binding()
        for each in operation.inputs:
            if each:
                binding.bind_ortvalue_input(each.name, value(each, sizes))
        for each in operation.outputs:
            binding.bind_output(each.name, "cpu")
        session.run_with_iobinding(binding)
        shapes = {
            each.name: found.shape()
            for each, found in zip(operation.outputs, binding.get_outputs(), strict=True)
        }
        print(json.dumps({"shapes": shapes}))
    except Exception as error:
        print(json.dumps({"failed": str(error)}))


if __name__ == "__main__":
    main()
