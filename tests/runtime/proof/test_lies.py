"""What an artefact's files claim without computing it: shapes in graphs, settings for genai."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

import moec
from moec.artefact.artefact import open_artefact
from moec.runtime.proof.graph_files import graph_files
from tests.damage import listed_again
from tests.planted.edit import graphs


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artefact of it for each target that runs in ONNX Runtime."""
    out = tmp_path_factory.mktemp("built")
    return {
        target: moec.export(checkpoint, target=target, out=out / target).path
        for target in ("onnx", "ort")
    }


def _tampered(source: Path, folder: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    shutil.copytree(source, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    listed_again(folder, "model.onnx")
    return folder


def _claims(model: onnx.ModelProto) -> Iterator[Any]:
    """Each value whose shape a session must not believe."""
    for graph in graphs(model.graph):
        yield from graph.value_info
        yield from graph.output
        if graph is not model.graph:
            yield from graph.input


def _false_sizes(model: onnx.ModelProto) -> None:
    """Say that every size that depends on the call is 1."""
    for value in _claims(model):
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1


def _one_expert_runs(model: onnx.ModelProto) -> None:
    """Say that one expert is active, a number that constant folding gives to a loop."""
    (value,) = (
        each for each in model.graph.value_info if each.name.endswith("0.moe.routed/active")
    )
    value.type.tensor_type.shape.dim[0].dim_value = 1


def _annotation(model: onnx.ModelProto) -> None:
    model.graph.quantization_annotation.add().tensor_name = model.graph.node[0].output[0]


def _note(kind: Callable[[onnx.ModelProto], Any]) -> Callable[[onnx.ModelProto], None]:
    """Add a pair to the metadata of a part of the model."""

    def change(model: onnx.ModelProto) -> None:
        pair = kind(model).metadata_props.add()
        pair.key, pair.value = "ort_config", "x"

    return change


def _inner(model: onnx.ModelProto) -> onnx.GraphProto:
    return list(graphs(model.graph))[1]


def _attribute_twice(model: onnx.ModelProto) -> None:
    """Put another value of an attribute before the right one."""
    node = next(each for each in model.graph.node if each.attribute)
    right = list(node.attribute)
    del node.attribute[:]
    wrong = onnx.AttributeProto()
    wrong.CopyFrom(right[0])
    wrong.i += 1
    node.attribute.extend([wrong, *right])


def _unknown_field(model: onnx.ModelProto) -> None:
    """Add a field of number 900, which this version of onnx does not know."""
    model.graph.node[0].MergeFromString(b"\xa0\x38\x01")


def _operator_set(model: onnx.ModelProto) -> None:
    model.opset_import[0].version -= 1


def _output_size(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1


def _document(model: onnx.ModelProto) -> None:
    model.graph.node[1].doc_string = "x"


def _inner_size(model: onnx.ModelProto) -> None:
    _inner(model).output[0].type.tensor_type.shape.dim.add().dim_value = 1


@pytest.mark.parametrize(
    "lie, named",
    [
        (_one_expert_runs, "value_info layers.0.moe.routed/active"),
        (_false_sizes, "layers.0.moe.routed/body/input"),
        (_output_size, "output logits"),
        (_inner_size, "layers.0.moe.routed/body/output"),
        (_annotation, "graph, quantization_annotation"),
        (_note(lambda model: model), "model, metadata_props"),
        (_note(lambda model: model.graph), "graph, metadata_props"),
        (_note(lambda model: model.graph.node[2]), "metadata_props"),
        (_note(lambda model: model.graph.value_info[0]), "value_info"),
        (_note(_inner), "layers.0.moe.routed/body/graph, metadata_props"),
        (_document, "doc_string"),
        (_operator_set, "model, opset_import"),
        (_attribute_twice, "attribute"),
        (_unknown_field, ""),
    ],
)
def test_a_graph_that_says_anything_else_is_named(
    lie: Callable[[onnx.ModelProto], None], named: str, built: dict[str, Path], tmp_path: Path
) -> None:
    folder = _tampered(built["onnx"], tmp_path / "art", lie)
    (check,) = graph_files(open_artefact(folder))
    assert not check.passed and check.name.startswith("model.onnx")
    assert named in check.name


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_a_sound_artefact_says_what_moec_writes(target: str, built: dict[str, Path]) -> None:
    assert all(check.passed for check in graph_files(open_artefact(built[target])))


def test_the_encoding_of_a_graph_decides_nothing(built: dict[str, Path], tmp_path: Path) -> None:
    def other_version(model: onnx.ModelProto) -> None:
        model.producer_version = "0.0.1"

    folder = _tampered(built["onnx"], tmp_path / "art", other_version)
    assert all(check.passed for check in graph_files(open_artefact(folder)))


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 3, 99])
def test_no_proof_passes_with_a_false_shape(
    size: int, built: dict[str, Path], tmp_path: Path
) -> None:
    """ONNX Runtime may believe it, and then refuse to run or compute something else."""

    def lie(model: onnx.ModelProto) -> None:
        (value,) = (v for v in model.graph.value_info if v.name.endswith("0.moe.routed/active"))
        value.type.tensor_type.shape.dim[0].dim_value = size

    folder = _tampered(built["onnx"], tmp_path / "art", lie)
    try:
        report = moec.validate(folder, tokens=4, seed=1)
    except moec.MoecError as error:
        assert error.exit_code == 1
    else:
        assert "model.onnx: value_info layers.0.moe.routed/active" in {
            check.name for check in report.checks if not check.passed
        }
