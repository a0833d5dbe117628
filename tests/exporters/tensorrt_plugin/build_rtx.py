"""Runs in a process of its own: TensorRT-RTX builds an engine of one node with the plugin.

    build_rtx.py LIBRARY ENGINE CASE

Prints what TensorRT-RTX says, then "built" and how many bytes, or "refused".
"""

import os
import sys
from pathlib import Path

import tensorrt_rtx as trt
from onnx import TensorProto as T
from onnx import helper

from moec.exporters.tensorrt.preload import preload

LARGEST = 600


class Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: object, text: str) -> None:
        if severity <= trt.ILogger.WARNING:
            print(text, flush=True)


def model(case: str) -> bytes:
    """A layer of dim 256, hidden 128 and 20 experts, or one that is wrong in one respect."""
    dim, hidden, experts = 256, 128, 21 if case == "sizes" else 20
    inputs = {
        "x": (T.BFLOAT16, ["T", dim]),
        "router": (T.BFLOAT16, [experts, dim]),
        "gate_up": (T.FLOAT8E4M3FN, [experts + 1, 2 * hidden, dim]),
        "gate_up_scale": (T.FLOAT, [experts + 1, 2 * hidden]),
        "down": (T.FLOAT8E4M3FN, [experts + 1, dim, hidden]),
        "down_scale": (T.FLOAT, [experts + 1, dim]),
    }
    if case == "dtype":
        inputs["router"] = T.FLOAT, inputs["router"][1]
    if case == "wide weights":
        inputs["down"] = T.BFLOAT16, inputs["down"][1]
    if case == "shape":
        inputs["gate_up_scale"] = T.FLOAT, [experts + 1, hidden]
    if case == "count":
        del inputs["down_scale"]
    node = helper.make_node(
        "MoecMoe", list(inputs), ["y"], domain="moec", plugin_version="1", plugin_namespace="moec"
    )
    graph = helper.make_graph(
        [node], "layer",
        [helper.make_tensor_value_info(name, *each) for name, each in inputs.items()],
        [helper.make_tensor_value_info("y", T.BFLOAT16, ["T", dim])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("moec", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return bytes(made.SerializeToString())


def main() -> None:
    library, engine, case = sys.argv[1:]
    log = Log()
    preload()
    trt.get_plugin_registry().load_library(library)
    builder = trt.Builder(log)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 2
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.set_compute_capability(trt.ComputeCapability.SM120, 1)
    network = builder.create_network()
    parser = trt.OnnxParser(network, log)
    built = None
    if parser.parse(model(case)):
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (1, 256), (16, 256), (LARGEST, 256))
        config.add_optimization_profile(profile)
        built = builder.build_serialized_network(network, config)
    if built is not None:
        Path(engine).write_bytes(built)
    print("refused" if built is None else f"built {built.nbytes}", flush=True)
    os._exit(0)  # all is said


if __name__ == "__main__":
    main()
