"""Weights are written as copies of one: the file is the one that onnx_ir writes."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import moec
from moec.exporters.onnx import external_data, write
from moec.exporters.onnx.external_data import write_model
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.families import CASES
from tests.graph_builder.test_weights import _spec
from tests.proofs import assert_passed
from tests.small import SMALL

SPECS = {
    "separate experts": _spec(40),
    "FP8": _spec(40, fp8=True),
    "a default and a vision tower": SMALL,
    "stacked experts": reduced(PRESETS["maverick"], 2).model_copy(update={"vision": None}),
}


@pytest.mark.parametrize("name", SPECS)
def test_files_are_those_of_onnx_ir(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is bound later is the file that a build with weights writes, too."""
    written: list[tuple[bytes, bytes]] = []

    def both(model: ir.Model, path: Path) -> None:
        ir.save(model, path)
        theirs = path.read_bytes()
        write_model(model, path)
        written.append((theirs, path.read_bytes()))

    monkeypatch.setattr(write, "write_model", both)
    spec: ModelSpec = SPECS[name]
    write_random_checkpoint(spec, tmp_path / "weights", 0)
    moec.export(tmp_path / "weights", out=tmp_path / "bound")
    unbound = moec.export(moec.load_spec(tmp_path / "weights"), out=tmp_path / "unbound")
    again = moec.bind(unbound.path, tmp_path / "weights", tmp_path / "again").path
    for file in (tmp_path / "bound").glob("*.onnx"):
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert len(written) == (5 if spec.vision is None else 10)
    assert all(theirs == ours for theirs, ours in written)


@pytest.mark.full
@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("case", ["mixtral", "olmoe"])
def test_experts_that_are_bound_later_are_proven(case: str, target: str, tmp_path: Path) -> None:
    """Each MoE layer calls a function. A check compares the types of its inputs, too."""
    write_random_checkpoint(CASES[case], tmp_path / "weights", 0)
    built = moec.export(tmp_path / "weights", target, "fp32", tmp_path / "built")
    spec = moec.load_spec(tmp_path / "weights")
    later = moec.export(spec, target, "fp32", tmp_path / "later").path
    bound = moec.bind(later, tmp_path / "weights")
    assert bound.graph("model").read_bytes() == built.graph("model").read_bytes()
    assert_passed(moec.validate(later, tokens=9))


def test_the_work_does_not_grow_with_the_number_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    plain = ir.serde.serialize_value

    def counted(value: ir.Value) -> onnx.ValueInfoProto:
        calls.append(value)
        return plain(value)

    monkeypatch.setattr(external_data.ir.serde, "serialize_value", counted)
    work = []
    for count in (40, 80):
        calls.clear()
        moec.export(_spec(count, fp8=True), out=tmp_path / str(count))
        work.append(len(calls))
    assert work[0] == work[1] > 0


def test_weights_without_a_shape_and_scalars_are_not_alike(tmp_path: Path) -> None:
    kind = ir.TensorType(ir.DataType.FLOAT)
    scalar = ir.Value(name="scalar", type=kind, shape=ir.Shape([]))
    inputs = [scalar, ir.Value(name="unknown", type=kind)]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 24}, name="g")
    write_model(ir.Model(graph, ir_version=11), tmp_path / "m.onnx")
    one, two = onnx.load(tmp_path / "m.onnx").graph.input
    assert one.type.tensor_type.HasField("shape") and not two.type.tensor_type.HasField("shape")
