"""Many experts with tensors of their own in plain ONNX, against the eager reference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import moec
from moec.exporters.onnx.experts.branches import FEW
from moec.exporters.onnx.experts.sorted import DEPTH
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.oracle import assert_rows_agree

SPEC = reduced(PRESETS["olmoe-1b-7b"], layers=2)


def depths(graph: ir.Graph | ir.Function, depth: int = 0) -> Iterator[int]:
    """How many nodes with graphs stand around each product."""
    for node in graph:
        if node.op_type == "Gemm":
            yield depth
        for each in node.attributes.values():
            if each.type == ir.AttributeType.GRAPH:
                yield from depths(each.as_graph(), depth + 1)


@pytest.mark.parametrize(
    ("dtype", "changed", "operators"),
    [
        ("fp32", {"top_k": 8}, {"Split"}),
        ("fp32", {"top_k": 1, "count": FEW + 1}, {"Split"}),
        ("fp32", {"top_k": 8, "count": FEW}, set()),
        ("fp32", {"top_k": 1, "weighed": "input"}, {"Split"}),
        ("bf16", {"top_k": 8}, {"Loop"}),  # a cast would run for idle experts too
    ],
)
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_many_experts_need_no_branch_and_give_the_eager_numbers(
    target: str, dtype: str, changed: dict[str, Any], operators: set[str], tmp_path: Path
) -> None:
    experts = SPEC.text.experts
    assert experts is not None and experts.count > FEW + 1
    weighed = {name: each for name, each in changed.items() if name == "weighed"}
    routing = experts.routing.model_copy(update=weighed)
    sizes = {name: each for name, each in changed.items() if name != "weighed"}
    experts = experts.model_copy(update={"routing": routing, **sizes})
    text = SPEC.text.model_copy(update={"experts": experts})
    spec = SPEC.model_copy(update={"dtype": dtype, "provenance": "custom", "text": text})
    write_random_checkpoint(spec, tmp_path / "weights", seed=3)
    art = moec.export(tmp_path / "weights", target, "fp32", tmp_path / "a")
    assert art.manifest.weights.mode == "in-place" and not art.manifest.build.bytes_copied
    functions = ir.load(art.model).functions.values()
    found = {node.op_type for each in functions for node in each.all_nodes()}
    assert found & {"Loop", "Split"} == operators
    if operators == {"Split"}:  # so deep, no product's weight is prepacked, and so copied
        assert {depth for each in functions for depth in depths(each)} == {DEPTH}
    rows = [torch.randint(0, spec.text.vocab, (n,)) for n in (19, 1)]
    eager = moec.open_session(tmp_path / "weights")
    expected = [eager.logits(row[None])[0] for row in rows]
    for options in ("lean", "fast"):
        session = moec.open_session(tmp_path / "a", session_options=options)
        assert_rows_agree(session, rows, expected)
