"""Inner values of an ONNX model become outputs or inputs, also in the graphs inside it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moec.runtime.engines.inner_values import open_values
from moec.runtime.engines.ort import open_in

HALF, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def _model(dtype: int) -> onnx.ModelProto:
    """y = 2 x, and z = y + y in both branches of an If."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Add", ["y", "y"], [f"{name}_z"])],
            name, [], [helper.make_tensor_value_info(f"{name}_z", dtype, [2])],
        )
        for name in ("then", "else")
    }  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "x"], ["y"]),
            helper.make_node("If", ["which"], ["z"], **branches),
        ],
        "model",
        [
            helper.make_tensor_value_info("x", dtype, [2]),
            helper.make_tensor_value_info("which", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("z", dtype, [2])],
        value_info=[helper.make_tensor_value_info("y", dtype, [2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def _run(model: onnx.ModelProto, **feeds: object) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    onnx.checker.check_model(model, full_check=True)
    evaluator = ReferenceEvaluator(model)
    outputs = evaluator.run(None, {name: np.array(each) for name, each in feeds.items()})
    return dict(zip(evaluator.output_names, outputs, strict=True))


def test_a_tap_is_an_output_and_a_given_value_replaces_what_is_computed() -> None:
    model = _model(FLOAT)
    open_values(model, ["y", "z"], ["y"])
    feeds = {"x": np.ones(2, np.float32), "y.given": np.full(2, 5, np.float32)}
    found = _run(model, which=True, **feeds)
    assert list(found) == ["z", "y"]
    assert found["y"].tolist() == [2, 2] and found["z"].tolist() == [10, 10]


@pytest.mark.parametrize("taps", [["y"], []])
def test_outputs_in_bf16_are_cast_to_float32(taps: list[str]) -> None:
    """The types are checked in the graphs inside, too; numpy has no bf16 to run it with."""
    model = _model(HALF)
    open_in(model, taps, [])
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    types = {each.name: each.type.tensor_type.elem_type for each in inferred.graph.output}
    assert types == dict.fromkeys(["z", *taps], FLOAT)
    casts = [each for each in model.graph.node if each.op_type == "Cast"]
    assert [each.output[0] for each in casts] == ["z", *taps]
    assert model.graph.input[0].type.tensor_type.elem_type == HALF
