"""Many experts with tensors of their own in plain ONNX, against the eager reference."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

import moec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.oracle import assert_rows_agree

SPEC = reduced(PRESETS["olmoe-1b-7b"], layers=2)


@pytest.mark.parametrize(
    ("dtype", "top_k", "operator"),
    [
        ("fp32", 8, "Split"),
        ("fp32", 1, "Split"),
        ("bf16", 8, "Loop"),  # a cast would run for idle experts too
    ],
)
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_idle_experts_cost_nothing_and_change_nothing(
    target: str, dtype: str, top_k: int, operator: str, tmp_path: Path
) -> None:
    assert SPEC.text.experts is not None
    experts = SPEC.text.experts.model_copy(update={"top_k": top_k})
    text = SPEC.text.model_copy(update={"experts": experts})
    spec = SPEC.model_copy(update={"dtype": dtype, "provenance": "custom", "text": text})
    write_random_checkpoint(spec, tmp_path / "weights", seed=3)
    art = moec.export(tmp_path / "weights", target, "fp32", tmp_path / "a")
    assert art.manifest.weights.mode == "in-place" and not art.manifest.build.bytes_copied
    functions = ir.load(art.model).functions.values()
    found = {node.op_type for each in functions for node in each.all_nodes()}
    assert operator in found and found & {"Loop", "Split"} == {operator}
    rows = [torch.randint(0, spec.text.vocab, (n,)) for n in (19, 1)]
    eager = moec.open_session(tmp_path / "weights")
    expected = [eager.logits(row[None])[0] for row in rows]
    for options in ("lean", "fast"):
        session = moec.open_session(tmp_path / "a", session_options=options)
        assert_rows_agree(session, rows, expected)
