"""Routing in ONNX: scores that are divided by their sum are right each, not only in all."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moec.exporters.onnx.write import lower_model
from moec.graph_builder import ops
from moec.graph_builder.builder import Builder

TOKENS, EXPERTS, TOP = 64, 16, 4


@pytest.mark.parametrize("dialect", ["standard", "ort"])
@pytest.mark.parametrize("size", [-1.0, -8.0, -30.0])
@pytest.mark.parametrize("choice", ["logits", "scores"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_normalised_scores_are_right_however_small(
    score: str, choice: str, size: float, dialect: str
) -> None:
    b = Builder({}, lambda _: "fp32")
    logits = ranks = b.input("logits", ("tokens", EXPERTS), torch.float32)
    if choice == "scores":
        ranks = b.emit(ops.ranks, logits, None, score, 1, 1, name="ranks")
    how = (TOP, score, True, 1.0)
    weights, experts = b.emit_pair(ops.route, logits, ranks, *how, name="route")
    graph = b.output({"weights": weights, "experts": experts})
    proto = ir.to_proto(lower_model(graph, dialect, "routing").model)
    session = onnxruntime.InferenceSession(proto.SerializeToString())

    spread = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    given = (size + spread).float()
    found, chosen = session.run(None, {"logits": given.numpy()})
    exact = given.double().sigmoid() if score == "sigmoid" else given.double().softmax(-1)
    best, order = exact.topk(TOP)
    assert np.array_equal(chosen, order.numpy())
    wanted = (best / best.sum(-1, keepdim=True)).numpy()
    assert np.abs(found / wanted - 1).max() < 1e-6
